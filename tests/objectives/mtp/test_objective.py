"""`mtp`: its losses against a plain loop over samples, positions and heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.objectives.mtp.config import MtpOptions
from jepa_scale.objectives.mtp.objective import Mtp
from jepa_scale.packing import IGNORE, Segment, pack_sequence
from jepa_scale.utils.errors import InputError
from tests.objectives.helpers import alone, losses_and_gradients, micro_batches
from tests.objectives.next_latent.test_objective import SAMPLES, VOCABULARY, model


def make(backbone, **options):
    torch.manual_seed(1)
    objective = Mtp(MtpOptions(**{"heads": 3, **options}), backbone, None)
    for name, p in objective.named_parameters():
        if "norm" not in name:
            nn.init.normal_(p, std=0.3)
    return objective


def run(backbone, objective, *parts, step=0):
    batches = micro_batches(objective, SAMPLES[0], *parts, step=step)
    return losses_and_gradients(backbone, objective.heads, objective, batches)


def reference(backbone, objective, samples):
    """Return the next-token loss and each head's, from one sample at a time."""
    n = objective.options.heads
    losses = {ahead: [] for ahead in range(1, n + 1)}
    for sample in samples:
        tokens, labels = sample.lm_sequence()
        tokens, labels = tokens[:-1].tolist(), labels[:-1].tolist()
        packed = pack_sequence([Segment(tokens, "x")])
        trunk = alone(backbone, tokens, until=objective.tap)
        trunk = trunk.detach() if objective.options.detach else trunk
        states = [alone(backbone, tokens), *(head(trunk, packed) for head in objective.heads)]
        for ahead in losses:
            for t in range(len(tokens)):
                last = t + ahead - 1  # the position whose next token this is
                if last < len(tokens) and labels[last] != IGNORE:
                    frozen = objective.options.detach and ahead > 1
                    logits = backbone.logits(states[ahead - 1][t : t + 1], frozen=frozen)
                    losses[ahead].append(F.cross_entropy(logits, torch.tensor([labels[last]])))
    return {ahead: torch.stack(x).mean() if x else torch.zeros(()) for ahead, x in losses.items()}


OPTIONS = {
    "as in the paper": {},
    "two heads": dict(heads=2, mtp_weight=0.3),
    "further than most samples": dict(heads=12),
    "the control": dict(detach=True),
}


@pytest.mark.parametrize("family", ["native", "tied", "llama"])
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradients_are_those_of_the_reference(family, name):
    backbone = model(family)
    objective = make(backbone, **OPTIONS[name])
    (loss,), found = run(backbone, objective, SAMPLES)
    expected = reference(backbone, objective, SAMPLES)
    total = expected[1] + objective.options.mtp_weight * sum(expected[ahead] for ahead in objective.aheads)
    total.backward()
    torch.testing.assert_close(loss.total, total, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss.means["lm_loss"], expected[1].detach(), atol=1e-5, rtol=1e-5)
    for ahead in objective.aheads:
        torch.testing.assert_close(loss.means[f"lm_loss_h{ahead}"], expected[ahead].detach(), atol=1e-5, rtol=1e-5)
    modules = nn.ModuleDict({"decoder": backbone, "heads": objective.heads})
    for key, p in modules.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(found[key], grad, atol=2e-5, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}")


def test_the_loss_does_not_depend_on_the_micro_batches():
    backbone = model()
    objective = make(backbone)
    (whole,), expected = run(backbone, objective, SAMPLES)
    parts, found = run(backbone, objective, SAMPLES[:1], [], SAMPLES[1:4], SAMPLES[4:])
    torch.testing.assert_close(sum(part.total for part in parts), whole.total, atol=1e-6, rtol=1e-6)
    for key, grad in found.items():
        torch.testing.assert_close(grad, expected[key], atol=3e-6, rtol=1e-4, msg=key)


def test_the_control_leaves_the_decoder_to_next_token_prediction():
    backbone = model("tied")
    _, plain = run(backbone, make(backbone, mtp_weight=0.0), SAMPLES)
    _, control = run(backbone, make(backbone, detach=True), SAMPLES)
    _, trained = run(backbone, make(backbone), SAMPLES)
    for key in plain:
        if key.startswith("decoder"):
            assert torch.equal(control[key], plain[key]), key
        else:
            torch.testing.assert_close(control[key], trained[key], atol=1e-6, rtol=1e-4)
            assert control[key].any()
    first = "decoder.decoder.model.layers.0.mlp.up_proj.weight"  # of the trunk
    assert not torch.equal(plain[first], trained[first])


def test_the_weight_rises():
    backbone = model()
    objective = make(backbone, mtp_start=2, mtp_ramp=4, mtp_weight=0.5)
    for step, part in ((0, 0.0), (3, 0.25), (6, 1.0)):
        (loss,), _ = run(backbone, objective, SAMPLES, step=step)
        m = loss.means
        torch.testing.assert_close(loss.total.detach(), m["lm_loss"] + part * 0.5 * (m["lm_loss_h2"] + m["lm_loss_h3"]))
        assert loss.gauges["mtp_weight"] == 0.5 * part


def test_views_are_the_text_and_the_places_to_predict_from():
    objective = make(model())
    assert objective.view_tokens(np.array([2, 9])).tolist() == [1, 8]
    views = objective.view_transform()(SAMPLES[1], SampleRNG(0, 0, 0, 0))  # its answer is tokens 6 to 14
    (segment,) = views.segments
    assert list(segment.positions["anchor_2"]) == list(range(4, 13))
    assert list(segment.positions["anchor_3"]) == list(range(3, 12))
    assert views.counts == {"anchor_2": 9, "anchor_3": 9}


def test_diagnostics_are_the_terms_of_the_loss():
    backbone = model()
    objective = make(backbone)
    (loss,), _ = run(backbone, objective, SAMPLES)
    (batch,) = micro_batches(objective, SAMPLES[0], SAMPLES)
    with torch.no_grad():
        found = objective.diagnostics(lambda task, batch: getattr(objective, task)(backbone, batch)).measure([batch])
    assert found == pytest.approx({f"lm_loss_h{n}": float(loss.means[f"lm_loss_h{n}"]) for n in (2, 3)}, rel=1e-5)
    assert make(backbone, eval_samples=0).diagnostics(None) is None


def test_one_block_is_no_trunk():
    options = ModelOptions(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(InputError, match=r"^objective\.name: mtp .* 2 blocks or more"):
        make(build_backbone(options, VOCABULARY))
