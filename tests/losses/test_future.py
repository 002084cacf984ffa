"""The KL divergence of future distillation: closed forms, a plain fp64 reference, its gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.losses.future import FutureKL, future_kl


def randn(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kl(found: FutureKL) -> torch.Tensor:
    return found.cross_entropy - found.entropy


def test_equal_logits_cost_nothing_and_a_shift_does_not_matter():
    logits = randn(4, 7)
    for student in (logits, logits + 5.0):
        found = future_kl(student, logits, 2.0)
        torch.testing.assert_close(kl(found), torch.zeros(4), atol=1e-6, rtol=0)
        torch.testing.assert_close(found.cross_entropy, found.entropy)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_teacher_that_knows_nothing_has_entropy_ln_v(temperature):
    found = future_kl(randn(4, 9), torch.zeros(4, 9), temperature)
    torch.testing.assert_close(found.entropy, torch.full((4,), math.log(9)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_two_tokens_in_closed_form(temperature):
    """For p = (σ(a/T), 1 − σ(a/T)) and a uniform q, KL = ln 2 − H(p)."""
    a = 1.7
    p = 1 / (1 + math.exp(-a / temperature))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    found = future_kl(torch.zeros(1, 2), torch.tensor([[a, 0.0]]), temperature)
    assert found.cross_entropy.item() == pytest.approx(math.log(2), abs=1e-6)
    assert found.entropy.item() == pytest.approx(entropy, abs=1e-6)
    assert kl(found).item() == pytest.approx(math.log(2) - entropy, abs=1e-6)


@settings(max_examples=40)
@given(st.integers(0, 5), st.integers(2, 6), st.floats(0.25, 4), st.integers(0, 1000))
def test_it_is_the_kl_from_teacher_to_student(n, v, temperature, seed):
    student, teacher = randn(n, v, seed=seed), randn(n, v, seed=seed + 1)
    found = future_kl(student, teacher, temperature)
    p, q = ((x.double() / temperature).softmax(-1) for x in (teacher, student))
    torch.testing.assert_close(kl(found), (p * (p / q).log()).sum(-1).float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.entropy, -(p * p.log()).sum(-1).float(), atol=1e-5, rtol=1e-4)
    assert kl(found).shape == (n,) and (kl(found) > -1e-5).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_gradient_is_the_difference_of_the_probabilities_over_t(temperature):
    student, teacher = randn(3, 5).requires_grad_(), randn(3, 5, seed=1).requires_grad_()
    kl(future_kl(student, teacher, temperature)).sum().backward()
    p, q = ((x.detach() / temperature).softmax(-1) for x in (teacher, student))
    torch.testing.assert_close(student.grad, (q - p) / temperature, atol=1e-6, rtol=1e-5)
    assert teacher.grad is None


def test_half_precision_is_computed_in_fp32():
    student, teacher = randn(4, 300).bfloat16(), randn(4, 300, seed=1).bfloat16()
    found = future_kl(student, teacher, 2.0)
    expected = future_kl(student.float(), teacher.float(), 2.0)
    assert found.cross_entropy.dtype == torch.float32
    assert torch.equal(kl(found), kl(expected))
