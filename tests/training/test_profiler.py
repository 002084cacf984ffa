"""Traces of the steps that ``log.profile`` names, read as JSON."""

from __future__ import annotations

import argparse
import gzip
import json
import pickle
import re
from collections import Counter

import pytest
import torch

import jepa_scale
from jepa_scale.cli.main import main
from jepa_scale.config.loading import load_config
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.experiment import validate
from jepa_scale.training.profiler import StepProfiler
from jepa_scale.utils.errors import InputError
from tests.distributed.launch import run_ranks
from tests.text_runs import config_file

PARTS = ("data", "forward", "backward", "optimizer")


def events(run, steps, rank=0):
    """The events of a trace that have a duration."""
    (path,) = run.glob(f"profile/steps_{steps}_rank_{rank}.pt.trace.json.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def steps_of(found):
    return {name: (e["ts"], e["ts"] + e["dur"]) for e in found if re.fullmatch(r"ProfilerStep#\d+", name := e["name"])}


def test_a_trace_has_the_steps_their_parts_and_the_operators(tmp_path):
    run = jepa_scale.train(config_file(tmp_path), log={"profile": [2, 3]}, train={"eval_every": 2}).directory
    assert [path.name for path in (run / "profile").iterdir()] == ["steps_2_to_3_rank_0.pt.trace.json.gz"]
    found = events(run, "2_to_3")
    steps = steps_of(found)
    assert list(steps) == ["ProfilerStep#2", "ProfilerStep#3"]
    for begin, end in steps.values():
        within = Counter(event["name"] for event in found if begin <= event["ts"] < end)
        assert all(within[part] == 1 for part in PARTS), within
        assert within["aten::mm"] > 0 and within["aten::embedding"] > 0
    between = [e["name"] for e in found if steps["ProfilerStep#2"][1] <= e["ts"] < steps["ProfilerStep#3"][0]]
    assert "aten::mm" in between, "the evaluation after step 2 is outside of both steps"


def test_a_run_without_the_key_writes_no_trace(tmp_path):
    run = jepa_scale.train(config_file(tmp_path), train={"steps": 2}).directory
    assert not (run / "profile").exists()


def test_a_resumed_run_profiles_the_steps_that_are_left_and_says_so(tmp_path, capsys):
    config = config_file(tmp_path)
    jepa_scale.train(config, train={"steps": 2})
    run = jepa_scale.train(config, resume="auto", train={"steps": 3}, log={"profile": [2, 3]}).directory
    assert list(steps_of(events(run, "3_to_3"))) == ["ProfilerStep#3"]
    assert "log.profile: the run goes on after step 2; steps 3 to 3 are profiled" in capsys.readouterr().err
    jepa_scale.train(config, resume="auto", train={"steps": 4}, log={"profile": [2, 3]})
    assert (
        "log.profile: the run goes on after step 3; steps 2 to 3 are done, so nothing is profiled"
        in capsys.readouterr().err
    )
    assert len(list((run / "profile").iterdir())) == 1


@pytest.mark.parametrize("steps", [[0, 2], [3, 2], [2], [1, 2, 3], 5, [1, 2.5]])
def test_what_is_no_range_of_steps_is_refused(tmp_path, steps):
    with pytest.raises(InputError, match="^log.profile"):
        validate(load_config(config_file(tmp_path), [f"log.profile={steps}"]))


@pytest.mark.parametrize("length", [["train.steps=4"], ["train.steps=0", "train.epochs=1"]])
def test_steps_that_the_run_does_not_have_are_refused_before_it_trains(tmp_path, capsys, length):
    command = ["train", "--config", str(config_file(tmp_path)), *length]
    assert main([*command, "log.profile=[2,1000]"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"log.profile: \[2, 1000\]: the run has (\d+) steps; choose steps up to \1\n", said), said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_steps_that_were_profiled_are_written_when_the_run_fails(tmp_path):
    ranks = ParallelContext(0, 1, 0, torch.device("cpu"), "python")
    with pytest.raises(FloatingPointError), StepProfiler([2, 9], tmp_path, ranks) as profiler:
        for step in range(1, 5):
            profiler.begin(step)
            torch.ones(3) @ torch.ones(3)
            if step == 4:
                raise FloatingPointError
            assert not profiler.end(step)
    assert list(steps_of(events(tmp_path, "2_to_3"))) == [f"ProfilerStep#{step}" for step in (2, 3, 4)]


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file in the folder's place")
    ranks = ParallelContext(0, 1, 0, torch.device("cpu"), "python")
    with StepProfiler([1, 1], tmp_path, ranks) as profiler:
        profiler.begin(1)
        assert profiler.end(1)
        profiler.write()
    assert caplog.text.count("was not written") == 1


def train(ranks: ParallelContext, config: str) -> None:
    from jepa_scale.training.run import run_training

    run_training(argparse.Namespace(config=config, resume=None, overrides=["log.profile=[2,2]", "train.steps=2"]))


def test_each_rank_has_its_own_trace_with_what_it_sends(tmp_path):
    run_ranks(train, 2, str(config_file(tmp_path)))
    for rank in range(2):
        names = {event["name"] for event in events(tmp_path / "run", "2_to_2", rank)}
        assert {"ProfilerStep#2", *PARTS} <= names
        assert any(re.match("c10d::|gloo:", name) for name in names), sorted(names)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_leaves_its_kernels_and_a_snapshot_of_memory(tmp_path):
    run = jepa_scale.train(config_file(tmp_path), log={"profile": [2, 3]}).directory
    assert any(event.get("cat") == "kernel" for event in events(run, "2_to_3"))
    snapshot = pickle.loads((run / "profile/steps_2_to_3_rank_0_memory.pickle").read_bytes())
    assert snapshot["segments"] and any(snapshot["device_traces"])
