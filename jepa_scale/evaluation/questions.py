"""Answers to single questions about facts: a subject and a relation as texts → the generated name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jepa_scale.data.reversal.facts import ReversalData
from jepa_scale.objectives.answers import AnswerGenerator
from jepa_scale.utils.errors import InputError, suggestion


@dataclass(frozen=True, slots=True)
class FactAnswer:
    """An answer to a question about a fact.

    Attributes:
        subject, relation: the question. name: the generated name.
        known: whether it is a name of the data.
    """

    subject: str
    relation: str
    name: str
    known: bool


def questions(data: ReversalData, subjects: Sequence[str], relation: str) -> list[Any]:
    """Return the questions for the objects of a relation, as an evaluation asks them.

    Raises:
        InputError: a subject is no name of the data, or there is no such relation.
    """
    spelling = data.spelling
    if relation not in spelling.relations:
        listed = ", ".join(spelling.relations)
        raise InputError(f"relation {relation!r}: is none of the data's; there are {listed}")
    number, known, found = spelling.relations.index(relation), set(data.names), []
    for subject in subjects:
        name = spelling.read(subject)
        if name not in known:
            texts = (spelling.write(each) for each in data.names)
            like = suggestion(subject, texts, f"they look like {spelling.write(data.names[0])!r}")
            raise InputError(f"subject {subject!r}: is none of the {len(known):,} names of the data; {like}")
        found.append(data.train.question(name, number))
    return found


def answers(
    generator: AnswerGenerator, data: ReversalData, subjects: Sequence[str], relation: str, batch_size: int
) -> list[FactAnswer]:
    """Answer :func:`questions` by an objective's own generator, ``batch_size`` at a time.

    A generated name has no end of its own: as in an evaluation, which compares it up to the length of the right one, it ends where it
    is a known name, the longest one, or else at the length of the longest name.
    """
    asked = questions(data, subjects, relation)
    names = set(data.names)
    longest = max(len(name) for name in names)
    generator.prepare(data.names)
    found: list[FactAnswer] = []
    for start in range(0, len(asked), batch_size):
        for tokens in generator.verbalize(asked[start : start + batch_size], longest):
            ends = [n for n in range(longest, 0, -1) if tokens[:n] in names]
            text = data.spelling.write(tokens[: ends[0]] if ends else tokens)
            found.append(FactAnswer(subjects[len(found)], relation, text, bool(ends)))
    return found
