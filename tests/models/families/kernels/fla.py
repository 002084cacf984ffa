"""A stand-in for flash-linear-attention: the gated delta rule, one token after the other (Yang et al., arXiv 2412.06464, equation 10)."""

import torch
from segments import of_each


def chunk_gated_delta_rule(
    q, k, v, g, beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False, cu_seqlens=None
):
    """Queries and keys (B, T, h, d), values (B, T, H, d), log decays and rates (B, T, H) → values, and no state."""
    assert initial_state is None and not output_final_state and use_qk_l2norm_in_kernel
    sizes = None
    if cu_seqlens is not None:
        assert cu_seqlens.dtype == torch.int32 and len(q) == 1
        sizes = cu_seqlens.diff().tolist()
    groups = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(groups, dim=2) for x in (q, k))
    q, k = (x * (x.square().sum(dim=-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    return torch.stack([of_each(_recurrence, sizes, *row) for row in zip(q, k, v, g, beta, strict=True)]), None


def _recurrence(q, k, v, g, beta):
    state = v.new_zeros(v.shape[1], k.shape[2], v.shape[2])
    out = []
    for q_t, k_t, v_t, g_t, beta_t in zip(q, k, v, g, beta, strict=True):
        state = state * g_t.exp()[:, None, None]
        error = v_t - torch.einsum("hk,hkv->hv", k_t, state)
        state = state + torch.einsum("hk,hv->hkv", k_t, beta_t[:, None] * error)
        out.append(torch.einsum("hk,hkv->hv", q_t * q.shape[2] ** -0.5, state))
    return torch.stack(out)


def fused_recurrent_gated_delta_rule(*args, **kwargs):
    raise NotImplementedError
