"""KL divergence between the LM head's distributions at two states, with the logits of only some rows at a time.

KL(p‖q) = Σ p (log p − log q), where p belongs to a teacher's state and q to a student's. The student alone gets a gradient, and the
head's parameters get none. So rows are independent of each other, and a row's gradient (q − p) · W is known with its divergence: logits
are computed once and none is kept. Where the vocabulary is in pieces, in two layers or on several ranks, each piece gives three
numbers a row that can be combined, and the gradient is computed in the backward pass, from logits that are computed again.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from jepa_scale.models import head as lm_head
from jepa_scale.models.head import Shape

_MOST_ROWS = 512  # of a piece: their few tensors are read again while they are in the cache


class PartsOfKL(NamedTuple):
    """Terms of the KL from a part of the vocabulary, (n,) fp32 each.

    Attributes:
        teacher, student: log Σ e^z of the teacher's and of the student's logits.
        difference: mean of z_p − z_q under the teacher's distribution over this part.
    """

    teacher: Tensor
    student: Tensor
    difference: Tensor

    @property
    def kl(self) -> Tensor:
        """The divergence, if the part is the whole vocabulary."""
        return self.difference - self.teacher + self.student


def parts_of_kl(student: Tensor, teacher: Tensor) -> PartsOfKL:
    """Return the terms of KL(softmax(teacher) ‖ softmax(student)) from logits, (n, v) fp32 each."""
    p = torch.softmax(teacher, dim=-1)
    return PartsOfKL(teacher.logsumexp(dim=-1), student.logsumexp(dim=-1), (p * (teacher - student)).sum(dim=-1))


def combined(parts: PartsOfKL, dim: int = -1) -> PartsOfKL:
    """Combine the terms of several parts of the vocabulary, which are stacked along ``dim``."""
    whole = parts.teacher.logsumexp(dim=dim, keepdim=True)
    share = (parts.teacher - whole).exp()
    return PartsOfKL(whole.squeeze(dim), parts.student.logsumexp(dim=dim), (share * parts.difference).sum(dim=dim))


def kl_of_rows(head: nn.Module, student: Tensor, teacher: Tensor, index: Tensor, shape: Shape | None) -> Tensor:
    """Compute KL(p‖q) of a head's distributions at states, (n,) fp32; see :func:`measure_kl`."""
    if not lm_head.can_measure(head) or len(lm_head.lm_layers(head)) > 1:
        return measure_kl(head, student, teacher, index, shape).kl
    (part,), rows = lm_head.lm_layers(head), len(student)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _KLOfRows.apply(x[:rows], x[rows:].detach(), index, weight, bias, shape)

    with lm_head.with_product(part, run):
        found: Tensor = head(torch.cat([student, teacher.detach()]))  # a number for each row, in place of its logits
    return found


def measure_kl(head: nn.Module, student: Tensor, teacher: Tensor, index: Tensor, shape: Shape | None) -> PartsOfKL:
    """Compute :func:`parts_of_kl` of a head's logits at states of a student and of a teacher.

    The head is called once, with the states of both, whatever their number: so that an engine's hooks around the call and its
    backward run equally often on all ranks, and that a head may scale the states.

    Args:
        head: its parameters get no gradient here; the caller freezes them.
        student: (n, d) states after the final norm. teacher: (m, d), likewise, without gradient. index: (n,) int64, the row of
            ``teacher`` for each row of ``student``.
        shape: function from the head's product to logits; None = the product is the logit.
    """
    rows = len(student)
    both = torch.cat([student, teacher.detach()])
    if not lm_head.can_measure(head):
        product = head(both)
        logits = (product if shape is None else shape(product)).float()
        return parts_of_kl(logits[:rows], logits[rows:].detach().index_select(0, index))

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _MeasureKL.apply(x[:rows], x[rows:].detach().index_select(0, index), weight, bias, shape)

    parts = lm_head.lm_layers(head)
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(lm_head.with_product(part, run))
        found = head(both)  # three numbers for each part, in place of its logits
    return combined(PartsOfKL(*found.view(rows, len(parts), 3).unbind(dim=-1)))


class _KLOfRows(torch.autograd.Function):
    """Function from states of the student, (n, d), and of the teacher, (m, d), (n,) int64, (v, d) and (v,) or None to (n,) fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        index: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shape: Shape | None,
    ) -> Tensor:
        found = student.new_empty(len(student), dtype=torch.float32)
        of_student = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for rows in _pieces(len(student), len(weight)):
            log_p = _logits(teacher.index_select(0, index[rows]), weight, bias, shape).log_softmax(dim=-1)
            product = F.linear(student[rows], weight, bias)
            with torch.enable_grad():
                shaped = product if shape is None else shape(product.requires_grad_())
            log_q = shaped.detach().float().log_softmax(dim=-1)
            p = log_p.exp()
            torch.sum(log_p.sub_(log_q).mul_(p), dim=-1, out=found[rows])
            if of_student is None:
                continue
            grad = log_q.exp_().sub_(p).to(shaped.dtype)
            if shape is not None:
                (grad,) = torch.autograd.grad(shaped, product, grad)
            of_student[rows] = grad @ weight
        ctx.save_for_backward(of_student)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (of_student,) = ctx.saved_tensors
        return (of_student * grads[0][:, None]).to(of_student.dtype), None, None, None, None, None


class _MeasureKL(torch.autograd.Function):
    """Function from the student's and the teacher's states, (n, d), (v, d) and (v,) or None to the three terms, (n, 3) fp32."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape | None
    ) -> Tensor:
        ctx.save_for_backward(student, teacher, weight, bias)
        ctx.shape = shape
        found = student.new_empty(len(student), 3, dtype=torch.float32)
        for rows in _pieces(len(student), len(weight)):
            z_q, z_p = (_logits(x[rows], weight, bias, shape) for x in (student, teacher))
            found[rows] = torch.stack(parts_of_kl(z_q, z_p), dim=-1)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, weight, bias = ctx.saved_tensors
        _, to_student, to_difference = grads[0].unbind(dim=-1)
        of_student = torch.empty_like(student)
        for rows in _pieces(len(student), len(weight)):
            product = F.linear(student[rows], weight, bias)
            with torch.enable_grad():
                shaped = product if ctx.shape is None else ctx.shape(product.requires_grad_())
            q = torch.softmax(shaped.detach().float(), dim=-1)
            p = torch.softmax(_logits(teacher[rows], weight, bias, ctx.shape), dim=-1)
            grad = (to_student[rows, None] * q - to_difference[rows, None] * p).to(product.dtype)
            if ctx.shape is not None:
                (grad,) = torch.autograd.grad(shaped, product, grad.to(shaped.dtype))
            of_student[rows] = grad @ weight
        return of_student, None, None, None, None


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape | None) -> Tensor:
    product = F.linear(x, weight, bias)
    return (product if shape is None else shape(product)).float()


def _pieces(rows: int, vocabulary: int) -> list[slice]:
    # the logits of teacher and student exist together
    size = max(1, min(_MOST_ROWS, lm_head.CHUNK_BYTES // (8 * max(1, vocabulary))))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
