"""Runs resumed from a checkpoint in another process group: bitwise equal on the same ranks, and equal within rounding on
another engine and another number of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jepa_scale.checkpoint import Manifest
from tests.distributed.launch import run_ranks
from tests.distributed.same_runs import ENGINES, resumed_bitwise
from tests.distributed.small_runs import checkpoint
from tests.distributed.systems import assert_as_reference, config_file, train_references, write_data
from tests.distributed.test_runs import train_runs

STEPS, SAVED = 6, 3
"""Number of steps, and step of the save. Warm-up ends at step 1, so both halves have updates at the full rate, and a lost
moment or weight is detected."""
HELD = {
    "concept_memory": "momentum_buffer/",
    "vicreg": "teacher/backbone",
    "grid_objects": "codebook",
    "span": "momentum_buffer/",
    "chat_teacher": "teacher/",
    "tied": "teacher/",
}
"""Parts of the names of tensors that a system's checkpoint holds beside weights and Adam's moments."""
CASES = [
    ("concept_memory", "zero2", {}),
    ("vicreg", "zero3", {}),
    ("grid_objects", "zero1", {}),
    ("chat_teacher", "fsdp", {"precision": "bf16"}),
    ("tied", "zero0", {"tp": 2}),
]
"""All engines, kinds of state and precisions; the full product is tested with the marker ``matrix``."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def assert_goes_on_bitwise(data, tmp_path, cases) -> None:
    files = {
        f"{system}-{engine}": config_file(
            tmp_path,
            data,
            f"{system}-{engine}",
            system,
            engine,
            2,
            steps=STEPS,
            engine=how,
            checkpoint={"every": SAVED},
        )
        for system, engine, how in cases
    }
    for name, held in resumed_bitwise(files, tmp_path, SAVED).items():
        assert any(HELD[name.partition("-")[0]] in tensor for tensor in held), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join((case[0], case[1], *map(str, case[2].values()))))
def test_it_goes_on_to_the_bit(data, tmp_path, case):
    """Rows, weights, moments, teacher, codes and queue are bitwise equal."""
    assert_goes_on_bitwise(data, tmp_path, [case])


@pytest.mark.matrix
@pytest.mark.parametrize("system", HELD)
def test_every_kind_of_state_goes_on_to_the_bit_on_every_engine(data, tmp_path, system):
    done = [case[:2] for case in CASES if case[2] == {}]
    assert_goes_on_bitwise(data, tmp_path, [(system, engine, {}) for engine in ENGINES if (system, engine) not in done])


@pytest.mark.matrix
def test_bf16_goes_on_to_the_bit_on_every_engine(data, tmp_path):
    cases = [("span", "fsdp"), ("tied", "zero0"), ("vicreg", "zero1"), ("grid_objects", "zero2")]
    cases += [("chat_teacher", "zero3")]
    assert_goes_on_bitwise(data, tmp_path, [(*case, {"precision": "bf16"}) for case in cases])


ELSEWHERE = [("zero1", 2, "zero3", 4), ("fsdp", 2, "zero1", 1), ("zero3", 4, "fsdp", 2), ("zero2", 1, "zero0", 2)]


@pytest.mark.parametrize(
    ("first", "ranks", "second", "more"),
    [ELSEWHERE[0], *(pytest.param(*move, marks=pytest.mark.matrix) for move in ELSEWHERE[1:])],
)
def test_it_goes_on_elsewhere(data, tmp_path, first, ranks, second, more):
    systems = ("vicreg", "concept_memory", "lm_budget")
    (tmp_path / "reference").mkdir()
    reference = train_references(tmp_path / "reference", data, systems, STEPS)
    saving = {"every": SAVED}
    before = [config_file(tmp_path, data, name, name, first, steps=STEPS, checkpoint=saving) for name in systems]
    run_ranks(train_runs, ranks, [(file, None) for file in before])
    starts = {name: tmp_path / f"{name}-start" for name in systems}
    for name, start in starts.items():
        shutil.copytree(checkpoint(tmp_path / name, SAVED), start)
    after = [config_file(tmp_path, data, name, name, second, steps=STEPS, checkpoint=saving) for name in systems]
    run_ranks(train_runs, more, [(file, str(starts[Path(file).stem])) for file in after])
    for name in systems:
        assert_as_reference(tmp_path, name, reference, name, STEPS)
        manifests = [Manifest.read(checkpoint(folder / name, STEPS)) for folder in (reference, tmp_path)]
        assert [manifest.world_size for manifest in manifests] == [1, more]
        wanted, found = ({k: v for k, v in m.state.items() if k not in ("seconds", "flops")} for m in manifests)
        assert found == wanted and manifests[0].updates == manifests[1].updates  # the same place in the same data
