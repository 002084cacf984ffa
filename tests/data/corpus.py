"""Small prepared data, written by the project's own shard writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jepa_scale.data.shards.format import Index, Sample, ShardInfo, write_shard

VOCABULARY = 40


def write_text(
    folder: Path,
    shards: list[int],
    valid: int = 7,
    seed: int = 0,
    tokenizer: str = "t",
    longest: int = 40,
    vocab_size: int = VOCABULARY,
) -> Index:
    """``shards[i]`` documents in training shard i and ``valid`` in one more: a text in which each token mostly decides
    the next."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    follows = np.random.default_rng(99).permutation(vocab_size)  # one language, whatever the seed

    def document() -> Sample:
        tokens = [int(rng.integers(vocab_size))]
        for _ in range(int(rng.integers(1, longest))):
            tokens.append(int(follows[tokens[-1]] if rng.random() < 0.9 else rng.integers(vocab_size)))
        return Sample({"npy": np.array(tokens, dtype=np.uint16)}, len(tokens))

    def shard(name: str, documents: int) -> ShardInfo:
        return write_shard(folder, name, [document() for _ in range(documents)])

    splits = {"train": [shard(f"train-{i:06d}.tar", n) for i, n in enumerate(shards)]}
    if valid:
        splits["valid"] = [shard("valid-000000.tar", valid)]
    index = Index("text", splits, vocab_size, special={"eos": 0}, tokenizer_fingerprint=tokenizer)
    index.write(folder)
    return index
