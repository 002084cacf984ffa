"""Checkpoints of real engines on real ranks: bitwise continuation, atomicity, retention, refusals."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jepa_scale import checkpoint
from jepa_scale.distributed import Ranks
from jepa_scale.errors import InputError
from tests.distributed import toy
from tests.distributed.launch import run_ranks
from tests.distributed.toy import ENGINES, make_engine

STATE = {"step": 5, "position": 40, "fingerprint": "abc", "tokens": 123}


def numbers() -> list[float]:
    """The next number of each generator."""
    return [
        torch.rand(()).item(),
        float(np.random.rand()),
        random.random(),
        float(np.random.standard_normal()),
    ]


def save_continue_load_continue(ranks: Ranks, folder: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    results = []
    for i, case in enumerate(cases):
        directory = Path(folder) / str(i)
        engine = make_engine(ranks=ranks, **case)
        checkpoint.save(directory, 0, engine, {})
        first = toy.train(engine, range(5))
        torch.manual_seed(ranks.rank)
        np.random.seed(ranks.rank)
        random.seed(ranks.rank)
        numbers()  # leaves NumPy with half of a pair of normals
        path = checkpoint.save(directory, 5, engine, STATE)
        expected = (numbers(), toy.train(engine, range(5, 10)), engine.full_state())

        again = make_engine(ranks=ranks, **case)
        toy.evaluate(again)  # leaves FSDP2's root gathered
        state = checkpoint.load(path, again)
        got = (numbers(), toy.train(again, range(5, 10)), again.full_state())

        from_start = make_engine(ranks=ranks, **case)
        checkpoint.load(directory / "step_00000000", from_start)
        results.append(
            {
                "state": state,
                "expected": expected,
                "got": got,
                "same": toy.train(from_start, range(5)) == first,
            }
        )
    return results


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_continues_bitwise(tmp_path, precision):
    cases = [{"name": e, "accumulation": 2, "precision": precision, "tied": True} for e in ENGINES]
    for rank, results in enumerate(run_ranks(save_continue_load_continue, 2, str(tmp_path), cases)):
        for case, result in zip(cases, results, strict=True):
            assert result["state"] == STATE
            assert result["got"][0] == result["expected"][0], f"{case}, rank {rank}: random numbers"
            assert result["got"][1] == result["expected"][1], f"{case}, rank {rank}: losses or gradient norms"
            weights, expected = result["got"][2], result["expected"][2]
            assert set(weights) == set(expected)
            assert all(torch.equal(weights[name], expected[name]) for name in expected), case
            assert result["same"], f"{case}, rank {rank}: a checkpoint of step 0"


def save_many(ranks: Ranks, folder: str) -> list[str]:
    """Several saves with keep=2, one of them over a folder that a killed run left behind."""
    directory = Path(folder)
    engine = make_engine("fsdp", ranks)
    if ranks.is_main:
        (directory / "step_00000020.tmp").mkdir(parents=True)
        (directory / "step_00000020.tmp" / "garbage").touch()
    for step in (10, 20, 30, 30):
        checkpoint.save(directory, step, engine, {"step": step}, keep=2)
    return sorted(path.name for path in directory.iterdir())


def test_keeps_the_newest_and_points_at_it(tmp_path):
    directory = tmp_path / "checkpoints"
    names = run_ranks(save_many, 2, str(directory))[0]
    assert names == ["latest", "step_00000020", "step_00000030"]
    for name in names[1:]:
        files = sorted(path.name for path in (directory / name).iterdir())
        assert files == ["engine", "rng_rank00000.pt", "rng_rank00001.pt", "state.json"]

    assert checkpoint.find(tmp_path, "auto") == directory / "step_00000030"
    assert checkpoint.find(tmp_path, directory / "step_00000020") == directory / "step_00000020"
    assert checkpoint.find(Path("elsewhere"), tmp_path) == directory / "step_00000030"
    assert checkpoint.find(Path("elsewhere"), str(directory)) == directory / "step_00000030"
    (directory / "latest").write_text("step_00000099")  # names one that is gone
    assert checkpoint.find(tmp_path, "auto") == directory / "step_00000030"
    (directory / "step_00000030" / "state.json").unlink()  # a folder that is not complete
    assert checkpoint.find(tmp_path, "auto") == directory / "step_00000020"


def test_find_without_a_checkpoint(tmp_path):
    assert checkpoint.find(tmp_path, "auto") is None
    with pytest.raises(InputError, match="--resume: no checkpoint at"):
        checkpoint.find(tmp_path, tmp_path / "nothing")


def load_into(ranks: Ranks, path: str, name: str, precision: str) -> str:
    engine = make_engine(name, ranks, precision=precision)
    try:
        checkpoint.load(Path(path), engine)
    except InputError as error:
        return str(error)
    return ""


def save_one(ranks: Ranks, folder: str, name: str) -> str:
    return str(checkpoint.save(Path(folder), 1, make_engine(name, ranks), {}))


def test_refuses_another_engine_stage_precision_or_world_size(tmp_path):
    path = run_ranks(save_one, 1, str(tmp_path), "zero1")[0]
    for name, precision, theirs, ours in (
        ("fsdp", "fp32", "ZeRO-1 fp32", "FSDP2 fp32"),
        ("zero2", "fp32", "ZeRO-1 fp32", "ZeRO-2 fp32"),
        ("zero1", "bf16", "ZeRO-1 fp32", "ZeRO-1 bf16"),
    ):
        message = run_ranks(load_into, 1, path, name, precision)[0]
        assert theirs in message and ours in message and path in message and "\n" not in message
    for message in run_ranks(load_into, 2, path, "zero1", "fp32"):
        assert "world size 1" in message and "world size 2" in message


def test_refuses_a_damaged_state_file(tmp_path):
    path = Path(run_ranks(save_one, 1, str(tmp_path), "fsdp")[0])
    text = (path / "state.json").read_text()
    assert json.loads(text)["layout"] == "FSDP2 fp32"
    (path / "state.json").write_text(text[:20])
    message = run_ranks(load_into, 1, str(path), "fsdp", "fp32")[0]
    assert "not a complete checkpoint" in message and str(path) in message
