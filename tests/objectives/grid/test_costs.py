"""What ``grid`` says that a step costs, against PyTorch's own counter."""

import pytest

from tests.objectives.grid.reference import backbone, make, micro_batches, sequences
from tests.objectives.test_costs import seen

CASES = {
    "objects": {},
    "mean, no codes, no queue": dict(temporal="mean", vq_codes=0, queue=0, sigreg_weight=0.0),
    "invariances, other heads": dict(
        colour_weight=1.0, symmetry_weight=1.0, projector_multiple=2, predictor_multiple=0, latent_dim=6
    ),
    "trained targets, padded contexts": dict(target="trained", pad_context=True, colour_weight=1.0),
    "no layers": dict(object_layers=0, context_length=2),
    "decoder": dict(encoder="decoder"),
    "decoder, everything": dict(encoder="decoder", lm_weight=1.0, translation_weight=1.0),
}


@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_flops(name, micros):
    model = backbone()
    objective = make(model, **CASES[name])
    batches = micro_batches(objective, sequences(6), [6 // micros] * micros)
    expected = seen(model, objective, batches)
    o = objective.options
    if o.sigreg_weight:  # of a product that is added in place
        expected += micros * 2 * 2 * 6 * o.sigreg_slices * (o.latent_dim or o.dim)
    got = objective.flops(model, square=True)(batches)
    assert got == expected
    assert objective.flops(model)(batches) <= got
