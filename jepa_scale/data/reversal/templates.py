"""The English wordings of facts: six pairs of relations, and the templates of their sentences.

A relation is named by a noun: the object *is the noun of* the subject. In every template the object's name is last, so that
the question is everything before it. A template takes words of both directions. ``{noun}`` and ``{verb}`` belong to the relation,
``{its_noun}`` and ``{its_verb}`` to its inverse: "Ann's parent is Bob", "Ann is the child of Bob" and "Ann was raised by Bob" all
have the subject Ann and the relation *parent*. So no single word gives the relation away.
"""

from __future__ import annotations

RELATIONS = (
    ("parent", "was raised by"),
    ("child", "raised"),
    ("teacher", "was taught by"),
    ("student", "taught"),
    ("employer", "was hired by"),
    ("employee", "hired"),
    ("landlord", "rented from"),
    ("tenant", "rented to"),
    ("doctor", "was treated by"),
    ("patient", "treated"),
    ("lawyer", "was defended by"),
    ("client", "defended"),
)
"""Noun and verb of each relation; number i ^ 1 is the inverse of number i."""

TRAINING = (
    "The {noun} of {subject} is",
    "{subject}'s {noun} is",
    "{subject} is the {its_noun} of",
    "{subject} {verb}",
    "The person whose {its_noun} is {subject} is",
    "Who do you think is the {noun} of {subject}?",
    "Who, they say, is the {noun} of {subject}?",
    "Who do you think is {subject}'s {noun}?",
    "Who, they say, is {subject}'s {noun}?",
    "Whose {its_noun} do you think is {subject}?",
    "Whose {its_noun}, they say, is {subject}?",
    "Of whom do you think {subject} is the {its_noun}?",
    "Of whom, they say, is {subject} the {its_noun}?",
    "Who do you think {its_verb} {subject}?",
    "Who, they say, {its_verb} {subject}?",
)
"""Templates of the training sentences, without the object's name at the end: statements, and questions with words inserted."""

TEST = (
    "Who is the {noun} of {subject}?",
    "Who is {subject}'s {noun}?",
    "Whose {its_noun} is {subject}?",
    "Of whom is {subject} the {its_noun}?",
    "Who {its_verb} {subject}?",
)
"""Templates of the questions of an evaluation. Training has none of them, but all of their words."""


def worded(template: str, relation: int) -> tuple[str, str]:
    """Return the text before and after the subject's name, with the words of a relation and of its inverse."""
    (noun, verb), (its_noun, its_verb) = RELATIONS[relation], RELATIONS[relation ^ 1]
    before, after = template.split("{subject}")
    words = {"noun": noun, "verb": verb, "its_noun": its_noun, "its_verb": its_verb}
    return before.rstrip().format(**words), after.format(**words)
