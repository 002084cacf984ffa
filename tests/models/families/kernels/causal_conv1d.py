"""A stand-in for the package of this name: a short causal convolution, in plain operations."""

import torch
import torch.nn.functional as F
from segments import of_each, sizes_of


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None):
    """Convolve x (B, d, T) with weight (d, k)."""
    assert activation in (None, "silu")

    def convolve(rows):  # (n, d)
        out = F.conv1d(F.pad(rows.T[None], (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=len(weight))[0].T
        return out if activation is None else F.silu(out)

    return torch.stack([of_each(convolve, sizes_of(seq_idx), row.T).T for row in x])


def causal_conv1d_update(*args, **kwargs):
    raise NotImplementedError
