"""`next_latent`: its loss against a plain reference, one sample at a time and one predicted state at a time."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jepa_scale.data.examples import Conversation, Document, Turn
from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.objectives.next_latent.config import NextLatentOptions
from jepa_scale.objectives.next_latent.objective import NextLatent
from jepa_scale.packing import IGNORE
from tests.objectives.helpers import Copies, alone, losses_and_gradients, micro_batches

VOCABULARY = 40
LLAMA = dict(model_type="llama", hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


def document(n, seed):
    return Document(np.random.default_rng(seed).integers(0, VOCABULARY, n))


def chat(n, start, stop, seed):
    """The tokens from ``start`` to ``stop`` are the answer; the others are its prompt and are not predicted."""
    tokens = document(n, seed).tokens
    return Conversation(tokens, (Turn("assistant", start, stop),), [(start, stop)])


SAMPLES = [document(12, 1), chat(15, 6, 15, 2), document(2, 3), document(3, 4), chat(9, 7, 9, 5)]


def model(name="native"):
    torch.manual_seed(0)
    if name == "llama":
        options = ModelOptions(family="huggingface", config=dict(LLAMA, initializer_range=0.3))
    else:
        tied = name == "tied"
        options = ModelOptions(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.3,
            tie_word_embeddings=tied,
            output_bias=tied,
        )
    return build_backbone(options, VOCABULARY)


def make(backbone, **options):
    """The objective, with dynamics that do something: its last layer begins at zero."""
    torch.manual_seed(1)
    objective = NextLatent(NextLatentOptions(**options), backbone, None)
    for part in objective.dynamics.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.3)
            nn.init.normal_(part.bias, std=0.1)
    if options.get("target") == "ema":
        objective.teacher = Copies(objective, backbone)
    return objective


def run(backbone, objective, *parts, step=0):
    batches = micro_batches(objective, SAMPLES[0], *parts, step=step)
    return losses_and_gradients(backbone, objective.dynamics, objective, batches)


def mean(values):
    return torch.stack(values).mean() if values else torch.zeros(())


def reference(backbone, objective, samples):
    """Return (lm, jepa, kl): the paper's equations, with a loop over samples, anchors and steps of the rollout."""
    o, d = objective.options, objective.options.rollout
    lm, jepa, kl = [], [[] for _ in range(d)], [[] for _ in range(d)]
    head = copy.deepcopy(backbone.decoder.get_output_embeddings()).requires_grad_(False)
    log_p = lambda h: F.log_softmax(head(h).float(), dim=-1)  # noqa: E731
    for sample in samples:
        tokens, labels = sample.lm_sequence()
        tokens, labels = tokens[:-1].tolist(), labels[:-1].tolist()
        h = alone(backbone, tokens)
        target = alone(objective.teacher.copies["backbone"], tokens) if o.target == "ema" else h
        e = backbone.embed(torch.tensor(tokens))
        for t, label in enumerate(labels):
            if label != IGNORE:
                lm.append(F.cross_entropy(backbone.logits(h[t : t + 1]), torch.tensor([label])))
            state, e_read = (h[t].detach(), e.detach()) if o.detach else (h[t], e)
            for i in range(1, d + 1):
                if t + i == len(tokens):
                    break
                mlp = objective.dynamics.mlp(objective.dynamics.norm(torch.cat([e_read[t + i], state])))
                state = state + mlp
                sg = target[t + i].detach()
                a, b = ((x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() for x in (state, sg))
                jepa[i - 1].append(F.smooth_l1_loss(*((a, b) if o.target_norm else (state, sg))))
                if labels[t + i] != IGNORE:
                    p, q = log_p(h[t + i].detach()), log_p(state)
                    kl[i - 1].append((p.exp() * (p - q)).sum())
    return mean(lm), mean([mean(x) for x in jepa]), mean([mean(x) for x in kl])


OPTIONS = {
    "as in the paper": {},
    "one token ahead": dict(rollout=1, jepa_weight=0.3),
    "without the KL": dict(kl_weight=0.0),
    "an EMA teacher": dict(target="ema", rollout=2),
    "normalised": dict(target_norm=True, rollout=3, kl_weight=0.1),
    "the control": dict(detach=True),
    "further than any sample": dict(rollout=20),
}


@pytest.mark.parametrize("family", ["native", "tied", "llama"])
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradients_are_those_of_the_reference(family, name):
    backbone = model(family)
    objective = make(backbone, **OPTIONS[name])
    o = objective.options
    (loss,), found = run(backbone, objective, SAMPLES)
    lm, jepa, kl = reference(backbone, objective, SAMPLES)
    total = o.lm_weight * lm + o.jepa_weight * jepa + o.kl_weight * kl
    total.backward()
    torch.testing.assert_close(loss.total, total, atol=1e-5, rtol=1e-5)
    expected = {"loss": total, "lm_loss": lm, "jepa_loss": jepa} | ({"kl_future": kl} if o.kl_weight else {})
    assert loss.means.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(loss.means[key], value.detach(), atol=1e-5, rtol=1e-5, msg=key)
    modules = nn.ModuleDict({"decoder": backbone, "heads": objective.dynamics})
    for key, p in modules.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(found[key], grad, atol=2e-5, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", OPTIONS)
def test_the_loss_does_not_depend_on_the_micro_batches(name):
    backbone = model()
    objective = make(backbone, **OPTIONS[name])
    (whole,), expected = run(backbone, objective, SAMPLES)
    parts, found = run(backbone, objective, SAMPLES[:1], [], SAMPLES[1:4], SAMPLES[4:])
    torch.testing.assert_close(sum(part.total for part in parts), whole.total, atol=1e-6, rtol=1e-6)
    for key, grad in found.items():
        torch.testing.assert_close(grad, expected[key], atol=2e-6, rtol=1e-4, msg=key)


def test_the_control_leaves_the_decoder_to_next_token_prediction():
    backbone = model()
    _, plain = run(backbone, make(backbone, jepa_weight=0.0, kl_weight=0.0), SAMPLES)
    _, control = run(backbone, make(backbone, detach=True), SAMPLES)
    _, trained = run(backbone, make(backbone), SAMPLES)
    for key in plain:
        if key.startswith("decoder"):
            assert torch.equal(control[key], plain[key]), key
        else:  # and the dynamics learn the same from it
            torch.testing.assert_close(control[key], trained[key], atol=1e-6, rtol=1e-4)
            assert control[key].any()
    assert any(not torch.allclose(trained[key], plain[key], atol=1e-4) for key in plain if key.startswith("decoder"))


@pytest.mark.parametrize("family", ["native", "llama"])
def test_the_head_learns_from_next_token_prediction_alone(family):
    backbone = model(family)
    _, found = run(backbone, make(backbone, lm_weight=0.0), SAMPLES)
    head = found[f"decoder.{backbone.head_name}.weight"]
    assert not head.any() and found["decoder.decoder.model.embed_tokens.weight"].any()


def test_before_training_a_state_is_predicted_to_stay():
    backbone = model()
    objective = NextLatent(NextLatentOptions(rollout=3, kl_weight=0.0), backbone, None)
    (loss,), _ = run(backbone, objective, SAMPLES[:2])
    expected = []
    for ahead in (1, 2, 3):
        rows = []
        for sample in SAMPLES[:2]:
            h = alone(backbone, sample.tokens[:-1].tolist())
            rows.append(F.smooth_l1_loss(h[:-ahead], h[ahead:], reduction="none").mean(dim=-1))
        expected.append(torch.cat(rows).mean())
    torch.testing.assert_close(loss.means["jepa_loss"], torch.stack(expected).mean().detach())


def test_the_weights_rise():
    backbone = model()
    objective = make(backbone, jepa_start=4, jepa_ramp=4, jepa_weight=0.5, kl_weight=0.2)
    for step, part in ((0, 0.0), (4, 0.0), (5, 0.25), (8, 1.0), (20, 1.0)):
        (loss,), _ = run(backbone, objective, SAMPLES, step=step)
        m = loss.means
        expected = m["lm_loss"] + part * (0.5 * m["jepa_loss"] + 0.2 * m["kl_future"])
        torch.testing.assert_close(loss.total.detach(), expected)
        assert loss.gauges["jepa_weight"] == 0.5 * part


def test_the_decoders_share_in_the_gradient_falls():
    """Every gradient is linear in the share, the dynamics' constant; the loss is the same all the time."""
    backbone = model()
    schedule = dict(jepa_start=2, jepa_ramp=2, jepa_weight=0.5, kl_weight=0.2)
    objective = make(backbone, **schedule, jepa_decay=4)
    for step, share in ((0, 1.0), (3, 1.0), (4, 1.0), (5, 0.75), (7, 0.25), (8, 0.0), (99, 0.0)):
        (trained,), one = run(backbone, make(backbone, **schedule), SAMPLES, step=step)
        (control,), zero = run(backbone, make(backbone, **schedule, detach=True), SAMPLES, step=step)
        (loss,), found = run(backbone, objective, SAMPLES, step=step)
        assert loss.gauges.pop("decoder_share") == share == objective.decoder_share(step)
        assert loss.gauges == trained.gauges and torch.equal(loss.total, trained.total)
        for key, grad in found.items():
            between = share * one[key] + (1 - share) * zero[key]
            torch.testing.assert_close(grad, between, atol=1e-6, rtol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
        same = {0.0: zero, 1.0: one}.get(share)
        assert same is None or all(torch.equal(found[key], same[key]) for key in found)
        decoders = [key for key in found if key.startswith("decoder")]
        assert any(not torch.allclose(one[key], zero[key], atol=1e-4) for key in decoders) is (step > 2)
        torch.testing.assert_close(control.total, trained.total)


def test_a_share_that_falls_is_refused_in_the_control():
    with pytest.raises(ValueError, match="jepa_decay: has no effect with detach"):
        NextLatentOptions(detach=True, jepa_decay=3)


def test_views_are_the_text_and_every_place_that_something_precedes():
    objective = make(model(), rollout=3)
    assert objective.view_tokens(np.array([2, 9])).tolist() == [1, 8]
    views = objective.view_transform()(SAMPLES[1], SampleRNG(0, 0, 0, 0))
    (segment,) = views.segments
    tokens, labels = SAMPLES[1].lm_sequence()
    assert list(segment.tokens) == list(tokens[:-1]) and list(segment.labels) == list(labels[:-1])
    for ahead in (1, 2, 3):
        assert list(segment.positions[f"target_{ahead}"]) == list(range(ahead, 14))
        # the prompt is predicted as states, and not as tokens
        assert list(segment.positions[f"kl_{ahead}"]) == list(range(5, 14))
    assert views.counts == {
        f"{name}_{n}": 14 - n if name == "target" else 9 for n in (1, 2, 3) for name in ("target", "kl")
    }


def test_diagnostics_are_the_terms_of_the_loss():
    backbone = model()
    objective = make(backbone, rollout=3)
    (loss,), _ = run(backbone, objective, SAMPLES)
    (batch,) = micro_batches(objective, SAMPLES[0], SAMPLES)
    with torch.no_grad():
        diagnostics = objective.diagnostics(lambda task, batch: getattr(objective, task)(backbone, batch))
        found = diagnostics.measure([batch])
    assert found["jepa_loss"] == pytest.approx(float(loss.means["jepa_loss"]), rel=1e-5)
    assert found["kl_future"] == pytest.approx(float(loss.means["kl_future"]), rel=1e-5)
    assert found["kl_future"] == pytest.approx(np.mean([found[f"kl_future_h{n}"] for n in (1, 2, 3)]), rel=1e-6)
    last = torch.stack([alone(backbone, x.tokens[:-1].tolist())[-1] for x in SAMPLES]).detach()
    torch.testing.assert_close(diagnostics.representations["state"], last, atol=1e-5, rtol=1e-5)
    assert make(backbone, eval_samples=0).diagnostics(None) is None
