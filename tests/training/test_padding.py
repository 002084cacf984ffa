"""A run in padded rows says what they cost, and refuses before it begins what it cannot do."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import yaml

import jepa_scale
from jepa_scale.config.loading import load_config
from jepa_scale.distributed import comm
from jepa_scale.experiment import validate
from jepa_scale.training.build import build
from jepa_scale.utils.errors import InputError
from tests.text_runs import WORDS, config_file, sentence

MAMBA2 = dict(
    model_type="mamba2", hidden_size=16, num_hidden_layers=2, num_heads=4, head_dim=8, state_size=4, n_groups=1, chunk_size=4
)  # fmt: skip


@pytest.fixture
def ranks():
    yield comm.setup()
    comm.teardown()


@pytest.fixture
def folder(tmp_path):
    """A corpus of sentences of 4 to 13 words."""
    rng = np.random.default_rng(0)
    (tmp_path / "corpus.txt").write_text("".join(sentence(list(WORDS)[i % 4], rng) + "\n" for i in range(60)))
    return tmp_path


def built(folder, ranks, **changes):
    model = {"family": "huggingface", "packing": "padded", "config": MAMBA2}
    sections = {"model": model, "train": {"steps": 2, "batch_size": 8, "accumulation": 2}, **changes}
    return build(validate(load_config(config_file(folder, **sections))), ranks)


def test_the_share_of_padding_is_that_of_the_first_micro_batches(ranks, folder, caplog):
    with caplog.at_level(logging.INFO):
        run = built(folder, ranks)
    (message,) = [r.getMessage() for r in caplog.records if "padding" in r.getMessage()]
    tokens = rows = 0
    for step in run.batches(0, 4):
        for batch in step:
            lengths = batch.sequences["main"].table.lengths
            tokens, rows = tokens + sum(lengths), rows + len(lengths) * max(lengths)
    assert tokens < rows
    assert f"first 8 micro-batches of rank 0, {100 * (rows - tokens) / rows:.3g}% are padding" in message


def test_near_sizes_share_a_micro_batch(ranks, folder):
    padded = built(folder, ranks)
    found = [[max(b.sequences["main"].table.lengths) for b in step] for step in padded.batches(0, 12)]
    assert all(first <= second for first, second in found) and any(first < second for first, second in found)
    tokens = built(folder, ranks, train={"steps": 2, "batch_size": 0, "batch_tokens": 128, "micro_tokens": 64})
    for step in tokens.batches(0, 12):
        for batch in step:
            lengths = batch.sequences["main"].table.lengths
            assert len(lengths) * max(lengths) <= 64


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"family": "huggingface", "config": MAMBA2}, "Mamba2.* on packed segments .*; set model.packing: padded"),
        ({"packing": "padded"}, "model.packing: needs model.family: huggingface; set that or remove the key"),
    ],
)
def test_what_cannot_be_done_is_refused(ranks, folder, model, message):
    with pytest.raises(InputError, match=message):
        built(folder, ranks, model=model)


def test_blocks_shaped_like_the_decoders_need_attention_heads(ranks, folder):
    with pytest.raises(InputError, match="objective: its own blocks .* Mamba2ForCausalLM has no attention heads"):
        built(folder, ranks, objective={"name": "mtp"})


def test_an_objective_with_positions_of_its_own_is_refused_where_there_are_none(ranks, tmp_path):
    values = {
        "engine": {"name": "fsdp", "threads": 1},
        "model": {"family": "huggingface", "packing": "padded", "config": MAMBA2},
        "data": {"source": "reversal", "entities_a": 50, "comb": 5, "relations": 2},
        "objective": {"name": "two_view", "reverse_positions": "continued"},
        "train": {"steps": 2, "batch_size": 8},
    }
    (tmp_path / "facts.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match="model: Mamba2ForCausalLM takes no positions"):
        build(validate(load_config(tmp_path / "facts.yaml")), ranks)


def test_a_padded_run_is_loaded_encodes_and_generates(folder):
    """Rows of texts together are those of transformers for each alone; what needs a cache that goes back is refused."""
    model = {"family": "huggingface", "packing": "padded", "config": MAMBA2}
    config = config_file(folder, model=model, train={"steps": 2, "batch_size": 8})
    jepa_scale.train(str(config))
    run = jepa_scale.load(folder / "run")
    texts = ["the wave of a ship", "a cow", "the judge and the law near a trial of the oath was in the jury"]
    with torch.no_grad():
        decoder = run.module.backbone.decoder
        states = [
            decoder.base_model(torch.from_numpy(t)[None], use_cache=False).last_hidden_state[0]
            for t in run.tokenize(texts).tokens
        ]
    expected = np.stack([s.mean(dim=0).numpy() for s in states])
    np.testing.assert_allclose(run.encode(texts), expected, atol=1e-5)
    np.testing.assert_allclose(run.encode(texts, batch_tokens=8), expected, atol=1e-5)
    together = run.generate(texts, max_new_tokens=4)
    assert together == [run.generate([text], max_new_tokens=4)[0] for text in texts]
    for keys in ({"temperature": 1.0}, {"draft": 2}):
        with pytest.raises(InputError, match=f"^{next(iter(keys))}: needs a cache that can go back"):
            run.generate(texts, **keys)
