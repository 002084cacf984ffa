"""The optimizer: parameter groups, the method that updates each group, and the learning rate of each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from jepa_scale.config.schema import OptimConfig
from jepa_scale.optim.exchange import Part
from jepa_scale.optim.groups import parameter_groups
from jepa_scale.optim.muon import MatrixOptimizer
from jepa_scale.optim.schedule import lr_factor

__all__ = ["MatrixOptimizer", "Part", "build_optimizer", "lr_factor", "parameter_groups"]


def build_optimizer(groups: Sequence[dict[str, Any]], options: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer for groups of :func:`parameter_groups`.

    It is AdamW (Loshchilov & Hutter, arXiv 1711.05101) with fused kernels. If a group uses Muon, it is a
    :class:`jepa_scale.optim.muon.MatrixOptimizer`, whose ``bind`` must be called before the first step.
    """
    plain = [{key: group[key] for key in ("name", "params", "lr", "weight_decay")} for group in groups]
    adamw: dict[str, Any] = {"lr": options.lr, "betas": options.betas, "eps": options.eps, "fused": True}
    matrices = {matrix.name: matrix for group in groups for matrix in group.get("matrices", ())}
    if not matrices:
        return torch.optim.AdamW(plain, **adamw)
    for of_group, group in zip(plain, groups, strict=True):
        of_group["method"] = group["method"]
    return MatrixOptimizer(plain, matrices, options.muon_momentum, options.muon_steps, options.adjust_lr, adamw)
