"""The backbone under FSDP2 and ZeRO on two ranks, against one process: a short and a full run in each forward, a rank
without facts (its stream is the filler token, its head sees no rows), and a cast to bf16."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jepa_scale.config.schema import OptimConfig
from jepa_scale.engines import create_engine
from jepa_scale.engines.base import EngineOptions
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.optim import build_optimizer, parameter_groups
from jepa_scale.packing import Segment, pack_sequence
from tests.distributed.launch import run_ranks

GEMMA = dict(
    model_type="gemma3_text",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=3,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
)
MAMBA2 = dict(
    model_type="mamba2", hidden_size=32, num_hidden_layers=3, num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=4
)  # fmt: skip
FALCON_H1 = dict(
    model_type="falcon_h1",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    mamba_d_ssm=64,
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_n_groups=1,
    mamba_d_state=8,
    mamba_chunk_size=4,
)
FAMILIES = {
    "native": dict(hidden_size=32, num_hidden_layers=3, tie_word_embeddings=True, output_bias=True),
    "gemma3": dict(family="huggingface", config=GEMMA),
    "mamba2": dict(family="huggingface", config=MAMBA2, packing="padded"),
    "falcon_h1": dict(family="huggingface", config=FALCON_H1, packing="padded"),
}
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "ds"
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1, clip_norm=1.0)
STEPS = 3


class Root(nn.Module):
    def __init__(self, family):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = build_backbone(ModelOptions(**FAMILIES[family]), 50)
        self.head = nn.Linear(32, 8)

    def forward(self, names, facts):
        concepts = self.head(self.backbone.hidden(names, until=1)[names.last]).float()
        logits = self.backbone.logits(self.backbone.hidden(facts)[facts.labelled]).float()
        lm = F.cross_entropy(logits, facts.labels[facts.labelled], reduction="sum")
        return (lm + concepts.square().sum()) / 10


def streams(step, rank):
    """Rank 0 has three names and three facts, rank 1 two names and none."""
    generator = torch.Generator().manual_seed(10 * step + rank)

    def segment(n):
        tokens = torch.randint(0, 50, (n + 1,), generator=generator).tolist()
        return Segment(tokens[:-1], "a", labels=tokens[1:])

    names = [Segment(segment(2).tokens, "name") for _ in range(3 - rank)]
    return pack_sequence(names), pack_sequence([segment(n) for n in ((3, 3, 6) if rank == 0 else ())])


def zero3(folder):
    """The shipped JSON, but with nothing too small to be sharded and freed; else this model would never be."""
    config = json.loads((CONFIGS / "zero3.json").read_text())
    config["zero_optimization"] |= dict.fromkeys(
        ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_prefetch_bucket_size"), 0
    )
    (folder / "zero3.json").write_text(json.dumps(config))
    return folder / "zero3.json"


def train_sharded(ranks, family, deepspeed, precision):
    root = Root(family)
    engine = create_engine(
        "deepspeed" if deepspeed else "fsdp",
        root,
        shard=list(root.backbone.layers),
        groups=parameter_groups(root, OPTIM, ("head",)),
        optim_options=OPTIM,
        engine_options=EngineOptions(precision, 1.0, 1, deepspeed),
        ranks=ranks,
    )
    seen = []
    for step in range(STEPS):
        loss = engine.forward(*streams(step, ranks.rank))
        engine.backward(loss)
        seen.append((loss.item(), engine.step().item()))
    frequencies = [b.dtype for name, b in engine.module.named_buffers() if "inv_freq" in name]
    return seen, frequencies


def train_alone(family):
    root = Root(family)
    optimizer = build_optimizer(parameter_groups(root, OPTIM, ("head",)), OPTIM)
    losses, norms = [], []
    for step in range(STEPS):
        parts = [root(*streams(step, rank)) for rank in (0, 1)]
        sum(parts).backward()
        losses.append(sum(part.item() for part in parts))
        norms.append(nn.utils.clip_grad_norm_(root.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return losses, norms


@pytest.mark.parametrize(
    ("family", "engine"),
    [
        ("native", "fsdp"),
        ("native", "zero3"),
        ("gemma3", "zero3"),
        ("mamba2", "fsdp"),
        ("mamba2", "zero3"),
        pytest.param("falcon_h1", "fsdp", marks=pytest.mark.matrix),
        pytest.param("falcon_h1", "zero3", marks=pytest.mark.matrix),
    ],
)
def test_two_ranks_train_as_one_process(family, engine, tmp_path):
    deepspeed = zero3(tmp_path) if engine == "zero3" else None
    (first, _), (second, _) = run_ranks(train_sharded, 2, family, deepspeed, "fp32")
    losses, norms = train_alone(family)
    torch.testing.assert_close([a[0] + b[0] for a, b in zip(first, second, strict=True)], losses, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close([norm for _, norm in first], norms, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_padded_rows_in_bf16_have_the_loss(engine, tmp_path):
    deepspeed = zero3(tmp_path) if engine == "zero3" else None
    (first, _), (second, _) = run_ranks(train_sharded, 2, "mamba2", deepspeed, "bf16")
    losses, _ = train_alone("mamba2")
    assert first[0][0] + second[0][0] == pytest.approx(losses[0], rel=0.01)


def test_deepspeeds_bf16_keeps_rotary_frequencies_and_the_loss(tmp_path):
    (first, frequencies), (second, _) = run_ranks(train_sharded, 2, "gemma3", zero3(tmp_path), "bf16")
    assert frequencies and set(frequencies) == {torch.float32}
    losses, _ = train_alone("gemma3")
    assert first[0][0] + second[0][0] == pytest.approx(losses[0], rel=0.01)
