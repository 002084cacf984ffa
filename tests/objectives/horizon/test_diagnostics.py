"""What an evaluation of `horizon` says, against a plain reference pair by pair."""

import math

import pytest
import torch
import torch.nn.functional as F

from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.packing import pack
from tests.objectives.horizon.reference import (
    HORIZONS,
    conversation,
    documents,
    doubled,
    every_pair,
    future_terms,
    jepa_loss,
    make,
    model,
)

SAMPLES = [*documents(24, 7, 2, 15, 21), conversation(20, (4, 7), (11, 19)), *documents(12, 18, 24)]


def diagnostics_of(backbone, objective):
    def call(task, batch):
        with torch.no_grad():
            return getattr(objective, task)(backbone, batch)

    return objective.diagnostics(call)


def batches_of(diagnostics, samples, sizes):
    """The samples as micro-batches, as an evaluation makes them: step and epoch 0."""
    views, first = diagnostics.views, 0
    for size in sizes:
        part = range(first, min(first + size, len(samples)))
        yield pack(
            [views(samples[i], SampleRNG(0, 0, 0, i)) for i in part], like=views(samples[0], SampleRNG(0, 0, 0, 0))
        )
        first += size


def measure(backbone, objective, samples=SAMPLES, sizes=(4, 3, 9, 2)):
    diagnostics = diagnostics_of(backbone, objective)
    return diagnostics.measure(batches_of(diagnostics, samples, sizes))


def scaled(rows):
    return (rows - rows.mean(0)) / (rows.std(0, correction=0) + 1e-5)


def found_by(query, pairs, number):
    """Is its own target the nearest of the distinct targets of its horizon, the lead over the best other, and how many."""
    positions, candidates = {}, {}
    for j, place in enumerate(pairs.place):
        if pairs.horizon[j] == pairs.horizon[number] and place not in positions:
            positions[place] = j
            candidates[place] = F.cosine_similarity(query, scaled(pairs.target)[j], dim=0).item()
    own = candidates.pop(pairs.place[number])
    best = max(candidates.values(), default=-math.inf)
    return own > best, own - best, len(candidates) + 1


def expected_of(backbone, objective, samples=SAMPLES):
    wide, in_fp64 = doubled(backbone, objective)
    with torch.no_grad():
        pairs = every_pair(wide, in_fp64, samples)
        jepa, terms = jepa_loss(in_fp64, pairs)
        if in_fp64.latent_to_hidden is not None:
            terms |= future_terms(in_fp64, pairs)
    metrics = {"jepa_loss": jepa.item(), **{name: x.item() for name, x in terms.items()}}
    n = len(pairs.place)
    metrics["std_gap"] = (pairs.target.std(0, correction=0) - pairs.predicted.std(0, correction=0)).mean().item()
    for name, rows in (("effective_rank", pairs.target), ("effective_rank_prediction", pairs.predicted)):
        share = torch.linalg.svdvals(rows - rows.mean(0))
        share = share / share.sum()
        metrics[name] = math.exp(-(share * share.log()).sum().item())
    found = [found_by(scaled(pairs.predicted)[i], pairs, i) for i in range(n)]
    stay = [found_by(scaled(pairs.anchor)[i], pairs, i)[0] for i in range(n)]
    metrics["retrieval_top1"] = sum(hit for hit, _, _ in found) / n
    metrics["retrieval_top1_anchor"] = sum(stay) / n
    metrics["retrieval_chance"] = sum(1 / many for _, _, many in found) / n
    metrics["retrieval_margin"] = sum(lead for _, lead, _ in found) / n
    for i, horizon in enumerate(HORIZONS):
        mine = [found[j] for j in range(n) if pairs.horizon[j] == i]
        metrics[f"retrieval_top1_h{horizon}"] = sum(hit for hit, _, _ in mine) / len(mine)
        metrics[f"retrieval_margin_h{horizon}"] = sum(lead for _, lead, _ in mine) / len(mine)
    return metrics


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("native", dict(loss="barlow", off_diag_scale=0.3)),
        ("bridge", dict(loss="vicreg", teacher="backbone", kl_temperature=1.0)),
        ("gpt2", dict(loss="cosine", kl_weight=0.0)),
        ("tied", dict(loss="smooth_l1", teacher="backbone")),
    ],
)
def test_metrics_equal_the_plain_reference_and_stay_so(name, options):
    backbone = model(name)
    objective = make(backbone, latent_dim=16, **options)
    with torch.no_grad():  # a teacher far from its student finds too little for retrieval to be tested
        objective.predictor.down.weight *= 3
    found, expected = measure(backbone, objective), expected_of(backbone, objective)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert measure(backbone, objective) == found
    assert measure(backbone, objective, sizes=(9,)) == pytest.approx(found, rel=1e-4, abs=1e-6)
    assert ("kl_future" in found) is (name != "gpt2")


def test_a_prediction_that_is_its_target_is_always_found():
    """The prediction put in the target's place: retrieval is perfect, the margin what the targets differ by."""
    backbone = model()
    objective = make(backbone, loss="cosine", latent_dim=16)
    diagnostics = diagnostics_of(backbone, objective)
    ask = diagnostics.call

    def oracle(task, batch):
        found = ask(task, batch)
        return {**found, "prediction": found["target"]}

    diagnostics.call = oracle
    found = diagnostics.measure(batches_of(diagnostics, SAMPLES, (9,)))
    assert found["retrieval_top1"] == 1.0 and found["retrieval_margin"] > 0
    assert found["jepa_loss"] == pytest.approx(0, abs=1e-6) and found["std_gap"] == 0
    assert found["effective_rank"] == found["effective_rank_prediction"]
    assert 0 < found["retrieval_chance"] < 0.5 and found["retrieval_top1_anchor"] < 1


def test_collapsed_latents_are_seen():
    backbone = model()
    objective = make(backbone, loss="smooth_l1")
    with torch.no_grad():
        for part in (objective.predictor, objective.teacher.copies["objective.encoder"][1]):
            part.down.weight.zero_()
            part.down.bias.copy_(torch.eye(6)[0])  # of which every cosine is exactly 1
    found = measure(backbone, objective)
    assert found["jepa_loss"] == 0 and found["retrieval_top1"] == 0 and found["retrieval_margin"] == 0
    assert found["effective_rank"] == found["effective_rank_prediction"] == 0


@pytest.mark.parametrize("samples", [[], documents(2, 3)], ids=["empty split", "no pairs"])
@pytest.mark.parametrize("loss", ["barlow", "cosine"])
def test_a_split_without_pairs_has_nothing_to_say(samples, loss):
    backbone = model()
    objective = make(backbone, loss=loss)
    assert measure(backbone, objective, samples, sizes=(2,) if samples else ()) == {}


def test_a_split_without_labels_has_no_kl_and_the_rest():
    backbone = model()
    found = measure(backbone, make(backbone), [conversation(20), conversation(24)])
    assert found["ce_future"] == found["kl_future"] == 0 and found["retrieval_chance"] > 0


def test_as_many_samples_as_the_pairs_need():
    backbone = model()
    call = lambda task, batch: None  # noqa: E731
    assert make(backbone, eval_pairs=13).diagnostics(call).samples == 3  # of 6 pairs each
    assert make(backbone, eval_pairs=12).diagnostics(call).samples == 2
    assert make(backbone, eval_pairs=0).diagnostics(call) is None
