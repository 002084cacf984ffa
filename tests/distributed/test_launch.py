"""Imports of ranks at the start."""

from __future__ import annotations

import sys

from jepa_scale.distributed.comm import ParallelContext
from tests.distributed.launch import run_ranks


def imported(ranks: ParallelContext) -> set[str]:
    import jepa_scale.train  # noqa: F401

    return {"torch", "jepa_scale.train", "matplotlib"} & set(sys.modules)


def test_a_rank_does_not_import_what_draws():
    """Only rank 0 plots, at the end of the run."""
    assert run_ranks(imported, 2, fresh=True) == [{"torch", "jepa_scale.train"}] * 2
