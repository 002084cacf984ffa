"""A frozen copy beside an FSDP2 engine: the same shards of the same parameters."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from jepa_scale.checkpoint.boxes import Boxes
from jepa_scale.engines.base import ShardedCopy, persistent_buffers
from jepa_scale.engines.weights import strip_all


class FSDPCopy(ShardedCopy):
    """The averages are the copy's own fp32 shards: 1/N of fp32 on each of N ranks is all the memory that it takes.

    A forward gathers from the shards, in the compute dtype, and frees what it has gathered. The root frees too, which it
    would not by default: its next forward would use the weights of the last one, whatever has become of the shards.

    Args:
        module: the copy. student: the engine's module, its parameters sharded. mesh, policy: the engine's.
    """

    def __init__(self, module: nn.Module, student: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
        self.module = module.requires_grad_(False).eval()
        strip_all(module)
        alike = {name for name, part in student.named_modules() if isinstance(part, FSDPModule)}
        parts = [part for name, part in module.named_modules() if name in alike and name and _runs(part)]
        for part in [*reversed(parts), module]:  # children before parents
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        allocate(module, torch.device(mesh.device_type))

        masters = dict(student.named_parameters(remove_duplicate=False))
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

    # Looked up anew each time: FSDP2 may replace a shard's storage in the first forward, the DTensor stays.

    @property
    def averages(self) -> list[Tensor]:
        return [shard._local_tensor for shard in self._averages]

    @property
    def sources(self) -> list[Tensor]:
        return [shard._local_tensor for shard in self._sources]

    def refresh(self) -> None:
        for group in filter(None, self._groups):
            # Every forward notes its order for a backward that never comes: a list that would grow as long as we train.
            group._post_forward_indices.clear()
            getattr(group.comm_ctx, "post_forward_order", []).clear()  # there from the first forward on
            assert group.is_sharded, "a forward of the copy has left parameters gathered"

    def state(self) -> dict[str, Boxes]:
        boxes = {name: Boxes.whole(buffer) for name, buffer in persistent_buffers(self.module)}
        with torch.no_grad():
            return boxes | {n: Boxes.of_dtensor(cast(DTensor, p)) for n, p in self.module.named_parameters()}


def allocate(module: nn.Module, device: torch.device) -> None:
    """Memory for the shards of a module that was sharded without numbers; and the device for its buffers."""
    module._apply(lambda x: torch.zeros_like(x, device=device) if x.is_meta else x.to(device))


def _runs(module: nn.Module) -> bool:
    """Whether a module has a forward: one that has none, a plain container, is never there to gather its parameters."""
    return type(module).forward is not nn.Module.forward


def _group(part: FSDPModule) -> Any:
    """FSDP2's parameter group of a module; None if the module has no parameters of its own."""
    return part._get_fsdp_state()._fsdp_param_group
