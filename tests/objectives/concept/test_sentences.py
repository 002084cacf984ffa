"""`concept` on sentences: a relation is read from its words, against a plain reference, and nothing else reveals it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jepa_scale.config.parsing import parse_section
from jepa_scale.data.reversal.facts import generate
from jepa_scale.data.reversal.sentences import as_sentences
from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.objectives.answers import LanguageModelAnswerGenerator
from jepa_scale.objectives.concept.config import ConceptOptions
from jepa_scale.objectives.concept.objective import Concept
from jepa_scale.objectives.lm import LanguageModeling
from jepa_scale.objectives.lm_options import LmOptions
from jepa_scale.packing import add_counts, pack
from jepa_scale.utils.errors import InputError
from tests.distributed.launch import run_ranks
from tests.objectives import helpers
from tests.objectives.concept.reference import check_infonce, unit_rms
from tests.objectives.helpers import alone, batch_of

DATA = as_sentences(generate(50, 5, 3), 2, seed=0)
SENTENCES = [*(DATA.train[i] for i in range(0, 60, 10)), *(DATA.splits["atomic"][i] for i in range(4))]
FACTS = [helpers.DATA.train[i] for i in range(6)]


def backbone(**keys):
    torch.manual_seed(0)
    options = ModelOptions(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3, **keys)
    return build_backbone(options, DATA.vocab_size)


def make(model, data=DATA, **options):
    torch.manual_seed(1)
    return Concept(parse_section(ConceptOptions, {"bridge_width": 8, **options}, "objective"), model, data)


def relation_of(model, objective):
    """A relation is the state at the end of its carrier, a sequence by itself, and has no number."""

    def of(sentence):
        carrier = [*sentence.before, DATA.special["mask"], *sentence.after, DATA.special["mask"]]
        return alone(model, carrier, until=objective.relation_tap)[-1:], None

    return of


@pytest.mark.parametrize("predictor", ["rotation", "mlp"])
@pytest.mark.parametrize(("layer", "tap"), [(-1, 2), (1, 1)])
def test_infonce_equals_the_plain_reference(predictor, layer, tap):
    model = backbone()
    objective = make(model, predictor=predictor, relation_layer=layer, lm_weight=0.0)
    assert (objective.tap, objective.relation_tap) == (1, tap)
    check_infonce(model, objective, SENTENCES, relation_of(model, objective))


def test_the_operator_knows_a_relation_by_its_words_alone():
    objective = make(backbone())
    batch = batch_of(objective, SENTENCES)
    assert set(batch.values) == {"names", "decoded_name", "noise"} and not batch.rows
    assert {*objective.sequences} == {"names", "carriers", "decode"}
    assert not any(hasattr(SENTENCES[0], name) for name in ("relation", "inverse", "template"))
    carriers = {x.carrier for x in SENTENCES}
    assert len(batch.sequences["carriers"].table.lengths) == len(carriers)  # each once a micro-batch


def test_a_prediction_depends_on_the_subject_and_the_words_and_not_on_the_answer():
    model = backbone()
    objective = make(model)
    views = objective.view_transform()

    def predicted(question):
        with torch.no_grad():
            return objective.predict(model, pack([views.question(question)], objective.sequences))

    one, other = DATA.splits["test"][0], DATA.splits["test"][1]
    same = predicted(replace(one, object=other.object, kind="train"))
    torch.testing.assert_close(same, predicted(one))
    for changed in (replace(one, subject=other.subject), replace(one, before=(*one.before, *one.after))):
        assert (predicted(changed) - predicted(one)).abs().max() > 0.05


@settings(max_examples=30, deadline=None)
@given(st.integers(0, len(DATA.train) - 1), st.integers(0, 99), st.sampled_from([0.0, 0.3, 0.9]))
def test_words_are_left_out_of_carriers_in_training_alone(number, seed, share):
    """In order, independently of the other choices of a sample, and never a mask or a token of a name."""
    sentence, draw = DATA.train[number], SampleRNG(seed, 0, 0, number)
    views = make(backbone(), word_dropout=share).view_transform()
    trained, whole = views(sentence, draw), make(backbone()).view_transform()(sentence, draw)
    carriers = [next(tuple(s.tokens) for s in made.segments if s.role == "carrier") for made in (trained, whole)]
    left = iter(carriers[1])
    assert all(token in left for token in carriers[0])
    assert carriers[0].count(sentence.mask) == 2 and carriers[1] == sentence.carrier
    assert share or carriers[0] == carriers[1]
    others = [[(s.role, *s.tokens) for s in made.segments if s.role != "carrier"] for made in (trained, whole)]
    assert others[0] == others[1] and np.array_equal(trained.values["noise"], whole.values["noise"])
    asked = [tuple(s.tokens) for s in views.question(sentence).segments if s.role == "carrier"]
    assert asked == [sentence.carrier]


def test_the_share_of_words_that_are_left_out_is_the_option():
    views = make(backbone(), word_dropout=0.3).view_transform()
    kept = [len(views(DATA.train[0], SampleRNG(0, 0, 0, i)).segments[2].tokens) - 2 for i in range(2000)]
    words = len(DATA.train[0].carrier) - 2
    assert abs(np.mean(kept) / words - 0.7) < 5 * (0.3 * 0.7 / 2000 / words) ** 0.5


def test_questions_are_answered_as_a_loop_over_them_says():
    """Ranks and decoded names of test questions, whose templates training never has."""
    model = backbone()
    objective = make(model)
    answers = objective.answer_generator(lambda task, batch, *args: getattr(objective, task)(model, batch, *args))
    questions = [DATA.splits["test"][i] for i in range(5)]
    with torch.no_grad():
        answers.prepare(list(DATA.names))
        ranks, spelled = answers.ranks(questions), answers.verbalize(questions, 4)
        concepts = torch.stack([unit_rms(alone(model, list(n), until=1)[-1]) for n in DATA.names])
        for question, rank, name in zip(questions, ranks, spelled, strict=True):
            relation = unit_rms(alone(model, list(question.carrier), until=2)[-1:])
            subject = concepts[list(DATA.names).index(question.subject)]
            scores = F.cosine_similarity(objective.predictor(subject[None], relation, None), concepts)
            right = scores[list(DATA.names).index(question.object)]
            assert rank == 1 + (scores > right + 1e-6).sum()
            assert len(name) == 4


CASES = {
    "rotation": (DATA, SENTENCES, {}),
    "mlp": (DATA, SENTENCES, dict(predictor="mlp", decode_fraction=0.5, relation_layer=1)),
    "projection": (DATA, SENTENCES, dict(concept_dim=8, tap_layer=2)),
    "memory": (DATA, SENTENCES, dict(memory=True, concept_dim=8)),
    "detach": (DATA, SENTENCES, dict(detach=True)),
    "detach, mlp": (DATA, SENTENCES, dict(detach=True, predictor="mlp")),
    "detach, tokens": (helpers.DATA, FACTS, dict(detach=True)),
    "detach, linear": (helpers.DATA, FACTS, dict(detach=True, predictor="linear")),
}


def micro_batches(objective, samples, count):
    """The samples as the micro-batches of a step, with the totals of the step."""
    size = -(-len(samples) // count)
    views = objective.view_transform()
    made = [views(x, SampleRNG(0, 0, 0, i)) for i, x in enumerate(samples)]
    batches = [pack(made[i : i + size], objective.sequences, max_samples=size) for i in range(0, len(made), size)]
    totals = {name: torch.tensor(float(n)) for name, n in add_counts(batches).items()}
    return [replace(batch, totals=totals) for batch in batches]


def step_of_rank(ranks: ParallelContext, name: str) -> tuple[float, dict[str, torch.Tensor]]:
    """This rank's part of the loss and of its gradient: its half of the four micro-batches of a step."""
    data, samples, options = CASES[name]
    model = backbone()
    objective = make(model, data, **options)
    batches = micro_batches(objective, samples, 2 * ranks.world_size)[ranks.rank :: ranks.world_size]
    losses = train(model, objective, batches)
    return sum(float(loss.means["loss"]) for loss in losses), gradients_of(model, objective)


def gradients_of(model, objective):
    modules = torch.nn.ModuleList([model, objective])
    return {n: p.grad for n, p in modules.named_parameters() if p.grad is not None}


def train(model, objective, batches):
    gathered = []
    if len(batches) > 1:
        with torch.no_grad():
            gathered = [objective.gather(model, batch) for batch in batches]
    losses = [objective.loss(model, batch, gathered, i) for i, batch in enumerate(batches)]
    for loss in losses:
        loss.total.backward()
    return losses


@pytest.mark.parametrize("micros", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_of_pytorchs_counter(name, micros):
    data, samples, options = CASES[name]
    model = backbone()
    objective = make(model, data, **options)
    batches = micro_batches(objective, samples, micros)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        train(model, objective, batches)
    assert objective.flops(model, square=True)(batches) == counter.get_total_flops()


@pytest.mark.parametrize("name", ["rotation", "mlp", "memory", "detach"])
def test_loss_and_gradient_do_not_depend_on_the_micro_batches(name):
    """Names and carriers that two micro-batches share count once, as in one batch."""
    data, samples, options = CASES[name]
    found = []
    for micros in (1, 2, 5):
        model = backbone()
        objective = make(model, data, **options)
        losses = train(model, objective, micro_batches(objective, samples, micros))
        found.append((sum(loss.means["loss"] for loss in losses), gradients_of(model, objective)))
    for loss, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][0], atol=1e-5, rtol=1e-5)
        for n, gradient in found[0][1].items():
            torch.testing.assert_close(gradients[n], gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["rotation", "detach"])
def test_loss_and_gradient_do_not_depend_on_the_ranks(name):
    """Two ranks with two micro-batches each, and one process with one of all samples."""
    data, samples, options = CASES[name]
    model = backbone()
    objective = make(model, data, **options)
    (whole,) = train(model, objective, micro_batches(objective, samples, 1))
    expected = gradients_of(model, objective)
    parts = run_ranks(step_of_rank, 2, name)
    assert sum(loss for loss, _ in parts) == pytest.approx(float(whole.means["loss"]), rel=1e-5)
    for n, gradient in expected.items():
        torch.testing.assert_close(sum(found[n] for _, found in parts), gradient, atol=1e-5, rtol=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, len(DATA.train) - 1), min_size=1, max_size=8), st.booleans(), st.integers(0, 99))
def test_the_bound_on_the_tokens_of_the_views_holds(numbers, memory, seed):
    objective = make(backbone(), memory=memory)
    views = objective.view_transform()
    bound = objective.view_tokens(DATA.train.sizes(np.array(numbers)))
    for number, most in zip(numbers, bound, strict=True):
        made = views(DATA.train[number], SampleRNG(seed, 0, 0, number))
        assert sum(len(segment.tokens) for segment in made.segments) <= most


def test_the_bound_holds_for_the_shortest_words_too():
    """One token of text, the other name of one token, and the longest name decoded: then it is tight."""
    objective = make(backbone())
    shortest = replace(SENTENCES[0], before=(), after=(9,), subject=(3,), object=(4, 5, 6, 7, 8))
    made = [objective.view_transform()(shortest, SampleRNG(0, 0, 0, i)) for i in range(20)]
    assert max(sum(len(s.tokens) for s in views.segments) for views in made) == objective.view_tokens(np.array([7]))[0]


def decoder_gradients(model, objective):
    model.zero_grad(set_to_none=True)
    objective.loss(model, batch_of(objective, SENTENCES), [], 0).total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def test_detached_the_decoder_learns_from_decoding_alone_and_the_operator_as_ever():
    model = backbone()
    whole, detached, decoding = make(model), make(model, detach=True), make(model, jepa_weight=0.0)
    losses = [objective.loss(model, batch_of(objective, SENTENCES), [], 0) for objective in (whole, detached)]
    torch.testing.assert_close(losses[0].means["loss"], losses[1].means["loss"])
    gradients = [decoder_gradients(model, objective) for objective in (whole, detached, decoding)]
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[2][name], atol=1e-7, rtol=1e-5)
    assert any((gradients[0][name] - gradients[1][name]).abs().max() > 1e-3 for name in gradients[0])
    for name, p in whole.named_parameters():
        torch.testing.assert_close(p.grad, detached.get_parameter(name).grad, atol=1e-7, rtol=1e-5)
        assert p.grad.abs().max() > 0, name


def test_detached_tokens_are_read_without_gradient_too():
    """The embedding of a relation's token is the decoder's as well."""
    torch.manual_seed(0)
    model = helpers.backbone()
    objective = make(model, helpers.DATA, detach=True, lm_weight=0.0)
    objective.loss(model, batch_of(objective, FACTS), [], 0).total.backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())
    assert objective.predictor.angles.weight.grad.abs().max() > 0


def test_every_parameter_gets_a_gradient_in_every_step():
    for options in ({}, {"memory": True}, {"detach": True}):
        model = backbone()
        objective = make(model, decode_fraction=1e-9, **options)
        batch = batch_of(objective, SENTENCES)
        assert "decode" not in batch.segments
        objective.loss(model, batch, [], 0).total.backward()
        for name, p in [*model.named_parameters(), *objective.named_parameters()]:
            assert p.grad is not None, name


def test_an_empty_micro_batch_has_no_loss():
    objective = make(model := backbone())
    like = objective.view_transform()(SENTENCES[0], SampleRNG(0, 0, 0, 0))
    full = batch_of(objective, SENTENCES)
    empty = replace(pack([], objective.sequences, like=like), totals=full.totals)
    assert objective.loss(model, empty, [], 0).total == 0


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (DATA, {"predictor": "linear"}, r"objective\.predictor: linear has a matrix for each relation token"),
        (DATA, {"relation_layer": 3}, r"objective\.relation_layer: 3"),
        (helpers.DATA, {"relation_layer": 1}, r"objective\.relation_layer: applies to data\.form=sentences only"),
        (helpers.DATA, {"word_dropout": 0.1}, r"objective\.word_dropout: applies to data\.form=sentences only"),
        (DATA, {"detach": True, "memory": True}, r"objective\.detach: .* memory"),
        (DATA, {"detach": True, "concept_dim": 8}, r"objective\.detach: .* concept_dim"),
    ],
)
def test_bad_options_are_named(data, options, message):
    with pytest.raises(InputError, match=message):
        make(backbone(), data, **options)


def test_the_baseline_is_ranked_against_names_of_every_length():
    """By the likelihood of each whole name after the question, one sequence a name."""
    model = backbone()
    objective = LanguageModeling(LmOptions(), model, DATA)
    names = [*DATA.names[:40], (5,), (5, 6), (7,)]
    answers = LanguageModelAnswerGenerator(lambda task, batch: getattr(objective, task)(model, batch))
    questions = [replace(DATA.splits["test"][i], object=names[9 * i]) for i in range(5)]
    with torch.no_grad():
        answers.prepare(names)
        ranks = answers.ranks(questions)
        for question, rank in zip(questions, ranks, strict=True):
            scores = []
            for name in names:
                states = alone(model, [*question.prompt, *name[:-1]])[len(question.prompt) - 1 :]
                scores.append(-F.cross_entropy(model.logits(states), torch.tensor(name), reduction="sum"))
            right = scores[names.index(question.object)]
            assert rank == 1 + sum(float(score > right + 1e-5) for score in scores)
