"""Muon and AdamW together on every engine, against a plain implementation of both in one process."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.optim import parameter_groups
from tests.distributed import toy
from tests.distributed.launch import run_ranks
from tests.distributed.toy import ENGINES, HEADS, MUON, changed, make_engine

STEPS, CLIP = 5, 2.0
"""Number of steps, and clipping norm. One matrix is used in some micro-batches of steps 1, 2 and 4 and in none of steps 0
and 3, where only its momentum changes it. Evaluations follow steps 1 and 4. The error of a momentum that is one step old
exceeds the tolerance immediately."""
VARIANTS = [
    {"name": "zero2", "zero": {"round_robin_gradients": True, "overlap_comm": False}},
    {"name": "zero3", "zero": {"stage3_param_persistence_threshold": 30, "sub_group_size": 200}},
]


def orthogonal(m: Tensor) -> Tensor:
    x = m / m.norm().clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


class PlainMuon:
    """Reference implementation of Muon on whole matrices, in fp64."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.param_groups = groups
        self.momentum = {p: torch.zeros(p.shape, dtype=torch.float64) for g in groups for p in g["params"]}

    @torch.no_grad()
    def step(self) -> None:
        mu = MUON.muon_momentum
        for group in self.param_groups:
            for p in group["params"]:
                g = p.grad.double()
                self.momentum[p] = mu * self.momentum[p] + (1 - mu) * g
                update = 0.2 * math.sqrt(max(p.shape)) * orthogonal((1 - mu) * g + mu * self.momentum[p])
                p.copy_(p.double() * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * update)


def clip_groups(tied: bool) -> dict[str, list[str]]:
    """Return two clipping groups; the LM head's parameter is in the second, unless it is the embedding."""
    groups: dict[str, list[str]] = {"lower": [], "upper": []}
    for name, _ in toy.make_toy(tied).named_parameters():
        groups["upper" if name.startswith(("layers.2", "head", "project", "never")) else "lower"].append(name)
    return groups


def reference(steps: int, accumulation: int, tied: bool, groups: dict[str, list[str]]) -> Any:
    """Train on the whole batch in one process; return losses, norms before clipping, and the module."""
    module = toy.make_toy(tied)
    parameters = dict(module.named_parameters())
    split = parameter_groups(module, MUON, HEADS)
    muon = PlainMuon([g for g in split if g["method"] == "muon"])
    others = [{k: g[k] for k in ("params", "lr", "weight_decay")} for g in split if g["method"] == "adamw"]
    adamw = torch.optim.AdamW(others, betas=MUON.betas, eps=MUON.eps)
    both = [*muon.param_groups, *adamw.param_groups]
    peaks = [group["lr"] for group in both]
    losses, norms = [], []
    for step in range(steps):
        for group, peak in zip(both, peaks, strict=True):
            group["lr"] = peak * toy.factor(step)
        total = 0.0
        for batch in toy.batches(step, accumulation):
            loss = module("loss", batch).total
            loss.backward()
            total += loss.item()
        for p in parameters.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norms.append(nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None]).item())
        for names in groups.values() or [list(parameters)]:
            nn.utils.clip_grad_norm_([parameters[name] for name in names], CLIP)
        muon.step()
        adamw.step()
        module.zero_grad()
        losses.append(total)
    return losses, norms, module


def train_all(ranks: ParallelContext, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    results = []
    for case in cases:
        with changed("small_buckets", partial(add, zero=case.get("zero", {}))):
            engine = make_engine(ranks=ranks, optim=MUON, clip=CLIP, **{k: v for k, v in case.items() if k != "zero"})
        assert engine.updates == 0
        losses, norms = toy.train(engine, range(STEPS))
        assert engine.updates == STEPS
        layout = engine.optimizer._layout
        cut = {
            name
            for name, pieces in layout.pieces.items()
            if any(piece.start % layout.matrices[name].cols for piece in pieces)
        }
        plans = list(engine.optimizer._plans.values())
        results.append(
            {"losses": losses, "norms": norms, "state": engine.full_state(), "cut": cut, "plans": len(plans)}
        )
    return results


def add(path: Path, zero: dict[str, Any]) -> Path:
    config = json.loads(path.read_text())
    config["zero_optimization"].update(zero)
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("world_size", [2, *(pytest.param(n, marks=pytest.mark.matrix) for n in (1, 4))])
def test_equals_the_plain_reference(world_size):
    """Test clipped steps with weight decay and matrices of odd shapes.

    One matrix is not used in every micro-batch, and one has no gradient. If tied, the LM head is an embedding, which AdamW
    updates. With two micro-batches, two groups are clipped.
    """
    accumulations = {1: (1,), 2: (1, 2), 4: (2,)}[world_size]
    cases: list[dict[str, Any]] = [
        {"name": e, "accumulation": a, "tied": a == 2, "clip_groups": clip_groups(True) if a == 2 else {}}
        for a in accumulations
        for e in ENGINES
    ]
    cases += [{**cases[-1], **variant} for variant in VARIANTS if world_size == 2]
    by_rank = run_ranks(train_all, world_size, cases)
    for i, case in enumerate(cases):
        losses, norms, module = reference(STEPS, case["accumulation"], case["tied"], case["clip_groups"])
        assert max(norms) > 1.5 * CLIP
        got = by_rank[0][i]
        summed = torch.tensor([rank[i]["losses"] for rank in by_rank], dtype=torch.float64).sum(dim=0)
        torch.testing.assert_close(summed, torch.tensor(losses, dtype=torch.float64), rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.tensor(got["norms"]), torch.tensor(norms), rtol=1e-5, atol=0)
        assert got["state"].keys() == module.state_dict().keys()
        for name, value in module.state_dict().items():
            torch.testing.assert_close(
                got["state"][name], value, rtol=1e-5, atol=2e-6, msg=lambda m, w=f"{case} {name}": f"{w}: {m}"
            )
        if world_size > 1 and case["name"] in ("zero1", "zero2", "zero3"):
            assert got["cut"], f"{case}: all partitions end with rows"
        if case.get("zero", {}).get("sub_group_size"):
            assert got["plans"] > 2, "there is one sub-group a group"


def test_bf16_learns_alike_on_every_engine():
    cases = [{"name": e, "accumulation": 2, "precision": "bf16"} for e in ENGINES]
    by_rank = run_ranks(train_all, 2, cases)
    losses, norms, _ = reference(STEPS, 2, False, {})
    for i, case in enumerate(cases):
        summed = torch.tensor([rank[i]["losses"] for rank in by_rank]).sum(dim=0)
        torch.testing.assert_close(summed, torch.tensor(losses), rtol=0.02, atol=0.0, msg=lambda m, c=case: f"{c}: {m}")
        weight = by_rank[0][i]["state"]["layers.0.up.weight"]
        assert (weight != weight.bfloat16().float()).float().mean() > 0.9, f"{case}: masters are rounded to bf16"
