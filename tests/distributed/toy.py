"""A small root module that uses its parameters in all ways that real ones do, and a plain single-process reference."""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_scale.config.schema import OptimConfig
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.engines import create_engine
from jepa_scale.engines.base import Engine, EngineOptions
from jepa_scale.engines.weights import Weights
from jepa_scale.optim import build_optimizer, parameter_groups

VOCAB, DIM, BATCH, LENGTH = 29, 12, 8, 6  # odd sizes, so that shards are uneven
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "ds"
ENGINES = ("fsdp", "zero0", "zero1", "zero2", "zero3")


class Output(NamedTuple):
    total: Tensor
    means: dict[str, Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.up = nn.Linear(DIM, 2 * DIM)
        self.down = nn.Linear(2 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(1))

    def forward(self) -> Tensor:
        return self.log_scale.float().exp()


class Toy(nn.Module):
    """Small decoder that runs names through the lower blocks first, then everything through all blocks.

    So blocks 0 and 1 run twice in a forward. ``rare`` is used in some micro-batches of some steps, ``never`` in none.
    ``head`` is tied to the embedding if ``tied``.
    """

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(DIM, VOCAB, bias=False)
        self.project = nn.Linear(DIM, 5)
        self.rare = nn.Linear(DIM, DIM)
        self.never = nn.Linear(3, 3)
        self.scale = Scale()
        self.root_gain = nn.Parameter(torch.ones(DIM))
        self.register_buffer("seen", torch.arange(4.0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        if tied:
            self.head.weight = self.embed.weight

    def run(self, ids: Tensor, until: int) -> Tensor:
        x = self.embed(ids)
        for block in self.layers[:until]:
            x = block(x)
        return x

    def forward(self, task: str, batch: dict[str, Any]) -> Output | Tensor:
        if task == "logits":  # other blocks in another order than in training
            return self.head(self.layers[0](self.run(batch["ids"], 3))).float()
        if task == "names":
            return self.run(batch["ids"][:, :2], 1).float()
        names = self.project(self.run(batch["ids"][:, :2], 2)[:, -1]).float()
        hidden = self.run(batch["ids"], 3) * self.root_gain
        if batch["step"] % 3 and (batch["step"] + batch["micro"]) % 2:
            hidden = hidden + self.rare(hidden)
        logits = self.head(hidden[:, :-1]).float()
        lm = F.cross_entropy(logits.reshape(-1, VOCAB), batch["ids"][:, 1:].reshape(-1), reduction="sum")
        target = batch["ids"][:, :5].float() / VOCAB
        aux = (names * self.scale() - target).square().sum()
        total = (lm + aux) / BATCH
        return Output(total, {"loss": total.detach()})


@contextmanager
def changed(name: str, change: Callable[..., Any]) -> Iterator[None]:
    """Call ``change`` on the results of a function of this file until the end of the block."""
    here = sys.modules[__name__]
    original = getattr(here, name)
    setattr(here, name, lambda *args, **kwargs: change(original(*args, **kwargs)))
    try:
        yield
    finally:
        setattr(here, name, original)


def make_toy(tied: bool = False) -> Toy:
    torch.manual_seed(3)
    return Toy(tied)


def batches(step: int, accumulation: int = 1, rank: int = 0, world_size: int = 1) -> list[dict[str, Any]]:
    """Return this rank's micro-batches of the global batch of ``step``."""
    generator = torch.Generator().manual_seed(1000 + step % 4)
    ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
    parts = ids.view(accumulation, world_size, -1, LENGTH)
    return [{"ids": part[rank], "step": step, "micro": micro} for micro, part in enumerate(parts)]


OPTIM = OptimConfig(lr=1e-2, lr_head=5e-3, weight_decay=0.1, clip_norm=3.0)
MUON = OptimConfig(
    method="muon", lr=1e-2, lr_head=5e-3, lr_muon=2e-2, muon_momentum=0.9, weight_decay=0.1, clip_norm=3.0
)
MATRICES = ("up.weight", "down.weight", "project.weight", "rare.weight", "never.weight")
"""Endings of the names of the parameters that Muon updates; also the head, if it is not tied."""
HEADS = ("head", "project", "scale")


def small_buckets(name: str, folder: str) -> Path:
    """Write the shipped DeepSpeed JSON with sizes scaled to the toy; otherwise ZeRO-3 would never free a parameter."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    zero = config["zero_optimization"]
    for key, value in {
        "reduce_bucket_size": 400,
        "allgather_bucket_size": 400,
        "stage3_prefetch_bucket_size": 300,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 500,
        "stage3_max_reuse_distance": 100,
    }.items():
        if key in zero:
            zero[key] = value
    path = Path(folder) / f"{name}.json"
    path.write_text(json.dumps(config))
    return path


def sharded(
    name: str,
    module: nn.Module,
    blocks: Iterable[nn.Module],
    heads: Sequence[str],
    ranks: ParallelContext,
    optim: OptimConfig,
    weights: Weights | None = None,
    **options: Any,
) -> Engine:
    """Build the engine of a name in ``ENGINES`` on any module; ``options`` are those of :class:`EngineOptions`."""
    zero = name.startswith("zero")
    with tempfile.TemporaryDirectory() as folder:
        return create_engine(
            "deepspeed" if zero else "fsdp",
            module,
            shard=list(blocks),
            groups=parameter_groups(module, optim, heads),
            optim_options=optim,
            engine_options=EngineOptions(deepspeed=small_buckets(name, folder) if zero else None, **options),
            ranks=ranks,
            weights=weights,
        )


def make_engine(
    name: str,
    ranks: ParallelContext,
    accumulation: int = 1,
    precision: str = "fp32",
    clip: float = 3.0,
    tied: bool = False,
    optim: OptimConfig | None = None,
    clip_groups: Mapping[str, Sequence[str]] | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
) -> Engine:
    toy = make_toy(tied)
    options = {"precision": precision, "clip_norm": clip, "accumulation": accumulation}
    options |= {"clip_groups": clip_groups or {}, "bounds": bounds or {}}
    return sharded(name, toy, toy.layers, HEADS, ranks, optim or OPTIM, **options)


def factor(step: int) -> float:
    return 1.0 / (1 + 0.1 * step)


def train(engine: Engine, steps: range) -> tuple[list[float], list[float]]:
    """Train, with evaluations between; return local sums of the loss over the micro-batches and gradient norms of each step."""
    losses, norms = [], []
    for step in steps:
        engine.scale_lr(factor(step))
        local = 0.0
        for batch in batches(step, engine.options.accumulation, engine.ranks.rank, engine.ranks.world_size):
            output = engine.forward("loss", batch)
            engine.backward(output.total)
            local += output.means["loss"].item()
        norms.append(engine.step().item())
        losses.append(local)
        if step % 3 == 1:
            evaluate(engine)
    return losses, norms


def evaluate(engine: Engine) -> list[Tensor]:
    engine.eval()
    with torch.no_grad():
        batch = batches(99)[0]
        results = [engine.forward(task, batch) for task in ("logits", "names", "logits")]
    engine.train()
    return results


def reference(
    steps: int, accumulation: int = 1, clip: float = 3.0, tied: bool = False
) -> tuple[list[float], list[float], Toy]:
    """Train with plain PyTorch on the whole batch in one process: the reference of every engine."""
    toy = copy.deepcopy(make_toy(tied))
    optimizer = build_optimizer(parameter_groups(toy, OPTIM, HEADS), OPTIM)
    peaks = [group["lr"] for group in optimizer.param_groups]
    losses, norms = [], []
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor(step)
        total = 0.0
        for batch in batches(step, accumulation):
            loss = toy("loss", batch).total
            loss.backward()
            total += loss.item()
        for p in toy.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        limit = clip if clip > 0 else float("inf")
        norms.append(nn.utils.clip_grad_norm_(toy.parameters(), limit).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms, toy
