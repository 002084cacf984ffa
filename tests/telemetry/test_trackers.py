"""Runs of MLflow, Trackio and Comet, which log into files here and are read by their own packages."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sqlite3
import zipfile

import pytest
import torch

from jepa_scale.cli.main import main
from jepa_scale.config.loading import load_config
from jepa_scale.config.schema import TRACKERS as NAMES
from jepa_scale.config.schema import LogConfig
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.experiment import validate
from jepa_scale.telemetry import RunLog, loggers
from jepa_scale.telemetry.trackers import TRACKERS
from jepa_scale.utils.errors import InputError
from tests.distributed.launch import run_ranks
from tests.distributed.processes import HANG
from tests.text_runs import config_file

CONFIG = "run:\n  name: demo\noptim:\n  lr: 0.00123456\n  betas: [0.9, 0.95]\nmodel:\n  lora: null\n"


def run_log(directory, start_step=0, rank=0, **log):
    ranks = ParallelContext(rank, 2, 0, torch.device("cpu"), "python")
    return RunLog(directory, LogConfig(progress=False, **log), ranks, "demo", 10, CONFIG, start_step=start_step)


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A logger that starts or ends slowly, on a busy machine, fails no test."""
    for name in ("START_SECONDS", "CLOSE_SECONDS"):
        monkeypatch.setattr(loggers, name, HANG)


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "MLFLOW_TAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return mlflow


def test_every_name_that_a_config_may_have_is_known():
    assert set(NAMES) == set(TRACKERS)


def test_mlflow_gets_config_name_and_metrics_and_a_resumed_run_goes_on_in_its_run(tmp_path, mlflow, capfd):
    with run_log(tmp_path, trackers=["mlflow"], project="probe") as log:
        for step in (1, 2):
            log.trained(step, {"loss": 1.5 / step, "lr": 0.01, "grad_norm": math.nan, "gate": None})
        log.evaluated(2, "eval/valid", {"ppl": 7.5})
    with run_log(tmp_path, trackers=["mlflow"], project="probe", start_step=2) as log:
        log.trained(3, {"loss": 0.25})
    assert capfd.readouterr().out == ""

    client = mlflow.MlflowClient()
    (experiment,) = mlflow.search_experiments(filter_string="name = 'probe'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == (tmp_path / "mlflow_id.txt").read_text().strip()
    assert (run.info.run_name, run.info.status) == ("demo", "FINISHED")
    assert run.data.params["optim.lr"] == "0.00123456" and run.data.params["optim.betas"] == "[0.9, 0.95]"
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in losses] == [(1, 1.5), (2, 0.75), (3, 0.25)]
    assert run.data.metrics["eval/valid/ppl"] == 7.5 and run.data.metrics["optimizer/lr"] == 0.01
    assert math.isnan(run.data.metrics["optimizer/grad_norm"]) and "train/gate" not in run.data.metrics


def test_a_new_run_in_the_same_place_is_a_new_run_there(tmp_path, mlflow):
    for _ in range(2):
        with run_log(tmp_path, trackers=["mlflow"]) as log:
            log.trained(1, {"loss": 1.0})
    (experiment,) = mlflow.search_experiments(filter_string="name = 'jepa_scale'")
    assert len(mlflow.MlflowClient().search_runs([experiment.experiment_id])) == 2


def test_a_run_that_fails_has_failed_there_too(tmp_path, mlflow):
    with pytest.raises(FloatingPointError), run_log(tmp_path, trackers=["mlflow"]) as log:
        log.trained(1, {"loss": 1.0})
        raise FloatingPointError
    run = mlflow.MlflowClient().get_run((tmp_path / "mlflow_id.txt").read_text().strip())
    assert run.info.status == "FAILED" and run.data.metrics["train/loss"] == 1.0


def test_a_server_that_cannot_be_reached_is_told_once_and_the_run_goes_on(tmp_path, mlflow, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:////{tmp_path}/no/such/folder/mlflow.db")
    (tmp_path / "no").write_text("a file in the folder's place")
    with run_log(tmp_path, trackers=["mlflow"], tensorboard=True) as log:
        log.trained(1, {"loss": 1.0})
        log.trained(2, {"loss": 1.0})
    told = [record.getMessage() for record in caplog.records if record.name.startswith("jepa_scale")]
    assert len(told) == 1 and told[0].startswith("mlflow: cannot start, the run goes on without it: ")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_trackio_gets_config_name_and_metrics_and_a_resumed_run_goes_on(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    from trackio import sqlite_storage, utils

    monkeypatch.setattr(utils, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    with run_log(tmp_path, trackers=["trackio"], project="probe") as log:
        log.trained(1, {"loss": 1.5})
    with run_log(tmp_path, trackers=["trackio"], project="probe", start_step=1) as log:
        log.trained(2, {"loss": 0.75})
        log.evaluated(2, "eval/valid", {"ppl": 7.5})
    assert capfd.readouterr().out == ""
    with sqlite3.connect(tmp_path / "trackio" / "probe.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
        configs = [json.loads(text) for (text,) in database.execute("select config from configs")]
    assert {name for name, _, _ in rows} == {"demo"}
    metrics = [(step, json.loads(text)) for _, step, text in rows]
    assert [(step, each["train/loss"]) for step, each in metrics if "train/loss" in each] == [(1, 1.5), (2, 0.75)]
    assert [each["eval/valid/ppl"] for _, each in metrics if "eval/valid/ppl" in each] == [7.5]
    assert configs[0]["optim.lr"] == 0.00123456


def test_comet_gets_config_name_and_metrics_and_a_resumed_run_goes_on(tmp_path, monkeypatch, capfd):
    pytest.importorskip("comet_ml")
    for name in [name for name in os.environ if name.startswith("COMET_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.comet.config: it is offline without a key
    ids = []
    for step, loss in ((1, 1.5), (2, 0.75)):
        with run_log(tmp_path, trackers=["comet_ml"], project="probe", start_step=step - 1) as log:
            log.trained(step, {"loss": loss, "grad_norm": math.nan})
        ids.append((tmp_path / "comet_ml_id.txt").read_text().strip())
    assert capfd.readouterr().out == "" and ids[0] == ids[1]
    messages = []
    for file in sorted((tmp_path / "comet_ml").glob("*.zip"), key=lambda file: file.stat().st_mtime_ns):
        assert file.name.startswith(ids[0])
        with zipfile.ZipFile(file) as archive:
            messages += [json.loads(line) for line in archive.read("messages.json").splitlines()]
    metrics = [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
    of = {
        name: [(m["step"], m["metricValue"]) for m in metrics if m["metricName"] == name]
        for name in ("train/loss", "optimizer/grad_norm")
    }
    assert of == {"train/loss": [(1, 1.5), (2, 0.75)], "optimizer/grad_norm": [(1, "NaN"), (2, "NaN")]}
    assert not [m["metricName"] for m in metrics if m["metricName"].startswith("sys.")]  # what it would find by itself
    config = [message["payload"]["param"] for message in messages if message["type"] == "parameter_msg"]
    assert {p["paramValue"] for p in config if p["paramName"] == "optim.lr"} == {0.00123456}
    assert ("Name", "demo") in [
        (m["payload"]["key"], m["payload"]["value"]) for m in messages if m["type"] == "log_other"
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["mlfow"], "log.trackers: unknown tracker 'mlfow'; did you mean 'mlflow'?"),
        (["xyz"], "log.trackers: unknown tracker 'xyz'; known: mlflow, trackio, comet_ml"),
        (["wandb"], "log.trackers: wandb has a key of its own; set log.wandb: true in place of it"),
        (["mlflow", "mlflow"], "log.trackers: 'mlflow' is there twice; give each once"),
    ],
)
def test_what_is_no_tracker_is_refused(tmp_path, names, message):
    with pytest.raises(InputError) as error:
        validate(load_config(config_file(tmp_path), [f"log.trackers={names}"]))
    assert message in str(error.value)


def test_a_package_that_is_not_installed_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        "jepa_scale.telemetry.trackers.find_spec", lambda name: None if name == "trackio" else there(name)
    )
    assert main(["train", "--config", str(config_file(tmp_path)), "log.trackers=[trackio]"]) == 2
    said = capsys.readouterr().err
    assert "log.trackers: trackio needs the package trackio, which is not installed; pip install trackio" in said
    assert not (tmp_path / "run").exists()


def test_the_former_name_of_the_project_is_read_with_a_warning(tmp_path):
    with pytest.warns(FutureWarning, match="wandb_project has a new name; write project"):
        assert LogConfig(wandb_project="mine").project == "mine"


def train(ranks: ParallelContext, config: str, uri: str) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = uri  # ranks may have the environment of a server that was started before
    from jepa_scale.training.run import run_training

    loggers.START_SECONDS = loggers.CLOSE_SECONDS = HANG  # in a process of its own
    run_training(argparse.Namespace(config=config, resume=None, overrides=["log.trackers=[mlflow]", "train.steps=2"]))


def test_another_rank_starts_no_tracker(tmp_path, mlflow):
    with run_log(tmp_path, rank=1, trackers=["mlflow"]) as log:
        log.trained(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.matrix
def test_of_two_ranks_the_first_alone_has_a_run(tmp_path, mlflow):
    run_ranks(train, 2, str(config_file(tmp_path)), os.environ["MLFLOW_TRACKING_URI"], fresh=True)
    (experiment,) = mlflow.search_experiments(filter_string="name = 'jepa_scale'")
    (run,) = mlflow.MlflowClient().search_runs([experiment.experiment_id])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = {row["step"]: row["loss"] for row in rows if row["split"] == "train"}
    losses = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert {metric.step: metric.value for metric in losses} == trained and set(trained) == {1, 2}
