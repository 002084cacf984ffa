"""fp16 on every engine: the curves of fp32, steps that overflow, and a scale that is no part of what is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jepa_scale.distributed.comm import ParallelContext
from tests.distributed import toy
from tests.distributed.launch import run_ranks
from tests.distributed.toy import ENGINES, make_engine

STEPS = 8  # the four batches, and the same again
SCALE = 2.0**10
"""At which nothing of the toy overflows."""
TOO_LARGE = 2.0**20
"""At which everything does."""


def curves(ranks: ParallelContext, cases: list[dict[str, Any]]) -> list[Any]:
    results = []
    for case in cases:
        engine = make_engine(ranks=ranks, accumulation=2, **case)
        if engine.loss_scale:
            engine.loss_scale.factor.fill_(SCALE)
        dtypes = {p.dtype for p in engine.full_state().values()}
        results.append((*toy.train(engine, range(STEPS)), dtypes, engine.updates))
    return results


def test_curves_and_norms_are_those_of_fp32_with_and_without_clipping():
    """A scale left in the gradient would be a factor of 1,024 in the norms."""
    cases: list[dict[str, Any]] = [{"name": "fsdp"}, {"name": "fsdp", "clip": 0.0}]
    cases += [{"name": name, "precision": "fp16"} for name in ENGINES]
    cases += [{"name": name, "precision": "fp16", "clip": 0.0} for name in ("fsdp", "zero2")]
    by_rank = run_ranks(curves, 2, cases)
    for i, case in enumerate(cases[2:], 2):
        plain = int("clip" in case)
        losses, expected = (torch.tensor([rank[n][0] for rank in by_rank]).sum(0) for n in (i, plain))
        torch.testing.assert_close(losses, expected, rtol=1e-2, atol=1e-2, msg=lambda m, case=case: f"{case}: {m}")
        norms, wanted = by_rank[0][i][1], by_rank[0][plain][1]
        assert norms == pytest.approx(wanted, rel=0.05), case
        assert by_rank[0][i][2] == {torch.float32} and by_rank[0][i][3] == STEPS, case


def overflows(ranks: ParallelContext, names: tuple[str, ...]) -> list[Any]:
    results = []
    for name in names:
        engine = make_engine(name, ranks, precision="fp16")
        assert engine.loss_scale is not None
        engine.loss_scale.factor.fill_(SCALE)
        toy.train(engine, range(1))
        found = [engine.loss_scale.state()]
        before = engine.full_state()
        engine.loss_scale.factor.fill_(TOO_LARGE)
        norms = toy.train(engine, range(1, 2))[1]
        found.append(engine.loss_scale.state())
        after = engine.full_state()
        unchanged = all(torch.equal(before[key], after[key]) for key in before)
        norms += toy.train(engine, range(2, 12))[1]
        results.append((found, unchanged, norms, engine.loss_scale.state(), engine.updates))
    return results


def test_a_step_that_overflows_is_skipped_and_halves_the_scale():
    """At such a scale gradients are above 65,504; the next steps find one at which they are not."""
    for results in run_ranks(overflows, 2, ENGINES):
        for name, (found, unchanged, norms, last, updates) in zip(ENGINES, results, strict=True):
            assert found == [{"factor": SCALE, "steps": 1}, {"factor": TOO_LARGE / 2, "steps": 0}], name
            finite = torch.tensor(norms).isfinite().tolist()
            assert unchanged and not finite[0] and any(finite), (name, norms)
            factor, steps = TOO_LARGE, 0
            for step_counts in finite:
                factor, steps = (factor, steps + 1) if step_counts else (factor / 2, 0)
            assert last == {"factor": factor, "steps": steps} and updates == 1 + sum(finite), name
