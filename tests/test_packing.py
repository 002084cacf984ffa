"""Laws of the packer, over arbitrary segments."""

import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.data.sampling.loader import _Pickler
from jepa_scale.models.attention.packed import attention
from jepa_scale.packing import IGNORE, PackedBatch, Segment, SegmentTable, Views, add_counts, pack, pack_sequence

ROLES = ("forward", "reverse")


@st.composite
def segments(draw):
    n = draw(st.integers(1, 6))
    ids = st.lists(st.integers(0, 99), min_size=n, max_size=n)
    return Segment(
        tokens=draw(ids),
        role=draw(st.sampled_from(ROLES)),
        labels=draw(st.none() | st.lists(st.integers(0, 99) | st.just(IGNORE), min_size=n, max_size=n)),
        position_ids=draw(st.none() | st.lists(st.integers(0, 50), min_size=n, max_size=n, unique=True).map(sorted)),
    )


def read(sequence, number):
    """Segment ``number`` of a sequence as three lists."""
    span = slice(*sequence.table.cu_seqlens[number : number + 2].tolist())
    return tuple(x[span].tolist() for x in (sequence.input_ids, sequence.position_ids, sequence.labels))


def written(segment):
    n = len(segment.tokens)
    return (
        list(segment.tokens),
        list(range(n) if segment.position_ids is None else segment.position_ids),
        [IGNORE] * n if segment.labels is None else list(segment.labels),
    )


@settings(max_examples=60)
@given(st.lists(segments(), min_size=1, max_size=8))
def test_a_sequence_holds_its_segments_in_the_order_given(given_segments):
    sequence = pack_sequence(given_segments)
    assert [read(sequence, i) for i in range(len(given_segments))] == [written(s) for s in given_segments]
    assert sequence.num_tokens == sum(sequence.table.lengths) == len(sequence.labels)
    assert sequence.labelled.tolist() == [t for t, label in enumerate(sequence.labels.tolist()) if label != IGNORE]
    assert sequence.input_ids[sequence.first].tolist() == [s.tokens[0] for s in given_segments]
    assert sequence.input_ids[sequence.last].tolist() == [s.tokens[-1] for s in given_segments]


@settings(max_examples=60)
@given(st.lists(st.lists(segments(), max_size=4), min_size=1, max_size=4))
def test_packing_loses_nothing_and_knows_whose_each_segment_is(samples):
    batch = pack([Views(s) for s in samples])
    sequence = batch.sequences["main"]
    for role in ROLES:
        asked = [(i, s) for i, sample in enumerate(samples) for s in sample if s.role == role]
        if asked:
            assert batch.samples[role].tolist() == [i for i, _ in asked]
            numbers = batch.segments[role].tolist()
            assert [read(sequence, number) for number in numbers] == [written(s) for _, s in asked]
        else:
            assert role not in batch.segments
    everything = [s for sample in samples for s in sample]
    assert batch.counts["samples"] == len(samples)
    assert batch.counts["tokens"] == sum(len(s.tokens) for s in everything)
    assert batch.counts["labels"] == sum(label != IGNORE for s in everything for label in s.labels or ())
    assert list(sequence.table.lengths) == sorted(sequence.table.lengths)
    if everything:
        assert len(sequence.table.lengths) == len(everything)
        assert batch.num_tokens == batch.counts["tokens"]


@settings(max_examples=60)
@given(st.lists(st.lists(st.tuples(st.sampled_from(ROLES), st.integers(0, 3)), max_size=5), min_size=1, max_size=5))
def test_segments_with_one_key_are_packed_once_and_shared(samples):
    """Keyed by role and key; a key's tokens say which it is, so that a mix-up shows."""

    def name(role, key):
        return Segment(tokens=[ROLES.index(role), key] + [9] * key, role=role, key=key)

    batch = pack([Views([name(*entry) for entry in sample]) for sample in samples])
    sequence = batch.sequences["main"]
    distinct = {entry for sample in samples for entry in sample}
    assert len(sequence.table.lengths) == max(len(distinct), 1)
    for role in ROLES:
        asked = [key for sample in samples for r, key in sample if r == role]
        found = [read(sequence, number)[0] for number in batch.segments.get(role, torch.empty(0)).tolist()]
        assert found == [list(name(role, key).tokens) for key in asked]


def test_segments_without_a_key_are_never_shared():
    batch = pack([Views([Segment([1, 2], "a"), Segment([1, 2], "a")])])
    assert batch.sequences["main"].table.lengths == (2, 2)
    assert batch.segments["a"].tolist() == [0, 1]


def test_streams_are_packed_apart():
    views = Views([Segment([1, 2, 3], "fact"), Segment([4], "name", sequence="names", key=4)])
    batch = pack([views, views], sequences=("main", "names"))
    assert batch.sequences["main"].input_ids.tolist() == [1, 2, 3, 1, 2, 3]
    assert batch.sequences["names"].input_ids.tolist() == [4]
    assert batch.segments["name"].tolist() == [0, 0] and batch.samples["name"].tolist() == [0, 1]


def test_an_empty_sequence_gets_one_unlabelled_token():
    batch = pack([Views([Segment([5], "a")])], sequences=("main", "names"))
    filler = batch.sequences["names"]
    assert filler.table.lengths == (1,) and filler.input_ids.shape == (1,) and len(filler.labelled) == 0
    assert batch.counts["tokens"] == 1  # the filler is nobody's token


def test_values_are_stacked_and_counts_added():
    views = [
        Views([Segment([1], "a")], {"relation": i, "grid": np.full((2, 2), i)}, counts={"pairs": i}) for i in (1, 2)
    ]
    batch = pack(views, step=7, seed=3)
    assert batch.values["relation"].tolist() == [1, 2]
    assert batch.values["grid"].shape == (2, 2, 2) and batch.values["grid"][1].unique().tolist() == [2]
    assert batch.counts["pairs"] == 3 and (batch.step, batch.seed) == (7, 3)
    assert add_counts([batch, batch]) == {"samples": 4, "pairs": 6, "tokens": 4, "labels": 0}


def test_moving_a_batch_keeps_it():
    batch = pack([Views([Segment([1, 2], "a", labels=[2, IGNORE])], {"x": 1.0})])
    moved = batch.to("cpu")
    assert isinstance(moved, PackedBatch) and moved.sequences["main"].table.lengths == (2,)
    assert moved.sequences["main"].labelled.tolist() == [0] and moved.counts == batch.counts


@pytest.mark.parametrize(
    ("segment", "message"),
    [(Segment([], "a"), "no tokens"), (Segment([1], "a", sequence="nmaes"), "unknown packed sequence 'nmaes'")],
)
def test_what_cannot_be_packed_is_refused(segment, message):
    with pytest.raises(ValueError, match=message):
        pack([Views([segment])])


@pytest.mark.parametrize("labels", [[1, 2], [1]])
def test_labels_must_be_as_many_as_tokens(labels):
    with pytest.raises(AssertionError, match="labels"):
        pack_sequence([Segment([1, 2, 3], "a", labels=labels)])


def test_boundaries_are_int32():
    table = SegmentTable.from_lengths([3, 1, 2])
    assert table.cu_seqlens.dtype == torch.int32 and table.cu_seqlens.tolist() == [0, 3, 4, 6]


@st.composite
def marked_samples(draw):
    """Samples whose segments mark tokens. Every token of a sequence is another one, so that it says where it is from; a key
    decides a segment's tokens, not its marks."""
    samples = []
    for sample in range(draw(st.integers(1, 4))):
        marked = []
        for number in range(draw(st.integers(0, 4))):
            key = draw(st.none() | st.integers(0, 2))
            n = draw(st.integers(1, 6)) if key is None else 2 * key + 1
            base = 1000 * (key + 1) if key is not None else 10_000 * (sample + 1) + 100 * number
            role = draw(st.sampled_from(ROLES))
            names = ("anchor", "target") if role == "forward" else ("name",)
            offsets = st.lists(st.integers(0, n - 1), max_size=5)
            positions = {name: draw(offsets) for name in names if draw(st.booleans())}
            sequence = "main" if role == "forward" else "names"
            marked.append(Segment(range(base, base + n), role, sequence=sequence, key=key, positions=positions))
        samples.append(marked)
    return samples


@settings(max_examples=100)
@given(marked_samples())
def test_places_are_the_tokens_that_segments_marked_in_the_order_of_the_samples(samples):
    batch = pack([Views(sample) for sample in samples], sequences=("main", "names"))
    for name, sequence in (("anchor", "main"), ("target", "main"), ("name", "names")):
        marks = [(s.tokens, s.positions[name]) for sample in samples for s in sample if name in s.positions]
        if not marks:
            assert name not in batch.positions
            continue
        assert batch.positions[name].dtype == torch.int64
        found = batch.sequences[sequence].input_ids[batch.positions[name]].tolist()
        assert found == [tokens[offset] for tokens, offsets in marks for offset in offsets]


@settings(max_examples=50)
@given(st.lists(st.lists(st.floats(-9, 9, width=32), max_size=4), min_size=1, max_size=5))
def test_rows_are_laid_end_to_end_and_keep_their_type(rows):
    def views(row):
        return Views(
            [Segment([1], "a")],
            rows={
                "weight": np.array(row, np.float32),
                "pair": np.array([[i, len(row)] for i in range(len(row))], np.int64).reshape(-1, 2),
            },
        )

    batch = pack([views(row) for row in rows])
    assert batch.rows["weight"].dtype == torch.float32 and batch.rows["pair"].dtype == torch.int64
    assert batch.rows["weight"].tolist() == [x for row in rows for x in row]
    assert batch.rows["pair"].tolist() == [[i, len(row)] for row in rows for i in range(len(row))]


def test_an_empty_micro_batch_has_the_places_and_rows_of_its_like():
    views = Views(
        [Segment([1, 2, 3], "a", labels=[2, 3, 4], positions={"anchor": [0, 1]}), Segment([4], "n", sequence="names")],
        values={"x": np.ones((2, 2), np.float32)},
        rows={"horizon": np.array([1, 2]), "pair": np.zeros((2, 3), np.float32)},
        counts={"pairs": 2},
    )
    full, empty = (pack(v, sequences=("main", "names"), like=views) for v in ([views], []))
    assert empty.positions.keys() == full.positions.keys() and empty.rows.keys() == full.rows.keys()
    for mine, other in ((empty.positions, full.positions), (empty.rows, full.rows), (empty.values, full.values)):
        for name, tensor in mine.items():
            assert tensor.dtype == other[name].dtype and tensor.shape == (0, *other[name].shape[1:]), name
    assert empty.counts == {"samples": 0, "pairs": 0, "tokens": 0, "labels": 0}
    assert empty.segments.keys() == full.segments.keys() and not any(len(n) for n in empty.segments.values())


def test_moving_a_batch_moves_places_and_rows_too():
    segments = [Segment([1, 2, 3], "a", positions={"anchor": [2]}), Segment([5], "a", positions={"anchor": [0]})]
    batch = pack([Views(segments, rows={"horizon": np.array([7, 8])})])
    moved = batch.to("meta")
    assert moved.positions["anchor"].is_meta and moved.rows["horizon"].is_meta
    kept = batch.to("cpu")
    assert kept.positions["anchor"].tolist() == [3, 0] and kept.rows["horizon"].tolist() == [7, 8]


def test_places_and_rows_survive_the_way_from_a_loader_process():
    views = Views([Segment([1, 2], "a", positions={"anchor": [1]})], rows={"horizon": np.array([7], np.int32)})
    sent = io.BytesIO()
    _Pickler(sent, protocol=5).dump(pack([views, views]))
    batch = pickle.loads(sent.getvalue())
    assert batch.positions["anchor"].tolist() == [1, 3] and batch.positions["anchor"].dtype == torch.int64
    assert batch.rows["horizon"].tolist() == [7, 7] and batch.rows["horizon"].dtype == torch.int32


# -- branches that see the beginning of another segment ---------------------------------------------------------------


@st.composite
def branched_samples(draw):
    """Samples of parents, some of them shared by key, and of branches in any order. Every token of a sequence is another one,
    so that it says where it is from."""
    samples = []
    for sample in range(draw(st.integers(1, 4))):
        segments = []
        for number, role in enumerate(draw(st.lists(st.sampled_from(("p", "q", "r")), unique=True, max_size=3))):
            key = draw(st.none() | st.integers(0, 1))
            n = draw(st.integers(1, 6)) if key is None else 2 * key + 2
            base = 1000 * (2 * "pqr".index(role) + key + 1) if key is not None else 10_000 * (sample + 1) + 100 * number
            sequence = "names" if role == "r" else "main"
            segments.append(Segment(range(base, base + n), role, sequence=sequence, key=key, labels=[7] * n))
        parents = list(segments)
        for number in range(draw(st.integers(0, 4)) if parents else 0):
            parent = draw(st.sampled_from(parents))
            seen, own = draw(st.integers(1, len(parent.tokens))), draw(st.integers(1, 4))
            base = 10_000 * (sample + 1) + 1000 + 100 * number
            prefix = (parent.role, seen)
            role = "branch" if parent.sequence == "main" else "twig"  # a role travels in one sequence
            positions = {role: draw(st.lists(st.integers(0, own - 1), max_size=3))}
            tokens = range(base, base + own)
            segments.append(Segment(tokens, role, sequence=parent.sequence, positions=positions, prefix=prefix))
        samples.append(draw(st.permutations(segments)))
    return samples


def seen_through_attention(sequence, window):
    """(T, T) boolean: which tokens' values reach which token, by equal scores and values that are one-hot."""
    n = sequence.num_tokens
    index = torch.arange(n) if sequence.keys is None else sequence.keys.index
    nothing = torch.zeros(n, 1, 4)
    table_k = None if sequence.keys is None else sequence.keys.table
    out = attention(nothing, nothing[index], torch.eye(n)[index][:, None], sequence.table, table_k, window=window)
    return out[:, 0] > 0


@settings(max_examples=100)
@given(branched_samples(), st.none() | st.integers(1, 6))
def test_every_token_sees_its_prefix_and_what_comes_before_it_in_its_segment(samples, window):
    batch = pack([Views(sample) for sample in samples], sequences=("main", "names"))
    for name, sequence in batch.sequences.items():
        place = {token: i for i, token in enumerate(sequence.input_ids.tolist())}
        mine = [(sample, s) for sample in samples for s in sample if s.sequence == name]
        if not mine:
            continue
        assert (sequence.keys is not None) is any(s.prefix for _, s in mine)
        expected = torch.zeros(sequence.num_tokens, sequence.num_tokens, dtype=torch.bool)
        for sample, segment in mine:
            before = []
            if segment.prefix is not None:
                role, n = segment.prefix
                (parent,) = (s for s in sample if s.role == role)
                before = list(parent.tokens)[:n]
            for token in segment.tokens:
                before = [*before, token]
                expected[place[token], [place[t] for t in before[-(window or 99) :]]] = True
                assert sequence.position_ids[place[token]] == len(before) - 1
        assert torch.equal(seen_through_attention(sequence, window), expected)


@settings(max_examples=100)
@given(branched_samples())
def test_branches_are_found_and_counted_like_other_segments(samples):
    batch = pack([Views(sample) for sample in samples], sequences=("main", "names"))
    for sequence in batch.sequences.values():
        shapes = list(zip(sequence.table.lengths, sequence.key_lengths, strict=True))
        assert shapes == sorted(shapes)  # equal ones are neighbours
    for role, name in (("p", "main"), ("q", "main"), ("branch", "main"), ("r", "names"), ("twig", "names")):
        asked = [(i, s) for i, sample in enumerate(samples) for s in sample if s.role == role]
        if not asked:
            continue
        sequence, numbers = batch.sequences[name], batch.segments[role]
        assert batch.samples[role].tolist() == [i for i, _ in asked]
        assert sequence.input_ids[sequence.first[numbers]].tolist() == [s.tokens[0] for _, s in asked]
        assert sequence.input_ids[sequence.last[numbers]].tolist() == [s.tokens[-1] for _, s in asked]
        for number, (_, s) in zip(numbers.tolist(), asked, strict=True):
            assert read(sequence, number)[0] == list(s.tokens)
            assert sequence.key_lengths[number] == len(s.tokens) + (s.prefix[1] if s.prefix else 0)
        if role in ("branch", "twig"):
            marks = [s.tokens[offset] for _, s in asked for offset in s.positions[role]]
            assert sequence.input_ids[batch.positions[role]].tolist() == marks
    distinct = {s.tokens[0]: len(s.tokens) for sample in samples for s in sample}
    assert batch.counts["tokens"] == sum(distinct.values())  # a prefix is nobody's token twice


def test_a_branch_may_have_positions_labels_and_a_parent_shared_by_key():
    parent = Segment([1, 2, 3, 4], "p", key="shared")
    branch = Segment([8, 9], "b", labels=[9, IGNORE], position_ids=[7, 9], prefix=("p", 3))
    sequence = pack([Views([branch, parent]), Views([parent, branch])]).sequences["main"]
    assert sequence.input_ids.tolist() == [8, 9, 8, 9, 1, 2, 3, 4]
    assert sequence.position_ids.tolist() == [7, 9, 7, 9, 0, 1, 2, 3]
    assert sequence.labelled.tolist() == [0, 2]
    assert sequence.keys.index.tolist() == [4, 5, 6, 0, 1, 4, 5, 6, 2, 3, 4, 5, 6, 7]
    assert sequence.keys.index.dtype == torch.int64
    assert sequence.key_lengths == sequence.keys.table.lengths == (5, 5, 4) and sequence.table.lengths == (2, 2, 4)


def test_without_branches_there_are_no_key_rows():
    batch = pack([Views([Segment([1, 2], "a")])], sequences=("main", "empty"))
    assert all(sequence.keys is None for sequence in batch.sequences.values())
    assert batch.sequences["main"].key_lengths == (2,)


PARENT = Segment([1, 2, 3], "p")


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([Segment([9], "b", prefix=("p", 1))], "has 0 segments of that role"),
        ([PARENT, Segment([9], "b", prefix=("pp", 1))], "has 0 segments of that role"),
        ([PARENT, PARENT, Segment([9], "b", prefix=("p", 1))], "has 2 segments of that role"),
        ([PARENT, Segment([9], "b", prefix=("p", 4))], "it has 3 tokens"),
        ([PARENT, Segment([9], "b", prefix=("p", 0))], "it has 3 tokens"),
        ([PARENT, Segment([9], "b", prefix=("p", -1))], "it has 3 tokens"),
        ([PARENT, Segment([9], "b", key=1, prefix=("p", 1))], "remove its key"),
        ([PARENT, Segment([9], "b", sequence="names", prefix=("p", 1))], "the packed sequence 'main', not in 'names'"),
        ([Segment([9], "b", prefix=("b", 1))], "is a branch itself"),
        ([PARENT, Segment([9], "b", prefix=("p", 1)), Segment([8], "c", prefix=("b", 1))], "is a branch itself"),
    ],
)
def test_a_prefix_that_there_is_not_is_refused_by_role(segments, message):
    with pytest.raises(ValueError, match=message) as error:
        pack([Views([PARENT]), Views(segments)], sequences=("main", "names"))
    wrong = segments[-1]
    told = str(error.value)
    assert repr(wrong.role) in told and repr(wrong.prefix[0]) in told and str(wrong.prefix[1]) in told


def test_a_stream_laid_out_by_hand_needs_the_parents():
    segments = [PARENT, Segment([9], "b", prefix=("p", 2))]
    with pytest.raises(AssertionError, match="without a parent"):
        pack_sequence(segments)
    assert pack_sequence(segments, {1: 0}).keys.index.tolist() == [0, 1, 2, 0, 1, 3]


def test_key_rows_move_and_are_pickled_with_their_stream():
    batch = pack([Views([PARENT, Segment([9], "b", prefix=("p", 2))])])
    moved = batch.to("meta").sequences["main"]
    assert moved.keys.index.is_meta and moved.keys.table.cu_seqlens.is_meta and moved.table.cu_seqlens.is_meta
    assert moved.key_lengths == (3, 3)
    sent = io.BytesIO()
    _Pickler(sent, protocol=5).dump(batch)
    keys = pickle.loads(sent.getvalue()).sequences["main"].keys
    assert keys.index.tolist() == [1, 2, 0, 1, 2, 3] and keys.table.cu_seqlens.tolist() == [0, 3, 6]


# -- seeds of segments ------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.lists(st.lists(segments(), max_size=4), min_size=1, max_size=5), st.randoms())
def test_a_segment_has_the_same_seed_wherever_it_is_packed(samples, random):
    """Alone, in any company and in any order; and no two segments have the same one."""
    views = [Views(s, seed=1000 * i) for i, s in enumerate(samples)]
    expected = {i: pack([view]).sequences["main"].seeds for i, view in enumerate(views)}
    order = list(range(len(views)))
    random.shuffle(order)
    batch = pack([views[i] for i in order])
    sequence = batch.sequences["main"]
    assert sequence.seeds.dtype == torch.int64 and sequence.seeds.shape == (len(sequence.table.lengths),)
    if any(samples):
        assert len(set(sequence.seeds.tolist())) == sum(map(len, samples))
    for i, view in enumerate(views):
        alone = pack([view])
        for role in alone.segments:
            mine = batch.segments[role][batch.samples[role] == order.index(i)]
            assert sequence.seeds[mine].tolist() == expected[i][alone.segments[role]].tolist()


def test_streams_of_a_sample_and_shared_segments_have_seeds_too():
    name = Segment([4], "name", sequence="names", key=4)
    views = [Views([Segment([1, 2], "a"), name], seed=100), Views([name, Segment([1], "a")], seed=200)]
    batch = pack(views, sequences=("main", "names", "empty"))
    assert batch.sequences["main"].seeds.tolist() == [201, 100]  # by length
    assert batch.sequences["names"].seeds.tolist() == [101]  # of the first sample that asked
    assert batch.sequences["empty"].seeds.tolist() == [0]
    assert pack([], sequences=("main", "names"), like=views[0]).sequences["main"].seeds.tolist() == [0]
    assert pack_sequence([name]).seeds is None
    assert pack_sequence([name, name], seeds=[5, 2**62]).seeds.tolist() == [5, 2**62]


def test_seeds_move_and_are_pickled_with_their_stream():
    batch = pack([Views([Segment([1, 2], "a")], seed=2**62 - 1)])
    assert batch.to("meta").sequences["main"].seeds.is_meta
    assert pack_sequence([Segment([1], "a")]).to("meta").seeds is None
    sent = io.BytesIO()
    _Pickler(sent, protocol=5).dump(batch)
    assert pickle.loads(sent.getvalue()).sequences["main"].seeds.tolist() == [2**62 - 1]


# -- queries ----------------------------------------------------------------------------------------------------------


def test_segments_may_say_how_many_of_their_tokens_are_read():
    tokens, read = [[1, 2, 3], [4, 5], [6, 7, 8], [9, 10, 11]], [3, 1, 1, 2]
    views = [Views([Segment(t, "a", queries=n)]) for t, n in zip(tokens, read, strict=True)]
    sequence = pack(views).sequences["main"]
    assert sequence.table.lengths == (2, 3, 3, 3)
    assert sequence.queries.lengths == (1, 1, 2, 3)  # equal shapes are neighbours
    assert sequence.input_ids.tolist() == [4, 5, 6, 7, 8, 9, 10, 11, 1, 2, 3]
    assert sequence.queries.cu_seqlens.tolist() == [0, 1, 2, 4, 7]
    assert pack(views).to("meta").sequences["main"].queries.cu_seqlens.is_meta


def test_without_a_word_from_each_segment_all_tokens_are_read():
    assert pack_sequence([Segment([1], "a", queries=1), Segment([1], "a")]).queries is None
    assert pack([]).sequences["main"].queries is None
