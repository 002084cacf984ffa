"""Distances between paired embeddings (LLM-JEPA, arXiv 2509.14252, section 3, and its published code)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """One minus the cosine similarity, in fp32. (n, d), (n, d) → (n,)."""
    return 1 - F.cosine_similarity(a.float(), b.float(), dim=-1)


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean norm of the difference, in fp32. (n, d), (n, d) → (n,)."""
    return torch.linalg.vector_norm(a.float() - b.float(), dim=-1)


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean over features of the squared difference, in fp32. (n, d), (n, d) → (n,)."""
    return (a.float() - b.float()).square().mean(dim=-1)


def smooth_l1(a: Tensor, b: Tensor, beta: float = 1.0) -> Tensor:
    """Mean over features of the Huber loss divided by ``beta``, in fp32. (n, d), (n, d) → (n,).

    The loss is quadratic below ``beta`` and linear above (Girshick, arXiv 1504.08083, equation 3).
    """
    return F.smooth_l1_loss(a.float(), b.float(), reduction="none", beta=beta).mean(dim=-1)


DISTANCES = {"cosine": cosine, "l2": l2, "mse": mse}
