"""Gradient clipping by group on every engine, against plain PyTorch in one process."""

from __future__ import annotations

import json
import math
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.engines import create_engine
from jepa_scale.engines.base import Engine, EngineOptions
from jepa_scale.optim import build_optimizer, parameter_groups
from tests.distributed import toy
from tests.distributed.launch import run_ranks
from tests.distributed.toy import ENGINES, HEADS, OPTIM, Output, Toy

STEPS, CLIP = 7, 2.0
"""Number of steps, and clipping norm. Within these steps every factor below occurs, all three groups are clipped in one step,
and the weights become different from those of joint clipping."""
FACTORS = (1.0, 20.0, 0.05, 3.0, 0.3)
"""Factors of the loss in each step: one step is clipped, the next is not. Adam is not invariant to such changes."""
LONE = (1e-3, 1e-3, 50.0)
"""Factors of ``lone`` in each step. Clipped jointly, it would scale the other gradients to almost zero in every third."""
UPPER = ("layers.2", "head", "root_gain", "never")
VARIANTS = [
    {"name": "zero1", "zero": {"compute_grad_norm": True}},
    {"name": "zero2", "zero": {"round_robin_gradients": True, "overlap_comm": False}},
    {"name": "zero2", "zero": {"contiguous_gradients": False, "reduce_scatter": False}},
    {"name": "zero3", "zero": {"stage3_param_persistence_threshold": 30, "sub_group_size": 200}},
]


class Wide(Toy):
    """Toy with ``lone``, a parameter with an independent gradient, equal in each element, and a group of its own."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__(tied)
        self.lone = nn.Linear(7, 1, bias=False)

    def forward(self, task: str, batch: dict[str, Any]) -> Output | Tensor:
        output = super().forward(task, batch)
        if task != "loss":
            return output
        lone = self.lone(torch.ones(1, 7, dtype=self.lone.weight.dtype)).float().sum()
        return Output(
            FACTORS[batch["step"] % len(FACTORS)] * output.total
            + batch.get("lone", LONE[batch["step"] % len(LONE)]) * lone,
            output.means,
        )


def make(tied: bool = False) -> Wide:
    torch.manual_seed(3)
    return Wide(tied)


def groups_of(module: nn.Module) -> dict[str, list[str]]:
    """Group parameters by their first name: a parameter tied to the embedding is in the lower group."""
    groups: dict[str, list[str]] = {"upper": [], "lower": [], "lone": []}
    for name, _ in module.named_parameters():
        groups["lone" if "lone" in name else "upper" if name.startswith(UPPER) else "lower"].append(name)
    return groups


def build(
    ranks: ParallelContext,
    name: str,
    accumulation: int = 1,
    precision: str = "fp32",
    clip: float = CLIP,
    tied: bool = False,
    zero: dict[str, Any] | None = None,
) -> Engine:
    module = make(tied)
    is_zero = name.startswith("zero")
    with tempfile.TemporaryDirectory() as folder:
        path = toy.small_buckets(name, folder) if is_zero else None
        if path and zero:
            config = json.loads(path.read_text())
            config["zero_optimization"].update(zero)
            path.write_text(json.dumps(config))
        return create_engine(
            "deepspeed" if is_zero else "fsdp",
            module,
            shard=list(module.layers),
            groups=parameter_groups(module, OPTIM, HEADS),
            optim_options=OPTIM,
            engine_options=EngineOptions(precision, clip, accumulation, path, groups_of(module)),
            ranks=ranks,
        )


def one_step(engine: Engine, step: int, **more: Any) -> tuple[float, dict[str, float], float]:
    """Run one step; return the loss on this rank, group norms, total norm. ``more`` is added to the first micro-batch."""
    engine.scale_lr(toy.factor(step))
    local = 0.0
    for batch in toy.batches(step, engine.options.accumulation, engine.ranks.rank, engine.ranks.world_size):
        output = engine.forward("loss", {**batch, **(more if batch["micro"] == 0 else {})})
        engine.backward(output.total)
        local += output.means["loss"].item()
    total = engine.step()
    for norm in (total, *engine.group_norms.values()):
        assert norm.dtype == torch.float32 and norm.shape == ()
    return local, {name: norm.item() for name, norm in engine.group_norms.items()}, total.item()


def train_all(ranks: ParallelContext, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    results = []
    for case in cases:
        engine = build(ranks, **case)
        assert engine.group_norms == {}
        losses, groups, totals = zip(*(one_step(engine, step) for step in range(STEPS)), strict=True)
        results.append({"losses": losses, "groups": groups, "totals": totals, "state": engine.full_state()})
    return results


def reference(
    accumulation: int, world_size: int, tied: bool, clip: float = CLIP, joint: bool = False
) -> tuple[list[float], list[dict[str, float]], list[float], nn.Module]:
    """Train on the whole batch in one process, with PyTorch's clipping of each group, or of everything if ``joint``.

    The gradient of ``lone`` is added once for each micro-batch of each rank, here as well.
    """
    module = make(tied)
    parameters = dict(module.named_parameters())
    groups = {name: [parameters[p] for p in names] for name, names in groups_of(module).items()}
    optimizer = build_optimizer(parameter_groups(module, OPTIM, HEADS), OPTIM)
    peaks = [group["lr"] for group in optimizer.param_groups]
    losses, norms, totals = [], [], []
    for step in range(STEPS):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * toy.factor(step)
        loss = 0.0
        for batch in toy.batches(step, accumulation):
            output = module("loss", {**batch, "lone": LONE[step % len(LONE)] * world_size})
            output.total.backward()
            loss += output.means["loss"].item()
        for p in parameters.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        totals.append(nn.utils.get_total_norm([p.grad for p in parameters.values()]).item())
        limit = clip or math.inf
        norms.append({n: nn.utils.get_total_norm([p.grad for p in ps]).item() for n, ps in groups.items()})
        for of_group in [list(parameters.values())] if joint else groups.values():
            nn.utils.clip_grad_norm_(of_group, limit)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses, norms, totals, module


def rows(norms: list[dict[str, float]]) -> Tensor:
    return torch.tensor([list(of_step.values()) for of_step in norms])


@pytest.mark.parametrize("world_size", [2, *(pytest.param(n, marks=pytest.mark.matrix) for n in (1, 4))])
def test_fp32_equals_torchs_clipping_of_each_group(world_size):
    """Losses, group norms and weights are equal. Steps clip none, one or two groups.

    One layer is used in some micro-batches only, and one in none.
    """
    accumulations = {1: (1,), 2: (1, 2), 4: (2,)}[world_size]
    cases = [{"name": e, "accumulation": a, "tied": a == 2} for a in accumulations for e in ENGINES]
    cases += [{**variant, "accumulation": 2, "tied": True} for variant in VARIANTS if world_size == 2]
    by_rank = run_ranks(train_all, world_size, cases)
    for i, case in enumerate(cases):
        accumulation, tied = case["accumulation"], case["tied"]
        losses, norms, totals, module = reference(accumulation, world_size, tied)
        clipped = rows(norms) > CLIP
        assert clipped.any(0).all() and not clipped.all(0).any() and clipped[2].tolist() == [False, False, True]
        got = by_rank[0][i]
        sums = torch.tensor([r[i]["losses"] for r in by_rank], dtype=torch.float64).sum(dim=0)
        assert (sums - torch.tensor(losses)).abs().max() < 1e-5, case
        for rank in by_rank:
            assert rank[i]["groups"] == got["groups"] and rank[i]["totals"] == got["totals"], case
        torch.testing.assert_close(rows(got["groups"]), rows(norms), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.tensor(got["totals"]), torch.tensor(totals), rtol=1e-5, atol=1e-6)

        joint = reference(accumulation, world_size, tied, joint=True)[3].state_dict()
        for name, value in module.state_dict().items():
            torch.testing.assert_close(
                got["state"][name], value, rtol=1e-4, atol=1e-4, msg=lambda m, w=f"{case} {name}": f"{w}: {m}"
            )
        apart = [(joint[name] - value).abs().max() > 5e-3 for name, value in module.state_dict().items()]
        assert sum(apart) > 10, "clipping everything together would give the same"


def clipped_gradients(engine: Engine) -> dict[str, float]:
    """Return the norm of each group's gradient in AdamW's first step, computed from its first moment, (1 − β₁) · gradient."""
    squares = {}
    for group, names in engine.options.clip_groups.items():
        parts = [box.double() for name in names for _, box in engine.sharded_state()[f"exp_avg/{name}"].parts]
        squares[group] = torch.stack([torch.zeros((), dtype=torch.float64), *(p.square().sum() for p in parts)]).sum()
        if "ZeRO-0" not in engine.layout:  # there every rank has everything
            dist.all_reduce(squares[group])
    return {group: square.sqrt().item() / (1 - OPTIM.betas[0]) for group, square in squares.items()}


def first_step(ranks: ParallelContext, cases: list[dict[str, Any]]) -> list[Any]:
    results = []
    for case in cases:
        engine = build(ranks, **case)
        result = one_step(engine, 1), clipped_gradients(engine)
        results.append((*result, [one_step(engine, step)[2] for step in (2, 3)], engine.updates))
    return results


def test_bf16_clips_each_group():
    """The norm of the gradients that AdamW gets is exact, although they are bf16, because they are scaled in fp32."""
    cases = [{"name": e, "accumulation": 2, "precision": "bf16", "clip": clip} for clip in (CLIP, 0.0) for e in ENGINES]
    cases += [{**variant, "accumulation": 2, "precision": "bf16"} for variant in VARIANTS if variant["name"] != "zero1"]
    module = make()
    parameters = dict(module.named_parameters())
    for batch in toy.batches(1, 2):
        module("loss", {**batch, "lone": 2e-3}).total.backward()
    groups = {
        group: nn.utils.get_total_norm([g for n in names if (g := parameters[n].grad) is not None]).item()
        for group, names in groups_of(module).items()
    }
    assert groups["upper"] > 5 * CLIP and groups["lower"] > 5 * CLIP > 500 * groups["lone"]
    for case, ((_, norms, total), got, later, updates) in zip(cases, run_ranks(first_step, 2, cases)[0], strict=True):
        assert norms == pytest.approx(groups, rel=0.01), case
        assert total == pytest.approx(sum(norm**2 for norm in norms.values()) ** 0.5, rel=1e-5), case
        limit = case.get("clip", CLIP) or math.inf
        expected = {group: min(norm, limit * norm / (norm + 1e-6)) for group, norm in norms.items()}
        assert got == pytest.approx(expected, rel=2e-5), case
        assert updates == 3 and all(0 < norm < 1e3 for norm in later), case


def skip(ranks: ParallelContext, cases: list[tuple[tuple[float, ...], dict[str, Any]]]) -> list[list[str]]:
    results = []
    for values, case in cases:
        wrong = []
        spoilt, without = build(ranks, **case), build(ranks, **case)
        one_step(spoilt, 0)
        before = {name: boxes.copy() for name, boxes in spoilt.sharded_state().items()}
        for value in values:
            _, norms, total = one_step(spoilt, 1, **({"lone": value} if ranks.rank == 1 else {}))
            finite = {name: math.isfinite(norm) for name, norm in norms.items()}
            if math.isfinite(total) or finite != {"upper": True, "lower": True, "lone": False}:
                wrong.append(f"{value}: norms {norms}, total {total}")
            if spoilt.updates != 1:
                wrong.append(f"{value}: {spoilt.updates} updates")
            wrong += [f"{value}: {name} changed" for name in different(spoilt, before)]
        one_step(without, 0)
        if one_step(spoilt, 2) != one_step(without, 2):
            wrong.append("the next step has other norms")
        wrong += [f"{name} differs after the next step" for name in different(spoilt, without.sharded_state())]
        if not different(spoilt, before):
            wrong.append("the next step did nothing")
        results.append(wrong)
    return results


def different(engine: Engine, other: dict[str, Any]) -> list[str]:
    return [
        name
        for name, boxes in engine.sharded_state().items()
        if not all(torch.equal(p[1], q[1]) for p, q in zip(boxes.parts, other[name].parts, strict=True))
    ]


def test_a_bad_gradient_of_one_group_on_one_rank_stops_all_groups_on_all():
    """This includes a finite gradient whose square is infinite; the scaled gradient would be zero."""
    large = 1e25
    cases = [
        (values, {"name": name, "precision": precision, "clip": clip})
        for precision, values, clip in (("fp32", (math.nan, large), CLIP), ("bf16", (large, math.inf), 0.0))
        for name in ENGINES
    ]
    for rank, results in enumerate(run_ranks(skip, 2, cases)):
        for case, wrong in zip(cases, results, strict=True):
            assert not wrong, f"{case}, rank {rank}"


def refused(ranks: ParallelContext, name: str) -> str:
    module = make()
    groups = groups_of(module)
    groups["lower"].remove("scale.log_scale")
    optimizer_groups = parameter_groups(module, OPTIM, HEADS)
    with tempfile.TemporaryDirectory() as folder:
        path = toy.small_buckets(name, folder) if name != "fsdp" else None
        options = EngineOptions(deepspeed=path, clip_groups=groups)
        engine = "fsdp" if name == "fsdp" else "deepspeed"
        with pytest.raises(AssertionError) as caught:
            create_engine(engine, module, list(module.layers), optimizer_groups, OPTIM, options, ranks)
    return str(caught.value)


@pytest.mark.parametrize("name", ["fsdp", "zero2"])
def test_a_parameter_in_no_group_is_refused(name):
    assert "no group has the parameters ['scale.log_scale']" in run_ranks(refused, 1, name)[0]
