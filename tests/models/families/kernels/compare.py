"""Run decoders that read neighbouring tokens packed, with the kernels of this folder, and in padded rows. Prints JSON.

PYTHONPATH=tests/models/families/kernels:. python tests/models/families/kernels/compare.py qwen3_next lfm2
"""

import json
import sys

import torch

from jepa_scale.models.families.probe import probe
from jepa_scale.packing import pack
from jepa_scale.utils.errors import InputError
from tests.models.test_backbone_prefix import samples
from tests.models.test_token_rows import make, stream


def largest(found, expected):
    """The largest difference, divided by the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def compare(name):
    packed = make(name, "packed")
    try:
        probe(packed, torch.device("cpu"), torch.float32)
    except InputError as error:
        return {"refused": str(error)}
    padded = make(name)
    found = {}
    for mode in (False, True):
        losses = []
        for backbone in (packed, padded):
            backbone.train(mode)
            backbone.zero_grad()
            tokens = stream()
            loss = backbone.label_losses(backbone.hidden(tokens), tokens.labels).sum()
            loss.backward()
            losses.append(loss)
        grads = [dict(b.named_parameters()) for b in (packed, padded)]
        differences = [largest(p.grad, grads[1][n].grad) for n, p in grads[0].items() if p.grad is not None]
        found[f"training={mode}"] = {"loss": largest(*losses), "gradients": max(differences)}
    branched = pack(samples(True, False)).sequences["main"]
    with torch.no_grad():
        (a, taps), (b, wanted) = (backbone.hidden_and_taps(branched, [1, 2]) for backbone in (packed, padded))
    found["branches"] = max(largest(x, y) for x, y in zip([a, *taps], [b, *wanted], strict=True))
    return found


if __name__ == "__main__":
    print(json.dumps({name: compare(name) for name in sys.argv[1:]}))
