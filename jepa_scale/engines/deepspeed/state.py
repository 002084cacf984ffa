"""View of DeepSpeed's training state by parameter.

The optimizer that is passed to ``deepspeed.initialize`` does not update the model's parameters but tensors of DeepSpeed:

* stage 0: the whole parameters; in bf16 an fp32 master of each;
* stages 1 and 2: for each parameter group, this rank's part of the flattened fp32 masters. The parameters themselves are
  views into the whole flat group, which gives the position of each;
* stage 3: for each sub-group of parameters, the concatenation of this rank's parts, padded to equal sizes.

Moments have the layout of the tensor that is updated. So a list of pieces describes the whole state: each piece maps elements
of a parameter to elements of such a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa_scale.checkpoint.shard_view import ShardView
from jepa_scale.distributed.comm import dp_group
from jepa_scale.engines.deepspeed import internals
from jepa_scale.engines.deepspeed.internals import shard, true_shape
from jepa_scale.optim import Part


class Piece(NamedTuple):
    """Map from a parameter's elements to those of the tensor that the optimizer updates.

    It maps ``length`` elements of the flattened ``parameter``, from ``start``, to the flat tensor ``master``, from ``at``.
    Alternatively, both tensors have the same shape and the piece is the whole parameter.
    """

    parameter: nn.Parameter
    start: int
    master: Tensor
    at: int
    length: int

    def shard_view(self, values: Tensor) -> ShardView:
        """Return the piece's elements of ``values``, a tensor with the layout of ``master``: itself or a moment."""
        shape = true_shape(self.parameter)
        if self.length == values.numel() and values.shape == shape:
            return ShardView.whole(values.detach())
        return ShardView.of_range(shape, self.start, values.detach()[self.at : self.at + self.length])


class StateView:
    """All parameters and moments of a module under DeepSpeed, by name.

    Args:
        module: the root module.
        wrapped: DeepSpeed's optimizer.
        optimizer: the optimizer inside it, with existing state.
        stage: ZeRO stage.
        offloaded: whether the tensors that are updated, and their gradients, are in host memory.
    """

    def __init__(
        self, module: nn.Module, wrapped: Any, optimizer: torch.optim.Optimizer, stage: int, offloaded: bool = False
    ) -> None:
        self.module, self.wrapped, self.optimizer, self.stage = module, wrapped, optimizer, stage
        self.offloaded = offloaded
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.masters = {parameter: master for parameters, master in self._tensors() for parameter in parameters}
        """Trainable parameter → the tensor that is updated for it, which may contain none of its elements on this rank."""
        self.pieces: dict[nn.Parameter, Piece | None] = dict.fromkeys(trainable)
        """Trainable parameter → the piece of it that this rank updates; None if there is none."""
        for piece in self._pieces():
            assert piece.parameter in self.pieces and self.pieces[piece.parameter] is None, "a parameter in two pieces"
            self.pieces[piece.parameter] = piece
        self._check()

    def _tensors(self) -> Iterator[tuple[Sequence[nn.Parameter], Tensor]]:
        """Yield each tensor that is updated, and the parameters that it belongs to, in the same order on all ranks."""
        if self.stage == 3:
            yield from internals.sub_groups(self.wrapped)
        elif self.stage > 0:
            yield from ((group.parameters, group.master) for group in internals.flat_groups(self.wrapped))
        elif self.wrapped is not self.optimizer:  # bf16
            yield from (([low], high) for low, high in internals.whole_masters(self.wrapped))
        else:
            yield from (([parameter], parameter) for parameter in self.module.parameters() if parameter.requires_grad)

    def _pieces(self) -> Iterator[Piece]:
        if self.stage in (1, 2):
            yield from self._pieces_of_flat_groups()
            return
        for parameters, master in self._tensors():
            at = 0
            for parameter in parameters:
                start, count = shard(parameter) if self.stage == 3 else (0, parameter.numel())
                if count > 0 or self.stage == 0:
                    yield Piece(parameter, start, master, at, count)
                at += internals.padded_length(parameter) if self.stage == 3 else count
            assert at == master.numel(), (at, master.numel())

    def _pieces_of_flat_groups(self) -> Iterator[Piece]:
        for parameters, master, flat, part in internals.flat_groups(self.wrapped):
            begin = _offset(part, flat)
            end = begin + master.numel()
            for parameter in filter(torch.numel, parameters):
                first = _offset(parameter, flat)
                left, right = max(first, begin), min(first + parameter.numel(), end)
                if left < right:
                    yield Piece(parameter, left - first, master, left - begin, right - left)

    def gradients(self) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
        """Yield each tensor that is updated, and its gradient, between the last backward of a step and DeepSpeed's step.

        The gradient is reduced over ranks and not clipped. It consists of fragments, in the dtype in which DeepSpeed
        accumulates. Their concatenation has the layout of the tensor; if it is shorter, the rest of the gradient is zero.
        """
        if self.offloaded:
            for _, master in self._tensors():
                yield master, [] if master.grad is None else [master.grad]
        elif self.stage == 0:
            for piece in self.pieces.values():
                assert piece is not None
                yield piece.master, [] if piece.parameter.grad is None else [piece.parameter.grad]
        else:
            tensors = [master for _, master in self._tensors()]
            yield from zip(tensors, internals.reduced_gradients(self.wrapped, len(tensors)), strict=True)

    def clear_gradients(self) -> None:
        """Set to zero the gradients that DeepSpeed keeps in place after a step."""
        if self.offloaded:
            for _, master in self._tensors():
                if master.grad is not None:
                    master.grad.zero_()
        if self.stage == 3:
            internals.clear_gradient_buffer(self.wrapped)

    def sharded_state(self) -> dict[str, ShardView]:
        """Return the content of :meth:`jepa_scale.engines.base.Engine.sharded_state`, without the buffers."""
        views = {}
        for name, parameter in self.module.named_parameters():
            if parameter not in self.pieces:
                views[f"model/{name}"] = self._frozen(parameter)
                continue
            piece, master = self.pieces[parameter], self.masters[parameter]
            for key, values in {"model": master, **self._moments(master)}.items():
                nothing = ShardView(true_shape(parameter), torch.float32, [])
                views[f"{key}/{name}"] = nothing if piece is None else piece.shard_view(values)
        return views

    def _moments(self, master: Tensor) -> dict[str, Tensor]:
        state = self.optimizer.state[master]
        return {name: value for name, value in state.items() if torch.is_tensor(value) and value.shape == master.shape}

    def parts_of(self, matrices: Iterable[str]) -> list[tuple[Tensor, list[Part]]]:
        """Locate parameters for :meth:`jepa_scale.optim.MatrixOptimizer.bind`.

        Returns:
            The tensors that are updated for them, each with this rank's parts of the parameters.
        """
        parameters = dict(self.module.named_parameters())
        parts: dict[Tensor, list[Part]] = {}
        for name in matrices:
            of_tensor = parts.setdefault(self.masters[parameters[name]], [])
            if piece := self.pieces[parameters[name]]:
                of_tensor.append(Part(name, piece.start, piece.at, piece.length))
        return list(parts.items())

    def _frozen(self, parameter: nn.Parameter) -> ShardView:
        if self.stage < 3:
            return ShardView.whole(parameter.detach())
        return ShardView.of_range(true_shape(parameter), shard(parameter)[0], internals.local_part(parameter).detach())

    def refresh(self) -> None:
        """Update the parameters from the tensors that the optimizer updates. Collective."""
        if self.stage == 0:
            for piece in self._pieces():
                piece.parameter.data.copy_(piece.master.data)
        else:
            internals.renew_parameters(self.wrapped, self.stage)

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """Return the fp32 master of a trainable parameter, whole on all ranks. Collective."""
        piece = self.pieces[parameter]
        if self.stage == 0:
            assert piece is not None
            return piece.master.detach()
        whole = torch.zeros(true_shape(parameter), dtype=torch.float32, device=self.device)
        if piece is not None:
            mine = piece.master.detach()[piece.at : piece.at + piece.length]
            whole.view(-1)[piece.start : piece.start + piece.length] = mine
        dist.all_reduce(whole, group=dp_group())
        return whole

    @property
    def device(self) -> torch.device:
        return next(iter(self.optimizer.state)).device

    def _check(self) -> None:
        """Check that every element of every trainable parameter is updated by exactly one rank (in stage 0 by all ranks)."""
        counts = torch.tensor([piece.length if piece else 0 for piece in self.pieces.values()], device=self.device)
        if self.stage > 0:
            dist.all_reduce(counts, group=dp_group())
        expected = [true_shape(parameter).numel() for parameter in self.pieces]
        assert counts.tolist() == expected, "the ranks' pieces of a parameter do not add up to the parameter"
        assert all(piece.master in self.optimizer.state for piece in self.pieces.values() if piece)


def _offset(view: Tensor, flat: Tensor) -> int:
    """Return the offset of a view within a flat tensor."""
    apart = view.data_ptr() - flat.data_ptr()
    assert 0 <= apart <= (flat.numel() - view.numel()) * flat.element_size(), "not a view into the flat group"
    return apart // flat.element_size()
