"""Which evaluation belongs to which data: what ``eval:`` may say, and how a run's splits are evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from jepa_scale.config import Section
from jepa_scale.data.draw import ViewMaker
from jepa_scale.data.loader import Loader
from jepa_scale.data.order import Permuted
from jepa_scale.data.stream import Dealt, TokenStream
from jepa_scale.distributed import Ranks
from jepa_scale.evaluate import perplexity, reversal
from jepa_scale.objectives.base import Objective
from jepa_scale.objectives.lm import lm_views
from jepa_scale.packing import PackedBatch

Results = dict[str, dict[str, float]]
Call = Callable[..., Any]
"""``call(task, batch, …)`` runs a task of the objective through the engine, on all ranks together."""

OPTIONS: dict[str, type[Section]] = {"answers": reversal.EvalOptions, "perplexity": perplexity.PerplexityOptions}
"""Name of an evaluation (``DataOptions.evaluation``) → the keys of its ``eval:``."""


def evaluate(name: str, objective: Objective, call: Call, data: Any, options: Any, ranks: Ranks) -> Results:
    """The metrics of every split. Collective; the same result on every rank."""
    if name == "answers":
        return reversal.evaluate(objective.answerer(call), data.splits, data.names, options, ranks.device)

    def batches(examples: Any, views: ViewMaker, samples: int) -> Iterator[PackedBatch]:
        return text_batches(examples, views, samples, options.micro_tokens, ranks)

    whole: dict[str, Callable[[], Any]]
    whole = {split: partial(batches, each, lm_views, options.max_samples) for split, each in data.splits.items()}
    results = perplexity.evaluate(partial(call, "label_log_probs"), whole, ranks.device)
    if diagnostics := objective.diagnostics(call):
        for split in results:
            fixed = batches(data.splits[split], diagnostics.views, diagnostics.samples)
            results[split] |= diagnostics.measure(fixed)
    return results


def text_batches(
    examples: Any, views: ViewMaker, samples: int, micro_tokens: int, ranks: Ranks
) -> Iterator[PackedBatch]:
    """This rank's micro-batches of a split: each sample on one rank, and as many micro-batches on every rank.

    Args:
        samples: how many, evenly spread over the split; 0 = all.
    """
    n = len(examples)
    if not n:
        return
    wanted = min(n, samples or n)
    numbers = np.arange(wanted, dtype=np.int64) * n // wanted
    stream = TokenStream(
        Permuted(wanted, lambda epoch: numbers),
        seed=0,
        sizes=lambda samples: examples.sizes(samples) - 1,
        budget=max(micro_tokens, examples.max_size),
        mean_size=examples.mean_size,
        dealt=Dealt(rank=ranks.rank, world_size=ranks.world_size),
        epochs=1,
    )
    steps = stream.steps
    assert steps is not None
    for batches in Loader(examples, stream, views, ("main",), start_step=0, steps=steps, seed=0):
        yield from batches


def device_call(engine: Any, device: torch.device, between: Callable[[], None]) -> Call:
    """:data:`Call` through an engine; ``between`` is called before each forward."""

    def call(task: str, batch: Any, *args: Any) -> Any:
        between()
        return engine.forward(task, batch.to(device), *args)

    return call
