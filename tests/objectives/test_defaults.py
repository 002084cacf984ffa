"""Options that nobody gives are those of the systems that the objectives come from; a config relies on them without a word."""

from __future__ import annotations

import pytest

from jepa_scale.objectives.base import Objective
from jepa_scale.objectives.concept.objective import Concept
from jepa_scale.objectives.grid.objective import Grid
from jepa_scale.objectives.horizon.objective import Horizon
from jepa_scale.objectives.span.objective import Span
from jepa_scale.objectives.two_view.objective import TwoView

DEFAULTS: list[tuple[type[Objective], dict[str, object]]] = [
    (
        Horizon,
        {
            "tap_layer": -3,
            "horizons": [2, 8, 32, 64],
            "horizon_probs": [0.4, 0.3, 0.2, 0.1],
            "pairs_per_sequence": 64,
            "loss": "barlow",
            "align_scale": 1.0,
            "off_diag_scale": 0.005,
            "lm_weight": 0.5,
            "jepa_weight": 0.1,
            "kl_weight": 0.25,
            "kl_temperature": 2.0,
            "kl_freeze_head": True,
            "split_clipping": True,
            "ema": {"momentum": 0.99, "final_momentum": 0.9998, "schedule": "cosine", "steps": 0},
        },
    ),
    (
        Span,
        {
            "global_views": 2,
            "local_views": 6,
            "global_ratio": (0.25, 0.30),
            "local_ratio": (0.40, 0.45),
            "span_length": 3.0,
            "sigreg_weight": 0.25,
            "sigreg_slices": 256,
            "sigreg_knots": 17,
            "sigreg_limit": 5.0,
        },
    ),
    (
        Grid,
        {
            "context_length": 3,
            "slots": 16,
            "reach": 1,
            "vq_commitment": 0.15,
            "vq_decay": 0.95,
            "vq_refresh_every": 3000,
            "temperature_min": 0.05,
            "temperature_max": 0.2,
            "sigreg_weight": 0.1,
        },
    ),
    (Concept, {"predictor": "rotation", "scale_init": 10.0, "scale_max": 20.0, "decode_noise": 1.3, "gate_init": -2.0}),
    (TwoView, {"distance": "cosine", "jepa_weight": 1.0, "lm_weight": 1.0, "loss_dropout": 0.0, "legacy_loss": False}),
]


@pytest.mark.parametrize(("objective", "expected"), DEFAULTS, ids=[cls.__name__ for cls, _ in DEFAULTS])
def test_defaults_are_those_of_the_system_that_it_is_from(objective, expected):
    given = objective.Options().model_dump()
    assert {name: given[name] for name in expected} == expected
