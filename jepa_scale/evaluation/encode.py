"""Encoding of texts through an objective's tasks: micro-batches of a split, and the states of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from jepa_scale.data.sampling.batches import DataParallelSlice, TokenBatchSampler
from jepa_scale.data.sampling.loader import Loader
from jepa_scale.data.sampling.order import Permuted
from jepa_scale.data.sampling.rng import SampleRNG, ViewTransform
from jepa_scale.data.texts import Texts
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.objectives.base import Objective
from jepa_scale.objectives.tasks import Call
from jepa_scale.packing import PackedBatch, Views


class EncodedTexts(NamedTuple):
    """States of the m texts of one micro-batch of this rank, on the device.

    Attributes:
        numbers: (m,) int64, indices of the texts.
        pooled: (m, d) fp32.
        tokens: for each text (n_i, d) fp32, views of one tensor.
    """

    numbers: Tensor
    pooled: Tensor
    tokens: list[Tensor]


@dataclass(frozen=True, slots=True)
class Numbered:
    """View transform of a text by an objective, which adds the text's number to the values."""

    objective: Objective

    def __call__(self, example: Any, draw: SampleRNG) -> Views:
        views = self.objective.text_views(example, draw)
        assert [(s.role, s.sequence) for s in views.segments] == [("text", "main")], "text_views gives one segment"
        return replace(views, values={**views.values, "text_number": draw.sample})


def encode_texts(
    objective: Objective,
    call: Call,
    texts: Texts,
    micro_tokens: int,
    ranks: ParallelContext,
    pooling: str | None = None,
) -> Iterator[EncodedTexts]:
    """Yield the states of texts, each text once and on one rank. Collective; a rank with fewer texts yields empty
    results, too.

    Args:
        micro_tokens: greatest number of tokens in one forward of a rank, unless a single text has more.
        pooling: ``mean`` or ``last``; None = the objective's own.
    """
    batches = text_batches(
        texts, Numbered(objective), 0, micro_tokens, ranks, tokens=lambda sizes: sizes, near=objective.padded
    )
    for batch in batches:
        states = call("encode", batch)
        segments = batch.segments["text"]
        ends = batch.sequences["main"].table.cu_seqlens.tolist()  # on the host, where the loader made it
        yield EncodedTexts(
            batch.values["text_number"],
            states[pooling or objective.pooling][segments.to(states["last"].device)],
            [states["tokens"][ends[s] : ends[s + 1]] for s in segments.tolist()],
        )


def text_batches(
    examples: Any,
    views: ViewTransform,
    samples: int,
    micro_tokens: int,
    ranks: ParallelContext,
    sequences: tuple[str, ...] = ("main",),
    tokens: Callable[[np.ndarray], np.ndarray] = lambda sizes: sizes - 1,
    near: bool = False,
) -> Iterator[PackedBatch]:
    """Return this rank's micro-batches of a split: each sample on one rank, and equally many micro-batches on every
    rank.

    Args:
        samples: how many, evenly spread over the split; 0 = all.
        tokens: (m,) tokens of examples → (m,) upper bounds on the tokens of their views.
        near: put samples of near sizes together, for padded rows.
    """
    n = len(examples)
    if not n:
        return
    wanted = min(n, samples or n)
    numbers = np.arange(wanted, dtype=np.int64) * n // wanted
    sampler = TokenBatchSampler(
        Permuted(wanted, lambda epoch: numbers),
        seed=0,
        sizes=lambda samples: tokens(examples.sizes(samples)),
        budget=max(micro_tokens, int(tokens(np.array([examples.max_size]))[0])),
        mean_size=float(tokens(np.array([examples.mean_size]))[0]),
        dp_slice=DataParallelSlice(rank=ranks.dp_rank, world_size=ranks.dp_size),
        epochs=1,
        near=near,
    )
    steps = sampler.steps
    assert steps is not None
    for batches in Loader(examples, sampler, views, sequences, start_step=0, steps=steps, seed=0):
        yield from batches
