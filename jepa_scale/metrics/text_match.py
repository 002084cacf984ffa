"""Scores of a generated answer against the reference answer: as in LLM-JEPA's published evaluation, and corrected.

A metric of :data:`METRICS` takes the generated text, as decoded (without special tokens), and the row's :class:`Wanted`.
It returns ``{name: corrected, name + "_upstream": upstream}``, 1.0 for right and 0.0 for wrong, and a note.

Upstream is evaluate.py of galilai-group/llm-jepa at 1dce9e7, functions ``generate_response`` and ``eval``. It chooses the
rule by the name of the data file. Before any rule it strips white space and one final ``<|end|>``, from the generation
only (:func:`upstream_response`).

=================  ============================================  ======================================================
metric             upstream                                      corrected
=================  ============================================  ======================================================
exact_match        NL-RX and all other files: equal strings.     both texts are cleaned (:func:`clean`), so a final space
                   No generation equals a reference that ends    or newline of the reference does not matter
                   with a space
starts_with        ``--startswith``, printed beside exact        both texts are cleaned; the match must end where a word
                   match, for models that don't stop (Rotten     or a number ends: "10" doesn't start with "1"
                   Tomatoes, Yelp): the generation begins with
                   the reference
gsm8k              the text after ``#### `` on the last line,    compared as numbers: the first number after the first
                   which must not be the only line, compared     ``####`` of the generation, or its last number if it has
                   as strings: "72." ≠ "72", "1,000" ≠ "1000".   no ``####``
                   Right if neither side has ``####``
multiple_choice    HellaSwag: the likeliest of the tokens A, B,  the label that the generation names, of the row's labels;
                   C, D, so the generation is a single letter;   wrong if it names none or more than one
                   equal strings
open_answer        NQ-Open: right if any piece of the            right if there are pieces and each of them, normalised,
                   generation, split at "; ", is a substring of  is one of the reference answers
                   the reference; "" and "a" are right
sql_execution      Spider, see :mod:`jepa_scale.metrics.sql`
=================  ============================================  ======================================================

In the corrected form an empty answer is never right. A row for which no answer could be right raises DataError.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import NamedTuple

from jepa_scale.metrics.sql import execution, upstream_execution
from jepa_scale.utils.errors import DataError, InputError
from jepa_scale.utils.importing import imported

END = "<|end|>"


@dataclass(frozen=True, slots=True)
class Wanted:
    """Reference of a row.

    Attributes:
        answer: the reference answer: the assistant's text in the data.
        name: name of the row for errors, e.g. ``gsm8k_test.jsonl row 17``.
        choices: label → text ('' if the choice has none), in order; for multiple choice.
        database: an SQLite file; for SQL.
    """

    answer: str
    name: str = "row"
    choices: Mapping[str, str] = field(default_factory=dict)
    database: Path | None = None


class Score(NamedTuple):
    """Score of a generation.

    Attributes:
        values: by metric.
        note: the answer found in the generation, or why there is none; saved beside the generation.
    """

    values: dict[str, float]
    note: str = ""


Metric = Callable[[str, Wanted], Score]


def clean(text: str) -> str:
    """Normalise a text for comparison: NFC, newlines as ``\\n``, no white space at the ends and no final ``<|end|>``."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n")).strip()
    while text.endswith(END):
        text = text.removesuffix(END).rstrip()
    return text


def upstream_response(generated: str) -> str:
    """Strip a generation as upstream does before comparing it."""
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
    """Score whether the texts are equal after :func:`clean`."""
    return _score("exact_match", clean(generated) == _reference(wanted), upstream_exact_match(generated, wanted.answer))


def upstream_exact_match(generated: str, answer: str) -> bool:
    return upstream_response(generated) == answer


def starts_with(generated: str, wanted: Wanted) -> Score:
    """Score whether the generation starts with the reference, up to the end of a word or number, after :func:`clean`."""
    text, answer = clean(generated), _reference(wanted)
    right = text.startswith(answer) and not _goes_on(answer[-1], text[len(answer) :])
    return _score("starts_with", right, upstream_starts_with(generated, wanted.answer))


def upstream_starts_with(generated: str, answer: str) -> bool:
    return upstream_response(generated).startswith(answer)


def _goes_on(last: str, rest: str) -> bool:
    """Return whether the word or number that ends with ``last`` continues in ``rest``: 1|0, 1|.5, 1|,000, cat|alogue."""
    if rest and unicodedata.combining(rest[0]):
        return True
    word = re.match(r"\w", last) and re.match(r"\w", rest)
    return bool(word or last.isdigit() and re.match(r"[.,][0-9]", rest))


# ---------------------------------------------------------------------------------------------- GSM8K

MARK = "####"
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]-])[-+\u2212])?"  # after a word, a number or a bracket it is a subtraction
    r"(?:\\?[$\u20ac\u00a3\u00a5\u20b9](?P<inner>[-\u2212])?)?"  # $5, -$5, $-5; dollar, euro, pound, yen, rupee
    r"(?P<digits>(?<!\w)(?<![0-9]\.)(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
    r"(?P<power>[eE][-+]?[0-9]{1,2}(?!\w))?"
)


def gsm8k(generated: str, wanted: Wanted) -> Score:
    """Score whether the generation's number equals the number after ``####`` in the reference.

    The generation's number is the first one after its first ``####`` (a model that doesn't stop continues with another
    problem); it has none if there is none on that line. Without a ``####`` it is the last number. Commas between
    thousands, signs, currency, decimals and ``e5`` are parsed, and text after the number (a period, a unit, ``%``) is
    ignored: $1,000.00 is 1000.
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
    """Return the text after ``#### `` at the start of the last line, if there is a line before; ignore one final newline."""
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
"""Text after an English "a" or "I" rather than a label A or I."""


def multiple_choice(generated: str, wanted: Wanted) -> Score:
    """Score whether the generation names the right one of ``wanted.choices`` and no other.

    The first rule that finds a label applies:

    1. the whole text is a label, or a choice's text, or both ("(B) Paris"); a label with another choice's text names both
    2. "answer is B", "answer: B or C"
    3. labels anywhere as words, but not after "not"; a single letter must have the case of the label

    "A" or "I" before most words is English, not a label. The reference is read by the same rules.
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
    """Return the labels that a text names."""
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
    # longest first, so that "A1" does not match as "A"
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
    named = match[group]
    if named is None or label in ("A", "a", "I", "i") and ENGLISH.match(match.string, match.end(group)):
        return False
    return named == label if exact else named.casefold() == label.casefold()


def _plain(text: str) -> str:
    """Reduce a text to its words in lower case; punctuation becomes space."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(" " if c in string.punctuation else c for c in text).split())


# ---------------------------------------------------------------------------------------------- open questions


def open_answer(generated: str, wanted: Wanted) -> Score:
    """Score whether every piece of the generation is one of the reference answers, and there is at least one piece.

    Both texts are split at ";". Pieces are normalised as for the exact match of SQuAD and NQ-Open (Rajpurkar et al., EMNLP
    2016; Lee et al., ACL 2019): lower case, without punctuation, articles and extra white space.
    """
    answers = {piece for piece in map(_bare, _reference(wanted).split(";")) if piece}
    if not answers:
        raise DataError(f"{wanted.name}: no word in the wanted answer {wanted.answer[:60]!r}; leave the row out")
    pieces = {piece for piece in map(_bare, clean(generated).split(";")) if piece}
    return _score("open_answer", bool(pieces) and pieces <= answers, upstream_open_answer(generated, wanted.answer))


def upstream_open_answer(generated: str, answer: str) -> bool:
    return any(piece in answer for piece in upstream_response(generated).split("; "))


def _bare(text: str) -> str:
    words = "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c not in string.punctuation).split()
    return " ".join([w for w in words if w not in ("a", "an", "the")] or words)  # "The The" is a band


# ---------------------------------------------------------------------------------------------- SQL


def sql_execution(generated: str, wanted: Wanted) -> Score:
    """Score whether the generated query returns the reference's rows on ``wanted.database``; the note is its error, if any."""
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
"""Metrics of one generated answer, by their names in a config."""


@cache
def metric_of(name: str) -> Metric:
    """Return a metric of :data:`METRICS`, or the one that ``module:function`` names.

    A function of a user's own takes the same arguments, the generated text and the row's :class:`Wanted`. It returns a number, which
    is reported under the function's name, or a :class:`Score`. It may raise DataError for a row that it cannot score.

    Raises:
        InputError: there is no such function.
    """
    if name in METRICS:
        return METRICS[name]
    function = imported(name, "metrics", "module:function")
    if not callable(function):
        raise InputError(f"metrics: {name!r} is no function")

    def scored(generated: str, wanted: Wanted) -> Score:
        found = function(generated, wanted)
        return found if isinstance(found, Score) else Score({name.partition(":")[2]: float(found)})

    return scored
