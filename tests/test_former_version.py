"""A run of version 0.1 goes on, and is reported, under the names of today.

``versions/0_1.tar.gz`` holds a run that version 0.1 made (commit ac31ccb, FSDP2 on one rank, four steps) and its config. The
expected figures are what version 0.1 itself logged when it resumed that run with ``train.steps=8``.
"""

import json
import tarfile
from pathlib import Path

import pytest

from jepa_scale import train
from jepa_scale.checkpoint.retention import complete
from jepa_scale.convert.to_hf import metrics_at
from jepa_scale.report.page import runs_table
from jepa_scale.telemetry import load_run

VERSION_0_1 = Path(__file__).parent / "versions" / "0_1.tar.gz"
LOSSES = {2: 11.618216514587402, 4: 12.159723281860352, 6: 10.5070161819458, 8: 12.760340213775635}
MRR_OF_TEST = {2: 0.1660942760942761, 4: 0.1660942760942761, 6: 0.16876984126984126, 8: 0.16876984126984126}


@pytest.fixture
def former(tmp_path) -> Path:
    with tarfile.open(VERSION_0_1) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_its_rows_and_its_checkpoint_are_read(former):
    run = load_run(former / "runs/version_0_1")
    assert run.value("train", "loss") == LOSSES[4] and run.value("eval/test", "mrr") == MRR_OF_TEST[4]
    assert {row["split"] for row in run.rows} == {"train", "eval/train", "eval/atomic", "eval/test"}
    (saved,) = complete(run.directory / "checkpoints")
    assert saved.manifest.metrics["eval/test/mrr"] == MRR_OF_TEST[4]
    assert metrics_at(run.directory, saved.manifest)["train"]["exact_match"] == 0.0
    assert runs_table([run.directory]).splitlines()[0].split("  ")[-1].strip() == "training FLOPs"


@pytest.mark.filterwarnings("ignore:the (key|metric) .* has a new name:FutureWarning")
def test_it_is_resumed_as_that_version_would_have(former, monkeypatch):
    monkeypatch.chdir(former)
    assert train.main(["--config", "former.yaml", "--resume", "auto", "train.steps=8"]) == 0
    rows = [json.loads(line) for line in (former / "runs/version_0_1/metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if row["split"] == "train"}
    ranks = {row["step"]: row["mrr"] for row in rows if row["split"] == "eval/test"}
    assert losses == pytest.approx(LOSSES, rel=1e-5) and ranks == pytest.approx(MRR_OF_TEST, rel=1e-3)
    found = complete(former / "runs/version_0_1/checkpoints")
    assert found[-1].step == 8 and "eval/test/mrr" in found[-1].manifest.metrics


def test_its_config_is_read_with_a_warning_for_each_former_name(former):
    from jepa_scale.config.loading import load_config
    from jepa_scale.experiment import validate

    with pytest.warns(FutureWarning) as warned:
        experiment = validate(load_config(former / "former.yaml"))
    assert experiment.checkpoint.keep_best == "eval/test/mrr" and experiment.train.abort[0].metric == "train/loss"
    found = {str(warning.message).partition(" has a new name")[0] for warning in warned}
    names = ("key say_noise", "key say_fraction", "metric fit/loss", "metric test/mrr")
    assert found == {f"the {name}" for name in names}
