"""Path-star graphs, read back from the tokens."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.bench.generators.path_star import vocabulary, write
from jepa_scale.bench.generators.rows import read_column
from jepa_scale.utils.errors import InputError


def read(tokens: list[int], nodes: int) -> tuple[list[tuple[int, int]], int, int, list[int]]:
    """Edges, start, goal and path of a sample."""
    slash, equals = tokens.index(nodes + 1), tokens.index(nodes + 2)
    edges, edge = [], []
    for token in [*tokens[:slash], nodes]:
        if token == nodes:
            edges.append(tuple(edge))
            edge = []
        else:
            edge.append(token)
    start, goal = tokens[slash + 1 : equals]
    return edges, start, goal, tokens[equals + 1 :]


def paths_from(start: int, edges: list[tuple[int, int]]) -> list[list[int]]:
    """All paths from the start to an end of the graph, by following edges."""
    found = []
    for first in sorted(b for a, b in edges if a == start):
        path = [start, first]
        while after := [b for a, b in edges if a == path[-1]]:
            (only,) = after
            path.append(only)
        found.append(path)
    return found


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 5), st.integers(0, 3))
def test_a_sample_is_a_path_star_with_one_of_its_paths(tmp_path_factory, degree, length, more, seed):
    size = degree * (length - 1) + 1
    nodes, folder = size + more, tmp_path_factory.mktemp("path_star")
    write(folder, seed, degree=degree, length=length, nodes=nodes, train=1, test=1)
    for split in ("train", "test"):
        (tokens,) = read_column(folder / f"{split}.jsonl", "input_ids").tolist()
        (labels,) = read_column(folder / f"{split}.jsonl", "labels").tolist()
        edges, start, goal, path = read(tokens, nodes)
        assert len(edges) == degree * (length - 1) and len({*itertools.chain(*edges)}) == size
        paths = paths_from(start, edges)
        assert len(paths) == degree and {len(p) for p in paths} == {length}
        assert path in paths and path[-1] == goal
        assert labels == [-100] * (len(tokens) - length + 1) + path[1:]
        assert max(tokens) < vocabulary(nodes=nodes, degree=degree) == nodes + 3


def graph_of(tokens: list[int], nodes: int) -> tuple[frozenset[tuple[int, int]], int]:
    edges, _, goal, _ = read(tokens, nodes)
    return frozenset(edges), goal


def test_no_two_samples_have_the_same_graph_and_goal_and_all_can_be_drawn(tmp_path):
    """G(2, 2) of three labels: each may be the start, and each of the others the goal."""
    write(tmp_path, 0, degree=2, length=2, nodes=3, train=4, test=2)
    rows = [t for s in ("train", "test") for t in read_column(tmp_path / f"{s}.jsonl", "input_ids").tolist()]
    assert len({graph_of(tokens, 3) for tokens in rows}) == 6
    with pytest.raises(InputError, match="only 6 are different"):
        write(tmp_path, 0, degree=2, length=2, nodes=3, train=4, test=3)


def test_edges_and_goals_are_in_random_order(tmp_path):
    """The first edge of a path is anywhere among the edges, and the goal's path as often as not the one listed first."""
    write(tmp_path, 1, degree=2, length=3, nodes=10, train=2000, test=1)
    places, firsts = [0] * 4, 0
    for tokens in read_column(tmp_path / "train.jsonl", "input_ids").tolist():
        edges, start, _, path = read(tokens, 10)
        places[edges.index((start, path[1]))] += 1
        firsts += next(b for a, b in edges if a == start) == path[1]
    assert all(abs(count - 500) < 100 for count in places) and abs(firsts - 1000) < 120  # five standard deviations


def files(folder: Path, seed: int = 0, **options: int) -> tuple[bytes, bytes]:
    write(folder, seed, nodes=12, **{"train": 30, "test": 20, **options})
    return (folder / "train.jsonl").read_bytes(), (folder / "test.jsonl").read_bytes()


def test_the_files_depend_on_the_arguments_alone(tmp_path):
    train, test = files(tmp_path / "a")
    assert files(tmp_path / "b") == (train, test)
    assert files(tmp_path / "c", train=10) == (b"".join(train.splitlines(keepends=True)[:10]), test)
    other = files(tmp_path / "d", seed=1)
    assert other[0] != train and other[1] != test


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degree": 0}, "degree: must be at least 1"),
        ({"length": 1}, "length: must be at least 2"),
        ({"nodes": 8}, r"nodes \(G\(2, 5\) has 9\): must be at least 9, got 8"),
    ],
)
def test_impossible_options(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        write(tmp_path, 0, **options)
    assert not list(tmp_path.iterdir())


def test_an_unknown_option_is_refused(tmp_path):
    with pytest.raises(TypeError, match="paths"):
        write(tmp_path, 0, paths=3)
