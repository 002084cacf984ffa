"""``mtp``: multi-token prediction (Gloeckle et al., arXiv 2404.19737), a baseline of objectives that predict the future.

The decoder's blocks but the last are the trunk. The last block predicts the next token as in any decoder. Heads of one block each
read the trunk's states too, and each predicts one of the tokens after that with the same LM head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jepa_scale.data.sampling.rng import ViewTransform
from jepa_scale.models.attention.meta import attention_pairs
from jepa_scale.models.backbone import Backbone
from jepa_scale.models.flops import DecoderFlops, linear_cost
from jepa_scale.models.generation.speculative import Drafter
from jepa_scale.models.native_blocks import config_of_blocks
from jepa_scale.objectives.base import Loss, Objective, lm_loss, mean_over_global_batch
from jepa_scale.objectives.costs import StepFlops
from jepa_scale.objectives.mtp.config import MtpOptions
from jepa_scale.objectives.mtp.diagnostics import MtpDiagnostics
from jepa_scale.objectives.mtp.drafter import MtpDrafter
from jepa_scale.objectives.mtp.head import MtpHead
from jepa_scale.objectives.mtp.views import MtpViews, anchor_name
from jepa_scale.objectives.ramp import ramp
from jepa_scale.objectives.tasks import Call
from jepa_scale.packing import PackedBatch
from jepa_scale.utils.errors import InputError


class Mtp(Objective):
    """w_lm · next-token loss + w_mtp · sum over 2 … ``heads`` of the loss of the token so many positions ahead."""

    Options = MtpOptions

    def __init__(self, options: MtpOptions, backbone: Backbone, data: Any):
        super().__init__()
        self.options = options
        if backbone.num_layers < 2:
            raise InputError(
                "objective.name: mtp has its heads before the decoder's last block; give the model 2 blocks or more"
            )
        self.tap = backbone.num_layers - 1
        config = config_of_blocks(backbone, 1, drop_path=False)
        self.heads = nn.ModuleList(MtpHead(config) for _ in self.aheads)

    @property
    def aheads(self) -> range:
        """How many tokens ahead each of the heads predicts."""
        return range(2, self.options.heads + 1)

    # -- how it is trained --------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> list[nn.Module]:
        return [head.block for head in self.heads]  # type: ignore[misc]

    def view_transform(self) -> ViewTransform:
        return MtpViews(self.options.heads)

    def view_tokens(self, sizes: np.ndarray) -> np.ndarray:
        return sizes - 1

    def flops(self, backbone: Backbone, square: bool = False) -> StepFlops:
        decoder, block = DecoderFlops.of(backbone), linear_cost(self.heads)  # of all heads
        attend: Any = self.heads[0].block.self_attn  # type: ignore[union-attr]
        width = attend.qk_head_dim + attend.head_dim
        pair = 2 * attend.config.num_attention_heads * width * len(self.heads)
        row = 2 * decoder.per_row.forward if self.options.detach else sum(decoder.per_row)

        def count(batches: Sequence[PackedBatch]) -> int:
            total = 0
            for batch in batches:
                packed = batch.sequences["main"]
                total += decoder.of_sequence(packed, training=True, square=square)
                pairs = attention_pairs(packed.table.lengths, causal=not square)
                total += sum(block) * packed.num_tokens + 3 * pair * pairs
                total += row * sum(batch.counts[anchor_name(ahead)] for ahead in self.aheads)
            return total

        return count

    # -- parts --------------------------------------------------------------------------------------------------------

    def predictions(self, trunk: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, list[int]]:
        """Return the states from which the heads predict, (n, d), the tokens (n,), and the number of them of each head.

        Args:
            trunk: (T, d), states before the decoder's last block.
        """
        packed = batch.sequences["main"]
        positions = [batch.positions[anchor_name(ahead)] for ahead in self.aheads]
        rows = torch.cat(
            [head(trunk, packed).index_select(0, at) for head, at in zip(self.heads, positions, strict=True)]
        )
        labels = torch.cat([packed.labels[at + ahead - 1] for ahead, at in zip(self.aheads, positions, strict=True)])
        return rows, labels, [len(at) for at in positions]

    # -- training -----------------------------------------------------------------------------------------------------

    def loss(self, backbone: Backbone, batch: PackedBatch, gathered: list[dict[str, Tensor]], micro: int) -> Loss:
        o = self.options
        hidden, trunk = backbone.hidden_and_tap(batch.sequences["main"], self.tap)
        lm = lm_loss(backbone, hidden, batch)
        rows, labels, counts = self.predictions(trunk.detach() if o.detach else trunk, batch)
        totals = [batch.totals[anchor_name(ahead)] for ahead in self.aheads]
        ones = torch.ones(len(labels), device=labels.device).split(counts)
        shares = torch.cat([mean_over_global_batch(one, total) for one, total in zip(ones, totals, strict=True)])
        mtp, losses, _ = backbone.label_loss(rows, labels, shares, frozen=o.detach)
        means = {
            f"lm_loss_h{ahead}": mean_over_global_batch(x.sum(), total)
            for ahead, x, total in zip(self.aheads, losses.split(counts), totals, strict=True)
        }
        weight = o.mtp_weight * ramp(batch.step - o.mtp_start, o.mtp_ramp)
        total = o.lm_weight * lm + weight * mtp
        gauges: dict[str, Tensor | float] = {"mtp_weight": weight} if o.mtp_start or o.mtp_ramp else {}
        return Loss(total, {"loss": total.detach(), "lm_loss": lm.detach(), **means}, gauges)

    def drafter(self, backbone: Backbone) -> Drafter:
        return MtpDrafter(backbone, list(self.heads))  # type: ignore[arg-type]

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def diagnostics(self, call: Call) -> MtpDiagnostics | None:
        samples = self.options.eval_samples
        return MtpDiagnostics(call, samples, self.view_transform(), self.view_tokens) if samples else None

    def diagnose(self, backbone: Backbone, batch: PackedBatch) -> dict[str, Tensor]:
        """Return each head's losses, (n,) fp32, by the number of tokens ahead."""
        _, trunk = backbone.hidden_and_tap(batch.sequences["main"], self.tap)
        rows, labels, counts = self.predictions(trunk, batch)
        losses = backbone.label_losses(rows, labels).split(counts)
        return {str(ahead): x for ahead, x in zip(self.aheads, losses, strict=True)}
