"""What every objective gives of a text: states of each segment by itself, whatever it is packed with."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.objectives.lm import LanguageModeling
from jepa_scale.objectives.lm_options import LmOptions
from jepa_scale.packing import pack
from tests.objectives.helpers import DATA, alone, backbone

TEXTS = [[3, 9, 4, 1, 7], [5], [8, 2, 6], [1, 1], [4, 4, 4]]


def test_states_pooled_by_segment_come_back_to_the_order_of_the_texts():
    model = backbone()
    objective = LanguageModeling(LmOptions(), model, DATA)
    views = [
        objective.text_views(SimpleNamespace(tokens=np.array(t)), SampleRNG(0, 0, 0, n)) for n, t in enumerate(TEXTS)
    ]
    batch = pack(views)
    with torch.no_grad():
        out = objective.encode(model, batch)
        for sample, segment in zip(batch.samples["text"].tolist(), batch.segments["text"].tolist(), strict=True):
            expected = alone(model, TEXTS[sample])
            start, stop = batch.sequences["main"].table.cu_seqlens[segment : segment + 2].tolist()
            torch.testing.assert_close(out["tokens"][start:stop], expected)
            torch.testing.assert_close(out["mean"][segment], expected.mean(dim=0))
            torch.testing.assert_close(out["last"][segment], expected[-1])
    assert not np.array_equal(batch.segments["text"].numpy(), np.arange(len(TEXTS)))  # the packer has sorted them


def test_states_are_fp32_and_an_empty_batch_has_no_text():
    model = backbone().bfloat16()
    objective = LanguageModeling(LmOptions(), model, DATA)
    views = objective.text_views(SimpleNamespace(tokens=np.array([1, 2])), SampleRNG(0, 0, 0, 0))
    batch = pack([], like=views)
    with torch.no_grad():
        out = objective.encode(model, batch)
    assert {rows.dtype for rows in out.values()} == {torch.float32}
    assert out["mean"][batch.segments["text"]].shape == (0, 16)


def test_the_longest_text_is_the_decoders():
    model = backbone(max_position_embeddings=77)
    assert LanguageModeling(LmOptions(), model, DATA).most_text_tokens(model) == 77
