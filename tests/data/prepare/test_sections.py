"""Passages labelled by section: what they hold, that none shares text with another, and that only the corpus decides."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.cli.main import main
from jepa_scale.config.parsing import parse_section
from jepa_scale.data.labelled import read_labelled
from jepa_scale.data.prepare.section_options import SHARED, SectionOptions
from jepa_scale.data.prepare.sections import _Body, _cut, passages
from jepa_scale.utils.errors import InputError

SMALL = SectionOptions(min_words=12, max_words=20, per_class=3)


def prose(seed: int, words: int, sentence: int = 7) -> str:
    """Words that stand nowhere else, in sentences, in lines of ten."""
    rng = random.Random(seed)
    made = [f"w{seed}x{rng.randrange(10**6)}" + ("." if i % sentence == sentence - 1 else "") for i in range(words)]
    return "\n".join(" ".join(made[i : i + 10]) for i in range(0, words, 10))


def wikitext(folder: Path) -> Path:
    """Three articles, one of which has a sub-heading, and two of the same name."""
    parts = [
        f" = Crab = \n \n {prose(1, 60)} \n = = Diet = = \n {prose(2, 60)} \n",
        f" = Lobster = \n \n {prose(3, 90)} \n",
        f" = <unk> = \n \n {prose(4, 90)} \n",
        f" = <unk> = \n \n {prose(5, 90)} \n",
        f" = Short = \n \n {prose(6, 20)} \n",
    ]
    path = folder / "wiki.txt"
    path.write_text(" \n".join(parts))
    return path


def test_articles_are_labels_and_headings_are_nowhere(tmp_path):
    made = passages([str(wikitext(tmp_path))], SMALL)
    assert Counter(row["label"] for row in made.rows) == {"Crab": 3, "Lobster": 3}
    assert (made.sections, made.too_short, made.unclear) == (4, 1, 1)
    text = " ".join(row["text"] for row in made.rows)
    assert "=" not in text and "Crab" not in text and "Diet" not in text
    for row in made.rows:
        assert 12 <= len(row["text"].split()) <= 20 and row["text"] == row["text"].strip()
        ends = {word.partition("x")[0] for word in row["text"].split()}
        assert len(ends) == 1  # none goes across the sub-heading


def test_files_are_labelled_by_name_or_folder(tmp_path):
    for name, seed in (("a.txt", 1), ("sub/x.txt", 2), ("sub/deep/y.txt", 3)):
        (tmp_path / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "docs" / name).write_text(f"Title of it\n===========\n\n{prose(seed, 40)}\n")
    made = passages([str(tmp_path / "docs")], SMALL.model_copy(update={"per_class": 2}))
    assert Counter(row["label"] for row in made.rows) == {"a.txt": 2, "sub": 2}
    assert "Title" not in json.dumps(made.rows) and "===" not in json.dumps(made.rows)
    files = sorted(map(str, (tmp_path / "docs" / "sub").rglob("*.txt")))
    made = passages(files, SMALL.model_copy(update={"per_class": 2}))
    assert {row["label"] for row in made.rows} == {"deep", "x.txt"}


def test_only_the_corpus_and_the_seed_decide(tmp_path):
    for place in ("here", "elsewhere/far"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        for seed in range(6):
            (folder / f"{seed}.txt").write_text(prose(seed, 200))
    options = SMALL.model_copy(update={"max_classes": 3})
    here, there = (passages([str(tmp_path / place)], options) for place in ("here", "elsewhere/far"))
    assert here == there
    assert len({row["label"] for row in here.rows}) == 3
    others = [passages([str(tmp_path / "here")], options.model_copy(update={"seed": seed})).rows for seed in (1, 2)]
    assert here.rows != others[0] != others[1]


def test_text_of_several_sections_counts_to_the_shortest(tmp_path):
    chapter, other = prose(1, 60), prose(2, 60)
    (tmp_path / "book.txt").write_text(f"{prose(3, 60)}\n{chapter}\n{prose(4, 60)}\n")
    (tmp_path / "chapter.txt").write_text(chapter)
    (tmp_path / "twice.txt").write_text(f"{other}\n{other}\n")
    made = passages([str(tmp_path)], SMALL)
    assert Counter(row["label"] for row in made.rows) == {"book.txt": 3, "chapter.txt": 3, "twice.txt": 3}
    runs = [
        tuple(words[i : i + SHARED])
        for row in made.rows
        if (words := row["text"].split())
        for i in range(len(words) - SHARED + 1)
    ]
    assert len(set(runs)) == len(runs)
    everything = passages([str(tmp_path)], SMALL.model_copy(update={"per_class": 4}))
    assert {row["label"] for row in everything.rows} == {"book.txt", "chapter.txt", "twice.txt"}
    with pytest.raises(InputError, match="1 of 3 sections"):  # five of them would do, did text count twice
        passages([str(tmp_path)], SMALL.model_copy(update={"per_class": 5}))


@settings(max_examples=40)
@given(st.integers(0, 999), st.integers(0, 120), st.integers(2, 30), st.integers(12, 20), st.integers(0, 20))
def test_passages_follow_each_other_and_end_with_a_sentence_if_they_can(seed, words, sentence, least, more):
    text = prose(seed, words, sentence)
    options = SectionOptions(min_words=least, max_words=least + more)
    body = _Body.of([f"{text}\n\nHeading\n-------\n{text}"])
    before = 0
    for passage in _cut(body, options):
        assert passage.start >= before and least <= len(passage) <= least + more
        blocks = {body.words[i][0] for i in passage}
        assert len(blocks) == 1
        assert body.text(passage).split() == [body.word(i) for i in passage]
        ends = [i for i in passage if body.word(i).endswith(".") and i - passage.start + 1 >= least]
        if ends:
            assert ends == [passage.stop - 1]
        elif len(passage) < least + more:  # the block ends here
            assert passage.stop == len(body.words) or body.words[passage.stop][0] not in blocks
        before = passage.stop


def test_what_every_python_carries():
    made = passages(["python_docs"], SectionOptions(per_class=10))
    counts = Counter(row["label"] for row in made.rows)
    assert len(counts) >= 10 and set(counts.values()) == {10}
    assert "comparisons" in counts
    assert not any("****" in row["text"] for row in made.rows)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (["nowhere"], r"nowhere: no such file or folder; correct the path, or use python_docs"),
        (["rows.jsonl"], "rows.jsonl: holds jsonl, not text files"),
        (["a.txt"], r"a.txt: 1 of 1 sections have 3 passages, and two are needed; give a corpus with more"),
        (["a.txt", "short.txt"], r"1 of 2 sections have 3 passages, and two are needed; lower per-class to 1 or less"),
        (["a.txt", "bad.txt"], "bad.txt:1: invalid UTF-8"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(prose(1, 90))
    (tmp_path / "short.txt").write_text(prose(2, 25))
    (tmp_path / "bad.txt").write_bytes(b"\xff\n")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=message):
        passages(source, SMALL)


def test_options_that_contradict_each_other():
    with pytest.raises(InputError, match="max_words: 20 is less than min_words=30"):
        parse_section(SectionOptions, {"max_words": 20}, "")


def test_the_command_writes_what_a_probe_reads(tmp_path, capsys):
    file = wikitext(tmp_path)
    shutil.copy(file, tmp_path / "more.txt")
    out = tmp_path / "sections.jsonl"
    flags = ["--min-words", "12", "--max-words", "20", "--per-class", "3", "--out", str(out)]
    assert main(["data", "sections", str(file), *flags]) == 0
    said = capsys.readouterr().out
    assert f"{out}: 6 passages of 2 sections, 3 each, " in said and "1 names are of several articles" in said
    found = read_labelled(out, 0.3)
    assert found.classes == ["Crab", "Lobster"] and found.train.tolist().count(False) == 2
    assert main(["data", "sections", str(file), "--per-class", "99", "--out", str(out)]) == 2
    assert main(["data", "sections", str(file), "--min-words", "2", "--out", str(out)]) == 2
    assert main(["data", "sections", str(file), *flags[:-1], str(tmp_path / "no" / "x.jsonl")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and "min_words" in errors[1] and "there is no folder" in errors[2]
    assert main(["data", "sections", str(file), str(tmp_path / "more.txt"), *flags]) == 2  # every title twice
