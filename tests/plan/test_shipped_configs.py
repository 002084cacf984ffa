"""The large configs fit where they say that they do."""

import json
from pathlib import Path

import pytest

from jepa_scale.config.loading import load_config
from jepa_scale.experiment import validate
from jepa_scale.plan.hardware import find_gpu
from jepa_scale.plan.planner import Request, make_plan

LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "num_attention_heads": 32}
MODELS = {  # Llama-3.2-1B and Llama-3.1-8B
    "1B": {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
           "tie_word_embeddings": True},
    "8B": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
}  # fmt: skip
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize(
    ("name", "gpus", "billions", "engine"),
    [
        ("jepa_1b", 8, 1.2, "deepspeed"),
        ("jepa_8b", 64, 8.0, "fsdp"),
        pytest.param("jepa_1b", 8, 1.2, "fsdp", marks=pytest.mark.matrix),
        pytest.param("jepa_8b", 64, 8.0, "deepspeed", marks=pytest.mark.matrix),
    ],
)
def test_fits_on_gpus_with_80_gb(name, gpus, billions, engine):
    experiment = validate(load_config(CONFIGS / f"{name}.yaml", [f"engine.name={engine}"]))
    plan = make_plan(experiment, Request(gpus, find_gpu("h100"), search=False))
    assert plan.fits
    assert plan.parameters / 1e9 == pytest.approx(billions, rel=0.08)  # the objective's heads come on top
    assert plan.step_tokens == experiment.train.batch_tokens


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_fine_tuning_fits_on_one_gpu_with_24_gb(tmp_path, name, engine):
    """Of the model there is a config.json alone, which has the vocabulary, too."""
    (tmp_path / "config.json").write_text(json.dumps(MODELS[name]))
    overrides = [f"engine.name={engine}", f"model.pretrained={tmp_path}"]
    experiment = validate(load_config(CONFIGS / "finetune_example.yaml", overrides))
    plan = make_plan(experiment, Request(1, find_gpu("rtx3090"), search=False))
    assert plan.fits, plan.memory.peak
    adapters = plan.parameters - {"1B": 1_235_814_400, "8B": 8_030_261_248}[name]  # those of the models as published
    assert plan.memory.state["parameters"] == pytest.approx(2 * (plan.parameters - adapters) + 4 * adapters, rel=0.01)


def test_in_4_bits_8_billion_fit_on_16_gb(tmp_path):
    """A weight of the blocks takes half a byte, and its share of an 8-bit scale of 64 weights and an fp32 one of 256 scales."""
    (tmp_path / "config.json").write_text(json.dumps(MODELS["8B"]))
    overrides = ["engine.name=fsdp", "engine.precision=fp16", f"model.pretrained={tmp_path}", "model.load_in_4bit=true"]
    experiment = validate(load_config(CONFIGS / "finetune_example.yaml", overrides))
    plan = make_plan(experiment, Request(1, find_gpu("t4"), search=False))
    assert plan.fits
    blocks, others = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336), 2 * 128256 * 4096
    adapters = 32 * 16 * (2 * 2 * 4096 + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    codes = blocks * (1 / 2 + 1 / 64 + 4 / (64 * 256))
    assert plan.memory.state["parameters"] == pytest.approx(codes + 2 * others + 4 * adapters, rel=1e-3)
