"""Collectives that the training loop, the losses and the clipping use, each tested alone on two ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from jepa_scale.distributed.comm import ParallelContext, all_gather_rows_with_grad, init_tp_group
from jepa_scale.engines.clip import Clipping
from jepa_scale.packing import Segment, Views, pack
from jepa_scale.training.preemption import EvaluationStopped, StopRequest
from jepa_scale.training.trainer import global_totals
from tests.distributed.launch import run_ranks


def gathered(ranks: ParallelContext) -> dict[str, torch.Tensor]:
    """Each rank weights the rows of all ranks differently; the gradient of a row is the sum of its weights on all ranks."""
    own = (torch.arange(6.0).view(3, 2) + 10 * ranks.rank).requires_grad_()
    everything = all_gather_rows_with_grad(own)
    (everything * (torch.arange(12.0).view(6, 2) + 100 * ranks.rank)).sum().backward()
    assert own.grad is not None
    return {"rows": everything.detach(), "grad": own.grad}


def test_rows_of_all_ranks_send_their_gradient_back_to_where_they_are_from():
    weights = 2 * torch.arange(12.0).view(6, 2) + 100  # of both ranks together
    for rank, found in enumerate(run_ranks(gathered, 2)):
        expected = torch.cat([torch.arange(6.0).view(3, 2) + 10 * other for other in (0, 1)])
        assert torch.equal(found["rows"], expected)
        assert torch.equal(found["grad"], weights[3 * rank : 3 * rank + 3]), rank


def totals(ranks: ParallelContext) -> dict[str, float]:
    """Totals of two micro-batches of different sizes on each rank, where only rank 1 got a stop signal."""
    sizes = ((2, 3), (4, 7))[ranks.rank]
    batches = [pack([Views([Segment(range(n), "text", labels=range(n))], counts={"pairs": n - 1})]) for n in sizes]
    found = global_totals(batches, ranks.device, stop=ranks.rank == 1)
    return {name: total.item() for name, total in found.items()}


def test_denominators_and_requests_to_stop_are_those_of_all_ranks():
    for found in run_ranks(totals, 2):
        assert found == {"samples": 4, "tokens": 16, "labels": 16, "pairs": 12, "stop": 1}


def interrupted(ranks: ParallelContext) -> list[bool]:
    """Return whether an evaluation ends, before and after rank 1 gets a stop signal."""
    with StopRequest(ranks.device) as stop:
        found = []
        for asked in (False, True):
            stop.requested = asked and ranks.rank == 1
            try:
                stop.interrupts()
                found.append(False)
            except EvaluationStopped:
                found.append(True)
    return found


def test_a_signal_to_one_rank_ends_an_evaluation_on_all():
    assert run_ranks(interrupted, 2) == [[False, True]] * 2


def norms(ranks: ParallelContext) -> dict[str, Any]:
    """Norms in a tensor-parallel group of two ranks: the rows of ``0`` are split; ``1`` and its gradient are replicated."""
    ranks = init_tp_group(ranks, 2)
    module = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False))
    clipping = Clipping(module, {}, 1.0, split={"0.weight"}, tp_size=2)
    gradients = {"0.weight": torch.full((2, 3), 1.0 + ranks.rank), "1.weight": torch.full((2, 2), 3.0)}
    pieces = clipping.sort((clipping.group_of(name), gradient) for name, gradient in gradients.items())
    total, _ = clipping.measure(pieces, copies=1, device=ranks.device)
    clipping.scale(pieces)
    return {"total": total.item(), "whole": gradients["1.weight"]}


def test_a_parameter_that_a_team_has_whole_counts_once_in_the_norm():
    expected = (6 * 1.0 + 6 * 4.0 + 4 * 9.0) ** 0.5
    for found in run_ranks(norms, 2):
        assert abs(found["total"] - expected) < 1e-5
        torch.testing.assert_close(found["whole"], torch.full((2, 2), 3.0 / expected), rtol=1e-5, atol=0)
