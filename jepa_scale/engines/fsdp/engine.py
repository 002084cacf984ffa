"""The FSDP2 engine (``torch.distributed.fsdp.fully_shard``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from jepa_scale.checkpoint.shard_view import ShardView
from jepa_scale.config.schema import OptimConfig
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.engines.base import (
    Engine,
    EngineOptions,
    ShardedEMA,
    create_optimizer_state,
    persistent_buffers,
    skip_if_not_finite,
    whole_state,
)
from jepa_scale.engines.fsdp.ema import FSDPEMA, allocate
from jepa_scale.engines.precision import compute_dtype
from jepa_scale.engines.weights import Weights, cast_frozen, part_of
from jepa_scale.optim import MatrixOptimizer, Part, build_optimizer


class FSDPEngine(Engine):
    """Engine that shards parameters, gradients and moments as DTensors: fp32 where trained, frozen ones in the compute dtype.

    They are sharded over all ranks, or over the ranks of each replica (HSDP). In bf16 the gathered parameters are bf16 and
    gradients are reduced in fp32. FSDP2 wants one dtype of the trainable parameters of a unit alone (pytorch/pytorch#154103),
    and gathers frozen ones of the compute dtype without a cast. Inputs are not cast, as under DeepSpeed, so that a model runs on both engines or on
    neither.
    """

    name = "fsdp"

    def __init__(
        self,
        module: nn.Module,
        shard: Sequence[nn.Module],
        groups: Sequence[dict[str, Any]],
        optim_options: OptimConfig,
        options: EngineOptions,
        ranks: ParallelContext,
        weights: Weights,
    ):
        super().__init__(module, options, ranks)
        self.layout = f"FSDP2 {options.precision}"
        names = {parameter: name for name, parameter in module.named_parameters()}
        group_names = [[names[p] for p in group["params"]] for group in groups]

        mesh = _mesh(ranks, options.replicas)
        half = options.precision != "fp32"
        policy = MixedPrecisionPolicy(
            param_dtype=compute_dtype(options.precision) if half else None,
            reduce_dtype=torch.float32 if half else None,
            cast_forward_inputs=False,
        )
        self._mesh, self._policy = mesh, policy
        cast_frozen(module, compute_dtype(options.precision))
        for part in [*shard, module]:
            fully_shard(part, mesh=mesh, mp_policy=policy)
        allocate(module, ranks.device)
        for sharded_part in self._fsdp_modules():
            if mesh.size() == 1:
                sharded_part.set_custom_reduce_scatter(_NothingToReduce())  # type: ignore[arg-type]
            else:  # the two lines together give a plain sum over ranks, on gloo too
                sharded_part.set_gradient_divide_factor(1.0)
                sharded_part.set_force_sum_reduction_for_comms(True)

        sharded = dict(module.named_parameters())  # fully_shard has replaced the module's parameters
        groups = [
            {**group, "params": [sharded[name] for name in of_group]}
            for group, of_group in zip(groups, group_names, strict=True)
        ]
        self._fill(sharded, weights)
        self._trainable = {name: p for name, p in sharded.items() if p.requires_grad}
        self.optimizer = build_optimizer(groups, optim_options)
        self._peak_lrs = [group["lr"] for group in self.optimizer.param_groups]
        create_optimizer_state(self.optimizer)
        if isinstance(self.optimizer, MatrixOptimizer):
            self.optimizer.bind([(sharded[n], [_rows(n, sharded[n])]) for n in self.optimizer.matrices])

    @torch.no_grad()
    def _fill(self, sharded: Mapping[str, nn.Parameter], weights: Weights) -> None:
        """Set each parameter's initial values. Beside the shards, a device holds one whole parameter at a time."""
        for name, parameter in sharded.items():
            view = ShardView.of_dtensor(cast(DTensor, parameter))
            mine = part_of(weights.take(name, parameter.dtype), view.shape, self.options.split.get(name))
            for offsets, block in view.parts:
                block.copy_(mine[tuple(slice(at, at + n) for at, n in zip(offsets, block.shape, strict=True))])

    def _fsdp_modules(self) -> list[FSDPModule]:
        return [m for m in self.module.modules() if isinstance(m, FSDPModule)]

    def _backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    @torch.no_grad()
    def _step(self) -> Tensor:
        for parameter in self._trainable.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        shards = self._clipping.sort(
            (self._clipping.group_of(name), cast(DTensor, parameter.grad).to_local())
            for name, parameter in self._trainable.items()
        )
        norm = self._measure(shards, copies=self.options.replicas)
        self._clipping.scale(shards)
        skip_if_not_finite(self.optimizer, norm)
        self.optimizer.step()
        for name, (low, high) in self.options.bounds.items():
            cast(DTensor, self._trainable[name]).to_local().clamp_(low, high)
        self.optimizer.zero_grad()
        return norm

    @torch.no_grad()
    def sharded_state(self) -> dict[str, ShardView]:
        self._reshard()
        views = {f"model/{name}": ShardView.whole(buffer) for name, buffer in persistent_buffers(self.module)}
        for name, parameter in self.module.named_parameters():
            views[f"model/{name}"] = ShardView.of_dtensor(cast(DTensor, parameter))
            for moment, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, DTensor) and value.shape == parameter.shape:
                    views[f"{moment}/{name}"] = ShardView.of_dtensor(value)
        return views

    @torch.no_grad()
    def post_load(self, updates: int) -> None:
        self._reshard()
        self._set_updates(updates)

    @torch.no_grad()
    def full_state(self) -> dict[str, Tensor]:
        self._reshard()
        return whole_state(self.module, lambda p: cast(DTensor, p).full_tensor(), keep=self.ranks.is_main)

    @torch.no_grad()
    def shard_ema(self, module: nn.Module) -> ShardedEMA:
        self._reshard()
        return FSDPEMA(module, self.module, self._mesh, self._policy)

    def _reshard(self) -> None:
        """Free gathered parameters.

        An evaluation leaves the root's parameters gathered. They would hide the shards and be used by the next forward.
        """
        for part in self._fsdp_modules():
            part.reshard()


class _NothingToReduce:
    """Reduce-scatter of a single rank, whose output is its input.

    FSDP2 allocates the two buffers one after the other and then copies the one into the other. Here both are the same tensor,
    so that the copy does nothing.
    """

    def __init__(self) -> None:
        self._input: Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        buffer, self._input = self._input, None
        if buffer is None:
            buffer = self._input = torch.empty(*size, dtype=dtype, device=device)
        assert buffer.shape == torch.Size(size) and buffer.dtype == dtype
        return buffer

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a single rank has nothing to reduce")


def _mesh(ranks: ParallelContext, replicas: int) -> DeviceMesh:
    """Return the mesh of the data-parallel ranks, with one dimension or with replicas × shards.

    The tensor-parallel group is not a dimension of the mesh: FSDP2 treats a rank's part of a split parameter as an ordinary
    parameter.
    """
    kind = ranks.device.type
    if ranks.tp_size == 1 and replicas == 1:
        return init_device_mesh(kind, (ranks.world_size,), mesh_dim_names=("shard",))
    shape = (replicas, ranks.dp_size // replicas, ranks.tp_size)
    mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard", "tp"))
    return mesh["shard"] if replicas == 1 else mesh["replicate", "shard"]


def _rows(name: str, matrix: nn.Parameter) -> Part:
    """Return this rank's rows of a matrix, as a part."""
    tensor = cast(DTensor, matrix)
    (rows, cols), (first, _) = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return Part(name, first * cols, 0, rows * cols)
