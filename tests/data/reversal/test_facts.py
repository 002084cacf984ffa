from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.data.reversal.facts import KINDS, Facts, Names, ReversalData, generate, order_by_name
from jepa_scale.packing import IGNORE
from jepa_scale.utils.errors import InputError

few = settings(max_examples=25)


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, int]:
    """Arguments that can be met: comb divides 16·tens and comb² fits into it."""
    tens = draw(st.integers(1, 25))
    names = 16 * tens
    comb = draw(st.sampled_from([c for c in range(1, 17) if names % c == 0 and c * c <= names]))
    return {
        "entities_a": 10 * tens,
        "comb": comb,
        "relations": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 5)),
    }


def triples(facts: Facts) -> list[tuple[tuple[int, ...], int, tuple[int, ...]]]:
    return [(f.subject, f.relation, f.object) for f in facts]


def reverses(facts: Facts) -> list[tuple[tuple[int, ...], int, tuple[int, ...]]]:
    return [(f.object, f.inverse, f.subject) for f in facts]


@few
@given(sizes())
def test_names_are_unique_and_their_tokens_shared_by_exactly_comb(size: dict[str, int]) -> None:
    data = generate(**size)
    names = list(data.names)
    firsts = len(names) // size["comb"]
    assert len(names) == len(set(names)) == size["entities_a"] * 16 // 10
    assert names == sorted(names)
    assert Counter(n[0] for n in names) == dict.fromkeys(range(firsts), size["comb"])
    assert Counter(n[1] for n in names) == dict.fromkeys(range(firsts, 2 * firsts), size["comb"])


@few
@given(sizes())
def test_every_relation_matches_a_and_b_perfectly(size: dict[str, int]) -> None:
    data = generate(**size)
    a_count = size["entities_a"]
    pairs_b = a_count * 3 // 10
    set_a = {f.subject for f in data.facts("train")} | {f.object for f in data.facts("train")}
    set_b = {f.subject for f in data.facts("atomic")} | {f.object for f in data.facts("atomic")}
    assert len(set_a) == a_count
    assert len(set_b) == a_count * 6 // 10
    assert not set_a & set_b
    assert set_a | set_b == set(data.names)
    ahead, inverse = data.special["relations"][::2], data.special["relations"][1::2]
    assert len(ahead) == size["relations"]
    for r, r_inv in zip(ahead, inverse, strict=True):
        told = [f for f in data.facts("train") if f.relation == r]
        back = [f for f in data.facts("train") if f.relation == r_inv]
        assert len(told) == len(back) == a_count // 2
        assert {f.subject for f in told} | {f.object for f in told} == set_a  # a/2 pairs cover all a: a matching
        assert {(f.object, f.subject) for f in told} == {(f.subject, f.object) for f in back}
        once = [f for f in data.facts("atomic") if f.relation in (r, r_inv)]
        assert len(once) == pairs_b
        assert {f.subject for f in once} | {f.object for f in once} == set_b


@few
@given(sizes())
def test_no_held_out_fact_is_trained_on_and_each_is_the_reverse_of_one_that_is(size: dict[str, int]) -> None:
    data = generate(**size)
    test, trained = triples(data.splits["test"]), set(triples(data.train))
    assert len(test) == len(set(test)) == len(data.facts("atomic"))
    assert len(trained) == len(data.train)
    assert not trained & set(test)
    assert {f.kind for f in data.train} == {"train", "atomic"}
    assert set(reverses(data.splits["test"])) == set(triples(data.facts("atomic")))
    assert set(reverses(data.facts("train"))) == set(triples(data.facts("train")))
    # and as token sequences, whatever the data set's own numbering of names says
    held_out = {tuple(f.lm_sequence()[0]) for f in data.splits["test"]}
    assert not held_out & {tuple(f.lm_sequence()[0]) for f in data.train}


@few
@given(sizes())
def test_the_same_arguments_give_the_same_facts(size: dict[str, int]) -> None:
    data, again = generate(**size), generate(**size)
    assert triples(data.train) == triples(again.train)
    assert triples(data.splits["test"]) == triples(again.splits["test"])
    assert data.fingerprint == again.fingerprint
    assert data.fingerprint != generate(**{**size, "seed": size["seed"] + 1}).fingerprint


def test_full_size_has_the_layout_of_the_specification() -> None:
    data = generate(50_000)
    assert [len(data.facts(k)) for k in ("train", "atomic", "test")] == [300_000, 90_000, 90_000]
    assert len(data.train) == 390_000
    assert data.special == {"mask": 16000, "pad": 16013, "pred": 16014, "relations": list(range(16001, 16013))}
    assert data.vocab_size == 16015
    assert len(data.names) == 80_000
    tokens = data.names.tokens
    assert (np.bincount(tokens[:, 0]) == 10).all()
    assert (np.bincount(tokens[:, 1] - 8000, minlength=8000) == 10).all()
    assert tokens[:, 0].max() == 7999
    assert len(np.unique(tokens.astype(np.int64) @ [16000, 1])) == 80_000
    assert not np.isin(data.splits["test"].codes(), data.train.codes()).any()


def test_a_seed_means_the_same_facts_on_every_machine() -> None:
    assert generate(50, comb=4, relations=2, seed=3).fingerprint.startswith("1bb65e1575d6b980")


def test_pairs_and_directions_are_random() -> None:
    data = generate(1000, seed=1)
    even = np.mean(data.facts("atomic").relation % 2)
    assert abs(even - 0.5) < 4 * 0.5 / np.sqrt(1800)
    tokens = data.names.tokens
    near = np.mean((tokens[:, 1] - 160 - tokens[:, 0]) % 160 < 10)  # all of them, before the pairs are mixed
    assert abs(near - 10 / 160) < 4 * np.sqrt(10 / 160 / 1600)
    for kind in ("train", "atomic"):  # the relations' matchings have no more in common than chance has
        couples = [frozenset((f.subject, f.object)) for f in data.facts(kind)]
        assert len(set(couples)) > 0.99 * (3000 if kind == "train" else 1800)
    first, second = (generate(1000, seed=1).train, generate(1000, seed=2).train)
    assert len(set(triples(first)) & set(triples(second))) < 60


def test_a_fact_as_a_question_and_as_a_sequence() -> None:
    fact = generate(50, comb=2).train[0]
    assert fact.prompt == (*fact.subject, fact.relation, fact.mask)
    assert fact.answer == fact.object
    tokens, labels = fact.lm_sequence()
    assert tokens == [*fact.prompt, *fact.answer]
    assert labels == [IGNORE] * 3 + [*fact.answer, IGNORE]
    assert [labels[t] for t in range(3, 5)] == tokens[4:]


def test_a_relation_is_the_inverse_of_its_inverse() -> None:
    """r_0, r_0_inv, r_1, …: one after an even place, one before an odd one, counted from the first relation."""
    data = generate(50, comb=2, relations=3)
    inverse = {fact.relation: fact.inverse for fact in data.train}
    first = data.special["relations"][0]
    assert inverse == {first + n: first + m for n, m in ((0, 1), (1, 0), (2, 3), (3, 2), (4, 5), (5, 4))}


def test_facts_and_names_are_sequences() -> None:
    data: ReversalData = generate(50, comb=2)
    facts = data.train
    assert facts[-1] == facts[len(facts) - 1]
    assert list(facts[3:9:2]) == [facts[3], facts[5], facts[7]]
    with pytest.raises(IndexError):
        facts[len(facts)]
    uneven = Names.from_tuples([(1,), (1, 2, 3), (7, 8)])
    assert list(uneven) == [(1,), (1, 2, 3), (7, 8)]
    assert uneven[1] == (1, 2, 3)
    assert list(uneven[1:]) == [(1, 2, 3), (7, 8)]
    with pytest.raises(IndexError):
        uneven[3]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"entities_a": 0}, "data.entities_a"),
        ({"entities_a": 55}, "data.entities_a"),  # odd: no perfect matching
        ({"entities_a": 52}, "data.entities_a"),  # |B| would be 31.2
        ({"entities_a": 100, "comb": 7}, "data.comb"),
        ({"entities_a": 50, "comb": 10}, "data.comb"),  # 8 first names cannot meet 10 last names
        ({"entities_a": 100, "comb": 0}, "data.comb"),
        ({"entities_a": 100, "relations": 0}, "data.relations"),
    ],
)
def test_sizes_that_cannot_be_met_are_refused(arguments: dict[str, int], key: str) -> None:
    with pytest.raises(InputError, match=f"^{key}: ") as caught:
        generate(**arguments)
    assert "\n" not in str(caught.value)


def test_the_smallest_complete_set_of_names() -> None:
    data = generate(10, comb=4)  # 4 first and 4 last names: all 16 pairs, nothing is left to chance
    assert len(set(data.names)) == 16


def test_repeated_atomic_facts_are_the_same_facts_met_more_often():
    data = generate(50, 5, 3)
    twice = data.repeat_atomic(2)
    codes, times = np.unique(twice.train.codes(), return_counts=True)
    kinds = dict(zip(data.train.codes().tolist(), data.train.kind.tolist(), strict=True))
    assert set(codes.tolist()) == set(data.train.codes().tolist())
    assert all(
        n == (2 if kinds[code] == KINDS.index("atomic") else 1) for code, n in zip(codes.tolist(), times, strict=True)
    )
    assert not set(twice.splits["test"].codes().tolist()) & set(codes.tolist())
    assert twice.fingerprint != data.fingerprint


def test_order_by_name_brings_sharers_together():
    data = generate(200, 10, 3)
    facts = data.train
    order = order_by_name(facts, 0, 1)
    assert sorted(order.tolist()) == list(range(len(facts)))
    assert order.tolist() == order_by_name.__wrapped__(facts, 0, 1).tolist()
    assert order.tolist() != order_by_name(facts, 0, 2).tolist() != order_by_name(facts, 1, 1).tolist()

    def shared(sequence):
        """Share of neighbours in which some two entities have a name token in common."""
        tokens = [set(facts[int(i)].subject) | set(facts[int(i)].object) for i in sequence]
        return np.mean([bool(a & b) for a, b in zip(tokens, tokens[1:], strict=False)])

    assert shared(order) > 3 * shared(np.random.default_rng(0).permutation(len(facts)))
