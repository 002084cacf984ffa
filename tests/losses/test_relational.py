import math

import pytest
import torch

from jepa_scale.losses.relational import relation_distances, relation_matrices, relation_mismatch, relation_scale


def test_distances_against_their_definitions():
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    torch.testing.assert_close(
        relation_distances(a, b, False), torch.stack([((x - y) ** 2).sum() for x, y in zip(a, b, strict=True)])
    )
    expected = 1 - torch.nn.functional.cosine_similarity(a, b)
    torch.testing.assert_close(relation_distances(a, b, True), expected)
    assert relation_distances(a[:0], b[:0], True).shape == (0,)


@pytest.mark.parametrize(("width", "scale"), [(16, 1.0), (64, 1.0), (512, 30.0)])
def test_normalised_relations_start_near_infonce_whatever_the_width(width, scale):
    """The raw distance of unrelated objects is 2 · width · scale², far above InfoNCE, which is ln(candidates)."""
    torch.manual_seed(0)
    a, b = scale * torch.randn(2000, width), scale * torch.randn(2000, width)
    candidates = torch.tensor(8193)
    normalised = relation_distances(a, b, True).mean() * relation_scale(candidates)
    assert float(normalised) == pytest.approx(math.log(8193), rel=0.05)
    assert float(relation_distances(a, b, False).mean()) == pytest.approx(2 * width * scale**2, rel=0.05)


def test_it_is_computed_in_fp32():
    a = torch.randn(3, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert relation_distances(a, a, True).dtype == torch.float32
    assert relation_scale(torch.tensor(0)) == 0


def test_matrices_are_symmetric_and_empty_where_there_is_no_pair():
    got = relation_matrices(
        torch.tensor([2.0, 5.0]), torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([2, 2]), 2, 3
    )
    expected = torch.zeros(2, 3, 3)
    expected[0, 0, 2] = expected[0, 2, 0] = 2
    expected[1, 1, 2] = expected[1, 2, 1] = 5
    assert torch.equal(got, expected)


def test_mismatch_in_closed_form():
    """Two objects, at squared distances of 1 and 3 in the context's grids and of 4 in the target: the mean is 2."""
    pair = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    context, target = torch.stack([pair, 3 * pair])[None], 4 * pair[None]
    across, within = relation_mismatch(context, target, torch.tensor([[True, True]]))
    assert across.tolist() == [(2 * (2 - 4) ** 2) / 4] and within.tolist() == [(2 * 1 + 2 * 1) / 4 / 2]
    across, within = relation_mismatch(context, target, torch.tensor([[False, True]]))  # one grid: its own mean
    assert across.tolist() == [(2 * (3 - 4) ** 2) / 4] and within.tolist() == [0]
