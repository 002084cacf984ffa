"""YAML 1.2 alone, what is no YAML by its line, and back again."""

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.config.yaml12 import dump, parse, parse_argument
from jepa_scale.utils.errors import InputError


def test_a_value_without_quotes_means_what_the_core_schema_says():
    meaning = {
        **{text: None for text in ("null", "Null", "NULL", "~", "")},
        **{"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False},
        **{"0": 0, "-12": -12, "+3": 3, "017": 17, "0o17": 15, "0x1F": 31, "9223372036854775807": 2**63 - 1},
        **{"1e-4": 1e-4, "1E3": 1000.0, ".5": 0.5, "5.": 5.0, "-1.5e+2": -150.0, ".inf": math.inf, "-.INF": -math.inf},
        "10000000000000000000000": 1e22,  # no integer of 64 bits
    }
    for text, value in meaning.items():
        found = parse(f"a: {text}", "x")["a"]
        assert found == value and isinstance(found, type(value)), text
        assert parse(f"a: '{text}'", "x") == {"a": text}
    assert math.isnan(parse("a: .nan", "x")["a"])
    for text in ("yes", "no", "on", "off", "y", "n", "1_000", "12:30:00", "2024-01-31", "2024-13-45", "0b11", "-0x1f", "1e", "e3", "nan", "inf", "truE", "1.2.3"):  # fmt: skip
        assert parse(f"a: {text}", "x") == {"a": text}


def test_a_number_keeps_its_text_and_a_key_is_always_a_text():
    assert [parse(text, "x").text for text in ("007", "1e3", "1.50", "0x1f")] == ["007", "1e3", "1.50", "0x1f"]
    assert parse("1: a\nnull: b\ntrue: c", "x") == {"1": "a", "null": "b", "true": "c"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3", r"^f, line 5: the key 'c' is there a second time, after line 3; remove"),
        ("{a: 1, a: 2}", r"^f, line 1: the key 'a' is there a second time"),
        ("1: a\n'1': b", r"^f, line 2: the key '1' is there a second time"),
        ("a: 1\n\tb: 2", r"^f, line 2: not valid YAML"),
        ("a: 1\nb: \x07", r"^f, line 2: not valid YAML: special characters"),
        ("a: [1, 2", r"^f, line 1: not valid YAML"),
        ("a: b: c", r"^f, line 1: not valid YAML: mapping values"),
        ("a: 1\n---\nb: 2", r"^f, line 2: not valid YAML: but found another document"),
        ("a: *nothing", r"^f, line 1: not valid YAML: found undefined alias"),
        ("a: 1\n? [b]\n: 2", r"^f, line 2: a key must be a text"),
        ("a: !!python/object/apply:os.getcwd []", r"^f, line 1: the tag .*os.getcwd has no meaning"),
        ("\na: !!set {b}", r"^f, line 2: the tag .*set has no meaning"),
        ("a: !!int many", r"^f, line 1: 'many' is no int"),
        ("a: &x\n  b: [*x]", r"^f, line 1: an alias stands for a value that it is part of"),
        ("a: &x\n  <<: *x", r"^f, line 2: << must name another mapping"),
        ("a:\n  <<: 3", r"^f, line 2: << must name another mapping"),
        ("[" * 5000, r"^f, line 1: is nested too deeply"),
    ],
)
def test_what_is_wrong_is_named_by_its_line(text, message):
    with pytest.raises(InputError, match=message):
        parse(text, "f")


def test_merge_keys_give_what_a_mapping_does_not_have_itself():
    text = "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc:\n  y: 3\n  <<: [*a, *b]\nd: {<<: {x: 4}}"
    assert parse(text, "f") == {
        "a": {"x": 1, "y": 1},
        "b": {"y": 2, "z": 2},
        "c": {"x": 1, "z": 2, "y": 3},
        "d": {"x": 4},
    }


def test_on_the_command_line_nothing_is_a_comment():
    for text in ("try #2", "# 2", "#", "a  #b", "pipe:cat {} | head #1"):
        assert parse_argument(text) == text
    assert (
        parse_argument("") is None
        and parse_argument(" 1e-3 ") == 1e-3
        and parse_argument("[a, 'b #c']") == ["a", "b #c"]
    )
    for text in ("[1, 2] # both", "'a' #b", "{a: 1} #"):
        with pytest.raises(InputError, match="would be a comment"):
            parse_argument(text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(VALUES)
def test_what_is_written_is_read_again(value):
    """By ours, and by a reader of YAML 1.1."""
    text = dump({"a": value})
    assert parse(text, "f") == yaml.safe_load(text) == {"a": value}


@pytest.mark.parametrize(
    "text", ["on", "1e-3", "0o17", "1_000", "12:30", "2024-01-31", "null", "~", "", "<<", "=", "007"]
)
def test_a_text_that_looks_like_something_else_stays_a_text(text):
    assert parse(dump({"a": text}), "f") == yaml.safe_load(dump({"a": text})) == {"a": text}
