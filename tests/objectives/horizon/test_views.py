"""Pairs of positions in a document, and the options that say which."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.config.parsing import parse_section
from jepa_scale.data.examples import Conversation, Document, Turn
from jepa_scale.data.sampling.batches import ALONE, SampleBatchSampler
from jepa_scale.data.sampling.loader import Loader
from jepa_scale.data.sampling.order import Permuted
from jepa_scale.data.sampling.rng import SampleRNG, generator
from jepa_scale.objectives.horizon.config import HorizonOptions
from jepa_scale.objectives.horizon.views import POSITIONS, HorizonViews, check_horizons, sample_pairs
from jepa_scale.packing import pack
from jepa_scale.utils.errors import InputError


def options(**keys):
    return HorizonOptions(**{"horizons": [2, 5, 9], "horizon_probs": [0.5, 0.3, 0.2], "pairs_per_sequence": 6, **keys})


def document(n, seed=0):
    return Document(np.random.default_rng(seed).integers(0, 40, n).astype(np.uint16))


# -- drawing ----------------------------------------------------------------------------------------------------------

some_horizons = st.lists(st.integers(1, 30), min_size=1, max_size=5, unique=True)


@settings(max_examples=100)
@given(st.integers(1, 40), some_horizons, st.data(), st.integers(1, 40), st.integers(0, 1000))
def test_every_pair_lies_in_the_sequence_and_is_as_far_as_its_horizon(length, horizons, data, count, seed):
    weights = st.floats(0.1, 5) | st.just(0.0)
    probs = data.draw(st.lists(weights, min_size=len(horizons), max_size=len(horizons)).filter(any))
    which, anchors = sample_pairs(length, np.array(horizons), np.array(probs), count, generator(f"test/{seed}"))
    targets = anchors + np.array(horizons)[which]
    assert which.dtype == anchors.dtype == np.int64 and which.shape == anchors.shape
    assert (anchors >= 0).all() and (targets < length).all()
    fitting = [h for h, p in zip(horizons, probs, strict=True) if h < length and p > 0]
    assert len(which) == (min(count, length - min(fitting)) if fitting else 0)
    assert {horizons[i] for i in which} <= set(fitting)


@given(st.integers(1, 40), st.integers(1, 30))
def test_zero_is_every_pair_once(length, horizon):
    which, anchors = sample_pairs(length, np.array([horizon]), np.array([1.0]), 0, generator("all"))
    assert anchors.tolist() == list(range(length - horizon)) and which.tolist() == [0] * len(anchors)


def test_every_pair_is_for_one_horizon():
    with pytest.raises(ValueError, match="pairs_per_sequence: 0, every pair, is for one horizon"):
        options(pairs_per_sequence=0)


def chi_square(observed, expected):
    """Its distance from its mean in standard deviations; 4 of them happen once in some 10,000 draws."""
    x = ((observed - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    return (x - freedom) / (2 * freedom) ** 0.5


def test_horizons_come_as_often_as_they_should_among_those_that_fit():
    horizons, probs = np.array([2, 5, 9, 30]), np.array([4.0, 3.0, 2.0, 1.0])
    for length, fits in ((100, 4), (12, 3)):
        which = np.concatenate(
            [sample_pairs(length, horizons, probs, 8, generator(f"h/{length}/{i}"))[0] for i in range(5000)]
        )
        expected = probs[:fits] / probs[:fits].sum() * len(which)
        assert len(which) == 40_000 and which.max() == fits - 1
        assert chi_square(np.bincount(which), expected) < 4


def test_anchors_are_uniform_over_the_whole_range_of_their_horizon():
    horizons, probs = np.array([3, 10]), np.array([0.5, 0.5])
    drawn = [sample_pairs(13, horizons, probs, 10, generator(f"a/{i}")) for i in range(4000)]
    which, anchors = (np.concatenate(x) for x in zip(*drawn, strict=True))
    for index, positions in ((0, 10), (1, 3)):
        found = np.bincount(anchors[which == index], minlength=positions)
        assert len(found) == positions
        assert chi_square(found, np.full(positions, found.sum() / positions)) < 4


# -- views ------------------------------------------------------------------------------------------------------------


def pairs_of(views):
    (segment,) = views.segments
    return [
        tuple(x) for x in zip(views.rows["horizon"], *(segment.positions[n] for n in ("anchor", "target")), strict=True)
    ]


def test_a_document_is_one_segment_with_its_pairs_as_places():
    doc, maker = document(30), HorizonViews(options())
    views = maker(doc, SampleRNG(0, 0, 0, 7))
    (segment,) = views.segments
    assert list(segment.tokens) == list(doc.tokens[:-1]) and list(segment.labels) == list(doc.tokens[1:])
    assert views.counts == {"pairs": 6, "kl_pairs": 6}
    horizons = np.array([2, 5, 9])[views.rows["horizon"]]
    assert (segment.positions["target"] - segment.positions["anchor"] == horizons).all()
    assert views.rows["key"].tolist() == [7 * POSITIONS + int(t) for t in segment.positions["target"]]
    assert views.rows["horizon"].dtype == views.rows["key"].dtype == np.int64


@settings(max_examples=60)
@given(st.lists(st.integers(2, 20), min_size=1, max_size=6), st.integers(0, 99))
def test_pairs_of_packed_documents_never_cross(lengths, seed):
    """Documents of other tokens: both ends of a pair are in its sample's."""
    docs = [Document(np.arange(n) + 100 * i) for i, n in enumerate(lengths)]
    maker = HorizonViews(options())
    batch = pack([maker(doc, SampleRNG(seed, 0, 0, i)) for i, doc in enumerate(docs)])
    ids = batch.sequences["main"].input_ids
    anchors, targets = ids[batch.positions["anchor"]], ids[batch.positions["target"]]
    assert torch.equal(targets - anchors, torch.tensor([2, 5, 9])[batch.rows["horizon"]])
    assert torch.equal(targets // 100, batch.rows["key"] // POSITIONS)
    assert torch.equal(targets % 100, batch.rows["key"] % POSITIONS)
    assert len(anchors) == batch.counts["pairs"] == sum(min(6, n - 3) for n in lengths if n > 3)


def test_too_short_a_document_has_no_pairs_but_its_labels():
    views = HorizonViews(options())(document(3), SampleRNG(0, 0, 0, 0))
    assert views.counts == {"pairs": 0, "kl_pairs": 0} and len(views.segments[0].labels) == 2
    assert pairs_of(views) == [] and views.rows["key"].dtype == np.int64


def test_the_draw_decides_alone():
    doc, maker = document(200), HorizonViews(options(pairs_per_sequence=30))
    first = pairs_of(maker(doc, SampleRNG(0, 0, 0, 7)))
    assert pairs_of(maker(doc, SampleRNG(0, 0, 55, 7))) == first  # the step does not matter
    for other in (SampleRNG(1, 0, 0, 7), SampleRNG(0, 1, 0, 7), SampleRNG(0, 0, 0, 8)):
        assert pairs_of(maker(doc, other)) != first
    assert len(Counter(first)) > 20


def test_targets_without_a_label_are_counted_out_of_the_kl():
    """Of a conversation only what the assistant says is predicted; pairs are anywhere."""
    tokens = np.arange(24)
    chat = Conversation(tokens, (Turn("user", 1, 12), Turn("assistant", 13, 24)), [])
    views = HorizonViews(options(pairs_per_sequence=20))(chat, SampleRNG(0, 0, 0, 0))
    targets = views.segments[0].positions["target"]
    assert views.counts == {"pairs": 20, "kl_pairs": int((targets >= 12).sum())}
    assert 0 < views.counts["kl_pairs"] < 20


@dataclass(frozen=True)
class Documents:
    lengths: tuple

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, number):
        return document(self.lengths[number], number)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_gives_the_same_pairs_with_and_without_processes(workers):
    docs = Documents((30, 2, 9, 14, 3, 25))
    stream = SampleBatchSampler(Permuted(6, lambda epoch: np.arange(6)), 0, 4, ALONE)
    maker = HorizonViews(options())
    batches = [b for (b,) in Loader(docs, stream, maker, ("main",), 0, 3, seed=0, workers=workers)]
    for step, batch in enumerate(batches):
        numbers = [(4 * step + i) % 6 for i in range(4)]
        epochs = [(4 * step + i) // 6 for i in range(4)]
        own = [maker(docs[n], SampleRNG(0, e, step, n)) for n, e in zip(numbers, epochs, strict=True)]
        expected = pack(own)
        for name in ("anchor", "target"):
            assert torch.equal(batch.positions[name], expected.positions[name])
        for name in ("horizon", "key"):
            assert torch.equal(batch.rows[name], expected.rows[name])
        assert batch.counts["pairs"] == expected.counts["pairs"] > 0


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (dict(horizon_probs=[0.0, 0.0, 0.0]), "horizon_probs: must not be negative, and their sum positive"),
        (dict(horizon_probs=[0.5, -0.1, 0.6]), "horizon_probs: must not be negative"),
        (dict(horizon_probs=[0.5, float("nan"), 0.6]), r"horizon_probs\.1: input should be a finite number"),
        (dict(horizon_probs=[0.5, float("inf"), 0.6]), r"horizon_probs\.1: input should be a finite number"),
        (dict(horizon_probs=[0.5, 0.5]), "horizon_probs: has 2 values for 3 horizons; give one for each"),
        (dict(horizon_probs=[]), "horizon_probs: has 0 values for 3 horizons"),
        (dict(horizons=[2, 2, 5]), "horizons: must be different numbers"),
        (dict(horizons=[0, 2, 5]), "horizons: must be different numbers of tokens, at least 1"),
        (dict(horizons=[]), r"objective\.horizons"),
        (dict(loss="infonce"), r"objective\.loss"),
        (dict(kl_temperature=0.0), r"objective\.kl_temperature"),
        (
            dict(pairs_per_seq=3),
            r"objective\.pairs_per_seq: unknown key; LitJEPA's pairs_per_seq is objective\.pairs_per_sequence here",
        ),
        (dict(ema={"momentum": 1.5}), r"objective\.ema\.momentum"),
    ],
)
def test_impossible_options_are_named(keys, named):
    given = {"horizons": [2, 5, 9], "horizon_probs": [0.5, 0.3, 0.2], **keys}
    with pytest.raises(InputError, match=named) as error:
        parse_section(HorizonOptions, given, "objective")
    assert "\n" not in str(error.value) and str(error.value).startswith("objective")


def test_probabilities_are_relative():
    found = parse_section(HorizonOptions, {"horizons": [1, 2], "horizon_probs": [3, 0]}, "objective")
    assert found.horizon_probs == [3, 0]


@pytest.mark.parametrize("longest", [10, 11, 12])
def test_a_horizon_that_fits_no_document_is_refused(longest):
    """Of n tokens n − 1 are read, so the longest horizon is n − 2."""
    fits = longest >= 11
    found = {
        int(i)
        for seed in range(60)
        for i in HorizonViews(options())(document(longest), SampleRNG(0, 0, 0, seed)).rows["horizon"]
    }
    assert (2 in found) is fits  # index 2 is horizon 9
    if fits:
        check_horizons(options(), longest)
    else:
        with pytest.raises(InputError, match=r"objective.horizons: 9 fits no document.*10 tokens; use at most 8"):
            check_horizons(options(), longest)
