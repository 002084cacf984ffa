"""The EMA teacher on real ranks: state and forward against a dense fp64 reference, memory, checkpoints."""

from __future__ import annotations

import copy
import gc
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from jepa_scale.checkpoint import store
from jepa_scale.checkpoint.shard_view import state_of
from jepa_scale.config.ema import TeacherOptions
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.engines.base import Engine
from jepa_scale.engines.ema import Teacher, TeacherModel
from tests.distributed.launch import run_ranks
from tests.distributed.teacher_toy import (
    FROZEN,
    MICRO,
    PROBE,
    Reference,
    Root,
    copies,
    make_engine,
    make_root,
    model_state,
    train_step,
    whole,
    whole_copy,
)
from tests.distributed.toy import ENGINES

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STEPS = 8
"""Number of steps, over which the momentum rises from its first to its last value. The error of an EMA that is kept in bf16,
or is one step old, is a thousand times the tolerance after the first step."""
OPTIONS = TeacherOptions(momentum=0.8, final_momentum=0.98, schedule="cosine")
FP32 = 2.0**-24
PERSISTENT = [("body.calls", 0), ("encoder.mean", 0)]


def build(
    ranks: ParallelContext,
    name: str,
    precision: str = "fp32",
    options: TeacherOptions = OPTIONS,
    other: bool = False,
    micro: int = MICRO,
) -> tuple[Engine, Teacher, TeacherModel]:
    """Build engine and teacher; also return the initial copies. ``other``: start from other values."""
    root = make_root()
    if other:
        disturb(root)
    model = copies(root)
    plain = copy.deepcopy(model)
    engine = make_engine(ranks, name, precision, root, micro)
    return engine, Teacher(engine, model, options, STEPS), plain


def disturb(root: Root) -> None:
    with torch.no_grad():
        for tensor in [*root.parameters(), *root.buffers()]:
            tensor.add_(1)


def outputs(teacher: Teacher) -> list[Tensor]:
    """Return the outputs of both copies, of the first twice: the second call must not change it."""
    body = teacher.forward("body", PROBE)
    encoded = teacher.forward("encoder", body[:, 0])
    again = teacher.forward("body", PROBE)
    assert torch.equal(body, again)
    return [body, encoded]


def follow(ranks: ParallelContext, cases: list[tuple[str, str]]) -> list[dict[str, float]]:
    """Train each case; return the largest errors of state and forward, in units of the tensor's rounding error."""
    results = []
    for name, precision in cases:
        engine, teacher, plain = build(ranks, name, precision, micro=1)
        start = model_state(engine)
        reference = Reference(plain, start, OPTIONS, STEPS) if ranks.is_main else None
        errors = {"state": 0.0, "forward": 0.0, "moved": 0.0}
        first = outputs(teacher)  # before the student's first forward
        for step in range(STEPS):
            train_step(engine, step, teacher)
            state = model_state(engine)
            if reference:
                reference.update(step, state)
            if step not in (0, 3, STEPS - 1):
                continue
            mine, got = whole(teacher.sharded_state()), outputs(teacher)
            if not reference:
                continue
            for key, parameter in reference.model.named_parameters():
                value = parameter.detach()
                error = (mine[f"teacher/{key}"] - value).abs().max() / (value.abs().max() * FP32)
                errors["state"] = max(errors["state"], error.item())
            assert mine.keys() == {f"teacher/{key}" for key, _ in [*reference.model.named_parameters(), *PERSISTENT]}
            expected = reference.outputs(engine.module, precision)
            for a, b, begun in zip(got, expected, first, strict=True):
                scale = b.double().abs().max() * (FP32 if precision == "fp32" else 2.0**-9)
                errors["forward"] = max(errors["forward"], float((a.double() - b.double()).abs().max() / scale))
                errors["moved"] = float((a.double() - begun.double()).abs().max() / scale)
        results.append(errors)
    return results


CASES = {2: [(name, precision) for name in ENGINES for precision in ("fp32", "bf16")]} | {
    world_size: [(name, "fp32") for name in ENGINES] for world_size in (1, 4)
}


@pytest.mark.parametrize("world_size", [2, *(pytest.param(n, marks=pytest.mark.matrix) for n in (1, 4))])
def test_it_follows_the_student_as_a_dense_fp64_reference_does(world_size):
    cases = CASES[world_size]
    for case, errors in zip(cases, run_ranks(follow, world_size, cases)[0], strict=True):
        assert 0 < errors["state"] < 16, (case, errors)
        assert errors["forward"] < (32 if case[1] == "fp32" else 4), (case, errors)
        assert errors["moved"] > 100 * errors["forward"], (case, errors)


NONE = TeacherOptions(momentum=0, schedule="constant")


def is_the_student(ranks: ParallelContext, cases: list[tuple[str, str]]) -> list[list[str]]:
    """Return the differences, at momentum 0, between teacher and student, and between students with and without a teacher."""
    results = []
    for name, precision in cases:
        wrong = []
        engine, teacher, _ = build(ranks, name, precision, NONE)
        alone = make_engine(ranks, name, precision, make_root())
        for step in range(2):  # an update that the next step's forwards see
            got, expected = train_step(engine, step, teacher, learns=False), train_step(alone, step, None)
            if got != expected:
                wrong.append(f"step {step}: losses and norm {got} with a teacher, {expected} without")
            if any(group._post_forward_indices for group in getattr(teacher._copy, "_groups", []) if group):
                wrong.append("FSDP2's record of forwards grows")
            engine.eval()
            with torch.no_grad():
                for task, path in (("lower", "body"), ("encoder", "encoder"), ("lower", "body")):
                    student = engine.forward(task, PROBE)
                    mine = teacher.forward(path, engine.forward("hidden", PROBE)[:, -1] if path == "encoder" else PROBE)
                    if not torch.equal(mine, student):
                        wrong.append(f"step {step}: {path} differs by {(mine - student).abs().max()}")
            engine.train()
            buffers = dict(engine.module.named_buffers())
            for key, buffer in teacher._copy.module.named_buffers():
                if not torch.equal(buffer, buffers[key]) or not buffer.count_nonzero():
                    wrong.append(f"step {step}: buffer {key}")
        mine, its = whole(teacher.sharded_state()), model_state(engine)
        wrong += [key for key in mine if not torch.equal(mine[key], its[key.removeprefix("teacher/")])]
        teacher.forward("body", PROBE)
        if any(p.requires_grad or p.grad is not None for p in teacher._copy.module.parameters()):
            wrong.append("the teacher has gradients")
        results.append(wrong)
    return results


def test_with_momentum_zero_the_teacher_is_the_student_and_the_student_learns_as_without_one():
    """The equality is bitwise, so weights of an earlier step, or of another call, would be detected."""
    cases = CASES[2]
    for rank, results in enumerate(run_ranks(is_the_student, 2, cases)):
        for case, wrong in zip(cases, results, strict=True):
            assert not wrong, f"{case}, rank {rank}"


def storages(*roots: Any) -> dict[int, int]:
    """Return address → bytes of the storage of every tensor that can be reached from the objects."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    waiting = list(roots)
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, type | types.ModuleType | types.FunctionType | types.CodeType):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor) and type(thing) is not DTensor:
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        waiting += [thing.__dict__] if isinstance(thing, Tensor) else gc.get_referents(thing)
    return found


def measure(ranks: ParallelContext, cases: list[tuple[str, str, bool]]) -> list[tuple[int, ...]]:
    """Return a teacher's bytes, its elements, the model's elements, and the teacher's number of parameters, for each case."""
    results = []
    for name, precision, everything in cases:
        root = make_root()
        model = whole_copy(root) if everything else copies(root)
        sizes = [sum(p.numel() for p in module.parameters()) for module in (model, root)]
        count, buffers = len(list(model.parameters())), sum(b.nbytes for b in model.buffers())
        engine = make_engine(ranks, name, precision, root)
        teacher = Teacher(engine, model, OPTIONS, STEPS)
        for step in range(2):  # the first makes what is made late
            train_step(engine, step, None)
            teacher.update(step)
            teacher.forward("body", PROBE)
        mine, its = storages(teacher), storages(engine)
        results.append((sum(mine[key] for key in mine.keys() - its.keys()) - buffers, *sizes, count))
    return results


@pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.matrix)])
def test_memory_on_each_rank(half):
    """A teacher takes at most 1/N in fp32, and one copy (ZeRO-0, 1, 2) or 1/N (ZeRO-3, FSDP2) in the compute dtype.

    For parts of a model it takes at most the size of the rank's shard of the model's fp32 masters.
    """
    # one half has each engine with both precisions, and with both a teacher of everything and one of parts
    cases = [(name, precision, (i // 2 + i + half) % 2 == 0) for i, (name, precision) in enumerate(CASES[2])]
    for rank, results in enumerate(run_ranks(measure, 2, cases)):
        for (name, precision, everything), (taken, size, model, tensors) in zip(cases, results, strict=True):
            sharded = name in ("fsdp", "zero3")
            copy = size / 2 if sharded else size
            averages = size / 2 if everything or sharded or name == "zero0" else min(size, model / 2)
            one = precision == "fp32" or name == "fsdp"  # the averages are the copy
            bound = 4 * copy if one else 4 * averages + 2 * copy
            assert 0.6 * bound < taken < bound + 8 * tensors, (name, precision, rank, taken, bound)


SAVED = 4
"""Steps before the checkpoint, after which the teacher differs from the student and the momentum from its first value. Two
steps follow: the losses of the first depend on the loaded teacher, those of the second on its update."""


def save(ranks: ParallelContext, folder: str, cases: list[dict[str, Any]]) -> list[list[Tensor]]:
    """Train, save a checkpoint, and return the teacher then and after two more steps."""
    results = []
    for case in cases:
        engine, teacher, _ = build(ranks, **case)
        for step in range(SAVED):
            train_step(engine, step, teacher)
        store.write(Path(folder) / f"{case['name']}{ranks.world_size}", state_of([engine, teacher]))
        results.append(go_on(engine, teacher))
    return results


def go_on(engine: Engine, teacher: Teacher) -> list[dict[str, Tensor]]:
    """Return the teacher's state and output at the save and two steps later, and the losses between."""
    before = known(teacher)
    losses = [train_step(engine, step, teacher)[:-1] for step in range(SAVED, SAVED + 2)]
    return [before, known(teacher), {"losses": torch.tensor(losses)}]


def known(teacher: Teacher) -> dict[str, Tensor]:
    state = whole(teacher.sharded_state())
    for name in state:
        if FROZEN in name:  # it has no master: in bf16 DeepSpeed rounds it
            state[name] = state[name].bfloat16()
    return state | {str(i): output for i, output in enumerate(outputs(teacher))}


def resume(ranks: ParallelContext, folder: str, cases: list[tuple[str, dict[str, Any]]]) -> list[list[Tensor]]:
    """Return the same results from the checkpoint, with an engine and a teacher that start from other values."""
    results = []
    for source, case in cases:
        engine, teacher, _ = build(ranks, **case, other=True)
        outputs(teacher)
        train_step(engine, 0, teacher)
        parts = [engine, teacher]
        store.read(Path(folder) / source, state_of(parts))
        for owner in (engine.module, teacher._copy.module):  # what is not persistent is for its owner to renew
            owner.get_submodule("body").shift.fill_(0).add_(make_shift(SAVED))
        for part in parts:
            part.post_load(SAVED)
        results.append(go_on(engine, teacher))
    return results


def make_shift(steps: int) -> Tensor:
    """Return the buffer after the forwards of some steps, summed in their order."""
    shift = torch.zeros(())
    for _ in range(steps * MICRO):
        shift = shift + 0.01
    return shift


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.matrix)])
def test_a_teacher_is_resumed_bitwise_and_moves_to_other_layouts(tmp_path, precision):
    cases = [{"name": name, "precision": precision} for name in ENGINES]
    written = run_ranks(save, 2, str(tmp_path), cases)
    assert "teacher/body.calls" in store.shapes(tmp_path / "fsdp2")
    for rank, results in enumerate(run_ranks(resume, 2, str(tmp_path), [(f"{c['name']}2", c) for c in cases])):
        for case, got, expected in zip(cases, results, written[rank], strict=True):
            for at, (a, b) in enumerate(zip(got, expected, strict=True)):
                assert not [key for key in b if not torch.equal(a[key], b[key])], (case, rank, at)

    others, world_size = (ENGINES[1:] + ENGINES[:1], 4) if precision == "fp32" else (ENGINES[3:] + ENGINES[:3], 1)
    moves = [(f"{a}2", {"name": b, "precision": precision}) for a, b in zip(ENGINES, others, strict=True)]
    moved = run_ranks(resume, world_size, str(tmp_path), moves)[0]
    for move, got, expected in zip(moves, moved, written[0], strict=True):
        for a, b, tolerance in zip(got[:2], expected[:2], (0, 1e-5 if precision == "fp32" else 0.05), strict=True):
            for key in b:
                error = (a[key].double() - b[key].double()).abs().max() / b[key].abs().max()
                exact = (
                    0 if key.startswith("teacher/") else 1e-6 if precision == "fp32" else 0.01
                )  # of a forward: its sums
                assert error <= max(tolerance, exact), (move, key, error)
