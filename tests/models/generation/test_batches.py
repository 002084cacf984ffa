"""Greedy generation in batches against the plainest loop: one prompt, no cache, no padding, one token at a time."""

import logging
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.models.generation.batches import Prompts, Round, answer, greedy, rounds
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.objectives.lm import LanguageModeling
from jepa_scale.objectives.lm_options import LmOptions
from jepa_scale.packing import Segment, pack_sequence

VOCABULARY = 40
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.4)
FAMILIES = {
    "llama": dict(model_type="llama", num_key_value_heads=2, **SMALL),
    "qwen3": dict(model_type="qwen3", num_key_value_heads=2, head_dim=8, **SMALL),
    "gemma3": dict(
        model_type="gemma3_text",
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=False,  # tied and random it repeats its last token for ever
        **SMALL,
    ),
    "olmo2": dict(model_type="olmo2", num_key_value_heads=2, **SMALL),
    "gpt2": dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=48, initializer_range=0.4),
    "native": None,
    "bridged": None,
}
LENGTHS = (1, 2, 3, 5, 8, 13, 5, 2)
NEW = 12
ALONE = ParallelContext(0, 1, 0, torch.device("cpu"), "python")


def backbone_of(family, seed=0):
    torch.manual_seed(seed)
    if FAMILIES[family] is not None:
        options = ModelOptions(family="huggingface", config=FAMILIES[family])
    else:
        bridge = dict(bridge_after=1, bridge_gate_init=1.0) if family == "bridged" else {}
        options = ModelOptions(**SMALL, **bridge)
    return build_backbone(options, VOCABULARY).eval()


def prompts_of(lengths=LENGTHS):
    rng = np.random.default_rng(1)
    return [rng.integers(1, VOCABULARY, n) for n in lengths]


@torch.no_grad()
def spoken(backbone, prompt, stop, new_tokens):
    """Over the packed forward that training uses: another attention, no cache."""
    tokens = [int(t) for t in prompt]
    for _ in range(new_tokens):
        hidden = backbone.hidden(pack_sequence([Segment(tokens, "x")]))
        tokens.append(int(backbone.logits(hidden)[-1].argmax()))
        if tokens[-1] in stop:
            return tokens[len(prompt) : -1], True
    return tokens[len(prompt) :], False


def some_stop(backbone):
    """A token that ends some of the answers early and leaves others whole."""
    found = [spoken(backbone, p, (), NEW)[0] for p in prompts_of()]
    for token in range(VOCABULARY):
        places = [f.index(token) if token in f else NEW for f in found]
        if len(set(places)) > 2 and NEW in places:
            return token
    raise AssertionError("no such token; take another seed")


def generated(backbone, prompts, stop, new_tokens=NEW):
    objective = LanguageModeling(LmOptions(), backbone, None)
    tokens, lengths, stopped = objective.generate(backbone, Prompts.of(prompts), stop, new_tokens)
    rows = zip(tokens.tolist(), lengths.tolist(), stopped.tolist(), strict=True)
    return [(row[:length], over) for row, length, over in rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_says_what_each_prompt_alone_would_say(family):
    backbone = backbone_of(family)
    stop = (some_stop(backbone),)
    expected = [spoken(backbone, p, stop, NEW) for p in prompts_of()]
    assert len({len(tokens) for tokens, _ in expected}) > 2 and len({over for _, over in expected}) == 2
    assert len({tuple(tokens) for tokens, _ in expected}) > 4
    assert generated(backbone, prompts_of(), stop) == expected
    before = backbone.hidden(pack_sequence([Segment([3, 4], "x"), Segment([5], "x")]))  # packed again afterwards
    assert before.shape[0] == 3


def test_the_first_of_several_stops_counts_and_the_decoders_own_do_too():
    backbone = backbone_of("llama")
    mine = some_stop(backbone)
    free = [spoken(backbone, p, (), NEW)[0] for p in prompts_of()]
    own = next(t for f in free for t in f if t != mine)
    for ids in (own, [own]):
        backbone.decoder.generation_config.eos_token_id = ids
        assert generated(backbone, prompts_of(), (mine,)) == [
            spoken(backbone, p, (mine, own), NEW) for p in prompts_of()
        ]


def test_without_any_stop_all_of_the_room_is_used():
    backbone = backbone_of("native")
    assert generated(backbone, prompts_of(), (), 3) == [spoken(backbone, p, (), 3) for p in prompts_of()]


def test_what_a_checkpoint_recommends_changes_nothing(monkeypatch):
    """Sampling, penalties, forced tokens: none of it is greedy. And nobody is warned of what he can't change."""
    backbone = backbone_of("llama")
    expected = generated(backbone, prompts_of(), (7,))
    recommended = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=3.0, no_repeat_ngram_size=1, max_length=4
    )
    backbone.decoder.generation_config = recommended
    told = []
    logger, handler = logging.getLogger("transformers"), logging.Handler(logging.WARNING)
    handler.emit = told.append
    level = logger.level
    logger.addHandler(handler)
    monkeypatch.setattr(logger, "filters", [])  # a run in this process may have made it quiet
    try:
        logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert generated(backbone, prompts_of(), (7,)) == expected
        logger.warning("heard")
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
    assert [record.getMessage() for record in told] == ["heard"]
    assert backbone.decoder.generation_config is recommended


def test_compiled_blocks_are_not_compiled_for_every_length():
    backbone, compiled = backbone_of("native"), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    for block in backbone.layers:
        block.compile(dynamic=True, backend=backend)
    backbone.hidden(pack_sequence([Segment([3, 4], "x")]))
    assert compiled, "the blocks are to be compiled in training"
    compiled.clear()
    generated(backbone, prompts_of(), ())
    assert not compiled


# ---------------------------------------------------------------------------------------------- rounds


@given(
    st.lists(st.integers(1, 30), max_size=40),
    st.integers(1, 12),
    st.none() | st.integers(1, 40),
    st.integers(1, 9),
)
def test_rounds_hold_every_prompt_once_and_never_pass_the_last_position(lengths, new_tokens, positions, size):
    found = rounds(lengths, new_tokens, positions, size)
    room = [new_tokens if positions is None else min(new_tokens, positions - n) for n in lengths]
    assert sorted(n for r in found for n in r.prompts) == [n for n in range(len(lengths)) if room[n] > 0]
    for part in found:
        assert 1 <= len(part.prompts) <= size
        assert {room[n] for n in part.prompts} == {part.room}  # as much as alone, whoever is beside it
    walked = [lengths[n] for r in found for n in r.prompts]
    assert walked == sorted(walked, reverse=True)
    full = sum(1 for r in found if r.room == new_tokens)
    assert full <= -(-len(lengths) // size)  # no more rounds than needed


def test_at_the_last_position_a_prompt_still_gets_what_it_would_alone():
    backbone = backbone_of("gpt2")
    prompts = prompts_of((44, 3, 46, 48, 44, 20))  # of 48 positions
    plan = rounds([len(p) for p in prompts], NEW, 48, 4)
    objective = LanguageModeling(LmOptions(), backbone, None)

    def call(task, batch, *args):
        return getattr(objective, task)(backbone, batch, *args)

    said = {a.number: a.tokens for part in plan for a in answer(call, prompts, part, (), ALONE)}
    rooms = {0: 4, 1: NEW, 2: 2, 4: 4, 5: NEW}
    assert said == {n: spoken(backbone, prompts[n], (), room)[0] for n, room in rooms.items()}


def test_a_rank_without_a_prompt_takes_part_and_answers_nothing():
    calls = []

    def call(task, batch, stop, room):
        calls.append((task, batch.ids.tolist(), stop, room))
        n = len(batch.ids)
        return torch.ones(n, 2, dtype=torch.int64), torch.full((n,), 1), torch.ones(n, dtype=torch.bool)

    prompts = prompts_of((3, 2, 2))
    part = Round([2, 0], 5)
    got = [answer(call, prompts, part, [9], ParallelContext(r, 3, r, torch.device("cpu"), "python")) for r in range(3)]
    assert [[a.number for a in g] for g in got] == [[2], [0], []]
    assert all(a.tokens == [1] and a.stopped for g in got for a in g)
    assert [c[1] for c in calls] == [[prompts[2].tolist()], [prompts[0].tolist()], [prompts[2].tolist()]]
    assert {(c[0], c[2], c[3]) for c in calls} == {("generate", (9,), 5)}


def test_prompts_are_filled_up_on_the_left():
    batch = Prompts.of([np.array([5, 6, 7]), np.array([8], dtype=np.uint16)])
    assert batch.ids.tolist() == [[5, 6, 7], [0, 0, 8]] and batch.mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.ids.dtype == batch.mask.dtype == torch.int64


def test_the_configuration_is_put_back_after_an_error():
    backbone = backbone_of("gpt2")
    own = backbone.decoder.generation_config
    with backbone.unpacked() as decoder, pytest.raises(IndexError):  # beyond the last position
        greedy(decoder, Prompts.of(prompts_of((48,))), (), 3)
    assert backbone.decoder.generation_config is own
