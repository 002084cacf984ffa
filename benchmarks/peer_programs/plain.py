"""Loops of plain PyTorch on the same model: padded rows with a dense mask, and FSDP2 on rows of a fixed length."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.peer_programs.loop import Loop
from benchmarks.peer_programs.ours import Samples
from jepa_scale.packing import IGNORE


class PlainLoop(Loop):
    """Forward of all places, cross-entropy of all logits."""

    def __init__(self, samples: Samples) -> None:
        decoder = samples.fresh_model().backbone.decoder
        decoder.set_attn_implementation("sdpa")
        self.prepare(decoder)
        super().__init__(samples, decoder)

    def prepare(self, decoder: nn.Module) -> None:
        """What happens to the model before there is an optimizer."""

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids (B, W), labels that are not shifted (B, W), mask (B, 1, W, W) of whom a query sees, or None = all before it."""
        rows = self.samples.of_step(step)
        width = max(len(ids) for ids, _ in rows)
        ids, labels = np.zeros((len(rows), width), np.int64), np.full((len(rows), width), IGNORE)
        real = np.zeros((len(rows), width), bool)
        for r, (tokens, of_row) in enumerate(rows):
            ids[r, : len(tokens)], labels[r, : len(tokens)], real[r, : len(tokens)] = tokens, of_row, True
        # padding sees padding: a row of −∞ alone would be NaN
        mask = torch.from_numpy(real[:, :, None] == real[:, None, :]).tril()[:, None]
        return torch.from_numpy(ids), torch.from_numpy(labels), mask

    def loss(self, step: int) -> Tensor:
        ids, labels, mask = self.batch(step)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)


class FsdpLoop(PlainLoop):
    """As torchtitan trains: each block and the root under ``fully_shard``, documents laid end to end and cut into rows of
    ``width`` tokens, whose attention knows no borders of documents. So the loss is another one, and the work per token that of
    rows which are always full.

    Args:
        width: of a row; as many rows a step as hold about what our step holds.
    """

    def __init__(self, samples: Samples, width: int) -> None:
        self.width = width
        self.stream = self._tokens(samples)
        mean = np.mean([samples.tokens(step) for step in range(4)])
        self.rows = max(1, round(float(mean) / width))
        super().__init__(samples)

    @staticmethod
    def _tokens(samples: Samples) -> Iterator[np.ndarray]:
        step = 0
        while True:
            yield from (ids for ids, _ in samples.of_step(step))
            step += 1

    def prepare(self, decoder: nn.Module) -> None:
        mesh = init_device_mesh("cpu", (1,))
        for part in [*decoder.model.layers, decoder]:
            fully_shard(part, mesh=mesh)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        wanted, have = self.rows * (self.width + 1), np.zeros(0, np.int64)
        while len(have) < wanted:
            have = np.concatenate([have, next(self.stream)])
        ids = torch.from_numpy(have[:wanted].reshape(self.rows, -1))
        return ids, ids, None
