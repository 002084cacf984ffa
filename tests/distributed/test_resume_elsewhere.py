"""A run goes on from its checkpoint of step 10 under another engine, on another number of ranks: the same samples, and the
same loss curve to rounding."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jepa_scale.checkpoint import Manifest
from tests.data.corpus import write_text
from tests.distributed import test_runs, test_text_runs
from tests.distributed.launch import run_ranks
from tests.distributed.small_runs import checkpoint, rows

STEPS, HALF = 20, 10
ELSEWHERE = [("fsdp", 1), ("zero1", 2), ("zero3", 4)]
SAVES = {"every": HALF, "keep_last": 2}


def config(folder: Path, kind: str, name: str, engine: str) -> str:
    if kind == "reversal":
        return str(test_runs.config_file(folder, "concept_memory", engine, name=name, checkpoint=SAVES))
    train = {"steps": STEPS, "epochs": 0, "batch_tokens": 240, "micro_tokens": 60}
    file = test_text_runs.config_file(folder, name, engine, folder / "corpus", train=train)
    text = Path(file).read_text()
    Path(file).write_text(f"{text}checkpoint: {{every: {HALF}, keep_last: 2}}\n")
    return file


def train_all(folder: Path, world_size: int, cases: list[tuple[str, str | None]]) -> None:
    run_ranks(test_runs.train_runs, world_size, cases)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two ranks of FSDP2 to the end."""
    folder = tmp_path_factory.mktemp("whole")
    write_text(folder / "corpus", [10, 1, 40, 8], valid=5)
    train_all(folder, 2, [(config(folder, kind, kind, "fsdp"), None) for kind in ("reversal", "text")])
    return folder


@pytest.mark.parametrize(("engine", "world_size"), ELSEWHERE)
def test_the_curve_goes_on(whole, tmp_path, engine, world_size):
    shutil.copytree(whole / "corpus", tmp_path / "corpus")
    kinds = ("reversal", "text")
    train_all(
        tmp_path,
        world_size,
        [(config(tmp_path, kind, kind, engine), str(checkpoint(whole / kind, HALF))) for kind in kinds],
    )
    for kind in kinds:
        expected, got = (rows(folder / kind, "fit") for folder in (whole, tmp_path))
        assert [row["step"] for row in got] == list(range(HALF + 1, STEPS + 1))
        for a, b in zip(expected[HALF:], got, strict=True):
            assert b["tokens"] == a["tokens"]
            assert b["loss"] == pytest.approx(a["loss"], abs=1e-4), (kind, a["step"])
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], abs=1e-3), (kind, a["step"])
        before, after = (Manifest.read(checkpoint(folder / kind, STEPS)) for folder in (whole, tmp_path))
        assert (after.world_size, after.updates) == (world_size, before.updates)
        # the same place in the same data: where the stream stands does not depend on who walks it
        assert {k: v for k, v in after.state.items() if k != "seconds"} == {
            k: v for k, v in before.state.items() if k != "seconds"
        }
