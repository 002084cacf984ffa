"""State without some parameters: their moments and copies stay out, too."""

from __future__ import annotations

import torch

from jepa_scale.checkpoint.partial_state import PartialState
from jepa_scale.checkpoint.shard_view import ShardView


class Part:
    updates = 0

    def sharded_state(self):
        names = ("model/a.weight", "model/b.a.weight", "exp_avg/a.weight", "teacher/a.weight", "model/a.bias")
        return {name: ShardView.whole(torch.full((2,), float(i))) for i, name in enumerate(names)}

    def post_load(self, updates):
        self.updates = updates


def test_it_has_all_but_the_named_parameters():
    part = Part()
    state = PartialState(part, {"a.weight"})
    kept = state.sharded_state()
    assert set(kept) == {"model/b.a.weight", "model/a.bias"}
    assert torch.equal(kept["model/a.bias"].parts[0][1], torch.full((2,), 4.0))
    state.post_load(7)
    assert part.updates == 7
