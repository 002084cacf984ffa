"""The state of ranks that have parts of a tensor, as parts of the whole.

Engines shard what their rank has. With tensor parallelism that is itself a part; a checkpoint knows wholes only, and so it can be
read by any number of ranks with any degree.
"""

from __future__ import annotations

from collections.abc import Mapping

from jepa_scale.checkpoint.boxes import Boxes, Stateful


class SplitState:
    """What ``part`` gives, as parts of the wholes.

    Args:
        splits: name of a parameter in the root module → where this rank's lies: it has ``[start, …)`` of the ``size`` of
            dimension ``dim`` (:class:`jepa_scale.distributed.tp_group.Split`).
    """

    def __init__(self, part: Stateful, splits: Mapping[str, tuple[int, int, int]]) -> None:
        self.part, self.splits = part, splits

    def state(self) -> dict[str, Boxes]:
        return {name: self._whole(name, boxes) for name, boxes in self.part.state().items()}

    def _whole(self, name: str, boxes: Boxes) -> Boxes:
        split = self.splits.get(name.partition("/")[2])  # after "model/", a moment's name or "teacher/"
        return boxes if split is None else boxes.within(*split)

    def loaded(self, updates: int) -> None:
        self.part.loaded(updates)
