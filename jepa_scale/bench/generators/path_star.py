"""Path-star graphs: find the path from the centre to a goal (Bachmann & Nagarajan, arXiv 2403.06963).

In G(d, l), d paths of l nodes have the first node in common, the start; the graph has d·(l − 1) + 1 nodes and d·(l − 1) edges. The
goal is the end of one path. Only the first step is hard: it must be found from the goal's end, while each later step follows from
the node before. A model that learns the later steps first can be right there and guess the first, with 1/d.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np

from jepa_scale.bench.generators.rows import check_range, distinct_rows, write_rows
from jepa_scale.data.sampling.rng import generator
from jepa_scale.packing import IGNORE


def vocabulary(*, nodes: int = 100, **others: int) -> int:
    """Return the number of token ids: ``nodes`` labels, then the ends of an edge, of the edges, and of the question."""
    return nodes + 3


def write(
    folder: Path,
    seed: int,
    *,
    degree: int = 2,
    length: int = 5,
    nodes: int = 100,
    train: int = 200_000,
    test: int = 2_000,
) -> None:
    """Write ``train.jsonl`` and ``test.jsonl`` with rows of ``input_ids`` and ``labels``; no two rows have the same graph and goal.

    With | = ``nodes``, / = ``nodes`` + 1 and = = ``nodes`` + 2, a sample is its edges in random order, the question and the path:
    ``a b | c d | … e f / start goal = start n₁ … goal``, where an edge leads away from the start. ``labels[i]`` is the token at i
    itself where it is to be predicted, in the path after the start; −100 elsewhere. So all labels of a sample are predicted
    correctly exactly if greedy decoding finds the path.

    Args:
        degree: d, the number of paths. length: l, the nodes of a path, the start included.
        nodes: number of labels that a graph's nodes are drawn from, without repetition.
        train, test: numbers of samples.

    Raises:
        InputError: an option is out of range, there are fewer labels than nodes, or fewer different graphs than samples.
    """
    check_range("degree", degree, 1)
    check_range("length", length, 2)
    size = degree * (length - 1) + 1
    check_range(f"nodes (G({degree}, {length}) has {size})", nodes, size)
    possible = math.perm(nodes, size) // math.factorial(degree - 1)  # the order of the other paths does not count
    name = f"bench/path_star/{seed}/{degree}/{length}/{nodes}"
    draw = partial(_graphs, degree=degree, length=length, nodes=nodes)
    for split, graphs in zip(("train", "test"), distinct_rows(name, draw, possible, train, test), strict=True):
        tokens = _tokens(graphs, length, nodes, generator(f"{name}/{split}/edges"))
        labels = np.full_like(tokens, IGNORE)
        labels[:, 1 - length :] = tokens[:, 1 - length :]
        write_rows(folder / f"{split}.jsonl", {"input_ids": tokens, "labels": labels})


def _graphs(rng: np.random.Generator, count: int, *, degree: int, length: int, nodes: int) -> np.ndarray:
    """Draw graphs: (count, d·(l − 1) + 1), the start, the path to the goal, then the other paths sorted by their first nodes."""
    order = rng.permuted(np.tile(np.arange(nodes), (count, 1)), axis=1)
    start, path = order[:, :1], order[:, 1:length]
    others = order[:, length : degree * (length - 1) + 1].reshape(count, degree - 1, length - 1)
    others = np.take_along_axis(others, others[:, :, :1].argsort(axis=1), axis=1)
    return np.concatenate([start, path, others.reshape(count, -1)], axis=1)


def _tokens(graphs: np.ndarray, length: int, nodes: int, rng: np.random.Generator) -> np.ndarray:
    """Return the samples of graphs, (n, d·(l − 1) + 1) → (n, 3·d·(l − 1) + l + 3), each with its edges in random order."""
    count, start = len(graphs), graphs[:, :1]
    bar, slash, equals = (np.full((count, 1), nodes + offset) for offset in range(3))
    heads = graphs[:, 1:].reshape(count, -1, length - 1)
    tails = np.concatenate([np.broadcast_to(start[:, None], (count, heads.shape[1], 1)), heads[:, :, :-1]], axis=2)
    ends = np.broadcast_to(bar[:, None], heads.shape)
    edges = np.stack([tails, heads, ends], axis=3).reshape(count, -1, 3)
    order = rng.permuted(np.tile(np.arange(edges.shape[1]), (count, 1)), axis=1)
    listed = np.take_along_axis(edges, order[:, :, None], axis=1).reshape(count, -1)
    path = graphs[:, :length]
    return np.concatenate([listed[:, :-1], slash, start, path[:, -1:], equals, path], axis=1)
