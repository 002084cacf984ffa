"""State without the tensors that a checkpoint need not keep, because they can be read from elsewhere."""

from __future__ import annotations

from collections.abc import Collection

from jepa_scale.checkpoint.shard_view import Checkpointable, ShardView


class PartialState:
    """State of ``part`` without some parameters of the root module, and without copies of them that a teacher has.

    Args:
        names: of the parameters, in the root module.
    """

    def __init__(self, part: Checkpointable, names: Collection[str]) -> None:
        self.part, self.names = part, names

    def sharded_state(self) -> dict[str, ShardView]:
        views = self.part.sharded_state()
        return {name: view for name, view in views.items() if name.partition("/")[2] not in self.names}

    def post_load(self, updates: int) -> None:
        self.part.post_load(updates)
