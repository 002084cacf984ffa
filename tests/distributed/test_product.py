"""Every objective on every engine at every world size: each run has the curve of one process."""

from __future__ import annotations

from itertools import product

import pytest

from tests.distributed.covering import CASES
from tests.distributed.launch import run_ranks
from tests.distributed.same_runs import ENGINES
from tests.distributed.systems import SYSTEMS, assert_as_reference, config_file, train_references, write_data
from tests.distributed.test_runs import train_runs

pytestmark = pytest.mark.matrix
OBJECTIVES = sorted({of.objective for of in SYSTEMS.values()})
PLACES = list(product(ENGINES, (1, 2, 4)))


def system_at(objective: str, place: int) -> str:
    """Return the system at a position; the forms of an objective alternate over engines and world sizes."""
    forms = [name for name, of in SYSTEMS.items() if of.objective == objective]
    return forms[place % len(forms)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_curve_depends_on_nothing_but_the_seed(data, tmp_path, objective):
    """Runs of the covering array are left out. Half of the runs have two micro-batches a step."""
    done = {(case.system, case.engine, case.ranks) for case in CASES if case.precision == "fp32" and case.tp == 1}
    cases = {
        f"{engine}-{ranks}": (system_at(objective, place), engine, ranks, 1 + place % 2)
        for place, (engine, ranks) in enumerate(PLACES)
    }
    cases = {name: case for name, case in cases.items() if case[:3] not in done}
    (tmp_path / "reference").mkdir()
    systems = sorted({system for system, *_ in cases.values()})
    reference = train_references(tmp_path / "reference", data, systems)
    for world in (1, 2, 4):
        files = [
            (config_file(tmp_path, data, name, system, engine, accumulation), None)
            for name, (system, engine, ranks, accumulation) in cases.items()
            if ranks == world
        ]
        run_ranks(train_runs, world, files)
    for name, (system, *_) in cases.items():
        assert_as_reference(tmp_path, name, reference, system)
