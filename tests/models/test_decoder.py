"""The native decoder as a transformers model, and against transformers' own Llama."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from jepa_scale.models.decoder import JepaDecoderConfig, JepaDecoderForCausalLM, JepaDecoderModel

SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50)
FAMILIES = {
    "plain": {},
    "tied": dict(tie_word_embeddings=True, output_bias=True),
    "wide embeddings": dict(embedding_init_std=1.0, rope_theta=500.0, intermediate_size=48),
    "polar": dict(position_embedding="pope", rope_theta=500.0),
    "normalised embeddings": dict(embedding_norm=True, embedding_init_std=0.03, drop_path=0.5),
}


def make(seed=0, **options):
    torch.manual_seed(seed)
    return JepaDecoderForCausalLM(JepaDecoderConfig(**SHAPE, **options)).eval()


def noisy(model):
    """The model with every parameter, norms and biases too, away from its initial value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def ids(*shape):
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(2))


def test_it_is_llama_where_its_options_are():
    ours = noisy(make(rope_theta=700.0))
    config = LlamaConfig(**SHAPE, intermediate_size=128, rope_theta=700.0, rms_norm_eps=1e-6, tie_word_embeddings=False)
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(ours.state_dict())  # strict: the names are Llama's
    torch.testing.assert_close(ours(ids(2, 9)).logits, llama(ids(2, 9)).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_save_and_load_keep_every_logit(name, tmp_path):
    model = noisy(make(**FAMILIES[name]))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is JepaDecoderForCausalLM
    assert torch.equal(loaded(ids(2, 9)).logits, model(ids(2, 9)).logits)
    assert loaded.config.to_json_string() == model.config.to_json_string()
    assert type(AutoConfig.from_pretrained(tmp_path)) is JepaDecoderConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is JepaDecoderModel


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["plain", "polar", "normalised embeddings"])
def test_generation_with_a_cache_is_the_argmax_of_full_forwards(name, implementation):
    model = noisy(make(**FAMILIES[name]))
    model.set_attn_implementation(implementation)
    prompt = ids(3, 4)
    made = model.generate(prompt, max_new_tokens=6, do_sample=False)
    expected = prompt
    for _ in range(6):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, expected)


@pytest.mark.parametrize("name", ["plain", "polar"])
def test_left_padding_does_not_change_what_is_generated(name):
    model = noisy(make(**FAMILIES[name]))
    prompt = ids(1, 4)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), prompt], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    made = model.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(made[:, 7:], model.generate(prompt, max_new_tokens=5, do_sample=False)[:, 4:])


@pytest.mark.parametrize("name", ["plain", "polar"])
def test_eager_and_sdpa_agree_and_eager_gives_weights(name):
    model = noisy(make(**FAMILIES[name]))
    fused = model(ids(2, 9)).logits
    model.set_attn_implementation("eager")
    out = model(ids(2, 9), output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(out.logits, fused, atol=1e-5, rtol=1e-5)
    assert len(out.attentions) == 2 and len(out.hidden_states) == 3
    torch.testing.assert_close(out.attentions[1].sum(-1), torch.ones(2, 4, 9))


@pytest.mark.parametrize("name", FAMILIES)
def test_initial_weights_are_as_configured_and_follow_the_seed(name):
    options = {**FAMILIES[name], "initializer_range": 0.05}
    model, again, other = make(**options), make(**options), make(seed=1, **options)
    std = options.get("embedding_init_std", 0.05)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(std, rel=0.1)
    assert model.model.layers[1].mlp.up_proj.weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert torch.equal(model.model.norm.weight, torch.ones(32))
    for (key, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, other.model.layers[0].mlp.up_proj.weight)


def test_tied_logits_are_scaled_and_biased():
    model = make(tie_word_embeddings=True, output_bias=True)
    table = model.model.embed_tokens.weight
    assert model.lm_head.weight is table
    torch.testing.assert_close(model.lm_head.logit_scale, torch.tensor([32**-0.5]))
    with torch.no_grad():
        model.lm_head.bias += torch.arange(50)
    x = torch.randn(3, 32)
    expected = x @ table.T * 32**-0.5 + torch.arange(50)
    torch.testing.assert_close(model.lm_head(x), expected)
    model.lm_head(x).square().sum().backward()
    assert model.lm_head.logit_scale.grad.abs() > 0


def test_the_embedding_norm_applies_to_whatever_enters_and_keeps_the_scale():
    model = make(**FAMILIES["normalised embeddings"])
    rows = model.model.embed_tokens.weight
    norm = model.model.embedding_norm
    torch.testing.assert_close(norm.weight, torch.full((32,), 0.03))
    entered = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    by_id = model(ids(2, 9)).logits
    by_row = model(inputs_embeds=7 * rows[ids(2, 9)]).logits
    torch.testing.assert_close(by_row, by_id, atol=2e-4, rtol=1e-3)
    expected = rows[ids(2, 9)] / rows[ids(2, 9)].square().mean(-1, keepdim=True).add(1e-6).sqrt() * 0.03
    torch.testing.assert_close(entered[0], expected)
    assert entered[0].std().item() == pytest.approx(rows.std().item(), rel=0.1)
    assert make().model.embedding_norm is None


def test_untied_weights_have_no_scale():
    assert "lm_head.logit_scale" not in make().state_dict() and "lm_head.bias" not in make().state_dict()


@pytest.mark.parametrize("silenced", ["self_attn.o_proj", "mlp.down_proj"])
def test_hidden_dropout_acts_on_each_branch_and_in_training_only(silenced):
    model = make(hidden_dropout=0.5)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.get_submodule(silenced).weight)
    assert torch.equal(model(ids(1, 9)).logits, model(ids(1, 9)).logits)
    model.train()
    assert not torch.equal(model(ids(1, 9)).logits, model(ids(1, 9)).logits)


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = noisy(make()).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids(2, 9), labels=ids(2, 9), use_cache=False).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_bf16_weights_keep_exact_angles():
    """Keys up to 2,000 positions away: with frequencies rounded like the weights, the logits would be off by 14 %."""
    model = noisy(make(rope_theta=100.0))
    with torch.no_grad():
        for layer in model.model.layers:  # so sharp that attention depends on the angles
            layer.self_attn.q_proj.weight *= 4
            layer.self_attn.v_proj.weight *= 4
    # the mask says that far places are one sequence, not packed ones
    far = dict(position_ids=250 * torch.arange(9)[None], attention_mask=torch.ones(1, 9), use_cache=False)
    got = model.bfloat16()(ids(1, 9), **far).logits.float()
    want = model.float()(ids(1, 9), **far).logits
    assert (got - want).abs().max() < 0.03 * want.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(hidden_size=30), "hidden_size: 30"),
        (dict(drop_path=1.0), "drop_path: 1.0"),
        (dict(num_key_value_heads=3), "num_key_value_heads: 3"),
        (dict(rope_parameters={"rope_type": "linear", "factor": 2.0}), "rope_type: 'linear'"),
    ],
)
def test_impossible_shapes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        JepaDecoderConfig(**{**SHAPE, **options})


def test_ids_or_embeddings_but_not_both():
    with pytest.raises(ValueError, match="input_ids, inputs_embeds: both or neither"):
        make().model(ids(1, 3), inputs_embeds=torch.randn(1, 3, 32))
