"""Which tokens `span` masks, and the views that it makes of a text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.config.parsing import parse_section
from jepa_scale.data.examples import Document
from jepa_scale.data.sampling.rng import SampleRNG, generator
from jepa_scale.objectives.span.config import SpanOptions
from jepa_scale.objectives.span.views import PREDICTOR, TARGETS, SpanViews, free_runs, mask_spans
from jepa_scale.packing import IGNORE, pack
from jepa_scale.utils.errors import DataError, InputError

EOS, PAD = 0, 1


def maker(predicts=True, teaches=False, **keys):
    return SpanViews(SpanOptions(**keys), frozenset({EOS, PAD}), predicts, teaches)


def text(n, seed=0, end=True):
    tokens = np.random.default_rng(seed).integers(2, 40, n)
    return Document(np.append(tokens, EOS) if end else tokens)


# -- the sampler ------------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(
    st.lists(st.booleans(), min_size=1, max_size=60).filter(any),
    st.floats(0, 0.999),
    st.floats(0, 8),
    st.integers(0, 1000),
)
def test_as_many_tokens_are_masked_as_the_ratio_says_and_none_that_is_not_eligible(eligible, ratio, mean, seed):
    eligible = np.array(eligible)
    masked = mask_spans(eligible, ratio, mean, generator(f"test/{seed}"))
    n = int(eligible.sum())
    assert masked.shape == eligible.shape and masked.dtype == bool
    assert not (masked & ~eligible).any()
    assert masked.sum() == min(int(ratio * n), n - 1)
    assert (eligible & ~masked).any()  # at least one token is left


@settings(max_examples=100)
@given(st.lists(st.booleans(), max_size=80))
def test_free_runs_are_the_maximal_runs(values):
    values = np.array(values, dtype=bool)
    again = np.zeros(len(values) + 2, dtype=bool)  # with a border
    last = -2
    for begin, length in free_runs(values):
        assert length > 0 and begin > last + 1 - (last < 0)  # runs that touch would be one
        again[begin + 1 : begin + 1 + length] = True
        last = begin + length - 1
    assert (again[1:-1] == values).all()


def test_spans_have_poisson_lengths_and_start_anywhere():
    """Of one span alone: the first one is max(1, Poisson(3)) long, and as likely to begin at one place as at another."""
    n, draws, lengths, begins = 40, 20_000, [], []
    for i in range(draws):
        rng = generator(f"poisson/{i}")
        masked = mask_spans(np.ones(n, bool), 0.03, 0.0, rng)  # one token
        assert masked.sum() == 1
        begins.append(int(masked.argmax()))
    found = np.bincount(begins, minlength=n)
    x = ((found - draws / n) ** 2 / (draws / n)).sum()
    assert (x - (n - 1)) / (2 * (n - 1)) ** 0.5 < 4
    long = 4000  # so many positions that spans seldom touch
    for i in range(40):
        masked = mask_spans(np.ones(long, bool), 0.01, 3.0, generator(f"lengths/{i}"))
        lengths += [length for _, length in free_runs(masked)][:-1]
    expected = 3 + np.exp(-3)  # of max(1, Poisson(3))
    assert abs(np.mean(lengths) - expected) < 0.25
    assert abs(np.var(lengths) - (12 + np.exp(-3) - expected**2)) < 0.8


def test_a_span_fits_what_is_free_even_where_it_is_crowded():
    """Two thirds of the positions are single free ones between others: long spans become single tokens there."""
    eligible = np.arange(60) % 3 == 0
    masked = mask_spans(eligible, 0.9, 8.0, generator("crowded"))
    assert masked.sum() == 18 and not (masked & ~eligible).any()


def test_no_span_crosses_what_is_not_eligible():
    eligible = np.ones(30, bool)
    eligible[[10, 20]] = False
    for i in range(200):
        masked = mask_spans(eligible, 0.6, 6.0, generator(f"cross/{i}"))
        assert not masked[[10, 20]].any()


# -- views ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(1, 50), st.booleans(), st.booleans(), st.integers(0, 100))
def test_views_are_the_text_without_its_masked_tokens(n, predicts, teaches, sample):
    example, make = text(n, sample), maker(predicts, teaches)
    views = make(example, SampleRNG(3, 0, 7, sample))
    tokens = example.tokens[:-1]  # no EOS
    by_role = {}
    for segment in views.segments:
        by_role.setdefault((segment.sequence, segment.role), []).append(segment)
    (whole,) = by_role["main", "sample"]
    assert (np.asarray(whole.tokens) == tokens).all() and (whole.position_ids == np.arange(n)).all()
    assert len(by_role["main", "global"]) == 2 and len(by_role["main", "local"]) == 6
    shares = []
    for role in ("global", "local"):
        for view in by_role["main", role]:
            assert (np.asarray(view.tokens) == tokens[view.position_ids]).all()
            assert (np.diff(view.position_ids) > 0).all() and len(view.tokens) >= 1
            assert view.labels is None
            shares.append(1 - len(view.tokens) / n)
    assert all(
        low <= share * n + 1 and share <= high
        for share, (low, high) in zip(shares, [(0.25 * n, 0.3)] * 2 + [(0.4 * n, 0.45)] * 6, strict=True)
    )
    predicted = by_role.get((PREDICTOR, "predicted"), [])
    with_mask = [v for role in ("global", "local") for v in by_role["main", role] if len(v.tokens) < n]
    assert len(predicted) == (len(with_mask) if predicts else 0)
    lengths = views.rows["span_length"]
    at = 0
    read_from = by_role[TARGETS, "target"][0] if teaches else whole
    for view, full in zip(with_mask if predicts else [], predicted, strict=True):
        assert (np.asarray(full.tokens) == tokens).all() and (full.position_ids == np.arange(n)).all()
        assert (view.positions["kept"] == np.arange(len(view.tokens))).all()
        assert (full.positions["seen"] == view.position_ids).all()
        hidden = full.positions["masked"]
        assert full.queries == len(hidden)
        assert sorted([*hidden, *full.positions["seen"]]) == list(range(n))
        assert (read_from.positions["span"][at : at + len(hidden)] == hidden).all()
        at += len(hidden)
    assert lengths.sum() == at == len(read_from.positions["span"])
    ends = np.cumsum(lengths)
    for begin, end in zip(ends - lengths, ends, strict=True):
        assert (np.diff(read_from.positions["span"][begin:end]) == 1).all()
    assert views.counts == {"texts": 1, "spans": len(lengths), "chosen": int(len(lengths) > 0), "masked": at}
    if len(lengths):
        (length,) = views.rows["chosen_length"]
        runs = [tuple(read_from.positions["span"][end - n_ : end]) for n_, end in zip(lengths, ends, strict=True)]
        assert len(whole.positions["chosen"]) == length and tuple(whole.positions["chosen"]) in runs
    if teaches:
        teacher = by_role[TARGETS, "target_global"]
        assert [list(v.tokens) for v in teacher] == [list(v.tokens) for v in by_role["main", "global"]]
    total = sum(len(s.tokens) for s in views.segments)
    assert total <= make.most_tokens(np.array([len(example.tokens)]))[0]
    assert make.most_tokens(np.array([n]))[0] <= make.most_tokens(np.array([n + 1]))[0]


def test_eos_in_the_middle_is_left_out_and_its_place_kept():
    example = Document(np.array([5, 6, EOS, 7, 8, PAD, 9, EOS]))
    (whole,) = [s for s in maker(lm_weight=1.0)(example, SampleRNG(0, 0, 0, 0)).segments if s.role == "sample"]
    assert list(whole.tokens) == [5, 6, 7, 8, 9]
    assert list(whole.position_ids) == [0, 1, 3, 4, 6]
    assert list(whole.labels) == [6, EOS, 8, PAD, EOS]  # what follows in the text, which may be an EOS


def test_views_are_a_function_of_seed_epoch_and_sample():
    def of(seed, epoch, step, sample):
        return [list(s.tokens) for s in maker()(text(40), SampleRNG(seed, epoch, step, sample)).segments]

    assert of(1, 2, 3, 4) == of(1, 2, 9, 4)  # whatever the step, i.e. the batch size
    assert len({str(of(*args)) for args in ((1, 2, 3, 4), (2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 3, 5))}) == 4


def test_places_of_views_and_predictor_match_when_packed():
    make = maker()
    batch = pack([make(text(n, n), SampleRNG(0, 0, 0, n)) for n in (9, 1, 30, 2, 17)], ("main", PREDICTOR))
    main, full = batch.sequences["main"], batch.sequences[PREDICTOR]
    kept, seen, masked = (batch.positions[name] for name in ("kept", "seen", "masked"))
    assert (main.input_ids[kept] == full.input_ids[seen]).all()
    assert (main.position_ids[kept] == full.position_ids[seen]).all()
    assert (main.input_ids[batch.positions["span"]] == full.input_ids[masked]).all()
    assert sorted([*seen.tolist(), *masked.tolist()]) == list(range(full.num_tokens))
    assert batch.rows["span_length"].sum() == len(masked)
    assert (main.labels == IGNORE).all()


def test_nine_views_cost_less_than_six_texts():
    views = [maker()(text(200, i), SampleRNG(0, 0, 0, i)) for i in range(20)]
    tokens = sum(len(s.tokens) for v in views for s in v.segments if s.sequence == "main")
    assert tokens / (20 * 200) == pytest.approx(1 + 2 * 0.725 + 6 * 0.575, abs=0.05)


def test_a_text_of_eos_alone_is_refused():
    with pytest.raises(DataError, match="sample 7: has only EOS"):
        maker()(Document(np.array([EOS, EOS])), SampleRNG(0, 0, 0, 7))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"global_ratio": [0.3, 1.0]}, r"objective.global_ratio: \[0.3, 1.0\] must be two shares"),
        ({"local_ratio": [0.5, 0.4]}, "objective.local_ratio"),
        ({"local_ratio": [-0.1, 0.4]}, "objective.local_ratio"),
        ({"jepa_weight": 0}, "objective.jepa_weight: jepa_weight, lm_weight and mlm_weight are all 0"),
        ({"global_views": 0}, "objective.global_views"),
        ({"span_lenght": 3}, "did you mean 'span_length'"),
    ],
)
def test_bad_options_are_named(keys, message):
    with pytest.raises(InputError, match=message):
        parse_section(SpanOptions, keys, "objective")
