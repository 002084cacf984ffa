"""Codebook, moments and queue on real gloo ranks: the state is equal on all ranks and for any split of the global batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.models.layers.standardize import Standardize
from jepa_scale.objectives.grid.quantizer import Quantizer
from jepa_scale.objectives.grid.queue import TargetQueue
from tests.distributed.launch import run_ranks

SLICES, ROWS, STEPS = 4, 6, 9
"""Number of slices of a global batch, rows of a slice, and steps."""


def run(ranks: ParallelContext, accumulation: int) -> dict[str, Any]:
    torch.manual_seed(0)
    book, queue, moments = Quantizer(5, 3, 0.9, 3, 0.5, 4), TargetQueue(30, 3), Standardize(3)
    torch.manual_seed(100 + ranks.rank)  # a rank's own random numbers must not matter
    history = []
    for step in range(STEPS):
        data = torch.Generator().manual_seed(step)
        rows = torch.randn(SLICES, ROWS, 3, generator=data)
        priorities = torch.randint(0, 2**62, (SLICES, ROWS), generator=data)
        keys = torch.randint(0, 60, (SLICES, ROWS), generator=data)
        for micro in range(accumulation):
            part = micro * ranks.world_size + ranks.rank
            here = ROWS - part % 2  # not all of one size
            mine = moments(2 * rows[part, :here] + 1)
            moments.observe(mine)
            book.observe(mine, book(mine).codes, priorities[part, :here], step)
            queue.observe(mine, keys[part, :here], ROWS)
        good = torch.tensor(step != 5)
        moments.update(good, 0.7)
        book.update(good, 0.7)
        queue.update(good)
        state = {**book.state_dict(), **{f"queue_{n}": v for n, v in queue.state_dict().items()}, "usage": book.usage()}
        state |= {f"moments_{n}": v for n, v in moments.state_dict().items()}
        history.append({name: value.clone() for name, value in state.items()})
    return {"history": history}


@pytest.mark.parametrize("world_size", [2, 4])
def test_state_depends_on_the_global_batch_alone(world_size):
    (expected,) = run_ranks(run, 1, SLICES)
    by_rank = run_ranks(run, world_size, SLICES // world_size)
    for step, wanted in enumerate(expected["history"]):
        for name, value in wanted.items():
            for outcome in by_rank:
                got = outcome["history"][step][name]
                assert torch.equal(got, by_rank[0]["history"][step][name]), (step, name)  # bitwise
                torch.testing.assert_close(
                    got, value, rtol=1e-5, atol=1e-6, msg=lambda m, s=step, n=name: f"{s} {n} {m}"
                )
    last = expected["history"][-1]
    assert last["updates"].item() == STEPS - 1 and (last["sizes"] > 0).any()
    assert torch.equal(expected["history"][5]["codebook"], expected["history"][4]["codebook"])
    assert not torch.equal(expected["history"][0]["codebook"], last["codebook"])
