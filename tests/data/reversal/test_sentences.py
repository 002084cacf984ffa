"""Facts as sentences: the same facts as those of tokens, in templates that training and test do not share."""

import re
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.config.parsing import parse_section
from jepa_scale.data import load_data
from jepa_scale.data.options import ReversalOptions, parse_data
from jepa_scale.data.reversal.facts import Names, generate, order_by_name
from jepa_scale.data.reversal.files import write
from jepa_scale.data.reversal.sentences import _spell, _tokenizer, as_sentences
from jepa_scale.data.reversal.templates import RELATIONS, TEST, TRAINING, worded
from jepa_scale.packing import IGNORE
from jepa_scale.utils.errors import InputError

FACTS = generate(50, 5, 3)
DATA = as_sentences(FACTS, 3, seed=0)
EACH = len(TRAINING) + len(TEST)


def triples(sentences):
    """(subject, relation's number, object) of each sentence."""
    return [(x.subject, int(r), x.object) for x, r in zip(sentences, sentences.relation, strict=True)]


def test_twenty_templates_a_relation_of_which_training_and_test_share_none():
    assert (len(TRAINING), len(TEST)) == (15, 5)
    for relation in range(len(RELATIONS)):
        texts = [worded(t, relation) for t in (*TRAINING, *TEST)]
        assert len(set(texts)) == 20
        assert all(after.endswith("?") for _, after in texts[15:])
    everything = [worded(t, r) for t in (*TRAINING, *TEST) for r in range(len(RELATIONS))]
    assert len(set(everything)) == len(everything)  # so no text has two meanings


def test_every_word_of_a_question_is_a_word_of_training():
    for relation in range(len(RELATIONS)):
        trained, asked = (
            {word for t in templates for word in re.findall(r"\w+|[^\w\s]+", " ".join(worded(t, relation)))}
            for templates in (TRAINING, TEST)
        )
        assert asked <= trained


def test_a_text_has_the_words_of_its_relation_and_of_the_inverse():
    assert worded("{subject}'s {noun} is", 0) == ("", "'s parent is")
    assert worded("Whose {its_noun} is {subject}?", 0) == ("Whose child is", "?")
    assert worded("{subject} {verb}", 1) == ("", " raised")
    assert worded("Who {its_verb} {subject}?", 1) == ("Who was raised by", "?")


def test_the_facts_are_those_of_the_token_form():
    """One to one: each name has one spelling, and each fact its sentences."""
    spelling = {}
    for facts, sentences, count in (
        (FACTS.train, DATA.train, 3),
        (FACTS.splits["test"], DATA.splits["test"], 1),
        (FACTS.splits["atomic"], DATA.splits["atomic"], 1),
        (FACTS.splits["train"], DATA.splits["train"], 1),
        (FACTS.splits["atomic"], DATA.splits["atomic_questions"], 1),
    ):
        assert len(sentences) == count * len(facts)
        for i, x in enumerate(sentences):
            fact = facts[i // count]
            assert spelling.setdefault(fact.subject, x.subject) == x.subject
            assert spelling.setdefault(fact.object, x.object) == x.object
            assert sentences.relation[i] == facts.relation[i // count]
            assert x.kind == fact.kind
    assert len(spelling) == len(set(spelling.values())) == len(DATA.names)
    assert set(spelling.values()) == set(DATA.names) and list(DATA.names) == sorted(DATA.names)


def test_no_held_out_fact_is_in_training_in_any_words():
    held_out, trained = set(triples(DATA.splits["test"])), set(triples(DATA.train))
    assert not held_out & trained
    assert {(o, r ^ 1, s) for s, r, o in held_out} == set(triples(DATA.splits["atomic_questions"])) <= trained
    texts = {tuple(x.lm_sequence()[0]) for x in DATA.train}
    every_wording = {
        (*DATA.train.before[t], *x.subject, *DATA.train.after[t], *x.object)
        for x, r in zip(DATA.splits["test"], DATA.splits["test"].relation, strict=True)
        for t in range(r * EACH, (r + 1) * EACH)
    }
    assert not texts & every_wording


def test_training_has_different_statements_of_each_fact_and_evaluation_asks_questions():
    templates = defaultdict(list)
    for triple, template in zip(triples(DATA.train), DATA.train.template.tolist(), strict=True):
        templates[triple].append(template)
    for (_, relation, _), numbers in templates.items():
        assert len(numbers) == len(set(numbers)) == 3
        assert all(0 <= n - relation * EACH < 15 for n in numbers)
    for split, kind in (("test", "test"), ("atomic_questions", "atomic")):
        number = DATA.splits[split].template - DATA.splits[split].relation * EACH
        assert set(number.tolist()) == set(range(15, 20))
        assert {x.kind for x in DATA.splits[split]} == {kind}
    for split in ("train", "atomic"):
        assert set(zip(triples(DATA.splits[split]), DATA.splits[split].template, strict=True)) <= set(
            zip(triples(DATA.train), DATA.train.template, strict=True)
        )
    assert set(DATA.train.template % EACH) == set(range(15))


def test_the_carriers_are_the_templates_and_no_two_relations_share_one():
    carriers = defaultdict(set)
    for split in (DATA.train, DATA.splits["test"]):
        for x, relation in zip(split, split.relation, strict=True):
            carriers[x.carrier].add(int(relation))
    assert all(len(relations) == 1 for relations in carriers.values())
    assert len(carriers) <= 6 * EACH


def test_a_sentence_as_a_question_as_a_sequence_and_as_its_carrier():
    for x in (DATA.train[0], DATA.train[len(DATA.train) - 1], DATA.splits["test"][0]):
        tokens, labels = x.lm_sequence()
        assert tokens == [*x.prompt, *x.answer] and x.answer == x.object
        assert labels == [*[IGNORE] * (len(x.prompt) - 1), *x.object, IGNORE]
        subject, object_ = x.spans
        assert tuple(tokens[i] for i in subject) == x.subject
        assert tuple(tokens[i] for i in object_) == x.object
        rest = [t for i, t in enumerate(tokens) if i not in {*subject, *object_}]
        assert [t for t in x.carrier if t != x.mask] == rest
        assert x.carrier[subject.start] == x.carrier[-1] == x.mask == DATA.special["mask"]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 11), st.sampled_from((*TRAINING, *TEST)), st.integers(0, 79), st.integers(0, 79))
def test_a_names_tokens_in_a_sentence_are_those_of_the_name_alone(relation, template, first, second):
    """The tokenizer on the whole sentence agrees with the tokens of its parts."""
    spelled = SPELLED
    before, after = worded(template, relation)
    parts = (before, *spelled[first], after, *spelled[second])
    assert ENCODE("".join(parts)) == tuple(t for part in parts for t in ENCODE(part))


SPELLED = _spell(FACTS.names, 0)
ENCODE, _, _, _ = _tokenizer(
    [" ".join(worded(t, r)) for r in range(6) for t in (*TRAINING, *TEST)],
    sorted({word for name in SPELLED for word in name}),
)


def test_names_have_several_tokens_and_none_is_the_beginning_of_another():
    for names in (DATA.names, as_sentences(generate(500), 1, 1).names):
        distinct = set(names)
        assert len(distinct) == len(names) and names.lengths.min() >= 2
        assert not any(name[:n] in distinct for name in names for n in range(1, len(name)))


def test_equal_tokens_of_names_are_equal_words():
    first = Counter(name[0] for name in SPELLED)
    last = Counter(name[1] for name in SPELLED)
    assert set(first.values()) == set(last.values()) == {5} and len(first) == len(last) == 16
    assert all(re.fullmatch(r" [A-Z][a-z]+", word) for word in (*first, *last))


def test_sizes_are_the_token_counts():
    numbers = np.random.default_rng(0).permutation(len(DATA.train))
    expected = [len(DATA.train[int(i)].lm_sequence()[0]) for i in numbers]
    assert DATA.train.sizes(numbers).tolist() == expected
    assert DATA.train.max_size == max(expected) and DATA.train.mean_size == pytest.approx(np.mean(expected))
    largest = max(max(x.lm_sequence()[0]) for x in DATA.train)
    assert largest < DATA.vocab_size and set(DATA.special) == {"mask", "pad", "pred"}


def test_a_seed_means_the_same_sentences_on_every_machine():
    assert as_sentences(FACTS, 3, seed=0).fingerprint == DATA.fingerprint
    assert DATA.fingerprint.startswith("b35425c3028a201e")


def test_the_fingerprint_covers_the_words():
    train = DATA.train
    others = [as_sentences(FACTS, count, seed).fingerprint for count, seed in ((3, 1), (2, 0))]
    moved = train.select(np.arange(len(train)))
    moved.template[0] += 1
    others.append(replace(DATA, train=moved).fingerprint)
    after = Names(train.after.tokens.copy(), train.after.lengths)
    after.tokens[0, 0] += 1
    others.append(replace(DATA, train=replace(train, after=after)).fingerprint)
    assert len({DATA.fingerprint, FACTS.fingerprint, *others}) == 6


def test_order_and_repeats_work_on_sentences():
    twice = DATA.repeat_atomic(2)
    assert np.bincount(twice.train.kind).tolist() == [n * (i + 1) for i, n in enumerate(np.bincount(DATA.train.kind))]
    assert len(twice.train[5:9]) == 4 and twice.train[5:9][0] == twice.train[5]
    assert sorted(order_by_name(DATA.train, 0, 1).tolist()) == list(range(len(DATA.train)))
    with pytest.raises(IndexError):
        DATA.train[len(DATA.train)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"form": "sentences", "relations": 7, "entities_a": 50, "comb": 5},
            r"data\.relations: 7 pairs, but sentences have words for 6 only",
        ),
        ({"sentences": 3}, r"data\.sentences: has a meaning only for facts as sentences"),
        ({"form": "sentences", "path": "nowhere"}, r"data\.form: has no meaning for facts read from data\.path"),
        ({"form": "sentences", "sentences": 16}, r"data\.sentences: .*less than or equal to 15"),
    ],
)
def test_sentences_that_cannot_be_made_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        load_data(parse_data({"source": "reversal", **values}))


def test_files_hold_facts_as_tokens_only(tmp_path):
    with pytest.raises(InputError, match=r"data\.form: files of facts hold relation tokens"):
        write(DATA, tmp_path)
    assert not list(tmp_path.iterdir())


def test_resolved_keys_are_those_that_have_a_meaning():
    for values in ({}, {"form": "sentences"}, {"form": "sentences", "sentences": 2}):
        options = parse_section(ReversalOptions, values, "data")
        resolved = options.resolved()
        assert ("sentences" in resolved) == ("form" in values)
        assert parse_section(ReversalOptions, resolved, "data").resolved() == resolved
