"""Drafts of ``mtp``: the next tokens of its heads, which do not see each other's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from jepa_scale.models.backbone import Backbone
from jepa_scale.models.generation.speculative import Choose
from jepa_scale.models.native_blocks import config_of_blocks
from jepa_scale.objectives.mtp.head import MtpHead


class MtpDrafter:
    """See :class:`jepa_scale.models.generation.speculative.Drafter`. Each head has a key-value cache."""

    def __init__(self, backbone: Backbone, heads: Sequence[MtpHead]) -> None:
        self.tap = backbone.num_layers - 1
        self._backbone = backbone
        self._heads = [_with_cache(backbone, head) for head in heads]
        self._caches = [DynamicCache() for _ in self._heads]
        self._rows: list[Tensor] = []  # (1, d) of each head, for the LM head
        self._seen = 0
        self.most = len(self._heads)

    def observe(self, hidden: Tensor, tapped: Tensor | None) -> None:
        assert tapped is not None, "the trunk's states were not recorded"
        self._rows = [
            head.continued(tapped, self._seen, cache)[-1:]
            for head, cache in zip(self._heads, self._caches, strict=True)
        ]
        self._seen += len(tapped)

    def draft(self, token: int, count: int, choose: Choose) -> tuple[list[int], list[Tensor]]:
        logits = self._backbone.logits(torch.cat(self._rows[:count]))
        found = [choose(row) for row in logits]
        return [token for token, _ in found], [chance for _, chance in found]


def _with_cache(backbone: Backbone, head: MtpHead) -> MtpHead:
    """Return a head of the same weights with attention that takes a cache."""
    with torch.device("meta"):
        copied = MtpHead(config_of_blocks(backbone, 1, drop_path=False, packed=False))
    copied.load_state_dict(head.state_dict(), assign=True)
    return copied.eval()
