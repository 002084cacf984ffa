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
from jepa_scale.errors import InputError
from jepa_scale.evaluate import chat, perplexity, reversal
from jepa_scale.models.backbone import Backbone
from jepa_scale.objectives.base import Objective
from jepa_scale.objectives.lm import lm_views
from jepa_scale.packing import PackedBatch

Results = dict[str, dict[str, float]]
Call = Callable[..., Any]
"""``call(task, batch, …)`` runs a task of the objective through the engine, on all ranks together."""

OPTIONS: dict[str, type[Section]] = {
    "answers": reversal.EvalOptions,
    "perplexity": perplexity.PerplexityOptions,
    "chat": chat.ChatEvalOptions,
}
"""Name of an evaluation (``DataOptions.evaluation``) → the keys of its ``eval:``."""


def chat_test(options: Section, data: Any, backbone: Backbone) -> chat.ChatTest | None:
    """What generation will ask; None if the evaluation generates nothing. Reads the rows of every split.

    Raises:
        InputError: naming the key: the data have no tokenizer, or a row's database is not there.
    """
    if not isinstance(options, chat.ChatEvalOptions) or not options.metrics:
        return None
    if data.tokenizer is None:
        raise InputError("eval.metrics: the data have no tokenizer to read generated answers with; prepare them again")
    tokenizer = data.load_tokenizer()

    def decode(tokens: list[int]) -> str:
        text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    questions = {
        split: [
            chat.question(examples[row], row, split, options)
            for row in chat.chosen(len(examples), options.max_generations)
        ]
        for split, examples in data.splits.items()
    }
    stop = sorted({data.special[name] for name in ("end", "eos") if name in data.special})
    positions = getattr(backbone.decoder.config, "max_position_embeddings", None)
    return chat.ChatTest(options, questions, decode, tuple(stop), positions)


def evaluate(
    name: str,
    objective: Objective,
    call: Call,
    data: Any,
    options: Any,
    ranks: Ranks,
    test: chat.ChatTest | None = None,
    place: chat.Place | None = None,
) -> Results:
    """The metrics of every split. Collective; the same result on every rank.

    Args:
        test: of :func:`chat_test`. place: where its generations are saved.
    """
    if name == "answers":
        return reversal.evaluate(objective.answerer(call), data.splits, data.names, options, ranks.device)

    def batches(examples: Any, views: ViewMaker, samples: int, **more: Any) -> Iterator[PackedBatch]:
        return text_batches(examples, views, samples, options.micro_tokens, ranks, **more)

    whole: dict[str, Callable[[], Any]]
    whole = {split: partial(batches, each, lm_views, options.max_samples) for split, each in data.splits.items()}
    results = perplexity.evaluate(partial(call, "label_log_probs"), whole, ranks.device)
    if diagnostics := objective.diagnostics(call):
        for split in results:
            more = {"streams": objective.streams, "tokens": diagnostics.view_tokens}
            fixed = batches(data.splits[split], diagnostics.views, diagnostics.samples, **more)
            results[split] |= diagnostics.measure(fixed)
    if test is not None:
        for split, values in test.run(call, ranks, place or chat.Place()).items():
            results[split] = results.get(split, {}) | values
    return results


def text_batches(
    examples: Any,
    views: ViewMaker,
    samples: int,
    micro_tokens: int,
    ranks: Ranks,
    streams: tuple[str, ...] = ("main",),
    tokens: Callable[[np.ndarray], np.ndarray] = lambda sizes: sizes - 1,
) -> Iterator[PackedBatch]:
    """This rank's micro-batches of a split: each sample on one rank, and as many micro-batches on every rank.

    Args:
        samples: how many, evenly spread over the split; 0 = all.
        tokens: (m,) tokens of examples → (m,) tokens that their views take at most.
    """
    n = len(examples)
    if not n:
        return
    wanted = min(n, samples or n)
    numbers = np.arange(wanted, dtype=np.int64) * n // wanted
    stream = TokenStream(
        Permuted(wanted, lambda epoch: numbers),
        seed=0,
        sizes=lambda samples: tokens(examples.sizes(samples)),
        budget=max(micro_tokens, int(tokens(np.array([examples.max_size]))[0])),
        mean_size=float(tokens(np.array([examples.mean_size]))[0]),
        dealt=Dealt(rank=ranks.rank, world_size=ranks.world_size),
        epochs=1,
    )
    steps = stream.steps
    assert steps is not None
    for batches in Loader(examples, stream, views, streams, start_step=0, steps=steps, seed=0):
        yield from batches


def device_call(engine: Any, device: torch.device, between: Callable[[], None]) -> Call:
    """:data:`Call` through an engine; ``between`` is called before each forward."""

    def call(task: str, batch: Any, *args: Any) -> Any:
        between()
        return engine.forward(task, batch.to(device), *args)

    return call
