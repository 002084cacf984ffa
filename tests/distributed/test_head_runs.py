"""The loss in pieces of the vocabulary on every engine, on real ranks: it has the curve of all logits at once, although all
ranks have different numbers of pieces. Also with tensor parallelism, tied weights, and a head of two layers, one frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from jepa_scale.config.schema import OptimConfig
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.models import head as lm_head
from jepa_scale.models import head_kl
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.models.recompute import recompute
from jepa_scale.packing import Segment, pack_sequence
from tests.data.corpus import write_text
from tests.distributed.launch import run_ranks
from tests.distributed.test_runs import train_runs
from tests.distributed.test_team_runs import assert_same_run, config_file
from tests.distributed.toy import ENGINES, sharded

ROWS, STEPS = 43, 6
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1, clip_norm=0.5)
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1}
NATIVE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {**NATIVE, "tie_word_embeddings": True, "output_bias": True},
    "capped": {
        "family": "huggingface",
        "config": {**LLAMA, "model_type": "gemma3_text", "head_dim": 8, "final_logit_softcapping": 3.0},
    },
}


class Output(NamedTuple):
    total: Tensor


class Root(nn.Module):
    """Backbone with its loss, in both ways, and the KL to half the states, sums over labels, so that the parts of a batch add up."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.backbone = build_backbone(options, ROWS)

    def forward(self, ids: Tensor) -> Output:
        segments = [Segment(row[:-1], "text", labels=row[1:]) for row in ids.tolist()]
        stream = pack_sequence(segments)
        rows = self.backbone.hidden(stream)[stream.labelled]
        labels = stream.labels[stream.labelled]
        half = len(rows) // 2
        losses = self.backbone.label_losses(rows[:half], labels[:half])
        total, *_ = self.backbone.label_loss(rows[half:], labels[half:])
        divergences = self.backbone.head_kl(rows, rows / 2, torch.arange(len(rows)))
        return Output((losses.sum() + total + divergences.sum()) / 40)


def batch(step: int, rank: int, ranks: int) -> Tensor:
    """Return a rank's part of (9, 6) ids; of two ranks one has more, in step 2 all."""
    ids = torch.randint(ROWS, (9, 6), generator=torch.Generator().manual_seed(step))
    if ranks == 1:
        return ids
    cut = 9 if step == 2 else 6
    return ids[:cut] if rank == 0 else ids[cut:]


@contextmanager
def pieces_of(chunk_bytes: int) -> Iterator[list[str]]:
    """Limit the bytes of a piece of the logits within the block; the yielded list gets the name of each loss that is computed in
    pieces."""
    calls: list[str] = []
    measure, pieces = lm_head.measure, head_kl._pieces

    def counted(*args: Any, **more: Any) -> Any:
        calls.append("loss")
        return measure(*args, **more)

    def counted_kl(*args: Any) -> Any:
        found = pieces(*args)
        calls.extend(["kl"] * (len(found) > 1))
        return found

    with (
        patch.object(lm_head, "CHUNK_BYTES", chunk_bytes),
        patch.object(lm_head, "_MOST_ROWS", 6 if chunk_bytes < 2**20 else lm_head._MOST_ROWS),
        patch.object(lm_head, "measure", counted),
        patch.object(head_kl, "_pieces", counted_kl),
    ):
        yield calls


def train_all(ranks: ParallelContext, models: dict[str, dict[str, Any]], engines: list[str], pieces: bool) -> Any:
    """Train every model on every engine; return (model, engine) → losses and gradient norms.

    With ``pieces``, the pieces of rank 0 have about 7 columns; the other rank has another number of pieces, which may be 0.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    with pieces_of(4 * 30 * (7 if ranks.rank == 0 else 9) if pieces else lm_head.CHUNK_BYTES) as calls:
        for name, options in models.items():
            for engine_name in engines:
                root = Root(ModelOptions(**options))
                recompute(root.backbone.layers, "full" if name == "tied" else "none")
                blocks = root.backbone.layers
                engine = sharded(engine_name, root, blocks, ["objective"], ranks, OPTIM, clip_norm=OPTIM.clip_norm)
                seen = found[f"{name}-{engine_name}"] = []
                for step in range(STEPS):
                    loss = engine.forward(batch(step, ranks.rank, ranks.world_size)).total
                    engine.backward(loss)
                    seen.append((float(loss.detach()), float(engine.step())))
                    engine.eval()
                    with torch.no_grad():
                        engine.forward(batch(99, ranks.rank, ranks.world_size))
                    engine.train()
    assert set(calls) == ({"loss", "kl"} if pieces else set())
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("base"))
    torch.manual_seed(5)
    decoder = build_backbone(ModelOptions(family="huggingface", config=LLAMA), 40).decoder
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    decoder.save_pretrained(folder)
    return {**MODELS, "grown": {"family": "huggingface", "pretrained": folder, "lora": {"rank": 3, "alpha": 12}}}


def test_every_engine_trains_as_with_all_logits_at_once(models):
    (expected,) = run_ranks(train_all, 1, models, ["fsdp"], False)
    first, second = run_ranks(train_all, 2, models, list(ENGINES), True)
    for case in first:
        wanted = expected[f"{case.partition('-')[0]}-fsdp"]
        for step, (whole, a, b) in enumerate(zip(wanted, first[case], second[case], strict=True)):
            assert a[0] + b[0] == pytest.approx(whole[0], abs=1e-4), (case, step)
            assert a[1] == b[1] == pytest.approx(whole[1], rel=1e-3), (case, step)


def train_runs_in_pieces(ranks: ParallelContext, cases: list[tuple[str, str | None]]) -> None:
    with pieces_of(4 * 90 * (5 if ranks.rank == 0 else 11)) as calls:
        train_runs(ranks, cases)
    assert calls


@pytest.mark.matrix
def test_whole_runs_are_those_of_all_logits_at_once(tmp_path):
    """Train and evaluate ``horizon``, whose future KL takes logits from the pieces; the evaluation has no gradients."""
    write_text(tmp_path / "corpus", [10, 1, 50, 8], valid=9)
    wanted = [config_file(tmp_path, name, tmp_path / "corpus", name, "fsdp") for name in ("native", "tied", "qwen3")]
    run_ranks(train_runs, 1, [(file, None) for file in wanted])
    cases = {
        "native-fsdp": ("native", "fsdp", 1),
        "native-zero3": ("native", "zero3", 1),
        "tied-fsdp-team": ("tied", "fsdp", 2),
        "tied-zero3-team": ("tied", "zero3", 2),
        "qwen3-zero1-team": ("qwen3", "zero1", 2),
    }
    files = [config_file(tmp_path, name, tmp_path / "corpus", m, e, tp=tp) for name, (m, e, tp) in cases.items()]
    run_ranks(train_runs_in_pieces, 2, [(file, None) for file in files])
    for name, (model, _, _) in cases.items():
        assert_same_run(tmp_path / name, tmp_path / model)
