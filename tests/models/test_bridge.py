"""The gated bridge."""

import torch

from jepa_scale.models.bridge import Bridge


def test_gate_scales_the_bridge():
    torch.manual_seed(0)
    bridge = Bridge(latent=6, hidden=10, gate_init=-2.0)
    z = torch.randn(4, 6)
    shut = bridge(z)
    with torch.no_grad():
        bridge.gate.fill_(2.0)
    ratio = torch.sigmoid(torch.tensor(2.0)) / torch.sigmoid(torch.tensor(-2.0))
    torch.testing.assert_close(bridge(z), shut * ratio)


def test_scale_of_the_latent_does_not_matter():
    torch.manual_seed(0)
    bridge, z = Bridge(latent=64, hidden=10), torch.randn(4, 64)
    torch.testing.assert_close(bridge(z), bridge(100 * z), atol=1e-4, rtol=1e-3)
