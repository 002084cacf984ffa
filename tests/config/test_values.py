"""Texts, names and paths of a config."""

import re

import pytest
from pydantic import Field

from jepa_scale.cli.config.schema import kinds
from jepa_scale.config.parsing import parse_section
from jepa_scale.config.schema import Config, OptimConfig, RunConfig, Section, TrainConfig
from jepa_scale.config.values import NAME_BYTES, LocalPath, PlainMapping, Text
from jepa_scale.config.yaml12 import parse
from jepa_scale.utils.errors import InputError


class Example(Section):
    text: Text = Field("", description="A text.")
    count: int = Field(0, ge=0, description="An integer.")
    size: float = Field(0.0, description="A number.")
    flag: bool = Field(False, description="A boolean.")
    path: LocalPath | list[LocalPath] = Field(".", description="A path, or several.")
    other: PlainMapping | None = Field(None, description="Anything.")


def example(text):
    return parse_section(Example, parse(text, "f"), "x")


def test_a_text_takes_a_number_as_it_is_written():
    for text in ("007", "4711", "1e3", "1.50", "0x1f", "123456789012345678901234567890", "2024-13-45", "on"):
        assert example(f"text: {text}").text == text


def test_a_number_is_a_plain_number():
    found = example("count: 007\nsize: 3\nother: {a: [1, 2.5], b: {c: 0x1f}}")
    assert (found.count, found.size, found.other) == (7, 3.0, {"a": [1, 2.5], "b": {"c": 31}})
    kinds_of = [type(v) for v in (found.count, found.size, *found.other["a"], found.other["b"]["c"])]
    assert kinds_of == [int, float, int, float, int]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("count: true", "x.count: input should be a valid integer, got True"),
        ("count: on", "x.count: .*integer.*'on'"),
        ("count: 1e3", "x.count: .*integer.*, got 1e3; write a whole number in digits"),
        ("count: 3.0", "x.count: .*integer"),
        ("count: '3'", "x.count: .*integer.*'3'"),
        ("count: 99999999999999999999", "x.count: .*integer, got 99999999999999999999"),
        ("size: yes", "x.size: .*number.*'yes'"),
        ("size: false", "x.size: .*number, got False"),
        ("size: .inf", "x.size: .*finite number, got .inf"),
        ("size: 1e999", "x.size: .*finite number, got 1e999"),
        ("size: .nan", "x.size: .*finite number"),
        ("flag: 1", "x.flag: .*boolean, got 1; write true or false"),
        ("flag: off", "x.flag: .*boolean, got 'off'"),
        ("text: null", "x.text: .*string, got None"),
        ("text: true", "x.text: .*string, got True; put it in quotes"),
        ("text: [a]", "x.text: .*string"),
        ("path: 1.5e3x\ncount: -1", "x.count: .*greater than or equal to 0"),
        ("path: [a, true]", r"x\.path\.1: .*string, got True"),
        ("path: ''", "x.path: is empty; give a path"),
    ],
)
def test_a_value_of_another_type_is_refused(text, message):
    with pytest.raises(InputError, match=f"^{message}"):
        example(text)


def test_home_and_environment_are_expanded_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA_FOLDER", "/data")
    monkeypatch.delenv("NOT_SET", raising=False)
    for given, expanded in {
        "~": str(tmp_path),
        "~/a": f"{tmp_path}/a",
        "$DATA_FOLDER/a": "/data/a",
        "${DATA_FOLDER}/{x,y}.txt": "/data/{x,y}.txt",
        "a/~/b": "a/~/b",
        "s3://$DATA_FOLDER/a": "s3:///data/a",
        "https://a/b?c=$NOT_SET": "https://a/b?c=$NOT_SET",
        "pipe:cat $HOME/{}": "pipe:cat $HOME/{}",  # its shell does it
    }.items():
        assert example(f"path: '{given}'").path == expanded
        assert example(f"path: ['{given}']").path == [expanded]
    for given, message in {
        "$NOT_SET/a": "environment variable NOT_SET is not set",
        "a/${NOT_SET}": "environment variable NOT_SET is not set",
        "~no_such_user/a": "home folder of ~no_such_user is not known",
    }.items():
        with pytest.raises(InputError, match=f"^x.path: .*{message}"):
            example(f"path: '{given}'")
    with pytest.raises(InputError, match="control character"):
        example('path: "a\\nb"')
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$NOT_SET").touch()
    assert example("path: $NOT_SET").path == "$NOT_SET"  # that is its name


PATHS = {"dir", "deepspeed", "same_flops_as", "pretrained", "cache_dir", "path", "valid_path", "cache", "tokenizer", "probe", "database"}  # fmt: skip
"""Keys that are a path, or may be one."""


def test_every_key_that_is_a_path_expands_it(monkeypatch):
    monkeypatch.setenv("HERE", "/here")
    sections = [RunConfig, TrainConfig, *(cls for by_name in kinds().values() for cls in by_name.values())]
    sections += [Config.model_fields["engine"].annotation]
    found = set()
    for section in sections:
        needed = {"path": "a"} if "path" in section.model_fields else {}
        for key in PATHS & section.model_fields.keys():
            assert getattr(section(**{**needed, key: "$HERE/a"}), key) == "/here/a", (section, key)
            found.add(key)
    assert found == PATHS


def test_names_of_runs():
    for name in (
        "a",
        "4711",
        "a=b,c",
        "it's",
        "try #2",
        "sweep/lr=1e-3",
        "größe",
        "a.b",
        "x" * NAME_BYTES,
        "2024-01-31 12:30",
    ):
        assert RunConfig(name=name).name == name
    for name, message in {
        "a?": "'a\\?' has '\\?'; a name may have letters, digits",
        "a\\b": "a name may have",
        "a\nb": "a name may have",
        ".": "begins with",
        "..": "begins with",
        "a/../b": "begins with",
        "-a": "begins with",
        "~": "begins with",
        "a ": "ends with a space",
        "/a": "goes below run.dir",
        "a//b": "goes below run.dir",
        "x" * (NAME_BYTES + 1): "has 251 bytes, and 250 are the most",
        "ü" * 126: "has 252 bytes",
    }.items():
        with pytest.raises(InputError, match=f"^run.name: .*{message}"):
            parse_section(RunConfig, {"name": name}, "run")


def test_lists_of_two_and_ranges_of_their_values():
    assert parse_section(OptimConfig, {"betas": [0, 0.9]}, "optim").betas == (0.0, 0.9)
    for betas in ([0.9, 1.5], [-0.1, 0.9], [0.9, 1], [True, 0.9], [0.9], [0.9, 0.9, 0.9], [float("nan"), 0.9], 0.9):
        with pytest.raises(InputError, match=r"^optim\.betas"):
            parse_section(OptimConfig, {"betas": betas}, "optim")


UNBOUNDED = {
    "below", "above",  # of any metric
    "tap_layer", "relation_layer", "target_layer", "bridge_after",  # from either end of the blocks
    "gate_init", "bridge_gate_init",  # before a sigmoid
    "weight",  # of a part: checked by its own rule
}  # fmt: skip


def test_every_number_has_a_range():
    """Lists of numbers have rules of their own."""
    sections = [Config, *(cls for by_name in kinds().values() for cls in by_name.values())]
    for section in sections:
        schema = section.model_json_schema()
        for owner in [schema, *schema.get("$defs", {}).values()]:
            for key, value in owner.get("properties", {}).items():
                for form in [value, *value.get("anyOf", [])]:
                    if form.get("type") in ("integer", "number") and key not in UNBOUNDED:
                        assert {"minimum", "exclusiveMinimum", "exclusiveMaximum", "enum"} & form.keys(), (
                            owner["title"],
                            key,
                        )


def test_a_message_is_of_bounded_length():
    with pytest.raises(InputError) as error:
        parse_section(OptimConfig, {"lr": "x" * 10_000}, "optim")
    assert len(str(error.value)) < 400 and re.match(r"optim\.lr: ", str(error.value))
