"""Unit, direction and position in a report of each metric, by its name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from jepa_scale.utils.splits import TRAIN


@dataclass(frozen=True, slots=True)
class Metric:
    """Properties of a metric.

    Attributes:
        unit: empty when unknown.
        better: direction of improvement; ``None`` if the metric has none.
    """

    name: str
    unit: str = ""
    better: Literal["lower", "higher"] | None = None

    @property
    def label(self) -> str:
        return f"{self.name} [{self.unit}]" if self.unit else self.name


STEP_PARTS = ("data", "gather", "forward", "backward", "optimizer", "teacher", "other")
"""Parts of a step's time: waiting for the loader; the gather pass; forward and backward of all micro-batches; clipping and
update; the teacher's update; everything else, mostly logging and the wait for the data of the slowest rank."""
STEP_TIME = "time_per_step"
"""Name of the metric for the sum of these parts, in seconds."""


def step_part(part: str) -> str:
    """Return the name of the metric for one of ``STEP_PARTS``, in seconds per step."""
    return f"time_{part}"


# in the order of a report
_KNOWN = [
    Metric("loss", "", "lower"),
    Metric("lm_loss", "nats/token", "lower"),
    Metric("mlm_loss", "nats/token", "lower"),
    Metric("jepa_loss", "", "lower"),
    Metric("router_aux_loss", "", "lower"),
    Metric("ppl", "", "lower"),
    Metric("exact_match", "fraction", "higher"),
    Metric("exact_match_upstream", "fraction", "higher"),
    Metric("starts_with", "fraction", "higher"),
    Metric("starts_with_upstream", "fraction", "higher"),
    Metric("gsm8k", "fraction", "higher"),
    Metric("gsm8k_upstream", "fraction", "higher"),
    Metric("multiple_choice", "fraction", "higher"),
    Metric("multiple_choice_upstream", "fraction", "higher"),
    Metric("open_answer", "fraction", "higher"),
    Metric("open_answer_upstream", "fraction", "higher"),
    Metric("sql_execution", "fraction", "higher"),
    Metric("sql_execution_upstream", "fraction", "higher"),
    Metric("stopped", "fraction"),
    Metric("generated", "answers"),
    Metric("unscored", "rows", "lower"),
    Metric("mrr", "1/rank", "higher"),
    Metric("joint_nll", "nats", "lower"),
    Metric("retrieval_top1", "fraction", "higher"),
    Metric("retrieval_margin", "cosine", "higher"),
    Metric("std_gap"),
    Metric("knn_accuracy", "fraction", "higher"),
    Metric("probe_accuracy", "fraction", "higher"),
    Metric("chance", "fraction"),
    Metric("effective_rank", "dimensions", "higher"),
    Metric("effective_rank_tokens", "dimensions", "higher"),
    Metric("effective_rank_prediction", "dimensions", "higher"),
    Metric("effective_rank_directions", "dimensions", "higher"),
    Metric("covariance_entropy_rank_context", "dimensions", "higher"),
    Metric("covariance_entropy_rank_target", "dimensions", "higher"),
    Metric("seq_rec", "", "lower"),
    Metric("seq_sigreg", "", "lower"),
    Metric("span_rec", "", "lower"),
    Metric("span_sigreg", "", "lower"),
    Metric("sigreg", "", "lower"),
    Metric("alignment", "squared distance", "lower"),
    Metric("uniformity", "log", "lower"),
    Metric("texts", "texts"),
    Metric("classes", "labels"),
    Metric("kl_future", "nats", "lower"),
    Metric("ce_future", "nats", "lower"),
    Metric("teacher_entropy", "nats"),
    Metric("vq_usage", "fraction", "higher"),
]
_OPTIMIZER = [
    Metric("lr"),
    Metric("lr_head"),
    Metric("grad_norm", "L2"),
    Metric("grad_norm_lower", "L2"),
    Metric("grad_norm_upper", "L2"),
    Metric("grad_norm_decoder", "L2"),
    Metric("grad_norm_heads", "L2"),
    Metric("skipped_steps", "steps", "lower"),
    Metric("loss_scale"),
]
_SPEED = [
    Metric("tokens_per_second", "tokens/s", "higher"),
    Metric("packing_efficiency", "fraction", "higher"),
    Metric("data_wait", "fraction", "lower"),
    Metric("skipped_samples", "samples", "lower"),
    Metric("mfu", "fraction of peak", "higher"),
    Metric("seconds", "s"),
    Metric(STEP_TIME, "s", "lower"),
    *(Metric(step_part(part), "s", "lower") for part in STEP_PARTS),
    Metric("time_data_slowest", "s", "lower"),
]
_MACHINERY = [*_OPTIMIZER, *_SPEED]
_CHARTS = {m.name: group for group, of in (("optimizer", _OPTIMIZER), ("speed", _SPEED)) for m in of}
_BY_NAME = {m.name: m for m in [*_KNOWN, *_MACHINERY]}
_LOWER = {"loss", "nll", "ppl", "error", "perplexity", "brier"}
_HIGHER = {
    "accuracy",
    "acc",
    "f1",
    "mcc",
    "bleu",
    "chrf",
    "match",
    "mrr",
    "top1",
    "hits",
    "margin",
    "usage",
    "efficiency",
    "mfu",
}


def describe(name: str) -> Metric:
    """Return the properties of a metric.

    The direction of a name that is not listed follows from its words (``recon_loss``, ``code_accuracy``). Other unlisted
    names, such as those of gates and temperatures, have none.
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    words = set(name.lower().replace("/", "_").split("_"))
    if words & _LOWER:
        return Metric(name, "", "lower")
    return Metric(name, "", "higher" if words & _HIGHER else None)


def chart(split: str, name: str) -> str:
    """Return the name of a metric in TensorBoard and W&B, which group metrics by the word before the first slash.

    The groups are ``train`` and ``eval``, and ``optimizer`` and ``speed`` for such metrics of training.
    """
    return f"{_CHARTS.get(name, split) if split == TRAIN else split}/{name}"


def in_report_order(names: set[str]) -> list[str]:
    """Sort metric names: listed results first, then unlisted names alphabetically, then optimizer and speed."""
    first = [m.name for m in _KNOWN if m.name in names]
    last = [m.name for m in _MACHINERY if m.name in names]
    return [*first, *sorted(names - {*first, *last}), *last]


HEADLINES = 4
"""Metrics of an evaluation in a line of the log."""


def headlines(names: Iterable[str]) -> list[str]:
    """Return the first few metrics of an evaluation in a report's order: those that can improve come before those that cannot."""
    ordered = in_report_order(set(names))
    return sorted(ordered, key=lambda name: describe(name).better is None)[:HEADLINES]
