"""A control's decoder is the baseline's, step by step, also where the gradient is clipped."""

import json
from pathlib import Path

import pytest
import torch

import jepa_scale
from jepa_scale.train import main
from tests.text_runs import config_file

OBJECTIVES = {
    "next_latent": {},
    "mtp": {},
    "horizon": {
        "horizons": [1, 2],
        "horizon_probs": [0.5, 0.5],
        "lm_weight": 1.0,
        "split_clipping": False,
        "tap_layer": 1,
    },
    "span": {"lm_weight": 1.0, "predictor_layers": 1, "local_views": 1, "mlm_weight": 1.0},
}
CLIPPED = {"lr": 1e-2, "warmup_steps": 2, "clip_norm": 0.05}


def trained(folder: Path, objective: dict) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """The decoder's weights after four steps, and the rows of metrics."""
    name = objective["name"]
    changes = {"objective": objective, "optim": CLIPPED, "train": {"batch_size": 16}}
    assert main(["--config", str(config_file(folder, name, **changes))]) == 0
    run = jepa_scale.load(folder / name)
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return dict(run.module.backbone.named_parameters()), [row for row in rows if row["split"] == "train"]


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("controls")
    weights, rows = trained(folder, {"name": "lm"})
    assert all(row["grad_norm"] > 2 * CLIPPED["clip_norm"] for row in rows), "nothing would be clipped"
    return folder, weights, rows


@pytest.mark.parametrize("name", OBJECTIVES)
def test_its_decoder_is_that_of_next_token_prediction(baseline, name):
    folder, wanted, rows = baseline
    found, own = trained(folder, {"name": name, "detach": True, **OBJECTIVES[name]})
    assert [row["lm_loss"] for row in own] == pytest.approx([row["lm_loss"] for row in rows], rel=1e-5)
    assert [row["grad_norm_decoder"] for row in own] == pytest.approx([row["grad_norm"] for row in rows], rel=1e-4)
    assert all(row["grad_norm_heads"] > 0 for row in own)
    for key, weight in wanted.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-3, atol=5e-5, msg=lambda text, key=key: f"{key}: {text}")
