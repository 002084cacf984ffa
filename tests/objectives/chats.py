"""Small conversations, tokenizers with chat templates of the families' form, and tiny random models of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jepa_scale.data import load_data, parse_data
from jepa_scale.data.prepare.encoders.tokenizer import train_bpe
from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.objectives.base import Objective
from jepa_scale.packing import PackedBatch, pack
from tests.objectives.helpers import with_totals

WORDS = [
    "lines",
    "with",
    "a",
    "vowel",
    "number",
    "dog",
    "before",
    "after",
    "and",
    "or",
    "the",
    "[A-Z].*",
    "(b|c){3}",
    "\\b",
]
TEMPLATES = {
    "llama": (
        "{{ bos_token }}{% for m in messages %}<|sh|>{{ m.role }}<|eh|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|sh|>assistant<|eh|>\n\n{% endif %}"
    ),
    "qwen": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "gemma": (  # the system's words stand in the first user turn; roles must alternate, and a user begins
        "{{ bos_token }}{% set sys = '' %}{% set rest = messages %}{% if messages[0].role == 'system' %}"
        "{% set sys = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}{% endif %}{% for m in rest %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "<|sh|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ sys if loop.first else '' }}{{ m.content }}<|eot|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|sh|>model\n{% endif %}"
    ),
    "olmo": (  # EOS closes an answer, and nothing else
        "{{ eos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
}
SPECIAL = ["<|sh|>", "<|eh|>", "<|eot|>", "<|im_start|>", "<|im_end|>", "<|bos|>"]
COMMON = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 256}
SHAPE = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SHAPE},
    "qwen": {"model_type": "qwen3", **SHAPE},
    "gemma": {"model_type": "gemma3_text", **SHAPE, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "olmo": {"model_type": "olmo2", **{k: v for k, v in SHAPE.items() if k != "head_dim"}},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 256},
}


def conversations(count: int, seed: int = 0, system: bool = True) -> list[list[dict[str, str]]]:
    rng = np.random.default_rng(seed)

    def say(least: int, most: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(least, most)))

    made = []
    for _ in range(count):
        turns = [{"role": "user", "content": say(3, 12)}, {"role": "assistant", "content": say(2, 9)}]
        made.append([{"role": "system", "content": "Convert words."}, *turns] if system else turns)
    return made


def tokenizer(folder: Path, family: str, template: str | None = None) -> Path:
    """A folder with a trained tokenizer that has the family's template; ``gpt2`` has none."""
    made = train_bpe(
        iter([" ".join(WORDS) * 3, "user assistant model system Convert words."]), 400, folder / "bpe", False
    )
    made.add_special_tokens({"extra_special_tokens": SPECIAL, "bos_token": "<|bos|>"})
    made.chat_template = template or TEMPLATES.get(family)
    made.save_pretrained(folder / family)
    return folder / family


def write_rows(folder: Path, rows: list[list[dict[str, str]]]) -> Path:
    """The rows as ``rows.jsonl`` in the folder."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return file


def chat_data(folder: Path, family: str, rows: list[list[dict[str, str]]], **keys: Any) -> Any:
    """The rows as prepared data, by the real way: a JSONL file, shards in a cache, the source ``chat``."""
    file = write_rows(folder, rows)
    named = {"tokenizer": str(tokenizer(folder, family)), "plain": family == "gpt2", "cache": str(folder / "cache")}
    return load_data(parse_data({"source": "chat", "path": str(file), **named, **keys}))


def backbone(family: str, vocab_size: int, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    scale = {"initializer_range": 0.2}
    return build_backbone(ModelOptions(family="huggingface", config={**CONFIGS[family], **scale}), vocab_size)


def batch_of(objective: Objective, examples: list[Any], step: int = 0, first: int = 0, like: Any = None) -> PackedBatch:
    """The examples as one micro-batch that is the whole global batch; without any it has the form of ``like``."""
    views = objective.view_transform()
    made = [views(example, SampleRNG(0, 0, step, first + i)) for i, example in enumerate(examples)]
    form = views(like, SampleRNG(0, 0, step, 0)) if like is not None else None
    return with_totals(pack(made, objective.sequences, step=step, like=form))
