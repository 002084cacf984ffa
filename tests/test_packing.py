"""Laws of the packer, over arbitrary segments."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.packing import IGNORE, PackedBatch, Segment, SegmentTable, Views, add_counts, pack, pack_stream

ROLES = ("forward", "reverse")


@st.composite
def segments(draw):
    n = draw(st.integers(1, 6))
    ids = st.lists(st.integers(0, 99), min_size=n, max_size=n)
    return Segment(
        tokens=draw(ids),
        role=draw(st.sampled_from(ROLES)),
        labels=draw(st.none() | st.lists(st.integers(0, 99) | st.just(IGNORE), min_size=n, max_size=n)),
        positions=draw(st.none() | st.lists(st.integers(0, 50), min_size=n, max_size=n, unique=True).map(sorted)),
    )


def read(stream, number):
    """Segment ``number`` of a stream as three lists."""
    span = slice(*stream.table.cu_seqlens[number : number + 2].tolist())
    return tuple(x[span].tolist() for x in (stream.input_ids, stream.position_ids, stream.labels))


def written(segment):
    n = len(segment.tokens)
    return (
        list(segment.tokens),
        list(range(n) if segment.positions is None else segment.positions),
        [IGNORE] * n if segment.labels is None else list(segment.labels),
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(segments(), min_size=1, max_size=8))
def test_a_stream_holds_its_segments_in_the_order_given(given_segments):
    stream = pack_stream(given_segments)
    assert [read(stream, i) for i in range(len(given_segments))] == [written(s) for s in given_segments]
    assert stream.num_tokens == sum(stream.table.lengths) == len(stream.labels)
    assert stream.table.max_seqlen == max(len(s.tokens) for s in given_segments)
    assert stream.labelled.tolist() == [t for t, label in enumerate(stream.labels.tolist()) if label != IGNORE]
    assert stream.input_ids[stream.first].tolist() == [s.tokens[0] for s in given_segments]
    assert stream.input_ids[stream.last].tolist() == [s.tokens[-1] for s in given_segments]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(segments(), max_size=4), min_size=1, max_size=4))
def test_packing_loses_nothing_and_knows_whose_each_segment_is(samples):
    batch = pack([Views(s) for s in samples])
    stream = batch.streams["main"]
    for role in ROLES:
        asked = [(i, s) for i, sample in enumerate(samples) for s in sample if s.role == role]
        if asked:
            assert batch.samples[role].tolist() == [i for i, _ in asked]
            numbers = batch.segments[role].tolist()
            assert [read(stream, number) for number in numbers] == [written(s) for _, s in asked]
        else:
            assert role not in batch.segments
    everything = [s for sample in samples for s in sample]
    assert batch.counts["samples"] == len(samples)
    assert batch.counts["tokens"] == sum(len(s.tokens) for s in everything)
    assert batch.counts["labels"] == sum(label != IGNORE for s in everything for label in s.labels or ())
    assert list(stream.table.lengths) == sorted(stream.table.lengths)
    if everything:
        assert len(stream.table.lengths) == len(everything)
        assert batch.num_tokens == batch.counts["tokens"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(st.sampled_from(ROLES), st.integers(0, 3)), max_size=5), min_size=1, max_size=5))
def test_segments_with_one_key_are_packed_once_and_shared(samples):
    """Keyed by role and key; a key's tokens say which it is, so that a mix-up shows."""

    def name(role, key):
        return Segment(tokens=[ROLES.index(role), key] + [9] * key, role=role, key=key)

    batch = pack([Views([name(*entry) for entry in sample]) for sample in samples])
    stream = batch.streams["main"]
    distinct = {entry for sample in samples for entry in sample}
    assert len(stream.table.lengths) == max(len(distinct), 1)
    for role in ROLES:
        asked = [key for sample in samples for r, key in sample if r == role]
        found = [read(stream, number)[0] for number in batch.segments.get(role, torch.empty(0)).tolist()]
        assert found == [list(name(role, key).tokens) for key in asked]


def test_segments_without_a_key_are_never_shared():
    batch = pack([Views([Segment([1, 2], "a"), Segment([1, 2], "a")])])
    assert batch.streams["main"].table.lengths == (2, 2)
    assert batch.segments["a"].tolist() == [0, 1]


def test_streams_are_packed_apart():
    views = Views([Segment([1, 2, 3], "fact"), Segment([4], "name", stream="names", key=4)])
    batch = pack([views, views], streams=("main", "names"))
    assert batch.streams["main"].input_ids.tolist() == [1, 2, 3, 1, 2, 3]
    assert batch.streams["names"].input_ids.tolist() == [4]
    assert batch.segments["name"].tolist() == [0, 0] and batch.samples["name"].tolist() == [0, 1]


def test_an_empty_stream_gets_one_unlabelled_token():
    batch = pack([Views([Segment([5], "a")])], streams=("main", "names"))
    filler = batch.streams["names"]
    assert filler.table.lengths == (1,) and filler.input_ids.shape == (1,) and len(filler.labelled) == 0
    assert batch.counts["tokens"] == 1  # the filler is nobody's token


def test_values_are_stacked_and_counts_added():
    views = [Views([Segment([1], "a")], {"relation": i, "grid": np.full((2, 2), i)}, {"pairs": i}) for i in (1, 2)]
    batch = pack(views, step=7, seed=3)
    assert batch.values["relation"].tolist() == [1, 2]
    assert batch.values["grid"].shape == (2, 2, 2) and batch.values["grid"][1].unique().tolist() == [2]
    assert batch.counts["pairs"] == 3 and (batch.step, batch.seed) == (7, 3)
    assert add_counts([batch, batch]) == {"samples": 4, "pairs": 6, "tokens": 4, "labels": 0}


def test_moving_a_batch_keeps_it():
    batch = pack([Views([Segment([1, 2], "a", labels=[2, IGNORE])], {"x": 1.0})])
    moved = batch.to("cpu")
    assert isinstance(moved, PackedBatch) and moved.streams["main"].table.lengths == (2,)
    assert moved.streams["main"].labelled.tolist() == [0] and moved.counts == batch.counts


@pytest.mark.parametrize(
    ("segment", "message"),
    [(Segment([], "a"), "no tokens"), (Segment([1], "a", stream="nmaes"), "unknown stream 'nmaes'")],
)
def test_what_cannot_be_packed_is_refused(segment, message):
    with pytest.raises(ValueError, match=message):
        pack([Views([segment])])


@pytest.mark.parametrize("labels", [[1, 2], [1]])
def test_labels_must_be_as_many_as_tokens(labels):
    with pytest.raises(AssertionError, match="labels"):
        pack_stream([Segment([1, 2, 3], "a", labels=labels)])


def test_boundaries_are_int32():
    table = SegmentTable.from_lengths([3, 1, 2])
    assert table.cu_seqlens.dtype == torch.int32 and table.cu_seqlens.tolist() == [0, 3, 4, 6]
