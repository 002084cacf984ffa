"""Questions about facts get the answers that an evaluation counts, for each objective that is trained on facts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import jepa_scale
from jepa_scale.cli.main import main
from jepa_scale.evaluation import reversal
from jepa_scale.evaluation.options import EvalOptions
from jepa_scale.evaluation.questions import answers
from tests.convert.runs import GPT2, NATIVE, make_run
from tests.text_runs import data_section, write_corpus

TOKENS = {"source": "reversal", "entities_a": 50, "comb": 5, "relations": 2}
SENTENCES = {**TOKENS, "form": "sentences", "sentences": 2}
RUNS = {
    "concept": (NATIVE, TOKENS, {"name": "concept", "tap_layer": 1}),
    "memory": (NATIVE, TOKENS, {"name": "concept", "tap_layer": 1, "memory": True, "concept_dim": 8}),
    "sentences": (NATIVE, SENTENCES, {"name": "concept", "tap_layer": 1, "relation_layer": 1}),
    "lm": (GPT2, TOKENS, {"name": "lm"}),
    "lm_sentences": (NATIVE, SENTENCES, {"name": "lm"}),
    "two_view": (NATIVE, TOKENS, {"name": "two_view"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("facts")
    for name, (model, data, objective) in RUNS.items():
        make_run(folder, name, model, data=data, objective=objective, eval={})
    write_corpus(folder)
    make_run(folder, "texts", NATIVE, data=data_section(folder), eval={})
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_answers_are_the_evaluation_s(folder, name):
    """The generator of the evaluation, with the whole facts of the split, generates the same tokens."""
    run = jepa_scale.load(folder / name)
    test, spelling = run.data.splits["test"], run.data.spelling
    facts = [test[number] for number in range(len(test))]
    generator = run.module.objective.answer_generator(run._call)
    generator.prepare(run.data.names)
    longest = max(len(each) for each in run.data.names)
    generated = generator.verbalize(facts, longest)
    compared = 0
    for relation, text in enumerate(spelling.relations):
        mine = np.flatnonzero(test.relation == relation).tolist()
        found = run.answers([spelling.write(facts[number].subject) for number in mine], text, batch_size=7)
        for number, each in zip(mine, found, strict=True):
            fact = facts[number]
            assert (each.subject, each.relation) == (spelling.write(fact.subject), text)
            if fact.prompt != run.data.train.question(fact.subject, relation).prompt:
                continue  # the split asks for it in other words
            compared += 1
            ends = [name for name in run.data.names if generated[number][: len(name)] == name]
            assert each.known == bool(ends)
            assert each.name == spelling.write(ends[0] if ends else generated[number])
    assert compared > len(facts) // 10


def test_the_share_of_right_answers_is_exact_match(folder):
    """A generator that knows half of the facts; the rest it answers by no name."""
    run = jepa_scale.load(folder / "lm")
    data = run.data
    right = {
        (fact.subject, fact.relation): fact.object if number % 2 else (0, 0)
        for number, fact in enumerate(data.splits["test"])
    }

    class Half:
        def prepare(self, names):
            self.names = list(names)

        def verbalize(self, questions, length):
            return [right[q.subject, q.relation][:length] for q in questions]

        def nll(self, questions):
            return np.zeros(len(questions))

        def ranks(self, questions):
            return np.ones(len(questions))

    only = {"test": data.splits["test"]}
    measured = reversal.evaluate(Half(), only, data.names, EvalOptions(max_facts=0), torch.device("cpu"))
    hits = 0
    for fact, relation in zip(data.splits["test"], data.splits["test"].relation, strict=True):
        subject, wanted = data.spelling.write(fact.subject), data.spelling.write(fact.object)
        (found,) = answers(Half(), data, [subject], data.spelling.relations[relation], 1)
        hits += found.name == wanted
        assert found.known is (found.name == wanted) and found.name in (wanted, "<t_0> <t_0>")
    assert hits / len(data.splits["test"]) == measured["test"]["exact_match"] and 0 < hits < len(data.splits["test"])


def test_the_command_prints_what_python_returns(folder, capsys):
    for name in ("concept", "sentences"):
        run = jepa_scale.load(folder / name)
        spelling = run.data.spelling
        subjects, relation = [spelling.write(run.data.names[n]) for n in (0, 5)], spelling.relations[1]
        expected = run.answers(subjects, relation)
        flags = [word for subject in subjects for word in ("--subject", subject)]
        assert main(["generate", str(folder / name), *flags, "--relation", relation]) == 0
        assert capsys.readouterr().out == "".join(f"{each.name}\n" for each in expected)
        assert main(["generate", str(folder / name), *flags, "--relation", relation, "--json"]) == 0
        said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        fields = ("subject", "relation", "name", "known")
        assert said == [{field: getattr(each, field) for field in fields} for each in expected]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("lm", ["--subject", "<t_0> <t_0>", "--relation", "<r_0>"], "subject '<t_0> <t_0>': is none of the 80 names"),
        ("lm", ["--subject", "Ann", "--relation", "<r_0>"], "'Ann' is no token of the data's vocabulary, and no id"),
        ("lm", ["--subject", "x", "--relation", "<r_7>"], "relation '<r_7>': is none of the data's; there are <r_0>, <r_0_inv>,"),
        ("sentences", ["--subject", "Ann", "--relation", "parent"], "subject 'Ann': is none of the 80 names of the data; "),
        ("sentences", ["--subject", "Ann", "--relation", "aunt"], "there are parent, child, teacher, student"),
        ("lm", ["--subject", "x"], "--subject, --relation: a question about a fact has both"),
        ("lm", ["--relation", "<r_0>"], "--subject, --relation: a question about a fact has both"),
        ("lm", ["a prompt", "--subject", "x", "--relation", "<r_0>"], "--subject: asks about a fact; remove the prompts"),
        ("lm", ["--subject", "x", "--relation", "y", "--draft", "0"], "--draft: has no meaning for --subject; remove it"),
        ("lm", ["--subject", "x", "--relation", "y", "--max-new-tokens", "9"], "--max-new-tokens: has no meaning for"),
        ("lm", ["--subject", "x", "--relation", "y", "--batch-size", "0"], "--batch-size 0: must be at least 1"),
        ("texts", ["--subject", "x", "--relation", "y"], "subject: asks about a fact, and the run's data are text; give a prompt"),
        ("lm", ["a prompt"], "the run's data are facts; ask for one by --subject … --relation …"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_in_one_line(folder, capsys, name, arguments, message):
    assert main(["generate", str(folder / name), *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out
