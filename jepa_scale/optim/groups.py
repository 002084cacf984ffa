"""Assignment of parameters to optimizer groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from torch import nn

from jepa_scale.config.schema import GroupOverride, OptimConfig
from jepa_scale.optim.matrices import Matrix, linear_weights
from jepa_scale.utils.errors import InputError

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}
"""Method → names of its state tensors, which have the shape of the parameter."""


def parameter_groups(module: nn.Module, options: OptimConfig, head_prefixes: Sequence[str]) -> list[dict[str, Any]]:
    """Assign every trainable parameter to exactly one of the groups {backbone, head} × {AdamW, Muon} × {decay, no_decay}.

    A parameter belongs to the head if any of its names (a tied one has several) starts with one of ``head_prefixes``,
    which are dotted names such as ``"objective"``. Weight decay applies to parameters of two or more dimensions, not to
    norms, biases, gates and temperatures; it applies to ``nn.Embedding`` weights only with ``decay_embeddings``. Muon is
    used for :func:`jepa_scale.optim.matrices.linear_weights`, if ``method`` or an override selects it.

    An override applies to all parameters under its prefix; they form groups of their own, named by the prefix. Where
    several prefixes match, the longest applies. An override with the full name of a matrix can select Muon for any matrix.

    Returns:
        The groups that are not empty, in a fixed order. Keys: ``name``, ``names`` (of the parameters), ``params``, ``lr``,
        ``weight_decay``, ``method``. Groups of Muon also have ``matrices``, a :class:`jepa_scale.optim.matrices.Matrix`
        for each parameter.

    Raises:
        InputError: an override matches no parameter, or selects Muon where there is no matrix.
    """
    prefixes = tuple(prefix.rstrip(".") + "." for prefix in head_prefixes)
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    weights = linear_weights(module)

    groups: dict[tuple[str, float, float], dict[str, Any]] = {}
    used: dict[str, list[nn.Parameter]] = {key: [] for key in options.overrides}
    for parameter, aliases in names.items():
        part = "head" if any(f"{alias}.".startswith(prefixes) for alias in aliases) else "backbone"
        lr = options.lr_head if part == "head" else None
        matches = [key for key in options.overrides for alias in aliases if f"{alias}.".startswith(f"{key}.")]
        override = GroupOverride()
        if matches:
            part = max(matches, key=len)
            override = options.overrides[part]
        for key in matches:
            used[key].append(parameter)
        decays = parameter.ndim >= 2 and (options.decay_embeddings or id(parameter) not in embeddings)
        decay = options.weight_decay if decays else 0.0
        decay = decay if override.weight_decay is None else override.weight_decay
        in_full = override.method == "muon" and part in aliases  # a full name permits any matrix
        muon = (override.method or options.method) == "muon" and (
            parameter in weights or (in_full and _is_matrix(parameter))
        )
        lr = override.lr or (options.lr_muon if muon else None) or lr or options.lr

        name = f"{part}.{'muon.' if muon else ''}{'decay' if decay else 'no_decay'}"
        new = {"name": name, "names": [], "params": [], "lr": lr, "weight_decay": decay}
        new |= {"method": "muon", "matrices": []} if muon else {"method": "adamw"}
        group = groups.setdefault((name, lr, decay), new)
        group["names"].append(aliases[0])
        group["params"].append(parameter)
        if muon:
            rows, cols = parameter.shape
            group["matrices"].append(Matrix(aliases[0], rows, cols, weights.get(parameter, False)))
    matrices = {parameter for group in groups.values() if "matrices" in group for parameter in group["params"]}
    for key, parameters in used.items():
        _check_override(key, options.overrides[key], parameters, matrices, names)

    grouped = [parameter for group in groups.values() for parameter in group["params"]]
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert sorted(map(id, grouped)) == sorted(map(id, trainable)), "a parameter is in no group or in two"
    return list(groups.values())


def _is_matrix(parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and parameter.numel() > 0


def _check_override(
    key: str,
    override: GroupOverride,
    parameters: Sequence[nn.Parameter],
    matrices: Set[nn.Parameter],
    names: Mapping[nn.Parameter, Sequence[str]],
) -> None:
    """Raise InputError for an override without effect.

    Args:
        parameters: those whose names start with ``key``. matrices: all parameters that use Muon.
    """
    if not parameters:
        some = ", ".join(sorted({alias.rsplit(".", 1)[0] for aliases in names.values() for alias in aliases})[:12])
        raise InputError(f"optim.overrides: no parameter's name starts with {key!r}; use one of {some}, …")
    if override.method == "muon" and matrices.isdisjoint(parameters):
        first = parameters[0]
        found = f"{names[first][0]} has shape {tuple(first.shape)} and" if key in names[first] else "there"
        hint = (
            "; give the full name of a matrix to use Muon for it" if any(map(_is_matrix, parameters)) else "; remove it"
        )
        raise InputError(
            f"optim.overrides.{key}.method: {found} is no weight of a linear layer, and Muon updates only these{hint}"
        )
