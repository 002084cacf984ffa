"""Callbacks of a user's own: their classes are checked, and a run on two ranks calls them for what happens."""

import argparse
import json
import os
import sys
from pathlib import Path

import pytest

from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.telemetry.callbacks import EVENTS, callback_class
from jepa_scale.utils.errors import InputError
from tests.distributed.launch import run_ranks
from tests.distributed.small_runs import rows, run_file

MODULE = """
import json, os
from pathlib import Path
from jepa_scale.telemetry.callbacks import Callback

class Notes(Callback):
    def note(self, *event):
        with open(Path(__file__).with_name(f"notes_{os.environ.get('RANK', '0')}"), "a") as file:
            file.write(json.dumps(event) + "\\n")

    def on_step(self, step, values):
        self.note("step", step, dict(values))

    def on_evaluation(self, step, results):
        self.note("evaluation", step, {split: dict(of_split) for split, of_split in results.items()})

    def on_save(self, step, path):
        assert (path / "manifest.json").is_file()
        self.note("save", step, str(path))

class Misspelt(Callback):
    def on_steps(self, step, values):
        pass

class Stranger:
    def on_step(self, step, values):
        pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_callbacks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_callbacks", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_callbacks:Stranger", "'own_callbacks:Stranger' is no subclass of"),
        ("own_callbacks:Misspelt", "has on_steps, which is never called; events: on_step, on_evaluation, on_save"),
        ("own_callbacks:Missing", "'own_callbacks:Missing' cannot be imported"),
        ("no_such_module:Notes", "is the folder of 'no_such_module' in PYTHONPATH"),
        ("own_callbacks", "give module:Class"),
    ],
)
def test_what_is_no_callback_is_refused(own, name, message):
    with pytest.raises(InputError, match="^train.callbacks: ") as error:
        callback_class(name)
    assert message in str(error.value)


def test_the_events_are_the_methods_of_the_base_class(own):
    assert EVENTS == ("on_step", "on_evaluation", "on_save")
    assert callback_class("own_callbacks:Notes").__name__ == "Notes"


def train(ranks: ParallelContext, config: str, folder: str) -> None:
    from jepa_scale.training.run import run_training

    sys.path.insert(0, folder)
    os.environ["RANK"] = str(ranks.rank)
    try:
        run_training(argparse.Namespace(config=config, resume=None, overrides=[]))
    finally:
        sys.path.remove(folder)
        sys.modules.pop("own_callbacks", None)


def test_two_ranks_call_them_for_steps_evaluations_and_saves(own):
    config = run_file(
        own,
        "run",
        "fsdp",
        model={"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        data={"source": "reversal", "entities_a": 50, "comb": 5, "relations": 2},
        objective={"name": "lm"},
        train={
            "steps": 4,
            "batch_size": 16,
            "log_every": 2,
            "eval_every": 4,
            "callbacks": ["own_callbacks:Notes"],
        },
        checkpoint={"every": 2},
        eval={"max_facts": 8, "rank_facts": 4},
    )
    run_ranks(train, 2, config, str(own))
    logged = {row["step"]: row for row in rows(own / "run", "train")}
    for rank in range(2):
        notes = [json.loads(line) for line in (own / f"notes_{rank}").read_text().splitlines()]
        steps = {step: values for event, step, values in notes if event == "step"}
        assert list(steps) == [1, 2, 3, 4]
        assert {step for step, values in steps.items() if values} == {2, 4}
        for step in (2, 4):
            assert steps[step]["loss"] == pytest.approx(logged[step]["loss"], rel=1e-9)
        ((_, step, results),) = [note for note in notes if note[0] == "evaluation"]
        (row,) = rows(own / "run", "eval/test")
        assert step == 4 and results["eval/test"]["mrr"] == pytest.approx(row["mrr"])
        saved = [(step, Path(path).name) for event, step, path in notes if event == "save"]
        assert saved == ([(2, "step_00000002"), (4, "step_00000004")] if rank == 0 else [])
