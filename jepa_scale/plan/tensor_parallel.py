"""A rank of a team that is not there, for the sizes of what it has: the real one (:mod:`jepa_scale.models.tensor_parallel`), on tensors
without numbers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from jepa_scale.distributed.tp_group import Team
from jepa_scale.models import tensor_parallel
from jepa_scale.models.backbone import Backbone


class _Alone(Team):
    """Nobody answers; what would come has its shape already."""

    def _all_reduce(self, x: Tensor, op: Any = None) -> None:
        pass

    def _reduce_scatter(self, own: Tensor, every: Tensor) -> None:
        pass

    def _all_gather(self, every: Tensor, own: Tensor) -> None:
        pass


def cut_for_rank(backbone: Backbone, tp: int) -> None:
    """Keep what the first of ``tp`` ranks has.

    Raises:
        InputError: the decoder cannot be split so.
    """
    tensor_parallel.split(backbone, _Alone(None, 0, tp))
