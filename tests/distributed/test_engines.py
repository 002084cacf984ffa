"""Every engine on real gloo ranks, against plain PyTorch in one process."""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from jepa_scale.distributed.comm import ParallelContext
from tests.distributed import toy
from tests.distributed.launch import run_ranks
from tests.distributed.toy import ENGINES, make_engine

STEPS = 6
"""Number of steps. One layer is used in some micro-batches of steps 1, 2, 4 and 5 and in none of steps 0 and 3, so that its
moments decay without a gradient in between. Evaluations follow steps 1 and 4. At this learning rate the error of a weight
that is one step old is 1e-2, a hundred times the tolerance."""
PRODUCT = [{"name": e, "accumulation": a, "tied": a == 2} for a, e in product((1, 2), ENGINES)]
"""Full product of engines and numbers of micro-batches, always with an unused layer, because these are known to interact."""


def train_all(ranks: ParallelContext, cases: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Train each case; return local losses, gradient norms, evaluation outputs and the full state after ``steps`` steps."""
    results = []
    for case in cases:
        engine = make_engine(ranks=ranks, **case)
        losses, norms = toy.train(engine, range(steps))
        results.append(
            {
                "losses": losses,
                "norms": norms,
                "evaluated": toy.evaluate(engine),
                "state": engine.full_state(),
            }
        )
        assert engine.lr() == pytest.approx(toy.OPTIM.lr * toy.factor(steps - 1))
        if engine.name == "deepspeed":
            assert engine.ds.global_steps == steps
            assert engine.ds.micro_steps == steps * case.get("accumulation", 1)
    return results


def total_losses(by_rank: list[list[dict[str, Any]]], case: int) -> torch.Tensor:
    return torch.tensor([r[case]["losses"] for r in by_rank], dtype=torch.float64).sum(dim=0)


@pytest.mark.parametrize("world_size", [2, *(pytest.param(n, marks=pytest.mark.matrix) for n in (1, 4))])
def test_fp32_curves_norms_and_weights_equal_plain_torch(world_size):
    """Test clipped AdamW on a module that uses its parameters irregularly.

    Blocks 0 and 1 run twice in a forward; evaluations run other blocks in another order; one layer is used in some
    micro-batches only, and one in none.
    """
    cases = PRODUCT if world_size < 4 else [case for case in PRODUCT if case["accumulation"] == 2]
    by_rank = run_ranks(train_all, world_size, cases, STEPS)
    for i, case in enumerate(cases):
        losses, norms, module = toy.reference(STEPS, case["accumulation"], tied=case["tied"])
        assert max(norms) > 1.5 * toy.OPTIM.clip_norm  # clipping is active
        got = by_rank[0][i]
        assert (total_losses(by_rank, i) - torch.tensor(losses)).abs().max() < 1e-5, case
        torch.testing.assert_close(torch.tensor(got["norms"]), torch.tensor(norms), rtol=1e-5, atol=1e-5)

        expected = module.state_dict()
        assert set(got["state"]) == set(expected) and "seen" in expected and "scratch" not in expected
        for name, value in expected.items():
            assert got["state"][name].dtype == torch.float32
            # a bias under a norm has a gradient of rounding errors only, which Adam blows up to its step size
            torch.testing.assert_close(
                got["state"][name], value, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
        if case["tied"]:
            assert got["state"]["head.weight"].data_ptr() == got["state"]["embed.weight"].data_ptr()
        assert all(rank[i]["state"] == {} for rank in by_rank[1:])

        with torch.no_grad():
            batch = toy.batches(99)[0]
            for output, task in zip(got["evaluated"], ("logits", "names", "logits"), strict=True):
                torch.testing.assert_close(output, module(task, batch), rtol=1e-3, atol=1e-3)


def test_bf16_learns_and_keeps_fp32_masters():
    steps = 8  # the four batches, and the same ones again
    cases = [{"name": e, "accumulation": 2, "precision": "bf16"} for e in ENGINES]
    by_rank = run_ranks(train_all, 2, cases, steps)
    losses, norms, _ = toy.reference(steps, 2)
    for i, case in enumerate(cases):
        got = total_losses(by_rank, i)
        assert got[-4:].mean() < 0.95 * got[:4].mean(), case
        assert (got - torch.tensor(losses)).abs().max() < 0.03, case
        torch.testing.assert_close(torch.tensor(by_rank[0][i]["norms"]), torch.tensor(norms), rtol=0.02, atol=0.0)
        weight = by_rank[0][i]["state"]["layers.0.up.weight"]
        assert weight.dtype == torch.float32
        assert (weight != weight.bfloat16().float()).float().mean() > 0.9, f"{case}: masters are rounded to bf16"


def test_without_clipping_the_norm_is_still_reported():
    steps = 3  # Adam's first update is the same for a gradient of any length; the third loss tells
    cases = [{"name": e, "clip": 0.0} for e in ENGINES]
    by_rank = run_ranks(train_all, 2, cases, steps)
    losses, norms, _ = toy.reference(steps, clip=0.0)
    for i, case in enumerate(cases):
        assert (total_losses(by_rank, i) - torch.tensor(losses)).abs().max() < 1e-5, case
        torch.testing.assert_close(torch.tensor(by_rank[0][i]["norms"]), torch.tensor(norms), rtol=1e-5, atol=1e-5)


def refusals(ranks: ParallelContext, name: str) -> list[str]:
    engine = make_engine(name, ranks, accumulation=2)
    batch = toy.batches(0, 2)[0]
    messages = []

    def attempt(*calls: Any) -> None:
        try:
            for call in calls:
                call()
        except AssertionError as error:
            messages.append(str(error))
        else:
            messages.append("")

    def forward() -> None:
        forward.loss = engine.forward("loss", batch).total

    def backward() -> None:
        engine.backward(forward.loss)

    attempt(forward, backward, backward)  # a second backward of the same forward
    attempt(engine.step)  # one of two micro-batches is missing
    attempt(forward, forward, backward)  # a forward that nobody went back through
    return messages


@pytest.mark.parametrize("name", ["fsdp", "zero1"])
def test_only_one_forward_and_one_backward_per_micro_batch(name):
    second, early, lost = run_ranks(refusals, 1, name)[0]
    assert "0 forwards with gradient" in second
    assert "step after 1 backwards" in early
    assert "2 forwards with gradient" in lost


def extensions_built(ranks: ParallelContext, folder: str) -> list[str]:
    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    toy.train(make_engine("zero2", ranks, precision="bf16"), range(2))
    return [str(path) for path in Path(folder).rglob("*")]


def test_deepspeed_compiles_nothing(tmp_path):
    assert run_ranks(extensions_built, 1, str(tmp_path), fresh=True) == [[]]  # nothing built and loaded before


def different_weights(ranks: ParallelContext, name: str) -> dict[str, torch.Tensor]:
    def fill(module: torch.nn.Module) -> None:
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.constant_(module.weight, float(ranks.rank))

    with toy.changed("make_toy", lambda made: made.apply(fill)):
        return make_engine(name, ranks).full_state()


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_every_rank_starts_from_rank_0s_weights(name):
    state = run_ranks(different_weights, 2, name)[0]
    assert (state["layers.1.up.weight"] == 0).all() and (state["project.weight"] == 0).all()


def fail_on_rank_1(ranks: ParallelContext) -> int:
    if ranks.rank == 1:
        raise ValueError("no luck")
    torch.distributed.barrier()
    return ranks.rank


def number(ranks: ParallelContext) -> int:
    return ranks.rank


def test_launcher_reports_the_rank_that_failed():
    with pytest.raises(AssertionError, match=r"rank 1 of 2 failed:[\s\S]*no luck"):
        run_ranks(fail_on_rank_1, 2)
    assert run_ranks(number, 2) == [0, 1]  # by others: those that waited for rank 1 have been ended
