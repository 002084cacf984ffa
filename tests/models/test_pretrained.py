"""A pretrained model is loaded whole, or not at all: each fault of its files is one line with its name."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from jepa_scale.config.parsing import parse_section
from jepa_scale.models.loading import build_backbone, check_pretrained
from jepa_scale.models.options import ModelOptions
from jepa_scale.utils.errors import InputError

UP = "model.layers.1.mlp.up_proj.weight"
LLAMA = dict(
    model_type="llama",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    rope_theta=5000.0,
)


def options(folder, **keys):
    return parse_section(ModelOptions, {"family": "huggingface", "pretrained": str(folder), **keys}, "model")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    build_backbone(ModelOptions(family="huggingface", config=LLAMA), 50).decoder.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "m")
    return tmp_path / "m"


def change(folder, edit):
    """Change the tensors of the folder's file in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **keys):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def refused(folder, message, **keys):
    with pytest.raises(InputError) as error:
        build_backbone(options(folder, **keys), 50)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("model.pretrained: ")


def test_a_missing_tensor_is_named_or_allowed_by_its_prefix(folder, caplog):
    change(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if "layers.1.mlp" in n])
    refused(folder, "lacks model.layers.1.mlp.down_proj.weight, model.layers.1.mlp.gate_proj.weight, ")
    refused(
        folder, f"lacks {UP} of LlamaForCausalLM", allow_missing=["model.layers.1.mlp.down", "model.layers.1.mlp.gate"]
    )
    with caplog.at_level(logging.WARNING):
        whole = build_backbone(options(folder, allow_missing=["model.layers.1.mlp."]), 50)
    assert f"{UP}: drawn at random" in caplog.text.replace("\n", " ") and whole.num_layers == 2


def test_an_unknown_tensor_is_named_or_allowed_by_its_prefix(folder, caplog):
    change(folder, lambda tensors: tensors.update({"v_head.weight": torch.ones(3)}))
    refused(folder, "has, unknown to the model, v_head.weight")
    with caplog.at_level(logging.WARNING):
        build_backbone(options(folder, allow_unexpected=["v_head"]), 50)
    assert "v_head.weight: not loaded" in caplog.text


def test_a_tensor_of_another_shape_is_named(folder):
    change(folder, lambda tensors: tensors.update({UP: tensors[UP][:40].clone()}))
    refused(folder, f"{UP} has shape (40, 32), LlamaForCausalLM needs (48, 32)")
    refused(folder, UP, allow_missing=["model."])  # no prefix makes a wrong shape right


def test_a_tied_head_is_not_missing(tmp_path):
    tied = build_backbone(ModelOptions(family="huggingface", config={**LLAMA, "tie_word_embeddings": True}), 50)
    tied.decoder.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert build_backbone(options(tmp_path), 50).vocab_size == 50


@pytest.mark.parametrize("where", ["quantization_config", "text_config"])
@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_quantised_weights_are_refused(folder, method, where):
    own = {"quant_method": method, "bits": 4}
    change_config(folder, **{where: own if where == "quantization_config" else {"quantization_config": own}})
    refused(folder, f"its weights are quantised (quantization_config: {method})")
    with torch.device("meta"):  # the other ranks, which read no weights
        refused(folder, "its weights are quantised")


def check(folder, message, **keys):
    with pytest.raises(InputError) as error:
        check_pretrained(options(folder, **keys))
    assert message in str(error.value) and str(error.value).startswith("model.pretrained: ")


def test_an_adapter_alone_is_refused_with_its_base(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../base"}))
    check(folder, "holds an adapter (adapter_config.json), whose base is '../base'; name the base, and make a run")
    check(folder, "holds an adapter", random_init=True)


def test_a_folder_without_weights_is_refused_unless_none_are_wanted(folder):
    (folder / "model.safetensors").rename(folder / "tf_model.h5")
    check(folder, "has no weights (model.safetensors or an index of shards), only config.json")
    check_pretrained(options(folder, random_init=True))
    (folder / "config.json").unlink()
    check(folder, "not a Hugging Face model (no config.json)")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    check(folder, "model.safetensors: ")
    refused(folder, "copy it again")


def test_a_pointer_of_git_lfs_is_refused(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    check(folder, "run `git lfs pull`")


def test_names_that_lead_outside_are_refused(folder):
    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    for name in ("../secret.safetensors", str(folder.parent / "secret.safetensors")):
        index.write_text(json.dumps({"metadata": {}, "weight_map": {UP: name}}))
        check(folder, f"weight_map says that {UP} is in {name!r}, outside of this folder")
        refused(folder, "outside of this folder")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {UP: "model-1.safetensors"}}))
    check(folder, "model-1.safetensors: cannot be read (No such file or directory)")
    change_config(folder, transformers_weights="../secret.safetensors")
    check(folder, "transformers_weights is '../secret.safetensors', outside of this folder")


def test_a_quantised_model_gives_its_architecture_alone(folder):
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    backbone = build_backbone(options(folder, random_init=True), 50)
    assert "quantization_config" not in backbone.decoder.config.to_dict()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(allow_missing=["a"], random_init=True), "model.allow_missing: needs the weights of model.pretrained"),
        (dict(allow_unexpected=[""]), "model.allow_unexpected: has an empty prefix"),
    ],
)
def test_prefixes_need_weights_and_letters(folder, keys, message):
    with pytest.raises(InputError, match=message):
        build_backbone(options(folder, **keys), 50)


def test_keys_as_a_family_writes_them_are_known():
    keys = dict(model_type="qwen3_moe", hidden_size=32, moe_intermediate_size=16, num_hidden_layers=1, head_dim=8)
    keys |= dict(num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2)
    for name in ("num_experts", "num_local_experts"):
        backbone = build_backbone(ModelOptions(family="huggingface", config={**keys, name: 3}), 50)
        assert backbone.decoder.config.num_experts == 3
