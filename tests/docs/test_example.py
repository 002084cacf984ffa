"""The objective of docs/adding_an_objective.md, which lives outside of the package, trains on real ranks."""

import argparse
import sys
from pathlib import Path

import pytest
import torch
from text_runs import config_file

from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.experiment import objective_class
from jepa_scale.utils.errors import InputError
from tests.distributed.launch import run_ranks
from tests.distributed.small_runs import rows

DOCS = Path(__file__).resolve().parents[2] / "docs"
EXAMPLES = DOCS / "examples"


def train_runs(ranks: ParallelContext, configs: list[str]) -> None:
    from jepa_scale.training.run import run_training

    sys.path.insert(0, str(EXAMPLES))
    try:
        for config in configs:
            torch.manual_seed(0)
            run_training(argparse.Namespace(config=config, resume=None, overrides=[]))
    finally:
        sys.path.remove(str(EXAMPLES))


def write(folder: Path, name: str, accumulation: int = 1, engine: dict[str, str] | None = None) -> str:
    """Sixteen steps on the small corpus."""
    objective = {"name": "neighbour:Neighbour", "distance": 2, "anchors": 3, "jepa_weight": 1.0}
    train = {"steps": 16, "accumulation": accumulation}
    return str(config_file(folder, name, objective=objective, train=train, engine=engine or {}))


def test_it_learns_and_its_curve_does_not_depend_on_ranks_engine_or_accumulation(tmp_path):
    zero3 = {"name": "deepspeed", "deepspeed": str(DOCS.parent / "configs/ds/zero3.json")}
    run_ranks(train_runs, 1, [write(tmp_path, "one")])
    run_ranks(train_runs, 2, [write(tmp_path, "two", 2), write(tmp_path, "zero3", engine=zero3)])
    expected = rows(tmp_path / "one", "train")
    assert len(expected) == 16
    for name in ("two", "zero3"):
        for row, other in zip(rows(tmp_path / name, "train"), expected, strict=True):
            for column in ("loss", "lm_loss", "jepa_loss"):
                assert abs(row[column] - other[column]) < 1e-4, (name, row["step"], column)
    first, last = (sum(row["jepa_loss"] for row in part) / 4 for part in (expected[:4], expected[-4:]))
    assert last < 0.9 * first


@pytest.mark.parametrize(("name", "least"), [("docs/adding_an_objective.md", 3), ("README.md", 1)])
def test_the_page_shows_the_code_that_runs(name, least):
    page = (DOCS.parent / name).read_text()
    code = (EXAMPLES / "neighbour.py").read_text()
    blocks = [part.partition("```")[0] for part in page.split("```python\n")[1:]]
    assert len(blocks) >= least
    for block in blocks:
        assert block in code, block


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("neighbor", "unknown objective 'neighbor'"),
        ("no_such_module:Neighbour", "is the folder of 'no_such_module' in PYTHONPATH?"),
        ("json:NoSuchClass", "module 'json' has no attribute 'NoSuchClass'; give module:Class"),
        (":Neighbour", "cannot be imported"),
        ("json:JSONDecoder", "no subclass"),
        ("json:dumps", "no subclass"),
    ],
)
def test_a_name_that_is_no_objective_is_refused(name, said):
    with pytest.raises(InputError, match=r"^objective\.name: ") as error:
        objective_class(name)
    assert said in str(error.value)


def test_names_of_the_package_and_of_others(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    assert objective_class("neighbour:Neighbour").__name__ == "Neighbour"
    assert objective_class("lm") is objective_class("jepa_scale.objectives.lm:LanguageModeling")
