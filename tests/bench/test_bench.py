"""``jepa-scale bench``, for real: two small arms with their control, the page, the rows, and what a second call repeats."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from jepa_scale.cli.main import main

TASK = {
    "title": "A small reversal",
    "about": "Reverses of facts.",
    "config": {
        "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32},
        "data": {"source": "reversal", "entities_a": 20, "comb": 2, "relations": 1, "seed": "{seed}"},
        "train": {"steps": 3, "batch_size": 8},
    },
    "measures": {"exact_match": {"of": "eval/test/exact_match", "better": "higher"}},
    "arms": {"lm": {"objective": {"name": "lm"}}, "next_latent": {"objective": {"name": "next_latent", "rollout": 1}}},
}


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(TASK))
    return path


def test_a_task_from_its_file_to_its_page(task, tmp_path, monkeypatch):
    """With an objective of one's own as a further arm, by one flag."""
    monkeypatch.setenv("PYTHONPATH", os.path.abspath("docs/examples"))
    monkeypatch.syspath_prepend("docs/examples")
    out = tmp_path / "out"
    arguments = [
        "bench",
        str(task),
        "--seeds",
        "1",
        "--jobs",
        "2",
        "--dir",
        str(out),
        "--add",
        "mine=neighbour:Neighbour",
    ]
    assert main(arguments) == 0
    page = (out / "bench.md").read_text()
    assert f"jepa-scale bench {task} --seeds 1 --add mine=neighbour:Neighbour" in page
    assert "## A small reversal" in page and "| small exact_match | too few seeds | too few seeds |" in page
    written = json.loads((out / "bench.json").read_text())
    assert written["machine"]["torch"]
    names = [row["name"] for row in written["rows"]]
    assert names == [f"small/all/{arm}/exact_match" for arm in ("lm", "next_latent", "next_latent/control", "mine")]
    assert all(row["n"] == 1 and row["seeds"] == [0] for row in written["rows"])
    assert (out / "bench_small.png").read_bytes()[:4] == b"\x89PNG"

    runs = sorted(out.rglob("summary.json"))
    before = [run.stat().st_mtime_ns for run in runs]
    (out / "bench.md").unlink()
    assert main(arguments) == 0  # nothing is trained again
    assert len(runs) == 4 and [run.stat().st_mtime_ns for run in runs] == before and (out / "bench.md").is_file()


def test_a_run_that_fails_is_named_with_its_log(task, tmp_path, capsys, monkeypatch):
    (tmp_path / "fails.py").write_text(
        "from jepa_scale.telemetry.callbacks import Callback\n\nclass Fails(Callback):\n"
        "    def on_step(self, *_):\n        raise RuntimeError('fails here')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    wrong = ["bench", str(task), "--seeds", "1", "--jobs", "1", "--dir", str(tmp_path / "out")]
    assert main([*wrong, "--set", "train.callbacks=[fails:Fails]"]) == 2
    error = capsys.readouterr().err
    assert "small/all/lm/0: training ended with exit code" in error and "fails here" in error and ".log)" in error


def test_a_signal_ends_the_runs_too_and_they_go_on_next_time(task, tmp_path):
    out = tmp_path / "out"
    long = ["--set", "train.steps=100000", "checkpoint.every=100000", "train.log_every=1"]
    command = [
        sys.executable,
        "-m",
        "jepa_scale",
        "bench",
        str(task),
        "--seeds",
        "1",
        "--jobs",
        "1",
        "--dir",
        str(out),
        *long,
    ]
    bench = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def rows() -> list[Path]:
        return [path for path in out.rglob("metrics.jsonl") if path.stat().st_size]

    while not rows() and bench.poll() is None:
        time.sleep(0.1)
    bench.send_signal(signal.SIGTERM)
    _, errors = bench.communicate()
    assert bench.returncode == 143 and "stopped by SIGTERM" in errors, errors
    (run,) = (path.parent for path in rows())
    assert (run / "checkpoints" / "latest").is_file()  # so it has ended in order, before the bench did
    assert not list(out.rglob("*.complete"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["none"], "task 'none': there is none of that name"),
        (["{task}", "{task}"], "task 'small': is given twice"),
        (["{task}", "--seeds", "0"], "--seeds 0: must be at least 1"),
        (["{task}", "--first-seed", "-1"], "--first-seed -1: must be 0 or more"),
        (["{task}", "--arms", "none"], "--arms none: there is none of that name"),
        (["{task}", "--add", "mine"], "--add 'mine': must be NAME=module:Class"),
        (["{task}", "--add", "lm=a:B"], "--add lm=a:B: there is an arm 'lm' already"),
        (["{task}", "--add", "mine=no_such_module:Class"], "objective.name: 'no_such_module:Class' cannot be imported"),
        (["{task}", "--set", "train.stpes=1"], "small/all/lm/0: train.stpes: unknown key"),
        (
            ["{task}", "--set", "model.hidden_size=18"],
            "small/all/lm/0: model.hidden_size: 18 must be an even multiple",
        ),
    ],
)
def test_what_is_refused_before_anything_is_trained(task, tmp_path, capsys, flags, message):
    out = tmp_path / "out"
    assert main(["bench", *[flag.format(task=task) for flag in flags], "--dir", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not list(out.rglob("summary.json"))


@pytest.fixture
def with_absent(task, monkeypatch):
    """The built-in tasks are two, and the data of the one that comes first are missing."""
    absent = {
        **TASK,
        "config": {**TASK["config"], "data": {"source": "text", "path": "no/such.txt", "tokenizer": "byte"}},
    }
    (task.parent / "absent.yaml").write_text(yaml.safe_dump(absent))
    monkeypatch.setattr("jepa_scale.bench.task.BUILT_IN", task.parent)
    return task.parent / "out"


def test_missing_data_are_refused_before_anything_is_trained(with_absent, capsys):
    assert main(["bench", "small", "absent", "--seeds", "1", "--dir", str(with_absent)]) == 2
    assert "absent/all: data path 'no/such.txt': no such file" in capsys.readouterr().err
    assert not list(with_absent.rglob("summary.json"))


def test_a_task_that_nobody_named_is_left_out_if_its_data_are_missing(with_absent, capsys):
    arguments = [
        "bench",
        "--seeds",
        "1",
        "--dir",
        str(with_absent),
        "--add",
        "plain=jepa_scale.objectives.lm:LanguageModeling",
    ]
    assert main([*arguments, "--arms", "plain"]) == 0
    assert "bench: absent is left out: absent/all: data path 'no/such.txt'" in capsys.readouterr().err
    page = (with_absent / "bench.md").read_text()
    assert "Left out, as their data are missing: `absent`." in page and page.count("## A small reversal") == 1


def test_the_list_of_tasks(capsys):
    assert main(["bench", "--list"]) == 0
    assert "reversal        The reversal curse" in capsys.readouterr().out.splitlines()
