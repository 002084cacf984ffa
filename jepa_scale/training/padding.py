"""Before the first step: what padded rows cost, and positions that the decoder does not take."""

from __future__ import annotations

import logging

from jepa_scale.data.sampling.loader import Loader
from jepa_scale.distributed.comm import ParallelContext, broadcast_object
from jepa_scale.models.backbone import Backbone
from jepa_scale.models.token_rows import cells
from jepa_scale.packing import PackedBatch
from jepa_scale.utils.errors import DataError, InputError
from jepa_scale.utils.format import format_share

logger = logging.getLogger(__name__)

MEASURED = 8
"""Micro-batches whose padding is counted."""


def announce_layout(backbone: Backbone, loader: Loader, ranks: ParallelContext) -> None:
    """Log the share of padding in the first micro-batches of rank 0 if the rows are padded. Collective.

    Raises:
        InputError: the objective gives tokens positions of its own, and the decoder takes none.
    """
    message = None
    if ranks.is_main:
        try:
            _announce(backbone, loader)
        except InputError as error:
            message = str(error)
    if message := broadcast_object(message):
        raise InputError(message)


def _announce(backbone: Backbone, loader: Loader) -> None:
    batches = _first(loader)
    if not all(packed.consecutive for batch in batches for packed in batch.sequences.values()):
        backbone.check_positions()
    if not backbone.padded:
        return
    tokens = sum(batch.num_tokens for batch in batches)
    computed = sum(cells(packed) for batch in batches for packed in batch.sequences.values())
    logger.info(
        "model.packing: padded: each segment is a row as long as the longest of its micro-batch, and a branch repeats its prefix; of the "
        f"tokens that are computed in the first {len(batches)} micro-batches of rank 0, {format_share(computed - tokens, computed)} "
        "are padding"
        if batches
        else "model.packing: padded: each segment is a row as long as the longest of its micro-batch"
    )


def _first(loader: Loader) -> list[PackedBatch]:
    """Return the first micro-batches with samples; none if one is damaged, which the training will meet."""
    k, found = loader.sampler.accumulation, []
    try:
        for number in range(MEASURED):
            step, micro = divmod(number, k)
            batch = loader.micro_batch(loader.start_step + step, micro)
            if batch.counts["samples"]:
                found.append(batch)
    except DataError:
        return []
    return found
