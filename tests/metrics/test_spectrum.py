import math

import pytest
import torch

from jepa_scale.metrics.representation import effective_rank
from jepa_scale.metrics.spectrum import covariance_rank, isotropy


def rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "d"), [(50, 7), (6, 20)])
def test_the_rank_is_the_entropy_of_the_covariances_spectrum(n, d):
    x = rows(n, d).double() * torch.linspace(0.1, 3, d) + 5
    values = torch.linalg.eigvalsh(torch.cov(x.T)).clamp(min=0)
    share = values / values.sum()
    expected = math.exp(-sum(float(p) * math.log(float(p)) for p in share if p > 1e-12))
    assert float(covariance_rank(x.float())) == pytest.approx(expected, rel=1e-4)
    assert covariance_rank(x) <= effective_rank(x) + 1e-6


def test_known_ranks():
    corners = torch.cat([torch.eye(5), -torch.eye(5)])
    assert float(covariance_rank(corners + 100)) == pytest.approx(5, rel=1e-6)
    assert float(covariance_rank(rows(30, 1) @ rows(1, 9))) == pytest.approx(1, rel=1e-6)
    assert covariance_rank(torch.ones(4, 3)) == 0 and covariance_rank(torch.zeros(0, 3)) == 0
    # 3 : 1 in variance
    two = torch.tensor([[3.0, 0], [-3.0, 0], [0, 1.0], [0, -1.0]]) * torch.tensor([1.0 / math.sqrt(3), 1.0])
    assert float(covariance_rank(two)) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))


def test_isotropy_is_1_for_every_direction_alike_and_small_for_one():
    assert float(isotropy(torch.cat([torch.eye(4), -torch.eye(4)]))) == pytest.approx(1, rel=1e-6)
    assert float(isotropy(7 * torch.ones(5, 4))) == pytest.approx(math.exp(-2), rel=1e-6)
    assert 0.5 < float(isotropy(rows(4000, 8))) <= 1
    assert float(isotropy(rows(4000, 8) + 3)) < 0.3
    assert math.isnan(float(isotropy(torch.zeros(0, 4))))
    assert float(isotropy(rows(50, 6))) == pytest.approx(float(isotropy(9 * rows(50, 6))), rel=1e-5)
