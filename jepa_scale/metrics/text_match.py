"""What a generated answer scores against the wanted one: as LLM-JEPA's published evaluation counts, and corrected.

A metric of :data:`METRICS` takes the generated text, as decoded (special tokens left out), and the row's :class:`Wanted`.
It gives ``{name: corrected, name + "_upstream": upstream}``, 1.0 for right and 0.0 for wrong, and what it read.

Upstream is evaluate.py of galilai-group/llm-jepa at 1dce9e7, functions ``generate_response`` and ``eval``; it chooses the
rule by the name of the data file. Before any rule it strips white space and one final ``<|end|>`` of the generation
alone (:func:`upstream_response`).

=================  ============================================  ======================================================
metric             upstream                                      corrected
=================  ============================================  ======================================================
exact_match        NL-RX and all other files: equal strings.     both sides cleaned alike (:func:`clean`): a reference
                   A reference that ends with a space can't be   with a final newline can be met
                   met
starts_with        ``--startswith``, printed beside the other,   cleaned alike; the match must end where a word or a
                   for models that don't stop (Rotten Tomatoes,  number ends: "10" doesn't start with the answer "1"
                   Yelp): the generation begins with the
                   reference
gsm8k              what follows ``#### `` on the last line, not  a number, compared as a number; after the first ``####``
                   the only one, as a string: "72." ≠ "72",      of the generation, else its last number
                   "1,000" ≠ "1000"; without one on either side:
                   right
multiple_choice    HellaSwag: the likeliest of the tokens A, B,  the label that the generation names, among the row's own;
                   C, D, so that the generation is a bare        none, or more than one: wrong
                   letter; equal strings
open_answer        NQ-Open: right if any piece of the            right if there are pieces, and each is, normalised, one
                   generation, cut at "; ", is a substring of    of the wanted answers
                   the wanted answers: "" and "a" are
sql_execution      Spider, see :mod:`jepa_scale.metrics.sql`
=================  ============================================  ======================================================

In the corrected form an empty answer is never right, and a row that no answer could get right is a DataError.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from jepa_scale.metrics.sql import execution, upstream_execution
from jepa_scale.utils.errors import DataError

END = "<|end|>"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a row wants.

    Attributes:
        answer: the reference: what the assistant says in the data.
        name: of the row, for errors, e.g. ``gsm8k_test.jsonl row 17``.
        choices: label → text ('' if the row has none), in order; for multiple choice.
        database: an SQLite file; for SQL.
    """

    answer: str
    name: str = "row"
    choices: Mapping[str, str] = field(default_factory=dict)
    database: Path | None = None


class Score(NamedTuple):
    """``values`` by metric; ``note``: what was read from the generation, or why nothing was, to be saved beside it."""

    values: dict[str, float]
    note: str = ""


Metric = Callable[[str, Wanted], Score]


def clean(text: str) -> str:
    """NFC, newlines as ``\\n``, without white space and ``<|end|>`` at the ends: what is stripped before comparing."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n")).strip()
    while text.endswith(END):
        text = text.removesuffix(END).rstrip()
    return text


def upstream_response(generated: str) -> str:
    """The generation as upstream compares it."""
    text = generated.strip()
    return text.removesuffix(END).strip() if text.endswith(END) else text


def _score(name: str, corrected: bool, upstream: bool, note: str = "") -> Score:
    return Score({name: float(corrected), f"{name}_upstream": float(upstream)}, note)


def _reference(wanted: Wanted) -> str:
    answer = clean(wanted.answer)
    if not answer:
        raise DataError(f"{wanted.name}: the wanted answer is empty, nothing can match it; leave the row out")
    return answer


# ---------------------------------------------------------------------------------------------- whole answers


def exact_match(generated: str, wanted: Wanted) -> Score:
    """The same text, after :func:`clean`."""
    return _score("exact_match", clean(generated) == _reference(wanted), upstream_exact_match(generated, wanted.answer))


def upstream_exact_match(generated: str, answer: str) -> bool:
    return upstream_response(generated) == answer


def starts_with(generated: str, wanted: Wanted) -> Score:
    """The wanted text, and then an end of a word or number, after :func:`clean`."""
    text, answer = clean(generated), _reference(wanted)
    right = text.startswith(answer) and not _goes_on(answer[-1], text[len(answer) :])
    return _score("starts_with", right, upstream_starts_with(generated, wanted.answer))


def upstream_starts_with(generated: str, answer: str) -> bool:
    return upstream_response(generated).startswith(answer)


def _goes_on(last: str, rest: str) -> bool:
    """Does the word or number that ends with ``last`` go on in ``rest``: 1|0, 1|.5, 1|,000, cat|alogue?"""
    if rest and unicodedata.combining(rest[0]):
        return True
    word = re.match(r"\w", last) and re.match(r"\w", rest)
    return bool(word or last.isdigit() and re.match(r"[.,][0-9]", rest))


# ---------------------------------------------------------------------------------------------- GSM8K

MARK = "####"
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]-])[-+\u2212])?"  # after a word, a number or a bracket it would subtract
    r"(?:\\?[$\u20ac\u00a3\u00a5\u20b9](?P<inner>[-\u2212])?)?"  # $5, -$5, $-5; dollar, euro, pound, yen, rupee
    r"(?P<digits>(?<!\w)(?<![0-9]\.)(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
    r"(?P<power>[eE][-+]?[0-9]{1,2}(?!\w))?"
)


def gsm8k(generated: str, wanted: Wanted) -> Score:
    """The same number as the reference has after its ``####``.

    Read from the generation: the first number after its first ``####`` (a model that doesn't stop goes on to another
    problem), none if the line has none; without a ``####``, the last number. Commas between thousands, signs, currency,
    decimals, ``e5`` and what follows the number (a period, a unit, ``%``) don't matter: $1,000.00 is 1000.
    """
    reference = _marked_number(clean(wanted.answer))
    if reference is None:
        raise DataError(f"{wanted.name}: no number after {MARK!r} in the wanted answer; GSM8K's answers end with one")
    text = clean(generated)
    found = _marked_number(text) if MARK in text else _last_number(text)
    note = "no number" if found is None else f"{found:f}"
    return _score("gsm8k", found == reference, upstream_gsm8k(generated, wanted.answer), note)


def upstream_gsm8k(generated: str, answer: str) -> bool:
    return _upstream_marked(upstream_response(generated)) == _upstream_marked(answer)


def _upstream_marked(text: str) -> str | None:
    """What follows ``#### `` at the start of the last line, if there is a line before; one final newline is no line."""
    _, newline, last = text.removesuffix("\n").rpartition("\n")
    return (last.removeprefix("#### ") or None) if newline and last.startswith("#### ") else None


def _marked_number(text: str) -> Decimal | None:
    _, mark, after = text.partition(MARK)
    line = after.lstrip().partition("\n")[0]
    match = NUMBER.search(line) if mark else None
    return None if match is None else _value(match)


def _last_number(text: str) -> Decimal | None:
    last = None
    for last in NUMBER.finditer(text):  # noqa: B007
        pass
    return None if last is None else _value(last)


def _value(match: re.Match[str]) -> Decimal:
    negative = (match["sign"] in ("-", "\u2212")) != bool(match["inner"])
    value = Decimal(match["digits"].replace(",", "") + (match["power"] or ""))
    return value.copy_negate() if negative else value


# ---------------------------------------------------------------------------------------------- multiple choice


ENGLISH = re.compile(r"[ \t]+(?!(?:and|as|because|but|is|nor|or|since)\b)[^\W\d_]")
"""What follows the word "a" or "I", and not the label A or I."""


def multiple_choice(generated: str, wanted: Wanted) -> Score:
    """The generation names the wanted one of ``wanted.choices``, and no other.

    Read, the first rule that finds anything: the whole text is a label, or a choice's text, or both ("(B) Paris");
    "answer is B", "answer: B or C"; labels anywhere, but after "not", as words, one letter in the label's own case. "A" or "I" before most
    words is English, not a label. Who says another choice's text after the label names both. The wanted answer is read in
    the same way.
    """
    if not wanted.choices:
        raise DataError(f"{wanted.name}: no choices; multiple_choice needs the row's labels")
    answer = _labels(_reference(wanted), wanted.choices)
    if len(answer) != 1:
        labels = ", ".join(wanted.choices)
        raise DataError(f"{wanted.name}: the wanted answer {wanted.answer[:60]!r} names {len(answer)} of: {labels}")
    found = _labels(clean(generated), wanted.choices)
    note = " or ".join(sorted(found)) or "no label"
    return _score("multiple_choice", found == answer, upstream_exact_match(generated, wanted.answer), note)


def _labels(text: str, choices: Mapping[str, str]) -> set[str]:
    """The labels that a text names."""
    whole, bare = _plain(text), text.strip("()[]*.: ")
    plain = {label: _plain(label) for label in choices}
    texts = {label: _plain(choice) for label, choice in choices.items() if _plain(choice)}
    named = {label for label in choices if bare == label}
    if whole:
        named = named or {label for label in choices if whole in (plain[label], texts.get(label))}
        named = named or {label for label in texts if whole == f"{plain[label]} {texts[label]}"}
        named = named or {
            x for label in choices for t in texts if whole == f"{plain[label]} {texts[t]}" for x in (label, t)
        }
    if named:
        return named
    # longest first: of "A" and "A1" the latter is meant
    label = "|".join(re.escape(label) for label in sorted(choices, key=len, reverse=True))
    word = rf"(?<![\w'])(?<![0-9][.,])(?<!\bnot )(?<!n't )({label})(?![\w']|[.,][0-9])"
    second = rf"(?:[\s)\]*]*(?:\bor\b|\band\b|[,/&])[\s(\[*]*{word})?"
    stated = re.finditer(rf"\banswer(?:\s+is|\s*:)[\s:(\[*]*{word}{second}", text, re.IGNORECASE)
    named = {name for match in stated for name in choices if _meant(match, 1, name) or _meant(match, 2, name)}
    if named:
        return named
    mentioned = re.finditer(word, text, re.IGNORECASE)
    return {name for match in mentioned for name in choices if _meant(match, 1, name, exact=len(name) == 1)}


def _meant(match: re.Match[str], group: int, label: str, exact: bool = False) -> bool:
    said = match[group]
    if said is None or label in ("A", "a", "I", "i") and ENGLISH.match(match.string, match.end(group)):
        return False
    return said == label if exact else said.casefold() == label.casefold()


def _plain(text: str) -> str:
    """Lower case, words alone: punctuation becomes space."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(" " if c in string.punctuation else c for c in text).split())


# ---------------------------------------------------------------------------------------------- open questions


def open_answer(generated: str, wanted: Wanted) -> Score:
    """Every piece of the generation, cut at ";", is one of the wanted answers, cut likewise; and there is one.

    Compared normalised as SQuAD's and NQ-Open's exact match (Rajpurkar et al., EMNLP 2016; Lee et al., ACL 2019): lower
    case, without punctuation, articles and extra white space.
    """
    answers = {piece for piece in map(_bare, _reference(wanted).split(";")) if piece}
    if not answers:
        raise DataError(f"{wanted.name}: no word in the wanted answer {wanted.answer[:60]!r}; leave the row out")
    said = {piece for piece in map(_bare, clean(generated).split(";")) if piece}
    return _score("open_answer", bool(said) and said <= answers, upstream_open_answer(generated, wanted.answer))


def upstream_open_answer(generated: str, answer: str) -> bool:
    return any(piece in answer for piece in upstream_response(generated).split("; "))


def _bare(text: str) -> str:
    words = "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c not in string.punctuation).split()
    return " ".join([w for w in words if w not in ("a", "an", "the")] or words)  # "The The" is a band


# ---------------------------------------------------------------------------------------------- SQL, and the table


def sql_execution(generated: str, wanted: Wanted) -> Score:
    """The generated query returns what the reference does on ``wanted.database``; the note is its error, if any."""
    if wanted.database is None:
        raise DataError(f"{wanted.name}: no database; sql_execution needs the row's SQLite file")
    query, reference = clean(generated), _reference(wanted)
    right, error = execution(wanted.database, query, reference, row=wanted.name)
    upstream = upstream_execution(wanted.database, upstream_response(generated), wanted.answer)
    return _score("sql_execution", right, upstream, error)


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "starts_with": starts_with,
    "gsm8k": gsm8k,
    "multiple_choice": multiple_choice,
    "open_answer": open_answer,
    "sql_execution": sql_execution,
}
"""Metrics of one generated answer, by the name that a config uses."""
