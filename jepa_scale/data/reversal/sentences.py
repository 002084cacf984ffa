"""Facts as English sentences: the example, the collection, and the conversion of facts to sentences.

A name is an invented first and last name of several tokens, and the relation is given by words alone
(:mod:`jepa_scale.data.reversal.templates`). ``test`` asks questions in templates that training does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar, overload

import numpy as np

from jepa_scale.data.reversal.facts import KINDS, Facts, Names, ReversalData
from jepa_scale.data.reversal.spelling import WordSpelling
from jepa_scale.data.reversal.templates import RELATIONS, TEST, TRAINING, worded
from jepa_scale.data.sampling.rng import generator
from jepa_scale.packing import IGNORE
from jepa_scale.utils.errors import InputError

VOCABULARY = 1024
"""Most tokens of the vocabulary. The words of the templates are tokens of their own; a name is split, about into syllables."""
SYLLABLES = ["".join(pair) for pair in product("dklmnrt", "aio")]
SPECIAL = {"mask": "<mask>", "pad": "<pad>", "pred": "<PRED>"}
Encode = Callable[[str], tuple[int, ...]]
Decode = Callable[[Sequence[int]], str]


@dataclass(slots=True)
class Sentence:
    """One fact as a sentence, as token ids: ``before``, the subject, ``after``, the object.

    Attributes:
        subject, object: the tokens of two names.
        before, after: the tokens before and after the subject; a space at the end belongs to the name that follows.
        mask: the token that stands for a name.
        kind: ``"train"``, ``"atomic"`` or ``"test"``.
    """

    subject: tuple[int, ...]
    object: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    mask: int
    kind: str

    @property
    def prompt(self) -> tuple[int, ...]:
        """Return the tokens of the question."""
        return (*self.before, *self.subject, *self.after)

    @property
    def answer(self) -> tuple[int, ...]:
        return self.object

    @property
    def carrier(self) -> tuple[int, ...]:
        """Return the sentence with a mask in the position of each name."""
        return (*self.before, self.mask, *self.after, self.mask)

    @property
    def spans(self) -> tuple[range, range]:
        """Return the positions of the two names in the sentence."""
        start, end = len(self.before), len(self.prompt)
        return range(start, start + len(self.subject)), range(end, end + len(self.object))

    def lm_sequence(self) -> tuple[list[int], list[int]]:
        """Return all n tokens and n labels: ``labels[t]`` is predicted at position t. Only the answer has labels."""
        tokens = [*self.prompt, *self.object]
        return tokens, [*[IGNORE] * (len(self.prompt) - 1), *self.object, IGNORE]


@dataclass(frozen=True, slots=True, eq=False)
class Sentences(Facts):
    """S sentences as arrays; ``sentences[i]`` is a :class:`Sentence`.

    Attributes:
        relations: (2R,) int32, the relations' numbers themselves: no token stands for one of them.
        template: (S,) int32 rows of ``before`` and ``after``.
        before, after: the texts before and after the subject, of all templates with the words of each relation.
    """

    template: np.ndarray
    before: Names
    after: Names

    columns: ClassVar[tuple[str, ...]] = (*Facts.columns, "template")

    @overload  # type: ignore[override]  # an example of its own, which has no relation token
    def __getitem__(self, index: int) -> Sentence: ...
    @overload
    def __getitem__(self, index: slice) -> Sentences: ...
    def __getitem__(self, index: int | slice) -> Sentence | Sentences:
        if isinstance(index, slice):
            return self.select(index)
        fact, template = Facts.__getitem__(self, index), int(self.template[index])
        return Sentence(fact.subject, fact.object, self.before[template], self.after[template], self.mask, fact.kind)

    def question(self, subject: tuple[int, ...], relation: int) -> Sentence:
        """See the base class; the question is in the first template of ``test``."""
        template = relation * (len(TRAINING) + len(TEST)) + len(TRAINING)
        return Sentence(subject, subject, self.before[template], self.after[template], self.mask, "test")

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Return the (m,) int64 token counts of the sentences with those numbers."""
        words = self.before.lengths + self.after.lengths
        names = self.names.lengths
        total = names[self.subject[numbers]] + names[self.object[numbers]] + words[self.template[numbers]]
        return total.astype(np.int64)

    @property
    def wording(self) -> tuple[np.ndarray, ...]:
        return (self.before.tokens, self.after.tokens)


def as_sentences(data: ReversalData, count: int, seed: int) -> ReversalData:
    """Return generated facts as sentences: ``count`` of each fact to train on, and one question for each of ``test``.

    The evaluation splits ``train`` and ``atomic`` have a fact's first sentence. ``atomic_questions`` asks the facts of
    ``atomic`` by the templates of ``test``: who fails there fails to read the question, not to reverse the fact. The result
    depends on the arguments alone.

    Raises:
        InputError: there are no words for so many relations.
    """
    relations = len(data.special["relations"])
    if relations > len(RELATIONS):
        raise InputError(
            f"data.relations: {relations // 2} pairs, but sentences have words for {len(RELATIONS) // 2} only; lower it, or "
            "set data.form=tokens"
        )
    texts = [worded(template, r) for r in range(relations) for template in (*TRAINING, *TEST)]
    spelled = _spell(data.names, seed)
    encode, decode, special, size = _tokenizer(
        [" ".join(text) for text in texts], sorted({w for name in spelled for w in name})
    )
    names = [(*encode(first), *encode(last)) for first, last in spelled]
    order = sorted(range(len(names)), key=names.__getitem__)
    table = Names.from_tuples([names[i] for i in order])
    row_of = np.argsort(order).astype(np.int32)
    before, after = (Names.from_tuples([encode(text) for text in part]) for part in zip(*texts, strict=True))

    def sentences(facts: Facts, chosen: np.ndarray) -> Sentences:
        """Write each fact in its templates, the row of numbers of the (F, n) ``chosen``, one after the other."""
        rows = np.repeat(np.arange(len(facts)), chosen.shape[1])
        relation = facts.relation[rows]
        template = (relation * (len(TRAINING) + len(TEST)) + chosen.ravel()).astype(np.int32)
        columns = (row_of[facts.subject[rows]], relation, row_of[facts.object[rows]], facts.kind[rows], template)
        return Sentences(table, np.arange(relations, dtype=np.int32), special["mask"], *columns, before, after)

    def questions(split: str) -> Sentences:
        facts = data.splits[split]
        rng = generator(f"reversal/{seed}/questions/{split}")
        return sentences(facts, len(TRAINING) + rng.integers(0, len(TEST), (len(facts), 1)))

    every = np.tile(np.arange(len(TRAINING)), (len(data.train), 1))
    chosen = generator(f"reversal/{seed}/statements").permuted(every, axis=1)[:, :count]
    first = sentences(data.train, chosen[:, :1])
    splits: dict[str, Facts] = {split: first.select(first.kind == KINDS.index(split)) for split in ("train", "atomic")}
    splits |= {"test": questions("test"), "atomic_questions": questions("atomic")}
    return replace(
        data,
        names=table,
        train=sentences(data.train, chosen),
        splits=splits,
        vocab_size=size,
        special=special,
        spelling=WordSpelling([noun for noun, _ in RELATIONS[:relations]], encode, decode),
    )


def _spell(names: Names, seed: int) -> list[tuple[str, str]]:
    """Invent a first and a last word for each name, (N,); equal tokens get equal words, each with the space before it.

    All first words are equally long, and all last words too. So no name is the beginning of another.
    """
    rng = generator(f"reversal/{seed}/spelling")
    columns = []
    for column in names.tokens.T:
        tokens, number = np.unique(column, return_inverse=True)
        length = 2
        while len(SYLLABLES) ** length < 2 * len(tokens):
            length += 1
        codes = rng.choice(len(SYLLABLES) ** length, len(tokens), replace=False)
        digits = np.stack(np.unravel_index(codes, [len(SYLLABLES)] * length), axis=1)
        words = ["".join(SYLLABLES[i] for i in each).capitalize() for each in digits]
        columns.append([f" {words[i]}" for i in number])
    return list(zip(*columns, strict=True))


def _tokenizer(texts: list[str], words: list[str]) -> tuple[Encode, Decode, dict[str, Any], int]:
    """Train a byte-level BPE tokenizer on texts and words; return its encoder, its decoder, special ids and vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, min_frequency=2, special_tokens=[*SPECIAL.values()], show_progress=False
    )
    tokenizer.train_from_iterator([*texts, *words], trainer)
    special = {name: tokenizer.token_to_id(token) for name, token in SPECIAL.items()}

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=False))

    return lambda text: tuple(tokenizer.encode(text).ids), decode, special, tokenizer.get_vocab_size()
