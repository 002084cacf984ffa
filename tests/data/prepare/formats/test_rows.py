import pytest

from jepa_scale.data.prepare.base import BadRecord, PrepareOptions, Record
from jepa_scale.data.prepare.formats.rows import expanded, find_schema, match
from jepa_scale.data.prepare.formats.source import Part
from jepa_scale.utils.errors import InputError

G = [[1]]


def options(**values) -> PrepareOptions:
    return PrepareOptions(**values)


def one(row, **values):
    """The records of a row that is the first of its file."""
    schema = match(row, options(**values))
    return None if schema is None else (schema.kind, list(schema.expand(Record("f:1", row))))


def said(*turns: tuple[str, str]):
    return ("chat", [Record("f:1", {"messages": [{"role": r, "content": c} for r, c in turns]})])


@pytest.mark.parametrize("asked", ["question", "input", "instruction", "prompt"])
@pytest.mark.parametrize("answer", ["response", "output", "completion", "answer"])
def test_pairs_are_conversations_whatever_their_names(asked, answer):
    assert one({asked: "q", answer: "a", "id": 3}) == said(("user", "q"), ("assistant", "a"))


def test_a_pair_may_have_a_system_and_a_number_as_answer():
    row = {"question": "1+1", "answer": 2, "system": "Sum."}
    assert one(row) == said(("system", "Sum."), ("user", "1+1"), ("assistant", "2"))
    schema = match({"question": "1+1", "answer": 2}, options())
    assert list(schema.expand(Record("f:1", row))) == said(("system", "Sum."), ("user", "1+1"), ("assistant", "2"))[1]


def test_alpacas_task_and_input_are_both_asked():
    assert one({"instruction": "Add.", "input": "1 2", "output": "3"}) == said(
        ("user", "Add.\n\n1 2"), ("assistant", "3")
    )
    assert one({"instruction": "Add.", "input": "", "output": "3"}) == said(("user", "Add."), ("assistant", "3"))
    assert one({"question": "Q", "instruction": "I", "input": "x", "output": "3"}) == said(
        ("user", "Q"), ("assistant", "3")
    )


@pytest.mark.parametrize("name", ["text", "content", "document"])
def test_text_by_name(name):
    assert one({name: "t", "title": "x"}) == ("text", [Record("f:1", "t")])


def test_messages_come_before_pairs_and_pairs_before_text():
    messages = [{"role": "user", "content": "u"}]
    row = {"messages": messages, "question": "q", "answer": "a", "text": "t"}
    assert one(row) == ("chat", [Record("f:1", {"messages": messages})])
    del row["messages"]
    assert one(row) == said(("user", "q"), ("assistant", "a"))
    assert one(row, kind="text") == ("text", [Record("f:1", "t")])
    assert one({"conversations": messages}) == ("chat", [Record("f:1", {"messages": messages})])


def test_columns_named_by_the_user_win():
    row = {"text": "t", "body": "b", "q": "q", "a": "a", "who": "s"}
    assert one(row, columns={"text": "body"}) == ("text", [Record("f:1", "b")])
    assert one(row, columns={"input": "q", "output": "a"}) == said(("user", "q"), ("assistant", "a"))
    assert one(row, columns={"input": "q", "output": "a", "system": "who"}) == said(
        ("system", "s"), ("user", "q"), ("assistant", "a")
    )
    assert one({"q": "q", "answer": "a"}, columns={"input": "q"}) == said(("user", "q"), ("assistant", "a"))
    assert one(row, columns={"text": "none"}) is None
    assert one({**row, "messages": [], "question": "q", "answer": "a"}, columns={"text": "body"})[0] == "text"
    assert one({"input": "i", "instruction": "n", "output": "o"}, columns={"input": "input"}) == said(
        ("user", "i"), ("assistant", "o")
    )


def test_grids_of_every_form():
    value = {"context": [G, G], "target": G}
    assert one({"frames": [G, G, G]}) == ("grids", [Record("f:1#frames[2]", value)])
    assert one(value) == ("grids", [Record("f:1", value)])
    assert one({"input": G, "output": G}) == ("grids", [Record("f:1", {"context": [G], "target": G})])
    assert one({"x": G, "y": G}, columns={"input": "x", "output": "y"}) == (
        "grids",
        [Record("f:1", {"context": [G], "target": G})],
    )
    assert one({"context": "some text", "question": "q", "answer": "a"})[0] == "chat"
    assert one({"input": "i", "output": "o"}, kind="grids") is None


@pytest.mark.parametrize(
    ("first", "row", "reason"),
    [
        ({"text": "t"}, {"body": "t"}, "no field 'text'"),
        ({"text": "t"}, {"text": None}, "no field 'text'"),
        ({"text": "t"}, {"text": 3.5}, "not text"),
        ({"text": "t"}, {"text": " \n"}, "empty document"),
        ({"text": "t"}, {"text": "\ud800"}, "invalid UTF-8"),
        ({"question": "q", "answer": "a"}, {"question": "q"}, "no field 'answer'"),
        ({"question": "q", "answer": "a"}, {"question": ["q"], "answer": "a"}, "not text"),
        ({"question": "q", "answer": "a"}, {"question": "q", "answer": True}, "not text"),
        ({"input": G, "output": G}, {"input": G}, "no field 'output'"),
        ({"frames": [G, G]}, {"frames": [G]}, "too few frames"),
    ],
)
def test_a_row_unlike_the_first_is_bad(first, row, reason):
    schema = match(first, options())
    (bad,) = schema.expand(Record("f:9", row))
    assert isinstance(bad, BadRecord)
    assert (bad.where, bad.reason) == ("f:9", reason)


def test_the_first_row_that_can_be_read_decides():
    rows = [BadRecord("f:1", "invalid JSON"), Record("f:2", {"id": 1}), Record("f:3", {"text": "t"})]
    assert find_schema(iter(rows), options(), "f").kind == "text"
    part = expanded(Part(lambda: iter(rows), 3), find_schema(iter(rows), options(), "f"))
    assert [type(i).__name__ for i in part.read()] == ["BadRecord", "BadRecord", "Record"]
    assert part.count == 3


def test_what_cannot_be_told_is_the_users_error():
    with pytest.raises(InputError, match="f: holds no rows"):
        find_schema(iter([]), options(), "f")
    with pytest.raises(InputError, match="f:1: invalid JSON"):
        find_schema(iter([BadRecord("f:1", "invalid JSON")]), options(), "f")
    with pytest.raises(
        InputError, match=r"f:2: the kind of the row is not recognised .* it has 'id', 'x'.*data\.columns"
    ):
        find_schema(iter([BadRecord("f:1", "bad"), Record("f:2", {"id": 1, "x": 2})]), options(), "f")
    with pytest.raises(InputError, match=r"data\.columns\.txt: unknown role; known roles: text, messages"):
        find_schema(iter([]), options(columns={"txt": "a"}), "f")


def test_windows_over_frames_have_the_length_and_distance_that_is_asked_for():
    frames = [[[n]] for n in range(6)]
    chosen = options(context_window=2, target_offset=3)
    (first, last) = match({"frames": frames}, chosen).expand(Record("f:1", {"frames": frames}))
    assert first.value == {"context": frames[:2], "target": frames[4]} and last.value["target"] == frames[5]
    pair = [Record("f:1", {"input": [[1]], "output": [[2]]})]
    with pytest.raises(
        InputError, match="data.context_window: is for rows of frames, and f has no frames; remove the key"
    ):
        find_schema(iter(pair), chosen, "f")
