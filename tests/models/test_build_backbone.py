"""Options to backbone: vocabulary, pretrained folders, and what is refused with which message."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from jepa_scale.config.parsing import parse_section
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.packing import Segment, pack_sequence
from jepa_scale.utils.errors import InputError

NATIVE = dict(hidden_size=32, num_hidden_layers=2)
LLAMA = dict(model_type="llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def build(needed=50, multiple=1, **keys):
    return build_backbone(parse_section(ModelOptions, keys, "model"), needed, multiple)


def huggingface(**changes):
    return dict(family="huggingface", config={**LLAMA, **changes})


@pytest.mark.parametrize("keys", [NATIVE, huggingface()], ids=["native", "llama"])
@pytest.mark.parametrize(
    ("asked", "needed", "multiple", "rows"),
    [(None, 50, 1, 50), (None, 50, 64, 64), (60, 50, 1, 60), (60, 50, 16, 64), (50, 50, 1, 50)],
)
def test_rows_of_the_embedding(keys, asked, needed, multiple, rows):
    backbone = build(needed, multiple, vocab_size=asked, **keys)
    assert backbone.vocab_size == backbone.decoder.get_input_embeddings().num_embeddings == rows
    assert backbone.logits(torch.zeros(1, 32)).shape == (1, rows)


@pytest.mark.parametrize("keys", [NATIVE, huggingface()], ids=["native", "llama"])
def test_weights_follow_the_seed(keys):
    def weights(seed):
        torch.manual_seed(seed)
        return build(**keys).state_dict()

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("keys", [NATIVE, huggingface()], ids=["native", "llama"])
def test_a_saved_folder_is_a_pretrained_model(keys, tmp_path):
    saved = build(**keys)
    saved.decoder.save_pretrained(tmp_path)
    loaded = build(family="huggingface", pretrained=str(tmp_path))
    stream = pack_sequence([Segment([1, 2, 3], "a"), Segment([4, 5], "a")])
    torch.testing.assert_close(loaded.hidden(stream), saved.hidden(stream))
    assert next(loaded.parameters()).dtype == torch.float32
    assert (
        "jepa_packed" not in (tmp_path / "config.json").read_text()
    )  # the folder loads without this package's attention
    AutoModelForCausalLM.from_pretrained(tmp_path)(torch.tensor([[1, 2]]))


def test_a_pretrained_vocabulary_grows_but_never_shrinks(tmp_path):
    saved = build(**huggingface())
    saved.decoder.save_pretrained(tmp_path)
    keys = dict(family="huggingface", pretrained=str(tmp_path))
    assert build(30, **keys).vocab_size == 50
    grown = build(53, 8, **keys)
    assert grown.vocab_size == 56
    old = saved.decoder.get_input_embeddings().weight
    assert torch.equal(grown.decoder.get_input_embeddings().weight[:50], old)
    with pytest.raises(InputError, match="model.vocab_size: 40 is smaller than the checkpoint's 50"):
        build(30, vocab_size=40, **keys)


def test_no_special_token_is_assumed():
    """Gemma's default padding id would freeze token 0; ids of another vocabulary would stop generation at random."""
    keys = {**LLAMA, "model_type": "gemma3_text", "head_dim": 8}
    backbone = build(family="huggingface", config=keys)
    config = backbone.decoder.config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (None, None, None)
    assert backbone.decoder.get_input_embeddings().padding_idx is None
    assert build(**huggingface(eos_token_id=7)).decoder.config.eos_token_id == 7


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(vocab_size=40), "model.vocab_size: 40 is smaller than the data's 50"),
        (dict(hidden_sizes=40), "model.hidden_sizes: unknown key; did you mean 'hidden_size'"),
        (dict(hidden_size=30), "model.hidden_size: 30 must be an even multiple of num_attention_heads"),
        (dict(num_key_value_heads=3), "model.num_key_value_heads: 3 must divide"),
        (dict(pretrained="gpt2"), "model.pretrained: needs model.family: huggingface"),
        (dict(config=LLAMA), "model.config: needs model.family: huggingface"),
        (dict(trust_remote_code=True), "model.trust_remote_code: needs model.family: huggingface"),
        (dict(family="huggingface"), "needs either model.config or model.pretrained"),
        (dict(pretrained="gpt2", **huggingface()), "needs either model.config or model.pretrained"),
        (dict(hidden_size=64, **huggingface()), "model.hidden_size: belongs to model.family: native"),
        (dict(trust_remote_code=True, **huggingface()), "model.trust_remote_code: needs model.pretrained"),
        (dict(family="huggingface", config=dict(hidden_size=32)), "model.config.model_type: required key is missing"),
        (huggingface(model_type="lama"), "model.config.model_type: transformers has no 'lama'; did you mean 'llama'"),
        (huggingface(model_type="t5"), "model.config"),
        (huggingface(vocab_size=40), "model.config.vocab_size: is not allowed here; set model.vocab_size instead"),
        (huggingface(hiden_size=40), "model.config.hiden_size: unknown key of LlamaConfig; did you mean 'hidden_size'"),
        (huggingface(num_attention_heads=5), "model.config: "),
        (huggingface(hidden_size="wide"), "model.config: "),
        (dict(family="huggingface", pretrained="no/such/folder"), "model.pretrained: can't load 'no/such/folder'"),
        (dict(family="huggingface", config=dict(model_type="llama4_text", num_hidden_layers=4)), "'chunked_attention'"),
        (
            dict(family="huggingface", config=dict(model_type="gemma3")),
            "is not a single stack of blocks with a final norm",
        ),
        (dict(family="huggingface", config=dict(model_type="bloom", n_layer=1)), "model: BloomForCausalLM"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_options_are_one_clear_line(keys, message):
    with pytest.raises(InputError) as error, torch.device("meta"):
        build(**keys)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("model")
