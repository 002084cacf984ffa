"""Packed streams against ordinary forwards, one sequence at a time, for every family that the trainer offers."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from jepa_scale.config.loading import read_yaml
from jepa_scale.config.parsing import parse_section
from jepa_scale.models import backbone as backbone_module
from jepa_scale.models.families.windows import WINDOW
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.packing import Segment, pack_sequence
from jepa_scale.utils.errors import InputError

VOCABULARY = 50
LENGTHS = (1, 1, 2, 5, 5, 9)
LLAMA = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "native": dict(hidden_size=32, num_hidden_layers=3, num_key_value_heads=2),
    "native polar": dict(
        hidden_size=32, num_hidden_layers=3, num_key_value_heads=2, position_embedding="pope", embedding_norm=True
    ),
    "native tied": dict(hidden_size=32, num_hidden_layers=3, tie_word_embeddings=True, output_bias=True),
    "gpt2": dict(model_type="gpt2", n_embd=32, n_layer=3, n_head=4, n_positions=64, **NO_DROPOUT),
    "llama": dict(model_type="llama", **LLAMA),
    "qwen3": dict(model_type="qwen3", head_dim=16, **LLAMA),
    "olmo2": dict(model_type="olmo2", **LLAMA),
    "gemma3": dict(
        model_type="gemma3_text",
        head_dim=16,
        sliding_window=3,
        layer_types=SLIDING,
        final_logit_softcapping=5.0,
        query_pre_attn_scalar=16,
        **LLAMA,
    ),
    "mistral": dict(model_type="mistral", sliding_window=4, **LLAMA),
    "cohere": dict(model_type="cohere", **LLAMA),
    "phimoe": dict(  # its window stands in the config alone, and no attention call has it
        model_type="phimoe",
        sliding_window=4,
        num_local_experts=4,
        router_jitter_noise=0.0,
        input_jitter_noise=0.0,
        **LLAMA,
    ),
    "moshi": dict(  # has the key and ignores it
        model_type="moshi",
        sliding_window=4,
        num_codebooks=2,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
    ),
    "gemma2": dict(
        model_type="gemma2", head_dim=8, sliding_window=3, attn_logit_softcapping=2.0, query_pre_attn_scalar=8, **LLAMA
    ),
    "gemma4": dict(
        model_type="gemma4_text",
        head_dim=8,
        global_head_dim=8,
        num_global_key_value_heads=2,
        sliding_window=3,
        layer_types=SLIDING[:2] + ["full_attention"],
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=VOCABULARY,
        final_logit_softcapping=5.0,
        **LLAMA,
    ),
    "opt": dict(
        model_type="opt",
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        dropout=0.0,
    ),
    "gpt_oss": dict(
        model_type="gpt_oss", head_dim=8, sliding_window=3, num_local_experts=4, num_experts_per_tok=2, **LLAMA
    ),
    "granite": dict(model_type="granite", logits_scaling=3.0, embedding_multiplier=2.0, **LLAMA),
}
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "models"


def options(name):
    keys = FAMILIES[name]
    return ModelOptions(**keys) if name.startswith("native") else ModelOptions(family="huggingface", config=keys)


def make(name="native", seed=0):
    """A small backbone with every parameter away from its initial value."""
    torch.manual_seed(seed)
    return noisy(build_backbone(options(name), VOCABULARY))


def noisy(backbone):
    with torch.no_grad():
        for p in backbone.parameters():
            p += 0.1 * torch.randn_like(p)
    return backbone.eval()


def stream(lengths=LENGTHS, vocabulary=VOCABULARY, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return pack_sequence(
        [Segment(torch.randint(0, vocabulary, (n,), generator=generator).tolist(), "a") for n in lengths]
    )


def ordinary(backbone, packed):
    """Logits and the states after each block, sequence by sequence, laid end to end."""
    logits, states = [], []
    with backbone.unpacked() as decoder:
        decoder.set_attn_implementation("eager")  # what a family defines, and others approximate
        for ids in packed.input_ids.split(packed.table.lengths):
            out = decoder(ids[None], output_hidden_states=True, use_cache=False)
            logits.append(out.logits[0])
            states.append([h[0] for h in out.hidden_states])
    return torch.cat(logits), [torch.cat(h) for h in zip(*states, strict=True)]


def assert_packed_is_ordinary(backbone, packed):
    logits, states = ordinary(backbone, packed)
    hidden = backbone.hidden(packed)
    close = dict(atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(backbone.logits(hidden), logits, **close)
    torch.testing.assert_close(hidden, states[-1], **close)
    for k in range(1, backbone.num_layers):  # the last of the ordinary states is after the final norm
        torch.testing.assert_close(backbone.hidden(packed, until=k), states[k], **close)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_equals_one_sequence_at_a_time(name):
    assert_packed_is_ordinary(make(name), stream())


def test_the_seeds_gpt2_packed_equals_one_sequence_at_a_time():
    keys = read_yaml(CONFIGS / "gpt2_with_jepa.yaml")
    torch.manual_seed(0)
    backbone = build_backbone(parse_section(ModelOptions, keys, "model"), 200).eval()
    assert (backbone.num_layers, backbone.hidden_size, backbone.decoder.config.n_head) == (4, 768, 12)
    assert_packed_is_ordinary(backbone, stream(vocabulary=200))


def test_embeddings_of_each_layer_are_those_of_the_tokens():
    """Also where an objective replaces the embeddings; and the vocabulary must have them."""
    backbone, packed = make("gemma4"), stream()
    states = backbone.hidden(packed, torch.randn(packed.num_tokens, 32))
    assert states.shape == (packed.num_tokens, 32)
    with pytest.raises(InputError, match="embeddings of each layer for 49 token ids"):
        keys = {**FAMILIES["gemma4"], "vocab_size_per_layer_input": VOCABULARY - 1}
        build_backbone(ModelOptions(family="huggingface", config=keys), VOCABULARY)


@pytest.mark.parametrize("name", ["gemma3", "mistral"])
def test_the_sliding_window_matters_here(name):
    """Else the test above could pass with the window ignored on both sides."""
    backbone, packed = make(name), stream((9,))
    narrow = backbone.hidden(packed)
    for module in backbone.modules():
        if getattr(module, WINDOW, None):
            setattr(module, WINDOW, 100)
    wide = backbone.hidden(packed)
    assert torch.equal(narrow[:3], wide[:3]) and not torch.allclose(narrow[8], wide[8])


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_gradients_equal_ordinary_ones(name):
    backbone, packed = make(name), stream()
    direction = torch.randn(packed.num_tokens, VOCABULARY)
    grads = []
    for logits in (lambda: backbone.logits(backbone.hidden(packed)), lambda: ordinary(backbone, packed)[0]):
        backbone.zero_grad()
        (logits() * direction).sum().backward()
        grads.append({key: p.grad for key, p in backbone.named_parameters()})
    for key, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][key], atol=2e-4, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", ["native", "gpt2", "llama"])
def test_a_short_and_a_full_run_share_one_backward(name):
    """As an objective uses them: names through the lower blocks, answers through all; gradients add up."""
    backbone, names, answers = make(name), stream((2, 2, 2)), stream((4, 6), seed=5)
    short = lambda: backbone.hidden(names, until=1).square().sum()  # noqa: E731
    full = lambda: backbone.logits(backbone.hidden(answers)).square().sum()  # noqa: E731
    grads = []
    for losses in ([lambda: short() + full()], [short, full]):
        backbone.zero_grad(set_to_none=True)
        for loss in losses:
            loss().backward()
        grads.append({key: p.grad for key, p in backbone.named_parameters()})
    for key, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][key], atol=1e-4, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
    backbone.zero_grad(set_to_none=True)
    short().backward()
    above = {p for block in list(backbone.layers)[1:] for p in block.parameters()}
    assert all(p.grad is None for p in above)


@pytest.mark.parametrize("name", ["native", "gpt2", "gemma3"])
def test_the_state_after_the_last_block_is_before_the_final_norm(name):
    backbone, packed = make(name), stream()
    before = backbone.hidden(packed, until=backbone.num_layers)
    norm = backbone.norm
    torch.testing.assert_close(norm(before), backbone.hidden(packed))
    assert not torch.allclose(before, backbone.hidden(packed))


@pytest.mark.parametrize("until", [1, 2, None])
@pytest.mark.parametrize("name", ["native", "native polar", "native tied", "llama"])
def test_reading_out_last_tokens_alone_changes_nothing(name, until):
    backbone = make(name)
    stream = pack_sequence([Segment(list(range(3, 3 + n)), "text") for n in LENGTHS])
    outcomes = []
    for read in (
        lambda: backbone.hidden(stream, until=until)[stream.last],
        lambda: backbone.last_hidden(stream, until),
    ):
        states = read()
        states.square().sum().backward()
        outcomes.append((states.detach(), [p.grad for p in backbone.parameters() if p.grad is not None]))
        backbone.zero_grad(set_to_none=True)
    (expected, grads), (got, own) = outcomes
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    for a, b in zip(own, grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_the_last_block_is_spared_what_is_not_read_out():
    backbone = make("native")
    stream = pack_sequence([Segment(list(range(3, 3 + n)), "text") for n in LENGTHS])
    rows = []
    backbone.layers[-1].mlp.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    backbone.last_hidden(stream)
    assert rows == [len(LENGTHS)]


def test_a_failing_short_run_leaves_the_decoder_whole():
    backbone, packed = make(), stream()
    names = [name for name, _ in backbone.named_parameters()]
    before = backbone.hidden(packed)
    with pytest.raises(RuntimeError):
        backbone.hidden(packed, inputs_embeds=torch.randn(packed.num_tokens, 7), until=1)
    assert [name for name, _ in backbone.named_parameters()] == names
    assert torch.equal(backbone.hidden(packed), before)


@pytest.mark.parametrize("until", [0, 4, -1])
def test_until_must_name_a_block(until):
    with pytest.raises(ValueError, match="1 … 3"):
        make().hidden(stream(), until=until)


@settings(max_examples=15)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=5), st.data(), st.sampled_from(["native", "gpt2", "gemma3"]))
def test_segments_do_not_see_each_other(lengths, data, name):
    backbone, packed = make(name), stream(lengths)
    changed = data.draw(st.integers(0, len(lengths) - 1))
    inside = slice(*packed.table.cu_seqlens[changed : changed + 2].tolist())
    with torch.no_grad():
        before = backbone.hidden(packed)
        packed.input_ids[inside] = (packed.input_ids[inside] + 1) % VOCABULARY
        after = backbone.hidden(packed)
    outside = torch.ones(packed.num_tokens, dtype=torch.bool)
    outside[inside] = False
    torch.testing.assert_close(after[outside], before[outside], atol=1e-6, rtol=1e-6)
    assert (after[inside] - before[inside]).abs().max() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_no_dense_mask_is_made(name):
    """In the whole packed step no tensor has more elements than the widest activation, nor as many as T x T."""
    lengths = (2,) * 400 + (5,) * 40
    backbone, packed = make(name), stream(lengths)
    tokens, largest = packed.num_tokens, 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes() // x.element_size())
            return out

    with Largest():
        backbone.logits(backbone.hidden(packed)).sum().backward()
    assert tokens * backbone.hidden_size <= largest <= 8 * tokens * backbone.hidden_size < tokens * tokens


@pytest.mark.parametrize("name", ["native", "native polar", "llama", "qwen3"])
def test_no_gradient_is_filled_with_zeros_first(name):
    """The gradient of ``x[0]`` is a whole tensor of zeros into which a copy goes; that of ``x.squeeze(0)`` is a view."""

    class Filled(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operators.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    backbone, packed, operators = make(name), stream(), []
    with Filled():
        backbone.hidden(packed).sum().backward()
    assert "mm" in operators and "select_backward" not in operators


def test_transformers_looks_for_no_mask(monkeypatch):
    """Its search for packed sequences ends in a device-to-host copy: it must not even start."""

    def search(position_ids):
        raise AssertionError("searched")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", search)
    for name in ("native", "gpt2", "llama", "gemma3"):
        make(name).hidden(stream())


@pytest.mark.parametrize("name", FAMILIES)
def test_no_rows_still_touch_the_head(name):
    backbone = make(name)
    logits = backbone.logits(torch.zeros(0, backbone.hidden_size))
    assert logits.shape == (0, VOCABULARY)
    logits.sum().backward()
    head = list(backbone.decoder.get_output_embeddings().parameters())
    assert head and all(p.grad is not None and not p.grad.any() for p in head)


def test_embeddings_may_be_replaced():
    backbone, packed = make("gemma3"), stream()  # Gemma scales its embeddings inside the module
    embeds = backbone.embed(packed.input_ids)
    assert torch.equal(backbone.hidden(packed, inputs_embeds=embeds), backbone.hidden(packed))
    leaf = embeds.detach().requires_grad_()
    backbone.hidden(packed, inputs_embeds=leaf).sum().backward()
    assert leaf.grad.abs().sum() > 0


def test_replaced_embeddings_are_normalised_as_others():
    backbone, packed = make("native polar"), stream()
    embeds = backbone.embed(packed.input_ids)
    assert torch.equal(backbone.hidden(packed, inputs_embeds=embeds), backbone.hidden(packed))
    torch.testing.assert_close(
        backbone.hidden(packed, inputs_embeds=3 * embeds), backbone.hidden(packed), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("piece", [7, 50, 1000])
@pytest.mark.parametrize("name", ["native", "native polar", "llama"])
def test_unembedding_is_a_product_with_the_embeddings_as_they_enter(name, piece, monkeypatch):
    monkeypatch.setattr(backbone_module, "_PIECE", piece)
    backbone, states = make(name), torch.randn(4, 32)
    table = backbone.decoder.get_input_embeddings().weight
    torch.testing.assert_close(backbone.unembed(states, normalized=False), states @ table.T)
    if name == "native polar":
        gain = backbone.decoder.model.embedding_norm.weight
        table = table / table.square().mean(-1, keepdim=True).add(1e-6).sqrt() * gain
    got = backbone.unembed(states)
    torch.testing.assert_close(got, states @ table.T)
    assert backbone.unembed(states[:0]).shape == (0, VOCABULARY)
    got.square().sum().backward()
    assert backbone.decoder.get_input_embeddings().weight.grad.abs().sum(-1).all()


def test_positions_are_the_streams_own():
    backbone = make("gpt2")
    shifted = pack_sequence([Segment([1, 2, 3], "a", position_ids=[4, 7, 9])])
    with backbone.unpacked() as decoder:
        out = decoder(
            torch.tensor([[1, 2, 3]]), position_ids=torch.tensor([[4, 7, 9]]), attention_mask=torch.ones(1, 3)
        )
    torch.testing.assert_close(backbone.logits(backbone.hidden(shifted)), out.logits[0], atol=1e-5, rtol=1e-5)


def test_generation_and_training_take_turns():
    backbone, packed = make("llama"), stream()
    before = backbone.hidden(packed)
    with backbone.unpacked() as decoder:
        made = decoder.generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False)
    assert made.shape == (1, 5)
    assert torch.equal(backbone.hidden(packed), before)
    with pytest.raises(ValueError, match="packed=SegmentTable"):
        backbone.decoder(torch.tensor([[1, 2]]))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_builds_and_explains_its_keys(path):
    keys = read_yaml(path)
    with torch.device("meta"):
        backbone = build_backbone(parse_section(ModelOptions, keys, "model"), 1000, pad_vocab_to=64)
    assert backbone.vocab_size == (keys.get("vocab_size") or 1024)
    size = keys.get("config", keys)
    assert backbone.hidden_size == size.get("hidden_size", size.get("n_embd"))
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if ":" in line.partition("#")[0]]
    assert all("#" in line for line in lines if not line.rstrip().endswith("config:"))


def test_segments_end_where_rotary_frequencies_change():
    """Beyond it the family takes other frequencies for the whole packed sequence, short segments included."""
    rope = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4)
    rope |= dict(original_max_position_embeddings=9)
    keys = dict(model_type="phi3", max_position_embeddings=36, rope_parameters=rope, **LLAMA)
    keys |= dict(original_max_position_embeddings=9)
    torch.manual_seed(0)
    backbone = noisy(build_backbone(ModelOptions(family="huggingface", config=keys), VOCABULARY))
    assert backbone.position_limit == 9
    assert_packed_is_ordinary(backbone, stream((9, 4, 2)))
    with pytest.raises(ValueError, match="10 tokens, and the model takes 9 .where the frequencies of longrope change"):
        backbone.hidden(stream((10, 4)))
    assert make("gpt2").position_limit == 64 and make("llama").position_limit == 2048
