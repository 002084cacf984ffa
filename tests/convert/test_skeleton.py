from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig

from jepa_scale.convert.skeleton import Skeleton


@pytest.mark.parametrize(("own", "kept"), [([0, 5, 2], [2, 7, 0, 5]), (2, [2, 7]), (None, [2, 7])])
def test_an_export_stops_where_the_pretrained_model_and_the_data_do(tmp_path, own, kept):
    GenerationConfig(eos_token_id=own, max_new_tokens=9).save_pretrained(tmp_path)
    options = SimpleNamespace(pretrained=str(tmp_path), cache_dir=None)
    found = Skeleton(SimpleNamespace()).generation_config({"eos": 2, "end": 7}, options)
    assert found.eos_token_id == kept and found.max_new_tokens == 9


def test_a_config_with_several_stops_keeps_them():
    for own, kept in (([0, 5, 2], [0, 5, 2]), ([0, 5], 2), (0, 2)):
        model = SimpleNamespace(config=LlamaConfig(eos_token_id=own))
        assert Skeleton(model).config(torch.float32, {"eos": 2}).eos_token_id == kept
