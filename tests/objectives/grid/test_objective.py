"""``grid`` against its definition, sample by sample; what must not depend on how a batch is cut; what training writes."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from jepa_scale.config.parsing import parse_section
from jepa_scale.data.examples import GridSequence
from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.objectives.grid.config import GridOptions
from jepa_scale.objectives.grid.objective import Grid
from jepa_scale.utils.errors import InputError
from tests.data.grids.flood_fill import flood_fill
from tests.objectives.grid import reference
from tests.objectives.grid.reference import backbone, make, micro_batches, sequences, step_of

CASES = {
    "objects": dict(relational="gridjepa"),
    "objects, squared distances, mean": dict(
        relational="adjacent_squared", temporal="mean", projector_multiple=2, latent_dim=6
    ),
    "objects, cosines": dict(connectivity=8),
    "trained targets": dict(
        target="trained", relational="gridjepa", pad_context=True, connectivity=8, object_features="gridjepa"
    ),
    "objects without codes, queue, layers": dict(vq_codes=0, queue=0, object_layers=0),
    "decoder": dict(encoder="decoder", relational="gridjepa", context_length=2, projector_multiple=0),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_definition(name):
    model, samples = backbone(), sequences(7)
    objective = make(model, **CASES[name])
    means, gradients = step_of(objective, model, micro_batches(objective, samples, [7]))

    torch.nn.ModuleList([model, objective]).zero_grad()
    terms = reference.plain_terms(objective, model, samples)
    total = reference.weighted(objective, terms)
    total.backward()
    for term, value in terms.items():
        assert means[term] == pytest.approx(value.item(), rel=2e-4, abs=1e-5), term
    assert means["loss"] == means["jepa_loss"] == pytest.approx(float(total), rel=1e-4)
    for parameter, p in torch.nn.ModuleList([model, objective]).named_parameters():
        if p.requires_grad:
            wanted = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(
                gradients[parameter], wanted, rtol=2e-3, atol=2e-5, msg=lambda m, n=parameter: f"{n}: {m}"
            )
    assert any(g.abs().sum() > 0 for n, g in gradients.items() if "objects" in n)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sizes", [[4, 3], [3, 1, 3], [7, 0], [0, 5, 2]])
def test_micro_batches_change_neither_loss_nor_gradient_nor_state(name, sizes):
    model, samples = backbone(), sequences(7)
    options = CASES[name] | dict(colour_weight=0.3, symmetry_weight=0.2)
    whole, cut = make(model, **options), make(model, **options)
    for step in (0, 3):
        ours = step_of(whole, model, micro_batches(whole, samples, [7], step))
        theirs = step_of(cut, model, micro_batches(cut, samples, sizes, step))
        assert ours[0].keys() == theirs[0].keys()
        for term, value in ours[0].items():
            assert theirs[0][term] == pytest.approx(value, rel=1e-4, abs=1e-5), term
        for parameter, gradient in ours[1].items():
            torch.testing.assert_close(theirs[1][parameter], gradient, rtol=1e-3, atol=1e-5)
        for objective in (whole, cut):
            objective.on_optimizer_step(step, torch.tensor(1.0))
        for state, value in whole.state_dict().items():
            torch.testing.assert_close(
                cut.state_dict()[state], value, rtol=1e-4, atol=1e-5, msg=lambda m, s=state: f"{s}: {m}"
            )


def test_the_order_of_the_context_counts_for_attention_and_not_for_the_mean():
    model = backbone()
    samples = [s for s in sequences(8) if len(s.context) == 3]
    backwards = [GridSequence(s.context[::-1], s.target) for s in samples]
    for kind, changes in (("attention", True), ("mean", False)):
        objective = make(model, temporal=kind, vq_codes=0)  # two grids may have the same codes
        states = []
        for some in (samples, backwards):
            (batch,) = micro_batches(objective, some, [len(some)])
            states.append(objective.diagnose(model, batch)["context_state"])
        moved = (states[0] - states[1]).norm(dim=1) / states[0].norm(dim=1)
        assert (moved > 0.01).all() if changes else (moved < 1e-5).all()


def test_an_evaluation_writes_nothing_and_training_writes_only_when_a_step_is_done():
    # `make` has observed the mean of six: this must be another mean, not the same one rounded anew.
    model, samples = backbone(), sequences(5)
    objective = make(model)
    (batch,) = micro_batches(objective, samples, [5])
    before = copy.deepcopy(objective.state_dict())
    objective.eval()
    for _ in range(2):
        objective.diagnose(model, batch)
        objective.loss(model, batch, [], 0)
    objective.train()
    with torch.no_grad():
        objective.gather(model, batch)
    assert (
        not objective.queue._observed
        and not objective.encoder.quantizer._observed
        and not objective.encoder.standardize._noted
    )
    objective.loss(model, batch, [], 0)
    for name, value in objective.state_dict().items():
        assert torch.equal(value, before[name]), name
    objective.on_optimizer_step(3, torch.tensor(torch.nan))  # a step that was skipped
    for name, value in objective.state_dict().items():
        assert torch.equal(value, before[name]), name
    objective.loss(model, batch, [], 0)
    objective.on_optimizer_step(3, torch.tensor(1.0))
    changed = {name for name, value in objective.state_dict().items() if not torch.equal(value, before[name])}
    written = {f"encoder.quantizer.{n}" for n in ("codebook", "average_codebook", "sizes", "last_used", "updates")}
    written |= {
        f"encoder.standardize.{n}" for n in ("mean", "average_mean", "deviation", "average_deviation", "updates")
    }
    assert changed == written | {"queue.rows", "queue.keys"}


def test_the_queue_holds_what_was_there_before_the_step():
    model, samples = backbone(), sequences(6)
    objective = make(model, queue=20)
    (batch,) = micro_batches(objective, samples, [6])
    first = objective.loss(model, batch, [], 0)
    assert first.gauges["negatives"] == 5 + 10 - 1  # five different targets, ten rows in the queue
    objective.on_optimizer_step(3, torch.tensor(1.0))
    keys = objective.queue.keys.tolist()
    assert len(set(keys[:5])) == 5 and set(keys[:5]) == set(batch.values["key"].tolist())
    second = objective.loss(model, batch, [], 0)
    assert second.gauges["negatives"] == 5 + 10 - 1  # the same targets are no negatives of themselves
    (other,) = micro_batches(objective, sequences(12)[6:], [6])
    assert objective.loss(model, other, [], 0).gauges["negatives"] == 6 + 15 - 1


def test_objects_beyond_the_slots_neither_quantise_nor_count():
    """A board of 36 cells of 5 slots: 5 objects are seen, and what stands for empty slots touches nothing."""
    model = backbone()
    objective = make(model, queue=0)
    samples = sequences(6)
    (batch,) = micro_batches(objective, samples, [6])
    every = [len(flood_fill(grid.tolist())) for s in samples for grid in (*s.context, s.target)]
    truncated = sum(n > 5 for n in every)
    assert truncated >= 2 and max(every) == 36
    assert batch.counts["truncated"] == truncated and batch.counts["grids"] == sum(len(s.context) + 1 for s in samples)
    objective.loss(model, batch, [], 0)
    counts, _ = objective.encoder.quantizer._observed[0]
    assert counts.sum() == batch.counts["objects"] == len(batch.rows["inputs"])
    assert batch.values["objects"].max() == 5
    means, _ = step_of(objective, model, [batch])
    assert means["truncated_grids"] == pytest.approx(truncated / batch.counts["grids"])


@pytest.mark.parametrize("encoder", ["objects", "decoder"])
def test_invariances_compare_a_context_with_itself_in_another_guise(encoder):
    model, samples = backbone(), sequences(6)
    objective = make(model, encoder=encoder, colour_weight=0.5, translation_weight=0.25, symmetry_weight=0.125)
    (batch,) = micro_batches(objective, samples, [6])
    means, gradients = step_of(objective, model, [batch])
    projected, _ = objective.queries(objective.contexts(model, batch)[0])
    for variant, kind in enumerate(("colour", "translation", "symmetry"), 1):
        expected = 1 - torch.nn.functional.cosine_similarity(projected[:, 0], projected[:, variant])
        assert (
            means[f"invariance_{kind}"] == pytest.approx(float(expected.mean()), rel=1e-5)
            and float(expected.mean()) > 1e-4
        )
    plain = make(model, encoder=encoder)
    plain.load_state_dict(objective.state_dict())
    plain.teacher = objective.teacher
    theirs, _ = step_of(plain, model, micro_batches(plain, samples, [6]))
    for term in ("info_nce", "sigreg", "relational_cross", "relational_self"):
        assert means[term] == pytest.approx(theirs[term], rel=1e-5)  # variants are in none of these
    weights = [0.5, 0.25, 0.125]
    extra = sum(
        w * means[f"invariance_{k}"] for w, k in zip(weights, ("colour", "translation", "symmetry"), strict=True)
    )
    extra += 0.15 * (means["commitment"] - theirs["commitment"])
    assert means["loss"] == pytest.approx(theirs["loss"] + extra, rel=1e-5)


def test_the_decoder_may_learn_to_say_the_target_as_well():
    model, samples = backbone(), sequences(6)
    objective = make(model, encoder="decoder", lm_weight=0.5)
    assert objective.predicts_tokens and not make(backbone(), encoder="decoder").predicts_tokens
    (batch,) = micro_batches(objective, samples, [6])
    means, gradients = step_of(objective, model, [batch])
    assert batch.counts["labels"] == sum(s.target.shape[0] * (s.target.shape[1] + 1) + 1 for s in samples)
    assert means["loss"] == pytest.approx(means["jepa_loss"] + 0.5 * means["lm_loss"], rel=1e-6)
    assert gradients["0.decoder.lm_head.weight"].abs().sum() > 0


def test_with_objects_the_decoder_is_left_alone():
    model = backbone()
    objective = make(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert objective.teacher_copies(model).keys() == {"objective.encoder"}
    assert make(backbone(), encoder="decoder").teacher_copies(backbone()).keys() == {"objective.encoder", "backbone"}


def test_the_temperature_is_bounded_by_the_engine_and_has_a_gradient_at_its_bounds():
    model, samples = backbone(), sequences(6)
    for start in (0.05, 0.2):
        objective = make(model, temperature=start)
        ((name, (low, high)),) = objective.bounds.items()
        assert name == "objective.temperature.log_temperature"
        assert np.exp([low, high]) == pytest.approx([0.05, 0.2])
        _, gradients = step_of(objective, model, micro_batches(objective, samples, [6]))
        assert gradients["1.temperature.log_temperature"].abs() > 1e-4
        assert float(objective.temperature()) == pytest.approx(start)


def test_diagnostics_of_a_split():
    model, samples = backbone(), sequences(20)
    objective = make(model, queue=50)
    objective.eval()
    with torch.no_grad():
        diagnostics = objective.diagnostics(lambda task, batch: getattr(objective, task)(model, batch))
        one = diagnostics.measure(micro_batches(objective, samples, [20]))
        cut = diagnostics.measure(micro_batches(objective, samples, [7, 7, 6]))
    assert one == pytest.approx(cut, rel=1e-4, abs=1e-6)
    assert one["chance"] == pytest.approx(np.log(19 + 25)) and one["retrieval_chance"] == 1 / 19
    (batch,) = micro_batches(objective, samples, [20])
    loss = objective.loss(model, batch, [], 0)
    assert one["info_nce"] == pytest.approx(float(loss.means["info_nce"]), rel=1e-4)
    assert one["retrieval_top1"] <= float(loss.means["retrieval_top1"]) + 0.3
    assert 0 < one["vq_split_usage"] <= 1 and one["vq_usage"] == 0  # nothing has been trained yet
    assert one["temperature"] == pytest.approx(0.1)
    ranks = {"covariance_entropy_rank_context", "covariance_entropy_rank_target"}
    assert ranks | {"isotropy_context", "isotropy_target"} <= one.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.3}, "objective.temperature: 0.3 is not between"),
        ({"dim": 10, "object_heads": 4}, "objective.object_heads: 4 heads do not divide dim 10"),
        ({"lm_weight": 1.0}, "objective.lm_weight: the decoder sees no grid"),
        ({"dim": 8, "latent_dim": 6}, "objective.latent_dim: 6 is not dim, 8, and without a projector"),
        ({"augment": ["colour", "colour"]}, "objective.augment: names a change twice"),
        ({"augment": ["color"]}, "objective.augment.0"),
        ({"encoder": "decoder", "target": "trained"}, "objective.target: trained works with encoder: objects alone"),
        ({"target": "trained", "ema": {"momentum": 0.5}}, "objective.ema: has no effect without target: ema"),
        ({"encoder": "decoder", "object_features": "gridjepa"}, "objective.object_features: the decoder reads cells"),
        ({"vq_codez": 1}, "objective.vq_codez: unknown key; did you mean 'vq_codes'?"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(InputError) as caught:
        parse_section(GridOptions, options, "objective")
    assert message in str(caught.value)


@pytest.mark.parametrize(("former", "current"), [("normalized", "adjacent_cosine"), ("raw", "adjacent_squared")])
def test_former_names_of_the_relational_terms_are_read_with_a_warning(former, current):
    with pytest.warns(FutureWarning, match=f"relational: {former} has a new name; write {current}"):
        assert parse_section(GridOptions, {"relational": former}, "objective").relational == current


def test_other_data_are_refused():
    with pytest.raises(InputError, match="grid needs sequences of grids"):
        Grid(GridOptions(), backbone(), SimpleNamespace(kind="text"))


def test_lots_are_drawn_where_codes_may_need_a_place_alone():
    objective = make(backbone(), vq_refresh_every=10)
    (sample,) = sequences(6)[4:5]
    drawn = {
        step: objective.view_transform()(sample, SampleRNG(0, 0, step, 4)).rows["priority"]
        for step in (0, 3, 8, 9, 10, 30)
    }
    assert {step for step, priorities in drawn.items() if priorities.any()} == {0, 8, 10, 30}
    assert (drawn[0] == drawn[10]).all()  # of the sample, not of the step
