"""Checkpoints of real engines on real ranks: bitwise continuation, atomicity, damage, and faults during a save."""

from __future__ import annotations

import errno
import random
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from jepa_scale import checkpoint
from jepa_scale.checkpoint import Manifest, Policy, Saver, store
from jepa_scale.checkpoint.shard_view import ShardView
from jepa_scale.cli import checkpoint as checkpoint_cli
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.engines.base import Engine
from jepa_scale.utils.errors import InputError
from tests.distributed import toy
from tests.distributed.launch import HANG, run_ranks
from tests.distributed.toy import ENGINES, make_engine

STATE = {"position": 40, "fingerprint": "abc", "tokens": 123}


def manifest(engine: Engine, step: int, **values: Any) -> Manifest:
    return Manifest(step, engine.name, engine.layout, engine.ranks.world_size, engine.updates, state=STATE, **values)


def numbers() -> list[float]:
    """Draw the next number of each generator."""
    return [
        torch.rand(()).item(),
        float(np.random.rand()),
        random.random(),
        float(np.random.standard_normal()),
    ]


def save_continue_load_continue(
    ranks: ParallelContext, folder: str, cases: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    results = []
    for i, case in enumerate(cases):
        directory = Path(folder) / str(i)
        engine = make_engine(ranks=ranks, **case)
        saver = Saver(directory, Policy(last=5), asynchronous=bool(i % 2))
        saver.save([engine], manifest(engine, 0))
        first = toy.train(engine, range(2))
        torch.manual_seed(ranks.rank)
        np.random.seed(ranks.rank)
        random.seed(ranks.rank)
        numbers()  # leaves NumPy with half of a pair of normals
        saver.save([engine], manifest(engine, 2))
        expected = (numbers(), toy.train(engine, range(2, 4)), engine.full_state())  # while it is being written
        saver.close()

        again = make_engine(ranks=ranks, **case)
        toy.evaluate(again)  # leaves FSDP2's root gathered
        found = checkpoint.find(Path("elsewhere"), directory)
        assert found == directory / "step_00000002"
        state = checkpoint.load(found, [again]).state
        got = (numbers(), toy.train(again, range(2, 4)), again.full_state())

        from_start = make_engine(ranks=ranks, **case)
        checkpoint.load(directory / "step_00000000", [from_start])
        same = toy.train(from_start, range(2)) == first
        results.append({"state": state, "expected": expected, "got": got, "same": same})
    return results


def test_training_continues_bitwise(tmp_path):
    """Test every engine, both kinds of saves and both precisions.

    All pairs of engine and precision are in tests/distributed/test_engine_state.py.
    """
    cases = [
        {"name": e, "accumulation": 2, "precision": precision, "tied": True}
        for e, precision in zip(ENGINES, ("fp32", "fp32", "bf16", "bf16", "bf16"), strict=True)
    ]
    for rank, results in enumerate(run_ranks(save_continue_load_continue, 2, str(tmp_path), cases)):
        for case, result in zip(cases, results, strict=True):
            assert result["state"] == STATE
            assert result["got"][0] == result["expected"][0], f"{case}, rank {rank}: random numbers"
            assert result["got"][1] == result["expected"][1], f"{case}, rank {rank}: losses or gradient norms"
            weights, expected = result["got"][2], result["expected"][2]
            assert set(weights) == set(expected)
            assert all(torch.equal(weights[name], expected[name]) for name in expected), case
            assert result["same"], f"{case}, rank {rank}: a checkpoint of step 0"


def save_many(ranks: ParallelContext, folder: str) -> list[str]:
    """Save several checkpoints, of which two are kept; one save finds a folder left by a killed run."""
    directory = Path(folder)
    engine = make_engine("fsdp", ranks)
    if ranks.is_main:
        (directory / "step_00000020.partial").mkdir(parents=True)
        (directory / "step_00000020.partial" / "garbage").touch()
    told = []
    saver = Saver(directory, Policy(last=2), on_finish=told.append)
    for step in (10, 20, 30, 30):
        saver.save([engine], manifest(engine, step))
    saver.close()
    assert [r.step for r in told] == ([10, 20, 30, 30] if ranks.is_main else [])
    assert all(r.path is not None and not r.problem for r in told)
    return sorted(path.name for path in directory.iterdir())


def test_keeps_the_newest_and_points_at_it(tmp_path, capsys):
    directory = tmp_path / "checkpoints"
    names = run_ranks(save_many, 2, str(directory))[0]
    assert names == ["latest", "step_00000020", "step_00000030"]
    assert (directory / "latest").read_text() == "step_00000030"
    newest = directory / "step_00000030"
    files = sorted(path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file())
    tensors = ["tensors/.metadata", "tensors/__0_0.distcp", "tensors/__1_0.distcp"]
    assert files == ["manifest.json", "rng_rank00000.pt", "rng_rank00001.pt", *tensors]
    assert sorted(Manifest.read(newest).files) == sorted(set(files) - {"manifest.json"})

    assert checkpoint.find(tmp_path, "auto") == newest
    assert checkpoint.find(tmp_path, directory / "step_00000020") == directory / "step_00000020"
    assert checkpoint.find(Path("elsewhere"), tmp_path) == newest
    assert checkpoint.find(Path("elsewhere"), str(directory)) == newest

    for command in (["ls", str(tmp_path)], ["verify", str(tmp_path)]):
        args = checkpoint_cli.parser().parse_args(command)
        assert args.command(args) == 0
    assert "FSDP2 fp32" in capsys.readouterr().out
    (directory / "step_00000040.partial").mkdir()
    args = checkpoint_cli.parser().parse_args(["prune", str(tmp_path)])
    assert args.command(args) == 0
    assert sorted(p.name for p in directory.iterdir()) == ["latest", "step_00000030"]


def test_find_without_a_checkpoint(tmp_path):
    assert checkpoint.find(tmp_path, "auto") is None
    with pytest.raises(InputError, match="no checkpoint at"):
        checkpoint.find(tmp_path, tmp_path / "nothing")


def save_two(ranks: ParallelContext, folder: str) -> None:
    engine = make_engine("zero1", ranks)
    saver = Saver(Path(folder), Policy(last=2))
    for step in (1, 2):
        saver.save([engine], manifest(engine, step))
    saver.close()


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    run_ranks(save_two, 2, str(folder))
    return folder


@pytest.mark.parametrize(
    "file", ["tensors/.metadata", "tensors/__0_0.distcp", "tensors/__1_0.distcp", "rng_rank00001.pt", "manifest.json"]
)
def test_a_flipped_byte_in_any_file_is_found_and_the_one_before_is_taken(two_saved, tmp_path, file, caplog):
    import shutil

    folder = shutil.copytree(two_saved, tmp_path / "checkpoints")
    bad = folder / "step_00000002" / file
    raw = bytearray(bad.read_bytes())
    raw[len(raw) // 2 if file != "manifest.json" else 0] ^= 0x20
    bad.write_bytes(raw)
    assert checkpoint.find(tmp_path, "auto") == folder / "step_00000001"
    if file != "manifest.json":
        assert f"{bad}: its checksum is wrong" in caplog.text
        with pytest.raises(InputError, match=r"its checksum is wrong \(1 in all\)"):
            checkpoint.find(tmp_path, folder / "step_00000002")
    (folder / "step_00000001" / "rng_rank00000.pt").unlink()
    with pytest.raises(InputError, match="checkpoints are damaged; restore one, or remove the folder"):
        checkpoint.find(tmp_path, "auto")


def test_without_hashes_sizes_are_compared(two_saved, tmp_path):
    import shutil

    folder = shutil.copytree(two_saved, tmp_path / "checkpoints")
    bad = folder / "step_00000002" / "tensors" / "__1_0.distcp"
    raw = bytearray(bad.read_bytes())
    raw[1000] ^= 1
    bad.write_bytes(raw)
    assert checkpoint.find(tmp_path, "auto", hashes=False) == folder / "step_00000002"
    bad.write_bytes(raw[:-1])
    assert checkpoint.find(tmp_path, "auto", hashes=False) == folder / "step_00000001"


def save_on_a_full_disk(ranks: ParallelContext, folder: str) -> list[Any]:
    """Save while rank 1's disk is full: during the second save, and during the first try of the third."""
    from jepa_scale.checkpoint import saver as module

    engine = make_engine("fsdp", ranks)
    told: list[checkpoint.Report] = []
    saver = Saver(Path(folder), Policy(last=5), on_finish=told.append)
    write, fails = store.write, [0]

    def failing(*args: Any) -> Any:
        if ranks.rank == 1 and fails[0]:
            fails[0] -= 1

            def full(self: Any, *args: Any) -> Any:
                raise OSError(errno.ENOSPC, "No space left on device", str(self.path))

            with patch.object(store.dcp.FileSystemWriter, "write_data", full):
                return write(*args)
        return write(*args)

    with patch.object(module, "RETRY_DELAYS", (0.0,)), patch.object(store, "write", failing):
        for step, failures in ((1, 0), (2, 2), (3, 1)):
            fails[0] = failures
            saver.save([engine], manifest(engine, step))
            saver.wait()
        saver.close()
    return [(r.step, r.path is not None, r.problem) for r in told]


def test_a_full_disk_costs_one_checkpoint_and_leaves_the_others(tmp_path):
    first, second, third = run_ranks(save_on_a_full_disk, 2, str(tmp_path))[0]
    assert first == (1, True, "")
    assert second[:2] == (2, False) and "rank 1: " in second[2] and "No space left on device" in second[2]
    assert third[:2] == (3, True) and "No space left" in third[2]  # the first try
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001", "step_00000003"]
    assert all(not checkpoint.verify(tmp_path / name) for name in ("step_00000001", "step_00000003"))


def train_while_saving(ranks: ParallelContext, folder: str) -> tuple[bool, bool]:
    """Delay the writing until training has continued; the save must hold the state before that."""
    engine = make_engine("zero2", ranks)
    toy.train(engine, range(2))
    go, write, waited = threading.Event(), store.write, []

    def held(*args: Any) -> Any:
        waited.append(go.wait(HANG))
        return write(*args)

    before, saver = engine.full_state(), Saver(Path(folder), Policy())
    with patch.object(store, "write", held):
        saver.save([engine], manifest(engine, 2))
        toy.train(engine, range(2, 4))
        go.set()
        saver.close()
    saved = store.read_whole(Path(folder) / "step_00000002" / "tensors", [f"model/{name}" for name in before])
    return waited == [True], all(torch.equal(saved[f"model/{name}"], before[name]) for name in before)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    assert run_ranks(train_while_saving, 2, str(tmp_path))[0] == (True, True)


def load_into(ranks: ParallelContext, path: str, tied: bool) -> str:
    engine = make_engine("fsdp", ranks, tied=tied)
    try:
        checkpoint.load(Path(path), [engine])
    except InputError as error:
        return str(error)
    return ""


def test_another_model_is_refused_by_the_tensor(two_saved):
    (message,) = run_ranks(load_into, 1, str(two_saved / "step_00000002"), True)
    assert message == ""  # a tied model has fewer tensors
    (folder,) = run_ranks(save_tied, 1, str(two_saved.parent / "tied"))
    (message,) = run_ranks(load_into, 1, folder, False)
    assert "holds no tensor 'model/head.weight'" in message and "another model" in message


def save_tied(ranks: ParallelContext, folder: str) -> str:
    engine = make_engine("fsdp", ranks, tied=True)
    saver = Saver(Path(folder), Policy())
    saver.save([engine], manifest(engine, 1))
    saver.close()
    return str(Path(folder) / "step_00000001")


class Queue:
    """State outside the engine; each rank has rows of its own."""

    def __init__(self, ranks: ParallelContext, rows: torch.Tensor) -> None:
        self.ranks, self.rows, self.updates = ranks, rows, -1

    def sharded_state(self) -> dict[str, ShardView]:
        n = len(self.rows)
        return {
            "queue/rows": ShardView(
                (n * self.ranks.world_size, 2), torch.float32, [((n * self.ranks.rank, 0), self.rows)]
            )
        }

    def post_load(self, updates: int) -> None:
        self.updates = updates


def save_with_a_queue(ranks: ParallelContext, folder: str) -> None:
    engine = make_engine("zero2", ranks)
    toy.train(engine, range(2))
    rows = torch.arange(8.0).view(4, 2) + 8 * ranks.rank
    saver = Saver(Path(folder), Policy())
    saver.save([engine, Queue(ranks, rows)], manifest(engine, 2))
    rows += 100  # what is saved is the state of before
    saver.close()


def load_with_a_queue(ranks: ParallelContext, folder: str) -> Any:
    queue = Queue(ranks, torch.zeros(8 // ranks.world_size, 2))
    checkpoint.load(Path(folder) / "step_00000002", [make_engine("fsdp", ranks), queue])
    return queue.rows, queue.updates


def test_other_parts_are_kept_and_resharded_too(tmp_path):
    run_ranks(save_with_a_queue, 2, str(tmp_path))
    for world_size in (1, 4):
        found = run_ranks(load_with_a_queue, world_size, str(tmp_path))
        assert torch.cat([rows for rows, _ in found]).equal(torch.arange(16.0).view(8, 2))
        assert {updates for _, updates in found} == {2}
