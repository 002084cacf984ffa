"""A small real backbone, data and batches for tests of objectives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from jepa_scale.data.reversal.facts import generate
from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.objectives.base import Loss, Objective
from jepa_scale.packing import PackedBatch, Segment, add_counts, pack, pack_sequence

DATA = generate(50, 5, 3)


def backbone(seed: int = 0, **keys: Any):
    torch.manual_seed(seed)
    options = ModelOptions(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3, **keys)
    return build_backbone(options, DATA.vocab_size)


class Copies:
    """A teacher that stands still, a little beside its student."""

    def __init__(self, objective: Objective, backbone: Any) -> None:
        self.copies = objective.teacher_copies(backbone)
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for part in self.copies.values():
                for p in part.parameters():
                    p += 0.1 * torch.randn(p.shape, generator=generator)

    @torch.no_grad()
    def forward(self, path: str, *args: Any) -> Any:
        return self.copies[path](*args)

    def momentum(self, step: int) -> float:
        return 0.5 + step / 100


def batch_of(objective: Objective, facts: list[Any], step: int = 0, first: int = 0) -> PackedBatch:
    """The facts as one micro-batch that is the whole global batch."""
    views = objective.view_transform()
    batch = pack(
        [views(f, SampleRNG(0, 0, step, first + i)) for i, f in enumerate(facts)], objective.sequences, step=step
    )
    return with_totals(batch)


def micro_batches(objective: Objective, like: Any, *parts: list[Any], step: int = 0) -> list[PackedBatch]:
    """A step's micro-batches; the samples are numbered through. ``like``: a sample, for the shapes of an empty part."""
    maker, first, batches = objective.view_transform(), 0, []
    shapes = maker(like, SampleRNG(0, 0, step, 0))
    for part in parts:
        views = [maker(x, SampleRNG(0, 0, step, first + i)) for i, x in enumerate(part)]
        batches.append(pack(views, objective.sequences, step=step, like=shapes))
        first += len(part)
    totals = {name: torch.tensor(float(n)) for name, n in add_counts(batches).items()}
    return [replace(batch, totals=totals) for batch in batches]


def losses_and_gradients(
    backbone: Any, heads: nn.Module, objective: Objective, batches: list[PackedBatch]
) -> tuple[list[Loss], dict[str, torch.Tensor]]:
    """The losses of a step's micro-batches, and the gradients of ``decoder.…`` and ``heads.…``, zero where there is none."""
    losses = [objective.loss(backbone, batch, [], 0) for batch in batches]
    for loss in losses:
        loss.total.backward()
    modules = nn.ModuleDict({"decoder": backbone, "heads": heads})
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in modules.named_parameters()}
    modules.zero_grad(set_to_none=True)
    return losses, found


def with_totals(batch: PackedBatch) -> PackedBatch:
    return replace(batch, totals={name: torch.tensor(float(n)) for name, n in batch.counts.items()})


def alone(model: Any, tokens: list[int], until: int | None = None) -> torch.Tensor:
    """(n, d) states of one sequence by itself."""
    return model.hidden(pack_sequence([Segment(tokens, "x")]), until=until)
