"""One optimizer for every engine: Muon for matrices and AdamW for all other parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from jepa_scale.optim.exchange import ExchangePlan, Layout, Part, Piece, copy_pieces, exchange
from jepa_scale.optim.matrices import Matrix
from jepa_scale.optim.newton_schulz import orthogonalize


class MatrixOptimizer(torch.optim.Optimizer):
    """Optimizer that updates groups with ``method="muon"`` by Muon and those with ``"adamw"`` by :class:`torch.optim.AdamW`.

    Muon (Jordan et al. 2024, as in :class:`torch.optim.Muon`), for a matrix W with momentum coefficient μ, momentum m and
    gradient g:

        m ← μ·m + (1 − μ)·g;  u = (1 − μ)·g + μ·m;  W ← W·(1 − lr·weight_decay) − lr·scale·orthogonalize(u)

    An engine's tensors hold pieces of matrices and have any shape. Momentum and weight decay are applied element by
    element where the pieces are. For the orthogonal factor the pieces are gathered (:mod:`jepa_scale.optim.exchange`).
    Communication and orthogonalisation use bf16 on a GPU and fp32 on a CPU. All ranks call :meth:`step` together, for the
    same tensors. A step overwrites the gradients.

    ``found_inf`` (0-d, 1 or 0) is set by ``torch.amp.GradScaler`` on fused optimizers. Where it is 1, a step changes
    nothing, its count included; the host does not wait for its value.

    Args:
        groups: dictionaries with ``params``, ``lr``, ``weight_decay``, ``method``.
        matrices: every parameter that Muon updates, by name.
        momentum: μ.
        steps: number of Newton–Schulz iterations.
        adjust: see :meth:`jepa_scale.optim.matrices.Matrix.lr_scale`.
        adamw: arguments of :class:`torch.optim.AdamW`.
    """

    # DeepSpeed orthogonalises updates itself if an optimizer's class name contains "muon", or if parameters or groups have
    # use_muon. Nothing here has such a name.

    _step_supports_amp_scaling = True

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        matrices: Mapping[str, Matrix],
        momentum: float,
        steps: int,
        adjust: str,
        adamw: Mapping[str, Any],
    ) -> None:
        others = [group for group in groups if group["method"] == "adamw"]
        # AdamW shares these dictionaries and adds its own keys to them
        self._adamw = torch.optim.AdamW(others, **adamw) if others else None
        self.matrices = matrices
        self.momentum, self.newton_schulz_steps = momentum, steps
        self.found_inf: Tensor | None = None
        self._scales = {name: matrix.lr_scale(adjust) for name, matrix in matrices.items()}
        self._numbers: dict[Tensor, int] = {}
        self._layout: Layout | None = None
        self._plans: dict[tuple[int, ...], ExchangePlan] = {}
        super().__init__(list(groups), {})

    def bind(self, tensors: Sequence[tuple[Tensor, Sequence[Part]]], replicated: bool = False) -> None:
        """Register the tensors that Muon updates. Collective; call it once, before the first real step.

        Earlier steps create the state and do not change the matrices: DeepSpeed makes such steps during its set-up.

        Args:
            tensors: the tensors of all groups of Muon, each with the parts of matrices in it
                (:class:`jepa_scale.optim.exchange.Layout`).
            replicated: whether every rank holds all matrices whole.
        """
        self._numbers = {tensor: number for number, (tensor, _) in enumerate(tensors)}
        self._layout = Layout(self.matrices, [parts for _, parts in tensors], replicated)
        self._plans = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        updated = [
            (tensor, group)
            for group in self.param_groups
            if group["method"] == "muon"
            for tensor in group["params"]
            if tensor.grad is not None
        ]
        for tensor, _ in updated:
            if not self.state[tensor]:
                self.state[tensor]["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
                self.state[tensor]["momentum_buffer"] = torch.zeros_like(tensor)
        if self._layout is not None and updated:
            self._step_matrices(updated)
        else:
            assert not updated or self.found_inf is not None, "call bind() before the first step"
        if self._adamw is not None:
            self._adamw.param_groups = [group for group in self.param_groups if group["method"] == "adamw"]
            self._adamw.state = self.state
            self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
            self._adamw.step()

    def _step_matrices(self, updated: list[tuple[Tensor, dict[str, Any]]]) -> None:
        keep = 1.0 if self.found_inf is None else 1.0 - self.found_inf  # 0 = change nothing
        skip = None if self.found_inf is None else self.found_inf.bool()
        numbers = tuple(self._numbers[tensor] for tensor, _ in updated)
        values = dict(zip(numbers, (_local(tensor) for tensor, _ in updated), strict=True))
        updates = dict(zip(numbers, self._updates([tensor for tensor, _ in updated], keep, skip), strict=True))
        if numbers not in self._plans:
            assert self._layout is not None
            self._plans[numbers] = self._layout.plan(numbers)
        plan = self._plans[numbers]
        results = self._orthogonal(plan, updates)
        if skip is not None:
            results.masked_fill_(skip, 0.0)

        groups = dict(zip(numbers, (group for _, group in updated), strict=True))
        for number, group in groups.items():
            values[number].mul_(1.0 - group["lr"] * group["weight_decay"] * keep)
        pairs: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for piece, name, at in plan.receive.slots:
            lr = groups[piece.tensor]["lr"] * self._scales[name]
            for views, view in zip(
                pairs.setdefault(lr, ([], [])), _pair(values[piece.tensor], piece, results, at), strict=True
            ):
                views.append(view)
        for lr, (targets, directions) in pairs.items():
            torch._foreach_add_(targets, directions, alpha=-lr)
        steps = [self.state[tensor]["step"] for tensor, _ in updated]
        if isinstance(keep, Tensor):
            torch._foreach_add_(steps, keep, alpha=1)  # without alpha the overload for numbers reads the tensor's value
        else:
            torch._foreach_add_(steps, keep)

    def _updates(self, tensors: list[Tensor], keep: float | Tensor, skip: Tensor | None) -> list[Tensor]:
        """Advance the momentum and return Nesterov's updates, which overwrite the gradients."""
        buffers = [_local(self.state[tensor]["momentum_buffer"]) for tensor in tensors]
        gradients = [_local(tensor.grad) for tensor in tensors]  # type: ignore[arg-type]
        if skip is not None:
            for gradient in gradients:
                gradient.masked_fill_(skip, -0.0)  # NaN · 0 would be NaN; x + −0 is x, even if x is −0
        torch._foreach_mul_(buffers, 1.0 - (1.0 - self.momentum) * keep)
        torch._foreach_add_(buffers, gradients, alpha=1.0 - self.momentum)
        torch._foreach_lerp_(gradients, buffers, self.momentum)
        return gradients

    def _orthogonal(self, plan: ExchangePlan, updates: Mapping[int, Tensor]) -> Tensor:
        """Orthogonalise the updates; return the factors in the layout ``plan.receive``. Collective."""
        answers = self._factors(plan, exchange(_packed(plan, updates), plan.send, plan.arrive))
        return exchange(answers, plan.answer, plan.receive)

    def _factors(self, plan: ExchangePlan, came: Tensor) -> Tensor:
        """Orthogonalise the matrices that this rank owns: from a buffer ``plan.arrive`` to one of ``plan.answer``."""
        arrived, answered = _by_matrix(plan.arrive.slots), _by_matrix(plan.answer.slots)
        answers = came.new_empty(plan.answer.size)
        for batch in plan.batches:
            whole = came.new_empty(len(batch), batch[0].numel)
            for matrix, flat in zip(batch, whole, strict=True):
                copy_pieces(*_cut(flat, came, arrived[matrix.name]))
            factors = orthogonalize(whole.view(-1, batch[0].rows, batch[0].cols), self.newton_schulz_steps)
            for matrix, factor in zip(batch, factors, strict=True):
                copy_pieces(*reversed(_cut(factor.reshape(-1), answers, answered[matrix.name])))
        return answers


def _packed(plan: ExchangePlan, updates: Mapping[int, Tensor]) -> Tensor:
    """Pack the buffer ``plan.send``, in bf16 on a GPU and in fp32 on a CPU, where bf16 products are slow."""
    first = next(iter(updates.values()))
    dtype = torch.bfloat16 if first.is_cuda else torch.float32
    buffer = torch.empty(plan.send.size, dtype=dtype, device=first.device)
    pairs = [_pair(updates[piece.tensor], piece, buffer, at) for piece, _, at in plan.send.slots]
    copy_pieces([there for _, there in pairs], [here for here, _ in pairs])
    return buffer


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _pair(tensor: Tensor, piece: Piece, buffer: Tensor, at: int) -> tuple[Tensor, Tensor]:
    """Views of a piece in its tensor and in a buffer, of the same shape."""
    there = buffer[at : at + piece.length]
    if piece.length == tensor.numel():  # the tensor may not be contiguous
        return tensor, there.view(tensor.shape)
    return tensor.view(-1)[piece.at : piece.at + piece.length], there


def _by_matrix(slots: Sequence[tuple[Piece, str, int]]) -> dict[str, list[tuple[Piece, int]]]:
    pieces: dict[str, list[tuple[Piece, int]]] = {}
    for piece, name, at in slots:
        pieces.setdefault(name, []).append((piece, at))
    return pieces


def _cut(flat: Tensor, buffer: Tensor, pieces: Sequence[tuple[Piece, int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Views of the pieces of one matrix in the flattened matrix, and in a buffer."""
    return (
        [flat[piece.start : piece.start + piece.length] for piece, _ in pieces],
        [buffer[at : at + piece.length] for piece, at in pieces],
    )
