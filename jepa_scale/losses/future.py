"""Distillation of the language model's own future: what it will predict at a later place, told from a latent now."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class FutureKL(NamedTuple):
    """For each of n pairs, in nats, (n,) fp32 each: KL(p‖q) = ``cross_entropy`` − ``entropy``."""

    cross_entropy: Tensor
    entropy: Tensor


def future_kl(student: Tensor, teacher: Tensor, temperature: float) -> FutureKL:
    """KL(p‖q) with p = softmax(teacher / T), q = softmax(student / T), both logits (n, V); no gradient into the teacher.

    Multiplied by T² its gradient is as large as at T = 1 (Hinton, Vinyals & Dean, arXiv 1503.02531, section 2); the
    factor is left to the caller. As the teacher sharpens its entropy falls, so the KL may rise though ``cross_entropy``
    falls.
    """
    log_p = torch.log_softmax(teacher.detach().float() / temperature, dim=-1)
    log_q = torch.log_softmax(student.float() / temperature, dim=-1)
    p = log_p.exp()
    return FutureKL(-(p * log_q).sum(dim=-1), -(p * log_p).sum(dim=-1))
