"""A small corpus of real words about four things, its tokenizer, and configs of runs on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

WORDS = {
    "sea": ["wave", "ship", "sail", "salt", "harbour", "tide", "fish", "net", "storm", "deck"],
    "farm": ["field", "cow", "plough", "barn", "seed", "corn", "goat", "fence", "milk", "hay"],
    "court": ["judge", "law", "trial", "oath", "jury", "plea", "witness", "bail", "verdict", "crime"],
    "kitchen": ["oven", "flour", "spoon", "broth", "salt", "knife", "dough", "stove", "plate", "fish"],
}
GLUE = ["the", "a", "of", "and", "in", "is", "was", "with", "near", "by"]
NATIVE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}


def sentence(topic: str, rng: np.random.Generator, words: int = 0) -> str:
    own = WORDS[topic]
    n = words or int(rng.integers(4, 14))
    return " ".join(str(rng.choice(own if i % 2 else GLUE)) for i in range(n))


def write_corpus(folder: Path, documents: int = 60, seed: int = 0) -> Path:
    """A text file of a document a line."""
    rng = np.random.default_rng(seed)
    lines = [sentence(list(WORDS)[i % 4], rng, 20) for i in range(documents)]
    path = folder / "corpus.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_labelled(path: Path, of_class: int = 10, seed: int = 1) -> Path:
    """Sentences labelled by their topic."""
    rng = np.random.default_rng(seed)
    rows = [{"text": sentence(topic, rng), "label": topic} for _ in range(of_class) for topic in WORDS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data_section(folder: Path) -> dict[str, Any]:
    """``data:`` of the corpus in a folder."""
    return {
        "source": "text",
        "path": str(folder / "corpus.txt"),
        "documents": "line",
        "valid_fraction": 0.1,
        "vocab_size": 300,
        "max_length": 64,
        "cache": str(folder / "cache"),
    }


def config_file(folder: Path, name: str = "run", **changes: Any) -> Path:
    """A run on the corpus of ``folder``, which is written if it is not there."""
    if not (folder / "corpus.txt").exists():
        write_corpus(folder)
    values: dict[str, Any] = {
        "run": {"name": name, "dir": str(folder), "seed": 3},
        "engine": {"name": "fsdp", "threads": 1},
        "model": NATIVE,
        "data": data_section(folder),
        "objective": {"name": "lm"},
        "optim": {"lr": 1e-2, "warmup_steps": 2},
        "train": {"steps": 4, "batch_size": 8, "log_every": 1},
        "eval": {"micro_tokens": 100},
        "log": {"progress": False, "report": False},
    }
    for section, keys in changes.items():
        values[section] = keys if section == "model" else values.get(section, {}) | keys
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
