"""The prompt that is trained is the prompt that is used, and an answer ends."""

import pickle

import pytest

from jepa_scale.data.prepare.base import LeftOut, Record
from jepa_scale.data.prepare.encoders.messages import is_trained
from jepa_scale.utils.errors import InputError
from tests.data.prepare.encoders.chat_tokenizers import (
    BETWEEN,
    EOS,
    INST,
    KINDS,
    LINES,
    MARKER,
    NOTHING,
    SPACE,
    TEMPLATES,
    byte_level,
    encoder,
    talk,
)


@pytest.fixture(scope="module")
def tokenizers():
    return {name: make() for name, make in KINDS.items()}


def answers(made, messages, **value):
    """(messages, ids, number of the last answer that is trained, its token range) of each sample."""
    found = []
    for sample in made(Record("f:1", {"messages": messages, **value})):
        shown, ids = sample.members["json"]["messages"], sample.members["npy"].tolist()
        last = max(n for n, m in enumerate(shown) if is_trained(m))
        found.append((shown, ids, last, sample.members["json"]["turns"][last]))
    return found


ROWS = [
    talk("hello", "it is blue"),
    talk("hello", "it is", "what\n", "\nblue"),
    talk("  what", "  it", "is it", "so"),
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_prompt_is_the_rendered_one(tokenizers, kind, template):
    tokenizer = tokenizers[kind]
    made = pickle.loads(pickle.dumps(encoder(tokenizer, TEMPLATES[template])))
    for messages in ROWS:
        samples = answers(made, messages)
        trained = [n for shown, *_ in samples for n, m in enumerate(shown) if is_trained(m)]
        assert sorted(trained) == [n for n, m in enumerate(messages) if m["role"] == "assistant"]  # each of them once
        for shown, ids, last, (start, stop) in samples:
            prompt = tokenizer.apply_chat_template(shown[:last], tokenize=False, add_generation_prompt=True)
            assert ids[:start] == tokenizer(prompt, add_special_tokens=False).input_ids
            said = "".join(tokenizer.decode(ids[start:stop]).split())
            assert said.startswith("".join(shown[last]["content"].split()))
        made.check(Record("f:1", {"messages": messages}))


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_after_a_space_begins_without_another(tokenizers, kind):
    ((_, ids, _, (start, _)),) = answers(encoder(tokenizers[kind], SPACE), talk("hello", "it is blue"))
    assert not str(tokenizers[kind].convert_ids_to_tokens(ids[start])).startswith(("▁", "Ġ"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_has_the_same_tokens_beside_a_special_token_that_is_said(tokenizers, kind):
    for template in TEMPLATES.values():
        made = encoder(tokenizers[kind], template)
        (_, plain, _, (start, stop)), *_ = answers(made, talk("what is it", "it is blue"))
        (_, ids, _, (first, last)), *_ = answers(made, talk("what is </s> <|eot|>", "it is blue"))
        assert ids[first:last] == plain[start:stop]
        added = tokenizers[kind].convert_tokens_to_ids([EOS, "<|eot|>"])
        assert [ids.count(i) for i in added] == [plain.count(i) for i in added]


@pytest.mark.parametrize(
    ("template", "token"),
    [(SPACE, EOS), (LINES, "<|eot|>"), (MARKER, "<|user|>"), (INST, EOS), (BETWEEN, "<|eot|>"), (NOTHING, None)],
)
def test_the_token_that_closes_an_answer_is_found_in_the_template(tokenizers, template, token):
    tokenizer = tokenizers["byte-level"]
    made = encoder(tokenizer, template)
    assert made.closes == (token is not None)
    assert made.special.get("end") == (tokenizer.convert_tokens_to_ids(token) if token else None)
    for _, ids, _, (_, stop) in answers(made, talk("hello", "it is")):
        assert ids[stop - 1] == made.special["end"] if token else tokenizer.decode(ids[stop - 1]) == "\n"


def test_an_answer_in_a_conversation_is_closed_by_the_next_messages_token(tokenizers):
    made = encoder(tokenizers["byte-level"], MARKER)
    (sample,) = made(Record("f:1", {"messages": talk("hello", "it is", "what", "so")}))
    ids, turns = sample.members["npy"], sample.members["json"]["turns"]
    shown = [tokenizers["byte-level"].decode(ids[start:stop]) for start, stop in turns]
    assert shown == ["hello", "it is<|user|>", "what", "so<|user|>"]


def test_a_token_that_closes_need_not_be_special():
    tokenizer = byte_level()
    tokenizer.add_tokens(["<done>"])
    made = encoder(tokenizer, NOTHING.replace("{{ m.content }}", "{{ m.content }}<done>"))
    assert made.special["end"] == tokenizer.convert_tokens_to_ids("<done>")


def test_eos_is_added_where_nothing_closes(tokenizers):
    """A rendered conversation has no eos, so each answer is closed in a sample of which it is the end."""
    tokenizer = tokenizers["byte-level"]
    made = encoder(tokenizer, NOTHING, add_eos=True)
    assert made.closes and made.special["end"] == tokenizer.eos_token_id
    samples = answers(made, talk("hello", "it is", "what", "so"))
    assert sorted(last for _, _, last, _ in samples) == [1, 3]
    for _, ids, _, (_, stop) in samples:
        assert stop == len(ids) and ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert answers(encoder(tokenizer, MARKER, add_eos=True), ROWS[0]) == answers(encoder(tokenizer, MARKER), ROWS[0])


def test_a_prompt_that_differs_is_refused_by_its_row(tokenizers):
    thought = LINES.replace("assistant<|/h|>\n\n{% endif %}", "assistant<|/h|>\n\nso{% endif %}")
    made = encoder(tokenizers["byte-level"], thought)
    with pytest.raises(
        InputError, match=r"^f:7: the prompt that would be trained ends in .* but a model is asked with"
    ):
        made.check(Record("f:7", {"messages": talk("hello", "it is")}))


def test_an_earlier_answer_after_another_text_than_its_prompt_is_told(tokenizers):
    """As Qwen 3's: only the last answer has the thought that the prompt ends in."""
    template = MARKER.replace(
        "{{ m['content'] }}", "{{ 'so ' if loop.last and m.role == 'assistant' }}{{ m['content'] }}"
    )
    made = encoder(tokenizers["byte-level"], template.replace("<|assistant|>\n", "<|assistant|>\nso "))
    assert not made.check(Record("f:1", {"messages": talk("hello", "it is")}))
    assert made.check(Record("f:1", {"messages": talk("hello", "it is", "what", "blue")}))


def test_what_an_answer_excludes_is_not_trained(tokenizers):
    messages = talk("hello", "it is", "what", "so")
    messages[1]["weight"] = 0
    made = encoder(tokenizers["byte-level"], MARKER)
    ((shown, _, last, _),) = answers(made, messages)
    assert last == 3 and not is_trained(shown[1]) and "weight" not in shown[1]
    messages[3]["train"] = False
    with pytest.raises(LeftOut, match="excludes every message"):
        made(Record("f:1", {"messages": messages}))


TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|h|>{{ m.role }}<|/h|>"
    "{% if m.thinking %}({{ m.thinking }}){% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}ARGUMENTS{% endfor %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|h|>assistant<|/h|>{% endif %}"
)


@pytest.mark.parametrize("inserted", ["{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}"])
def test_arguments_are_what_the_template_takes(tokenizers, inserted):
    made = encoder(tokenizers["byte-level"], TOOLS.replace("ARGUMENTS", inserted))
    call = {"function": {"name": "so", "arguments": '{"sky": "blue"}'}}
    messages = [*talk("hello"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    ((_, ids, _, (start, stop)),) = answers(made, messages)
    assert made.tokenizer.decode(ids[start:stop]) == 'so{"sky": "blue"}<|eot|>'


def test_what_the_template_reads_is_rendered_and_the_rest_is_told(tokenizers):
    made = encoder(tokenizers["byte-level"], TOOLS.replace("ARGUMENTS", ""))
    messages = talk("hello", "it is")
    messages[1] |= {"reasoning_content": "sky", "refusal": "no", "audio": None}
    messages[0] |= {"train": True, "name": "x"}
    template = {"tools": [{"type": "function", "function": {"name": "so"}}], "documents": [{"text": "blue"}]}
    record = Record("f:1", {"messages": messages, "template": template})
    (sample,) = made(record)
    text = made.tokenizer.decode(sample.members["npy"])
    assert '"so"' in text and "(sky)it is" in text
    assert sorted(made.unused(record)) == [
        "column documents (the chat template does not read it)",
        "message field refusal",
        "message field train (of messages that are not the assistant's)",
    ]
    plain = encoder(tokenizers["byte-level"], LINES)
    assert "message field reasoning_content" in list(plain.unused(record))
