"""The operators of a relation: what each one guarantees."""

import pytest
import torch

from jepa_scale.objectives.concept.predictors import PREDICTORS, LinearPredictor, RotationPredictor


def test_rotation_keeps_norms_and_its_inverse_is_the_negative_angle():
    torch.manual_seed(0)
    rotate = RotationPredictor(dim=8, hidden=6, relations=3)
    concepts, relation, index = torch.randn(5, 8), torch.randn(5, 6), torch.zeros(5, dtype=torch.int64)
    turned = rotate(concepts, relation, index)
    torch.testing.assert_close(turned.norm(dim=-1), concepts.norm(dim=-1))
    torch.testing.assert_close(rotate(turned, -relation, index), concepts)  # angles are linear in the embedding
    assert not torch.allclose(turned, concepts, atol=1e-2)


def test_rotation_needs_an_even_width():
    with pytest.raises(ValueError, match="even"):
        RotationPredictor(dim=7, hidden=4, relations=1)


def test_linear_uses_the_matrix_of_its_relation():
    torch.manual_seed(0)
    linear = LinearPredictor(dim=4, hidden=6, relations=3)
    concepts, index = torch.randn(5, 4), torch.tensor([0, 2, 1, 2, 0])
    got = linear(concepts, torch.randn(5, 6), index)
    expected = torch.stack([c @ linear.matrices[i] for c, i in zip(concepts, index, strict=True)])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", PREDICTORS)
def test_every_predictor_maps_concepts_to_concepts_and_trains(name):
    torch.manual_seed(0)
    predictor = PREDICTORS[name](8, 6, 3)
    relation = torch.randn(5, 6, requires_grad=True)
    out = predictor(torch.randn(5, 8), relation, torch.tensor([0, 1, 2, 0, 1]))
    assert out.shape == (5, 8) and out.dtype == torch.float32
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in predictor.parameters())
