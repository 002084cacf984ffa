"""The factor of fp16: when it grows and falls, within which bounds, and that it is a checkpoint's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.engines import loss_scale
from jepa_scale.engines.clip import Clipping
from jepa_scale.engines.loss_scale import INITIAL, LEAST, MOST, LossScale

CPU = torch.device("cpu")


@given(norms=st.lists(st.sampled_from([1.0, 0.0, float("inf"), float("nan")]), max_size=60), cut=st.integers(0, 60))
def test_it_halves_after_an_overflow_and_doubles_after_so_many_steps_without_one(norms, cut):
    """Also if it was saved and loaded on the way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scale, "GROWTH_INTERVAL", 5)
        scale = LossScale(CPU)
        factor, steps = INITIAL, 0
        for number, norm in enumerate(norms):
            if number == cut:
                state, scale = scale.state(), LossScale(CPU)
                scale.load_state(state)
            scale.update(torch.tensor(norm))
            steps = steps + 1 if norm < 2 else 0
            factor = factor * 2 if steps == 5 else factor if steps else factor / 2
            factor, steps = min(max(factor, LEAST), MOST), steps % 5
            assert scale.state() == {"factor": factor, "steps": steps}


def test_the_loss_is_scaled_in_fp32():
    loss = torch.tensor(3.0, dtype=torch.float16)
    assert LossScale(CPU).scale(loss).item() == 3 * INITIAL  # beyond fp16


@pytest.mark.parametrize("clip", [0.0, 0.5, 100.0])
def test_gradients_are_clipped_as_if_they_had_not_been_scaled(clip):
    module = torch.nn.Linear(3, 2)
    gradients = [torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0]]), torch.tensor([1.0, 2.0])]
    found = []
    for factor in (None, torch.tensor(1024.0)):
        clipping = Clipping(module, {}, clip)
        pieces = [[gradient * (1 if factor is None else factor) for gradient in gradients]]
        total, norms = clipping.measure(pieces, 1, CPU, factor)
        clipping.scale(pieces)
        found.append([total, *norms, *pieces[0]])
    for plain, scaled in zip(*found, strict=True):
        torch.testing.assert_close(scaled, plain)
    assert found[0][0].item() == pytest.approx(30**0.5)
