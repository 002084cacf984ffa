"""Which drafted tokens are kept, so that the tokens have the model's own distribution (Leviathan et al., arXiv 2211.17192)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def distributions(logits: Tensor, temperature: float) -> Tensor:
    """Return the distributions to sample from, (…, V) → (…, V) fp32; at temperature 0 the likeliest token has all of it."""
    if temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()
    logits = logits.float()
    highest = logits.amax(dim=-1, keepdim=True)  # first, or a tiny temperature gives infinities
    return torch.softmax((logits - highest) / temperature, dim=-1)


def sample(probabilities: Tensor, generator: torch.Generator | None) -> int:
    """Draw a token from (V,) probabilities, which need not sum to one."""
    return int(torch.multinomial(probabilities, 1, generator=generator))


def accept(drafts: Tensor, drafted: Tensor, actual: Tensor, generator: torch.Generator | None) -> tuple[int, int]:
    """Decide how many of the drafts are kept, and which token follows them (algorithm 1 of the paper).

    A draft y is kept with probability min(1, p(y) / q(y)). After the first one that is not, the next token is drawn from the part of
    p that exceeds q; after the last one from p.

    Args:
        drafts: (k,) int64 tokens. drafted: (k, V), q of each draft. actual: (k + 1, V), p at their positions and after them.

    Returns:
        The number of drafts that are kept, 0 … k, and the token after them.
    """
    rows = torch.arange(len(drafts), device=drafts.device)
    ratios = actual[rows, drafts] / drafted[rows, drafts]
    kept = torch.rand(len(drafts), generator=generator, device=drafts.device) < ratios
    count = int(kept.long().cumprod(dim=0).sum())
    if count == len(drafts):
        return count, sample(actual[count], generator)
    rest = (actual[count] - drafted[count]).clamp(min=0)
    # both distributions are equal up to rounding: then nothing exceeds, and any of the two will do
    return count, sample(rest if rest.any() else actual[count], generator)
