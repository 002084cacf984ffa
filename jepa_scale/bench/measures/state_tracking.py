"""How long a run keeps track of a product of group elements: its decoder, and the dynamics of ``next_latent`` by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from jepa_scale.bench.generators.rows import read_column, with_start
from jepa_scale.bench.generators.state_tracking import running_products, table, words
from jepa_scale.data.sampling.rng import generator
from jepa_scale.inference import LoadedRun
from jepa_scale.models.backbone import Backbone
from jepa_scale.objectives.next_latent.dynamics import LatentDynamics
from jepa_scale.objectives.next_latent.objective import NextLatent
from jepa_scale.packing import Segment, pack_sequence
from jepa_scale.utils.errors import InputError

FACTORS = (1, 2, 4)
"""Lengths of the words, as multiples of those in training."""
WORDS = 1000
"""Number of words of each greater length."""
BATCH_TOKENS = 8192


@torch.no_grad()
def measure(
    run: LoadedRun, data: Path, seed: int, *, group: str = "S3", length: int = 16, train: int = 0, test: int = 0
) -> dict[str, float]:
    """Measure a run on the test words, and on random words of 2 and 4 times the length of training.

    ``decoder_2x`` is the share of right products at all positions of the words of twice the length, ``decoder_exact_2x`` the share of
    words with no wrong one, and ``decoder_at_8`` the share of right products at the eighth position, for each power of two. A run
    of ``next_latent`` has ``recurrent_…`` too: the decoder reads the start token alone, and then the latent dynamics maps the
    state and each next element to the next state, from which the LM head reads the product.

    Args:
        data, seed, group, length: what the generator was given. train, test: not used.

    Raises:
        InputError: the model has fewer positions than the longest words.
    """
    backbone, objective = run.module.backbone, run.module.objective
    limit, longest = backbone.position_limit, FACTORS[-1] * length
    if limit is not None and limit <= longest:
        raise InputError(
            f"model.max_position_embeddings: {limit} is less than the {longest + 1} tokens of the longest words; raise it"
        )
    readers: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"decoder": lambda ids: read_products(backbone, ids)}
    if isinstance(objective, NextLatent):
        dynamics = objective.dynamics
        readers["recurrent"] = lambda ids: recurrent_products(backbone, dynamics, ids)
    products, found = table(group), {}
    for factor in FACTORS:
        ids = read_column(data / "test.jsonl", "input_ids")
        if factor > 1:
            rng = generator(f"bench/state_tracking/{seed}/{group}/{length}/measure/{factor}")
            ids = with_start(words(rng, WORDS, order=len(products), length=factor * length), len(products))
        wanted = torch.from_numpy(running_products(products, ids[:, 1:]))
        parts = torch.from_numpy(ids).to(run.device).split(max(1, BATCH_TOKENS // ids.shape[1]))
        for name, products_of in readers.items():
            right = (torch.cat([products_of(part) for part in parts]).cpu() == wanted).double()
            found[f"{name}_{factor}x"] = float(right.mean())
            found[f"{name}_exact_{factor}x"] = float(right.amin(dim=1).mean())
            if factor == FACTORS[-1]:
                powers = 2 ** np.arange(longest.bit_length())
                found |= {f"{name}_at_{n}": float(right[:, n - 1].mean()) for n in powers.tolist()}
    return found


def read_products(backbone: Backbone, ids: torch.Tensor) -> torch.Tensor:
    """Return the decoder's likeliest label at each element: (n, 1 + length) int64 ids → (n, length) int64."""
    packed = pack_sequence([Segment(row, "text") for row in ids.tolist()]).to(ids.device)
    return backbone.logits(backbone.hidden(packed)).argmax(dim=-1).view(ids.shape)[:, 1:]


def recurrent_products(backbone: Backbone, dynamics: LatentDynamics, ids: torch.Tensor) -> torch.Tensor:
    """Return the likeliest label at each state that the dynamics predicts from that at the start: (n, 1 + length) → (n, length)."""
    state = backbone.hidden(pack_sequence([Segment(row, "text") for row in ids[:, :1].tolist()]).to(ids.device))
    found = []
    for i in range(1, ids.shape[1]):
        state = dynamics(backbone.embed(ids[:, i]), state)
        found.append(backbone.logits(state).argmax(dim=-1))
    return torch.stack(found, dim=1)
