"""The parts of DeepSpeed without a public interface that the engine patches or reads, each with the reason.

Every function was written against the version of DeepSpeed that its docstring names. ``pyproject.toml`` admits no other minor
version. If DeepSpeed changes what a function needs, the test of that function in
``tests/engines/deepspeed/test_internals.py`` fails. No other file imports a submodule of DeepSpeed or touches an attribute
that DeepSpeed does not document.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from jepa_scale.engines.weights import StreamingParameterLoader

if TYPE_CHECKING:
    from jepa_scale.engines.deepspeed.topology import Topology

# ------------------------------------------------------------------------------------------------- before an engine

EXPECTED = ("untested optimizer", "unknown inputs or outputs type", "OVERFLOW!")
"""Words of warnings that are expected: about torch's AdamW and packed batches as arguments, which are intended, and about
skipped steps, which the trainer reports for every engine."""


def drop_expected_warnings() -> None:
    """Limit DeepSpeed's log to warnings, without those of ``EXPECTED``.

    DeepSpeed 0.19.8 sends all messages to ``deepspeed.utils.logger``. Reason: a user cannot act on the dropped messages.
    """
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if not any(f is _is_unexpected for f in logger.filters):
        logger.addFilter(_is_unexpected)


def _is_unexpected(record: logging.LogRecord) -> bool:
    return not any(words in str(record.msg) for words in EXPECTED)


def check_zero_section(zero: Mapping[str, Any]) -> None:
    """Validate the section ``zero_optimization`` of a DeepSpeed JSON, as ``deepspeed.initialize`` will.

    DeepSpeed 0.19.8: ``DeepSpeedZeroConfig`` is a pydantic model that forbids unknown keys. Reason: a wrong key is
    refused before anything is built.

    Raises:
        pydantic.ValidationError: a key is unknown or has a wrong value.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    DeepSpeedZeroConfig(**zero)


def build_no_ops() -> None:
    """Make DeepSpeed treat every compiled op as one that cannot be built.

    DeepSpeed 0.19.8 fills ``deepspeed.ops.__compatible_ops__`` when it is first read. Reason: on a CPU with ninja and a
    compiler it would compile an op for inference, for more than a minute; and twenty processes would search for them.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def allow_fp16_on_a_cpu() -> None:
    """Make DeepSpeed accept fp16 on a CPU.

    DeepSpeed 0.19.8: ``is_fp16_supported`` of the accelerator asks oneDNN for fast products. Reason: whether they are needed
    is decided by :func:`jepa_scale.engines.precision.resolve_precision`, for every engine.
    """
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def silence_memory_reports() -> None:
    """Replace ``see_memory_usage`` in the module of the optimizer of ZeRO-1 in bf16.

    DeepSpeed 0.19.8: ``BF16_Optimizer`` forces a dozen reports while it is built. Reason: each comes after a full
    garbage collection.
    """
    import deepspeed.runtime.bf16_optimizer as bf16_optimizer

    bf16_optimizer.see_memory_usage = lambda *_, **__: None


def count_on_every_rank(module: nn.Module) -> None:
    """Mark all parameters as split by tensor parallelism, so that the norm of ``BF16_Optimizer`` counts them on every rank.

    DeepSpeed 0.19.8 reads the attribute ``tensor_model_parallel`` of a parameter. Reason: on all but the first rank of a
    tensor-parallel group the norm omits parameters without this mark, and fails if none remain. That norm only shows whether
    the gradient is finite; the engine clips by its own norm.
    """
    for parameter in module.parameters():
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def forget_groups() -> None:
    """Reset the globals of ``deepspeed.utils.groups`` that an earlier engine has set.

    DeepSpeed 0.19.8 keeps ``mpu`` and the group of secondary shards there. Reason: an engine uses both if it is given none of
    its own. The engine of an EMA teacher must have no secondary shards: they would be out of date after the first update.
    """
    from deepspeed.utils import groups

    groups.mpu = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def partition(
    module: nn.Module, fill: Callable[[str, nn.Parameter], object], config: dict[str, Any], topology: Topology | None
) -> None:
    """Partition the parameters of a module by ZeRO-3, one after the other. Collective.

    DeepSpeed 0.19.8: ``zero.Init`` iterates once over ``module.parameters(recurse=True)``. Reason: each parameter gets its
    values only when it is reached, so no device has the whole module.

    Args:
        fill: sets the values of a parameter, on the device and in the compute dtype.
        config, topology: the arguments ``config`` and ``mpu`` of ``deepspeed.initialize``.
    """
    import deepspeed

    deepspeed.zero.Init(
        module=StreamingParameterLoader(module, fill),
        data_parallel_group=None if topology is None else topology.get_data_parallel_group(),
        config_dict_or_path=config,
        mpu=topology,
    )


# ------------------------------------------------------------------------------------------- an engine's optimizer


class FlatGroup(NamedTuple):
    """A parameter group of ZeRO 1 or 2.

    Attributes:
        parameters: its trainable parameters, each a view into ``flat``.
        master: fp32 masters of this rank's part, which the optimizer updates.
        flat: the whole group, flattened, in the compute dtype.
        part: this rank's part of ``flat``, a view.
    """

    parameters: Sequence[nn.Parameter]
    master: Tensor
    flat: Tensor
    part: Tensor


def whole_masters(wrapped: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield each trainable parameter and its fp32 master, under stage 0 in bf16.

    DeepSpeed 0.19.8: ``fp16_groups`` and ``fp32_groups`` of ``FP16_UnfusedOptimizer``. Reason: checkpoints hold the
    masters.
    """
    for lows, highs in zip(wrapped.fp16_groups, wrapped.fp32_groups, strict=True):
        yield from zip(lows, highs, strict=True)


def flat_groups(wrapped: Any) -> Iterator[FlatGroup]:
    """Yield the groups of ZeRO 1 and 2.

    DeepSpeed 0.19.8: lists of ``BF16_Optimizer`` (ZeRO-1 in bf16) or of ``DeepSpeedZeroOptimizer``, by group. Reason:
    a parameter's position in a flat group determines which elements of it this rank updates (``_hp_mapping`` is wrong under
    ``round_robin_gradients``).
    """
    z = wrapped
    lists = (
        (z.bf16_groups, z.fp32_groups_flat_partition, z.bf16_groups_flat, z.bf16_partitioned_groups)
        if _is_bf16_optimizer(z)
        else (
            z.bit16_groups,
            z.single_partition_of_fp32_groups,
            z.bit16_groups_flat,
            z.parallel_partitioned_bit16_groups,
        )
    )
    for parameters, master, flat, parts, group in zip(*lists, z.real_dp_process_group, strict=True):
        yield FlatGroup(parameters, master, flat, parts[dist.get_rank(group)])


def sub_groups(wrapped: Any) -> Iterator[tuple[Sequence[nn.Parameter], Tensor]]:
    """Yield the parameters of each sub-group of ZeRO-3, and the fp32 masters of this rank's parts of them, end to end.

    DeepSpeed 0.19.8: ``fp16_groups`` and ``fp32_partitioned_groups_flat``. Reason: checkpoints hold the masters.
    """
    yield from zip(wrapped.fp16_groups, wrapped.fp32_partitioned_groups_flat, strict=True)


def reduced_gradients(wrapped: Any, groups: int) -> Iterator[Sequence[Tensor]]:
    """Yield the gradient of each group's masters, under ZeRO 1 to 3, in consecutive fragments.

    DeepSpeed 0.19.8 has it in ``fp32_groups_gradient_flat_partition`` (``BF16_Optimizer``) or ``averaged_gradients``,
    between the last backward of a step and the step. Reason: gradients are measured before DeepSpeed's step, and clipped in
    it.
    """
    if _is_bf16_optimizer(wrapped):
        yield from ([gradient] for gradient in wrapped.fp32_groups_gradient_flat_partition)
    else:
        yield from (wrapped.averaged_gradients[number] for number in range(groups))


def clear_gradient_buffer(wrapped: Any) -> None:
    """Set to zero the buffer in which ZeRO-3 accumulates gradients.

    DeepSpeed 0.19.8: ``grad_partitions_flat_buffer``. Reason: a parameter without a gradient in the next step would
    get this step's again.
    """
    wrapped.grad_partitions_flat_buffer.zero_()


@contextmanager
def filled_param_groups(wrapped: Any) -> Iterator[None]:
    """Put ZeRO-3's masters into the groups of the wrapped optimizer for the duration of a ``with`` block.

    DeepSpeed 0.19.8: ``_set_fp32_optimizer_param_groups`` and ``_clear_fp32_optimizer_param_groups``. Reason: the groups are
    empty except while DeepSpeed updates one of them, but the optimizer's state is created earlier.
    """
    wrapped._set_fp32_optimizer_param_groups()
    yield
    wrapped._clear_fp32_optimizer_param_groups()


def renew_parameters(wrapped: Any, stage: int) -> None:
    """Copy the masters to the parameters, under ZeRO 1 to 3. Collective.

    DeepSpeed 0.19.8: ``update_lp_params``; under ZeRO-3 ``_reassign_or_swap_out_partitioned_parameters`` for each sub-group,
    between the function that frees gathered parameters and the one that gathers persistent ones again. Reason: a checkpoint
    is read into the masters.
    """
    if stage < 3:
        wrapped.update_lp_params()
        return
    wrapped.checkpoint_event_prologue()
    for number in range(len(wrapped.fp16_groups)):
        wrapped._reassign_or_swap_out_partitioned_parameters(number)
    wrapped.checkpoint_event_epilogue()


def release_gathered(wrapped: Any) -> None:
    """Free the parameters that ZeRO-3 has gathered, prefetched ones included.

    DeepSpeed 0.19.8: ``partition_all_parameters`` of the offload object of an engine without an optimizer. Reason: its trace
    of the next modules may come from another call, and prefetched parameters would be out of date after an update.
    """
    wrapped.partition_all_parameters()


def found_overflow(wrapped: Any) -> bool:
    """Return whether DeepSpeed found in its last step that the gradient is not finite.

    DeepSpeed 0.19.8: ``overflow``, which an optimizer that DeepSpeed does not wrap lacks. Reason: in some stages DeepSpeed
    computes a norm in any case, and may round a very large one to infinity.
    """
    return bool(getattr(wrapped, "overflow", False))


def _is_bf16_optimizer(wrapped: Any) -> bool:
    return hasattr(wrapped, "bf16_groups")


# ------------------------------------------------------------------------------------------------- parameters of ZeRO-3


def true_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a parameter, under ZeRO-3 or not.

    DeepSpeed 0.19.8: ``ds_shape``. Reason: a parameter that is not gathered has no elements.
    """
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def shard(parameter: Any) -> tuple[int, int]:
    """Return the first element of this rank's part of a ZeRO-3 parameter, and the part's length without padding.

    DeepSpeed 0.19.8: ``ds_numel``, ``ds_process_group`` and ``ds_tensor.ds_numel``. Reason: checkpoints address elements by
    their position in the whole parameter.
    """
    each = padded_length(parameter)
    start = min(dist.get_rank(parameter.ds_process_group) * each, parameter.ds_numel)
    return start, min(each, parameter.ds_numel - start)


def padded_length(parameter: Any) -> int:
    """Return the number of elements of a rank's part of a ZeRO-3 parameter, padding included.

    DeepSpeed 0.19.8: ``ds_tensor.ds_numel``. Reason: the parts in the masters are padded.
    """
    return int(parameter.ds_tensor.ds_numel)


def local_part(parameter: Any) -> Tensor:
    """Return this rank's part of a ZeRO-3 parameter in the compute dtype, as a flat view without padding.

    DeepSpeed 0.19.8: ``ds_tensor``. Reason: frozen parameters have no master, and EMA parameters are written in place.
    """
    part: Tensor = parameter.ds_tensor.view(-1)[: shard(parameter)[1]]
    return part


def leaf_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that ZeRO-3 gathers whole.

    DeepSpeed 0.19.8: ``z3_leaf_module`` reads a mark that ``initialize`` sets, by default on three classes of mixtures. Reason:
    the gradients of such a module are reduced at its first backward, so it may run once in a forward.
    """
    from deepspeed.utils import z3_leaf_module

    yield from (part for part in module.modules() if z3_leaf_module(part))


def hide_hooks(module: nn.Module) -> None:
    """Hide the operators of ZeRO-3's hooks from the blocks that recompute selectively.

    DeepSpeed 0.19.8 registers forward hooks on every module; their functions are defined in DeepSpeed's own modules. Reason:
    their memory operations differ from forward to forward, but selective checkpointing compares the operators of two forwards.
    """
    for block in module.modules():
        if getattr(block, "recomputes_selectively", False):
            for part in block.modules():
                for hooks in (part._forward_pre_hooks, part._forward_hooks):
                    for key, hook in hooks.items():
                        if getattr(hook, "__module__", "").startswith("deepspeed"):
                            hooks[key] = _hidden(hook)


def _hidden(hook: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with _disable_current_modes():
            return hook(*args)

    return run
