"""A covering array of small runs: every pair of levels of two factors occurs in at least one run.

Most faults of a trainer need a combination of two factors (an engine and a loss, a degree of tensor parallelism and a
precision). Few need three; these have tests of their own. The full product is tested with the marker ``matrix``.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

from tests.distributed.systems import SYSTEMS


class Case(NamedTuple):
    """One run. ``tp``: degree of tensor parallelism. ``recompute``: activation checkpointing."""

    system: str
    engine: str
    ranks: int
    accumulation: int
    precision: str
    tp: int
    recompute: str

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


FACTORS: dict[str, tuple[object, ...]] = {
    "objective": tuple(sorted({system.objective for system in SYSTEMS.values()})),
    "family": ("native", "huggingface"),
    "optimizer": ("adamw", "muon"),
    "engine": ("fsdp", "zero0", "zero1", "zero2", "zero3"),
    "ranks": (1, 2, 4),
    "accumulation": (1, 2),
    "precision": ("fp32", "bf16"),
    "tp": (1, 2),
    "recompute": ("none", "selective", "full"),
}


def levels(case: tuple) -> dict[str, object]:
    """Return factor → level of the case."""
    case = Case(*case)
    system = SYSTEMS[case.system]
    return {
        "objective": system.objective,
        "family": system.family,
        "optimizer": system.optimizer,
        **{name: value for name, value in case._asdict().items() if name != "system"},
    }


def possible(case: tuple) -> bool:
    """Return whether the trainer supports such a run; refusals have tests of their own."""
    case = Case(*case)
    system = SYSTEMS[case.system]
    if system.form == "text":  # 4 micro-batches a step, whatever the ranks
        return case.tp == 1 and case.accumulation == (1 if case.ranks == 4 else 2)
    if case.tp > 1:
        return case.ranks > 1 and system.optimizer != "muon" and "gpt2" not in case.system
    return True


def pairs(case: tuple) -> set[tuple[tuple[str, object], tuple[str, object]]]:
    return set(combinations(sorted(levels(case).items()), 2))


CASES = [
    Case("lm_budget", "fsdp", 1, 2, "bf16", 1, "none"),
    Case("stp_native", "fsdp", 1, 1, "bf16", 1, "selective"),
    Case("pairs_infonce", "zero0", 1, 2, "bf16", 1, "full"),
    Case("chat_teacher", "zero2", 1, 2, "fp32", 1, "none"),
    Case("concept_gpt2", "zero1", 1, 1, "fp32", 1, "full"),
    Case("barlow", "zero3", 1, 1, "bf16", 1, "selective"),
    Case("span", "fsdp", 1, 2, "fp32", 1, "selective"),
    Case("grid_objects", "zero2", 1, 2, "fp32", 1, "selective"),
    Case("lm", "fsdp", 2, 1, "fp32", 2, "full"),
    Case("lm", "zero1", 2, 1, "fp32", 1, "none"),
    Case("lm_gpt2", "zero2", 2, 2, "bf16", 1, "selective"),
    Case("lm_gpt2", "zero3", 2, 1, "fp32", 1, "none"),
    Case("stp", "zero0", 2, 2, "fp32", 2, "selective"),
    Case("stp", "zero1", 2, 2, "fp32", 1, "selective"),
    Case("stp_native", "fsdp", 2, 1, "fp32", 1, "selective"),
    Case("stp_native", "zero3", 2, 1, "fp32", 1, "none"),
    Case("pairs", "zero3", 2, 2, "fp32", 2, "none"),
    Case("pairs_infonce", "zero2", 2, 1, "fp32", 1, "selective"),
    Case("chat_teacher", "zero1", 2, 2, "fp32", 1, "full"),
    Case("chat_sigreg", "zero0", 2, 1, "fp32", 2, "full"),
    Case("concept", "zero0", 2, 2, "fp32", 1, "none"),
    Case("concept", "zero2", 2, 2, "fp32", 2, "none"),
    Case("concept_memory", "fsdp", 2, 2, "fp32", 1, "full"),
    Case("concept_linear", "zero1", 2, 1, "fp32", 2, "selective"),
    Case("vicreg", "zero3", 2, 1, "fp32", 2, "selective"),
    Case("cosine", "zero1", 2, 2, "fp32", 1, "selective"),
    Case("smooth_l1", "fsdp", 2, 2, "fp32", 2, "full"),
    Case("qwen3", "zero2", 2, 1, "fp32", 1, "none"),
    Case("span", "zero3", 2, 2, "fp32", 1, "selective"),
    Case("span_teacher", "fsdp", 2, 2, "bf16", 2, "full"),
    Case("span_teacher", "zero0", 2, 2, "fp32", 2, "none"),
    Case("span_teacher", "zero1", 2, 1, "fp32", 2, "full"),
    Case("span_teacher", "zero3", 2, 2, "fp32", 1, "none"),  # masked tokens on the gathered LM head
    Case("span_teacher", "fsdp", 4, 1, "fp32", 1, "none"),
    Case("grid_objects", "fsdp", 2, 2, "fp32", 2, "selective"),
    Case("grid_objects", "zero0", 2, 2, "fp32", 1, "full"),
    Case("grid_decoder", "zero2", 2, 1, "fp32", 1, "none"),
    Case("grid_decoder", "zero3", 2, 2, "fp32", 1, "none"),
    Case("lm_budget", "zero0", 4, 1, "fp32", 1, "selective"),
    Case("stp", "zero2", 4, 2, "fp32", 2, "full"),
    Case("chat", "fsdp", 4, 1, "fp32", 2, "none"),
    Case("concept_gpt2", "zero3", 4, 1, "bf16", 1, "full"),
    Case("tied", "zero0", 4, 2, "fp32", 2, "selective"),
    Case("span", "zero2", 4, 1, "fp32", 1, "selective"),
    Case("grid_decoder", "zero1", 4, 1, "bf16", 1, "none"),
    Case("nitp", "zero3", 2, 2, "fp32", 1, "selective"),
    Case("nitp", "fsdp", 2, 1, "fp32", 2, "none"),
    Case("mtp", "fsdp", 2, 1, "fp32", 1, "none"),
    Case("mtp_native", "zero0", 4, 2, "fp32", 1, "selective"),
    Case("mtp", "zero1", 2, 1, "fp32", 2, "full"),
    Case("mtp", "zero2", 2, 2, "fp32", 1, "full"),
    Case("mtp", "zero3", 2, 2, "fp32", 2, "none"),
    Case("mtp", "fsdp", 1, 1, "bf16", 1, "none"),
    Case("next_latent", "fsdp", 2, 1, "fp32", 1, "none"),
    Case("next_latent_teacher", "zero0", 4, 2, "fp32", 1, "selective"),
    Case("next_latent", "zero1", 2, 1, "fp32", 2, "full"),
    Case("next_latent", "zero2", 2, 2, "fp32", 1, "full"),
    Case("next_latent", "zero3", 2, 2, "fp32", 2, "none"),
    Case("next_latent", "fsdp", 1, 1, "bf16", 1, "none"),
]
"""Each objective occurs with each engine on two or four ranks; a greedy search chose the rest to cover the other pairs."""
