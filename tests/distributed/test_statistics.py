"""Statistics over the global batch on real gloo ranks: values and gradients are independent of the split of the rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jepa_scale.distributed import comm
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.losses import statistics
from jepa_scale.losses.barlow import barlow
from jepa_scale.losses.sigreg import directions, sigreg
from jepa_scale.losses.statistics import as_contribution, global_sum, rows_of_step, standardized
from jepa_scale.losses.vicreg import vicreg
from tests.distributed.launch import run_ranks

LOSSES = ("barlow", "vicreg", "sigreg", "sigreg of standardized")
ROWS = 13
WEIGHTS = {"barlow": (1.0, 0.3), "vicreg": (2.0, 5.0, 3.0), "sigreg": (0.7,), "sigreg of standardized": (0.7,)}
SLICES, KNOTS, PLACE = 6, 9, (5, 7)
D_IN, D = 5, 4
DEALS = [(micros, idle) for micros in (1, 2, 3) for idle in (False, True)]


def network() -> nn.ModuleDict:
    torch.manual_seed(3)
    return nn.ModuleDict({"a": nn.Sequential(nn.Linear(D_IN, D), nn.Tanh()), "b": nn.Linear(D_IN, D)})


def inputs(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(4)) * 2 + 1


def plain(name: str, a: Tensor, b: Tensor) -> list[Tensor]:
    """Reference: the definitions on all rows at once, for more than one row."""
    n, d = a.shape
    beside = ~torch.eye(d, dtype=torch.bool)
    if name == "barlow":
        a, b = ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() for x in (a, b))
        c = a.T @ b / n
        return [(1 - c.diagonal()).square().mean(), c[beside].square().sum() / (d * (d - 1))]
    if name.startswith("sigreg"):
        if "standardized" in name:
            a = (a - a.detach().mean(0)) / (a.detach().std(0, correction=0) + 1e-3)
        t = torch.linspace(-5, 5, KNOTS, dtype=a.dtype)
        gauss = torch.exp(-t.square() / 2)
        phi = torch.exp(1j * (a @ directions(d, *PLACE, SLICES).to(a.dtype).T)[..., None] * t).mean(dim=0)
        return [n * torch.trapezoid((phi - gauss).abs().square() * gauss, t, dim=-1).mean()]
    cov = torch.cov(a.T)
    spread = torch.clamp(1 - (cov.diagonal() + 1e-4).sqrt(), min=0).mean()
    return [(a - b.detach()).square().mean(), spread, cov[beside].square().sum() / d]


def reference(name: str) -> tuple[list[float], list[Tensor]]:
    """Return the values of the terms, and the gradients of their weighted sum, computed in one process in fp64."""
    net, x = network().double(), inputs().double()
    terms = plain(name, net["a"](x), net["b"](x))
    loss = sum(w * t for w, t in zip(WEIGHTS[name], terms, strict=True))
    return [float(t.detach()) for t in terms], gradients(net, loss)


def on_one_view(a: Tensor, b: Tensor, total: Tensor) -> tuple[Tensor]:
    return (sigreg(a, total, *PLACE, slices=SLICES, knots=KNOTS),)


def on_one_standardized(a: Tensor, b: Tensor, total: Tensor) -> tuple[Tensor]:
    return on_one_view(standardized(a, total), b, total)


def gradients(net: nn.Module, loss: Tensor) -> list[Tensor]:
    net.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]


def deal(rows: int, world_size: int, micros: int, idle: bool) -> list[list[list[int]]]:
    """Split row indices unevenly over the micro-batches of all ranks; if ``idle``, the last rank of several has none."""
    hands: list[list[list[int]]] = [[[] for _ in range(micros)] for _ in range(world_size)]
    takers = max(1, world_size - idle)
    for row in range(rows):
        taker = row if row < takers else row * row % 3 % takers
        hands[taker][min(row % 4, micros - 1)].append(row)
    return hands


def step(ranks: ParallelContext, name: str, micros: int, rows: int, idle: bool) -> dict[str, Any]:
    """Return this rank's contributions and gradients in an optimizer step, summed over its micro-batches."""
    loss = dict(zip(LOSSES, (barlow, vicreg, on_one_view, on_one_standardized), strict=True))[name]
    net, x = network(), inputs(rows)
    total = torch.tensor(float(rows))
    numbers = deal(rows, ranks.world_size, micros, idle)[ranks.rank]
    hand = [x[torch.tensor(some, dtype=torch.int64)] for some in numbers]
    gathered: dict[str, list[Tensor]] = {"a": [], "b": []}
    if micros > 1:
        with torch.no_grad():
            gathered = {view: [net[view](part) for part in hand] for view in ("a", "b")}
    summed, contributed, terms = None, torch.zeros(()), []
    for micro, part in enumerate(hand):
        a, b = (rows_of_step(net[view](part), gathered[view], micro) for view in ("a", "b"))
        terms = loss(a, b, total)
        value = sum(w * t for w, t in zip(WEIGHTS[name], terms, strict=True))
        contribution = as_contribution(value, len(part) / total.clamp(min=1))
        new = gradients(net, contribution)
        summed = new if summed is None else [s + n for s, n in zip(summed, new, strict=True)]
        contributed += contribution.detach()
    return {"terms": [float(t.detach()) for t in terms], "contributed": float(contributed), "gradients": summed}


def run_cases(ranks: ParallelContext) -> dict[str, Any]:
    results: dict[str, Any] = {"laws": laws(ranks)}
    for name in LOSSES:
        for micros, idle in DEALS:
            results[f"{name} {micros} {idle}"] = step(ranks, name, micros, ROWS, idle)
        for rows in (0, 1):
            results[f"{name} rows {rows}"] = step(ranks, name, 2, rows, idle=False)
    return results


def laws(ranks: ParallelContext) -> dict[str, Any]:
    """Check properties that need several ranks but no reference."""
    x = (torch.arange(6.0).view(2, 3) + ranks.rank).requires_grad_()
    # strides that differ between ranks: what counts is the place, not the memory
    total = global_sum(x if ranks.rank == 0 else x.detach().T.contiguous().T.requires_grad_())
    own = (torch.ones(2, dtype=torch.bfloat16) * (ranks.rank + 1)).requires_grad_()
    both = global_sum(own)
    both.square().sum().backward()
    calls = []
    statistics.all_reduce_sum = lambda t: calls.append(t.numel()) or comm.all_reduce_sum(t)
    try:
        barlow(torch.randn(3, D), torch.randn(3, D), torch.tensor(3.0 * ranks.world_size))
        vicreg(torch.randn(3, D), torch.randn(3, D), torch.tensor(3.0 * ranks.world_size))
        on_one_view(torch.randn(3, D), torch.randn(3, D), torch.tensor(3.0 * ranks.world_size))
    finally:
        statistics.all_reduce_sum = comm.all_reduce_sum
    return {"total": total.detach(), "both": both.detach(), "own_grad": own.grad, "calls": calls}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_values_and_gradients_equal_one_process_in_fp64(world_size):
    by_rank = run_ranks(run_cases, world_size)
    for name in LOSSES:
        values, expected = reference(name)
        weighted = sum(w * v for w, v in zip(WEIGHTS[name], values, strict=True))
        for micros, idle in DEALS:
            outcomes = [results[f"{name} {micros} {idle}"] for results in by_rank]
            case = f"{name}, {world_size} ranks, {micros} micro-batches, one rank idle: {idle}"
            for outcome in outcomes:
                assert outcome["terms"] == pytest.approx(values, rel=1e-5, abs=1e-6), case
                assert outcome["terms"] == outcomes[0]["terms"], case  # bitwise
            assert sum(o["contributed"] for o in outcomes) == pytest.approx(weighted, rel=1e-5), case
            for i, want in enumerate(expected):
                got = sum(o["gradients"][i].double() for o in outcomes)
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, msg=lambda m, c=case: f"{c}: {m}")
            for rank, outcome in enumerate(outcomes):
                works = any(deal(ROWS, world_size, micros, idle)[rank])
                assert works == any((g != 0).any() for g in outcome["gradients"]), case
        for rows in (0, 1):
            for outcome in (results[f"{name} rows {rows}"] for results in by_rank):
                assert all(g.isfinite().all() for g in outcome["gradients"])
                assert rows or outcome["terms"] == [0.0] * len(values)

    numbers = torch.arange(world_size, dtype=torch.float32)
    for results in by_rank:
        law = results["laws"]
        assert torch.equal(law["total"], torch.arange(6.0).view(2, 3) * world_size + numbers.sum())
        assert law["both"].dtype == torch.float32
        assert (law["both"] == (numbers + 1).sum()).all()
        assert (law["own_grad"].float() == 2 * law["both"]).all()  # its own part of d total², no other's
        # two all-reduces a loss: d + d, then d + d + d²; and one number more for the invariance. One of SIGReg's sums
        # at the positive knots.
        waves = 2 * SLICES * (KNOTS // 2)
        assert law["calls"] == ([] if world_size == 1 else [2 * D, 2 * D + D * D, 2 * D + 1, 2 * D + D * D, waves])
