"""The DeepSpeed engine: ZeRO stages 0, 1, 2 and 3.

The package ``deepspeed`` is imported only when an engine is built or a config is checked, so FSDP2 runs without it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jepa_scale.checkpoint.shard_view import ShardView
from jepa_scale.config.loading import find_file
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
from jepa_scale.engines.clip import Range, cut, join
from jepa_scale.engines.deepspeed import internals
from jepa_scale.engines.deepspeed.ema import PartitionedEMA, ReplicatedEMA
from jepa_scale.engines.deepspeed.state import StateView
from jepa_scale.engines.deepspeed.topology import topology_of
from jepa_scale.engines.precision import compute_dtype
from jepa_scale.engines.weights import Weights, replace, strip_all
from jepa_scale.optim import MatrixOptimizer, build_optimizer
from jepa_scale.utils.errors import InputError

OWNED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size and train.accumulation",
    "gradient_accumulation_steps": "train.accumulation",
    "managed_gradient_accumulation": "train.accumulation",
    "optimizer": "the section optim",
    "scheduler": "the section optim",
    "zero_allow_untested_optimizer": "the section optim",
    "zero_force_ds_cpu_optimizer": "the section optim",
    "gradient_clipping": "optim.clip_norm",
    "bf16": "engine.precision",
    "bfloat16": "engine.precision",
    "fp16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "prescale_gradients": "the engine, which sums gradients",
    "gradient_predivide_factor": "the engine, which sums gradients",
    "gradient_allreduce_op": "the engine, which sums gradients",
    "steps_per_print": "train.log_every",
}
"""Keys of a DeepSpeed JSON that the engine fills in → the setting of jepa_scale that replaces each."""


def validate_deepspeed_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON and check it, before anything is built.

    Raises:
        InputError: the file is missing or no JSON object, DeepSpeed does not accept its ``zero_optimization``, or it sets
            a key of ``OWNED``. The message is one line with the file and the key.
    """
    file = find_file(path, "engine.deepspeed")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{file}, line {error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(config, dict):
        raise InputError(f"{file}: must hold a JSON object, not {type(config).__name__}")
    for key in config:
        if key in OWNED:
            raise InputError(f"{file}: remove the key {key!r}; it is set by {OWNED[key]}")
    zero = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else zero
    if not isinstance(zero, dict) or type(stage) is not int or stage not in (0, 1, 2, 3):
        raise InputError(f"{file}: zero_optimization.stage must be 0, 1, 2 or 3, not {json.dumps(stage)}")
    _check_zero_section(file, zero)
    _check_offload(file, zero)
    return config


def _check_offload(file: Path, zero: dict[str, Any]) -> None:
    for part in ("cpu_offload", "cpu_offload_param", "zenflow"):
        if zero.get(part):
            raise InputError(
                f"{file}: zero_optimization.{part}: is not supported; use offload_optimizer and offload_param"
            )
    for part, least in (("offload_optimizer", 2), ("offload_param", 3)):
        target = (zero.get(part) or {}).get("device", "none")
        if target == "none":
            continue
        if target != "cpu":
            raise InputError(
                f"{file}: zero_optimization.{part}.device: {target!r} is not supported, because checkpoints would lack "
                "the state on it; use cpu"
            )
        if zero["stage"] < least:
            raise InputError(f"{file}: zero_optimization.{part}: needs stage {least}; set that, or remove the section")
        if zero[part].get("ratio", 1.0) != 1.0:
            raise InputError(
                f"{file}: zero_optimization.{part}.ratio: must be 1, as a part cannot be offloaded; remove it"
            )


def _check_zero_section(file: Path, zero: dict[str, Any]) -> None:
    from pydantic import ValidationError

    _import_deepspeed()
    try:
        internals.check_zero_section({key: value for key, value in zero.items() if value != "auto"})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["zero_optimization", *map(str, first["loc"])])
        raise InputError(f"{file}: {key}: {first['msg'][0].lower() + first['msg'][1:]}") from None


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed searches for an accelerator and warns
    try:
        import deepspeed
    except ImportError as error:
        raise InputError(f"engine.name: deepspeed cannot be imported ({error}); install it or use fsdp") from None
    internals.drop_expected_warnings()
    return deepspeed


class DeepSpeedEngine(Engine):
    """Engine that uses DeepSpeed ZeRO, with an optimizer of :mod:`jepa_scale.optim` on its flat fp32 partitions."""

    name = "deepspeed"

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[dict[str, Any]],
        optim_options: OptimConfig,
        options: EngineOptions,
        ranks: ParallelContext,
        weights: Weights,
    ):
        assert options.deepspeed is not None, "EngineOptions.deepspeed: the DeepSpeed engine needs a JSON"
        super().__init__(module, options, ranks)
        config = validate_deepspeed_config(options.deepspeed)
        self._zero = config["zero_optimization"]
        self.stage = self._zero["stage"]
        # whether masters, moments and gradients are in host memory
        self._offloads = (self._zero.get("offload_optimizer") or {}).get("device", "none") != "none"
        self.layout = f"ZeRO-{self.stage} {options.precision}{' offloaded' if self._offloads else ''}"
        self._bf16, self._fp16 = options.precision == "bf16", options.precision == "fp16"
        self._dtype = compute_dtype(options.precision)

        deepspeed = _import_deepspeed()
        os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))  # DeepSpeed requires it
        if ranks.device.type == "cpu":
            internals.build_no_ops()
            if self._fp16:
                internals.allow_fp16_on_a_cpu()
        if self.stage == 1 and self._bf16:
            internals.silence_memory_reports()
            internals.count_on_every_rank(module)
        filled, topology = self._filled(config), topology_of(ranks)

        def fill(name: str, parameter: nn.Parameter) -> None:
            replace(parameter, weights.take_part(name, parameter, self._dtype, options.split.get(name)))

        if self.stage == 3:
            internals.partition(module, fill, filled, topology)
        else:
            for name, parameter in module.named_parameters():
                fill(name, parameter)
        self.optimizer = build_optimizer(groups, optim_options)
        self._peak_lrs = [group["lr"] for group in self.optimizer.param_groups]
        # In stage 0 with bf16, DeepSpeed takes an optimizer step with zero gradients during setup: make it a no-op.
        skip_if_not_finite(self.optimizer, torch.full((), torch.inf, device=ranks.device))
        self.ds, *_ = deepspeed.initialize(
            model=module,
            optimizer=self.optimizer,
            config=filled,
            dist_init_required=False,
            mpu=topology,
        )
        self._ran: set[nn.Module] = set()  # leaf modules of ZeRO-3 in the present forward
        self._in_forward = False
        if self.stage == 3:
            internals.hide_hooks(module)
            for leaf in internals.leaf_modules(module):
                leaf.register_forward_pre_hook(self._refuse_a_second_run)
        with internals.filled_param_groups(self.ds.optimizer) if self.stage == 3 else nullcontext():
            masters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            buffers = [parameter.grad for parameter in masters]
            create_optimizer_state(self.optimizer)
        if self._offloads:  # DeepSpeed writes the gradients into these buffers
            for parameter, buffer in zip(masters, buffers, strict=True):
                parameter.grad = buffer
        self._view = StateView(module, self.ds.optimizer, self.optimizer, self.stage, self._offloads)
        if isinstance(self.optimizer, MatrixOptimizer):
            self.optimizer.bind(self._view.parts_of(self.optimizer.matrices), replicated=self.stage == 0)
        self._ranges = self._clip_ranges()
        parameters = dict(module.named_parameters())
        pieces = [(limits, self._view.pieces[parameters[name]]) for name, limits in options.bounds.items()]
        self._bounded = [(limits, piece) for limits, piece in pieces if piece]
        # In these hooks, at all stages, DeepSpeed has the fp32 gradients of the tensors that it updates next.
        self.optimizer.register_step_pre_hook(self._clip)
        self.optimizer.register_step_post_hook(self._keep_in_bounds)  # before DeepSpeed copies masters to parameters

    def _filled(self, user: dict[str, Any]) -> dict[str, Any]:
        config = dict(user)
        config["train_micro_batch_size_per_gpu"] = 1  # only for DeepSpeed's reports; batches are packed
        config["gradient_accumulation_steps"] = self.options.accumulation
        config["gradient_clipping"] = 0.0  # the engine clips, as DeepSpeed has no clip groups
        config["bf16"] = {"enabled": self._bf16}
        # a constant scale of 1: the engine scales the loss itself, as it clips by norms without the scale
        config["fp16"] = {"enabled": self._fp16, "loss_scale": 1.0}
        config["zero_allow_untested_optimizer"] = True
        config["zero_force_ds_cpu_optimizer"] = False
        zero = config["zero_optimization"] = dict(config["zero_optimization"])
        if self.stage == 1 and self.options.accumulation > 1:
            # With overlap, DeepSpeed reduces only gradients whose hooks ran in the last micro-batch: a parameter that only
            # an earlier micro-batch used would lose its gradient.
            zero["overlap_comm"] = False
        if not self._offloads and (self.stage == 2 or (self.stage == 1 and not self._bf16)):
            # DeepSpeed's norm costs a host sync and only serves to skip steps that skip_if_not_finite already skips. In
            # other cases it cannot be turned off.
            zero.setdefault("compute_grad_norm", False)
        if self._bf16 or self._fp16:
            config.setdefault("communication_data_type", "fp32")
            if self.stage > 0:
                config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
        config.setdefault("timers", {"throughput": {"enabled": False}})  # it synchronises the device
        return config

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        self._ran, self._in_forward = set(), torch.is_grad_enabled()
        try:
            return self.ds(*args, **kwargs)
        finally:
            self._in_forward = False

    def _refuse_a_second_run(self, leaf: nn.Module, *_: Any) -> None:
        """Refuse a leaf module that runs twice in a forward: its gradients are reduced at its first backward, and lost then."""
        if self._in_forward and leaf in self._ran:
            raise InputError(
                f"engine.deepspeed: ZeRO-3 runs a {type(leaf).__name__} once in a forward, and this objective runs it twice; use "
                "FSDP2 (engine.name=fsdp) or a ZeRO stage below 3"
            )
        self._ran.add(leaf)

    def _backward(self, loss: Tensor, last: bool) -> None:
        # Every stage averages over ranks, and in ZeRO-3 that cannot be changed. Multiplying by the number of data-parallel
        # ranks restores the sum, exactly if that number is a power of two. The division by the accumulation is turned off.
        self.ds.backward(loss * self.ranks.dp_size, scale_wrt_gas=False)
        if not last:
            self.ds.step()  # counts the micro-batch, so that the boundary falls on the last one

    def _step(self) -> Tensor:
        assert self.ds.is_gradient_accumulation_boundary()
        pieces = (
            piece
            for master, fragments in self._view.gradients()
            for piece in cut(fragments, self._ranges.get(master, []))
        )
        copies = self.ranks.dp_size if self.stage == 0 else 1
        norm = self._measure(self._clipping.sort(pieces), copies)
        skip_if_not_finite(self.optimizer, norm)
        self.ds.step()
        if internals.found_overflow(self.ds.optimizer):
            norm = norm.masked_fill(norm.isfinite(), torch.inf)
        self._view.clear_gradients()  # else a parameter without gradient in the next step would reuse this step's
        return norm

    def _clip_ranges(self) -> dict[Tensor, list[Range]]:
        """Return, for each tensor that this rank updates, the ranges of its elements and their clip groups."""
        ranges: dict[Tensor, list[Range]] = {}
        for name, parameter in self.module.named_parameters():
            if piece := self._view.pieces.get(parameter):
                part = Range(self._clipping.group_of(name), piece.at, piece.at + piece.length)
                ranges.setdefault(piece.master, []).append(part)
        return {master: join(parts) for master, parts in ranges.items()}

    @torch.no_grad()
    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Clip the gradients of the tensors that the optimizer updates next: all, or one group or sub-group of ZeRO."""
        parts = (
            (group, master.grad if end - begin == master.numel() else master.grad[begin:end])
            for of_group in optimizer.param_groups
            for master in of_group["params"]
            if master.grad is not None
            for group, begin, end in self._ranges.get(master, [])
        )
        self._clipping.scale(self._clipping.sort(parts))

    @torch.no_grad()
    def _keep_in_bounds(self, *_: Any) -> None:
        """Clamp this rank's part of the masters; see :attr:`jepa_scale.engines.base.EngineOptions.bounds`."""
        for (low, high), piece in self._bounded:
            piece.master.detach().view(-1)[piece.at : piece.at + piece.length].clamp_(low, high)

    @torch.no_grad()
    def sharded_state(self) -> dict[str, ShardView]:
        buffers = {f"model/{name}": ShardView.whole(buffer) for name, buffer in persistent_buffers(self.module)}
        return buffers | self._view.sharded_state()

    @torch.no_grad()
    def post_load(self, updates: int) -> None:
        self._set_updates(updates)
        self._view.refresh()

    @torch.no_grad()
    def full_state(self) -> dict[str, Tensor]:
        return whole_state(self.module, self._whole, keep=self.ranks.is_main)

    @torch.no_grad()
    def shard_ema(self, module: nn.Module) -> ShardedEMA:
        module = module.requires_grad_(False).eval()
        strip_all(module)
        module._apply(lambda x: x if x.is_meta else x.to(self.ranks.device))  # moves the buffers
        if self.stage == 3:
            return PartitionedEMA(module, self._view, self._dtype, self._zero, self.ranks)
        return ReplicatedEMA(module, self._view, self._dtype, self.ranks.device)

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        """Return one parameter, gathered from all ranks."""
        if parameter.requires_grad:
            return self._view.whole(parameter)
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
            return parameter.detach().clone()
