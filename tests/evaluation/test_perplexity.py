"""On real ranks: the perplexity of a split is that of its samples taken one by one."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from jepa_scale.data import load_data, parse_data
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.evaluation.encode import text_batches
from jepa_scale.evaluation.options import PerplexityOptions
from jepa_scale.evaluation.run import evaluate
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.objectives.lm import LanguageModeling, lm_views
from jepa_scale.objectives.lm_options import LmOptions
from jepa_scale.packing import Segment, pack_sequence
from tests.data.corpus import VOCABULARY, write_text
from tests.distributed.launch import run_ranks


def model():
    torch.manual_seed(0)
    options = ModelOptions(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3)
    return build_backbone(options, VOCABULARY)


def load(folder: Path):
    return load_data(parse_data({"source": "text", "path": str(folder), "max_length": 8}))


def evaluate_on_rank(ranks: ParallelContext, folder: str) -> None:
    backbone, data = model(), load(Path(folder))
    objective = LanguageModeling(LmOptions(), backbone, data)
    calls = []

    def call(task, batch):
        calls.append(task)
        return getattr(objective, task)(backbone, batch)

    with torch.no_grad():
        results = evaluate(objective, call, data, PerplexityOptions(micro_tokens=13), ranks)
    Path(folder, f"{ranks.world_size}-{ranks.rank}.json").write_text(json.dumps([results, len(calls)]))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_sample_counts_once_on_any_number_of_ranks(tmp_path: Path, world_size: int) -> None:
    write_text(tmp_path, [2], valid=5)
    run_ranks(evaluate_on_rank, world_size, str(tmp_path))
    found = [json.loads((tmp_path / f"{world_size}-{rank}.json").read_text()) for rank in range(world_size)]
    assert all(f == found[0] for f in found)  # the same result and, lest ranks wait for each other, as many calls
    backbone = model()
    total, labels = 0.0, 0
    with torch.no_grad():
        for example in load(tmp_path).splits["valid"]:
            tokens = torch.from_numpy(example.tokens.astype("int64"))
            hidden = backbone.hidden(pack_sequence([Segment(tokens[:-1].tolist(), "x")]))
            total += F.cross_entropy(backbone.logits(hidden), tokens[1:], reduction="sum").item()
            labels += len(tokens) - 1
    results = found[0][0]["valid"]
    assert results["labels"] == labels
    assert results["lm_loss"] == pytest.approx(total / labels, rel=1e-5)
    assert results["ppl"] == pytest.approx(torch.tensor(total / labels).exp().item(), rel=1e-4)


def test_max_samples_are_spread_evenly(tmp_path: Path) -> None:
    write_text(tmp_path, [2], valid=30)
    examples = load(tmp_path).splits["valid"]
    ranks = ParallelContext(0, 1, 0, torch.device("cpu"), "python")
    batches = partial(text_batches, examples, lm_views, micro_tokens=20, ranks=ranks)
    some = list(batches(samples=7))
    assert sum(b.counts["samples"] for b in some) == 7
    chosen = [i * len(examples) // 7 for i in range(7)]
    assert sum(b.counts["labels"] for b in some) == sum(len(examples[i].tokens) - 1 for i in chosen)
    assert sum(b.counts["samples"] for b in batches(samples=10**6)) == len(examples)
