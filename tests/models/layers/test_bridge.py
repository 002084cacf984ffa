"""The gated bridge."""

import pytest
import torch

from jepa_scale.models.layers.bridge import Bridge


def test_it_is_the_formula():
    """σ(g)·B(z), B = RMSNorm → Linear → GELU → Linear, with every parameter away from its initial value."""
    torch.manual_seed(0)
    bridge, z = Bridge(latent=6, hidden=10, inner=7), torch.randn(4, 6)
    with torch.no_grad():
        for p in bridge.parameters():
            p += 0.5 * torch.randn_like(p)
    p = {name: value.detach().double() for name, value in bridge.named_parameters()}
    x = z.double() / z.double().square().mean(dim=-1, keepdim=True).sqrt() * p["norm.weight"]
    x = x @ p["up.weight"].T + p["up.bias"]
    x = x * (1 + torch.erf(x / 2**0.5)) / 2
    expected = (x @ p["down.weight"].T + p["down.bias"]) / (1 + torch.exp(-p["gate"]))
    torch.testing.assert_close(bridge(z), expected.float(), atol=1e-6, rtol=1e-5)


def test_gate_scales_the_bridge():
    torch.manual_seed(0)
    bridge = Bridge(latent=6, hidden=10, gate_init=-2.0)
    z = torch.randn(4, 6)
    shut = bridge(z)
    with torch.no_grad():
        bridge.gate.fill_(2.0)
    ratio = torch.sigmoid(torch.tensor(2.0)) / torch.sigmoid(torch.tensor(-2.0))
    torch.testing.assert_close(bridge(z), shut * ratio)


def test_it_tells_how_far_it_was_open():
    bridge = Bridge(latent=6, hidden=10)
    assert bridge.opening is None
    bridge(torch.randn(4, 6))
    assert bridge.opening.shape == () and not bridge.opening.requires_grad
    assert bridge.opening.item() == pytest.approx(0.1192029, abs=1e-6)  # σ(−2)


def test_scale_of_the_latent_does_not_matter():
    torch.manual_seed(0)
    bridge, z = Bridge(latent=64, hidden=10), torch.randn(4, 64)
    torch.testing.assert_close(bridge(z), bridge(100 * z), atol=1e-4, rtol=1e-3)


def test_dropout_is_inside_and_in_training_only():
    torch.manual_seed(0)
    bridge, z = Bridge(latent=6, hidden=10, dropout=0.5), torch.randn(4, 6)
    assert not torch.equal(bridge(z), bridge(z))
    bridge.eval()
    assert torch.equal(bridge(z), bridge(z))
