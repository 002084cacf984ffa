"""The KL behind the LM head: that of plain logits, in values and gradients, whole or in pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.models import head as lm_head
from jepa_scale.models.head_kl import PartsOfKL, combined, parts_of_kl
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.lora import split_rows
from jepa_scale.models.options import ModelOptions
from tests.models.test_head import FAMILIES, VOCABULARY, WIDTH


def model(name: str) -> Any:
    torch.manual_seed(0)
    return build_backbone(ModelOptions(**FAMILIES[name]), VOCABULARY)


def plain(backbone: Any, student: torch.Tensor, teacher: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """KL by PyTorch's own function."""
    log_q = F.log_softmax(backbone.logits(student).float(), dim=-1)
    log_p = F.log_softmax(backbone.logits(teacher).float(), dim=-1)[index].detach()
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)


@pytest.mark.parametrize("size", [1, 600, 2**28], ids=["a row", "a few rows", "all rows"])
@pytest.mark.parametrize("name", [*FAMILIES, "grown"])
def test_values_and_gradients_are_those_of_all_logits(name, size, monkeypatch):
    backbone = model("llama" if name == "grown" else name)
    if name == "grown":
        split_rows(backbone.decoder, VOCABULARY - 7)
    monkeypatch.setattr(lm_head, "CHUNK_BYTES", size)
    torch.manual_seed(1)
    student, teacher = ((10 * torch.randn(n, WIDTH)).requires_grad_() for n in (9, 5))
    index, weights = torch.tensor([0, 1, 2, 3, 4, 0, 2, 2, 4]), torch.rand(9)
    found = backbone.head_kl(student, teacher, index)
    expected = plain(backbone, student, teacher, index)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.min() > -1e-5 and found.max() > 0.01
    (grad,) = torch.autograd.grad((found * weights).sum(), student, retain_graph=True)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), student, retain_graph=True)
    torch.testing.assert_close(grad, wanted, atol=1e-5, rtol=1e-4)
    (found * weights).sum().backward()
    assert teacher.grad is None and all(p.grad is None for p in backbone.parameters())


@pytest.mark.parametrize("size", [1, 2**28])
def test_no_rows_are_no_divergences(size, monkeypatch):
    backbone = model("native")
    monkeypatch.setattr(lm_head, "CHUNK_BYTES", size)
    student = torch.zeros(0, WIDTH, requires_grad=True)
    found = backbone.head_kl(student, torch.zeros(0, WIDTH), torch.zeros(0, dtype=torch.int64))
    found.sum().backward()
    assert found.shape == (0,) and student.grad is not None and student.grad.shape == (0, WIDTH)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any), st.integers(0, 5), st.integers(0, 2**16))
def test_parts_of_the_vocabulary_give_the_terms_of_the_whole(widths, rows, seed):
    """Also where a part is empty, as that of a rank may be."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(rows, sum(widths), generator=generator) for _ in range(2))
    parts = [parts_of_kl(*pair) for pair in zip(student.split(widths, 1), teacher.split(widths, 1), strict=True)]
    found = combined(PartsOfKL(*(torch.stack(terms, dim=-1) for terms in zip(*parts, strict=True))))
    for a, b in zip(found, parts_of_kl(student, teacher), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_few_logits_exist_at_a_time(monkeypatch):
    """Pieces have as many rows as fit, those of teacher and student together."""
    from jepa_scale.models.head_kl import _pieces

    monkeypatch.setattr(lm_head, "CHUNK_BYTES", 8 * VOCABULARY * 4 + 5)
    assert [(p.start, p.stop) for p in _pieces(9, VOCABULARY)] == [(0, 4), (4, 8), (8, 9)]
    assert _pieces(0, VOCABULARY) == []
