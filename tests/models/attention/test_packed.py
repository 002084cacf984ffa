"""Every backend against softmax attention with a dense mask, written out here."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jepa_scale.models.attention import packed as module
from jepa_scale.models.attention.packed import BACKENDS, SHORT, _square, attention, available_backends, packed_attention
from jepa_scale.packing import KeyRows, SegmentTable
from jepa_scale.utils.errors import InputError

gpu = pytest.mark.gpu

SORTED = (1, 1, 1, 2, 2, 5, 9, 9)
UNSORTED = (9, 1, 2, 9, 1, 5, 2, 1)


def table(lengths, device="cpu"):
    return SegmentTable.from_lengths(lengths, device)


def reference(q, k, v, lengths_q, lengths_k, causal=True, scale=None, window=None, softcap=None):
    """Attention over the whole stream with one (T_q, T_k) mask, in fp64."""
    q, k, v = q.double(), k.double(), v.double()
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    seen = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    row = column = 0
    for lq, lk in zip(lengths_q, lengths_k, strict=True):
        for i in range(lq):
            for j in range(lk):
                place = i + lk - lq
                near = window is None or place - window < j < place + window
                seen[row + i, column + j] = (j <= place or not causal) and near
        row, column = row + lq, column + lk
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen.to(q.device), float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def check(lengths_q, lengths_k=None, heads=4, kv_heads=4, width=8, value_width=None, dtype=torch.float32, device="cpu",
          backend="sdpa", tolerance=1e-5, **options):  # fmt: skip
    """Output and all three gradients."""
    generator = torch.Generator().manual_seed(0)
    same = lengths_k is None
    lengths_k = lengths_q if same else lengths_k

    def random(tokens, *shape):
        return torch.randn(tokens, *shape, generator=generator).to(device, dtype).requires_grad_()

    q = random(sum(lengths_q), heads, width)
    k = random(sum(lengths_k), kv_heads, width)
    v = random(sum(lengths_k), kv_heads, value_width or width)
    direction = torch.randn(sum(lengths_q), heads, value_width or width, generator=generator).to(device)
    table_k = None if same else table(lengths_k, device)
    out = attention(q, k, v, table(lengths_q, device), table_k, backend=backend, **options)
    expected = reference(q, k, v, lengths_q, lengths_k, **options)
    assert out.dtype == dtype and out.shape == expected.shape
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    grads = torch.autograd.grad((out * direction).sum(), (q, k, v))
    expected_grads = torch.autograd.grad((expected * direction).sum(), (q, k, v))
    for name, got, want in zip("qkv", grads, expected_grads, strict=True):
        torch.testing.assert_close(
            got, want, atol=4 * tolerance, rtol=4 * tolerance, msg=lambda m, n=name: f"d{n}: {m}"
        )


CASES = {
    "causal": dict(lengths_q=SORTED),
    "unsorted": dict(lengths_q=UNSORTED),
    "bidirectional": dict(lengths_q=UNSORTED, causal=False),
    "shared heads": dict(lengths_q=SORTED, kv_heads=2),
    "one key head": dict(lengths_q=UNSORTED, kv_heads=1, causal=False),
    "window": dict(lengths_q=SORTED, window=3),
    "window of one": dict(lengths_q=SORTED, window=1),
    "window that fits": dict(lengths_q=SORTED, window=5, kv_heads=2),
    "window wider than all": dict(lengths_q=SORTED, window=9),
    "bidirectional window": dict(lengths_q=UNSORTED, window=3, causal=False),
    "fewer queries": dict(lengths_q=(1, 1, 2, 3, 1), lengths_k=(1, 4, 5, 5, 9)),
    "fewer queries, window": dict(lengths_q=(1, 1, 2, 3, 4), lengths_k=(1, 4, 5, 5, 9), window=3, kv_heads=2),
    "fewer queries, bidirectional": dict(lengths_q=(1, 2, 3), lengths_k=(4, 5, 5), causal=False),
    "more queries, bidirectional": dict(lengths_q=(4, 5, 5), lengths_k=(1, 2, 3), causal=False),
    "single tokens": dict(lengths_q=(1,) * 7),
    "one segment": dict(lengths_q=(23,)),
    "one token": dict(lengths_q=(1,), kv_heads=2),
    "own scale": dict(lengths_q=SORTED, scale=0.7),
    "capped": dict(lengths_q=UNSORTED, softcap=0.5, kv_heads=2),
    "capped in a window": dict(lengths_q=SORTED, softcap=0.5, window=3),
    "narrow values": dict(lengths_q=SORTED, value_width=4),
    "wide values": dict(lengths_q=SORTED, value_width=16, kv_heads=2),
}


@pytest.mark.parametrize("name", CASES)
def test_sdpa_matches_the_dense_mask(name):
    check(**CASES[name])


@pytest.mark.parametrize("longest", [9, SHORT, SHORT + 1])
@pytest.mark.parametrize("options", [{}, {"kv_heads": 2}, {"window": 3}, {"causal": False}], ids=str)
def test_bf16_on_a_cpu_matches_the_dense_mask(longest, options):
    check((5, longest, 1, 5), **options, dtype=torch.bfloat16, tolerance=2e-2)


def test_short_segments_in_bf16_keep_no_fp32():
    saved = []
    x = [torch.randn(12, 2, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t):
        out = attention(*x, table([5, 7]))
    assert out.dtype == torch.bfloat16 and set(saved) == {torch.bfloat16}


@gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_cuda_backends_match_the_dense_mask(backend, name):
    if backend not in available_backends("cuda", torch.bfloat16):
        pytest.skip(f"{backend} is not installed")
    if backend == "torch" and "softcap" in CASES[name]:
        pytest.skip("it has no cap")
    case = {"width": 16, **CASES[name]}
    check(**case, backend=backend, device="cuda", dtype=torch.bfloat16, tolerance=2e-2)


@gpu
@pytest.mark.parametrize("name", CASES)
def test_fp32_on_cuda_matches_the_dense_mask(name):
    check(**CASES[name], backend=None, device="cuda")


@settings(max_examples=40)
@given(
    pairs=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4)), min_size=1, max_size=8),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 7),
    kv_heads=st.sampled_from([1, 2, 4]),
)
def test_any_layout_matches_the_dense_mask(pairs, causal, window, kv_heads):
    lengths_q = tuple(lq for lq, _ in pairs)
    lengths_k = tuple(lq + more for lq, more in pairs)
    check(lengths_q, lengths_k, causal=causal, window=window, kv_heads=kv_heads)


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(1, 7), min_size=2, max_size=6), data=st.data(), causal=st.booleans())
def test_segments_do_not_see_each_other(lengths, data, causal):
    """Changing one segment leaves every bit of the others' output alone."""
    changed = data.draw(st.integers(0, len(lengths) - 1))
    q, k, v = torch.randn(3, sum(lengths), 2, 8).unbind()
    start = sum(lengths[:changed])
    inside = slice(start, start + lengths[changed])
    before = attention(q, k, v, table(lengths), causal=causal)
    for x in (q, k, v):
        x[inside] += torch.randn_like(x[inside])
    after = attention(q, k, v, table(lengths), causal=causal)
    outside = torch.ones(sum(lengths), dtype=torch.bool)
    outside[inside] = False
    assert torch.equal(before[outside], after[outside])
    assert not torch.equal(before[inside], after[inside])


class Largest(TorchDispatchMode):
    """Remembers the most elements that any tensor of any operation had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [
            x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if isinstance(x, torch.Tensor)
        ]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("window", [None, 3])
def test_nothing_as_large_as_the_stream_squared_is_made(window):
    lengths = (2,) * 900 + (5,) * 60 + (17,) * 5
    q, k, v = (torch.randn(sum(lengths), 2, 8, requires_grad=True) for _ in range(3))
    with Largest() as largest:
        attention(q, k, v, table(lengths), window=window).sum().backward()
    assert q.numel() <= largest.elements <= 2 * q.numel()


def test_gradients_reach_queries_and_keys_of_single_tokens():
    """They are zero but for rounding, which some processors have, and not missing: a rank that has only the filler token
    must still send gradients."""
    q, k, v = (torch.randn(1, 2, 8, requires_grad=True) for _ in range(3))
    attention(q, k, v, table([1])).sum().backward()
    assert q.grad.abs().max() < 1e-6 and k.grad.abs().max() < 1e-6 and v.grad.abs().min() > 0


def test_a_mask_made_in_inference_mode_serves_training():
    q, k, v = (torch.randn(13, 2, 8, requires_grad=True) for _ in range(3))
    _square.cache_clear()
    with torch.inference_mode():
        attention(q, k, v, table([13]), window=4)
    attention(q, k, v, table([13]), window=4).sum().backward()
    assert v.grad is not None


def test_mixed_dtypes_follow_the_values():
    q, k, v = torch.randn(3, 5, 2, 8).unbind()
    assert attention(q, k, v.bfloat16(), table([5])).dtype == torch.bfloat16


def test_dropout_drops_and_keeps_the_mean():
    torch.manual_seed(0)
    q, k, v = torch.zeros(64, 1, 8), torch.zeros(64, 1, 8), torch.ones(64, 1, 8)
    out = torch.stack([attention(q, k, v, table([64]), causal=False, dropout=0.5)[:, 0, 0] for _ in range(50)])
    assert out.std() > 0.05
    assert abs(out.mean() - 1) < 0.01


def test_a_cpu_has_sdpa_only():
    assert available_backends("cpu", torch.float32) == available_backends("cpu", torch.bfloat16) == ("sdpa",)


@gpu
def test_fp32_on_cuda_goes_to_sdpa():
    assert available_backends("cuda", torch.float32) == ("sdpa",)
    assert "torch" in available_backends("cuda", torch.bfloat16)


@pytest.mark.parametrize("how", ["argument", "environment"])
@pytest.mark.parametrize(
    ("name", "message"), [("flas", "unknown attention backend"), ("torch", "cannot run float32 on cpu")]
)
def test_a_wrong_backend_is_an_input_error(monkeypatch, how, name, message):
    q, k, v = torch.randn(3, 5, 2, 8).unbind()
    if how == "environment":
        monkeypatch.setenv("JEPA_SCALE_ATTENTION", name)
    with pytest.raises(InputError, match=message) as error:
        attention(q, k, v, table([5]), backend=name if how == "argument" else None)
    assert str(error.value).startswith("backend" if how == "argument" else "JEPA_SCALE_ATTENTION")


def test_an_argument_beats_the_environment(monkeypatch):
    monkeypatch.setenv("JEPA_SCALE_ATTENTION", "flash")
    q, k, v = torch.randn(3, 5, 2, 8).unbind()
    attention(q, k, v, table([5]), backend="sdpa")
    assert os.environ["JEPA_SCALE_ATTENTION"] == "flash"


@pytest.mark.parametrize(("lengths_q", "lengths_k"), [((4,), (5,)), ((5,), (4,)), ((2, 3), (5,))])
def test_tables_that_do_not_fit_are_refused(lengths_q, lengths_k):
    q, k, v = torch.randn(3, 5, 2, 8).unbind()
    with pytest.raises((AssertionError, ValueError)):
        attention(q, k, v, table(lengths_q), table(lengths_k))


def test_more_queries_than_keys_cannot_be_causal():
    q, k, v = torch.randn(5, 2, 8), torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    with pytest.raises(AssertionError):
        attention(q, k, v, table([5]), table([4]))


def test_what_packed_attention_lacks_is_refused():
    x = torch.randn(1, 2, 5, 8)
    with pytest.raises(InputError, match="Module needs position_bias"):
        packed_attention(torch.nn.Module(), x, x, x, None, packed=table([5]), position_bias=x)
    with pytest.raises(InputError, match="Module needs a mask of its own"):
        packed_attention(torch.nn.Module(), x, x, x, x, packed=table([5]))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(2.0, False), (None, True), (2.0, True)])
def test_changed_scores_match_the_formula(softcap, with_sinks, window):
    lengths, heads = [5, 5, 1, 7], 4
    q, k, v = torch.randn(18, heads, 8), torch.randn(18, 2, 8), torch.randn(18, 2, 6)
    sinks = torch.randn(heads) if with_sinks else None
    expected = []
    for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        n = len(a)
        position = torch.arange(n)
        behind = position[:, None] - position
        hidden = (behind < 0) | (behind >= (window or n))
        rows = []
        for head in range(heads):
            scores = 0.3 * a[:, head].double() @ b[:, head // 2].double().T
            if softcap:
                scores = softcap * (scores / softcap).tanh()
            weights = scores.exp().masked_fill(hidden, 0)
            total = weights.sum(dim=1) + (sinks[head].double().exp() if with_sinks else 0)
            rows.append(weights / total[:, None] @ c[:, head // 2].double())
        expected.append(torch.stack(rows, dim=1))
    found = attention(q, k, v, table(lengths), scale=0.3, window=window, softcap=softcap, sinks=sinks)
    torch.testing.assert_close(found.double(), torch.cat(expected), atol=1e-5, rtol=1e-5)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """What flash-attn 2.6 documents of its function of this name, in plain operations."""
    out = []
    shared = q.shape[1] // k.shape[1]
    for s in range(len(cu_seqlens_q) - 1):
        rows, keys = (slice(int(cu[s]), int(cu[s + 1])) for cu in (cu_seqlens_q, cu_seqlens_k))
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[keys].repeat_interleave(shared, 1)) * softmax_scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        behind = (
            torch.arange(scores.shape[1])[:, None] + scores.shape[2] - scores.shape[1] - torch.arange(scores.shape[2])
        )
        left, right = window_size
        hidden = (behind > left if left >= 0 else behind < -(10**9)) | (
            -behind > right if right >= 0 else behind > 10**9
        )
        weights = scores.masked_fill(hidden | (causal & (behind < 0)), -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v[keys].repeat_interleave(shared, 1)))
    return torch.cat(out)


def former_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale):
    """The function before 2.6, as far as its keywords matter."""


def with_flash(monkeypatch, function, generation=2):
    monkeypatch.setattr(module, "_flash_function", lambda hopper: module._Flash(function, generation))
    monkeypatch.setattr(module, "_is_hopper", lambda device: generation == 3)
    monkeypatch.setattr(module, "available_backends", lambda device, dtype: BACKENDS)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "softcap" in case])
def test_flash_attn_is_given_the_cap(monkeypatch, name):
    with_flash(monkeypatch, flash_attn_varlen_func)
    check(**CASES[name], backend="flash")
    check(**CASES[name], backend=None)
    check(**CASES["window"], backend="flash")


@pytest.mark.parametrize(
    ("function", "generation", "backend", "options", "message"),
    [
        (flash_attn_varlen_func, 2, "torch", {"softcap": 1.0}, "does not support capped scores"),
        (former_varlen_func, 2, "flash", {"softcap": 1.0}, "does not support capped scores"),
        (flash_attn_varlen_func, 2, "flash", {"softcap": 1.0, "dropout": 0.1}, "does not support dropout of capped scores"),
        (flash_attn_varlen_func, 2, "flash", {"sinks": torch.zeros(2)}, "does not support attention sinks"),
        (flash_attn_varlen_func, 3, "flash", {"dropout": 0.1}, "does not support dropout"),
    ],
)  # fmt: skip
def test_what_a_kernel_lacks_goes_to_sdpa_or_is_refused(monkeypatch, function, generation, backend, options, message):
    with_flash(monkeypatch, function, generation)
    x = torch.randn(5, 2, 8)
    with pytest.raises(InputError, match=f"backend: attention backend '{backend}' {message}; use sdpa"):
        attention(x, x, x, table([5]), backend=backend, **options)
    if "dropout" not in options:
        monkeypatch.setattr(module, "available_backends", lambda device, dtype: (backend, "sdpa"))
        torch.testing.assert_close(
            attention(x, x, x, table([5]), **options), attention(x, x, x, table([5]), backend="sdpa", **options)
        )


def test_an_ordinary_call_says_what_is_missing():
    x = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="packed=SegmentTable"):
        packed_attention(torch.nn.Module(), x, x, x, None)


def test_a_window_of_the_module_counts_unless_the_call_says_none():
    module = torch.nn.Module()
    module.sliding_window = 2
    x = torch.randn(1, 2, 5, 8)
    plain, _ = packed_attention(module, x, x, x, None, packed=table([5]), sliding_window=None)
    narrow, _ = packed_attention(module, x, x, x, None, packed=table([5]))
    q = x[0].transpose(0, 1)
    torch.testing.assert_close(plain[0], attention(q, q, q, table([5])))
    torch.testing.assert_close(narrow[0], attention(q, q, q, table([5]), window=2))
    assert not torch.allclose(plain, narrow)


PARENT, BRANCHES = (0, 1, 2, 3, 4, 5), ((0, 1, 2, 3, 6), (0, 1, 7, 8, 9), (0, 1, 2, 3, 10, 11))  # rows that they see
OWN = (6, 1, 3, 2)


def branched(device="cpu"):
    seen = (PARENT, *BRANCHES)
    index = torch.tensor([row for rows in seen for row in rows], device=device)
    return table(OWN, device), KeyRows(index, table([len(rows) for rows in seen], device))


def check_branches(window, device="cpu", dtype=torch.float32, tolerance=1e-5):
    """Output and gradients of one parent of 6 tokens and three branches, against one mask over the stream's 12 rows."""
    packed, keys = branched(device)
    seen = torch.zeros(12, 12, dtype=torch.bool)
    for rows, own in zip((PARENT, *BRANCHES), OWN, strict=True):
        for i in range(len(rows) - own, len(rows)):
            seen[rows[i], list(rows[max(0, i + 1 - (window or 99)) : i + 1])] = True
    generator = torch.Generator().manual_seed(0)

    def random(heads):
        return torch.randn(1, heads, 12, 16, generator=generator).to(device, dtype).requires_grad_()

    module = torch.nn.Module()
    q, k, v = random(4), random(2), random(2)
    direction = torch.randn(1, 12, 4, 16, generator=generator).to(device)
    out, _ = packed_attention(module, q, k, v, None, packed=packed, packed_keys=keys, sliding_window=window)
    scores = q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3) / 4
    weights = scores.masked_fill(~seen.to(device), float("-inf")).softmax(-1)
    expected = (weights @ v.double().repeat_interleave(2, 1)).transpose(1, 2)
    assert out.shape == expected.shape and out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    grads = torch.autograd.grad((out * direction).sum(), (q, k, v))
    for got, want in zip(grads, torch.autograd.grad((expected * direction).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(got, want, atol=4 * tolerance, rtol=4 * tolerance)

    last = [5, 6, 9, 11]  # queries at the end of each segment alone
    ends, _ = packed_attention(
        module, q[:, :, last], k, v, None, packed=packed, packed_queries=table([1] * 4, device), packed_keys=keys,
        sliding_window=window,
    )  # fmt: skip
    torch.testing.assert_close(ends.double(), expected[:, last], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("window", [None, 1, 2, 4, 6])
def test_branches_match_the_dense_mask(window):
    check_branches(window)


@gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 1, 2, 4, 6])
def test_cuda_backends_match_the_dense_mask_with_branches(monkeypatch, backend, window):
    if backend not in available_backends("cuda", torch.bfloat16):
        pytest.skip(f"{backend} is not installed")
    monkeypatch.setenv("JEPA_SCALE_ATTENTION", backend)
    check_branches(window, "cuda", torch.bfloat16, 2e-2)
