"""The optimizer: which parameter is in which group, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from jepa_scale.config import OptimConfig
from jepa_scale.errors import InputError


def parameter_groups(module: nn.Module, options: OptimConfig, head_prefixes: Sequence[str]) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one of the groups {backbone, head} × {decay, no_decay}.

    A parameter is of the head if any of its names (a tied one has several) starts with one of ``head_prefixes``, which
    are dotted names such as ``"objective"``. Weight decay applies to parameters of two or more dimensions, i.e. not to
    norms, biases, gates and temperatures, and not to ``nn.Embedding`` weights unless ``decay_embeddings``.

    Returns:
        The groups that are not empty, in a fixed order: ``name``, ``names`` (of the parameters), ``params``, ``lr``,
        ``weight_decay``.
    """
    prefixes = tuple(prefix.rstrip(".") + "." for prefix in head_prefixes)
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}

    groups: dict[str, dict[str, Any]] = {}
    unmatched = set(options.overrides)
    for parameter, aliases in names.items():
        part = "head" if any(f"{alias}.".startswith(prefixes) for alias in aliases) else "backbone"
        lr = options.lr_head or options.lr if part == "head" else options.lr
        decays = parameter.ndim >= 2 and (options.decay_embeddings or id(parameter) not in embeddings)
        decay = options.weight_decay if decays else 0.0
        matches = [key for key in options.overrides for alias in aliases if f"{alias}.".startswith(f"{key}.")]
        unmatched.difference_update(matches)
        if matches:
            part = max(matches, key=len)
            override = options.overrides[part]
            lr = lr if override.lr is None else override.lr
            decay = decay if override.weight_decay is None else override.weight_decay
        name = f"{part}.{'decay' if decay else 'no_decay'}"
        group = groups.setdefault(name, {"name": name, "names": [], "params": [], "lr": lr, "weight_decay": decay})
        group["names"].append(aliases[0])
        group["params"].append(parameter)
    if unmatched:
        some = ", ".join(sorted({alias.rsplit(".", 1)[0] for aliases in names.values() for alias in aliases})[:12])
        raise InputError(f"optim.overrides: no parameter's name starts with {min(unmatched)!r}; there are {some}, …")

    grouped = [parameter for group in groups.values() for parameter in group["params"]]
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert sorted(map(id, grouped)) == sorted(map(id, trainable)), "a parameter is in no group or in two"
    return list(groups.values())


def build_optimizer(groups: Sequence[dict[str, Any]], options: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) over groups of :func:`parameter_groups`, as one fused kernel."""
    plain = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    return torch.optim.AdamW(plain, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)


def lr_factor(step: int, options: OptimConfig, total_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (0 … total_steps − 1) as a fraction of the peak.

    With n = step + 1 and w = warmup_steps: n / w while n ≤ w; after that, with t = (n − w) / (total_steps − w) in (0, 1],
    ``cosine`` is f + (1 − f)·½(1 + cos πt), ``linear`` is f + (1 − f)(1 − t) and ``constant`` is 1, where f = final_lr.
    The peak is reached at step w − 1 and ``final_lr`` at the last step.
    """
    n, warmup, final = step + 1, options.warmup_steps, options.final_lr
    if n <= warmup:
        return n / warmup
    if options.schedule == "constant":
        return 1.0
    t = min(1.0, (n - warmup) / max(1, total_steps - warmup))
    shape = 0.5 * (1 + math.cos(math.pi * t)) if options.schedule == "cosine" else 1 - t
    return final + (1 - final) * shape
