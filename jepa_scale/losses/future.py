"""KL divergence for future distillation: a latent state predicts the language model's own later distribution."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class FutureKL(NamedTuple):
    """Terms of KL(p‖q) = ``cross_entropy`` − ``entropy`` for each of n pairs: (n,) fp32 each, in nats."""

    cross_entropy: Tensor
    entropy: Tensor


def future_kl(student: Tensor, teacher: Tensor, temperature: float) -> FutureKL:
    """Terms of KL(p‖q) with p = softmax(teacher / T) and q = softmax(student / T), in fp32.

    ``student`` and ``teacher`` are logits, (n, V); the teacher gets no gradient.

    The gradient of T² · KL is as large as at T = 1 (Hinton, Vinyals & Dean, arXiv 1503.02531, section 2); the caller
    applies this factor. The entropy of a teacher that sharpens falls, so the KL may rise while ``cross_entropy`` falls.
    """
    log_p = torch.log_softmax(teacher.detach().float() / temperature, dim=-1)
    log_q = torch.log_softmax(student.float() / temperature, dim=-1)
    p = log_p.exp()
    return FutureKL(-(p * log_q).sum(dim=-1), -(p * log_p).sum(dim=-1))
