"""Compiled blocks: one program for streams of whatever lengths. Dynamo alone decides that, so nothing is compiled to machine code
here; whole compiled runs are tests/distributed/test_compiled_runs.py's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jepa_scale.models.compiling import compile_blocks
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.packing import Segment, pack_sequence

LENGTHS = [(5, 3), (4, 4, 9), (2, 7, 3), (11, 6)]
"""Of the segments in each stream: no two have the same, nor as many tokens."""


@pytest.fixture(autouse=True)
def from_anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_lengths_of_segments_are_no_new_program():
    torch.manual_seed(0)
    options = ModelOptions(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    plain, compiled = (build_backbone(options, 20) for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    programs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        programs.append(graph)
        return graph.forward

    compile_blocks(compiled.layers, backend=backend)
    counts = []
    for lengths in LENGTHS:
        stream = pack_sequence([Segment(torch.randint(20, (n,)).tolist(), "a") for n in lengths])
        states = compiled.hidden(stream)
        torch.testing.assert_close(states, plain.hidden(stream))
        states.sum().backward()
        counts.append(len(programs))
    # the first stream's sizes are taken for constants, the second shows which are open
    assert counts[0] > 0 and len(set(counts[1:])) == 1, counts
