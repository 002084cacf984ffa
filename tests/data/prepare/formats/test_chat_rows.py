"""Each column with a known meaning is used or refused, and every other one is told."""

import json

import pytest

from jepa_scale.data.prepare.base import BadRecord, LeftOut, PrepareOptions, Record
from jepa_scale.data.prepare.encoders.messages import is_trained, normalise
from jepa_scale.data.prepare.formats.rows import find_schema, match
from jepa_scale.utils.errors import InputError

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def one(row, **columns):
    """What becomes of a row: a record, or what is wrong with it."""
    schema = match(row, PrepareOptions(columns=columns))
    (found,) = schema.expand(Record("f:1", row))
    return found


def contents(row, **columns):
    return [(m["role"], m["content"]) for m in one(row, **columns).value["messages"]]


def test_dollys_context_and_llama_factorys_history_are_said():
    dolly = {"instruction": "What colour?", "context": "It is red.", "response": "red", "category": "closed_qa"}
    assert contents(dolly) == [("user", "What colour?\n\nIt is red."), ("assistant", "red")]
    assert one(dolly).unused == ("column category",)
    alpaca = {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["q", "a"], ["r", "b"]]}
    assert contents(alpaca) == [
        ("system", "s"),
        *[("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")],
        ("user", "i\n\nx"),
        ("assistant", "o"),
    ]
    assert one(alpaca).unused == ()
    assert contents({**alpaca, "history": [], "system": ""}) == [("user", "i\n\nx"), ("assistant", "o")]


def test_a_system_column_stands_before_messages_once():
    system = ("system", "s")
    assert contents({"conversations": TALK, "system": "s"}) == [system, ("user", "q"), ("assistant", "a")]
    own = [{"role": "system", "content": "s"}, *TALK]
    assert contents({"messages": own, "system_prompt": "s"})[0] == system
    assert one({"messages": own, "system": "other"}).reason == "two system messages"
    # the column of the row counts, whatever the first row has
    schema = match({"messages": TALK}, PrepareOptions())
    (found,) = schema.expand(Record("f:2", {"messages": TALK, "system_prompt": "s"}))
    assert found.value["messages"][0] == {"role": "system", "content": "s"}


@pytest.mark.parametrize("given", [[TOOL], TOOL, json.dumps([TOOL]), [json.dumps(TOOL)], [TOOL["function"]]])
def test_tools_are_values_for_the_template(given):
    assert one({"messages": TALK, "tools": given}).value["template"] == {"tools": [TOOL]}


def test_other_values_for_the_template():
    row = {"messages": TALK, "functions": [TOOL["function"]], "documents": [{"text": "t"}]}
    row["chat_template_kwargs"] = {"enable_thinking": True, "x": None}
    values = {"tools": [TOOL], "documents": [{"text": "t"}], "enable_thinking": True}
    assert one(row).value["template"] == values and one(row).unused == ()
    assert "template" not in one({"messages": TALK, "tools": [], "documents": None}).value


def test_rows_labelled_as_unwanted_are_left_out_whatever_on_error_is():
    pair = {"prompt": "q", "completion": "a"}
    for name in ("label", "kto_tag"):
        assert isinstance(found := one({**pair, name: False}), LeftOut) and name in found.reason
        assert isinstance(one({**pair, name: True}), Record) and one({**pair, name: True}).unused == ()
    assert one({**pair, "label": 0}).unused == ("column label",)  # a number is of another meaning


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"images": ["a.png"], "messages": TALK}, "field 'images': only text"),
        ({"audio": {"bytes": b"x"}, "question": "q", "answer": "a"}, "field 'audio': only text"),
        ({"instruction": "i", "context": {"x": 1}, "response": "r"}, "not text"),
        ({"instruction": "i", "output": "o", "history": ["q"]}, "'history' is no list"),
        ({"messages": TALK, "tools": "{"}, "invalid JSON"),
        ({"messages": TALK, "tools": ["1"]}, "'tools' is no list of objects"),
        ({"messages": TALK, "documents": ["t"]}, "'documents' is no list"),
        ({"messages": TALK, "chat_template_kwargs": {"messages": []}}, "'chat_template_kwargs' cannot"),
        ({"messages": TALK[:1], "chosen": TALK[1], "rejected": TALK[1]}, "in 'chosen' and 'rejected'"),
    ],
)
def test_what_cannot_be_used_is_refused(row, reason):
    found = one(row)
    assert isinstance(found, BadRecord) and reason in found.reason


def test_preferences_name_the_way_out():
    rows = [Record("f:1", {"prompt": "q", "chosen": "a", "rejected": "b"})]
    with pytest.raises(InputError, match=r"f:1: holds preferences .*output=chosen"):
        find_schema(iter(rows), PrepareOptions(), "f")
    row = rows[0].value
    assert contents(row, output="chosen") == [("user", "q"), ("assistant", "a")]
    assert one(row, output="chosen").unused == ("column rejected",)


def test_columns_that_are_not_used_are_told_of_texts_too():
    assert one({"text": "t", "url": "u", "id": 0, "note": "", "x": None}).unused == ("column url", "column id")


PROMPT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "r"},
]
COMPLETION = [{"role": "assistant", "content": "b"}]


def trained(row, **columns):
    return [m["content"] for m in normalise(one(row, **columns).value["messages"], "f:1") if is_trained(m)]


def test_a_conversational_prompt_and_its_completion_are_one_conversation():
    """Trained is the completion alone, as by TRL."""
    row = {"prompt": PROMPT, "completion": COMPLETION, "tools": [TOOL]}
    said = [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    assert contents(row) == said and trained(row) == ["b"]
    assert one(row).unused == () and one(row).value["template"] == {"tools": [TOOL]}
    assert PROMPT[2] == {"role": "assistant", "content": "a"}  # the row itself is left as it is
    again = {"prompt": PROMPT, "chosen": COMPLETION, "rejected": COMPLETION}
    assert contents(again, input="prompt", output="chosen") == said
    # a message that says whether it is trained on is believed
    flagged = [*PROMPT[:2], PROMPT[2] | {"weight": 1}, PROMPT[3]]
    assert trained({"prompt": flagged, "completion": COMPLETION}) == ["a", "b"]
    assert trained({"prompt": PROMPT, "completion": [*COMPLETION, *PROMPT[3:], *COMPLETION]}) == ["b", "b"]


def test_a_conversational_prompt_takes_no_columns_of_a_text():
    row = {"prompt": PROMPT[1:], "completion": COMPLETION, "context": "c", "history": [["q", "a"]], "system": "s"}
    assert one(row).unused == ("column context", "column history")
    assert contents(row)[0] == ("system", "s")
    assert one({**row, "prompt": PROMPT, "system": "other"}).reason == "two system messages"


@pytest.mark.parametrize(
    ("prompt", "completion", "reason"),
    [
        (PROMPT, "b", "field 'prompt' is a list of messages and 'completion' is not"),
        ("q", COMPLETION, "field 'completion' is a list of messages and 'prompt' is not"),
        ([], COMPLETION, "field 'completion' is a list of messages and 'prompt' is not"),
        (PROMPT, ["b"], "field 'prompt' is a list of messages and 'completion' is not"),
        (["q"], "b", "not text"),
        (PROMPT, PROMPT[:1], "field 'completion' has no message of the assistant"),
    ],
)
def test_a_conversational_prompt_that_cannot_be_used_is_a_bad_record(prompt, completion, reason):
    found = one({"prompt": prompt, "completion": completion})
    assert isinstance(found, BadRecord) and found.reason == reason
