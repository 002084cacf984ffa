"""Facts as sentences have no views: they are refused by key."""

import pytest

from jepa_scale.data import load_data, parse_data
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.objectives.two_view.config import TwoViewOptions
from jepa_scale.objectives.two_view.objective import TwoView
from jepa_scale.utils.errors import InputError


def test_they_are_refused_by_key():
    facts = {"source": "reversal", "form": "sentences", "entities_a": 50, "comb": 5, "relations": 2}
    data = load_data(parse_data(facts))
    backbone = build_backbone(ModelOptions(hidden_size=16, num_hidden_layers=1, num_attention_heads=2), data.vocab_size)
    with pytest.raises(InputError, match="data.form: two_view has views of relation tokens, not of sentences"):
        TwoView(TwoViewOptions(), backbone, data)
