"""Names and relations as texts, and back."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from jepa_scale.data.reversal.facts import generate
from jepa_scale.data.reversal.files import read, write
from jepa_scale.data.reversal.sentences import as_sentences
from jepa_scale.data.reversal.templates import RELATIONS
from jepa_scale.utils.errors import InputError

FACTS = generate(50, 5, 3)
SENTENCES = as_sentences(FACTS, 2, seed=0)


@pytest.mark.parametrize("data", [FACTS, SENTENCES], ids=["tokens", "sentences"])
def test_every_name_is_read_as_it_is_written(data):
    texts = [data.spelling.write(name) for name in data.names]
    assert len(set(texts)) == len(texts) == 80
    assert [data.spelling.read(text) for text in texts] == list(data.names)
    assert all(text == text.strip() and text.count(" ") == 1 for text in texts)


def test_tokens_are_strings_or_ids():
    mask, first = FACTS.special["mask"], FACTS.special["relations"][0]
    assert FACTS.spelling.read(f"<t_3>  <mask> {first} 3") == (3, mask, first, 3)
    assert FACTS.spelling.write([3, first, 10**6]) == "<t_3> <r_0> 1000000"
    assert FACTS.spelling.relations == ["<r_0>", "<r_0_inv>", "<r_1>", "<r_1_inv>", "<r_2>", "<r_2_inv>"]
    for wrong in ("<t_9999>", "Ann", "-1", "³"):
        with pytest.raises(InputError, match=f"'{wrong}' is no token of the data's vocabulary, and no id"):
            FACTS.spelling.read(wrong)


def test_files_have_the_strings_of_their_vocabulary(tmp_path):
    write(FACTS, tmp_path)
    found = read(tmp_path)
    assert found.spelling.relations == FACTS.spelling.relations
    assert [found.spelling.write(name) for name in found.names] == [FACTS.spelling.write(name) for name in FACTS.names]


def test_relations_of_sentences_are_nouns():
    assert SENTENCES.spelling.relations == [noun for noun, _ in RELATIONS[:6]]


def test_a_question_is_that_of_the_held_out_fact():
    for number in range(len(FACTS.splits["test"])):
        fact, relation = FACTS.splits["test"][number], int(FACTS.splits["test"].relation[number])
        asked = FACTS.train.question(fact.subject, relation)
        assert asdict(asked) == {**asdict(fact), "object": fact.subject}


def test_a_question_is_in_the_first_words_that_training_lacks():
    test = SENTENCES.splits["test"]
    texts = set()
    for number in range(len(test)):
        sentence, relation = test[number], int(test.relation[number])
        asked = SENTENCES.train.question(sentence.subject, relation)
        noun, name = RELATIONS[relation][0], SENTENCES.spelling.write(sentence.subject)
        assert SENTENCES.spelling.write(asked.prompt) == f"Who is the {noun} of {name}?"
        texts.add(asked.prompt == sentence.prompt)
    assert texts == {True, False}  # the split asks in five ways, and this is one of them
