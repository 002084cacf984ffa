"""`stp`: its positions, and its loss against a plain reference in fp64, one sequence at a time, no packing."""

import copy
import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.config.parsing import parse_section
from jepa_scale.data.examples import Conversation, Document, Turn
from jepa_scale.data.sampling.rng import SampleRNG, generator
from jepa_scale.experiment import objective_class
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.objectives.stp import Stp, StpViews, changes, cosines, draw_spans, draw_triples, path_of
from jepa_scale.objectives.stp_options import StpOptions
from jepa_scale.packing import IGNORE, pack
from jepa_scale.utils.errors import InputError
from tests.objectives.helpers import alone, micro_batches

VOCABULARY = 40
LLAMA = dict(model_type="llama", hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
NAMES = {"triple": ("s", "r", "t"), "span": ("first", "start", "end", "last")}


def document(n, seed=0):
    return Document(np.random.default_rng(seed).integers(0, VOCABULARY, n))


def chat(n, *turns, seed=0):
    return Conversation(document(n, seed).tokens, tuple(Turn(*turn) for turn in turns), [])


CHAT = chat(
    26, ("system", 1, 4), ("user", 6, 9), ("assistant", 11, 13), ("user", 15, 19), ("assistant", 22, 26), seed=3
)
SAMPLES = [
    document(20, 1),
    CHAT,
    document(3, 2),
    document(9, 4),
    document(2, 5),
    chat(16, ("user", 1, 6), ("assistant", 8, 14)),
]


def model(name="native"):
    torch.manual_seed(0)
    if name == "llama":
        options = ModelOptions(family="huggingface", config=dict(LLAMA, initializer_range=0.3))
    else:
        options = ModelOptions(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, initializer_range=0.3)
    return build_backbone(options, VOCABULARY)


def make(backbone, **options):
    return Stp(StpOptions(**options), backbone, None)


# -- drawing ----------------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.integers(0, 50), st.integers(1, 6), st.integers(0, 60).filter(lambda x: x != 1), st.integers(0, 1000))
def test_triples_are_rising_and_no_longer_than_they_may_be(length, count, longest, seed):
    found = draw_triples(length, count, longest, generator(f"t/{seed}"))
    assert found.dtype == np.int64 and found.shape == (count if length >= 3 else 0, 3)
    s, r, t = found.T
    assert ((s >= 0) & (s < r) & (r < t) & (t < length)).all()
    assert not longest or (t - s <= longest).all()


@settings(max_examples=100)
@given(st.integers(0, 50), st.integers(1, 6), st.integers(0, 60), st.integers(0, 1000))
def test_spans_are_rising_and_never_the_whole(length, count, longest, seed):
    found = draw_spans(length, count, longest, generator(f"s/{seed}"))
    assert found.dtype == np.int64 and found.shape == (count if length >= 3 else 0, 2)
    start, end = found.T
    assert ((start >= 0) & (start < end) & (end < length) & (end - start < length - 1)).all()
    assert not longest or (end - start <= longest).all()


def far_off(found, expected):
    """Chi-square's distance from its mean in standard deviations; 4 of them happen once in some 10,000 draws."""
    counts = Counter(map(tuple, found.tolist()))
    assert counts.keys() == expected.keys()
    n, freedom = len(found), len(expected) - 1
    x = sum((counts[one] - n * p) ** 2 / (n * p) for one, p in expected.items())
    return (x - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("longest", [0, 2, 4, 6, 99])
def test_all_triples_are_equally_likely(longest):
    every = [one for one in combinations(range(7), 3) if one[2] - one[0] <= (longest or 7)]
    found = draw_triples(7, 40_000, longest, generator("uniform"))
    assert far_off(found, dict.fromkeys(every, 1 / len(every))) < 4


@pytest.mark.parametrize("longest", [0, 1, 3])
def test_spans_have_a_uniform_start_and_then_a_uniform_end(longest):
    expected = {}
    for start in range(6):
        ends = [e for e in range(start + 1, 7) if (start, e) != (0, 6) and e - start <= (longest or 7)]
        expected |= {(start, end): 1 / 6 / len(ends) for end in ends}
    assert far_off(draw_spans(7, 40_000, longest, generator("uniform")), expected) < 4


# -- paths and views --------------------------------------------------------------------------------------------------


def test_a_path_is_the_last_exchange_without_what_the_template_puts_between():
    assert path_of(CHAT, 25).tolist() == [15, 16, 17, 18, 22, 23, 24]  # its last token is not read
    assert path_of(document(6), 5).tolist() == [0, 1, 2, 3, 4]
    assert path_of(chat(12, ("assistant", 1, 3), ("user", 5, 8)), 11).tolist() == [1, 2, 5, 6, 7]
    assert path_of(chat(12, ("system", 0, 3), ("assistant", 5, 8)), 11).tolist() == [5, 6, 7]
    assert path_of(chat(12, ("system", 0, 3)), 11).tolist() == []
    assert path_of(chat(12, ("user", 0, 0), ("assistant", 11, 12)), 11).tolist() == []


turns = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), st.integers(0, 5), st.integers(0, 4)), max_size=6
)


@settings(max_examples=100)
@given(
    st.lists(turns, min_size=1, max_size=4), st.sampled_from(["triple", "span"]), st.integers(1, 3), st.integers(0, 99)
)
def test_places_of_packed_conversations_are_in_their_own_last_exchange(chats, form, spans, seed):
    """Tokens tell sample, place and whether it may be chosen."""
    examples, possible = [], 0
    for i, parts in enumerate(chats):
        said, at = [], 1  # a template opens with a token of its own
        for role, gap, size in parts:
            said.append(Turn(role, at + gap, at + gap + size))
            at += gap + size
        tokens = 100 * i + np.arange(at + 2)
        last = {turn.role: range(turn.start, turn.stop) for turn in said if turn.role != "system"}
        own = sorted(x for turn in last.values() for x in turn)
        examples.append((Conversation(tokens, tuple(said), []), own))
        possible += spans * (len(own) >= 3)
    maker = StpViews(StpOptions(form=form, spans=spans))
    batch = pack([maker(example, SampleRNG(seed, 0, 0, i)) for i, (example, _) in enumerate(examples)])
    at = {name: batch.sequences["main"].input_ids[batch.positions[name]] for name in NAMES[form]}
    assert batch.counts["spans"] == possible and {len(x) for x in at.values()} == {possible}
    for row in torch.stack(list(at.values()), dim=1).tolist():
        (sample,) = {token // 100 for token in row}
        own = examples[sample][1]
        assert {token % 100 for token in row} <= set(own)
        assert row == sorted(row) and (len(set(row)) == 3 if form == "triple" else row[1] < row[2])
        assert form == "triple" or (row[0] % 100, row[3] % 100) == (own[0], own[-1])


def test_a_sample_is_one_segment_and_its_places_are_its_own():
    maker = StpViews(StpOptions(spans=5))
    doc = document(200)
    views = maker(doc, SampleRNG(0, 2, 9, 7))
    (segment,) = views.segments
    assert list(segment.tokens) == list(doc.tokens[:-1]) and list(segment.labels) == list(doc.tokens[1:])
    assert views.counts == {"spans": 5}
    drawn = lambda *draw: [x.tolist() for x in maker(doc, SampleRNG(*draw)).segments[0].positions.values()]  # noqa: E731
    assert drawn(0, 2, 9, 7) == drawn(0, 2, 10, 7)  # the step has no part in it
    assert all(drawn(0, 2, 9, 7) != drawn(*other) for other in ((1, 2, 9, 7), (0, 3, 9, 7), (0, 2, 9, 8)))
    assert make(model()).view_tokens(np.array([2, 9])).tolist() == [1, 8]


@pytest.mark.parametrize("form", ["triple", "span"])
def test_max_span_bounds_the_span(form):
    maker = StpViews(StpOptions(form=form, spans=300, max_span=4))
    positions = maker(document(200), SampleRNG(0, 0, 0, 0)).segments[0].positions
    a, b = ("s", "t") if form == "triple" else ("start", "end")
    assert (positions[b] - positions[a]).max() == 4


# -- closed forms -----------------------------------------------------------------------------------------------------


def bend(states, form, *positions):
    at = {name: torch.tensor([place]) for name, place in zip(NAMES[form], positions, strict=True)}
    return float(1 - cosines(*changes(states, at, form)))


def test_a_straight_line_costs_nothing_a_right_angle_one_and_a_way_back_two():
    line = torch.tensor([3.0, -1, 2]) + torch.tensor([0.0, 1, 1.5, 4, 9])[:, None] * torch.tensor([1.0, 2, -2])
    for s, r, t in combinations(range(5), 3):
        assert bend(line, "triple", s, r, t) == pytest.approx(0, abs=1e-6)
    for start, end in combinations(range(5), 2):
        if (start, end) != (0, 4):
            assert bend(line, "span", 0, start, end, 4) == pytest.approx(0, abs=1e-6)
    corner = torch.tensor([[0.0, 0], [2, 0], [2, 5]])
    assert bend(corner, "triple", 0, 1, 2) == bend(corner, "span", 0, 0, 1, 2) == bend(corner, "span", 0, 1, 2, 2) == 1
    back = torch.tensor([[0.0, 1], [2, 3], [1, 2]])
    assert bend(back, "triple", 0, 1, 2) == pytest.approx(2) and bend(back, "span", 0, 1, 2, 2) == pytest.approx(2)
    square = torch.tensor([[0.0, 0], [1, 0], [1, 1], [2, 1]])  # the rest of the path is right, right
    assert bend(square, "span", 0, 1, 2, 3) == 1 and bend(square, "span", 0, 0, 2, 3) == pytest.approx(1 - 0.5**0.5)


def test_a_change_that_is_rounding_has_no_direction_and_hardly_a_gradient():
    """Equal tokens at the start of a text have equal states, but for rounding."""
    for states in (torch.zeros(3, 8), torch.ones(3, 8), torch.ones(3, 8) + 1e-7 * torch.randn(3, 8)):
        states = states.requires_grad_()
        value = cosines(*changes(states, {n: torch.tensor([i]) for i, n in enumerate("srt")}, "triple"))
        (gradient,) = torch.autograd.grad(value.sum(), states)
        assert value.abs() < 1e-3 and gradient.isfinite().all() and gradient.norm() < 1
    assert not cosines(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2, requires_grad=True)).requires_grad
    backbone = model()
    objective = make(backbone, lm_weight=0.0, jepa_weight=1.0)
    (loss,) = run(backbone, objective, [Document(np.full(12, 7))])
    assert float(loss.total.detach()) == pytest.approx(1, abs=1e-2)
    assert sum(p.grad.square().sum() for p in backbone.parameters()) < 1


# -- the loss ---------------------------------------------------------------------------------------------------------


def run(backbone, objective, *parts, step=0):
    losses = [
        objective.loss(backbone, batch, [], 0) for batch in micro_batches(objective, SAMPLES[0], *parts, step=step)
    ]
    for loss in losses:
        loss.total.backward()
    return losses


def gradients(backbone):
    found = {name: p.grad for name, p in backbone.named_parameters()}
    backbone.zero_grad(set_to_none=True)
    return found


def assert_gradients(found, expected, rtol=1e-3):
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(
            grad, expected[name].float(), atol=1e-5, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}"
        )


def reference(backbone, objective, samples):
    """(lm, jepa), sample by sample and span by span, without the objective's own arithmetic."""
    o, lm, bends = objective.options, [], []
    tap = {None: None, -2: 2, 3: 3, 1: 1}[o.tap_layer]
    for number, sample in enumerate(samples):
        positions = objective.view_transform()(sample, SampleRNG(0, 0, 0, number)).segments[0].positions
        tokens, labels = (np.asarray(x)[:-1].tolist() for x in sample.lm_sequence())
        logits, h = backbone.logits(alone(backbone, tokens)), alone(backbone, tokens, tap)
        lm += [F.cross_entropy(logits[i], torch.tensor(x)) for i, x in enumerate(labels) if x != IGNORE]
        for at in zip(*(positions[name].tolist() for name in NAMES[o.form]), strict=True):
            if o.form == "triple":
                s, r, t = at
                pair = h[t] - h[r], h[r] - h[s]
            else:
                first, start, end, last = at
                pair = h[end] - h[start], (h[start] - h[first]) + (h[last] - h[end])
            bends.append(1 - torch.nn.CosineSimilarity(dim=0)(*pair))
    return torch.stack(lm).mean(), torch.stack(bends).mean()


@pytest.mark.parametrize("tap_layer", [None, -2, 1, 3])
@pytest.mark.parametrize("form", ["triple", "span"])
@pytest.mark.parametrize("name", ["native", "llama"])
def test_loss_and_gradient_equal_the_plain_reference(name, form, tap_layer):
    backbone = model(name)
    objective = make(backbone, form=form, tap_layer=tap_layer, spans=3, jepa_weight=0.7, lm_weight=1.3)
    assert objective.tap == {None: 0, -2: 2, 1: 1, 3: 3}[tap_layer]
    (loss,) = run(backbone, objective, SAMPLES)
    wide = copy.deepcopy(backbone).double()
    wide.zero_grad(set_to_none=True)
    lm, jepa = reference(wide, objective, SAMPLES)
    total = 1.3 * lm + 0.7 * jepa
    total.backward()
    for name, value in {"lm_loss": lm, "jepa_loss": jepa, "loss": total}.items():
        torch.testing.assert_close(loss.means[name], value.detach().float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss.total.detach(), loss.means["loss"])
    assert_gradients(gradients(backbone), gradients(wide))
    assert not loss.gauges and 0.1 < float(jepa.detach()) < 1.9


@pytest.mark.parametrize("form", ["triple", "span"])
def test_micro_batches_add_up_to_the_batch_as_a_whole(form):
    """In values and in gradient, one of them without a span and one without a sample."""
    backbone = model()
    objective = make(backbone, form=form, spans=2, jepa_weight=0.7)
    (whole,) = run(backbone, objective, SAMPLES)
    together = gradients(backbone)
    parts = run(backbone, objective, SAMPLES[:2], SAMPLES[2:3], SAMPLES[3:], [])
    assert_gradients(gradients(backbone), together, rtol=1e-4)
    for name, value in whole.means.items():
        torch.testing.assert_close(sum(part.means[name] for part in parts), value, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(sum(part.total for part in parts), whole.total, atol=1e-6, rtol=1e-5)
    assert parts[1].means["jepa_loss"] == parts[3].means["jepa_loss"] == 0


@pytest.mark.parametrize("samples", [[document(2), document(3)], []], ids=["short", "empty"])
def test_without_a_span_there_is_nothing_to_pay(samples):
    backbone = model()
    (loss,) = run(backbone, make(backbone), samples)
    assert loss.means["jepa_loss"] == 0 and loss.total.isfinite() and (loss.total > 0) == bool(samples)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())


def test_the_loss_is_computed_in_fp32_under_autocast():
    backbone = model()
    objective = make(backbone)
    (batch,) = micro_batches(objective, SAMPLES[0], SAMPLES)
    states = backbone.hidden(batch.sequences["main"]).detach()
    exact = cosines(*changes(states.bfloat16(), batch.positions, "triple"))
    backbone.hidden = lambda stream: states.bfloat16()  # what a decoder in half precision gives
    backbone.logits = lambda rows: rows.float() @ torch.ones(16, VOCABULARY)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective.loss(backbone, batch, [], 0)
    assert loss.means["jepa_loss"].dtype == torch.float32
    torch.testing.assert_close(loss.means["jepa_loss"], (1 - exact).mean())


def test_the_weight_follows_its_ramp():
    backbone = model()
    objective = make(backbone, jepa_weight=0.6, jepa_start=4, jepa_ramp=3)
    for step, weight in ((0, 0.0), (4, 0.0), (5, 0.2), (7, 0.6), (99, 0.6)):
        (loss,) = run(backbone, objective, SAMPLES, step=step)
        assert loss.gauges["jepa_weight"] == pytest.approx(weight)
        torch.testing.assert_close(loss.total.detach(), loss.means["lm_loss"] + weight * loss.means["jepa_loss"])


# -- evaluation -------------------------------------------------------------------------------------------------------


def measure(backbone, samples=SAMPLES, sizes=(6,), **options):
    objective = make(backbone, **options)

    def call(task, batch):
        with torch.no_grad():
            return getattr(objective, task)(backbone, batch)

    diagnostics, first, batches = objective.diagnostics(call), 0, []
    for size in sizes:
        part = range(first, min(first + size, len(samples)))
        views = [diagnostics.views(samples[i], SampleRNG(0, 0, 0, i)) for i in part]
        batches.append(pack(views, like=diagnostics.views(SAMPLES[0], SampleRNG(0, 0, 0, 0))))
        first += size
    return diagnostics.measure(batches)


@pytest.mark.parametrize("tap_layer", [None, 1])
def test_diagnostics_equal_the_plain_reference_and_stay_so(tap_layer):
    backbone = model("llama")
    found = measure(backbone, tap_layer=tap_layer)
    wide = copy.deepcopy(backbone).double()
    cosine, rows = [], []
    with torch.no_grad():
        for number, sample in enumerate(SAMPLES):
            positions = StpViews(StpOptions(spans=4))(sample, SampleRNG(0, 0, 0, number)).segments[0].positions
            h = alone(wide, sample.tokens[:-1].tolist(), None if tap_layer is None else 1)
            for s, r, t in zip(*(positions[name].tolist() for name in "srt"), strict=True):
                cosine.append(F.cosine_similarity(h[t] - h[r], h[r] - h[s], dim=0))
                rows += [h[s], h[r], h[t]]
    share = torch.linalg.svdvals(torch.stack(rows) - torch.stack(rows).mean(0))
    share = share / share.sum()
    rank = math.exp(-(share * share.clamp(min=1e-30).log()).sum().item())
    assert len(cosine) == 16
    assert found == pytest.approx(
        {"curvature_cosine": float(torch.stack(cosine).mean()), "effective_rank": rank}, rel=1e-4
    )
    assert measure(backbone, tap_layer=tap_layer) == found
    assert measure(backbone, sizes=(2, 1, 9, 2), tap_layer=tap_layer) == pytest.approx(found, rel=1e-5)
    for other in (dict(form="span", max_span=1), dict(max_span=2, spans=7)):  # runs with other options can be compared
        assert measure(backbone, tap_layer=tap_layer, **other) == found


def test_a_split_without_triples_has_nothing_to_say():
    backbone = model()
    assert measure(backbone, [document(2), document(3)]) == measure(backbone, [], sizes=()) == {}
    assert make(backbone, eval_spans=0).diagnostics(lambda task, batch: None) is None
    assert [make(backbone, eval_spans=n).diagnostics(lambda task, batch: None).samples for n in (1, 4, 5)] == [1, 1, 2]


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (dict(form="line"), r"objective\.form"),
        (dict(spans=0), r"objective\.spans"),
        (dict(max_span=1), "max_span: a triple takes 2 tokens"),
        (dict(max_span=-1), r"objective\.max_span"),
        (dict(jepa_wait=1), r"objective\.jepa_wait: unknown key"),
    ],
)
def test_impossible_options_are_named(keys, named):
    with pytest.raises(InputError, match=named) as error:
        parse_section(StpOptions, keys, "objective")
    assert "\n" not in str(error.value)


def test_a_tap_outside_the_decoder_is_refused():
    for tap_layer in (0, 4, -4):
        with pytest.raises(InputError, match=f"objective.tap_layer: {tap_layer} is outside the decoder's 3 blocks"):
            make(model(), tap_layer=tap_layer)


def test_it_is_known_by_its_name():
    assert objective_class("stp") is Stp and Stp.Options().jepa_weight == 0.02
