"""Synthetic data for planning without the config's data: memory depends only on the token counts.

Nothing is read: a sample has the length ``data.max_length``, unless the user gives the mean length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from jepa_scale.data import load_data
from jepa_scale.data.base import Kind
from jepa_scale.data.examples import GRID_VOCABULARY, Conversation, Document, GridSequence, Turn
from jepa_scale.data.options import MixtureOptions, ReversalOptions
from jepa_scale.data.sampling.rng import SampleRNG, views_of
from jepa_scale.experiment import Experiment
from jepa_scale.models.loading import pretrained_vocab_size
from jepa_scale.objectives.base import Objective
from jepa_scale.packing import PackedBatch, pack
from jepa_scale.utils.errors import DataError, InputError

SPECIAL = {"bos": 0, "eos": 1, "pad": 2, "end": 3}


@dataclass(frozen=True)
class _Examples:
    """Samples of one length; ``make`` makes one of n tokens."""

    kind: Kind
    size: int
    vocab: int

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, number: int) -> Any:
        return self.make(self.size, number)

    def make(self, size: int, number: int) -> Any:
        rng = np.random.default_rng(number)
        if self.kind == "grids":
            # an (h, w) grid takes h · (w + 1) + 1 tokens; three contexts and a target
            side = max(1, int((size / 4 - 1) ** 0.5))
            grids = [rng.integers(0, 10, (side, side)).astype(np.int8) for _ in range(4)]
            return GridSequence(tuple(grids[:-1]), grids[-1])
        tokens = rng.integers(min(len(SPECIAL), self.vocab - 1), self.vocab, size)
        if self.kind in ("text", "tokens"):
            return Document(tokens)
        half = size // 2  # a question and an answer of the same length
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        return Conversation(tokens, (Turn("user", 1, half), Turn("assistant", half, size)), messages, False)

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        return np.full(len(numbers), self.size, dtype=np.int64)

    @property
    def max_size(self) -> int:
        return self.size

    @property
    def mean_size(self) -> float:
        return float(self.size)


@dataclass(frozen=True)
class StandIn:
    """The part of a :class:`jepa_scale.data.base.Dataset` that models and objectives use."""

    kind: Kind
    train: _Examples
    vocab_size: int
    special: Mapping[str, int] = field(default_factory=lambda: dict(SPECIAL))
    plain: bool = True

    def load_tokenizer(self) -> Any:
        return _Tokenizer()


class _Tokenizer:
    """The part of a tokenizer without a chat template that an objective uses for conversations.

    A template's own tokens, a few per message, are not counted.
    """

    bos_token_id, eos_token_id = SPECIAL["bos"], SPECIAL["eos"]
    bos_token = "<bos>"

    def get_vocab(self) -> dict[str, int]:
        return {}

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.bos_token_id]}

    def encode(self, text: str, **_: Any) -> list[int]:
        return [self.bos_token_id]


def synthetic_data(experiment: Experiment, vocab_size: int | None, sample_tokens: int | None) -> Any:
    """Return synthetic data of the same kind as an experiment's.

    Args:
        vocab_size: rows of the embedding; ``None`` = as in the config, or in that of ``model.pretrained``. sample_tokens: of a sample; ``None`` =
            ``data.max_length``.

    Raises:
        InputError: the size of the vocabulary is not known, or the source's data are of another kind.
    """
    options = experiment.data
    if isinstance(options, MixtureOptions):
        raise InputError("data.source: a mixture cannot be planned; plan one of its parts")
    if isinstance(options, ReversalOptions):
        return load_data(options)  # generated, not read
    trained = options.vocab_size if options.tokenizer in ("bpe", "none") else None  # of the data, or given
    found = vocab_size or experiment.model.vocab_size or (GRID_VOCABULARY if options.source == "grids" else trained)
    if not found and experiment.model.pretrained is not None:
        found = pretrained_vocab_size(experiment.model)
    if not found:
        raise InputError(
            "model.vocab_size: no data are read to plan, so the number of token ids is unknown; set it, "
            "or give --vocab-size"
        )
    size = sample_tokens or options.max_length
    if size > options.max_length:
        raise InputError(
            f"--sample-tokens {size}: no sample has more than data.max_length={options.max_length}; raise that, or give less"
        )
    return StandIn(options.source, _Examples(options.source, size, found), found)


def micro_batch(objective: Objective, data: Any, tokens: int = 0, samples: int = 0) -> PackedBatch:
    """Return a rank's micro-batch, packed as the loader packs.

    It has the given number of ``samples``, or as many as have views of up to ``tokens`` tokens in total, and then a
    shorter sample to fill the rest if possible.

    Raises:
        InputError: not one sample fits.
    """
    each = int(objective.view_tokens(np.array([data.train.max_size]))[0]) if tokens else 0
    if tokens and tokens < each and not isinstance(data, StandIn):
        raise InputError(f"train.micro_tokens: a sample's views take {each} tokens, more than {tokens}; raise it")
    count = samples or max(tokens // each, 0)
    examples = [data.train[number] for number in range(count)]
    if tokens and isinstance(data, StandIn) and data.kind != "grids":
        examples += _filling(objective, data, tokens - count * each, count)
    if not examples:
        raise InputError(f"train.micro_tokens: a sample's views take {each} tokens, more than {tokens}; raise it")
    draws = [SampleRNG(0, 0, 0, number) for number in range(len(examples))]
    views = []
    for number, made in enumerate(views_of(objective.view_transform(), examples, draws)):
        if isinstance(made, DataError):
            raise InputError(f"objective: the made-up sample has no views: {made}")
        views.append(replace(made, seed=number))
    return pack(views, objective.sequences)


def _filling(objective: Objective, data: StandIn, rest: int, number: int) -> list[Any]:
    """Return a shorter sample whose views take ``rest`` tokens or slightly fewer; none if there is no such sample."""
    if rest < 8:
        return []
    sizes = np.arange(4, data.train.size + 1)
    fitting = sizes[objective.view_tokens(sizes) <= rest]
    return [data.train.make(int(fitting[-1]), number)] if len(fitting) and fitting[-1] > 16 else []


def on_meta(batch: PackedBatch) -> PackedBatch:
    """Return the batch without its values, with totals as the training loop sets them."""
    totals = {name: torch.empty((), device="meta") for name in [*batch.counts, "skipped", "budget"]}
    return replace(batch.to("meta"), totals=totals)
