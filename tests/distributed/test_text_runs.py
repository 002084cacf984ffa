"""Whole runs on shards with a token budget, on real ranks: every engine and world size has the same steps up to the end of
the data, and a damaged sample does not affect the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.corpus import write_text
from tests.distributed.launch import run_ranks
from tests.distributed.small_runs import run_file
from tests.distributed.test_runs import BACKBONES, rows, train_runs

EPOCHS = 2


def config_file(folder: Path, name: str, engine: str, data: Path, **changes: Any) -> str:
    train = {"epochs": EPOCHS, "batch_tokens": 240, "micro_tokens": 60} | changes.pop("train", {})
    return run_file(
        folder,
        name,
        engine,
        model=BACKBONES["native"],
        data={"source": "text", "path": str(data), "max_length": 24, "shuffle_window": 16, **changes},
        objective={"name": "lm"},
        optim={"lr": 3e-3, "warmup_steps": 3, "clip_norm": 0.5},
        train=train,
        eval={"micro_tokens": 50},
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_text(folder, [10, 1, 40, 8], valid=5)
    return folder


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    run_ranks(train_runs, 1, [(config_file(folder, "run", "fsdp", corpus), None)])
    return folder


def test_a_run_ends_with_the_data_and_learns(reference):
    fit = rows(reference, "run")
    assert len(fit) >= 10
    assert fit[-1]["loss"] < 0.97 * fit[0]["loss"]
    assert sum(r["packing_efficiency"] for r in fit[:-1]) / (len(fit) - 1) > 0.95
    assert all(0 <= r["data_wait"] < 1 for r in fit)
    valid = rows(reference, "run", "eval/valid")[-1]
    assert valid["ppl"] == pytest.approx(torch.tensor(valid["lm_loss"]).exp().item(), rel=1e-4)


@pytest.mark.matrix
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_engine_walks_the_same_steps_to_the_end(reference, corpus, tmp_path, world_size):
    """The last step has fewer micro-batches than ranks, so some ranks have an empty one."""
    engines = ("fsdp", "zero0", "zero1", "zero2", "zero3")
    files = [(config_file(tmp_path, e, e, corpus, workers=1 if e == "fsdp" else 0), None) for e in engines]
    run_ranks(train_runs, world_size, files)
    expected = rows(reference, "run")
    assert expected[-1]["packing_efficiency"] <= 0.25  # three of four micro-batches are empty
    for engine in engines:
        got = rows(tmp_path, engine)
        assert [r["tokens"] for r in got] == [r["tokens"] for r in expected]
        for a, b in zip(expected, got, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], abs=1e-4), engine
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], abs=1e-3), engine
        a, b = rows(reference, "run", "eval/valid")[-1], rows(tmp_path, engine, "eval/valid")[-1]
        assert b["labels"] == a["labels"]
        assert b["lm_loss"] == pytest.approx(a["lm_loss"], abs=1e-4)


def test_a_damaged_sample_stops_all_ranks_or_costs_itself_alone(reference, corpus, tmp_path, capfd):
    damaged = tmp_path / "damaged"
    write_text(damaged, [10, 1, 40, 8], valid=5)
    shard = damaged / "train-000002.tar"
    raw = bytearray(shard.read_bytes())
    raw[4096 + 600] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(AssertionError, match=r"train-000002.tar, sample train-000002-\d+: checksum differs"):
        run_ranks(train_runs, 2, [(config_file(tmp_path, "stops", "fsdp", damaged), None)])
    run_ranks(train_runs, 2, [(config_file(tmp_path, "skips", "fsdp", damaged, on_error="skip"), None)])
    fit = rows(tmp_path, "skips")
    assert len(fit) == len(rows(reference, "run"))
    skipped = sum(r.get("skipped_samples", 0) for r in fit)
    assert skipped in (EPOCHS, 2 * EPOCHS)  # one sample, of one or two pieces
    assert fit[-1]["tokens"] < rows(reference, "run")[-1]["tokens"]


def test_changed_data_are_refused_until_accepted(corpus, tmp_path):
    run_ranks(train_runs, 2, [(config_file(tmp_path, "run", "fsdp", corpus, train={"steps": 4}), None)])
    other = tmp_path / "other"
    write_text(other, [20, 30], seed=5)
    longer = {"train": {"steps": 8}}
    with pytest.raises(AssertionError, match=r"fingerprint differs.*data.accept_changes=true"):
        run_ranks(train_runs, 2, [(config_file(tmp_path, "run", "fsdp", other, **longer), "auto")])
    accepted = config_file(tmp_path, "run", "fsdp", other, accept_changes=True, train={"steps": 8})
    run_ranks(train_runs, 2, [(accepted, "auto")])
    assert [r["step"] for r in rows(tmp_path, "run")] == list(range(1, 9))
