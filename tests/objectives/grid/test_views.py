import numpy as np
import pytest
import torch

from jepa_scale.data.examples import GridSequence, flatten_grid
from jepa_scale.data.sampling.rng import BatchViewTransform, SampleRNG
from jepa_scale.objectives.grid.config import GridOptions
from jepa_scale.objectives.grid.views import TARGETS, GridViews
from jepa_scale.packing import pack
from jepa_scale.utils.errors import DataError
from tests.data.grids.flood_fill import flood_fill
from tests.data.sampling.test_loader import same
from tests.objectives.grid.reference import SMALL, gap, sequences

ALL = dict(colour_weight=1.0, translation_weight=1.0, symmetry_weight=1.0)


def maker(**options) -> GridViews:
    return GridViews(GridOptions(**(SMALL | options)))


def draws(count: int, step: int = 0) -> list[SampleRNG]:
    return [SampleRNG(7, 1, step, n) for n in range(count)]


def box(thing: dict) -> list[int]:
    rows, columns = zip(*thing["cells"], strict=True)
    return [min(rows), min(columns), max(rows), max(columns)]


@pytest.mark.parametrize("options", [{}, ALL, {"encoder": "decoder", **ALL, "augment": ["colour", "symmetry"]}])
def test_samples_made_together_are_those_made_alone(options):
    views = maker(**options)
    assert isinstance(views, BatchViewTransform)
    samples = sequences(9)
    together = views.many(samples, draws(9))
    for number, sample in enumerate(samples):
        alone = views(sample, draws(9)[number])
        assert same(pack([together[number]], ("main", TARGETS)), pack([alone], ("main", TARGETS)))
        again = views(sample, draws(9)[number])
        assert same(pack([alone], ("main", TARGETS)), pack([again], ("main", TARGETS)))
    assert views.many([], []) == []


@pytest.mark.parametrize("relational", ["gridjepa", "adjacent_cosine"])
@pytest.mark.parametrize("encoder", ["objects", "decoder"])
def test_what_a_sample_has_is_what_a_loop_finds(encoder, relational):
    o = GridOptions(**(SMALL | {"encoder": encoder, "relational": relational}))
    end = encoder == "decoder"
    for number, sample in enumerate(sequences(8)):
        views = GridViews(o)(sample, draws(8)[number])
        found = [flood_fill(grid.tolist())[: o.slots] for grid in (*sample.context, sample.target)]
        counts = [len(f) + end for f in found]
        absent = o.context_length - len(sample.context)
        assert views.values["objects"].tolist() == [[0] * absent + counts[:-1]]
        assert views.values["present"].tolist() == [False] * absent + [True] * len(sample.context)
        assert views.values["target_objects"].tolist() == [[counts[-1]]]
        starts = np.cumsum([0, *counts[:-1]])
        own = [
            (starts[g] + i, starts[g] + j)
            for g, things in enumerate(found[:-1])
            for i in range(len(things))
            for j in range(i + 1, len(things))
            if gap(box(things[i]), box(things[j])) <= 1
        ]
        assert sorted(map(tuple, views.rows["self_pair"].tolist())) == own
        cross = [
            (starts[len(found) - 2] + i, j)
            for i, a in enumerate(found[-2])
            for j, b in enumerate(found[-1])
            if gap(box(a), box(b)) <= 1
        ]
        targets = [
            (i, j)
            for i, a in enumerate(found[-1])
            for j, b in enumerate(found[-1])
            if i < j and gap(box(a), box(b)) <= 1
        ]
        name, pairs = ("target", targets) if relational == "gridjepa" else ("cross", cross)
        assert sorted(map(tuple, views.rows[f"{name}_pair"].tolist())) == pairs
        assert views.counts[f"{name}_pairs"] == views.values[f"{name}_pairs"] == len(pairs)
        assert views.counts["self_pairs"] == views.values["self_pairs"] == len(own)
        assert views.counts["objects"] == sum(counts[:-1])
        full = [len(flood_fill(grid.tolist())) > o.slots for grid in (*sample.context, sample.target)]
        assert views.counts["truncated"] == sum(full) and views.counts["grids"] == len(found)
        if encoder == "objects":
            features = [t["features"] for things in found[:-1] for t in things]
            np.testing.assert_allclose(views.rows["inputs"], np.reshape(features, (-1, 23)), atol=1e-6)
            assert views.rows["slot"].tolist() == [k for things in found[:-1] for k in range(len(things))]
            assert views.rows["target_slot"].tolist() == list(range(counts[-1]))
            for g, things in enumerate(found[:-1]):
                adjacent = views.values["adjacent"][absent + g]
                assert adjacent.sum() == sum(gap(box(a), box(b)) <= 1 for a in things for b in things)
            (context, target) = (
                sum((s.tokens.tolist() for s in views.segments if s.role == r), []) for r in ("context", "target")
            )
            assert context == [t["colour"] for things in found[:-1] for t in things]
            assert target == [t["colour"] for t in found[-1]]


def test_cells_of_the_decoders_objects_are_their_tokens():
    o = GridOptions(**(SMALL | {"encoder": "decoder"}))
    for number, sample in enumerate(sequences(8)):
        views = GridViews(o)(sample, draws(8)[number])
        grids = [*sample.context, sample.target]
        assert [s.sequence for s in views.segments] == ["main"] * len(sample.context) + [TARGETS]
        sizes = {"context": views.rows["inputs"].tolist(), "target": views.rows["target_inputs"].tolist()}
        for grid, segment in zip(grids, views.segments, strict=True):
            assert (segment.tokens == flatten_grid(grid)).all()
            positions = segment.positions["cell" if segment.role == "context" else "target_cell"]
            for thing in flood_fill(grid.tolist())[: o.slots]:
                own, positions = positions[: len(thing["cells"])], positions[len(thing["cells"]) :]
                assert [divmod(int(p), grid.shape[1] + 1) for p in own] == thing["cells"]
                assert (segment.tokens[own] == thing["colour"]).all()
                assert sizes[segment.role].pop(0) == len(own)
            assert positions.tolist() == [len(segment.tokens) - 1]  # the token that ends the grid is one more object
            assert sizes[segment.role].pop(0) == 1
        assert sizes == {"context": [], "target": []}


def test_the_same_permutation_of_colours_for_context_and_target():
    sample = sequences(6)[4]
    views = maker(encoder="decoder", augment=["colour"])(sample, SampleRNG(7, 1, 0, 4))
    pairs = set()
    for grid, segment in zip((*sample.context, sample.target), views.segments, strict=True):
        pairs |= set(zip(flatten_grid(grid).tolist(), segment.tokens.tolist(), strict=True))
    assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)
    assert any(a != b for a, b in pairs)
    others = {maker(augment=["colour"])(sample, SampleRNG(7, epoch, 0, 4)).values["key"] for epoch in range(5)}
    assert len(others) == 5  # drawn anew in each epoch


def test_longer_contexts_lose_their_first_grids_and_keys_are_of_the_target_alone():
    sample = sequences(6)[4]
    long = GridSequence((sample.target, *sample.context), sample.target)
    assert same(*(pack([maker()(s, SampleRNG(0, 0, 0, 0))], ("main", TARGETS)) for s in (sample, long)))
    other = GridSequence(sample.context[:1], sample.target)
    assert maker()(other, SampleRNG(0, 0, 0, 9)).values["key"] == maker()(sample, SampleRNG(0, 0, 0, 0)).values["key"]
    tall, wide = np.ones((1, 4), np.int8), np.ones((4, 1), np.int8)
    keys = {maker()(GridSequence((g,), g), SampleRNG(0, 0, 0, 0)).values["key"] for g in (tall, wide)}
    assert len(keys) == 2 and min(keys) >= 0


def test_more_objects_than_slots_are_refused_by_option_with_the_row_and_the_grid():
    samples = sequences(5)
    views = maker(overflow="error")
    made = views.many(samples[2:5], draws(3))
    assert [isinstance(m, DataError) for m in made][1] is True
    assert str(made[1]).startswith("rules.jsonl:3: context[1]: 36 objects, more than objective.slots=5; raise it, or")
    with pytest.raises(DataError, match=r"rules.jsonl:3: context\[1\]"):
        views(samples[3], SampleRNG(0, 0, 0, 3))
    target = GridSequence(samples[4].context[:1], samples[3].target)
    with pytest.raises(DataError, match="sample 8: target: 36 objects"):
        maker(overflow="error", slots=20)(target, SampleRNG(0, 0, 0, 8))


@pytest.mark.parametrize(
    "options",
    [
        {},
        ALL,
        {"encoder": "decoder"},
        {"encoder": "decoder", **ALL, "lm_weight": 1.0},
        {"encoder": "decoder", "pad_context": True, "lm_weight": 1.0},
    ],
)
def test_no_sample_takes_more_tokens_than_announced(options):
    views = maker(**options)
    samples = sequences(12)
    sizes = np.array([len(s.lm_sequence()[0]) for s in samples])
    for sample, most in zip(samples, views.most_tokens(sizes), strict=True):
        assert pack([views(sample, SampleRNG(0, 0, 0, 0))], ("main", TARGETS)).num_tokens <= most
    if options.get("encoder") == "decoder" and not options.get("lm_weight") and len(options) == 1:
        used = pack([views(samples[4], SampleRNG(0, 0, 0, 0))], ("main", TARGETS)).num_tokens
        assert used == sizes[4]


def test_an_empty_micro_batch_has_the_shapes_of_one():
    views = maker(**ALL)(sequences(5)[4], SampleRNG(0, 0, 0, 0))
    full, empty = pack([views], ("main", TARGETS)), pack([], ("main", TARGETS), like=views)
    assert full.values.keys() == empty.values.keys() and full.rows.keys() == empty.rows.keys()
    for kind in ("values", "rows"):
        for name, value in getattr(full, kind).items():
            other = getattr(empty, kind)[name]
            assert len(other) == 0 and other.shape[1:] == value.shape[1:] and other.dtype == value.dtype
    assert isinstance(full.values["key"], torch.Tensor)


@pytest.mark.parametrize("encoder", ["objects", "decoder"])
def test_a_short_context_repeats_its_last_grid_by_option_and_next_tokens_do_not(encoder):
    sample = sequences(6)[4]
    short = GridSequence(sample.context[:1], sample.target)
    repeated = GridSequence(sample.context[:1] * 3, sample.target)
    draw = SampleRNG(0, 0, 0, 0)
    padded, whole = maker(pad_context=True, encoder=encoder), maker(encoder=encoder)
    assert same(*(pack([m(s, draw)], ("main", TARGETS)) for m, s in ((padded, short), (whole, repeated))))
    assert not whole(short, draw).values["present"].all()
    if encoder == "decoder":
        spoken = maker(pad_context=True, encoder=encoder, lm_weight=1.0)(short, draw).segments[-1]
        assert spoken.role == "lm" and len(spoken.tokens) == len(short.lm_sequence()[0]) - 1
