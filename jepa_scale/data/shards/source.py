"""The sources ``text``, ``tokens``, ``chat`` and ``grids``: shards, prepared beforehand or on first use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jepa_scale.data.base import Kind
from jepa_scale.data.files.cache import cache_dir
from jepa_scale.data.options import ChatOptions, ShardOptions
from jepa_scale.data.prepare.base import PrepareOptions
from jepa_scale.data.sampling.order import Windowed
from jepa_scale.data.shards.locate import Located, check, locate
from jepa_scale.data.shards.reader import ShardExamples
from jepa_scale.utils.errors import InputError


@dataclass(frozen=True)
class ShardData:
    """A :class:`~jepa_scale.data.base.Dataset` of samples in shards.

    Attributes:
        tokenizer: folder of the tokenizer, None for grids.
        tokenizer_fingerprint: data with equal fingerprints can be mixed.
        missing_shards: shards that were missing when the run began. Each of their samples is skipped in its place, so
            that the order of the others does not change.
    """

    train: ShardExamples
    splits: Mapping[str, ShardExamples]
    vocab_size: int
    special: Mapping[str, int]
    tokenizer: Path | None
    tokenizer_fingerprint: str
    shuffle_window: int
    missing_shards: int = 0
    trust_remote_code: bool = False

    def load_tokenizer(self) -> Any:
        """Load the Hugging Face tokenizer of the data, which must have one.

        Raises:
            InputError: it cannot be loaded.
        """
        from jepa_scale.data.prepare.encoders.tokenizer import load_tokenizer  # slow to import

        return load_tokenizer(str(self.tokenizer), self.trust_remote_code)

    @property
    def kind(self) -> Kind:
        """``text``, ``tokens``, ``chat`` or ``grids``."""
        return self.train.located.index.kind

    @property
    def plain(self) -> bool:
        """True if conversations were tokenised without a chat template."""
        return bool(self.train.located.index.made_from.get("options", {}).get("plain", False))

    @property
    def counts(self) -> dict[str, int]:
        skipped = {f"skipped when prepared ({reason})": n for reason, n in self.train.located.index.skipped.items()}
        return {**self.train.counts, "missing_shards": self.missing_shards, **skipped}

    @property
    def fingerprint(self) -> str:
        return self.train.fingerprint

    def order(self, seed: int) -> Windowed:
        """Return an order with the shards shuffled, and the samples shuffled within windows."""
        return Windowed(self.train.shard_lengths, seed, self.shuffle_window)


def load(options: ShardOptions) -> ShardData:
    """Open prepared shards; raw data are prepared into the cache first.

    Raises:
        InputError: the data cannot be found, read or prepared, or are of another kind than the source.
    """
    cache = cache_dir(options.cache)
    located = open_shards(options, cache)
    index = located.index
    if index.kind != options.source:
        raise InputError(f"data.source: {located.where} holds {index.kind}, not {options.source}")
    missing = check(located, on_error=options.on_error)

    def examples(split: str, fraction: float = 1.0) -> ShardExamples:
        return ShardExamples(
            located,
            split,
            max_length=options.max_length,
            long=options.long,
            fraction=fraction,
            train_all=isinstance(options, ChatOptions) and options.train_all,
            on_error=options.on_error,
        )

    return ShardData(
        train=examples("train", options.train_fraction),
        splits={split: examples(split) for split in index.splits if split != "train"},
        vocab_size=index.vocab_size,
        special=index.special,
        tokenizer=located.tokenizer(),
        tokenizer_fingerprint=index.tokenizer_fingerprint,
        shuffle_window=options.shuffle_window,
        missing_shards=len(missing),
        trust_remote_code=options.trust_remote_code,
    )


def open_shards(options: ShardOptions, cache: Path) -> Located:
    cache_bytes = int(options.cache_gb * 1e9)
    located = locate(options.path, cache, cache_bytes)
    if located is not None:
        return located
    if not isinstance(options.path, str):
        raise InputError("data.path: a list names prepared shards, but there is no index.json beside them")
    from jepa_scale.data.prepare.job import prepared  # readers and tokenizers are slow to import

    values = {
        name: getattr(options, name) for name in PrepareOptions.model_fields if name in type(options).model_fields
    }
    folder = prepared(
        options.path, PrepareOptions.model_validate({"kind": options.source, **values}), cache, cache_bytes=cache_bytes
    )
    located = locate(str(folder), cache)
    assert located is not None, folder
    return located
