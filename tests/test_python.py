"""Training from Python: ``jepa_scale.train`` returns the run, as often as it is called in one process."""

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import torch.distributed as dist
from text_runs import config_file

import jepa_scale
from jepa_scale import inference
from jepa_scale.train import TrainedRun, _keys
from jepa_scale.utils.errors import InputError


def test_a_run_is_trained_and_read(tmp_path):
    config = config_file(tmp_path)
    run = jepa_scale.train(config, train={"steps": 2, "log_every": 1}, run={"name": "first"}, log={"report": False})
    assert isinstance(run, TrainedRun) and run.directory == tmp_path / "first"
    steps = [row["step"] for row in run.rows if row["split"] == "train"]
    assert steps == [1, 2]
    assert run.metrics["eval/valid"]["lm_loss"] > 0
    assert run.report() == run.directory / "report.html" and run.report().is_file()
    whole = sum(p.numel() for p in run.load().module.parameters())
    summary = json.loads((run.directory / "summary.json").read_text())
    assert (summary["parameters"], summary["trainable_parameters"]) == (whole, whole)
    assert run.load().encode(["the wave"]).shape == (1, 32)
    assert not dist.is_initialized()

    again = jepa_scale.train(config, train={"steps": 2, "log_every": 1}, run={"name": "second"})
    assert again.metrics["train"]["loss"] == run.metrics["train"]["loss"]
    longer = jepa_scale.train(config, resume="auto", train={"steps": 3, "log_every": 1}, run={"name": "first"})
    assert longer.directory == run.directory and run.metrics["train"]["loss"] != again.metrics["train"]["loss"]
    assert np.isfinite(longer.metrics["train"]["loss"])


def test_keys_are_nested_mappings_of_any_values(tmp_path):
    config = config_file(tmp_path)
    with pytest.raises(InputError, match=r"^train\.stepz: "):
        jepa_scale.train(config, train={"stepz": 2})
    with pytest.raises(InputError, match=r"optim\.betas\.1: "):
        jepa_scale.train(config, optim={"betas": [0.9, "x"]})
    with pytest.raises(InputError, match=r"model\.lora\.rank: "):
        jepa_scale.train(config, model={"lora": {"rank": 0}})
    with pytest.raises(InputError, match="nothing.yaml"):
        jepa_scale.train(tmp_path / "nothing.yaml")
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_an_empty_mapping_within_a_section_is_not_dropped():
    given = {"model": {"lora": {}, "hidden_size": 8}, "optim": {"overrides": {"a": {"lr": 1}}}, "train": {}}
    assert dict(_keys(given)) == {"model.lora": {}, "model.hidden_size": 8, "optim.overrides.a.lr": 1}


def test_the_short_ways_to_load_have_the_defaults_of_the_long_one():
    def defaults(function):
        parameters = inspect.signature(function).parameters
        return {name: parameters[name].default for name in ("checkpoint", "device")}

    assert defaults(jepa_scale.load) == defaults(TrainedRun.load) == defaults(inference.load)


def test_the_package_stays_light_until_it_trains():
    """Reading the version imports no torch; the name ``train`` is the script, whether or not it is imported before."""
    code = (
        "import sys, jepa_scale; assert 'torch' not in sys.modules; "
        "from jepa_scale import train; assert callable(train) and train is jepa_scale.train is sys.modules['jepa_scale.train']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
