"""`horizon` against a plain reference: fp64, one sequence at a time, no packing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from jepa_scale.config.schema import OptimConfig
from jepa_scale.objectives.base import JepaModel
from jepa_scale.objectives.horizon.config import HorizonOptions
from jepa_scale.objectives.horizon.objective import Horizon, target_rows
from jepa_scale.objectives.lm import LanguageModeling
from jepa_scale.objectives.lm_options import LmOptions
from jepa_scale.objectives.ramp import ramp
from jepa_scale.optim import parameter_groups
from jepa_scale.utils.errors import InputError
from tests.objectives.horizon.reference import (
    LONGEST,
    Sizes,
    conversation,
    documents,
    doubled,
    every_pair,
    gradients,
    make,
    micro_batches,
    model,
    reference,
)

SAMPLES = [*documents(24, 7, 2, 15), conversation(20, (4, 7), (11, 19)), *documents(12)]
NITP = dict(target_layer=1, tap_layer=-1, horizons=[1], horizon_probs=[1.0], pairs_per_sequence=0, kl_weight=0.0)
NITP |= dict(latent_dim=None, predictor_multiple=4, loss="cosine")
VARIANTS = {
    "barlow": ("native", dict(loss="barlow", align_scale=0.7, off_diag_scale=0.3)),
    "barlow, teacher of the backbone": ("native", dict(loss="barlow", off_diag_scale=0.3, teacher="backbone")),
    "vicreg": ("native", dict(loss="vicreg", invariance_weight=2.0, variance_weight=3.0, covariance_weight=0.5)),
    "vicreg, gpt2": ("gpt2", dict(loss="vicreg", teacher="backbone", kl_freeze_head=False)),
    "cosine": ("tied", dict(loss="cosine", latent_to_hidden="mlp", kl_temperature=1.0)),
    "smooth_l1": ("tied", dict(loss="smooth_l1", teacher="backbone", kl_freeze_head=False)),
    "barrier": ("bridge", dict(loss="cosine", teacher="backbone", kl_freeze_head=False, kl_temperature=3.0)),
    "KL for itself": ("native", dict(loss="vicreg", kl_barrier=True, kl_freeze_head=True)),
    "identity": ("bridge", dict(loss="barlow", latent_to_hidden="identity", latent_dim=16, tap_norm=False)),
    "no KL": ("gpt2", dict(loss="smooth_l1", kl_weight=0.0, latent_dim=None)),
    "NITP": ("native", NITP),
    "NITP, gpt2": ("gpt2", {**NITP, "loss": "smooth_l1", "horizons": [3], "pairs_per_sequence": 6, "tap_layer": 2}),
    "the control": ("tied", dict(loss="vicreg", detach=True, kl_freeze_head=False, teacher="backbone")),
    "the control of NITP": ("gpt2", {**NITP, "detach": True}),
    "tap at the end": ("native", dict(loss="cosine", tap_layer=-1, teacher="backbone", dropout=0.0)),
}


def run(backbone, objective, *parts, step=0):
    """Losses of a step's micro-batches, their sum's gradient in the parameters."""
    batches = micro_batches(objective, *parts, step=step)
    gathered = []
    if objective.needs_global_batch and len(batches) > 1:
        with torch.no_grad():
            gathered = [objective.gather(backbone, batch) for batch in batches]
    losses = [objective.loss(backbone, batch, gathered, i) for i, batch in enumerate(batches)]
    for loss in losses:
        loss.total.backward()
    return losses


def assert_gradients(found, expected, atol=1e-5, rtol=1e-3):
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        wanted = expected[name]
        if wanted is None:
            assert grad is None or not grad.any(), name
        else:
            torch.testing.assert_close(
                grad, wanted.to(grad.dtype), atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_terms_and_gradient_equal_the_plain_reference(name):
    which, options = VARIANTS[name]
    backbone = model(which)
    objective = make(backbone, **{"lm_weight": 0.6, "jepa_weight": 1.3, "kl_weight": 0.8, **options})
    wide, in_fp64 = doubled(backbone, objective)
    (loss,) = run(backbone, objective, SAMPLES)
    o = objective.options
    expected = reference(wide, in_fp64, SAMPLES, (o.lm_weight, o.jepa_weight, o.kl_weight))
    assert loss.means.keys() == expected.keys()
    for term, value in expected.items():
        torch.testing.assert_close(loss.means[term], value.detach().float(), atol=1e-5, rtol=1e-4, msg=term)
    torch.testing.assert_close(loss.total.detach(), loss.means["loss"])
    expected["loss"].backward()
    found = gradients(backbone, objective)
    assert_gradients(found, gradients(wide, in_fp64))
    assert all(grad is not None for key, grad in found.items() if key.startswith("1."))
    assert loss.gauges.get("ema_momentum") == (None if o.target_layer else 0.5)
    assert ("gate" in loss.gauges) is (which == "bridge") and "lm_weight" not in loss.gauges


@pytest.mark.parametrize("loss", ["barlow", "vicreg", "cosine"])
def test_micro_batches_add_up_to_the_batch_as_a_whole(loss):
    """In values and in gradient, one of them without a pair and one without a sample."""
    backbone = model("bridge")
    objective = make(backbone, loss=loss, teacher="backbone", kl_freeze_head=False, off_diag_scale=0.3)
    (whole,) = run(backbone, objective, SAMPLES)
    together = gradients(backbone, objective)
    parts = run(backbone, objective, SAMPLES[:2], SAMPLES[2:3], SAMPLES[3:], [])
    apart = gradients(backbone, objective)
    for name, value in whole.means.items():
        added = sum(part.means[name] for part in parts)
        torch.testing.assert_close(added, value, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert all(torch.isfinite(part.means[name]) for part in parts)
    torch.testing.assert_close(sum(part.total for part in parts), whole.total, atol=1e-6, rtol=1e-5)
    assert_gradients(apart, together, atol=1e-6)


@pytest.mark.parametrize("samples", [documents(2, 3), []], ids=["short", "empty"])
@pytest.mark.parametrize("loss", ["barlow", "vicreg", "cosine", "smooth_l1"])
def test_without_pairs_the_terms_are_zero_and_every_head_has_a_gradient(loss, samples):
    backbone = model("bridge")
    objective = make(backbone, loss=loss, teacher="backbone")
    (found,) = run(backbone, objective, samples)
    for name, value in found.means.items():
        assert torch.isfinite(value), name
        assert value == 0 or name in ("loss", "lm_loss") and samples, name
    assert torch.isfinite(found.total)
    for name, p in objective.named_parameters():
        assert p.grad is not None and not p.grad.any(), name
    for name, p in backbone.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name


@pytest.mark.parametrize("loss", ["barlow", "cosine"])
def test_a_micro_batch_may_have_pairs_and_nothing_to_predict(loss):
    """A question that is cut off before its answer."""
    backbone = model()
    objective = make(backbone, loss=loss)
    mute, spoken = conversation(20), conversation(18, (3, 15))
    parts = run(backbone, objective, [mute], [spoken])
    apart = gradients(backbone, objective)
    assert parts[0].means["lm_loss"] == parts[0].means["ce_future"] == parts[0].means["kl_future"] == 0
    (whole,) = run(backbone, objective, [mute, spoken])
    torch.testing.assert_close(sum(p.total for p in parts), whole.total)
    assert_gradients(apart, gradients(backbone, objective), atol=1e-6)


# -- the future KL ----------------------------------------------------------------------------------------------------


def test_the_kl_compares_what_is_predicted_from_the_target_place():
    """With a head that reads off the language model's own state there, the student predicts what the teacher does."""
    backbone = model()
    objective = make(backbone, latent_dim=16, latent_to_hidden="identity", kl_temperature=1.5)
    (batch,) = micro_batches(objective, SAMPLES)
    stream = batch.sequences["main"]
    with torch.no_grad():
        hidden = backbone.hidden(stream)
        rows, counts = target_rows(batch)
        logits = backbone.logits(hidden[stream.labelled])[rows]
        target = batch.positions["target"]
        at = objective.future(backbone, hidden[target], logits)
        before = objective.future(backbone, hidden[target - 1], logits)
    assert torch.equal(counts, stream.labels[target] >= 0) and 0 < counts.sum() < len(counts)
    torch.testing.assert_close(at.cross_entropy[counts], at.entropy[counts], atol=1e-5, rtol=0)
    assert (before.cross_entropy[counts] - before.entropy[counts] > 0.01).all()


@pytest.mark.parametrize("name", ["native", "tied"])
def test_a_frozen_head_learns_nothing_from_the_kl(name):
    backbone = model(name)
    head = backbone.decoder.get_output_embeddings()
    for frozen in (True, False):
        objective = make(backbone, kl_freeze_head=frozen, lm_weight=0.0, jepa_weight=0.0)
        run(backbone, objective, SAMPLES)
        own = [p for n, p in head.named_parameters() if name == "native" or n != "weight"]
        assert own and all(bool(p.grad.any()) is not frozen for p in own)
        assert all(p.grad.any() for p in objective.latent_to_hidden.parameters())
        assert backbone.layers[0].mlp.up_proj.weight.grad.any()  # through the predicted latent
        assert not backbone.layers[2].mlp.up_proj.weight.grad.any()  # above the tap; the teacher's side is detached
        backbone.zero_grad()


def test_only_pairs_with_a_label_enter_the_kl():
    backbone = model()
    objective = make(backbone)
    chat = conversation(22, (15, 21))
    wide, in_fp64 = doubled(backbone, objective)
    pairs = every_pair(wide, in_fp64, [chat])
    assert 0 < pairs.counts.sum() < len(pairs.counts)
    (loss,) = run(backbone, objective, [chat])
    expected = reference(wide, in_fp64, [chat], (0.5, 0.1, 0.25))["kl_future"]
    torch.testing.assert_close(loss.means["kl_future"], expected.detach().float(), atol=1e-5, rtol=1e-4)


# -- the control ------------------------------------------------------------------------------------------------------

CONTROLS = {
    "barlow": ("native", dict(loss="barlow", off_diag_scale=0.3, teacher="backbone")),
    "a KL that trains the head": ("tied", dict(loss="cosine", kl_freeze_head=False, latent_to_hidden="mlp")),
    "NITP": ("gpt2", NITP),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_the_control_leaves_the_decoder_to_next_token_prediction(name):
    which, options = CONTROLS[name]
    backbone = model(which)
    parts = SAMPLES[:3], SAMPLES[3:]
    run(backbone, LanguageModeling(LmOptions(), backbone, None), *parts)
    plain = gradients(backbone)
    found = {}
    for detach in (True, False):
        objective = make(backbone, **options, lm_weight=1.0, detach=detach)
        run(backbone, objective, *parts)
        found[detach] = gradients(backbone, objective)
    for key, grad in plain.items():
        torch.testing.assert_close(found[True][key], grad, atol=1e-7, rtol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    assert any(not torch.allclose(found[False][key], grad, atol=1e-4) for key, grad in plain.items())
    heads = [key for key in found[True] if key not in plain]
    for key in heads:  # which learn the same from these states
        assert torch.equal(found[True][key], found[False][key]) and found[True][key].any(), key
    assert len(heads) > 2


def test_a_control_that_leaves_blocks_without_a_loss_is_refused():
    with pytest.raises(ValueError, match="lm_weight: 0 leaves nothing to train the decoder with detach"):
        HorizonOptions(detach=True, lm_weight=0.0)


# -- schedules --------------------------------------------------------------------------------------------------------


def test_the_ramp_is_zero_then_linear_then_one():
    assert [ramp(step, 4) for step in (-3, -1, 0, 1, 2, 3, 4, 5, 99)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [ramp(step, 0) for step in (-1, 0, 1)] == [0, 1, 1]


def test_weights_follow_their_ramps():
    backbone = model()
    ramps = dict(lm_start=10, lm_ramp=20, jepa_start=12, jepa_ramp=3, kl_ramp=8)
    objective = make(backbone, lm_weight=0.6, jepa_weight=0.3, kl_weight=0.4, **ramps)
    wide, in_fp64 = doubled(backbone, objective)
    for step, lm, jepa, kl in (
        (0, 0.0, 0.0, 0.0),
        (2, 0.0, 0.0, 0.1),
        (10, 0.0, 0.0, 0.4),
        (13, 0.09, 0.1, 0.4),
        (15, 0.15, 0.3, 0.4),
        (30, 0.6, 0.3, 0.4),
        (99, 0.6, 0.3, 0.4),
    ):
        assert objective.weights(step) == pytest.approx((lm, jepa, kl))
        (loss,) = run(backbone, objective, SAMPLES, step=step)
        expected = reference(wide, in_fp64, SAMPLES, (lm, jepa, kl))
        torch.testing.assert_close(loss.total, expected["loss"].detach().float(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(loss.means["lm_loss"], expected["lm_loss"].detach().float(), atol=1e-5, rtol=1e-4)
        assert loss.gauges["lm_weight"] == pytest.approx(lm) and loss.gauges["ema_momentum"] == 0.5 + step / 100
        if step == 0:  # nothing of the upper blocks takes part yet, but all have a gradient
            assert all(p.grad is not None and not p.grad.any() for p in backbone.layers[2].parameters())
        gradients(backbone, objective)
    assert make(backbone, lm_start=5).weights(4)[0] == 0.0 and make(backbone, lm_start=5).weights(5)[0] == 0.5


# -- what belongs where -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tap", [1, 2, -1])
@pytest.mark.parametrize("name", ["native", "tied", "bridge", "gpt2"])
def test_every_trainable_parameter_is_in_one_clip_group(name, tap):
    backbone = model(name)
    objective = make(backbone, tap_layer=tap)
    whole = JepaModel(backbone, objective)
    groups = objective.clip_groups(whole)
    names = [n for n, p in whole.named_parameters() if p.requires_grad]
    assert groups.keys() == {"lower", "upper"}
    assert sorted(groups["lower"] + groups["upper"]) == sorted(names) and len(set(names)) == len(names)
    block = "backbone.decoder.transformer.h" if name == "gpt2" else "backbone.decoder.model.layers"
    at = tap % 4
    for n in names:
        if n.startswith(block):
            low = int(n.removeprefix(block + ".").split(".")[0]) < at
        elif ".bridge." in n:
            low = at > 2  # it follows block 2
        else:
            low = n.startswith("objective.") or any(part in n for part in ("embed_tokens", ".wte.", ".wpe."))
        assert (n in groups["lower"]) is low, n
    assert any(n.endswith(("norm.weight", "ln_f.weight")) for n in groups["upper"])
    assert make(backbone, tap_layer=tap, split_clipping=False).clip_groups(whole) == {}


def test_frozen_parameters_are_in_no_clip_group():
    backbone = model()
    objective = make(backbone)
    backbone.layers[0].requires_grad_(False)
    groups = objective.clip_groups(JepaModel(backbone, objective))
    assert not any("layers.0." in name for names in groups.values() for name in names)


@pytest.mark.parametrize("name", ["native", "tied", "gpt2"])
def test_the_lm_head_and_the_objective_learn_at_the_rate_of_heads(name):
    backbone = model(name)
    objective = make(backbone)
    options = OptimConfig(lr=1e-3, lr_head=5e-3)
    groups = parameter_groups(JepaModel(backbone, objective), options, objective.head_prefixes(backbone))
    rate = {n: group["lr"] for group in groups for n in group["names"]}
    embedding = (
        "backbone.decoder.transformer.wte.weight" if name == "gpt2" else "backbone.decoder.model.embed_tokens.weight"
    )
    for n, lr in rate.items():
        head = n.startswith(("objective.", "backbone.decoder.lm_head.")) or (n == embedding and name != "native")
        assert lr == (5e-3 if head else 1e-3), n


@pytest.mark.parametrize("teacher", ["projector", "backbone"])
def test_the_teacher_has_copies_of_what_it_teaches_with(teacher):
    backbone = model("bridge")
    objective = make(backbone, teacher=teacher)
    copies = objective.teacher_copies(backbone)
    assert copies.keys() == {"objective.encoder"} | ({"backbone"} if teacher == "backbone" else set())
    whole = dict(JepaModel(backbone, objective).named_parameters())
    for path, module in copies.items():
        for name, p in module.named_parameters():
            assert torch.equal(p, whole[f"{path}.{name}"]) and p is not whole[f"{path}.{name}"]
    assert objective.teacher_options().final_momentum == 0.9998


def test_a_lower_blocks_states_need_no_teacher():
    backbone = model()
    objective = make(backbone, **{**NITP, "target_layer": 2, "lm_weight": 0.0})
    assert objective.teacher_copies(backbone) == {} and objective.horizon_embedding is None
    del objective.teacher
    run(backbone, objective, SAMPLES)
    assert all(p.grad.any() for p in objective.parameters())
    assert backbone.layers[0].mlp.up_proj.weight.grad.any()  # from the state that predicts
    (loss,) = run(backbone, objective, SAMPLES)
    assert loss.gauges == {} and loss.means["jepa_loss"] > 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(loss="barlow"), "loss: barlow compares statistics"),
        (dict(kl_weight=0.1), "kl_weight: reads the next token"),
        (
            dict(horizons=[1, 2], horizon_probs=[1, 1], pairs_per_sequence=3),
            r"horizons: must be one with target_layer, not \[1, 2\]",
        ),
        (dict(teacher="backbone"), "teacher: has no effect with target_layer"),
        (dict(ema={"momentum": 0.5}), "ema: has no effect with target_layer"),
        (dict(latent_dim=8), "latent_dim: has no effect with target_layer"),
    ],
)
def test_what_means_nothing_with_a_lower_target_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        HorizonOptions(**{**NITP, **keys})


def test_the_lower_block_lies_below_the_tap():
    for wrong in (3, -1):
        with pytest.raises(InputError, match=r"^objective\.target_layer: block 3 must be below block 3"):
            make(model(), **{**NITP, "target_layer": wrong})


def test_views_take_all_tokens_but_the_last():
    assert make(model()).view_tokens(np.array([2, 9])).tolist() == [1, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tap_layer=4), "objective.tap_layer: 4 is outside the decoder's 3 blocks"),
        (dict(tap_layer=0), "objective.tap_layer: 0 is outside"),
        (dict(tap_layer=-4), "objective.tap_layer: -4 is outside"),
        (dict(latent_to_hidden="identity"), "objective.latent_to_hidden: identity needs .* 16, not 6; .*latent_dim=16"),
        (dict(horizons=[2, 5, 23]), "objective.horizons: 23 fits no document.*24 tokens; use at most 22"),
    ],
)
def test_what_does_not_fit_the_decoder_or_the_data_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        make(model(), **options)


def test_identity_needs_no_fitting_width_without_a_kl():
    assert make(model(), latent_to_hidden="identity", kl_weight=0.0).latent_to_hidden is None


def test_defaults_are_the_seeds():
    backbone = model()
    objective = Horizon(HorizonOptions(), backbone, SimpleNamespace(train=Sizes(512)))
    assert objective.tap == 1 and objective.horizon_embedding.weight.shape == (4, 16)
    with pytest.raises(InputError, match="64 fits no document"):
        Horizon(HorizonOptions(), backbone, SimpleNamespace(train=Sizes(LONGEST)))
