"""Tasks: the methods of an objective that run the model and are called by name through the engine."""

from __future__ import annotations

from typing import Any, Literal, Protocol, get_args

Task = Literal[
    "loss",
    "gather",
    "encode",
    "next_token_logits",
    "label_log_probs",
    "label_matches",
    "label_scores",
    "generate",
    "diagnose",
    # of the concept objective alone
    "encode_names",
    "predict",
    "decode_logits",
]
TASKS: frozenset[str] = frozenset(get_args(Task))
"""Names of the methods that :meth:`jepa_scale.objectives.base.JepaModel.forward` may call. An objective outside of this package
adds its own names in ``Objective.own_tasks``."""


class Call(Protocol):
    """Function that runs a task of the objective through the engine, without gradient, on all ranks together."""

    def __call__(self, task: Task, batch: Any, /, *args: Any) -> Any: ...
