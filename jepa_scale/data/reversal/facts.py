"""Facts (subject, relation, object) and their reverses: the example, the collection, the generator.

A fact is the question ``subject relation <mask>`` and the answer ``object``. Every relation has an inverse, a
token of its own. The training data hold facts about entities of set A in both directions (kind ``train``), and about
pairs of set B in one direction only (kind ``atomic``); the other direction is held out (kind ``test``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any, ClassVar, Self, overload

import numpy as np

from jepa_scale.data.base import Kind
from jepa_scale.data.reversal.spelling import Spelling, TokenSpelling, token_strings
from jepa_scale.data.sampling.order import Permuted, shuffled
from jepa_scale.data.sampling.rng import generator
from jepa_scale.packing import IGNORE
from jepa_scale.utils.errors import InputError

KINDS = ("train", "atomic", "test")
TRAIN, ATOMIC, TEST = range(3)


@dataclass(slots=True)
class Fact:
    """One fact, as token ids.

    Attributes:
        subject, object: the tokens of two names.
        relation, inverse: the relation's token, and that of its inverse.
        mask: the token between question and answer.
        kind: ``"train"``, ``"atomic"`` or ``"test"``.
    """

    subject: tuple[int, ...]
    relation: int
    mask: int
    object: tuple[int, ...]
    kind: str
    inverse: int

    @property
    def prompt(self) -> tuple[int, ...]:
        """Return the tokens of the question."""
        return (*self.subject, self.relation, self.mask)

    @property
    def answer(self) -> tuple[int, ...]:
        return self.object

    def lm_sequence(self) -> tuple[list[int], list[int]]:
        """Return all n tokens and n labels: ``labels[t]`` is predicted at position t. Only the answer has labels."""
        tokens = [*self.subject, self.relation, self.mask, *self.object]
        labels = [*[IGNORE] * (len(self.subject) + 1), *self.object, IGNORE]
        return tokens, labels


@dataclass(frozen=True, slots=True, eq=False)
class Names(Sequence[tuple[int, ...]]):
    """A sequence of N distinct names, sorted; each is a tuple of token ids.

    Attributes:
        tokens: (N, longest) int32, each row filled up with -1.
        lengths: (N,) int32.
    """

    tokens: np.ndarray
    lengths: np.ndarray

    @classmethod
    def from_tuples(cls, names: Sequence[tuple[int, ...]]) -> Names:
        lengths = np.array([len(n) for n in names], dtype=np.int32)
        tokens = np.full((len(names), max(lengths, default=0)), -1, dtype=np.int32)
        for row, name in zip(tokens, names, strict=True):
            row[: len(name)] = name
        return cls(tokens, lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> Names: ...
    def __getitem__(self, index: int | slice) -> tuple[int, ...] | Names:
        if isinstance(index, slice):
            return Names(self.tokens[index], self.lengths[index])
        return tuple(self.tokens[index, : self.lengths[index]].tolist())

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        for tokens, length in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True):
            yield tuple(tokens[:length])


@dataclass(frozen=True, slots=True, eq=False)
class Facts(Sequence[Fact]):
    """F facts as arrays; ``facts[i]`` is a :class:`Fact`, ``facts[a:b]`` are Facts.

    Attributes:
        names: the names that ``subject`` and ``object`` are rows of.
        relations: (2R,) int32 token ids; the inverse of number i is number i ^ 1.
        mask: token id.
        subject, object: (F,) int32 rows of ``names``.
        relation: (F,) int32 numbers into ``relations``.
        kind: (F,) uint8 numbers into ``KINDS``.
    """

    names: Names
    relations: np.ndarray
    mask: int
    subject: np.ndarray
    relation: np.ndarray
    object: np.ndarray
    kind: np.ndarray

    columns: ClassVar[tuple[str, ...]] = ("subject", "relation", "object", "kind")
    """The arrays with a row for each fact."""

    def __len__(self) -> int:
        return len(self.kind)

    @overload
    def __getitem__(self, index: int) -> Fact: ...
    @overload
    def __getitem__(self, index: slice) -> Facts: ...
    def __getitem__(self, index: int | slice) -> Fact | Facts:
        if isinstance(index, slice):
            return self.select(index)
        relation = self.relation[index]
        return Fact(
            self.names[self.subject[index]],
            int(self.relations[relation]),
            self.mask,
            self.names[self.object[index]],
            KINDS[self.kind[index]],
            int(self.relations[relation ^ 1]),
        )

    def question(self, subject: tuple[int, ...], relation: int) -> Any:
        """Return the example that asks for the object of a subject and a relation, by its number, as the split ``test`` does.

        Its ``object``, which is not known, is the subject.
        """
        own, inverse = (int(self.relations[number]) for number in (relation, relation ^ 1))
        return Fact(subject, own, self.mask, subject, KINDS[TEST], inverse)

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Return the (m,) int64 token counts of the facts with those numbers."""
        lengths = self.names.lengths
        return (lengths[self.subject[numbers]] + lengths[self.object[numbers]] + 2).astype(np.int64)

    @property
    def max_size(self) -> int:
        return int(self.sizes(np.arange(len(self))).max())

    @property
    def mean_size(self) -> float:
        return float(self.sizes(np.arange(len(self))).mean())

    def select(self, rows: np.ndarray | slice) -> Self:
        """Return the facts of some rows (numbers, a boolean mask or a slice)."""
        return replace(self, **{column: getattr(self, column)[rows] for column in self.columns})

    @property
    def wording(self) -> tuple[np.ndarray, ...]:
        """Arrays of tokens that the examples have beside names and relations: none."""
        return ()

    def codes(self) -> np.ndarray:
        """Return an (F,) int64 code of each fact, equal exactly for equal facts (of the same ``names`` and
        ``relations``)."""
        code = self.subject.astype(np.int64) * len(self.relations) + self.relation
        return code * len(self.names) + self.object


@dataclass(frozen=True, eq=False)
class ReversalData:
    """A :class:`~jepa_scale.data.base.Dataset` of facts.

    Attributes:
        names: the names of *all* entities, sorted; answers are ranked against them.
        train: the facts to train on, kinds ``train`` and ``atomic``.
        splits: ``train``, ``atomic`` and ``test`` for evaluation; ``test`` is held out. Sentences have a fourth,
            ``atomic_questions``.
        vocab_size: one more than the largest token id.
        special: token ids ``mask``, ``pad``, ``pred``, and ``relations``, the list r_0, r_0_inv, r_1, … in
            which number i ^ 1 is the inverse of number i. Sentences have no ``relations``.
        spelling: how names and relations are written.
        by_name: an epoch's order keeps facts together whose entities share a name token.
    """

    names: Names
    train: Facts
    splits: dict[str, Facts]
    vocab_size: int
    special: dict[str, Any]
    spelling: Spelling
    by_name: bool = False

    @property
    def kind(self) -> Kind:
        return "reversal"

    def order(self, seed: int) -> Permuted:
        """Return the order of the examples: each epoch uniformly shuffled, or ``by_name``."""
        n = len(self.train)
        return Permuted(n, partial(order_by_name, self.train, seed) if self.by_name else partial(shuffled, seed, n=n))

    @property
    def counts(self) -> dict[str, int]:
        return {"samples": len(self.train)}

    def facts(self, split: str) -> Facts:
        """Return all facts of a kind: trained on (``train``, ``atomic``) or held out (``test``)."""
        if split == "test":
            return self.splits["test"]
        return self.train.select(self.train.kind == KINDS.index(split))

    def repeat_atomic(self, times: int) -> ReversalData:
        """Return the same data with every ``atomic`` fact ``times`` times per epoch.

        An entity of B has half as many facts as one of A and so occurs half as often; ``times=2`` balances this.
        """
        atomic = np.flatnonzero(self.train.kind == ATOMIC)
        rows = np.concatenate([np.arange(len(self.train)), np.tile(atomic, times - 1)])
        return replace(self, train=self.train.select(rows))

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        train = self.train
        for array in (self.names.tokens, train.relations, *train.wording, *(getattr(train, c) for c in train.columns)):
            digest.update(f"{array.shape}".encode())
            digest.update(array.astype("<i4").tobytes())
        digest.update(f"{self.vocab_size} {sorted(self.special.items())}".encode())
        return digest.hexdigest()


@lru_cache(maxsize=4)  # as many as a batch that spans two epochs needs, twice
def order_by_name(facts: Facts, seed: int, epoch: int) -> np.ndarray:
    """Return a random order, (F,) int64 and read-only, in which entities that share a name token are neighbours.

    An InfoNCE batch then holds the negatives that are hardest to distinguish: entities of the same first, or the same
    last, name. Two random bits per fact choose its subject or its object, and one of the tokens of that name. The facts
    of one token are split into groups in which every entity occurs at most once, and the groups are shuffled.
    """
    rng = generator(f"by_name/{seed}/{epoch}/{len(facts)}")
    count = len(facts)
    entity = np.where(rng.integers(0, 2, count) == 1, facts.object, facts.subject)
    column = rng.integers(0, facts.names.lengths[entity])
    token = facts.names.tokens[entity, column].astype(np.int64)
    tie = rng.permutation(count)
    # rank of a fact among those about its entity and token, in random order
    about = (entity.astype(np.int64) * facts.names.tokens.shape[1] + column, tie)
    by_entity = np.lexsort((about[1], about[0]))
    starts = np.r_[True, np.diff(about[0][by_entity]) != 0]
    occurrence = np.empty(count, dtype=np.int64)
    occurrence[by_entity] = np.arange(count) - np.maximum.accumulate(np.where(starts, np.arange(count), 0))
    group = (token * facts.names.tokens.shape[1] + column) * (occurrence.max() + 1) + occurrence
    _, group = np.unique(group, return_inverse=True)
    place = rng.permutation(group.max() + 1)[group]
    order = np.lexsort((tie, place))
    order.setflags(write=False)
    return order


def generate(entities_a: int, comb: int = 10, relations: int = 6, seed: int = 0) -> ReversalData:
    """Generate facts about ``entities_a`` entities A and 0.6 · ``entities_a`` entities B.

    A name is a first and a last token, each shared by exactly ``comb`` entities. For every relation, A is matched into
    random ordered pairs, given in both directions, and B into pairs given in one random direction and held out in the
    other. Token ids: first names, last names, mask, r_0, r_0_inv, r_1, …, pad, PRED. The result depends on the
    arguments alone.

    Raises:
        InputError: a size that cannot be met exactly.
    """
    entities_b, names, firsts = _sizes(entities_a, comb, relations)
    pairs = _unique_pairs(firsts, comb, generator(f"reversal/{seed}/names"))
    pairs[:, 1] += firsts
    entity = generator(f"reversal/{seed}/sets").permutation(names).astype(np.int32)
    rng = generator(f"reversal/{seed}/facts")

    mask = 2 * firsts
    tokens = mask + 1 + np.arange(2 * relations, dtype=np.int32)
    table = Names(pairs.astype(np.int32), np.full(names, 2, dtype=np.int32))

    def both_directions(entities: np.ndarray) -> np.ndarray:
        """Match entities for each relation: (relations, pairs, 2 directions, 3), the last axis subject, relation,
        object."""
        matched = np.stack([rng.permutation(entities).reshape(-1, 2) for _ in range(relations)])
        relation = np.repeat(np.arange(0, 2 * relations, 2)[:, None], matched.shape[1], axis=1)
        forward = np.stack([matched[..., 0], relation, matched[..., 1]], axis=-1)
        reverse = np.stack([matched[..., 1], relation + 1, matched[..., 0]], axis=-1)
        return np.stack([forward, reverse], axis=2)

    def facts(rows: np.ndarray, kind: np.ndarray) -> Facts:
        subject, relation, object_ = (np.ascontiguousarray(c, dtype=np.int32) for c in rows.reshape(-1, 3).T)
        return Facts(table, tokens, mask, subject, relation, object_, kind.astype(np.uint8))

    in_a = both_directions(entity[:entities_a]).reshape(-1, 3)
    in_b = both_directions(entity[entities_a:])
    coin = rng.integers(0, 2, size=in_b.shape[:2])[..., None, None]
    atomic = np.take_along_axis(in_b, coin, axis=2).reshape(-1, 3)
    test = np.take_along_axis(in_b, 1 - coin, axis=2).reshape(-1, 3)

    kind = np.repeat([TRAIN, ATOMIC], [len(in_a), len(atomic)])
    train = facts(np.concatenate([in_a, atomic]), kind)
    splits = {
        "train": train[: len(in_a)],
        "atomic": train[len(in_a) :],
        "test": facts(test, np.full(len(test), TEST)),
    }
    last = mask + 2 * relations
    special = {"mask": mask, "pad": last + 1, "pred": last + 2, "relations": tokens.tolist()}
    spelling = TokenSpelling(token_strings(special, last + 3), tokens.tolist())
    return ReversalData(table, train, splits, vocab_size=last + 3, special=special, spelling=spelling)


def _sizes(entities_a: int, comb: int, relations: int) -> tuple[int, int, int]:
    """Return |B|, the number of names and the number of first names."""
    if relations < 1:
        raise InputError(f"data.relations: must be at least 1, got {relations}")
    if comb < 1:
        raise InputError(f"data.comb: must be at least 1, got {comb}")
    if entities_a < 1 or entities_a % 10:  # even for a perfect matching, with 0.6 times it a whole and even number too
        raise InputError(
            f"data.entities_a: must be a multiple of 10, so that A and B (0.6 · A) are even, got {entities_a}"
        )
    entities_b = entities_a * 6 // 10
    names = entities_a + entities_b
    if names % comb:
        raise InputError(
            f"data.comb: {comb} does not divide the {names} entities of data.entities_a={entities_a}; "
            f"change one of them so that every name token is shared by exactly comb entities"
        )
    if names < comb * comb:
        raise InputError(
            f"data.comb: {names // comb} first and last names cannot be paired {comb} times each without "
            f"repeating a pair; lower data.comb or make data.entities_a at least {-(-comb * comb * 5 // 8)}"
        )
    return entities_b, names, names // comb


def _unique_pairs(n: int, comb: int, rng: np.random.Generator) -> np.ndarray:
    """Return (n · comb, 2) int64, sorted: random distinct pairs of 0 … n-1, each i and each j in ``comb`` of them.

    It starts from j = i, i+1, …, i+comb-1 (mod n) and swaps the j of two random pairs wherever that duplicates no pair.
    The counts are exact after every swap; this is the usual random walk on bipartite graphs of given degrees.
    """
    first = np.repeat(np.arange(n), comb)
    last = (first + np.tile(np.arange(comb), n)) % n
    for _ in range(32):
        order = rng.permutation(n * comb)
        half = len(order) // 2
        a, b = order[:half], order[half : 2 * half]
        proposed = np.stack([first[a] * n + last[b], first[b] * n + last[a]], axis=1)
        _, inverse, times = np.unique(proposed, return_inverse=True, return_counts=True)
        lonely = times[inverse.reshape(proposed.shape)] == 1
        new = ~np.isin(proposed, first * n + last)
        good = (lonely & new).all(axis=1)
        last[a[good]], last[b[good]] = last[b[good]], last[a[good]]
    codes = np.sort(first * n + last)
    return np.stack([codes // n, codes % n], axis=1)
