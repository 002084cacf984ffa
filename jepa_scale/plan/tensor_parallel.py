"""One rank of a tensor-parallel group that does not exist, for the sizes of its tensors.

The model is split by the real code (:mod:`jepa_scale.models.tensor_parallel.layers`), on tensors without data.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from jepa_scale.distributed.tp_group import TensorParallelGroup
from jepa_scale.models.backbone import Backbone
from jepa_scale.models.tensor_parallel import layers as tensor_parallel


class _Alone(TensorParallelGroup):
    """A tensor-parallel group without communication: the output tensors of its collectives already have their shapes."""

    def _all_reduce(self, x: Tensor, op: Any = None) -> None:
        pass

    def _reduce_scatter(self, own: Tensor, every: Tensor) -> None:
        pass

    def _all_gather(self, every: Tensor, own: Tensor) -> None:
        pass


def cut_for_rank(backbone: Backbone, tp: int) -> None:
    """Reduce a decoder to the parts of the first of ``tp`` ranks, in place.

    Raises:
        InputError: the decoder cannot be split over that many ranks.
    """
    tensor_parallel.split(backbone, _Alone(None, 0, tp))
