"""The state of every engine as shard views: bitwise continuation, other engines and world sizes, skipped steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from jepa_scale.checkpoint import store
from jepa_scale.checkpoint.shard_view import ShardView
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.engines.base import Engine
from tests.distributed import toy
from tests.distributed.launch import run_ranks
from tests.distributed.toy import ENGINES, changed, make_engine

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
FROZEN = "layers.1.up"
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def freeze(module: nn.Module) -> nn.Module:
    module.get_submodule(FROZEN).requires_grad_(False)
    return module


def disturb(module: nn.Module) -> nn.Module:
    """Change all values, so that a value that is not loaded from a checkpoint is detected."""
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.add_(1)
    return module


def build(
    ranks: ParallelContext, zero: dict[str, Any] | None = None, other: bool = False, frozen: bool = True, **case
) -> Engine:
    """Build an engine of a toy with a frozen layer.

    Args:
        zero: additions to ``zero_optimization``. other: start from other values.
    """

    def add(path: Path) -> Path:
        config = json.loads(path.read_text())
        config["zero_optimization"].update(zero or {})
        path.write_text(json.dumps(config))
        return path

    def module(made: nn.Module) -> nn.Module:
        made = freeze(made) if frozen else made
        return disturb(made) if other else made

    with changed("small_buckets", add), changed("make_toy", module):
        return make_engine(ranks=ranks, **case)


def snapshot(engine: Engine) -> dict[str, ShardView]:
    return {name: boxes.copy() for name, boxes in engine.sharded_state().items()}


def same(a: dict[str, ShardView], b: dict[str, ShardView]) -> list[str]:
    """Return the names of tensors that differ."""
    assert a.keys() == b.keys()
    return [
        name
        for name in a
        if len(a[name].parts) != len(b[name].parts)
        or not all(p[0] == q[0] and torch.equal(p[1], q[1]) for p, q in zip(a[name].parts, b[name].parts, strict=True))
    ]


VARIANTS = [
    {"name": "zero2", "zero": {"round_robin_gradients": True}},
    {"name": "zero3", "zero": {"stage3_param_persistence_threshold": 30, "sub_group_size": 200}},
]


ADAMW: dict[str, Any] = {}
MUON = {"optim": toy.MUON}
HALVES = pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.matrix)])


def half_of(cases: list[dict[str, Any]], half: int, *settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Combine each case with both settings, one with AdamW and the other with Muon; the other half swaps the two.

    Each half contains all pairs of engine, settings and optimizer.
    """
    return [
        {**case, **setting, **(ADAMW, MUON)[(ENGINES.index(case["name"]) + ("zero" in case) + i + half) % 2]}
        for case in cases
        for i, setting in enumerate(settings)
    ]


def moments_of(name: str, case: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the moments of a trainable parameter of the tied toy."""
    return ("momentum_buffer",) if "optim" in case and name.endswith(toy.MATRICES) else ("exp_avg", "exp_avg_sq")


def continue_bitwise(ranks: ParallelContext, folder: str, cases: list[dict[str, Any]]) -> list[list[str]]:
    """Save, resume and continue; return the differences of each case."""
    results = []
    for i, case in enumerate(cases):
        wrong = []
        engine = build(ranks, tied=True, **case)
        moments = [name for name in engine.sharded_state() if not name.startswith("model/")]
        trainable = {name for name, p in engine.module.named_parameters() if p.requires_grad}
        if set(moments) != {f"{key}/{name}" for name in trainable for key in moments_of(name, case)}:
            wrong.append(f"moments {moments}")
        if any(box.count_nonzero() for name in moments for _, box in engine.sharded_state()[name].parts):
            wrong.append("moments are not zero at first")
        if engine.updates != 0:
            wrong.append("updates before the first step")
        toy.train(engine, range(2))  # after two steps the moments of all are there, and an evaluation has been
        if engine.updates != 2:
            wrong.append(f"{engine.updates} updates after 2 steps")
        store.write(Path(folder) / str(i), engine.sharded_state())
        written = snapshot(engine)
        expected = (toy.train(engine, range(2, 4)), engine.full_state(), toy.evaluate(engine))

        again = build(ranks, tied=True, other=True, **case)
        toy.evaluate(again)  # leaves FSDP2's root gathered
        store.read(Path(folder) / str(i), again.sharded_state())
        again.post_load(2)
        wrong += [f"{name} as read" for name in same(snapshot(again), written)]
        if again.updates != 2:
            wrong.append(f"{again.updates} updates after loading")
        got = (toy.train(again, range(2, 4)), again.full_state(), toy.evaluate(again))
        if got[0] != expected[0]:
            wrong.append(f"losses or norms {got[0]} instead of {expected[0]}")
        wrong += [f"{name} after 4 steps" for name in expected[1] if not torch.equal(got[1][name], expected[1][name])]
        if not all(torch.equal(a, b) for a, b in zip(got[2], expected[2], strict=True)):
            wrong.append("evaluation")
        results.append(wrong)
    return results


@HALVES
def test_training_continues_bitwise(tmp_path, half):
    cases = half_of([*({"name": e} for e in ENGINES), *VARIANTS], half, {"precision": "fp32"}, {"precision": "bf16"})
    for rank, results in enumerate(run_ranks(continue_bitwise, 2, str(tmp_path), cases)):
        for case, wrong in zip(cases, results, strict=True):
            assert not wrong, f"{case}, rank {rank}"
    for optim in (ADAMW, MUON):
        of_optim = [i for i, case in enumerate(cases) if ("optim" in case) == ("optim" in optim)]
        shapes = [store.shapes(tmp_path / str(i)) for i in of_optim]
        names = set(shapes[0])
        assert f"model/{FROZEN}.weight" in names and not any(f"{m}/{FROZEN}.weight" in names for m in MOMENTS)
        assert "model/embed.weight" in names and "model/head.weight" not in names, "tied parameters are there once"
        assert "model/seen" in names and "model/scratch" not in names, "persistent buffers"
        assert all(set(of_case) == names for of_case in shapes)
        exact = [s for i, s in zip(of_optim, shapes, strict=True) if cases[i]["precision"] == "fp32"]
        assert all(of_case == exact[0] for of_case in exact)


def parameters_and_checkpoint(ranks: ParallelContext, folder: str, zero: dict[str, Any]) -> dict[str, torch.Tensor]:
    engine = build(ranks, name="zero2", zero=zero)
    toy.train(engine, range(2))
    store.write(Path(folder), engine.sharded_state())
    return {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}


@pytest.mark.parametrize("zero", [{}, {"round_robin_gradients": True}])
def test_flat_partitions_are_cut_where_the_parameters_are(tmp_path, zero):
    """Under stage 2 in fp32 every rank also holds the whole parameters."""
    for parameters in run_ranks(parameters_and_checkpoint, 2, str(tmp_path), zero):
        got = store.read_whole(tmp_path, [f"model/{name}" for name in parameters])
        assert all(torch.equal(got[f"model/{name}"], value) for name, value in parameters.items())


def write_all(ranks: ParallelContext, folder: str, cases: list[dict[str, Any]]) -> list[Any]:
    """Train two steps and save with each engine; return its whole state and the results of the next steps."""
    results = []
    for case in cases:
        engine = build(ranks, **case)
        toy.train(engine, range(2))
        store.write(
            Path(folder) / f"{case['name']}{ranks.world_size}{case.get('precision', '')}", engine.sharded_state()
        )
        results.append((engine.full_state(), toy.train(engine, range(2, 4))))
    return results


def read_all(ranks: ParallelContext, folder: str, cases: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    results = []
    for source, case in cases:
        engine = build(ranks, other=True, **case)
        store.read(Path(folder) / source, engine.sharded_state())
        engine.post_load(2)
        assert engine.updates == 2
        copy = f"{source}-{case['name']}{ranks.world_size}{case.get('precision', '')}"
        store.write(Path(folder) / copy, engine.sharded_state())
        results.append((copy, engine.full_state(), toy.train(engine, range(2, 4))))
    return results


def total(by_rank: list[Any], case: int) -> torch.Tensor:
    """Return the losses of each step, summed over all ranks, and the norms."""
    losses = [result[case][-1][0] for result in by_rank]
    return torch.cat([torch.tensor(losses).double().sum(0), torch.tensor(by_rank[0][case][-1][1]).double()])


def assert_equal_checkpoints(a: Path, b: Path) -> None:
    names = list(store.shapes(a))
    first, second = store.read_whole(a, names), store.read_whole(b, list(store.shapes(b)))
    assert set(first) == set(second)
    different = [name for name in names if not torch.equal(first[name].float(), second[name].float())]
    assert not different, f"{a.name}, {b.name}: {different}"


@pytest.mark.parametrize(
    ("optim", "moves"),
    [
        # two ranks are where training continues bitwise, and where bf16 masters move
        pytest.param(ADAMW, [(4, 1)], id="adamw"),
        pytest.param(MUON, [(1, 4)], id="muon"),
        *(
            pytest.param(optim, [(2, 1), (4, 2), (1, 4)], id=f"{name}-all", marks=pytest.mark.matrix)
            for name, optim in (("adamw", ADAMW), ("muon", MUON))
        ),
    ],
)
def test_every_engine_reads_others_at_other_world_sizes(tmp_path, optim, moves):
    """Each engine loads, at another number of ranks, a checkpoint that another engine has written.

    One further update depends on all moments. Four ranks train as one does.
    """
    written = {
        (engine, size): (result, total(by_rank, i))
        for size in sorted({source for source, _ in moves})
        for by_rank in [run_ranks(write_all, size, str(tmp_path), [{"name": name, **optim} for name in ENGINES])]
        for i, (engine, result) in enumerate(zip(ENGINES, by_rank[0], strict=True))
    }
    plan: dict[int, list[tuple[str, str, int]]] = {target: [] for _, target in moves}
    for shift, (source, target) in enumerate(moves, start=1):
        for i, reader in enumerate(ENGINES):
            plan[target].append((reader, ENGINES[(i + shift) % len(ENGINES)], source))
    for size, readings in plan.items():
        cases = [(f"{writer}{source}", {"name": reader, **optim}) for reader, writer, source in readings]
        by_rank = run_ranks(read_all, size, str(tmp_path), cases)
        for i, (reader, writer, source) in enumerate(readings):
            (state, _), losses = written[writer, source]
            copy, got, _ = by_rank[0][i]
            what = f"{writer} of {source} ranks read by {reader} of {size}"
            assert state.keys() == got.keys()
            assert all(torch.equal(state[name], got[name]) for name in state), what
            assert_equal_checkpoints(tmp_path / f"{writer}{source}", tmp_path / copy)
            torch.testing.assert_close(total(by_rank, i), losses, rtol=0, atol=1e-5, msg=lambda m, w=what: f"{w}: {m}")


def test_bf16_masters_move_between_engines(tmp_path):
    cases = [{"name": name, "precision": "bf16", "frozen": False} for name in ENGINES]
    before = run_ranks(write_all, 2, str(tmp_path), cases)
    moves = [
        (f"{a}2bf16", {**case, "name": b}) for a, b, case in zip(ENGINES, ENGINES[2:] + ENGINES[:2], cases, strict=True)
    ]
    after = run_ranks(read_all, 2, str(tmp_path), moves)
    for i, (source, _) in enumerate(moves):
        copy, state, _ = after[0][i]
        assert all(torch.equal(before[0][i][0][name], state[name]) for name in state), copy
        weight = state["layers.0.up.weight"]
        assert (weight != weight.bfloat16().float()).float().mean() > 0.9, f"{copy}: rounded to bf16"
        assert_equal_checkpoints(tmp_path / source, tmp_path / copy)
        torch.testing.assert_close(total(after, i), total(before, i), rtol=0.02, atol=0.02)


def steps(engine: Engine, which: list[int], bad: int | None = None, factor: float = 1.0) -> list[Any]:
    """Run steps; return their norms and the state after each.

    On rank 1 the loss of the first micro-batch of step ``bad`` is multiplied by ``factor``.
    """
    results = []
    for step in which:
        engine.scale_lr(toy.factor(step))
        for batch in toy.batches(step, engine.options.accumulation, engine.ranks.rank, engine.ranks.world_size):
            loss = engine.forward("loss", batch).total
            spoilt = step == bad and engine.ranks.rank == 1 and batch["micro"] == 0
            engine.backward(loss * factor if spoilt else loss)
        results.append((engine.step().item(), snapshot(engine), engine.updates))
    return results


def skip_a_step(ranks: ParallelContext, cases: list[dict[str, Any]]) -> list[list[str]]:
    results = []
    for factor, case in cases:
        wrong = []
        spoilt = steps(build(ranks, **case), [0, 1, 2], bad=1, factor=factor)
        without = steps(build(ranks, **case), [0, 2])
        norm, after, updates = spoilt[1]
        if torch.tensor(norm).isfinite() or updates != 1:
            wrong.append(f"norm {norm}, {updates} updates")
        wrong += [f"{name} changed" for name in same(spoilt[0][1], after)]
        if spoilt[2][0] != without[1][0] or spoilt[2][2] != 2:
            wrong.append(f"norms {spoilt[2][0]}, {without[1][0]}, {spoilt[2][2]} updates")
        wrong += [f"{name} differs after the next step" for name in same(spoilt[2][1], without[1][1])]
        if not same(spoilt[0][1], spoilt[2][1]):
            wrong.append("the next step did nothing")
        results.append(wrong)
    return results


@HALVES
def test_a_step_with_a_bad_gradient_on_one_rank_is_skipped_on_all(half):
    settings = {"precision": "fp32", "clip": 3.0}, {"precision": "bf16", "clip": 0.0}
    cases = [
        (float("nan" if case["precision"] == "fp32" else "inf"), {**case, "accumulation": 2})
        for case in half_of([{"name": e} for e in ENGINES], half, *settings)
    ]
    for rank, results in enumerate(run_ranks(skip_a_step, 2, cases)):
        for case, wrong in zip(cases, results, strict=True):
            assert not wrong, f"{case}, rank {rank}"
