"""Short runs that cover every pair of levels of engine, ranks, objective, optimizer, accumulation, precision, tensor
parallelism and recomputing. Each has the curve of one process with one micro-batch."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from tests.distributed import covering
from tests.distributed.covering import CASES, Case
from tests.distributed.launch import run_ranks
from tests.distributed.same_runs import MACHINE
from tests.distributed.systems import (
    STEPS,
    SYSTEMS,
    assert_as_reference,
    config_file,
    same_tokens,
    train_references,
    write_data,
)
from tests.distributed.test_runs import rows, train_runs


def test_every_pair_that_is_possible_is_covered():
    options = [SYSTEMS, *(covering.FACTORS[name] for name in Case._fields[1:])]
    wanted = set().union(*(covering.pairs(case) for case in product(*options) if covering.possible(case)))
    covered = set().union(*map(covering.pairs, CASES))
    assert all(map(covering.possible, CASES)) and covered == wanted
    assert {case.system for case in CASES} == set(SYSTEMS)
    assert {level for pair in wanted for _, level in pair} == {x for of in covering.FACTORS.values() for x in of}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return tmp_path_factory.mktemp("references")


@pytest.fixture
def reference(data, references, case):
    """Folder of the reference run of the case's system on one rank, which is trained on first use."""
    if not (references / case.system).exists():
        train_references(references, data, [case.system])
    return references


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_curve_is_that_of_one_process(reference, data, tmp_path: Path, case: Case):
    options = {"precision": case.precision, "tp": case.tp, "activation_checkpointing": case.recompute}
    file = config_file(tmp_path, data, case.name, case.system, case.engine, case.accumulation, engine=options)
    run_ranks(train_runs, case.ranks, [(file, None)])
    if case.precision == "fp32":
        assert_as_reference(tmp_path, case.name, reference, case.system)
        return
    expected, got = rows(reference, case.system), rows(tmp_path, case.name)
    assert len(got) == len(expected) == STEPS
    for a, b in zip(expected, got, strict=True):
        assert a.keys() - MACHINE == b.keys() - MACHINE
        assert b["tokens"] == a["tokens"] or not same_tokens(case.system)
        assert b["loss"] == pytest.approx(a["loss"], rel=0.1), f"step {a['step']}"
        if "lm_loss" in a:
            assert b["lm_loss"] == pytest.approx(a["lm_loss"], rel=0.02), f"step {a['step']}"
