from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.checkpoint.manifest import Manifest
from jepa_scale.checkpoint.retention import CheckpointInfo, Policy, complete, prune


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
