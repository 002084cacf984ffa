"""The large configs fit where they say that they do."""

from pathlib import Path

import pytest

from jepa_scale.config.loading import load_config
from jepa_scale.experiment import validate
from jepa_scale.plan.hardware import find_gpu
from jepa_scale.plan.planner import Request, make_plan

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
