"""A two-way memory with one slot for each entity. A slot has a key, made of the entity's name, and a learned value, its
concept.

The forward direction recognises a name: name → key → top-1 slot → value. The backward direction decodes a predicted concept:
prediction → top-1 slot by value → key, from which the decoder generates the name. The published reversal-curse model with the
best retrieval (Wang & Sun, arXiv 2504.01928) uses a top-1 memory layer for recognition. The backward direction is new here.

A key is the sum of the name's token embeddings. A rotation of coordinates binds each to its position in the name, so the
value is a slot's only parameter. A name's key is most similar to itself. The top-1 slot of a *known* name is therefore the
name's own slot, and training looks it up by index instead of searching for it.
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
        names: the known names, as token ids; a name's index in the list is its slot.
        dim: width of a value (a concept).
    """

    names: Tensor

    def __init__(self, names: Sequence[tuple[int, ...]], dim: int):
        super().__init__()
        self.values = nn.Embedding(len(names), dim)  # N(0, 1): unit RMS from the start
        longest = max(len(n) for n in names)
        padded = torch.tensor([[*n, *[-1] * (longest - len(n))] for n in names])
        self.register_buffer("names", padded, persistent=False)  # (slots, longest), padded with −1

    def forward(self, slots: Tensor) -> Tensor:
        """Return the values of slots: (n,) int64 → (n, dim)."""
        return self.values(slots)

    def key(self, slots: Tensor, embed: Embed) -> Tensor:
        """Return the keys of slots: (n,) int64 → (n, hidden), unit RMS."""
        return name_key(self.names[slots], embed)


def name_key(names: Tensor, embed: Embed) -> Tensor:
    """Return the keys of names: (n, longest) token ids, padded with −1 → (n, hidden), unit RMS.

    The embedding of token t of a name is rotated by t/longest of the width. So "first, last" differs from "last, first", and
    the positions can be recovered from the key.
    """
    n, longest = names.shape
    vectors = embed(names.clamp(min=0).flatten()).unflatten(0, (n, longest))  # (n, longest, hidden), n may be 0
    vectors = vectors * (names >= 0).unsqueeze(-1)
    width = vectors.shape[-1]
    bound = [torch.roll(vectors[:, t], t * width // longest, dims=-1) for t in range(longest)]
    return F.rms_norm(torch.stack(bound).sum(dim=0).float(), (width,))
