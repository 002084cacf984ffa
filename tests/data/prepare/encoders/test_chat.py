import pickle
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from jepa_scale.data.prepare.base import BadRecord
from jepa_scale.data.prepare.encoders.chat import turn_spans
from jepa_scale.data.prepare.encoders.chat_tokens import TurnTokenizer
from jepa_scale.data.prepare.encoders.messages import normalise
from jepa_scale.data.prepare.encoders.template import special_pattern
from jepa_scale.data.prepare.encoders.tokenizer import train_bpe

U, A, S, T = "user", "assistant", "system", "tool"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|bos|>", "<|sh|>", "<|eh|>", "<|eot|>", "</s>", "[INST]", "[/INST]"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|bos|>{% for m in messages %}<|sh|>{{ m.role }}<|eh|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|sh|>assistant<|eh|>\n\n{% endif %}"
)
INST = (  # no headers, roles must alternate, the answer follows a space, EOS closes it
    "<|bos|>{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
MERGED = (  # the system's words stand in the first user turn, the assistant is called model
    "<|bos|>{% if messages[0].role == 'system' %}{% set sys = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "<|sh|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ sys if loop.first else '' }}{{ m.content | trim }}<|eot|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|sh|>model\n{% endif %}"
)
THINKING = (  # earlier turns lose their thinking, the last one gets an empty one when it has none
    "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' %}"
    "{% if not loop.last %}{% set c = c.split('</think>')[-1] | trim %}"
    "{% elif '</think>' not in c %}{% set c = '<think>\n\n</think>\n\n' + c %}{% endif %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ c }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_TEXT = (  # no special token at all
    "{% for m in messages %}{{ '### Answer: ' if m.role == 'assistant' else '### Question: ' }}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}### Answer: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = ["user assistant system question answer the a b 12 34 \n\n é Question: ### \n " * 30]
    made = train_bpe(iter(texts), 400, tmp_path_factory.mktemp("cache"), chat=False)
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    assert made.convert_tokens_to_ids("</s>") >= 259
    return made


class Letters(PreTrainedTokenizer):
    """A tokenizer without offsets: a token is a letter."""

    model_input_names = ["input_ids"]

    def __init__(self, **kwargs):
        self.letters = {chr(i): i for i in range(256)}
        super().__init__(eos_token="</s>", **kwargs)

    @property
    def vocab_size(self):
        return 256

    def get_vocab(self):
        return {**self.letters, **self.added_tokens_encoder}

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.letters.get(token, 63)

    def _convert_id_to_token(self, index):
        return chr(index)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def save_vocabulary(self, *_, **__):
        return ()


def messages(*turns):
    return [{"role": r, "content": c} for r, c in turns]


def split(tokenizer, template, given_messages):
    """(whole text, [decoded turn, …], ids) by the code under test."""

    def render(ms, add_generation_prompt=False):
        return tokenizer.apply_chat_template(
            ms, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    pattern = special_pattern(tokenizer)
    text, turns, contents = turn_spans(given_messages, render, pattern, "here")
    answers = [n for n, m in enumerate(given_messages) if m["role"] == A]
    encoded = TurnTokenizer(tokenizer).encode_turns(text, turns, contents, answers)
    ids, places = encoded.ids, encoded.ranges
    assert text == render(given_messages)
    assert [len(p) for p in places] == [2] * len(given_messages)
    return text, [tokenizer.decode(ids[a:b]) for a, b in places], ids


TALK = messages((S, "be brief"), (U, "question user"), (A, "answer"), (U, "the assistant"), (A, "a b 12"))


@pytest.mark.parametrize(
    ("template", "given_messages", "expected"),
    [
        (CHATML, TALK, ["be brief", "question user", "answer<|im_end|>", "the assistant", "a b 12<|im_end|>"]),
        (LLAMA3, TALK, ["be brief", "question user", "answer<|eot|>", "the assistant", "a b 12<|eot|>"]),
        (INST, TALK[1:], ["question user", " answer</s>", "the assistant", " a b 12</s>"]),
        (MERGED, TALK, ["be brief", "question user", "answer<|eot|>", "the assistant", "a b 12<|eot|>"]),
        (
            THINKING,
            TALK,
            [
                "be brief",
                "question user",
                "answer<|im_end|>",
                "the assistant",
                "<think>\n\n</think>\n\na b 12<|im_end|>",
            ],
        ),
        (
            THINKING,
            messages((U, "question"), (A, "<think>\nthe\n</think>\n\nanswer")),
            ["question", "<think>\nthe\n</think>\n\nanswer<|im_end|>"],
        ),
        (PLAIN_TEXT, TALK[1:], ["question user", "answer\n", "the assistant", "a b 12\n"]),
        (CHATML, messages((U, "user"), (A, "assistant")), ["user", "assistant<|im_end|>"]),
        (CHATML, messages((U, ""), (A, "a")), ["", "a<|im_end|>"]),
        (CHATML, messages((U, "a"), (A, ""), (U, "b"), (A, "b")), ["a", "<|im_end|>", "b", "b<|im_end|>"]),
        (CHATML, messages((A, "hello"), (U, "b"), (A, "a")), ["hello<|im_end|>", "b", "a<|im_end|>"]),
        (
            CHATML,
            messages((U, "a"), (A, "b"), (T, "c"), (A, "d"), (U, "e")),
            ["a", "b<|im_end|>", "c", "d<|im_end|>", "e"],
        ),
        (LLAMA3, messages((U, "  a "), (A, "\n b\n")), ["a", "b<|eot|>"]),
    ],
)
def test_turns_of_common_templates(tokenizer, template, given_messages, expected):
    text, turns, ids = split(tokenizer, template, given_messages)
    assert [t if e.startswith(" ") else t.lstrip(" ") for t, e in zip(turns, expected, strict=True)] == expected
    if template is not PLAIN_TEXT:  # its prompts end in a space, which the tokenizer would join with the answer
        assert ids == tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


WORDS = st.lists(
    st.sampled_from(["user", "a", "\n", " ", "é", "<|im_start|", "12", "assistant", "###", "b\n"]), max_size=6
)


@settings(max_examples=60)
@given(
    contents=st.lists(WORDS.map("".join), min_size=2, max_size=5), template=st.sampled_from([CHATML, LLAMA3, MERGED])
)
def test_turns_against_a_plain_reference(tokenizer, contents, template):
    """The turns of alternating roles, written out again by hand for these templates."""
    given_messages = messages(*((A if n % 2 else U, c) for n, c in enumerate(contents)))
    text, turns, ids = split(tokenizer, template, given_messages)
    assert tokenizer.decode(ids) == text
    said = contents if template == CHATML else [c.strip() for c in contents]
    end = "<|im_end|>" if template == CHATML else "<|eot|>"
    for number, (turn, content) in enumerate(zip(turns, said, strict=True)):
        expected = content + (end if number % 2 else "")
        assert turn.endswith(expected)
        # a token across the border belongs to the turn; what it holds of the template is white space
        assert not turn.removesuffix(expected).strip()


@settings(max_examples=30)
@given(
    contents=st.lists(st.sampled_from(["a", "<|im_end|>", "b</s>", "<|im_start|>user\nx", "é"]), min_size=2, max_size=4)
)
def test_special_tokens_that_are_said_are_text(tokenizer, contents):
    given_messages = messages(*((A if n % 2 else U, c) for n, c in enumerate(contents)))
    text, turns, ids = split(tokenizer, CHATML, given_messages)
    assert tokenizer.decode(ids) == text
    assert turns == [c + ("<|im_end|>" if n % 2 else "") for n, c in enumerate(contents)]
    special = [i for i in ids if i in set(tokenizer.convert_tokens_to_ids(SPECIAL))]
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert special == [start, end] * len(contents)


def test_a_tokenizer_without_offsets():
    tokenizer = Letters()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[:2]})
    assert not tokenizer.is_fast
    text, turns, ids = split(tokenizer, CHATML, TALK)
    assert turns == ["be brief", "question user", "answer<|im_end|>", "the assistant", "a b 12<|im_end|>"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 5
    assert len(ids) == len(re.sub(r"<\|\w+\|>", "x", text))


def test_offsets_that_leave_out_spaces(tokenizer):
    """Some tokenizers' offsets do not cover the space that a token begins with."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trimmed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    trimmed.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trimmed.add_special_tokens({"additional_special_tokens": SPECIAL})
    assert split(trimmed, INST, TALK[1:])[1][1] == " answer</s>"


def test_a_template_that_changes_what_was_said_is_refused(tokenizer):
    forgets = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content[:2] }}")
    with pytest.raises(BadRecord) as caught:
        split(tokenizer, forgets, messages((U, "one"), (A, "two"), (U, "three"), (A, "four")))
    assert (caught.value.where, caught.value.reason) == ("here", "turns not found")


def test_a_turn_does_not_reach_into_the_next_message(tokenizer):
    """A template that closes the last answer alone."""
    last = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{{ '</s>' if loop.last }}{% endfor %}"
    assert split(tokenizer, last, messages((U, "one"), (A, "12"), (U, "b"), (A, "a")))[1][1] == " 12"


def test_what_a_template_refuses_is_a_bad_record(tokenizer):
    with pytest.raises(BadRecord) as caught:
        split(tokenizer, INST, messages((U, "one"), (U, "two"), (A, "three")))
    assert str(caught.value) == "here: chat template refuses the messages: roles must alternate"
    assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ([{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}], [(U, "u"), (A, "a")]),
        ([{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}], [(U, "u"), (A, "a")]),
        ([{"role": "developer", "content": "s"}, {"role": "model", "content": "a"}], [(S, "s"), (A, "a")]),
        (
            [
                {"role": "user", "content": [{"type": "text", "text": "x"}, {"text": "y"}]},
                {"role": "bot", "content": "a"},
            ],
            [(U, "xy"), (A, "a")],
        ),
        (
            [{"from": "observation", "value": "u"}, {"role": "assistant", "content": "a", "extra": 1}],
            [(T, "u"), (A, "a")],
        ),
    ],
)
def test_messages_of_other_forms(raw, expected):
    assert normalise(raw, "f:1") == messages(*expected)


def test_tool_calls_are_kept():
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    raw = [{"role": "user", "content": "u"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    assert normalise(raw, "f:1")[1] == {"role": A, "content": "", "tool_calls": calls}


@pytest.mark.parametrize(
    "given",
    [
        {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}], "content": None},
        {"tool_calls": '[{"name": "f", "arguments": {"a": 1}}]'},
        {"function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"role": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
    ],
)
def test_tool_calls_of_other_forms(given):
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    found = normalise(messages((U, "u")) + [{"role": A, **given}], "f:1")
    assert found[1] == {"role": A, "content": "", "tool_calls": [call]}


def test_what_has_no_value_is_no_field():
    raw = [*messages((U, "u")), {"role": A, "content": "a", "tool_calls": [], "name": None, "thinking": None}]
    assert normalise(raw, "f:1", reads={"thinking", "role", "value"})[1] == {"role": A, "content": "a"}


def test_thoughts_beside_the_content_are_kept_for_a_template_that_reads_any_of_their_names():
    raw = [*messages((U, "u")), {"role": A, "content": "a", "reasoning_content": "r"}]
    assert normalise(raw, "f:1", reads={"thinking"})[1] == {"role": A, "content": "a", "reasoning_content": "r"}
    assert normalise(raw, "f:1", True, {"thinking"})[1] == normalise(raw, "f:1")[1] == {"role": A, "content": "a"}


def test_thinking_is_removed_from_the_assistant_alone():
    raw = messages((U, "<think>u</think>"), (A, "<think>\nlong\n</think>\n\nyes <think>x</think>no"))
    assert normalise(raw, "f:1", remove_thinking=True) == messages((U, "<think>u</think>"), (A, "yes no"))
    assert normalise(raw, "f:1") == raw


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("text", "not messages"),
        (["text"], "not messages"),
        ([], "no assistant turn"),
        ([{"role": "user", "content": "u"}], "no assistant turn"),
        ([{"role": "assistant", "content": " "}], "empty answer"),
        ([{"role": "narrator", "content": "u"}], "unknown role"),
        ([{"content": "u"}], "unknown role"),
        ([{"role": "user"}], "message without text"),
        ([{"role": "user", "content": 3}], "message without text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message without text"),
        ([{"role": "user", "content": "\udfff"}], "invalid UTF-8"),
        ([{"role": "user", "content": [{"type": "image_url", "text": "", "image_url": "x"}]}], "message without text"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}], "invalid JSON"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "[1]"}}]}], "arguments are no object"),
        ([{"role": "assistant", "tool_calls": ["f"]}], "tool call is no object"),
        ([{"role": "assistant", "content": "a", "weight": 0.5}], "weight is neither 0 nor 1"),
        ([{"role": "assistant", "content": "a", "train_detail": [{"train": False}]}], "train_detail"),
    ],
)
def test_what_is_no_conversation(raw, reason):
    with pytest.raises(BadRecord) as caught:
        normalise(raw, "f:1")
    assert (caught.value.where, caught.value.reason) == ("f:1", reason)


def test_thinking_alone_is_an_empty_answer():
    with pytest.raises(BadRecord, match="empty answer"):
        normalise(messages((U, "u"), (A, "<think>x</think>")), "f:1", remove_thinking=True)
