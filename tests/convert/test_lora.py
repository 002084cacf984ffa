"""What leaves a LoRA run: the merged model in transformers alone, or the adapters on top of the base by peft."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import jepa_scale
from jepa_scale.checkpoint import store
from jepa_scale.checkpoint.shard_view import ShardView
from jepa_scale.cli import main as cli
from jepa_scale.convert import to_hf
from jepa_scale.convert.from_hf import state_tensors
from jepa_scale.convert.to_hf import ExportOptions, export
from jepa_scale.data import load_data, parse_data
from jepa_scale.models.frozen.base import base_of
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.utils.errors import InputError
from tests.convert.runs import GPT2, NATIVE, REVERSAL, config_file, huggingface, logits, make_run, write_checkpoint

QUIET = ExportOptions(progress=False)
LORA = {"rank": 3, "alpha": 7.5}
BASES = {
    "llama": huggingface("llama", rms_norm_eps=1e-5),
    "qwen3": huggingface("qwen3", head_dim=16, tie_word_embeddings=True),
    "gemma3": huggingface("gemma3_text", head_dim=8, num_hidden_layers=2, tie_word_embeddings=True),
    "olmo2": huggingface("olmo2"),
    "gpt2": GPT2,
    "mixtral": huggingface("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": huggingface(  # a dense block, shared experts and a buffer that is saved
        "deepseek_v3",
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
}
ROWS = load_data(parse_data(REVERSAL)).vocab_size
NEW = ROWS - 4
SEQUENCES = [[1, 5, ROWS - 1, 2, NEW, 7, 3], [NEW - 1, 4, 8], [11, 3, ROWS - 2, 30, 12]]


def base_folder(folder, name, rows=NEW):
    torch.manual_seed(4)
    decoder = build_backbone(ModelOptions(**BASES[name]), rows).decoder
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    decoder.save_pretrained(folder)
    return str(folder)


def lora_run(folder, base, whole=False, **changes):
    """A run whose adapters and new rows are none of them zero; the frozen weights are the base's, in the checkpoint if ``whole``."""
    model = {"family": "huggingface", "pretrained": base, "lora": LORA, **changes}
    module = make_run(folder, "run", model)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    with torch.no_grad():
        for name, parameter in module.backbone.decoder.named_parameters():
            if not parameter.requires_grad:
                parameter.copy_(plain[name.replace(".base_layer", "")][: len(parameter)])
    found = None if whole else base_of(module.backbone.decoder, ModelOptions(**model))
    write_checkpoint(folder / "run", 8, state_tensors(module, base=found), **(found.state() if found else {}))
    return module


@pytest.mark.parametrize("name", BASES)
def test_merged_and_as_an_adapter_it_computes_what_training_computed(tmp_path, name):
    base = base_folder(tmp_path / "base", name)
    module = lora_run(tmp_path, base)
    ours = logits(module.backbone, SEQUENCES)
    made = export(tmp_path / "run", tmp_path / "merged", ExportOptions(progress=False, shard_bytes=20_000))
    assert made.files > 2
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    held = {key for file in (tmp_path / "merged").glob("*.safetensors") for key in load_file(file)}
    merged.save_pretrained(tmp_path / "again")
    assert held == load_file(tmp_path / "again/model.safetensors").keys()

    made = export(tmp_path / "run", tmp_path / "adapter", ExportOptions(progress=False, adapter=True))
    assert made.files == 1 and made.nbytes < 0.5 * sum(p.nbytes for p in merged.parameters())
    assert not (tmp_path / "adapter/config.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain.resize_token_embeddings(ROWS)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        for sequence, wanted in zip(SEQUENCES, ours, strict=True):
            ids = torch.tensor([sequence])
            torch.testing.assert_close(merged.eval()(ids).logits[0], wanted, rtol=0, atol=1e-5)
            torch.testing.assert_close(adapted(ids).logits[0], wanted, rtol=0, atol=1e-5)
            with adapted.disable_adapter():
                assert (adapted(ids).logits[0] - wanted).abs().max() > 0.01  # else nothing could differ


@pytest.mark.parametrize("spare", [False, True], ids=["new rows", "spare rows"])
def test_a_checkpoint_that_holds_its_base_leaves_as_one_that_names_it(tmp_path, spare):
    base = base_folder(tmp_path / "base", "llama", ROWS if spare else NEW)
    lora = {**LORA, "new_ids_from": NEW} if spare else LORA
    for name, whole in (("whole", True), ("named", False)):
        (tmp_path / name).mkdir()
        lora_run(tmp_path / name, base, whole, lora=lora)
        export(tmp_path / name / "run", tmp_path / name / "merged", QUIET)
        export(tmp_path / name / "run", tmp_path / name / "adapter", ExportOptions(progress=False, adapter=True))
    assert not any(
        "base_layer" in name for name in store.shapes(tmp_path / "named/run/checkpoints/step_00000008/tensors")
    )
    for file in ("merged/model.safetensors", "adapter/adapter_model.safetensors"):
        whole, named = (load_file(tmp_path / name / file) for name in ("whole", "named"))
        assert whole.keys() == named.keys() and all(torch.equal(whole[key], named[key]) for key in whole)
    loaded = [jepa_scale.load(tmp_path / name / "run", device="cpu").module for name in ("whole", "named")]
    for ours, theirs in zip(*(module.parameters() for module in loaded), strict=True):
        assert torch.equal(ours, theirs)


def test_adapters_of_a_base_that_has_changed(tmp_path):
    base = base_folder(tmp_path / "base", "llama")
    lora_run(tmp_path, base)
    with open(tmp_path / "base/model.safetensors", "r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x80\x3f")  # the last number is about 1 now
    where = (
        r"model.pretrained: the weights of '.*base' are not those of '.*base' that the adapters of .*step_00000008 were"
    )
    with pytest.raises(InputError, match=where):
        export(tmp_path / "run", tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=where):
        jepa_scale.load(tmp_path / "run", device="cpu")
    export(tmp_path / "run", tmp_path / "adapter", ExportOptions(progress=False, adapter=True))  # it needs no weights


def test_adapters_whose_config_no_longer_names_a_base(tmp_path):
    lora_run(tmp_path, base_folder(tmp_path / "base", "llama"))
    file = tmp_path / "run/config.yaml"
    values = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**values, "model": {**BASES["llama"], "lora": LORA}}))
    for adapter in (False, True):
        with pytest.raises(
            InputError, match="holds adapters, without the frozen weights of '.*base'; set model.pretrained"
        ):
            export(tmp_path / "run", tmp_path / "out", ExportOptions(progress=False, adapter=adapter))
    assert not (tmp_path / "out").exists()


def test_the_card_says_how_to_load_the_adapter(tmp_path):
    """Its code runs as it stands."""
    base = base_folder(tmp_path / "base", "llama")
    module = lora_run(tmp_path, base)
    export(tmp_path / "run", tmp_path / "out", ExportOptions(progress=False, adapter=True))
    card = (tmp_path / "out/README.md").read_text()
    assert "library_name: peft" in card and "LoRA adapters of a `LlamaForCausalLM`" in card
    found = {}
    code = card.partition("```python\n")[2].partition("```")[0]
    exec(code.replace("BASE", base).replace("PATH", str(tmp_path / "out")), found)
    with torch.no_grad():
        theirs = found["model"].eval()(torch.tensor([SEQUENCES[0]])).logits[0]
    torch.testing.assert_close(theirs, logits(module.backbone, SEQUENCES)[0], rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == base


def test_merged_values_are_fp32_sums_rounded_once(tmp_path):
    """W + alpha/r · B·A of weights that the engine kept in bf16, written in bf16."""
    module = lora_run(tmp_path, base_folder(tmp_path / "base", "gpt2"), lora={**LORA, "targets": ["c_attn"]})
    tensors = {f"model/{n}": p.detach() for n, p in module.named_parameters()}
    halved = {n: t.bfloat16() if "base_layer" in n and "c_attn" in n else t for n, t in tensors.items()}
    write_checkpoint(tmp_path / "run", 9, halved)
    export(tmp_path / "run", tmp_path / "out", ExportOptions(progress=False, dtype="bfloat16"))
    got = load_file(tmp_path / "out/model.safetensors")
    block = "backbone.decoder.transformer.h.1.attn.c_attn"
    w, a, b = (
        tensors[f"model/{block}.{x}.weight"].double() for x in ("base_layer", "lora_A.default", "lora_B.default")
    )
    wanted = w.bfloat16().double() + 2.5 * (b @ a).t()
    name = next(n for n in got if n.endswith("h.1.attn.c_attn.weight"))
    torch.testing.assert_close(got[name].double(), wanted, rtol=2**-8, atol=0)
    assert not torch.equal(got[name], w.bfloat16())


def test_a_conversion_that_was_killed_goes_on(tmp_path, monkeypatch):
    lora_run(tmp_path, base_folder(tmp_path / "base", "qwen3"))
    options = ExportOptions(progress=False, shard_bytes=20_000)
    export(tmp_path / "run", tmp_path / "whole", options)
    real, count = to_hf.write_tensors, []

    def die_at_the_third(*args):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(to_hf, "write_tensors", die_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "run", tmp_path / "out", options)
    monkeypatch.setattr(to_hf, "write_tensors", real)
    assert export(tmp_path / "run", tmp_path / "out", options).kept == 2
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("alpha: 7.5", "alpha: 8.5"))
    with pytest.raises(InputError, match="holds another conversion"):  # it would be a mixture of the two
        export(tmp_path / "run", tmp_path / "out", options)
    with pytest.raises(InputError, match="holds another conversion"):
        export(tmp_path / "run", tmp_path / "whole", ExportOptions(progress=False, adapter=True))


def test_the_native_decoder_with_spare_rows_leaves_too(tmp_path):
    """Tied, with a scale and a bias, of which a split head has one each."""
    model = {**NATIVE, "tie_word_embeddings": True, "output_bias": True, "lora": {**LORA, "new_ids_from": NEW}}
    module = make_run(tmp_path, "run", model)
    export(tmp_path / "run", tmp_path / "out", QUIET)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        for sequence, ours in zip(SEQUENCES, logits(module.backbone, SEQUENCES), strict=True):
            torch.testing.assert_close(loaded(torch.tensor([sequence])).logits[0], ours, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="--adapter: peft has no format for new rows of an LM head with a bias"):
        export(tmp_path / "run", tmp_path / "adapter", ExportOptions(progress=False, adapter=True))


def test_a_model_that_comes_in_is_what_the_adapters_are_added_to(tmp_path, capsys):
    folder = base_folder(tmp_path / "base", "llama", ROWS)
    config = config_file(tmp_path, "into", {**BASES["llama"], "lora": {**LORA, "new_ids_from": NEW}})
    arguments = ["convert", folder, "--from", "hf", "--config", str(config), "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 0
    assert cli.main(["convert", str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "out")]) == 0
    there, back = load_file(tmp_path / "base/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert there.keys() == back.keys() and all(torch.equal(there[name], back[name]) for name in there)
    arguments = ["convert", str(tmp_path / "run"), "--to", "hf", "--adapter", "--out", str(tmp_path / "adapter")]
    assert cli.main(arguments) == 0
    assert "LoRA adapters of LlamaForCausalLM" in capsys.readouterr().out
    with safe_open(tmp_path / "adapter/adapter_model.safetensors", framework="pt") as tensors:
        assert len(list(tensors.keys())) == 2 * 2 * 7 + 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(lora=None), "the checkpoint has LoRA adapters, config.yaml has no model.lora"),
        (lambda m: m["lora"].update(rank=4), "has rank 3, model.lora.rank in config.yaml is 4"),
        (lambda m: m.update(random_init=True), None),
    ],
    ids=["no lora", "rank", "random_init"],
)
def test_a_config_that_is_not_the_checkpoints(tmp_path, change, message):
    lora_run(tmp_path, base_folder(tmp_path / "base", "llama"))
    file = tmp_path / "run/config.yaml"
    values = yaml.safe_load(file.read_text())
    change(values["model"])
    file.write_text(yaml.safe_dump(values))
    if message:
        with pytest.raises(InputError, match=message):
            export(tmp_path / "run", tmp_path / "out", QUIET)
    else:
        with pytest.raises(InputError, match="--adapter: the weights under the adapters are random"):
            export(tmp_path / "run", tmp_path / "out", ExportOptions(progress=False, adapter=True))


def test_a_run_without_adapters(tmp_path):
    make_run(tmp_path, "run", NATIVE)
    with pytest.raises(InputError, match="--adapter: the run has no adapters"):
        export(tmp_path / "run", tmp_path / "out", ExportOptions(progress=False, adapter=True))


def test_a_checkpoint_of_a_run_of_the_other_kind_is_refused(tmp_path):
    base = base_folder(tmp_path / "base", "llama")
    with_lora = lora_run(tmp_path, base)
    (tmp_path / "full").mkdir()
    without = make_run(tmp_path / "full", "run", {"family": "huggingface", "pretrained": base})
    for folder, module, reason in (
        (tmp_path / "full/run", with_lora, "its run trained all weights, this one has model.lora"),
        (tmp_path / "run", without, "its run has adapters, this one has no model.lora"),
    ):
        boxes = {name: ShardView.whole(tensor) for name, tensor in state_tensors(module).items()}
        with pytest.raises(InputError, match=f"step_00000007.*: holds no tensor .*; {reason}") as error:
            store.read(folder / "checkpoints/step_00000007/tensors", boxes)
        assert "\n" not in str(error.value)
