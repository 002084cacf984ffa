"""Scores of answers: tables with the corrected and the upstream verdict, and relations that hold between the two."""

from __future__ import annotations

import re
import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.metrics.text_match import (
    METRICS,
    Score,
    Wanted,
    clean,
    exact_match,
    gsm8k,
    multiple_choice,
    open_answer,
    sql_execution,
    starts_with,
    upstream_exact_match,
    upstream_gsm8k,
    upstream_open_answer,
    upstream_starts_with,
)
from jepa_scale.utils.errors import DataError


def verdicts(score: Score, name: str) -> tuple[bool, bool]:
    """Return the corrected and the upstream score."""
    assert set(score.values) == {name, f"{name}_upstream"}
    assert set(score.values.values()) <= {0.0, 1.0}
    return score.values[name] == 1.0, score.values[f"{name}_upstream"] == 1.0


@pytest.mark.parametrize(
    ("generated", "answer", "right", "upstream"),
    [
        (r"(dog)(.*)", r"(dog)(.*)", True, True),
        ("  .*a.*\n", ".*a.*", True, True),
        (".*a.*<|end|>", ".*a.*", True, True),
        (".*a.* <|end|> <|end|>", ".*a.*", True, False),
        (".*a.*", ".*a.* ", True, False),
        ("a\nb", "a\r\nb", True, False),
        ("caf\u00e9", "cafe\u0301", True, False),
        (".*A.*", ".*a.*", False, False),
        (".* a.*", ".*a.*", False, False),
        ("", ".*a.*", False, False),
        ("<|end|>", ".*a.*", False, False),
        (".*a.*.*", ".*a.*", False, False),
    ],
)
def test_exact_match(generated, answer, right, upstream):
    assert verdicts(exact_match(generated, Wanted(answer)), "exact_match") == (right, upstream)


@pytest.mark.parametrize(
    ("generated", "answer", "right", "upstream"),
    [
        ("Good", "Good", True, True),
        ("Good movie Good", "Good", True, True),
        (" Good.", "Good", True, True),
        ("Goodness", "Good", False, True),
        ("1", "1", True, True),
        ("10", "1", False, True),
        ("1.5", "1", False, True),
        ("1,000", "1", False, True),
        ("1. Because", "1", True, True),
        ("1, I think", "1", True, True),
        ("cafe\u0327", "cafe", False, True),
        ("Good\u0332", "Good", False, True),  # no composed form: still one letter
        (".*a.*[b-z]", ".*a.*", True, True),
        ("1 star", "1\n", True, False),
        ("Bad", "Good", False, False),
        ("", "Good", False, False),
        ("Goo", "Good", False, False),
    ],
)
def test_starts_with(generated, answer, right, upstream):
    assert verdicts(starts_with(generated, Wanted(answer)), "starts_with") == (right, upstream)


@pytest.mark.parametrize(
    ("generated", "answer", "right", "upstream"),
    [
        ("48/2 = <<48/2=24>>24\n#### 72", "72", True, True),
        ("so\n#### 72.", "72", True, False),
        ("so\n#### 72.00", "72", True, False),
        ("so\n#### $72", "72", True, False),
        ("so\n#### -$72", "-72", True, False),
        ("so\n#### $-72", "-72", True, False),
        ("so\n#### \u221272", "-72", True, False),
        ("so\n#### +72", "72", True, False),
        ("so\n#### 72%", "72", True, False),
        ("so\n#### 72 clips in 2 months", "72", True, False),
        ("so\n#### \\$1,234,567", "1234567", True, False),
        ("so\n#### 1000", "1,000", True, False),
        ("so\n#### .5", "0.5", True, False),
        ("so\n####72", "72", True, False),
        ("so\n####\n72", "72", True, False),
        ("#### 72", "72", True, False),  # upstream wants a line before
        ("so\n#### 7.2e1", "72", True, False),
        ("so\n#### 72\n\nQuestion: 2 + 3?\n#### 5", "72", True, False),
        ("so\n#### 5\n\nQuestion: 70 + 2?\n#### 72", "72", False, True),  # the answer to another problem
        ("so\n#### 720", "72", False, False),
        ("so\n#### 7 2", "72", False, False),
        ("so\n#### 72.5", "72", False, False),
        ("so\n#### -72", "72", False, False),
        ("the answer is 72\n####", "72", False, False),
        ("the answer is 72\n#### none", "72", False, False),
        # no mark: the last number
        ("The answer is 72.", "72", True, False),
        ("The answer is \\boxed{72}", "72", True, False),
        ("**-72**", "-72", True, False),
        ("80-8=72", "72", True, False),
        ("100-72", "72", True, False),  # not minus 72
        ("(100)-72", "72", True, False),
        ("It's 72... or so", "72", True, False),
        ("It is ...72", "72", True, False),
        ("72kg of CO2", "72", True, False),
        ("version 1.2.72", "1.2", True, False),
        ("72 or 73", "72", False, False),
        ("seventy-two", "72", False, False),
        ("", "72", False, False),
        ("####", "72", False, False),
    ],
)
def test_gsm8k(generated, answer, right, upstream):
    assert verdicts(gsm8k(generated, Wanted(f"Some steps: 3*4=12\n#### {answer}")), "gsm8k") == (right, upstream)


def test_gsm8k_notes_what_it_read():
    wanted = Wanted("x\n#### 5")
    assert gsm8k("so it is $1,250.50", wanted).note == "1250.50"
    assert gsm8k("I don't know", wanted).note == "no number"


def test_upstream_counts_nothing_as_nothing():
    assert upstream_gsm8k("no idea", "an answer without a mark")
    assert upstream_open_answer("", "paris; rome")
    assert upstream_starts_with("anything", "")
    assert upstream_exact_match(" ", "")


@given(st.text(st.sampled_from("#7 \n\rx"), max_size=14), st.text(st.sampled_from("#7 \n\rx"), max_size=14))
def test_upstream_gsm8k_is_the_published_pattern(generated, answer):
    def read(text):
        match = re.search(r"\n#### (.+)$", text)
        return match and match[1]

    assert upstream_gsm8k(generated, answer) == (read(generated.strip()) == read(answer))


@given(st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**9), max_value=10**9), st.data())
def test_a_number_is_read_however_it_is_written(value, data):
    currency = data.draw(st.sampled_from(["", "$", "\u20ac", "\\$"]))
    digits = f"{abs(value):{data.draw(st.sampled_from([',', '']))}.2f}"
    written = ("-" if value < 0 else "") + currency + digits
    text = data.draw(st.sampled_from(["x\n#### {}", "#### {} apples.", "so 3 and {}.", "= {}", "({})"])).format(written)
    assert verdicts(gsm8k(text, Wanted(f"#### {value}")), "gsm8k")[0]
    assert not verdicts(gsm8k(text, Wanted(f"#### {value + 1}")), "gsm8k")[0]


CAPITALS = {"A": "London", "B": "Paris", "C": "Vitamin A", "D": "a dog"}


@pytest.mark.parametrize(
    ("generated", "answer", "right", "upstream"),
    [
        ("B", "B", True, True),
        (" b.", "B", True, False),
        ("(B)", "B", True, False),
        ("**B**", "B", True, False),
        ("[B]: Paris", "B", True, False),
        ("B) Paris", "B", True, False),
        ("B) Paris is the capital", "B", True, False),
        ("paris.", "B", True, False),
        ("The answer is B.", "B", True, False),
        ("the answer is (b)", "B", True, False),
        ("Answer: B\nA is London, C is not", "B", True, False),
        ("Option B, because of the tower", "B", True, False),
        ("It's not A, it's B", "B", True, False),
        ("The answer is B, not C", "B", True, False),
        ("A because it rains", "A", True, False),
        ("A\nBecause it rains", "A", True, False),
        ("C) Vitamin A", "C", True, False),
        ("Vitamin A", "C", True, False),
        ("a dog", "D", True, False),
        ("A", "A", True, True),
        ("B", "B) Paris", True, False),  # a reference that spells out label and text
        # more than one, or none
        ("A or B", "B", False, False),
        ("The answer is B or C.", "B", False, False),
        ("The answer is (B) and (C).", "B", False, False),
        ("The answer is not B", "B", False, False),
        ("It isn't B", "B", False, False),
        ("B because A is wrong", "B", False, False),
        ("B) London", "B", False, False),
        ("B) London", "A", False, False),
        ("The answer is B. The answer is C.", "B", False, False),
        ("A) London\nB) Paris\nC) Vitamin A", "B", False, False),
        ("A big dog", "A", False, False),  # English
        ("the answer is a big one", "A", False, False),
        ("Bob", "B", False, False),
        ("the plan b of old", "B", False, False),
        ("B's", "B", False, False),
        ("E", "B", False, False),
        ("A", "B", False, False),
        ("", "B", False, False),
        ("...", "B", False, False),
        ("don't know", "B", False, False),
    ],
)
def test_multiple_choice(generated, answer, right, upstream):
    assert verdicts(multiple_choice(generated, Wanted(answer, choices=CAPITALS)), "multiple_choice") == (
        right,
        upstream,
    )


@pytest.mark.parametrize(
    ("generated", "answer", "labels", "right"),
    [
        ("I choose 2", "2", "1 2 3", True),
        ("2.", "2", "1 2 3", True),
        ("2.5", "2", "1 2 3", False),
        ("1.2", "2", "1 2 3", False),
        ("12", "2", "1 2 3", False),
        ("2 of 3", "2", "1 2 3", False),
        ("Yes, they do", "yes", "yes no maybe", True),
        ("nothing", "no", "yes no maybe", False),
        ("yes and no", "yes", "yes no maybe", False),
        ("A1", "A1", "A A1", True),
        ("I say A1", "A1", "A A1", True),
        ("I say A-1", "A-1", "A A-1", True),
        ("A1", "A", "A A1", False),
        ("+", "+", "+ -", True),
        ("the sign is +", "+", "+ -", True),
        ("a", "a", "a A", True),
    ],
)
def test_labels_of_the_row(generated, answer, labels, right):
    wanted = Wanted(answer, choices=dict.fromkeys(labels.split(), ""))
    assert verdicts(multiple_choice(generated, wanted), "multiple_choice")[0] is right


def test_multiple_choice_notes_what_it_read():
    assert multiple_choice("A or B", Wanted("B", choices=CAPITALS)).note == "A or B"
    assert multiple_choice("?", Wanted("B", choices=CAPITALS)).note == "no label"


@pytest.mark.parametrize(
    ("generated", "right", "upstream"),
    [
        ("Paris", True, True),
        ("paris.", True, False),
        ("The City of Light", True, False),
        ("Paris; City of Light", True, True),
        ("Paris; Rome", False, True),
        ("City", False, True),
        ("i", False, True),
        ("", False, True),
        ("; ", False, True),
        ("; Rome", False, True),
        ("Rome", False, False),
    ],
)
def test_open_answer(generated, right, upstream):
    assert verdicts(open_answer(generated, Wanted("Paris; City of Light")), "open_answer") == (right, upstream)


def test_articles_alone_are_an_answer():
    assert verdicts(open_answer("the the", Wanted("The The")), "open_answer")[0]


def test_sql_execution(tmp_path):
    path = tmp_path / "a.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript("CREATE TABLE t (a); INSERT INTO t VALUES (1), (2);")
    connection.close()
    wanted = Wanted("SELECT a FROM t WHERE a > 2\n", name="row 4", database=path)
    assert verdicts(sql_execution(" SELECT a FROM t WHERE 0;<|end|>", wanted), "sql_execution") == (True, True)
    failed = sql_execution("SELECT b FROM t", wanted)
    assert verdicts(failed, "sql_execution") == (False, True)
    assert failed.note == "no such column: b"
    assert verdicts(sql_execution("", wanted), "sql_execution") == (False, True)


def test_a_row_that_nothing_can_match_names_itself(tmp_path):
    rows = [
        ("exact_match", Wanted(" \n"), "empty"),
        ("starts_with", Wanted("<|end|>"), "empty"),
        ("gsm8k", Wanted("the answer is 72"), "no number after '####'"),
        ("gsm8k", Wanted("72\n#### none"), "no number after '####'"),
        ("multiple_choice", Wanted("B"), "no choices"),
        ("multiple_choice", Wanted("E", choices=CAPITALS), "names 0 of: A, B, C, D"),
        ("multiple_choice", Wanted("A or B", choices=CAPITALS), "names 2 of"),
        ("open_answer", Wanted(" ; !"), "no word"),
        ("sql_execution", Wanted("SELECT 1"), "no database"),
        ("sql_execution", Wanted("SELECT 1", database=tmp_path / "none"), "unable to open"),
    ]
    assert {name for name, _, _ in rows} == set(METRICS)
    for name, wanted, says in rows:
        with pytest.raises(DataError, match=f"^row: .*{says}"):
            METRICS[name]("anything", wanted)


texts = st.text(st.sampled_from("aA1. ,;#\n\r\u00e9e\u0301<|end>")) | st.text(
    st.characters(max_codepoint=0x2FF), max_size=9
)


@given(texts)
def test_every_answer_matches_itself(text):
    wanted = Wanted(text)
    if not clean(text):
        return
    for metric in (exact_match, starts_with):
        assert verdicts(metric(text, wanted), metric.__name__)[0]
    assert clean(clean(text)) == clean(text)


@given(texts, texts, st.sampled_from(["", "same", "longer"]))
def test_exact_implies_starts_with_in_both_forms(generated, answer, kind):
    generated = {"": generated, "same": f" {answer}\n", "longer": answer + generated}[kind]
    if not clean(answer):
        return
    exact = verdicts(exact_match(generated, Wanted(answer)), "exact_match")
    begins = verdicts(starts_with(generated, Wanted(answer)), "starts_with")
    assert exact[0] <= begins[0] and exact[1] <= begins[1]


@pytest.mark.parametrize("empty", ["", " ", "\n\t", "<|end|>", " <|end|><|end|> "])
@pytest.mark.parametrize("name", sorted(METRICS))
def test_an_empty_answer_is_never_right(tmp_path, name, empty):
    path = tmp_path / "a.sqlite"
    sqlite3.connect(path).close()
    answer = {"gsm8k": "x\n#### 0", "multiple_choice": "A", "sql_execution": "SELECT 1 WHERE 0"}.get(name, "x")
    wanted = Wanted(answer, choices={"A": "", "B": ""}, database=path)
    assert METRICS[name](empty, wanted).values[name] == 0.0
