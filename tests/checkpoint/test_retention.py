from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.checkpoint.manifest import Manifest, describe
from jepa_scale.checkpoint.retention import CheckpointInfo, Policy, complete, prune, set_aside, sweep
from jepa_scale.cli.main import main


def manifest(step: int, permanent: bool = True, **metrics: float) -> Manifest:
    return Manifest(step, "fsdp", "FSDP2 fp32", 1, step, permanent, {f"eval/valid/{k}": v for k, v in metrics.items()})


def found(*manifests: Manifest) -> list[CheckpointInfo]:
    return [CheckpointInfo(Path(f"step_{m.step:08d}"), m) for m in manifests]


def test_the_newest_stay():
    assert Policy(last=2).remaining(found(*map(manifest, (1, 2, 3, 4)))) == {3, 4}


def test_every_nth_stays_too():
    assert Policy(last=1, every=4).remaining(found(*map(manifest, (2, 4, 6, 8, 9)))) == {4, 8, 9}


@pytest.mark.parametrize(("higher", "best"), [(False, 20), (True, 10)])
def test_the_best_stays(higher: bool, best: int):
    rated = found(manifest(10, ppl=9.0), manifest(20, ppl=3.0), manifest(30, ppl=5.0), manifest(40))
    assert Policy(last=1, best="eval/valid/ppl", higher=higher).remaining(rated) == {best, 40}
    assert Policy(last=1, best="eval/valid/nothing").remaining(rated) == {40}


def test_ephemeral_ones_stay_while_they_are_newest():
    few = found(manifest(10), manifest(12, False), manifest(14, False))
    assert Policy(last=1).remaining(few) == {10, 14}
    assert Policy(last=1).remaining([*few, *found(manifest(20))]) == {20}
    assert Policy(last=2, every=7).remaining([*few, *found(manifest(20))]) == {10, 20}


@given(
    steps=st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, unique_by=lambda x: x[0]),
    last=st.integers(1, 4),
    every=st.integers(0, 7),
)
def test_the_newest_of_all_always_stays(steps: list[tuple[int, bool]], last: int, every: int):
    all_of_them = found(*(manifest(s, p) for s, p in sorted(steps)))
    stay = Policy(last=last, every=every).remaining(all_of_them)
    assert max(s for s, _ in steps) in stay
    assert stay <= {s for s, _ in steps}


def test_pruning_removes_folders_and_leaves_what_it_does_not_know(tmp_path: Path):
    for step in (1, 2, 3):
        folder = tmp_path / f"step_{step:08d}"
        folder.mkdir()
        (folder / "x").write_text("…")
        if step != 2:
            manifest(step).write(folder)
    (tmp_path / "step_00000009.partial").mkdir()
    assert [f.step for f in complete(tmp_path)] == [1, 3]
    assert prune(tmp_path, Policy(last=1)) == [tmp_path / "step_00000001"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002", "step_00000003", "step_00000009.partial"]


def make(folder: Path, step: int, name: str = "") -> Path:
    """Write a checkpoint of one file of two bytes."""
    path = folder / (name or f"step_{step:08d}")
    path.mkdir()
    (path / "x").write_bytes(b"xy")
    replace(manifest(step), files=describe([path / "x"])).write(path)
    return path


def test_a_save_that_was_killed_after_its_manifest_counts(tmp_path: Path):
    make(tmp_path, 4, "step_00000004.partial")
    make(tmp_path, 6, "step_00000006.partial")
    make(tmp_path, 6)
    (make(tmp_path, 8, "step_00000008.partial") / "x").write_bytes(b"x")
    make(tmp_path, 2, "step_00000002.removed")
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000004", "step_00000006"]


def test_a_rewind_sets_the_future_aside_and_names_it(tmp_path: Path):
    for step in (2, 4, 6):
        make(tmp_path, step)
    assert [path.name for path in set_aside(tmp_path, 2)] == ["step_00000006.abandoned", "step_00000004.abandoned"]
    make(tmp_path, 4)
    assert [path.name for path in set_aside(tmp_path, 2)] == ["step_00000004.abandoned.1"]
    assert set_aside(tmp_path, 2) == [] and (tmp_path / "latest").read_text() == "step_00000002"
    sweep(tmp_path)
    prune(tmp_path, Policy(last=1))
    names = ["step_00000004.abandoned", "step_00000004.abandoned.1", "step_00000006.abandoned"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000002", *names]


def test_of_a_link_the_link_is_removed(tmp_path: Path):
    """A checkpoint was moved to another disk, and its name links to it."""
    (tmp_path / "elsewhere").mkdir()
    moved = make(tmp_path / "elsewhere", 2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / moved.name).symlink_to(moved)
    make(tmp_path / "run", 4)
    assert prune(tmp_path / "run", Policy(last=1)) == [tmp_path / "run" / moved.name]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step_00000004"] and (moved / "x").exists()


def test_the_command_keeps_the_newest_whole_one_and_removes_the_damaged(tmp_path: Path, capsys):
    for step in (2, 4, 6):
        make(tmp_path, step)
    (tmp_path / "step_00000006" / "x").write_bytes(b"xx")  # as long as before
    make(tmp_path, 8, "step_00000008.abandoned")
    assert main(["checkpoint", "prune", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000004", "step_00000008.abandoned"]
    assert main(["checkpoint", "ls", str(tmp_path)]) == 0
    assert "step_00000008.abandoned: abandoned" in capsys.readouterr().out
    (tmp_path / "step_00000004" / "x").unlink()
    assert main(["checkpoint", "prune", "--abandoned", str(tmp_path)]) == 2
    assert "holds no whole checkpoint, so nothing is removed" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 2
    make(tmp_path, 5)
    assert main(["checkpoint", "prune", "--abandoned", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]
