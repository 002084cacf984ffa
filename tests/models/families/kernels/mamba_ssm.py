"""A stand-in for mamba-ssm: the state-space recurrence of Mamba-2 (Dao & Gu, arXiv 2405.21060), one token after the other."""

import torch
import torch.nn.functional as F
from causal_conv1d import causal_conv1d_fn
from segments import of_each, sizes_of


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, dt_softplus=False,
    dt_limit=(0.0, float("inf")), return_final_states=False,
):  # fmt: skip
    """Inputs (B, T, h, p), steps (B, T, h), A and D (h,), B and C (B, T, g, n) → (B, T, h, p)."""
    assert z is None and initial_states is None and dt_softplus and not return_final_states
    dt = F.softplus(dt + dt_bias).clamp(*dt_limit)
    B, C = (m.repeat_interleave(x.shape[2] // m.shape[2], dim=2) for m in (B, C))

    def scan(x, dt, B, C):
        state, out = x.new_zeros(*x.shape[1:], B.shape[2]), []
        for x_t, dt_t, B_t, C_t in zip(x, dt, B, C, strict=True):
            state = state * (dt_t * A).exp()[:, None, None] + (dt_t[:, None] * x_t)[..., None] * B_t[:, None]
            out.append(torch.einsum("hpn,hn->hp", state, C_t) + D[:, None] * x_t)
        return torch.stack(out)

    return torch.stack([of_each(scan, sizes_of(seq_idx), *row) for row in zip(x, dt, B, C, strict=True)])


def mamba_split_conv1d_scan_combined(
    zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, seq_idx=None, dt_limit=(0.0, float("inf")),
    return_final_states=False, activation="silu", rmsnorm_weight=None, rmsnorm_eps=1e-6, outproj_weight=None,
    outproj_bias=None, headdim=None, ngroups=1, norm_before_gate=True,
):  # fmt: skip
    """The whole mixer after its first projection, as it runs in training."""
    assert not norm_before_gate and not return_final_states
    heads = len(D)
    inner = heads * headdim
    z, mixed, dt = zxbcdt.split([inner, len(conv1d_weight), heads], dim=-1)
    mixed = causal_conv1d_fn(mixed.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation).transpose(1, 2)
    states = (mixed.shape[-1] - inner) // 2
    x, B, C = mixed.split([inner, states, states], dim=-1)
    x, B, C = x.unflatten(-1, (heads, headdim)), B.unflatten(-1, (ngroups, -1)), C.unflatten(-1, (ngroups, -1))
    y = mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D, dt_bias=dt_bias, seq_idx=seq_idx, dt_softplus=True, dt_limit=dt_limit
    )
    y = y.flatten(2) * F.silu(z)
    if rmsnorm_weight is not None:
        y = (
            F.rms_norm(y.unflatten(-1, (ngroups, -1)), (inner // ngroups,), eps=rmsnorm_eps).flatten(-2)
            * rmsnorm_weight
        )
    return F.linear(y, outproj_weight, outproj_bias)


def selective_state_update(*args, **kwargs):
    raise NotImplementedError
