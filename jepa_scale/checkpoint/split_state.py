"""State of tensor-parallel ranks, expressed as shards of the whole tensors.

An engine shards the tensors of its rank. With tensor parallelism these are themselves parts of whole tensors. A checkpoint
holds whole tensors only, so that any number of ranks with any degree of tensor parallelism can read it.
"""

from __future__ import annotations

from collections.abc import Mapping

from jepa_scale.checkpoint.shard_view import Checkpointable, ShardView


class SplitState:
    """State of ``part`` with each shard placed in the whole tensor.

    Args:
        part: object whose tensors are this rank's parts.
        splits: name of a parameter in the root module → (dim, start, size), the position of this rank's part in the whole
            (:class:`jepa_scale.distributed.tp_group.Split`).
    """

    def __init__(self, part: Checkpointable, splits: Mapping[str, tuple[int, int, int]]) -> None:
        self.part, self.splits = part, splits

    def sharded_state(self) -> dict[str, ShardView]:
        return {name: self._whole(name, view) for name, view in self.part.sharded_state().items()}

    def _whole(self, name: str, view: ShardView) -> ShardView:
        split = self.splits.get(name.partition("/")[2])  # strip "model/", "teacher/" or a moment's name
        return view if split is None else view.within(*split)

    def post_load(self, updates: int) -> None:
        self.part.post_load(updates)
