"""``jepa-scale encode`` and ``generate``: what they write and print, and what they refuse."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import jepa_scale
from jepa_scale.cli.main import main
from tests.convert.runs import make_run
from tests.text_runs import NATIVE, data_section, write_corpus

TEXTS = ["the wave", "judge of the law", "a goat near the barn"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encode")
    write_corpus(folder)
    make_run(folder, "run", NATIVE, data=data_section(folder), eval={})
    conversations = [
        {"messages": [{"role": "user", "content": f"say {text}"}, {"role": "assistant", "content": text}]}
        for text in TEXTS * 4
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations))
    chat = {"source": "chat", "path": str(folder / "chat.jsonl"), "vocab_size": 300, "cache": str(folder / "cache")}
    make_run(folder, "chat", NATIVE, data=chat, eval={})
    return folder / "run"


@pytest.fixture(scope="module")
def expected(run):
    return jepa_scale.load(run).encode(TEXTS)


def write(path: Path, kind: str) -> Path:
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text, "label": 1}) + "\n\n" for text in TEXTS))
    else:
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(TEXTS).encode())
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_file_becomes_rows(run, tmp_path, capsys, expected, kind):
    file, out = write(tmp_path / f"texts.{kind}", kind), tmp_path / "rows.npy"
    assert main(["encode", str(run), str(file), "--out", str(out), "--no-progress"]) == 0
    said = capsys.readouterr()
    assert f"step_00000007 → {out}: 3 texts, 32 dimensions, pooling mean, " in said.out and not said.err
    np.testing.assert_array_equal(np.load(out), expected)
    assert list(tmp_path.glob("*.partial")) == []


def test_standard_input_and_options(run, tmp_path, capsys, monkeypatch):
    loaded = jepa_scale.load(run)
    long = "wave " * 200
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"the wave\n{long}\n".encode())))
    out = tmp_path / "rows.npy"
    options = ["--pooling", "last", "--normalize", "--truncate", "--batch-tokens", "9", "--checkpoint", "step_00000007"]
    assert main(["encode", str(run), "-", "--out", str(out), *options]) == 0
    expected = loaded.encode(["the wave", long], "last", normalize=True, truncate=True)
    np.testing.assert_allclose(np.load(out), expected, atol=1e-5)
    assert "encode: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\n\ntwo\n", "a.txt:2: is an empty text; leave it out"),
        ("a.txt", b"one\n\xfftwo\n", "a.txt:2: invalid UTF-8: byte 0xff"),
        ("a.txt", b"", "a.txt: holds no text"),
        ("a.txt", b"one\n" + b"wave " * 200, "a.txt:2: has 402 tokens, the model takes 128; .*--truncate"),
        ("a.jsonl", b'{"text": "x"}\n{"label": 1}\n', "a.jsonl:2: needs a text that is not empty"),
        ("a.jsonl", b"{\n", "a.jsonl:1: invalid JSON"),
        ("a.csv", b"x", r"a.csv: must be .txt \(a text a line\), .jsonl"),
        ("a.txt", None, "a.txt: cannot be read: No such file"),
    ],
)
def test_what_cannot_be_encoded_is_named_by_its_line(run, tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["encode", str(run), str(tmp_path / name), "--out", str(tmp_path / "rows.npy"), "--no-progress"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jepa-scale: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "rows.npy").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--out": "rows.txt"}, "--out rows.txt: must end with .npy"),
        ({"--out": "nowhere/rows.npy"}, "there is no folder nowhere"),
        ({"run": "nowhere"}, "nowhere: not a run directory"),
        ({"--checkpoint": "nowhere"}, "no checkpoint at nowhere; give a folder"),
        ({"--device": "abacus"}, "device 'abacus': "),
        ({"--device": "cuda:99"}, "device 'cuda:99': there are"),
        ({"--batch-tokens": "0"}, "batch_tokens: must be at least 1"),
    ],
)
def test_bad_arguments_exit_with_2_and_one_line(run, tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "texts.txt", "txt")
    given = {"run": str(run), "--out": "rows.npy"} | changes
    flags = [word for flag, value in given.items() if flag != "run" for word in (flag, value)]
    assert main(["encode", given["run"], "texts.txt", *flags, "--no-progress"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_without_room_the_old_file_stays(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "rows.npy"
    out.write_bytes(b"old")

    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("jepa_scale.utils.io.write_atomic", full)
    file = write(tmp_path / "texts.txt", "txt")
    assert main(["encode", str(run), str(file), "--out", str(out), "--no-progress"]) == 2
    assert "cannot be written: No space left on device" in capsys.readouterr().err and out.read_bytes() == b"old"


def test_generation_prints_what_comes_next(run, capsys, monkeypatch):
    loaded = jepa_scale.load(run)
    expected = loaded.generate(["the wave", "milk"], max_new_tokens=5)
    assert main(["generate", str(run), "the wave", "milk", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == "".join(f"{said}\n" for said in expected)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the wave\nmilk\n")))
    assert main(["generate", str(run), "--max-new-tokens", "5", "--json"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said == [{"prompt": p, "generated": g} for p, g in zip(["the wave", "milk"], expected, strict=True)]


def test_drafts_are_reported(run, capsys):
    folder = run.parent
    make_run(folder, "drafts", NATIVE, data=data_section(folder), eval={}, objective={"name": "next_latent"})
    expected = jepa_scale.load(folder / "drafts").generations(["the wave", "milk"], 9, draft=2)
    arguments = ["generate", str(folder / "drafts"), "the wave", "milk", "--max-new-tokens", "9", "--draft", "2"]
    assert main([*arguments, "--json"]) == 0
    said = capsys.readouterr()
    for line, prompt, (text, found) in zip(said.out.splitlines(), ["the wave", "milk"], expected, strict=True):
        counts = {name: getattr(found, name) for name in ("drafted", "accepted", "forwards")}
        assert json.loads(line) == {"prompt": prompt, "generated": text, **counts}
    kept, drafted = (sum(getattr(found, name) for _, found in expected) for name in ("accepted", "drafted"))
    assert f"{kept} of {drafted} drafted tokens were kept" in said.err


def test_a_chat_is_asked_as_in_training(run, capsys):
    """The prompt is the beginning of the conversation as its shards hold it, up to the answer."""
    chat = jepa_scale.load(run.parent / "chat")
    example = chat.data.train[0]
    asked = example.messages[0]["content"]
    np.testing.assert_array_equal(chat._prompt(asked, "x"), example.tokens[: example.turns[1].start])
    assert main(["generate", str(run.parent / "chat"), asked, "--max-new-tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert out == f"{chat.generate([asked], 4)[0]}\n" and asked not in out


def test_generation_refuses_with_one_line(run, capsys, monkeypatch):
    for arguments, message in (
        ([" "], "prompts[0]: is empty"),
        (["a", "--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
        (["wave " * 200], "leave no room"),
        (["a", "--draft", "-1"], "--draft -1: must be 0 or more"),
        (["a", "--temperature", "nan"], "--temperature nan: must be 0 or more"),
        (["a", "--draft", "2"], "objective 'lm' has no head that drafts tokens"),
    ):
        assert main(["generate", str(run), *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the wave\n\n")))
    assert main(["generate", str(run)]) == 2
    assert "stdin:2: is an empty text" in capsys.readouterr().err
