"""The loss behind the LM head in pieces of the rows or of the vocabulary: that of all logits at once, in values and gradients, with
few logits at a time."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from jepa_scale.models import head as lm_head
from jepa_scale.models.head import (
    LMHead,
    can_measure,
    columns,
    compile_head,
    has_label_loss,
    label_loss,
    measure,
    statistics,
)
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions

WIDTH, VOCABULARY = 32, 53
LLAMA = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2}
NATIVE = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "native": NATIVE,
    "tied": {**NATIVE, "tie_word_embeddings": True, "output_bias": True},
    "llama": {"family": "huggingface", "config": {"model_type": "llama", **LLAMA}},
    "gemma": {
        "family": "huggingface",
        "config": {"model_type": "gemma3_text", "head_dim": 8, "final_logit_softcapping": 2.0, **LLAMA},
    },
    "cohere": {"family": "huggingface", "config": {"model_type": "cohere", "logit_scale": 0.3, **LLAMA}},
    "granite": {"family": "huggingface", "config": {"model_type": "granite", "logits_scaling": 0.25, **LLAMA}},
}


def capped(z: Tensor) -> Tensor:
    return 3 * torch.tanh(z * 0.7 / 3)


@pytest.fixture
def small_chunks(monkeypatch):
    """Room for so many bytes of logits, and 7 rows at a time where pieces are rows."""

    def limit(size: int) -> None:
        monkeypatch.setattr(lm_head, "CHUNK_BYTES", size)
        monkeypatch.setattr(lm_head, "_MOST_ROWS", 7)

    return limit


@settings(max_examples=100)
@given(
    rows=st.integers(0, 9),
    vocabulary=st.integers(1, 70),
    width=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    biased=st.booleans(),
    shape=st.sampled_from([None, capped]),
    places=st.lists(st.integers(0, 8), max_size=4),
    seed=st.integers(0, 2**16),
)
def test_values_and_gradients_are_those_of_all_logits_at_once(
    rows, vocabulary, width, dtype, biased, shape, places, seed
):
    """With a piece of any width, targets here and elsewhere, and any weight of either number of each row."""
    torch.manual_seed(seed)
    head = LMHead(6, vocabulary, bias=biased)
    with torch.no_grad():
        head.weight.mul_(8)
    head.to(dtype)
    x = (2 * torch.randn(rows, 6)).to(dtype).requires_grad_()
    targets = torch.randint(-3, vocabulary + 3, (rows,))
    upstream = torch.randn(2, rows) * (torch.rand(2, rows) > 0.2)  # rows that do not count among them
    wanted = torch.tensor([p for p in places if p < rows], dtype=torch.int64)

    def plain() -> tuple[Tensor, Tensor, Tensor]:
        z = F.linear(x, head.weight, head.bias)
        z = (z if shape is None else shape(z)).float()
        here = (targets >= 0) & (targets < vocabulary)
        return z.logsumexp(-1), z[range(rows), targets.clamp(0, vocabulary - 1)] * here, z.detach()[wanted]

    def gradients(found: Any) -> list[Tensor]:
        loss = (found[0] * upstream[0] + found[1] * upstream[1]).sum()
        return list(torch.autograd.grad(loss, [x, *head.parameters()]))

    expected = plain()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_head, "CHUNK_BYTES", 4 * max(1, rows) * width)
        got = measure(head, x, targets, shape, wanted)
        after = gradients(got)
    tolerance = {"atol": 2e-5, "rtol": 2e-5}
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    torch.testing.assert_close(statistics(plain_logits(head, x, shape), targets), got[:2], **tolerance)
    if dtype == torch.bfloat16:
        tolerance = {"atol": 0.03, "rtol": 0.03}  # products of bf16 numbers, rounded to bf16
    for a, b in zip(after, gradients(expected), strict=True):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a, b, **tolerance)


@settings(max_examples=100)
@given(
    rows=st.integers(0, 9),
    vocabulary=st.integers(1, 70),
    piece=st.integers(1, 9),
    block=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    biased=st.booleans(),
    weighted=st.booleans(),
    shape=st.sampled_from([None, capped]),
    frozen=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_loss_and_its_gradients_are_those_of_all_logits(
    rows, vocabulary, piece, block, dtype, biased, weighted, shape, frozen, seed
):
    """With pieces of any number of rows, any weights of the rows, and any factor of the whole."""
    torch.manual_seed(seed)
    head = LMHead(6, vocabulary, bias=biased)
    with torch.no_grad():
        head.weight.mul_(8)
    head.to(dtype).requires_grad_(not frozen)
    x = (2 * torch.randn(rows, 6)).to(dtype).requires_grad_()
    targets, weights = torch.randint(0, vocabulary, (rows,)), torch.randn(rows) if weighted else None
    z = F.linear(x, head.weight, head.bias)
    losses = F.cross_entropy((z if shape is None else shape(z)).float(), targets, reduction="none")
    total = (losses if weights is None else losses * weights).sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_head, "_MOST_ROWS", piece)
        patch.setattr(lm_head, "CHUNK_BYTES", 4 * vocabulary * block)
        got, each, _ = label_loss(head, x, targets, weights, shape)
    assert not each.requires_grad
    torch.testing.assert_close([got, each], [total, losses.detach()], atol=2e-5, rtol=2e-5)
    wanted = [x, *(() if frozen else head.parameters())]
    tolerance = {"atol": 0.03, "rtol": 0.03} if dtype == torch.bfloat16 else {"atol": 2e-5, "rtol": 2e-5}
    expected = torch.autograd.grad(-1.7 * total, wanted)
    for a, b in zip(torch.autograd.grad(-1.7 * got, wanted), expected, strict=True):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a, b, **tolerance)
    with pytest.raises(RuntimeError, match="one backward"):
        torch.autograd.grad(got, wanted)


def test_a_bf16_weight_has_its_gradient_added_up_in_fp32(monkeypatch):
    """1,024 halves in pieces of two rows: sums of bf16 would stop at 256."""
    monkeypatch.setattr(lm_head, "_MOST_ROWS", 2)
    head = LMHead(1, 2, bias=True).bfloat16()
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    x, labels = torch.ones(1024, 1, dtype=torch.bfloat16), torch.zeros(1024, dtype=torch.int64)
    label_loss(head, x, labels, None, None)[0].backward()
    assert head.weight.grad.flatten().tolist() == head.bias.grad.tolist() == [-512, 512]


def test_a_head_of_which_gradients_must_wait_has_its_loss_in_another_way():
    two = nn.ModuleList([LMHead(2, 3), LMHead(2, 3)])
    assert has_label_loss(two[0], torch.zeros(1, 2)) and not has_label_loss(two, torch.zeros(1, 2))
    assert not has_label_loss(two[0], torch.zeros(1, 2, dtype=torch.float16))  # the loss scale is not known yet


def plain_logits(head: LMHead, x: Tensor, shape: Any) -> Tensor:
    z = head(x)
    return (z if shape is None else shape(z)).float().detach()


@given(rows=st.integers(0, 10**7), vocabulary=st.integers(1, 10**6))
def test_a_piece_is_no_larger_than_it_may_be(rows, vocabulary):
    width = columns(rows, vocabulary)
    assert 1 <= width <= vocabulary
    assert 4 * rows * width <= lm_head.CHUNK_BYTES
    if width < vocabulary:  # and no smaller than it must be
        assert 4 * rows * (width + 128) > lm_head.CHUNK_BYTES
        assert width % 128 == 0 or width < 128


def test_an_unlikely_label_has_a_finite_loss(small_chunks):
    """Logits of hundreds, whose exponentials are not numbers of fp32."""
    head = LMHead(2, 40, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-300, 300, 80).view(40, 2))
    rows = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], requires_grad=True)
    small_chunks(4 * 2 * 7)
    normalizers, chosen, _ = measure(head, rows, torch.tensor([0, 0]), None)
    expected = F.cross_entropy(rows @ head.weight.T, torch.tensor([0, 0]), reduction="none")
    torch.testing.assert_close(normalizers - chosen, expected)
    (normalizers - chosen).sum().backward()
    assert torch.isfinite(rows.grad).all() and torch.isfinite(head.weight.grad).all()
    total, each, _ = label_loss(head, rows, torch.tensor([0, 0]), None, None)
    torch.testing.assert_close(each, expected.detach())
    total.backward()
    assert torch.isfinite(rows.grad).all() and torch.isfinite(head.weight.grad).all()


# -- in a backbone ----------------------------------------------------------------------------------------------------


def build(family: str, **keys: Any) -> Any:
    torch.manual_seed(0)
    backbone = build_backbone(ModelOptions(**FAMILIES[family], **keys), VOCABULARY)
    with torch.no_grad():
        for parameter in backbone.decoder.get_output_embeddings().parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return backbone


def outcome(backbone: Any, rows: Tensor, labels: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and some logits; gradients of the losses, weighted by row, in the states and the head; the same of the sum."""
    rows = rows.clone().requires_grad_()
    backbone.zero_grad()
    places = torch.tensor([3, 0, 3])
    losses = backbone.label_losses(rows, labels)
    (losses * torch.linspace(-1, 2, len(rows))).sum().backward()
    head = backbone.decoder.get_output_embeddings()
    found = {name: p.grad for name, p in head.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in found.values())
    with torch.no_grad():
        again = backbone.label_losses(rows, labels)
        unmoved, _, without = backbone.label_loss(rows, labels, logit_rows=places)
    gradients = {"rows": rows.grad, **found}
    rows.grad = None
    backbone.zero_grad()
    total, each, logits = backbone.label_loss(rows, labels, torch.linspace(-1, 2, len(rows)), logit_rows=places)
    assert not logits.requires_grad
    (total / 3).backward()
    gradients |= {"rows of sum": rows.grad}
    gradients |= {f"{name} of sum": p.grad for name, p in head.named_parameters() if p.requires_grad}
    return [losses.detach(), logits, without, again, unmoved, total.detach(), each], gradients


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(11, WIDTH, generator=generator), torch.randint(0, VOCABULARY, (11,), generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_same_losses_in_pieces(family, small_chunks):
    backbone = build(family)
    expected, wanted = outcome(backbone, *data())
    small_chunks(4 * 11 * 5)
    got, gradients = outcome(backbone, *data())
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["tied", "gemma"])
def test_compiled_pieces_have_the_same_losses(family, small_chunks):
    """By the compiler that runs in training; other numbers of rows and columns are no reason to compile again."""
    backbone, (rows, labels) = build(family), data()
    expected = [outcome(backbone, rows[:n], labels[:n]) for n in (11, 9, 7)]
    compile_head(backbone.decoder.get_output_embeddings())
    torch._dynamo.utils.counters.clear()
    torch._dynamo.reset()
    small_chunks(4 * VOCABULARY * 7)
    graphs = []
    for n, (losses, gradients) in zip((11, 9, 7), expected, strict=True):
        found, of_them = outcome(backbone, rows[:n], labels[:n].clone())  # a view of other labels compiles again
        torch.testing.assert_close(found, losses, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(of_them, gradients, atol=1e-5, rtol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and len(set(graphs)) == 1


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_in_two_layers_has_its_pieces_in_both(tied, small_chunks, tmp_path):
    """New tokens beside frozen ones: their rows have a gradient, the others none."""
    config = {"model_type": "llama", "tie_word_embeddings": tied, **LLAMA}
    build_backbone(ModelOptions(family="huggingface", config=config), 48).decoder.save_pretrained(tmp_path)
    keys = {"family": "huggingface", "pretrained": str(tmp_path), "lora": {"rank": 2}}
    backbone = build_backbone(ModelOptions(**keys), VOCABULARY)
    expected, wanted = outcome(backbone, *data())
    small_chunks(4 * 11 * 3)
    got, gradients = outcome(backbone, *data())
    assert set(gradients) == {"rows", "new_rows.weight", "rows of sum", "new_rows.weight of sum"}
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, wanted, atol=1e-5, rtol=1e-5)


def test_what_fits_is_computed_as_ever(monkeypatch):
    """To the bit: the plain loss of all logits."""
    monkeypatch.setattr(lm_head, "measure", None)
    backbone, (rows, labels) = build("tied"), data()
    rows.requires_grad_()
    head = backbone.decoder.get_output_embeddings()
    losses = [backbone.label_losses(rows, labels), F.cross_entropy(head(rows), labels, reduction="none")]
    assert torch.equal(*losses)
    both = [torch.autograd.grad(loss.sum(), [rows, *head.parameters()]) for loss in losses]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_no_rows_have_no_losses_and_every_parameter_takes_part():
    backbone = build("tied")
    total, losses, logits = backbone.label_loss(
        torch.zeros(0, WIDTH), torch.zeros(0, dtype=torch.int64), logit_rows=torch.tensor([0, 0])
    )
    assert losses.shape == (0,) and torch.equal(logits, torch.zeros(2, VOCABULARY))
    total.backward()
    assert all(p.grad is not None for p in backbone.decoder.get_output_embeddings().parameters())


def test_a_head_of_another_kind_makes_all_logits_at_once(small_chunks):
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    backbone, (rows, labels) = build("llama"), data()
    other = Doubling(WIDTH, VOCABULARY, bias=False)
    backbone.decoder.set_output_embeddings(other)
    small_chunks(4 * 11 * 5)
    assert not can_measure(other) and not can_measure(nn.Sequential(LMHead(2, 3), nn.Linear(3, 3)))
    torch.testing.assert_close(
        backbone.label_losses(rows, labels), F.cross_entropy(2 * rows @ other.weight.T, labels, reduction="none")
    )


def test_afterwards_a_head_gives_logits_again(small_chunks):
    backbone, (rows, labels) = build("tied"), data()
    before = backbone.logits(rows)
    small_chunks(4 * 11 * 5)
    backbone.label_losses(rows, labels)
    with pytest.raises(RuntimeError):
        backbone.label_losses(rows[:, 1:], labels)
    assert torch.equal(backbone.logits(rows), before)


# -- what it takes ----------------------------------------------------------------------------------------------------


class Living(TorchDispatchMode):
    """Bytes of the storages that operators have made and that live, and the most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self._known.add(x.untyped_storage()._cdata)
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self._known:
                storage = x.untyped_storage()
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._end, storage._cdata, storage.nbytes())
                self.most = max(self.most, self.now)
        return out

    def _end(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [None, capped])
def test_few_logits_exist_at_a_time_whatever_the_vocabulary(dtype, shape, small_chunks):
    """Beside the gradients, which every loss has: at most six times the bytes of a piece, however many logits there are."""
    rows, piece = 64, 4 * 64 * 32
    small_chunks(piece)
    for vocabulary in (512, 4096):
        head = LMHead(8, vocabulary, bias=False).to(dtype)
        x = torch.randn(rows, 8, dtype=dtype, requires_grad=True)
        labels = torch.arange(rows)
        saved: list[Tensor] = []
        keep = torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t)
        with Living() as living:
            with keep:
                normalizers, chosen, _ = measure(head, x, labels, shape)
            (normalizers - chosen).sum().backward()
        gradients = sum(t.numel() * t.element_size() for t in (x, head.weight))
        logits = 4 * rows * vocabulary
        assert logits >= 16 * piece
        assert living.most < gradients + 6 * piece + 2**14, (vocabulary, living.most)
        assert all(t.numel() <= max(rows * 8, head.weight.numel()) for t in saved)  # what it is made of, not logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_of_logits_exist_at_a_time(dtype, monkeypatch):
    """Beside the gradients and, of a 16-bit weight, their sum and a summand: at most twice a piece, however many rows."""
    width, vocabulary = 8, 512
    monkeypatch.setattr(lm_head, "_MOST_ROWS", 32)
    monkeypatch.setattr(lm_head, "CHUNK_BYTES", 4 * 16 * vocabulary)
    for rows in (256, 1024):
        head = LMHead(width, vocabulary, bias=False).to(dtype)
        x = torch.randn(rows, width, dtype=dtype, requires_grad=True)
        with Living() as living:
            label_loss(head, x, torch.arange(rows) % vocabulary, None, None)[0].backward()
        gradients = sum(t.numel() * t.element_size() for t in (x, head.weight))
        sums = (4 + 2) * head.weight.numel() if dtype == torch.bfloat16 else 0
        assert living.most < gradients + sums + 2 * 4 * 32 * vocabulary + 2**15, (rows, living.most)


def test_the_loss_makes_logits_once(monkeypatch):
    head, (rows, labels) = LMHead(WIDTH, VOCABULARY), data()
    product = 2 * 11 * WIDTH * VOCABULARY
    monkeypatch.setattr(lm_head, "_MOST_ROWS", 4)
    for trained, products in ((True, 3), (False, 2)):  # a frozen head has no gradient
        head.requires_grad_(trained)
        rows.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            label_loss(head, rows, labels, None, None)[0].backward()
        assert counter.get_total_flops() == products * product


def test_the_logits_are_made_twice_and_only_in_training(small_chunks):
    head, (rows, labels) = LMHead(WIDTH, VOCABULARY), data()
    rows.requires_grad_()
    product = 2 * 11 * WIDTH * VOCABULARY
    small_chunks(4 * 11 * 5)
    for training, products in ((True, 4), (False, 1)):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
            normalizers, _, _ = measure(head, rows, labels, None)
            if training:
                normalizers.sum().backward()
        assert counter.get_total_flops() == products * product
