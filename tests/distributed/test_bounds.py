"""Bounded parameters on every engine: clamped after an update, and free to leave a bound again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.optim import build_optimizer, parameter_groups
from tests.distributed.launch import run_ranks
from tests.distributed.toy import ENGINES, HEADS, OPTIM, batches, make_engine, make_toy

LOW, HIGH = -0.012, 0.012
BOUNDS = {"scale.log_scale": (LOW, HIGH), "root_gain": (1 + LOW, 1 + HIGH)}
STEPS, TURN = 10, 3
"""Number of steps, and step after which the sign of the loss changes: it drives the scale to a bound, then away from it.
Three steps of the head's learning rate exceed the bound; after three more, Adam's momentum has changed its sign."""


def sign(step: int) -> float:
    return 1.0 if step < TURN else -1.0


def run(ranks: ParallelContext, cases: list[tuple[str, str]]) -> list[list[dict[str, Tensor]]]:
    """Return for each case the whole state before the change of sign and at the end."""
    results = []
    for name, precision in cases:
        engine = make_engine(name, ranks, precision=precision, clip=0.0, bounds=BOUNDS)
        states = []
        for step in range(STEPS):
            (batch,) = batches(step, 1, ranks.rank, ranks.world_size)
            engine.backward(sign(step) * engine.forward("loss", batch).total)
            engine.step()
            if step + 1 in (TURN, STEPS):
                states.append(engine.full_state())
        results.append(states)
    return results


def reference() -> list[dict[str, Tensor]]:
    toy = make_toy()
    optimizer = build_optimizer(parameter_groups(toy, OPTIM, HEADS), OPTIM)
    parameters, states = dict(toy.named_parameters()), []
    for step in range(STEPS):
        (batch,) = batches(step)
        (sign(step) * toy("loss", batch).total).backward()
        for parameter in parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, (low, high) in BOUNDS.items():
                parameters[name].clamp_(low, high)
        if step + 1 in (TURN, STEPS):
            states.append({name: value.clone() for name, value in toy.state_dict().items()})
    return states


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.matrix), 2])
def test_bounds_hold_on_every_engine_and_let_go_again(world_size):
    expected = reference()
    cases = [(name, precision) for name in ENGINES for precision in ("fp32", "bf16")]
    for case, states in zip(cases, run_ranks(run, world_size, cases)[0], strict=True):
        before, after = (state["scale.log_scale"].item() for state in states)
        assert before == pytest.approx(LOW) or before == pytest.approx(HIGH), case
        assert abs(after - before) > 0.003, case  # it has left the bound
        for got, wanted in zip(states, expected, strict=True):
            apart = got["root_gain"] - 1
            assert (apart.abs() <= HIGH + 1e-6).all() and (apart.abs() >= HIGH - 1e-6).any(), case
            if case[1] == "fp32":
                for name in BOUNDS:
                    torch.testing.assert_close(
                        got[name], wanted[name], rtol=1e-4, atol=1e-5, msg=lambda m, c=case: f"{c}: {m}"
                    )
