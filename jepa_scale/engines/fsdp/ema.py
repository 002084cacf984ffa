"""A frozen copy of parts of an FSDP2 engine's model, with the same shards of the same parameters."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from jepa_scale.checkpoint.shard_view import ShardView
from jepa_scale.engines.base import ShardedEMA, persistent_buffers
from jepa_scale.engines.weights import replace


class FSDPEMA(ShardedEMA):
    """A copy whose own fp32 shards are the EMA parameters; each of N ranks only needs memory for 1/N of them.

    What is frozen in the student has the student's dtype.

    A forward gathers the shards, in the compute dtype, and frees the gathered parameters. The root also frees its own, which
    it does not by default: otherwise its next forward would use the gathered weights from before the update of the shards.

    Args:
        module: the copy.
        student: the engine's module, with sharded parameters.
        mesh, policy: those of the engine.
    """

    def __init__(self, module: nn.Module, student: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
        self.module = module.requires_grad_(False).eval()
        masters = dict(student.named_parameters(remove_duplicate=False))
        for name, parameter in module.named_parameters():
            replace(parameter, torch.empty_like(parameter, dtype=masters[name].dtype, device="meta"))
        alike = {name for name, part in student.named_modules() if isinstance(part, FSDPModule)}
        parts = [part for name, part in module.named_modules() if name in alike and name and _runs(part)]
        for part in [*reversed(parts), module]:  # children before parents
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        allocate(module, torch.device(mesh.device_type))

        self._averages: list[DTensor] = []
        self._sources: list[DTensor] = []
        for name, parameter in module.named_parameters():
            master = masters[name]
            assert isinstance(parameter, DTensor) and isinstance(master, DTensor), name
            assert parameter.shape == master.shape and parameter.placements == master.placements, name
            parameter.to_local().copy_(master.to_local())
            if master.requires_grad:
                self._averages.append(parameter)
                self._sources.append(master)
        self._groups = [_group(part) for part in module.modules() if isinstance(part, FSDPModule)]

    # Looked up each time: FSDP2 may replace a shard's storage in the first forward, but keeps the DTensor.

    @property
    def ema_parameters(self) -> list[Tensor]:
        return [shard._local_tensor for shard in self._averages]

    @property
    def sources(self) -> list[Tensor]:
        return [shard._local_tensor for shard in self._sources]

    def refresh(self) -> None:
        for group in filter(None, self._groups):
            # Every forward records its order for a backward that never runs, in lists that would grow without end.
            group._post_forward_indices.clear()
            getattr(group.comm_ctx, "post_forward_order", []).clear()  # exists from the first forward on
            assert group.is_sharded, "a forward of the copy has left parameters gathered"

    def sharded_state(self) -> dict[str, ShardView]:
        views = {name: ShardView.whole(buffer) for name, buffer in persistent_buffers(self.module)}
        with torch.no_grad():
            return views | {n: ShardView.of_dtensor(cast(DTensor, p)) for n, p in self.module.named_parameters()}


def allocate(module: nn.Module, device: torch.device) -> None:
    """Allocate the shards of a module that was sharded without data, and move its buffers to the device."""
    module._apply(lambda x: torch.zeros_like(x, device=device) if x.is_meta else x.to(device))


def _runs(module: nn.Module) -> bool:
    """Return whether a module has a forward. A plain container has none, so its hooks would never gather its parameters."""
    return type(module).forward is not nn.Module.forward


def _group(part: FSDPModule) -> Any:
    """Return FSDP2's parameter group of a module, or None if the module has no parameters of its own."""
    return part._get_fsdp_state()._fsdp_param_group
