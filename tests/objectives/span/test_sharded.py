"""PoPE, the embedding norm, DropPath, the span predictor and unembedding under FSDP2 and ZeRO-3 on two ranks, against one
process: the texts of a step are packed differently there, and make the same choices."""

from unittest.mock import patch

import pytest
import torch
from torch import nn

from jepa_scale.config.schema import OptimConfig
from jepa_scale.engines import create_engine
from jepa_scale.engines.base import EngineOptions
from jepa_scale.models import backbone as backbone_module
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.objectives.span.predictor import SpanPredictor
from jepa_scale.optim import build_optimizer, parameter_groups
from jepa_scale.packing import Segment, Views, pack
from tests.distributed.launch import run_ranks
from tests.models.test_backbone_sharded import zero3

MODEL = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_key_value_heads=2,
    position_embedding="pope",
    embedding_norm=True,
    drop_path=0.5,
)
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1, clip_norm=1.0)
STEPS = 3


class Root(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = build_backbone(ModelOptions(**MODEL), 50)
        self.predictor = SpanPredictor.of(self.backbone, 2, 16)

    def forward(self, batch):
        stream, full = batch.sequences["main"], batch.sequences["predictor"]
        hidden = self.backbone.hidden(stream)
        empty = torch.zeros(0, dtype=torch.int64)
        kept, seen, masked = (batch.positions.get(name, empty) for name in ("kept", "seen", "masked"))
        filler = masked if len(masked) else masked.new_zeros(1)
        filled = self.predictor.norm(self.predictor(hidden[kept], seen, filler, full))[: len(masked)]
        last = hidden[stream.last[batch.segments.get("view", empty)]]
        with patch.object(backbone_module, "_PIECE", 20):  # three of them
            logits = self.backbone.unembed(last).float()
        return (filled.float().square().cumsum(-1).sum() / 32 + logits.logsumexp(-1).sum()) / 10


def texts(step):
    """Four texts of a step, each with a view of it and the predictor's."""
    generator = torch.Generator().manual_seed(step)
    views = []
    for number in range(4):
        n = 5 + 2 * number
        tokens = torch.randint(0, 50, (n,), generator=generator)
        masked = torch.rand(n, generator=generator) < 0.4
        masked[0], masked[1] = False, True
        seen, hidden = (~masked).nonzero()[:, 0], masked.nonzero()[:, 0]
        view = Segment(tokens[seen].tolist(), "view", position_ids=seen, positions={"kept": range(len(seen))})
        positions = {"seen": seen, "masked": hidden}
        full = Segment(tokens.tolist(), "full", sequence="predictor", positions=positions, queries=len(hidden))
        views.append(Views([view, full], seed=10_000 * step + 100 * number))
    return views


def batch_of(views):
    return pack(views, ("main", "predictor"))


def train_sharded(ranks, deepspeed, precision):
    """Rank 0 has three texts in the first step and four later on; rank 1 the rest, so nothing at all."""
    root = Root()
    engine = create_engine(
        "deepspeed" if deepspeed else "fsdp",
        root,
        shard=[*root.backbone.layers, *root.predictor.layers],
        groups=parameter_groups(root, OPTIM, ("predictor",)),
        optim_options=OPTIM,
        engine_options=EngineOptions(precision, 1.0, 1, deepspeed),
        ranks=ranks,
    )
    seen = []
    for step in range(STEPS):
        cut = 4 if step else 3
        views = texts(step)
        loss = engine.forward(batch_of(views[cut:] if ranks.rank else views[:cut]))
        engine.backward(loss)
        seen.append((loss.item(), engine.step().item()))
    return seen


def train_alone():
    root = Root()
    optimizer = build_optimizer(parameter_groups(root, OPTIM, ("predictor",)), OPTIM)
    losses, norms = [], []
    for step in range(STEPS):
        loss = root(batch_of(texts(step)))
        loss.backward()
        losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(root.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None for p in root.parameters() if p is not root.backbone.decoder.lm_head.weight)
    return losses, norms


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_two_ranks_train_as_one_process(engine, tmp_path):
    deepspeed = zero3(tmp_path) if engine == "zero3" else None
    first, second = run_ranks(train_sharded, 2, deepspeed, "fp32")
    losses, norms = train_alone()
    torch.testing.assert_close([a[0] + b[0] for a, b in zip(first, second, strict=True)], losses, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close([norm for _, norm in first], norms, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_bf16_stays_close(engine, tmp_path):
    first, second = run_ranks(train_sharded, 2, zero3(tmp_path) if engine == "zero3" else None, "bf16")
    losses, _ = train_alone()
    found = [a[0] + b[0] for a, b in zip(first, second, strict=True)]
    assert found == pytest.approx(losses, rel=0.03)
