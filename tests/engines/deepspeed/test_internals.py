"""Each of DeepSpeed's internals that the engine uses is there: a test by the name of each function of ``internals.py``.

What a module or class shows is checked on it; what an engine alone has, on small engines at one rank.
"""

from __future__ import annotations

import ast
import inspect
import re
import traceback
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.engines.deepspeed import internals
from jepa_scale.engines.deepspeed.engine import _import_deepspeed
from tests.distributed import toy
from tests.distributed.launch import run_ranks

OF_AN_ENGINE = {
    "whole_masters": ("zero0", "bf16"),
    "flat_groups": ("zero1", "bf16"),
    "flat_groups of ZeRO-1 in fp32": ("zero1", "fp32"),
    "flat_groups of ZeRO-2": ("zero2", "fp32"),
    "reduced_gradients": ("zero1", "bf16"),
    "reduced_gradients of ZeRO-2": ("zero2", "fp32"),
    "reduced_gradients of ZeRO-3": ("zero3", "fp32"),
    "renew_parameters": ("zero1", "bf16"),
    "renew_parameters of ZeRO-2": ("zero2", "fp32"),
    "renew_parameters of ZeRO-3": ("zero3", "bf16"),
    "sub_groups": ("zero3", "bf16"),
    "clear_gradient_buffer": ("zero3", "fp32"),
    "filled_param_groups": ("zero3", "fp32"),
    "release_gathered": ("zero3", "fp32"),
    "found_overflow": ("zero2", "fp32"),
    "found_overflow of ZeRO-3": ("zero3", "fp32"),
    "true_shape": ("zero3", "fp32"),
    "shard": ("zero3", "fp32"),
    "padded_length": ("zero3", "fp32"),
    "local_part": ("zero3", "bf16"),
    "hide_hooks": ("zero3", "fp32"),
}
"""What is checked on an engine → its stage and precision; the first word is the function's name."""


def module(name: str) -> ModuleType:
    _import_deepspeed()
    return import_module(f"deepspeed.{name}")


def test_every_internal_has_its_test():
    functions = {
        name
        for name, found in vars(internals).items()
        if inspect.isfunction(found) and found.__module__ == internals.__name__ and not name.startswith("_")
    }
    tested = {name.partition(" ")[0] for name in OF_AN_ENGINE} | {
        name.removeprefix("test_") for name in globals() if name.startswith("test_")
    }
    assert functions <= tested, functions - tested
    for name in functions:
        assert re.search(r"DeepSpeed \d+\.\d+\.\d+.*Reason:\s", getattr(internals, name).__doc__, re.DOTALL), name


def test_the_version_that_is_admitted():
    text = (Path(__file__).resolve().parents[3] / "pyproject.toml").read_text()
    least, below = (
        [int(n) for n in bound.split(".")] for bound in re.search(r'"deepspeed>=([\d.]+),<([\d.]+)"', text).groups()
    )
    installed = [int(n) for n in version("deepspeed").split(".")[:3]]
    assert least <= installed and installed[: len(below)] < below
    named = {
        tuple(map(int, v.split("."))) for v in re.findall(r"DeepSpeed (\d+\.\d+\.\d+)", inspect.getsource(internals))
    }
    assert all(least <= list(v) and list(v)[: len(below)] < below for v in named)


# -- modules and classes ----------------------------------------------------------------------------------------------


def test_drop_expected_warnings(monkeypatch):
    where = ("runtime.engine", "runtime.zero.parameter_offload", "runtime.fp16.loss_scaler")
    for words, name in zip(internals.EXPECTED, where, strict=True):
        assert words in inspect.getsource(module(name)), f"{words!r} is no message of {name}"
    logger = module("utils").logger
    monkeypatch.setattr(logger, "filters", [])  # quiet_libraries may have added one
    internals.drop_expected_warnings()
    internals.drop_expected_warnings()
    assert logger.filters.count(internals._is_unexpected) == 1
    for words, kept in ((internals.EXPECTED[0], False), ("something else", True)):
        assert bool(logger.filter(logger.makeRecord("", 30, "", 0, words, (), None))) == kept


def test_check_zero_section():
    module("runtime.zero.config")
    internals.check_zero_section({"stage": 2, "overlap_comm": True})
    with pytest.raises(ValidationError):
        internals.check_zero_section({"stage": 2, "no_such_key": 1})


def test_build_no_ops(monkeypatch):
    ops = module("ops")
    assert 'if name == "__compatible_ops__"' in inspect.getsource(ops.__getattr__)
    assert "deepspeed.ops.__compatible_ops__.get(" in inspect.getsource(module("comm.torch").build_shm_op)
    monkeypatch.setitem(vars(ops), "__compatible_ops__", {"an_op": True})
    internals.build_no_ops()
    assert ops.__compatible_ops__ == {}


def test_allow_fp16_on_a_cpu(monkeypatch):
    accelerator = module("accelerator").get_accelerator()
    monkeypatch.setattr(accelerator, "is_fp16_supported", lambda: False)  # put back afterwards
    engine = inspect.getsource(module("runtime.engine").DeepSpeedEngine)
    assert "self.fp16_enabled() and not get_accelerator().is_fp16_supported()" in engine
    internals.allow_fp16_on_a_cpu()
    assert accelerator.is_fp16_supported()


def test_leaf_modules():
    leaf, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    module("utils").set_z3_leaf_module(leaf, True)
    assert list(internals.leaf_modules(torch.nn.Sequential(leaf, other))) == [leaf]


def test_silence_memory_reports(monkeypatch):
    bf16 = module("runtime.bf16_optimizer")
    monkeypatch.setattr(bf16, "see_memory_usage", bf16.see_memory_usage)  # put back afterwards
    assert list(inspect.signature(bf16.see_memory_usage).parameters) == ["message", "force"]
    assert "see_memory_usage" in bf16.BF16_Optimizer.__init__.__code__.co_names
    internals.silence_memory_reports()
    assert bf16.see_memory_usage("begin", force=True) is None


def test_count_on_every_rank():
    is_split = module("runtime.utils").is_model_parallel_parameter
    assert module("runtime.bf16_optimizer").is_model_parallel_parameter is is_split
    layer = nn.Linear(2, 2)
    assert not is_split(layer.weight)
    internals.count_on_every_rank(layer)
    assert is_split(layer.weight) and is_split(layer.bias)


def test_forget_groups(monkeypatch):
    groups = module("utils").groups
    for name in ("mpu", "_ZERO_PARAM_INTRA_PARALLEL_GROUP"):
        assert name in vars(groups), name
        monkeypatch.setattr(groups, name, "an earlier engine's")
    assert "_ZERO_PARAM_INTRA_PARALLEL_GROUP" in inspect.getsource(groups._get_zero_param_intra_parallel_group)
    internals.forget_groups()
    assert groups.mpu is None and groups._get_zero_param_intra_parallel_group() is None


def test_partition():
    init = module("runtime.zero.partition_parameters").Init
    assert module("runtime.zero").Init is init
    assert {"module", "data_parallel_group", "config_dict_or_path", "mpu"} <= inspect.signature(init).parameters.keys()
    assert inspect.getsource(init.__init__).count("module.parameters(recurse=True)") == 1


@pytest.mark.parametrize(
    ("name", "method", "arguments"),
    [
        ("runtime.bf16_optimizer:BF16_Optimizer", "update_lp_params", []),
        ("runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer", "update_lp_params", []),
        ("runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3", "checkpoint_event_prologue", []),
        ("runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3", "checkpoint_event_epilogue", []),
        (
            "runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3",
            "_reassign_or_swap_out_partitioned_parameters",
            ["sub_group_id"],
        ),
        ("runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3", "_set_fp32_optimizer_param_groups", []),
        ("runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3", "_clear_fp32_optimizer_param_groups", []),
        ("runtime.zero.parameter_offload:DeepSpeedZeRoOffload", "partition_all_parameters", []),
        ("runtime.engine:DeepSpeedEngine", "backward", ["loss", "retain_graph", "scale_wrt_gas"]),
        ("runtime.engine:DeepSpeedEngine", "is_gradient_accumulation_boundary", []),
    ],
)
def test_methods_have_the_arguments_that_they_are_called_with(name, method, arguments):
    where, _, cls = name.partition(":")
    source = ast.parse(inspect.getsource(getattr(module(where), cls)))  # a decorator may hide the signature
    found = [node.args for node in ast.walk(source) if isinstance(node, ast.FunctionDef) and node.name == method]
    assert found, f"{cls}.{method} is no longer there"
    assert [argument.arg for argument in found[0].args] == ["self", *arguments]


# -- engines ----------------------------------------------------------------------------------------------------------


@cache
def failures() -> dict[str, str]:
    """Check → what is wrong with it; empty if nothing is."""
    [found] = run_ranks(check_engines, 1)
    return found


@pytest.mark.parametrize("name", OF_AN_ENGINE)
def test_internals_of_an_engine(name):
    wrong = failures()[name]
    assert not wrong, f"internals.{name}\n{wrong}"


def check_engines(ranks: ParallelContext) -> dict[str, str]:
    found = {}
    for name, (stage, precision) in OF_AN_ENGINE.items():
        engine = toy.make_engine(stage, ranks, precision=precision)
        try:
            CHECKS[name.partition(" ")[0]](engine)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc(limit=-2)
    return found


def trainable(engine: Any) -> list[nn.Parameter]:
    return [parameter for parameter in engine.module.parameters() if parameter.requires_grad]


def one_backward(engine: Any) -> None:
    engine.backward(engine.forward("loss", toy.batches(0)[0]).total)


def check_whole_masters(engine: Any) -> None:
    pairs = list(internals.whole_masters(engine.ds.optimizer))
    assert {id(low) for low, _ in pairs} == {id(parameter) for parameter in trainable(engine)}
    assert all(high.dtype == torch.float32 and torch.equal(low, high.bfloat16()) for low, high in pairs)
    assert {id(high) for _, high in pairs} == {id(p) for g in engine.optimizer.param_groups for p in g["params"]}


def check_flat_groups(engine: Any) -> None:
    groups = list(internals.flat_groups(engine.ds.optimizer))
    assert {id(p) for group in groups for p in group.parameters} == {id(parameter) for parameter in trainable(engine)}
    for group, ours in zip(groups, engine.optimizer.param_groups, strict=True):
        assert [id(group.master)] == [id(parameter) for parameter in ours["params"]]
        assert group.master.dtype == torch.float32 and group.flat.dtype == engine._dtype
        assert torch.equal(group.part, group.master.to(group.part.dtype))
        inside = range(group.flat.data_ptr(), group.flat.data_ptr() + group.flat.nbytes + 1)
        for view in (*group.parameters, group.part):
            assert view.data_ptr() in inside and view.data_ptr() + view.nbytes in inside, "not a view into flat"


def check_sub_groups(engine: Any) -> None:
    groups = list(internals.sub_groups(engine.ds.optimizer))
    assert {id(p) for parameters, _ in groups for p in parameters} == {id(parameter) for parameter in trainable(engine)}
    for parameters, master in groups:
        assert master.dtype == torch.float32
        assert master.numel() == sum(internals.padded_length(parameter) for parameter in parameters)
        parts = torch.cat([parameter.ds_tensor.view(-1) for parameter in parameters])  # padding included
        assert torch.equal(parts.to(engine._dtype), master.to(engine._dtype))


def check_reduced_gradients(engine: Any) -> None:
    one_backward(engine)
    wrapped = engine.ds.optimizer
    of = internals.sub_groups if engine.stage == 3 else internals.flat_groups
    masters = [group[1] for group in of(wrapped)]
    fragments = [torch.cat([f.flatten() for f in each]) for each in internals.reduced_gradients(wrapped, len(masters))]
    assert len(fragments) == len(masters)
    assert all(each.numel() <= tensor.numel() for each, tensor in zip(fragments, masters, strict=True))
    assert sum(each.count_nonzero() for each in fragments) > 0
    engine.step()


def check_renew_parameters(engine: Any) -> None:
    for tensor in engine._view.masters.values():
        tensor.data.fill_(0.5)
    internals.renew_parameters(engine.ds.optimizer, engine.stage)
    for parameter in trainable(engine):
        assert (engine._whole(parameter) == 0.5).all()
        assert ((internals.local_part(parameter) if engine.stage == 3 else parameter) == 0.5).all()


def check_clear_gradient_buffer(engine: Any) -> None:
    buffer = engine.ds.optimizer.grad_partitions_flat_buffer
    one_backward(engine)
    assert buffer.count_nonzero() > 0, "gradients are no longer in it"
    internals.clear_gradient_buffer(engine.ds.optimizer)
    assert buffer.count_nonzero() == 0
    engine.step()


def check_filled_param_groups(engine: Any) -> None:
    def masters() -> set[int]:
        return {id(parameter) for group in engine.optimizer.param_groups for parameter in group["params"]}

    assert masters() == set()
    with internals.filled_param_groups(engine.ds.optimizer):
        assert masters() == {id(tensor) for _, tensor in internals.sub_groups(engine.ds.optimizer)}
    assert masters() == set()


def check_release_gathered(engine: Any) -> None:
    """On an engine without an optimizer, as an EMA teacher has it."""
    copy = engine.shard_ema(toy.make_toy())
    assert type(copy._ds.optimizer).__name__ == "DeepSpeedZeRoOffload"
    copy.forward("logits", toy.batches(0)[0])
    internals.release_gathered(copy._ds.optimizer)
    assert all(parameter.numel() == 0 for parameter in copy.module.parameters()), "something stays gathered"


def check_found_overflow(engine: Any) -> None:
    one_backward(engine)
    engine.step()
    assert engine.ds.optimizer.overflow is False and internals.found_overflow(engine.ds.optimizer) is False


def check_true_shape(engine: Any) -> None:
    plain = dict(toy.make_toy().named_parameters())
    for name, parameter in engine.module.named_parameters():
        assert hasattr(parameter, "ds_shape") and internals.true_shape(parameter) == plain[name].shape
        assert internals.true_shape(plain[name]) == plain[name].shape


def check_shard(engine: Any) -> None:
    for parameter in engine.module.parameters():
        assert internals.shard(parameter) == (0, internals.true_shape(parameter).numel())  # of a single rank


def check_padded_length(engine: Any) -> None:
    for parameter in engine.module.parameters():
        assert parameter.ds_tensor.numel() == internals.padded_length(parameter) >= internals.shard(parameter)[1]


def check_local_part(engine: Any) -> None:
    plain = dict(toy.make_toy().named_parameters())
    for name, parameter in engine.module.named_parameters():
        part = internals.local_part(parameter)
        assert part.data_ptr() == parameter.ds_tensor.data_ptr() and torch.equal(part, plain[name].bfloat16().flatten())


def check_hide_hooks(engine: Any) -> None:
    def names() -> list[str]:
        hooks = [*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()]
        return [getattr(hook, "__module__", "") for hook in hooks]

    layer = engine.module.layers[0].up
    assert sum(name.startswith("deepspeed") for name in names()) >= 2, "its hooks are no longer of its modules"
    engine.module.layers[0].recomputes_selectively = True
    internals.hide_hooks(engine.module)
    assert not any(name.startswith("deepspeed") for name in names())


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}
