"""LoRA and random weights: what trains, what stays, what is refused, and what the frozen rows of an embedding mean."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from jepa_scale.config.parsing import parse_section
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import LoraOptions, ModelOptions
from jepa_scale.packing import Segment, pack_sequence
from jepa_scale.utils.errors import InputError

LLAMA = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
FAMILIES = {
    "llama": dict(model_type="llama", **LLAMA),
    "qwen3": dict(model_type="qwen3", head_dim=8, tie_word_embeddings=True, **LLAMA),
    "gemma3": dict(model_type="gemma3_text", head_dim=8, pad_token_id=0, **LLAMA),
    "olmo2": dict(model_type="olmo2", **LLAMA),
    "gpt2": dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
NATIVE = dict(hidden_size=32, num_hidden_layers=2, tie_word_embeddings=True, output_bias=True, bridge_after=1)
KNOWN, ROWS = 50, 53
STREAM = pack_sequence([Segment([1, 50, 3, 49, 7], "a"), Segment([52, 4], "a")])


def build(needed=ROWS, **keys):
    torch.manual_seed(3)
    return build_backbone(parse_section(ModelOptions, keys, "model"), needed)


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    backbone = build(KNOWN, family="huggingface", config=FAMILIES[request.param])
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    backbone.decoder.save_pretrained(folder)
    return str(folder)


def pretrained(folder, **keys):
    return dict(family="huggingface", pretrained=folder, **keys)


def logits(backbone, **how):
    return backbone.logits(backbone.hidden(STREAM), **how)


def test_it_computes_what_the_model_computes_until_it_is_trained(base):
    full, ours = build(**pretrained(base)), build(**pretrained(base, lora={}))
    torch.testing.assert_close(logits(ours), logits(full), rtol=0, atol=1e-5)
    assert (ours.head_size, ours.vocab_size, ours.num_layers) == (32, ROWS, 2)
    torch.testing.assert_close(ours.hidden(STREAM, until=1), full.hidden(STREAM, until=1), rtol=0, atol=1e-5)
    lower = ours.lower(1)
    torch.testing.assert_close(lower.hidden(STREAM), full.hidden(STREAM, until=1), rtol=0, atol=1e-5)
    assert {n for n, _ in lower.named_parameters()} < {n for n, _ in ours.named_parameters()}
    with ours.unpacked() as decoder, full.unpacked() as other, torch.no_grad():
        ids = torch.tensor([[1, 51, 3]])
        torch.testing.assert_close(decoder(ids).logits, other(ids).logits, rtol=0, atol=1e-5)
        made = [m.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0) for m in (decoder, other)]
        assert torch.equal(*made) and made[0].shape == (1, 6)


def test_training_is_that_of_the_full_model_seen_through_the_adapters(base):
    """A plain reference: W' = W + s·B·A as leaves of autograd in the full model, for each linear layer of the blocks; and
    the embedding's rows, of which only the new ones' gradient counts."""
    ours = build(**pretrained(base, lora={"rank": 3, "alpha": 6}))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    full = build(**pretrained(base))
    leaves = dict(full.named_parameters())
    for name, module in full.named_modules():
        if isinstance(module, nn.Module) and f"{name}.lora_A.default.weight" in dict(ours.named_parameters()):
            a, b = (ours.get_parameter(f"{name}.lora_{x}.default.weight") for x in "AB")
            update = 2.0 * (b @ a).detach()
            module.weight.data += update.t() if type(module).__name__ == "Conv1D" else update
    embedding = full.decoder.get_input_embeddings().weight
    ours.decoder.get_input_embeddings().new_rows.weight.data.copy_(embedding.data[KNOWN:])
    head = full.decoder.get_output_embeddings().weight
    ours.decoder.get_output_embeddings().new_rows.weight.data.copy_(head.data[KNOWN:])
    x, y = logits(full), logits(ours)
    torch.testing.assert_close(y, x, rtol=0, atol=1e-4)
    torch.manual_seed(0)
    labels = torch.randint(ROWS, (len(x),))
    nn.functional.cross_entropy(x, labels).backward()
    nn.functional.cross_entropy(y, labels).backward()
    checked = 0
    for name, parameter in ours.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        if ".lora_A." in name:
            layer, b = full.get_submodule(name.partition(".lora_A.")[0]), ours.get_parameter(name.replace("_A.", "_B."))
            grad = layer.weight.grad.t() if type(layer).__name__ == "Conv1D" else layer.weight.grad
            wanted = 2.0 * b.detach().t() @ grad
        elif ".lora_B." in name:
            layer, a = full.get_submodule(name.partition(".lora_B.")[0]), ours.get_parameter(name.replace("_B.", "_A."))
            grad = layer.weight.grad.t() if type(layer).__name__ == "Conv1D" else layer.weight.grad
            wanted = 2.0 * grad @ a.detach().t()
        else:
            wanted = leaves[name.replace(".new_rows", "")].grad[KNOWN:]
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        checked += 1
    linear = sum(isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D" for m in full.layers.modules())
    tied = full.decoder.get_input_embeddings().weight is full.decoder.get_output_embeddings().weight
    assert checked == 2 * linear + (1 if tied else 2) and linear in (8, 14)


def test_without_new_rows_the_embedding_is_left_alone(base):
    ours = build(KNOWN, **pretrained(base, lora={"rank": 2}))
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert isinstance(ours.decoder.get_input_embeddings(), nn.Embedding)


def test_spare_rows_of_a_checkpoint_can_be_trained(base):
    ours = build(40, **pretrained(base, lora={"new_ids_from": 44}))
    rows = ours.decoder.get_input_embeddings()
    assert rows.base_layer.weight.shape == (44, 32) and rows.new_rows.weight.shape == (KNOWN - 44, 32)
    assert not rows.base_layer.weight.requires_grad and rows.new_rows.weight.requires_grad
    stream = pack_sequence([Segment([1, 49, 43, 44], "a")])
    full = build(40, **pretrained(base))
    torch.testing.assert_close(ours.logits(ours.hidden(stream)), full.logits(full.hidden(stream)), rtol=0, atol=1e-5)
    with pytest.raises(IndexError):
        rows(torch.tensor([KNOWN]))


def test_a_frozen_call_of_the_head_freezes_its_new_rows(base):
    ours = build(**pretrained(base, lora={}))
    rows = torch.randn(2, ours.head_size, requires_grad=True)
    head = ours.decoder.get_output_embeddings()
    torch.testing.assert_close(ours.logits(rows, frozen=True), ours.logits(rows))
    ours.logits(rows, frozen=True).sum().backward()
    assert rows.grad.abs().sum() > 0 and head.new_rows.weight.grad is None
    ours.logits(rows).sum().backward()
    assert head.new_rows.weight.grad.abs().sum() > 0


def test_parameters_above_a_tap_are_not_the_embeddings(base):
    ours = build(**pretrained(base, lora={}))
    above = set(ours.parameters_above(1))
    assert not above & set(ours.decoder.get_input_embeddings().parameters())
    assert all(p in above for p in ours.layers[1].parameters()) and not above & set(ours.layers[0].parameters())


def test_native():
    full, ours = build(**NATIVE), build(**NATIVE, lora={"rank": 2, "new_ids_from": 40, "targets": ["o_proj"]})
    torch.testing.assert_close(logits(ours), logits(full), rtol=0, atol=1e-5)
    trained = [name for name, parameter in ours.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 + 2 and sum("o_proj.lora_" in name for name in trained) == 4
    assert {name.rpartition("new_rows.")[2] for name in trained if "new_rows" in name} == {"weight", "bias"}
    scale = [name for name, _ in ours.named_parameters() if "logit_scale" in name]
    assert scale == ["decoder.lm_head.base_layer.logit_scale"]


def test_dropout_is_of_the_adapters_and_of_training_alone():
    torch.manual_seed(0)
    ours = build(KNOWN, hidden_size=32, num_hidden_layers=1, lora={"dropout": 0.5})
    stream = pack_sequence([Segment([1, 2, 3], "a")])
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert not torch.equal(ours.hidden(stream), ours.hidden(stream))
    ours.eval()
    assert torch.equal(ours.hidden(stream), ours.hidden(stream))


def test_random_init_is_the_architecture_with_other_weights(base, tmp_path, caplog):
    there = AutoModelForCausalLM.from_pretrained(base)
    first, again = (build(40, **pretrained(base, random_init=True)) for _ in range(2))
    ours, theirs = first.decoder, there.state_dict()
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in theirs.items()}
    assert type(ours) is type(there) and ours.config.pad_token_id == there.config.pad_token_id
    embedding = ours.get_input_embeddings().weight
    assert not torch.equal(embedding, there.get_input_embeddings().weight) and embedding.std() < 0.05
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert build(**pretrained(base, random_init=True)).vocab_size == ROWS
    assert "random" not in caplog.text
    ours = build(**pretrained(base, random_init=True, lora={}, cache_dir=str(tmp_path)))
    assert ours.decoder.get_input_embeddings().new_rows.num_embeddings == ROWS - KNOWN
    assert caplog.messages[0].startswith("model.lora: the weights under the adapters are random")


def test_cache_dir_is_where_the_loaders_look(base, tmp_path):
    """A hub name, offline: found where the cache's folders hold it, and nowhere else."""
    cache = tmp_path / "models--some--model"
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("abc")
    from pathlib import Path

    for file in Path(base).iterdir():
        (cache / "snapshots/abc" / file.name).symlink_to(file)
    for random_init in (False, True):
        keys = dict(family="huggingface", pretrained="some/model", random_init=random_init)
        assert build(40, **keys, cache_dir=str(tmp_path)).vocab_size == KNOWN
        with pytest.raises(InputError, match="model.pretrained: can't load 'some/model'"):
            build(40, **keys, cache_dir=str(tmp_path / "elsewhere"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(rank=0), "model.lora.rank: "),
        (dict(rnk=2), "model.lora.rnk: unknown key; did you mean 'rank'?"),
        (
            dict(rank=17),
            "model.lora.rank: 17 is higher than the rank of model.layers.0.self_attn.k_proj, a matrix of 32 x 16",
        ),
        (
            dict(targets=["q_prj"]),
            "model.lora.targets: no linear layer's name ends with 'q_prj'; did you mean 'q_proj'?",
        ),
        (dict(targets=["proj"]), "model.lora.targets: no linear layer's name ends with 'proj'; "),
        (dict(targets=["lm_head"]), "model.lora.targets: no linear layer's name ends with 'lm_head'; choose from "),
        (dict(targets=["q_proj", "norm"]), "model.lora.targets: no linear layer's name ends with 'norm'"),
        (dict(targets=[]), "model.lora.targets: "),
        (dict(dropout=1.0), "model.lora.dropout: "),
        (dict(alpha=0), "model.lora.alpha: "),
        (dict(new_ids_from=53), "model.lora.new_ids_from: 53 is not below the embedding's 53 rows"),
    ],
)
def test_what_cannot_work_is_refused_by_key(keys, message):
    with pytest.raises(InputError) as error:
        build(family="huggingface", config=FAMILIES["llama"], lora=keys)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_new_rows_are_not_left_frozen(base):
    with pytest.raises(InputError, match="model.lora.new_ids_from: 51 would freeze the new rows from 50 on"):
        build(**pretrained(base, lora={"new_ids_from": 51}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(random_init=True), "model.random_init: needs model.family: huggingface"),
        (dict(cache_dir="x"), "model.cache_dir: needs model.family: huggingface"),
        (
            dict(family="huggingface", config=FAMILIES["gpt2"], random_init=True),
            "model.random_init: needs model.pretrained",
        ),
        (dict(family="huggingface", config=FAMILIES["gpt2"], cache_dir="x"), "model.cache_dir: needs model.pretrained"),
        (dict(family="huggingface", pretrained="no/such", random_init=True), "model.pretrained: can't load 'no/such'"),
    ],
)
def test_loading_options_that_do_not_apply(keys, message):
    with pytest.raises(InputError) as error:
        build(**keys)
    assert str(error.value).startswith(message)


def test_an_update_counts_twice_unless_alpha_says_otherwise(base):
    """α = 2r where none is given; the scale is α / r, whatever the rank."""
    assert [LoraOptions(rank=rank).scale for rank in (1, 3, 16)] == [2.0, 2.0, 2.0]
    assert LoraOptions(rank=4, alpha=6).scale == 1.5
    ours = build(**pretrained(base, lora={"rank": 3}))
    scales = {scale for m in ours.modules() if hasattr(m, "lora_A") for scale in m.scaling.values()}
    assert scales == {2.0}


EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)


def mixture(model_type, **keys):
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return dict(family="huggingface", config={"model_type": model_type, **sizes, **keys})


def test_matrices_without_an_adapter_are_named_with_their_share(caplog):
    keys = mixture("mixtral", **EXPERTS)
    with caplog.at_level(logging.WARNING):
        backbone = build_backbone(ModelOptions(**keys, lora=dict(rank=2)), 50)
    weights = {name: p.numel() for name, p in build_backbone(ModelOptions(**keys), 50).decoder.named_parameters()}
    frozen = {name for name in weights if ".experts." in name or name.endswith("gate.weight")}
    share = sum(weights[name] for name in frozen) / sum(weights.values())
    told = [record.message for record in caplog.records if "no adapter for" in record.message]
    assert told == [
        "model.lora: no adapter for model.layers.*.mlp.experts.down_proj, model.layers.*.mlp.experts.gate_up_proj, "
        f"model.layers.*.mlp.gate.weight: {share:.0%} of the weights stay as they are"
    ]
    adapted = {n.rpartition(".lora_A")[0].rpartition(".")[2] for n, _ in backbone.named_parameters() if ".lora_A" in n}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_nothing_is_said_when_all_have_one_or_the_user_has_chosen(caplog):
    for lora, keys in (
        (dict(rank=2), mixture("llama")),
        (dict(rank=2, targets=["q_proj"]), mixture("mixtral", **EXPERTS)),
    ):
        with caplog.at_level(logging.WARNING):
            build_backbone(ModelOptions(**keys, lora=lora), 50)
    assert "no adapter for" not in caplog.text


def test_a_dense_layer_that_peft_takes_for_the_experts_is_refused_by_name():
    """The first block of this family has no experts, and layers of the names that they once had."""
    keys = mixture(
        "glm4_moe",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        head_dim=8,
    )
    with pytest.raises(
        InputError, match=r"peft takes the name of model.layers.0.mlp.up_proj for the fused experts of Glm4Moe"
    ):
        build_backbone(ModelOptions(**keys, lora=dict(rank=2, targets=["q_proj", "up_proj"])), 50)
    backbone = build_backbone(ModelOptions(**keys, lora=dict(rank=2)), 50)
    assert {n.split(".")[4] for n, _ in backbone.named_parameters() if ".lora_A" in n} == {"self_attn"}
