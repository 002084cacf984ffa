"""What a run's parts are told of each other."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import yaml

from jepa_scale.config.loading import load_config
from jepa_scale.distributed import comm
from jepa_scale.experiment import validate
from jepa_scale.training.build import build
from jepa_scale.utils.errors import InputError
from tests.text_runs import data_section, write_corpus

VALUES = {
    "engine": {"name": "fsdp", "threads": 1},
    "model": {"family": "native", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2},
    "data": {"source": "reversal", "entities_a": 50, "comb": 5, "relations": 2},
    "objective": {"name": "concept", "bridge_width": 8, "scale_init": 4.0, "scale_max": 5.0},
    "optim": {"lr_head": 0.01, "warmup_steps": 0},
    "train": {"steps": 2, "batch_size": 8},
}


@pytest.fixture
def ranks():
    yield comm.setup()
    comm.teardown()


def test_an_engine_keeps_the_bounds_of_the_objective(ranks, tmp_path):
    """A scale that is far above its bound is at it after one update; the update itself is much smaller."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(VALUES))
    run = build(validate(load_config(tmp_path / "run.yaml")), ranks)
    assert set(run.objective.bounds) <= {name for name, _ in run.engine.module.named_parameters()}
    scale = run.objective.scale.log_scale
    with torch.no_grad():
        scale.to_local().fill_(math.log(50.0))
    (batch,) = next(iter(run.batches(0, 1)))
    totals = {name: torch.tensor(float(count)) for name, count in batch.counts.items()}
    batch.totals.update(totals)
    run.engine.backward(run.engine.forward("loss", batch, [], 0).total)
    run.engine.step()
    assert scale.full_tensor().item() == pytest.approx(math.log(5.0))


def test_a_run_has_the_precision_that_its_devices_settle(ranks, tmp_path):
    """``auto`` is what is asked for; what the run is built with is what it saves."""
    values = {**VALUES, "engine": {**VALUES["engine"], "precision": "auto"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    asked = validate(load_config(tmp_path / "run.yaml"))
    run = build(asked, ranks)
    settled = run.experiment.engine.precision
    assert settled in ("fp32", "bf16") and settled == run.engine.options.precision
    assert f"precision: {settled}" in run.experiment.to_yaml() and asked.engine.precision == "auto"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, r"model.load_in_4bit: bitsandbytes cannot be imported .*; pip install 'jepa-scale\[4bit\]'"),
        ({"lora": None}, "model.load_in_4bit: needs model.lora"),
    ],
)
def test_weights_of_4_bits_are_refused_before_the_data_are_read(ranks, tmp_path, monkeypatch, keys, message):
    """There are no data, and there is no model."""
    for name in ("bitsandbytes", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, name, None)
    model = {"family": "huggingface", "pretrained": "no/model", "lora": {"rank": 2}, "load_in_4bit": True, **keys}
    data = {"source": "text", "path": str(tmp_path / "nothing.txt"), "tokenizer": "no/model"}
    values = {**VALUES, "model": model, "data": data, "objective": {"name": "lm"}, "optim": {}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match=message):
        build(validate(load_config(tmp_path / "run.yaml")), ranks)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"name": "lm"}, "model.bridge_grad_barrier: nothing would train blocks 1 to 1, as objective 'lm' has no tap there"),
        ({"name": "horizon", "tap_layer": 1, "horizons": [1], "horizon_probs": [1.0], "detach": True}, "objective.detach: nothing would train blocks 1 to 1, which model"),
        ({"name": "mtp", "detach": True}, "objective.detach: nothing would train blocks 1 to 1, which model.bridge_grad_barrier"),
    ],
)  # fmt: skip
def test_blocks_that_nothing_trains_are_refused(ranks, tmp_path, objective, message):
    """Below a bridge with a stop-gradient layer the objective's tap alone trains blocks."""
    model = {**VALUES["model"], "bridge_after": 1, "bridge_grad_barrier": True}
    data = {**data_section(tmp_path), "workers": 0}
    write_corpus(tmp_path)
    values = {
        "engine": VALUES["engine"],
        "model": model,
        "data": data,
        "objective": objective,
        "train": VALUES["train"],
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match=message):
        build(validate(load_config(tmp_path / "run.yaml")), ranks)
