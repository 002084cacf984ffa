"""The views of a conversation, family by family, against what the template itself renders."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from jepa_scale.data.examples import Conversation, Document, Turn
from jepa_scale.data.prepare.base import Record
from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.objectives.two_view import views as two_view_views
from jepa_scale.objectives.two_view.config import TwoViewOptions
from jepa_scale.objectives.two_view.views import FILLER, ChatViews, Frame, last_exchange
from jepa_scale.packing import IGNORE
from jepa_scale.utils.errors import InputError
from tests.data.prepare.encoders.chat_tokenizers import KINDS, encoder, talk
from tests.data.prepare.encoders.chat_tokenizers import TEMPLATES as TEXTS
from tests.objectives.chats import TEMPLATES, chat_data, conversations, tokenizer

ROWS = conversations(4)
DRAW = SampleRNG(0, 0, 0, 0)


@pytest.fixture(scope="module", params=[*TEMPLATES, "gpt2"])
def family(request, tmp_path_factory):
    data = chat_data(tmp_path_factory.mktemp(request.param), request.param, ROWS)
    return request.param, data, AutoTokenizer.from_pretrained(data.tokenizer)


def maker(data, tokenizer, **options):
    frame = Frame.of(tokenizer, data.plain)
    closing = frozenset(data.special[name] for name in ("end", "eos") if name in data.special)
    return ChatViews(TwoViewOptions(**options), frame, closing, data.special.get("pad"))


def by_role(views):
    return {segment.role: segment for segment in views.segments}


def test_views_are_what_the_template_renders(family):
    """The question alone, and the answer as the template begins it, up to where each is read."""
    name, data, tok = family
    views = maker(data, tok, predictor_tokens=2)
    for example in data.train:
        asked, answered = example.messages[1]["content"], example.messages[2]["content"]
        made = by_role(views(example, DRAW))
        source, target = list(made["source"].tokens), list(made["target"].tokens)
        assert source[-2:] == [FILLER, FILLER] and made["source"].positions["predictor"] == [
            len(source) - 2,
            len(source) - 1,
        ]
        assert made["source"].positions["source"] == [len(source) - 1]
        assert made["target"].positions["target"] == [len(target) - 1]
        text = tok.decode(source[:-2]), tok.decode(target)
        assert text[0].endswith(asked) and text[1].endswith(answered)
        assert "Convert words." not in text[0] + text[1]
        if name == "gpt2":
            assert text == (asked, answered)
            continue
        whole = tok.apply_chat_template(
            [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
        )
        opening = text[1].removesuffix(answered)
        assert whole.startswith(text[0])
        assert opening and whole.endswith(opening.removeprefix(tok.bos_token if name in ("llama", "gemma") else ""))


@pytest.mark.parametrize("kind", ["byte-level", "a space before each part", "word pieces"])
@pytest.mark.parametrize("template", ["space", "lines", "inst"])
def test_a_question_alone_has_the_tokens_of_its_rendering(kind, template):
    """Also where its tokens in the conversation reach over its border, or it stands there beside other text."""
    made = encoder(tokenizer := KINDS[kind](), TEXTS[template])
    frame = Frame.of(tokenizer, False)
    for messages in (talk("hello", "it"), talk("what", "it", "  is it\n", "so")):
        sample = made(Record("x", {"messages": messages}))[0].members
        turns = tuple(Turn(m["role"], *t) for m, t in zip(messages, sample["json"]["turns"], strict=True))
        example = Conversation(sample["npy"], turns, messages)
        asked = messages[-2]
        text = tokenizer.apply_chat_template([asked], tokenize=False)
        before, content, after = frame.question(example, turns[-2])
        assert [*before, *content, *after] == tokenizer(text, add_special_tokens=False).input_ids
        assert asked["content"].split()[0] in tokenizer.decode(content)


def test_read_at_the_token_that_closes(family):
    name, data, tok = family
    views = maker(data, tok, readout="closing", predictor_tokens=1)
    closes = {
        "llama": "<|eot|>",
        "qwen": "<|im_end|>",
        "gemma": "<|eot|>",
        "olmo": "<|endoftext|>",
        "gpt2": "<|endoftext|>",
    }
    for example in data.train:
        made = by_role(views(example, DRAW))
        assert tok.decode(made["target"].tokens[-1]) == closes[name]
        if name in ("llama", "qwen", "gemma"):
            assert list(made["source"].tokens)[-2] == FILLER and tok.decode(made["source"].tokens[-1]) == closes[name]


def test_last_token_counts_from_the_end_of_the_rendering(family):
    name, data, tok = family
    if name == "gpt2":
        pytest.skip("without a template there is nothing after what is said")
    for last in (-1, -2, -3):
        views = maker(data, tok, last_token=last, predictor_tokens=0)
        for example in data.train:
            asked = tok.apply_chat_template([example.messages[1]], tokenize=False)
            ids = tok(asked, add_special_tokens=False)["input_ids"]
            made = by_role(views(example, DRAW))
            assert list(made["source"].tokens) == ids[: len(ids) + last + 1]
            assert made["source"].positions["source"] == [len(ids) + last]


def test_front_same_and_swapped_predictors(family):
    _, data, tok = family
    example = data.train[0]
    front = views = maker(data, tok, predictor_tokens=3, predictor_place="front")(example, DRAW)
    source = by_role(front)["source"]
    start = source.positions["predictor"][0]
    assert source.positions["predictor"] == [start, start + 1, start + 2] and views.rows["predictor"].tolist() == [
        0,
        1,
        2,
    ]
    assert list(source.tokens[start : start + 3]) == [FILLER] * 3 and source.positions["source"] == [
        len(source.tokens) - 1
    ]
    assert maker(data, tok, predictor_tokens=3, same_predictor=True)(example, DRAW).rows["predictor"].tolist() == [
        0,
        0,
        0,
    ]
    swapped = by_role(maker(data, tok, swap_views=True, predictor_tokens=1)(example, DRAW))
    assert tok.decode(list(swapped["source"].tokens)[:-1]).endswith(example.messages[2]["content"])
    assert tok.decode(swapped["target"].tokens).endswith(example.messages[1]["content"])


def test_the_shared_prefix_adds_predictor_tokens_alone(family):
    _, data, tok = family
    for k in (0, 1, 3):
        made = maker(data, tok, shared_prefix=True, predictor_tokens=k)(data.train[0], DRAW)
        roles = [segment.role for segment in made.segments]
        question = data.train[0].turns[1]
        if k == 0:
            assert roles == ["text", "target"] and made.segments[0].positions["source"] == [question.stop - 1]
        else:
            branch = made.segments[1]
            assert roles == ["text", "source", "target"] and branch.prefix == ("text", question.stop)
            assert list(branch.tokens) == [FILLER] * k and branch.positions["source"] == [k - 1]


def test_the_label_mask_is_the_assistants_and_the_legacy_one_is_not(family):
    _, data, tok = family
    example = data.train[0]
    answer = example.turns[-1]
    labels = np.asarray(by_role(maker(data, tok)(example, DRAW))["text"].labels)
    assert set(np.flatnonzero(labels != IGNORE)) == set(range(answer.start - 1, answer.stop - 1))
    legacy = np.asarray(by_role(maker(data, tok, legacy_loss=True)(example, DRAW))["text"].labels)
    following = example.tokens[1:]
    assert np.array_equal(legacy != IGNORE, following != data.special["pad"])


def test_equal_answers_have_one_key_in_every_process(family):
    _, data, tok = family
    views = maker(data, tok)
    keys = [int(views(example, DRAW).rows["key"][0]) for example in data.train]
    assert len(set(keys)) == len({example.messages[2]["content"] for example in data.train})
    assert keys == [int(views(example, SampleRNG(1, 2, 3, 4)).rows["key"][0]) for example in data.train]


def test_a_key_does_not_depend_on_the_process():
    """Python hashes strings with a seed of each process's own; ranks compare keys with each other's."""
    assert two_view_views._key(np.array([3, 1, 4])) == 4285124526802128420


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from(["user", "assistant", "system", "tool"]), st.integers(0, 5)), min_size=1, max_size=6
    ),
    st.integers(0, 10),
    st.sampled_from(["content", "closing", "mean"]),
    st.sampled_from(["back", "front"]),
    st.booleans(),
)
def test_any_conversation_has_a_pair_or_none(said, k, readout, place, swap):
    """Places lie within their segments, predictors are where their tokens are, and rows fit the positions."""
    turns, tokens = [], [1]
    for role, length in said:
        tokens += [2]
        turns.append(Turn(role, len(tokens), len(tokens) + length))
        tokens += [10] * length
    tokens += [3]
    example = Conversation(np.array(tokens), tuple(turns), [{"role": r, "content": "x"} for r, _ in said])
    frame = Frame((1, 4), (5, 6), (1, 7), (5,))
    options = TwoViewOptions(predictor_tokens=k, readout=readout, predictor_place=place, swap_views=swap)
    views = ChatViews(options, frame, frozenset({5}), None)
    made = views(example, DRAW)
    assert sum(len(segment.tokens) for segment in made.segments) <= views.tokens(np.array([len(tokens)]))[0]
    exchange = last_exchange(example)
    assert made.counts["pairs"] == len(made.rows["key"]) == (exchange is not None)
    if exchange is None:
        return
    segments = by_role(made)
    for view in ("source", "target"):
        positions = segments[view].positions[view]
        assert len(positions) == made.rows[f"{view}_length"][0] >= 1
        assert max(positions) == len(segments[view].tokens) - 1 and min(positions) >= 0
    predictors = segments["source"].positions["predictor"]
    assert [segments["source"].tokens[p] for p in predictors] == [FILLER] * k and len(made.rows["predictor"]) == k


def test_documents_among_conversations_have_no_views(family):
    _, data, tok = family
    made = maker(data, tok)(Document(np.arange(5)), DRAW)
    assert [segment.role for segment in made.segments] == ["text"] and made.counts["pairs"] == 0
    assert made.rows["key"].shape == (0,)


def test_a_template_that_hides_what_is_said_is_refused(tmp_path):
    from jepa_scale.data.prepare.encoders.tokenizer import load_tokenizer

    hides = tokenizer(tmp_path, "x", "{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(InputError, match="data.tokenizer: its chat template does not show"):
        Frame.of(load_tokenizer(str(hides)), False)
    refuses = tokenizer(tmp_path, "y", "{{ raise_exception('never') }}")
    with pytest.raises(InputError, match="refuses a question alone: never"):
        Frame.of(load_tokenizer(str(refuses)), False)
