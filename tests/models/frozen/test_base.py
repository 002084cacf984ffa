"""The frozen weights that can be read again, their names and their hash."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jepa_scale.models.frozen.base import base_of, confirmed, readable
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.utils.errors import InputError

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1}
KNOWN, ROWS = 40, 43


def saved(folder: Path, **keys: object) -> str:
    torch.manual_seed(3)
    options = ModelOptions(family="huggingface", config={**LLAMA, **keys})
    build_backbone(options, KNOWN).decoder.save_pretrained(folder)
    return str(folder)


def decoder_of(options: ModelOptions, rows: int = ROWS):
    torch.manual_seed(0)
    return build_backbone(options, rows).decoder


def of(folder: str, **keys: object) -> ModelOptions:
    return ModelOptions(**{"family": "huggingface", "pretrained": folder, "lora": {"rank": 2}, **keys})


@pytest.mark.parametrize("tied", [False, True])
def test_all_that_is_frozen_and_nothing_that_trains(tmp_path, tied):
    """Of two embeddings of which the last rows are new, the old rows are the base's."""
    options = of(saved(tmp_path, tie_word_embeddings=tied))
    decoder = decoder_of(options)
    names = readable(decoder, options)
    trained = {name for name, p in decoder.named_parameters(remove_duplicate=False) if p.requires_grad}
    every = {name for name, _ in decoder.named_parameters(remove_duplicate=False)}
    assert names == every - trained
    assert all(".lora_" in name or ".new_rows." in name for name in trained)
    assert {"model.embed_tokens.base_layer.weight", "lm_head.base_layer.weight", "model.norm.weight"} <= names


def test_the_hash_is_of_the_values_and_not_of_the_files(tmp_path):
    folder = saved(tmp_path / "one")
    options = of(folder)
    base = base_of(decoder_of(options), options)
    assert base is not None and base.name == folder
    decoder_of(of(folder, lora=None), KNOWN).save_pretrained(tmp_path / "two", max_shard_size="3KB")
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 2
    again = of(str(tmp_path / "two"), lora={"rank": 4, "targets": ["q_proj"]})
    found = base_of(decoder_of(again), again)
    assert found is not None and found.sha256 == base.sha256


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_a_number_that_has_changed_changes_the_hash(tmp_path, name):
    options = of(saved(tmp_path))
    base = base_of(decoder_of(options), options)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, file, {"format": "pt"})
    changed = base_of(decoder_of(options), options)
    assert base is not None and changed is not None
    with pytest.raises(InputError, match=f"the weights of '{tmp_path}' are not those of '{tmp_path}'"):
        confirmed(changed, base.state(), Path("step_00000001"))
    assert confirmed(base, base.state(), Path("step_00000001")) is base


def test_weights_that_cannot_be_read_again_have_no_base(tmp_path):
    folder = saved(tmp_path)
    cases = [
        of(folder, lora=None),
        of(folder, random_init=True),
        ModelOptions(lora={"rank": 2}),
        ModelOptions(family="huggingface", config=LLAMA, lora={"rank": 2}),
    ]
    assert [base_of(decoder_of(options), options) for options in cases] == [None] * 4


def test_what_the_files_lack_is_not_the_bases(tmp_path):
    """Its random values cannot be drawn again."""
    folder = saved(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    lacking = "model.layers.1.mlp.up_proj.weight"
    del tensors[lacking]
    save_file(tensors, file, {"format": "pt"})
    options = of(folder, allow_missing=["model.layers.1.mlp.up_proj"])
    names = readable(decoder_of(options), options)
    assert "model.layers.1.mlp.up_proj.base_layer.weight" not in names
    assert "model.layers.0.mlp.up_proj.base_layer.weight" in names


def test_a_checkpoint_with_all_weights_needs_no_base_and_one_without_them_does():
    assert confirmed(None, {}, Path("step")) is None
    state = {"base": {"name": "some/model", "sha256": "0" * 64}}
    with pytest.raises(InputError, match="without the frozen weights of 'some/model'; set model.pretrained"):
        confirmed(None, state, Path("step"))
