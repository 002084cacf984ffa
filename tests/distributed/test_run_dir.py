"""Every rank refuses a used run directory, although only rank 0 checks it; otherwise the others would hang."""

from __future__ import annotations

from pathlib import Path

from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.telemetry import prepare_run_dir
from jepa_scale.utils.errors import InputError
from tests.distributed.launch import run_ranks


def heard(ranks: ParallelContext, folder: Path) -> list[str]:
    said = []
    for name in ("fresh", "used"):
        try:
            prepare_run_dir(folder / name, resume=False)
            said.append("")
        except InputError as error:
            said.append(str(error))
    return said


def test_all_ranks_raise_together(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "metrics.jsonl").touch()
    first, second = run_ranks(heard, 2, tmp_path)
    assert first == second and first[0] == "" and "used" in first[1]
    assert (tmp_path / "fresh").is_dir()
