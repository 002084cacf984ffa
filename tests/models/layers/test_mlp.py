"""The MLP of projectors and predictors."""

import torch
import torch.nn.functional as F

from jepa_scale.models.layers.mlp import Mlp


def test_it_is_linear_gelu_linear_of_the_inner_width():
    torch.manual_seed(0)
    mlp, x = Mlp(6, 4, multiple=3), torch.randn(2, 5, 6)
    assert mlp.up.weight.shape == (12, 6) and mlp.down.weight.shape == (4, 12)
    inner = x @ mlp.up.weight.T + mlp.up.bias
    inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2  # GELU (Hendrycks & Gimpel, arXiv 1606.08415)
    torch.testing.assert_close(mlp(x), F.linear(inner, mlp.down.weight, mlp.down.bias))


def test_dropout_is_on_the_inner_units_and_in_training_only():
    torch.manual_seed(0)
    mlp, x = Mlp(6, 4, dropout=0.5), torch.randn(3, 6)
    assert not torch.equal(mlp(x), mlp(x))
    mlp.eval()
    assert torch.equal(mlp(x), mlp(x))
    whole = mlp(x)
    mlp.train()
    with torch.no_grad():
        many = torch.stack([mlp(x) for _ in range(2000)])
    torch.testing.assert_close(many.mean(0), whole, atol=0.05, rtol=0)  # unbiased: nothing nonlinear comes after it
    assert many.all()  # no output itself is dropped
