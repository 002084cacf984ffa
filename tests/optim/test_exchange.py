"""Assignment of matrices to owners, and the path of every element there and back; one process simulates all ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.optim import exchange
from jepa_scale.optim.exchange import Layout, Part, assign_owners
from jepa_scale.optim.matrices import Matrix

SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=9)


def make(sizes) -> dict[str, Matrix]:
    return {f"m{i}": Matrix(f"m{i}", rows, cols) for i, (rows, cols) in enumerate(sizes)}


@given(SIZES, st.integers(1, 5), st.data())
@settings(deadline=None)
def test_owners_are_balanced(sizes, ranks, data):
    matrices = make(sizes)
    held = {
        name: {r: data.draw(st.integers(0, m.numel)) for r in data.draw(st.sets(st.integers(0, ranks - 1)))}
        for name, m in matrices.items()
    }
    owners = assign_owners(list(matrices.values()), held, ranks)
    assert owners.keys() == matrices.keys() and set(owners.values()) <= set(range(ranks))
    costs = [m.flops for m in matrices.values()]
    loads = [sum(m.flops for name, m in matrices.items() if owners[name] == r) for r in range(ranks)]
    assert max(loads) <= sum(costs) / ranks + max(costs)


def test_equal_matrices_are_dealt_out_evenly():
    matrices = make([(4, 4)] * 8)
    owners = assign_owners(list(matrices.values()), {name: {} for name in matrices}, 4)
    assert sorted(owners.values()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_matrix_stays_where_it_is_if_that_costs_nothing():
    matrices = make([(4, 4)] * 4)
    held = {f"m{i}": {1 - i // 2: 12, i // 2: 4} for i in range(4)}
    assert assign_owners(list(matrices.values()), held, 2) == {"m0": 1, "m1": 1, "m2": 0, "m3": 0}
    everything = {name: {1: 16} for name in matrices}  # on one rank: half of them move
    assert sorted(assign_owners(list(matrices.values()), everything, 2).values()) == [0, 0, 1, 1]


@contextmanager
def as_rank(number: int, tables: list) -> Iterator[None]:
    """Act as rank ``number`` of ``len(tables)`` ranks within the block."""
    with (
        patch.object(exchange, "dp_rank", lambda: number),
        patch.object(exchange, "dp_size", lambda: len(tables)),
        patch.object(exchange, "all_gather_object", lambda mine: tables),
    ):
        yield


@st.composite
def layouts(draw):
    """Matrices in flat tensors, each of which is split over the ranks at any element, as under ZeRO 1 and 2."""
    matrices = make(draw(SIZES))
    ranks, count = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    home = {name: draw(st.integers(0, count - 1)) for name in matrices}
    tables: list[list[list[tuple]]] = [[[] for _ in range(count)] for _ in range(ranks)]
    for tensor in range(count):
        inside = [m for name, m in matrices.items() if home[name] == tensor]
        total = sum(m.numel for m in inside)
        cuts = [0, *sorted(draw(st.integers(0, total)) for _ in range(ranks - 1)), total]
        first = 0
        for m in inside:
            for r, (begin, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
                left, right = max(first, begin), min(first + m.numel, end)
                if left < right:
                    tables[r][tensor].append((m.name, left - first, left - begin, right - left))
            first += m.numel
    return matrices, tables


def all_to_all(buffers, routes_out, routes_in):
    """Simulate the all-to-all by the splits alone; return the buffer that each rank receives."""
    cut = [buffer.split(route.splits) for buffer, route in zip(buffers, routes_out, strict=True)]
    got = [torch.cat([cut[s][d] for s in range(len(cut))]) for d in range(len(cut))]
    for route, buffer in zip(routes_in, got, strict=True):
        assert len(buffer) == route.size
    return got


def fill(route, values):
    buffer = torch.full((route.size,), -1)
    for piece, name, at in route.slots:
        buffer[at : at + piece.length] = values(piece, name)
    return buffer


@given(layouts(), st.booleans(), st.data())
@settings(max_examples=150, deadline=None)
def test_every_element_goes_to_the_owner_and_back(layout, replicated, data):
    matrices, tables = layout
    if replicated:
        whole = [[(name, 0, 0, m.numel)] for name, m in matrices.items()]
        tables = [whole for _ in tables]
    wanted = data.draw(st.sets(st.integers(0, len(tables[0]) - 1), min_size=1))
    here = {name for table in tables for t in wanted for name, *_ in table[t]}
    values, start = {}, 0
    for name, m in matrices.items():
        values[name], start = torch.arange(start, start + m.numel), start + m.numel

    plans = []
    for number, table in enumerate(tables):
        with as_rank(number, tables):
            parts = [[Part(*part) for part in tensor] for tensor in table]
            plans.append(Layout(matrices, parts, replicated).plan(wanted))
    mine = lambda piece, name: values[name][piece.start : piece.start + piece.length]  # noqa: E731
    came = all_to_all([fill(p.send, mine) for p in plans], [p.send for p in plans], [p.arrive for p in plans])
    owned = []
    for plan, buffer in zip(plans, came, strict=True):
        whole = {m.name: torch.full((m.numel,), -1) for batch in plan.batches for m in batch}
        for batch in plan.batches:
            assert len({(m.rows, m.cols) for m in batch}) == 1
        for piece, name, at in plan.arrive.slots:
            assert (whole[name][piece.start : piece.start + piece.length] == -1).all(), "an element comes twice"
            whole[name][piece.start : piece.start + piece.length] = buffer[at : at + piece.length]
        assert all(torch.equal(whole[name], values[name]) for name in whole)
        owned += whole
    assert sorted(owned) == sorted(here)

    back = all_to_all(
        [fill(p.answer, lambda piece, name: -2 - mine(piece, name)) for p in plans],
        [p.answer for p in plans],
        [p.receive for p in plans],
    )
    for number, (plan, buffer) in enumerate(zip(plans, back, strict=True)):
        got = {(name, piece.start, piece.at, piece.length) for piece, name, _ in plan.receive.slots}
        assert got == {tuple(part) for t in wanted for part in tables[number][t]}
        assert all(piece.rank == number for piece, _, _ in plan.receive.slots)
        for piece, name, at in plan.receive.slots:
            assert torch.equal(buffer[at : at + piece.length], -2 - mine(piece, name))
    if not replicated and len(tables) > 1:
        assert sum(p.send.size for p in plans) == sum(matrices[name].numel for name in here), "each element goes once"


@pytest.mark.parametrize(
    ("tables", "replicated", "message"),
    [
        ([[[("m0", 0, 0, 2)]], [[("m0", 3, 0, 1)]]], False, "the parts of all ranks do not make up the matrix"),
        ([[[("m0", 0, 0, 3)]], [[("m0", 2, 0, 2)]]], False, "the parts of all ranks do not make up the matrix"),
        ([[[("m0", 0, 0, 4)]], [[]]], True, "the parts of all ranks do not make up the matrix"),
        ([[[("m0", 0, 0, 2), ("m0", 2, 2, 2)]], [[]]], False, "a rank holds two parts"),
        ([[[("m0", 0, 0, 2)], []], [[], [("m0", 2, 0, 2)]]], False, "is in two tensors"),
        ([[[("m0", 0, 0, 2)], []], [[("m0", 2, 0, 2)]]], False, "different numbers of tensors"),
    ],
)
def test_a_layout_that_is_not_the_matrices_is_refused(tables, replicated, message):
    with as_rank(0, tables), pytest.raises(AssertionError, match=message):
        Layout(make([(2, 2)]), [[Part(*part) for part in tensor] for tensor in tables[0]], replicated)


def test_batches_are_bounded():
    with patch.object(exchange, "BATCH_ELEMENTS", 40), as_rank(0, [[[(f"m{i}", 0, 0, 16)] for i in range(5)]]):
        layout = Layout(make([(4, 4)] * 5), [[Part(f"m{i}", 0, 0, 16)] for i in range(5)], False)
        assert [len(batch) for batch in layout.plan(range(5)).batches] == [2, 2, 1]
