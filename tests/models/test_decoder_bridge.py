"""The native decoder with a gated bridge after one of its blocks."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from jepa_scale.models.backbone import Backbone
from jepa_scale.models.decoder import JepaDecoderConfig, JepaDecoderForCausalLM, JepaDecoderModel
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.packing import Segment, pack_sequence
from jepa_scale.utils.errors import InputError

SHAPE = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=50)
GATE = "model.bridge.gate"


def make(seed=0, **options):
    torch.manual_seed(seed)
    config = JepaDecoderConfig(**{**SHAPE, "bridge_after": 2, "bridge_intermediate_size": 24, **options})
    return JepaDecoderForCausalLM(config).eval()


def noisy(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def ids(*shape):
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(2))


def without_bridge(model):
    """The same weights in a decoder that has none."""
    plain = make(bridge_after=None)
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if ".bridge." not in n})
    return plain


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("stop_gradient_layer", [False, True])
def test_the_stream_goes_on_as_itself_plus_the_gated_bridge(after, stop_gradient_layer):
    """Blocks, bridge and norm one after another by hand, the blocks themselves from a decoder without a bridge."""
    model = noisy(make(bridge_after=after, bridge_grad_barrier=stop_gradient_layer))
    plain, bridge = without_bridge(model), model.model.bridge

    def join(block, args, output):
        x = torch.nn.functional.rms_norm(output, (32,), bridge.norm.weight)
        x = torch.nn.functional.gelu(x @ bridge.up.weight.T + bridge.up.bias) @ bridge.down.weight.T + bridge.down.bias
        return output + torch.sigmoid(bridge.gate) * x

    before = plain(ids(2, 9)).logits
    plain.model.layers[after - 1].register_forward_hook(join)
    torch.testing.assert_close(model(ids(2, 9)).logits, plain(ids(2, 9)).logits, atol=1e-5, rtol=1e-5)
    assert (model(ids(2, 9)).logits - before).abs().max() > 1e-2


@pytest.mark.parametrize("after", [1, 2])
def test_the_barrier_keeps_gradient_from_what_is_below_and_changes_no_value(after):
    models = [
        noisy(make(bridge_after=after, bridge_grad_barrier=stop_gradient_layer))
        for stop_gradient_layer in (False, True)
    ]
    losses = [model(ids(2, 9), labels=ids(2, 9), use_cache=False).loss for model in models]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    below = ["model.embed_tokens.", *(f"model.layers.{i}." for i in range(after))]
    free, barred = (dict(model.named_parameters()) for model in models)
    for name in free:
        assert free[name].grad is not None and free[name].grad.any(), name
        if name.startswith(tuple(below)):
            assert barred[name].grad is None, name
        else:
            torch.testing.assert_close(barred[name].grad, free[name].grad, msg=name)


@pytest.mark.parametrize("how", ["direct", "auto", "auto base", "init_weights", "meta"])
def test_the_gate_begins_as_configured(how):
    config = make(bridge_gate_init=-3.0, initializer_range=0.05).config
    if how == "direct":
        model = JepaDecoderModel(config)
    elif how == "auto":
        model = AutoModelForCausalLM.from_config(config).model
    elif how == "auto base":
        model = AutoModel.from_config(config)
    else:
        with torch.device("meta" if how == "meta" else "cpu"):
            model = JepaDecoderModel(config)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(9.0)
        for module in model.modules():
            model._init_weights(module)
    assert model.bridge.gate.tolist() == [-3.0]
    assert model.bridge.up.weight.std().item() == pytest.approx(0.05, rel=0.2)
    assert not model.bridge.down.bias.any() and torch.equal(model.bridge.norm.weight, torch.ones(32))
    assert make().model.bridge.gate.tolist() == [-2.0]


@pytest.mark.parametrize("stop_gradient_layer", [False, True])
def test_save_and_load_keep_every_logit(stop_gradient_layer, tmp_path):
    model = noisy(
        make(bridge_after=-2, bridge_grad_barrier=stop_gradient_layer, bridge_gate_init=-1.0, tie_word_embeddings=True)
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids(2, 9)).logits, model(ids(2, 9)).logits)
    assert loaded.config.to_json_string() == model.config.to_json_string() and loaded.config.bridge_after == 2
    assert torch.equal(loaded.state_dict()[GATE], model.state_dict()[GATE])


def test_a_checkpoint_without_a_bridge_gets_one_that_is_new(tmp_path):
    plain = without_bridge(noisy(make()))
    plain.save_pretrained(tmp_path)
    model, info = JepaDecoderForCausalLM.from_pretrained(tmp_path, config=make().config, output_loading_info=True)
    assert all(name.startswith("model.bridge.") for name in info["missing_keys"]) and not info["unexpected_keys"]
    assert model.model.bridge.gate.tolist() == [-2.0] and not model.model.bridge.up.bias.any()
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)


@pytest.mark.parametrize("stop_gradient_layer", [False, True])
def test_generation_with_a_cache_is_the_argmax_of_the_packed_path(stop_gradient_layer):
    model = noisy(make(bridge_grad_barrier=stop_gradient_layer))
    backbone = Backbone(model)
    prompt = ids(3, 4)
    with backbone.unpacked() as decoder, torch.no_grad():
        made = decoder.generate(prompt, max_new_tokens=6, do_sample=False)
    rows = [row.tolist() for row in prompt]
    for _ in range(6):
        stream = pack_sequence([Segment(row, "text") for row in rows])
        following = backbone.logits(backbone.hidden(stream)[stream.last]).argmax(-1).tolist()
        rows = [[*row, token] for row, token in zip(rows, following, strict=True)]
    assert made.tolist() == rows


def test_cut_at_the_bridge_the_states_are_those_before_it():
    backbone = Backbone(noisy(make()))
    plain = Backbone(without_bridge(backbone.decoder))
    stream = pack_sequence([Segment(ids(n).tolist(), "text") for n in (1, 4, 7)])
    for until in (1, 2):
        assert torch.equal(backbone.hidden(stream, until=until), plain.hidden(stream, until=until))
    for until in (3, None):
        assert not torch.allclose(backbone.hidden(stream, until=until), plain.hidden(stream, until=until), atol=1e-2)
    torch.testing.assert_close(backbone.last_hidden(stream), backbone.hidden(stream)[stream.last])


def test_the_gate_is_told_after_a_forward():
    backbone = Backbone(make())
    assert backbone.gate is None
    backbone.hidden(pack_sequence([Segment([1, 2, 3], "text")]))
    assert backbone.gate.item() == pytest.approx(0.1192029, abs=1e-6)
    assert Backbone(without_bridge(backbone.decoder)).gate is None


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


@pytest.mark.parametrize("after", [0, 3, 4, -1, -4])
def test_a_bridge_needs_blocks_on_both_sides(after):
    with pytest.raises(ValueError, match=f"^bridge_after: {after} "):
        make(bridge_after=after)
    keys = {key: value for key, value in SHAPE.items() if key != "vocab_size"}
    with pytest.raises(InputError, match=f"^model.bridge_after: {after} "):
        build_backbone(ModelOptions(**keys, bridge_after=after), 50)


@pytest.mark.parametrize(("after", "block"), [(1, 1), (2, 2), (-2, 2), (-3, 1)])
def test_blocks_are_counted_from_either_end(after, block):
    assert make(bridge_after=after).config.bridge_after == block
