"""The parts of DeepSpeed without a public interface that the engine patches or reads, each with the reason.

Every function was written against the version of DeepSpeed that its docstring names. ``pyproject.toml`` admits no
other minor version, and ``tests/engines/deepspeed/test_internals.py`` fails by a function's name where what it needs
has changed. No other file imports a submodule of DeepSpeed or touches an attribute that DeepSpeed does not document.
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

from jepa_scale.engines.weights import OneByOne

if TYPE_CHECKING:
    from jepa_scale.engines.deepspeed.topology import Topology

# ------------------------------------------------------------------------------------------------- before an engine

EXPECTED = ("untested optimizer", "unknown inputs or outputs type", "OVERFLOW!")
"""Words of warnings about what is so by design here: torch's AdamW, packed batches as arguments; and of skipped
steps, which the trainer reports for every engine."""


def drop_expected_warnings() -> None:
    """Keep DeepSpeed's log to warnings, without those of ``EXPECTED``.

    DeepSpeed 0.19.8 sends all messages to ``deepspeed.utils.logger``. Reason: the user of a config can act on none of
    these.
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
    """Make DeepSpeed take every compiled op for one that cannot be built.

    DeepSpeed 0.19.8 fills ``deepspeed.ops.__compatible_ops__`` when it is first read. Reason: on a CPU it would
    compile an op for inference, for more than a minute, where it finds ninja and a compiler; and twenty processes
    would look for them.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def silence_memory_reports() -> None:
    """Replace ``see_memory_usage`` in the module of the optimizer of ZeRO-1 in bf16.

    DeepSpeed 0.19.8: ``BF16_Optimizer`` forces a dozen reports while it is built. Reason: each comes after a full
    garbage collection.
    """
    import deepspeed.runtime.bf16_optimizer as bf16_optimizer

    bf16_optimizer.see_memory_usage = lambda *_, **__: None


def count_on_every_rank(module: nn.Module) -> None:
    """Mark all parameters as split by tensor parallelism, so that the norm of ``BF16_Optimizer`` counts them on every
    rank.

    DeepSpeed 0.19.8 reads the attribute ``tensor_model_parallel`` of a parameter. Reason: on the later ranks of a
    tensor-parallel group the norm, which only shows whether the gradient is finite, leaves out what has no such mark,
    and fails where that leaves nothing. (We clip by a norm of our own.)
    """
    for parameter in module.parameters():
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def forget_groups() -> None:
    """Remove what an engine before this one has left in the globals of ``deepspeed.utils.groups``.

    DeepSpeed 0.19.8 keeps ``mpu`` and the group of secondary shards there. Reason: an engine takes both over if it is
    given none of its own. The engine of an EMA teacher must have no secondary shards: they would be out of date after
    the first update.
    """
    from deepspeed.utils import groups

    groups.mpu = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def partition(
    module: nn.Module, fill: Callable[[str, nn.Parameter], object], config: dict[str, Any], topology: Topology | None
) -> None:
    """Have ZeRO-3 take its part of each parameter of a module, one after the other. Collective.

    DeepSpeed 0.19.8: ``zero.Init`` goes once through ``module.parameters(recurse=True)``. Reason: no device has the
    module whole, as each parameter gets its numbers when its turn comes.

    Args:
        fill: gives a parameter its numbers, on the device and in the compute dtype. config, topology: as
            ``deepspeed.initialize`` will get them.
    """
    import deepspeed

    deepspeed.zero.Init(
        module=OneByOne(module, fill),
        data_parallel_group=None if topology is None else topology.get_data_parallel_group(),
        config_dict_or_path=config,
        mpu=topology,
    )


# ------------------------------------------------------------------------------------------- an engine's optimizer


class FlatGroup(NamedTuple):
    """A parameter group of ZeRO 1 or 2.

    Attributes:
        parameters: its trainable parameters, each a view into ``flat``.
        stepped: fp32 masters of this rank's part, which the optimizer steps.
        flat: the whole group, flattened, in the compute dtype.
        part: this rank's part of ``flat``, a view.
    """

    parameters: Sequence[nn.Parameter]
    stepped: Tensor
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
    a parameter's place in a flat group shows which elements of it this rank steps (``_hp_mapping`` is wrong under
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
    for parameters, stepped, flat, parts, group in zip(*lists, z.real_dp_process_group, strict=True):
        yield FlatGroup(parameters, stepped, flat, parts[dist.get_rank(group)])


def sub_groups(wrapped: Any) -> Iterator[tuple[Sequence[nn.Parameter], Tensor]]:
    """Yield the parameters of each sub-group of ZeRO-3, and the fp32 masters of this rank's parts of them, end to end.

    DeepSpeed 0.19.8: ``fp16_groups`` and ``fp32_partitioned_groups_flat``. Reason: checkpoints hold the masters.
    """
    yield from zip(wrapped.fp16_groups, wrapped.fp32_partitioned_groups_flat, strict=True)


def reduced_gradients(wrapped: Any, groups: int) -> Iterator[Sequence[Tensor]]:
    """Yield the gradient of each group's ``stepped``, of ZeRO 1 to 3, in fragments that lie end to end.

    DeepSpeed 0.19.8 has it in ``fp32_groups_gradient_flat_partition`` (``BF16_Optimizer``) or ``averaged_gradients``,
    between the last backward of a step and the step. Reason: gradients are measured before DeepSpeed's step, to be
    clipped in it.
    """
    if _is_bf16_optimizer(wrapped):
        yield from ([gradient] for gradient in wrapped.fp32_groups_gradient_flat_partition)
    else:
        yield from (wrapped.averaged_gradients[number] for number in range(groups))


def clear_gradient_buffer(wrapped: Any) -> None:
    """Set the buffer to zero in which ZeRO-3 collects gradients.

    DeepSpeed 0.19.8: ``grad_partitions_flat_buffer``. Reason: a parameter without a gradient in the next step would
    get this step's again.
    """
    wrapped.grad_partitions_flat_buffer.zero_()


@contextmanager
def filled_param_groups(wrapped: Any) -> Iterator[None]:
    """Put what ZeRO-3 steps into the groups of our optimizer for the length of a ``with``.

    DeepSpeed 0.19.8: ``_set_fp32_optimizer_param_groups`` and ``_clear_fp32_optimizer_param_groups``. Reason: the
    groups are empty but while it steps one of them, and the state of our optimizer is created beforehand.
    """
    wrapped._set_fp32_optimizer_param_groups()
    yield
    wrapped._clear_fp32_optimizer_param_groups()


def renew_parameters(wrapped: Any, stage: int) -> None:
    """Copy the masters to the parameters, under ZeRO 1 to 3. Collective.

    DeepSpeed 0.19.8: ``update_lp_params``; of ZeRO-3 ``_reassign_or_swap_out_partitioned_parameters`` of each
    sub-group, between the two that free what is gathered and gather what stays gathered. Reason: a checkpoint is read
    into the masters.
    """
    if stage < 3:
        wrapped.update_lp_params()
        return
    wrapped.checkpoint_event_prologue()
    for number in range(len(wrapped.fp16_groups)):
        wrapped._reassign_or_swap_out_partitioned_parameters(number)
    wrapped.checkpoint_event_epilogue()


def release_gathered(wrapped: Any) -> None:
    """Free what ZeRO-3 has gathered, also ahead of its use.

    DeepSpeed 0.19.8: ``partition_all_parameters`` of the offload object that an engine without an optimizer has.
    Reason: its trace of what comes next may be another call's, and what it has gathered ahead would be out of date
    after an update.
    """
    wrapped.partition_all_parameters()


def found_overflow(wrapped: Any) -> bool:
    """Whether DeepSpeed has itself found that the gradient is not finite, in its last step.

    DeepSpeed 0.19.8: ``overflow``, which our optimizer has not where it is not wrapped. Reason: in some stages it
    takes a norm in any case, and may round one to infinity that is almost infinite.
    """
    return bool(getattr(wrapped, "overflow", False))


def _is_bf16_optimizer(wrapped: Any) -> bool:
    return hasattr(wrapped, "bf16_groups")


# ------------------------------------------------------------------------------------------------- parameters of ZeRO-3


def true_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, of ZeRO-3 or not.

    DeepSpeed 0.19.8: ``ds_shape``. Reason: one that is not gathered has no elements.
    """
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def shard(parameter: Any) -> tuple[int, int]:
    """The first element of this rank's part of a parameter of ZeRO-3, and the part's length without the padding of
    the last one.

    DeepSpeed 0.19.8: ``ds_numel``, ``ds_process_group`` and ``ds_tensor.ds_numel``. Reason: checkpoints hold elements
    by place.
    """
    each = padded_length(parameter)
    start = min(dist.get_rank(parameter.ds_process_group) * each, parameter.ds_numel)
    return start, min(each, parameter.ds_numel - start)


def padded_length(parameter: Any) -> int:
    """Elements of a rank's part of a parameter of ZeRO-3, with the padding.

    DeepSpeed 0.19.8: ``ds_tensor.ds_numel``. Reason: parts lie in the masters with it.
    """
    return int(parameter.ds_tensor.ds_numel)


def local_part(parameter: Any) -> Tensor:
    """This rank's part of a parameter of ZeRO-3 in the compute dtype, flat and without padding: a view.

    DeepSpeed 0.19.8: ``ds_tensor``. Reason: frozen parameters have no master; an EMA teacher is written where it is
    read.
    """
    part: Tensor = parameter.ds_tensor.view(-1)[: shard(parameter)[1]]
    return part


def hide_hooks(module: nn.Module) -> None:
    """Hide the operators of ZeRO-3's hooks from the blocks that recompute selectively.

    DeepSpeed 0.19.8 registers forward hooks on every module, from functions of its own modules. Reason: what they do
    with memory is not the same in each forward, and a selective checkpoint compares the operators of two of them.
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
