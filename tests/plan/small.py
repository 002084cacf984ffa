"""Small configs to plan, and models of known size."""

from __future__ import annotations

from typing import Any

from jepa_scale.config.parsing import parse_section
from jepa_scale.config.schema import Config
from jepa_scale.experiment import validate
from jepa_scale.plan.layout import Layout, layout_of
from jepa_scale.plan.model import Modelled, model_on_meta
from jepa_scale.plan.planner import Request, RunPlan, make_plan
from jepa_scale.plan.synthetic import synthetic_data

LAYERS, WIDTH, INNER, HEADS, KV, VOCAB = 3, 32, 48, 4, 2, 128
MODEL = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "vocab_size": VOCAB,
}
BLOCK = 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH * KV // HEADS + 3 * WIDTH * INNER + 2 * WIDTH
"""Parameters of a block: q and o, k and v, SwiGLU, two norms."""
PARAMETERS = 2 * VOCAB * WIDTH + WIDTH + LAYERS * BLOCK
HORIZON = {"name": "horizon", "horizons": [1, 2], "horizon_probs": [0.5, 0.5], "tap_layer": 2}


def config(engine: dict[str, Any] | None = None, **sections: Any) -> Config:
    values = {
        "engine": {"name": "fsdp", **(engine or {})},
        "model": MODEL,
        "data": {"source": "text", "path": "nowhere", "max_length": 17},
        "objective": {"name": "lm"},
        "train": {"batch_size": 8},
    }
    return parse_section(Config, {**values, **sections}, "")


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"name": "deepspeed", "deepspeed": f"configs/ds/zero{stage}.json", **more}


def modelled(config: Config, world_size: int = 1, tp: int = 1) -> tuple[Modelled, Layout]:
    experiment = validate(config)
    layout = layout_of(experiment.engine, world_size, tp)
    return model_on_meta(experiment, synthetic_data(experiment, None, None), layout), layout


def planned(config: Config, world_size: int = 1, **more: Any) -> RunPlan:
    request = Request(world_size, more.pop("gpu", None), search=more.pop("search", False), **more)
    return make_plan(validate(config), request)
