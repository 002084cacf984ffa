"""Each objective says in which forms its models leave."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from jepa_scale.config.parsing import parse_section
from jepa_scale.experiment import OBJECTIVES, objective_class, objective_options
from jepa_scale.models.backbone import Backbone
from jepa_scale.objectives.base import Objective
from jepa_scale.objectives.lm import LanguageModeling
from jepa_scale.packing import PackedBatch

FORMS: dict[str, tuple[bool, bool]] = {
    "lm": (True, True),
    "two_view": (True, True),
    "concept": (False, False),
    "horizon": (True, True),
    "mtp": (True, True),
    "next_latent": (True, True),
    "stp": (True, True),
    "span": (False, True),
    "grid": (False, False),
}
"""As a causal language model, and as a sentence encoder, with the options that an objective has by default."""


def forms(name: str, **keys: Any) -> tuple[bool, bool]:
    options = parse_section(objective_options(name), keys, "objective")
    exports = objective_class(name).exports(options)
    assert bool(exports.reason) is not (exports.causal_lm and exports.sentence_encoder)
    return exports.causal_lm, exports.sentence_encoder


def test_every_objective_has_its_row():
    assert FORMS.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize("name", FORMS)
def test_forms_by_default(name):
    assert forms(name) == FORMS[name]


@pytest.mark.parametrize(
    ("name", "keys", "expected"),
    [
        ("span", {"lm_weight": 1.0}, (True, True)),
        ("two_view", {"lm_weight": 0.0}, (False, True)),
        ("stp", {"lm_weight": 0.0}, (False, True)),
        ("grid", {"encoder": "decoder", "lm_weight": 1.0}, (True, False)),
        ("grid", {"encoder": "decoder"}, (False, False)),
    ],
)
def test_forms_follow_the_options(name, keys, expected):
    assert forms(name, **keys) == expected


def test_only_an_objective_that_predicts_tokens_is_a_language_model():
    class Silent(LanguageModeling):
        predicts_tokens = False

    exports = Silent.exports(Silent.Options())
    assert (exports.causal_lm, exports.sentence_encoder) == (False, True)


def test_texts_that_are_encoded_in_another_way_make_no_sentence_encoder():
    """Neither the pooling nor the tokenizer of an exported folder could say so."""

    class Own(LanguageModeling):
        def encode(self, backbone: Backbone, batch: PackedBatch) -> dict[str, Tensor]:
            return {name: 2 * rows for name, rows in Objective.encode(self, backbone, batch).items()}

    class Shorter(LanguageModeling):
        def most_text_tokens(self, backbone: Backbone) -> int | None:
            return 3

    for cls in (Own, Shorter):
        exports = cls.exports(cls.Options())
        assert (exports.causal_lm, exports.sentence_encoder) == (True, False)
        assert "in a way of its own" in exports.reason
