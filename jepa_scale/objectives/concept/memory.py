"""A two-way memory: one slot an entity, with a key made of its name and a learned value, its concept.

Read forwards it recognises: name → key → top-1 slot → value. Read backwards it lets a predicted concept be spoken:
prediction → top-1 slot by value → key, from which the decoder reads the name off. The published reversal-curse model with
the best retrieval (Wang & Sun, arXiv 2504.01928) uses a top-1 memory layer for recognition; reading it backwards is ours.

The keys are the names' token embeddings, bound to their place in the name by a rotation of coordinates, so a slot needs
no parameters but its value. A name's key is most similar to itself, so the top-1 slot of a *known* name is that name's
own, and training looks it up instead of searching for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Embed = Callable[[Tensor], Tensor]
"""(m,) token ids → (m, hidden) embeddings."""


class ConceptMemory(nn.Module):
    """Slots for a fixed list of names.

    Args:
        names: the known names, token ids; a name's place in the list is its slot.
        dim: width of a value (a concept).
    """

    names: Tensor

    def __init__(self, names: Sequence[tuple[int, ...]], dim: int):
        super().__init__()
        self.values = nn.Embedding(len(names), dim)  # N(0, 1): unit RMS from the start
        longest = max(len(n) for n in names)
        padded = torch.tensor([[*n, *[-1] * (longest - len(n))] for n in names])
        self.register_buffer("names", padded, persistent=False)  # (slots, longest), −1 fills up

    def forward(self, slots: Tensor) -> Tensor:
        """(n,) int64 → (n, dim) values."""
        return self.values(slots)

    def key(self, slots: Tensor, embed: Embed) -> Tensor:
        """(n,) int64 → (n, hidden) unit-RMS keys."""
        return name_key(self.names[slots], embed)


def name_key(names: Tensor, embed: Embed) -> Tensor:
    """(n, longest) token ids, −1 fills up → (n, hidden) unit-RMS keys.

    Token t of a name enters rotated by t/longest of the width, so that "first, last" differs from "last, first" and the
    places can be told apart again.
    """
    n, longest = names.shape
    vectors = embed(names.clamp(min=0).flatten()).unflatten(0, (n, longest))  # (n, longest, hidden), n may be 0
    vectors = vectors * (names >= 0).unsqueeze(-1)
    width = vectors.shape[-1]
    bound = [torch.roll(vectors[:, t], t * width // longest, dims=-1) for t in range(longest)]
    return F.rms_norm(torch.stack(bound).sum(dim=0).float(), (width,))
