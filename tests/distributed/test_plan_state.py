"""The planner's memory estimate against real engines: parameters, optimizer and teacher of a rank, at 1 and 2 ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from jepa_scale.config.loading import load_config
from jepa_scale.experiment import validate
from jepa_scale.plan.planner import Request, make_plan
from jepa_scale.training.build import build
from jepa_scale.utils.devices import FP16_ON_CPU
from tests.distributed.launch import run_ranks
from tests.distributed.processes import REPOSITORY
from tests.text_runs import NATIVE, config_file

TEACHER = {"name": "horizon", "horizons": [1, 2], "horizon_probs": [0.5, 0.5], "tap_layer": 1, "teacher": "backbone"}
ENGINES = ("fsdp", "zero0", "zero1", "zero2", "zero3")
KINDS = ("parameters", "optimizer", "teacher")


def config_of(folder: Path, engine: str, precision: str, lora: bool = False) -> Path:
    section = {
        "name": "fsdp" if engine == "fsdp" else "deepspeed",
        "deepspeed": str(REPOSITORY / f"configs/ds/{'zero1' if engine == 'fsdp' else engine}.json"),
        "precision": precision,
    }
    name = f"{engine}_{precision}{'_lora' * lora}"
    model = {**NATIVE, "vocab_size": 320, "lora": {"rank": 2} if lora else None}
    return config_file(folder, name, engine=section, model=model, objective=TEACHER)


def held(tensors: list[torch.Tensor]) -> int:
    """Return the bytes of the storages of tensors; of a DTensor, those of its shard."""
    local = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in local) if s.nbytes()}
    return sum(storages.values())


def sizes_of_engines(ranks: Any, files: list[str]) -> list[dict[str, int]]:
    """Return the bytes that this rank keeps, for each config."""
    found = []
    for file in files:
        with patch.dict(os.environ, {FP16_ON_CPU: "1"}):
            run = build(validate(load_config(file)), ranks)
        engine: Any = run.engine
        parameters = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
        if engine.name == "deepspeed" and engine.stage == 3:
            frozen = [p.ds_tensor for p in engine.module.parameters() if not p.requires_grad]
            parameters = [engine.ds.optimizer.lp_param_buffer, *frozen]
        state = engine.optimizer.state.items()
        moments = [value for _, values in state for value in values.values() if value.dim() > 0]
        masters = [t for t, _ in state if held([t, *parameters]) > held(parameters)]
        copied = run.teacher._copy
        copies = [getattr(p, "ds_tensor", p) for p in copied.module.parameters()]
        found.append(
            {
                "parameters": held(parameters),
                "optimizer": held([*masters, *moments]),
                "teacher": held([*copies, *copied.ema_parameters]),
            }
        )
    return found


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.matrix), 2])
def test_a_rank_keeps_what_is_planned(world_size, tmp_path):
    cases: list[tuple[Any, ...]] = [(engine, precision) for engine in ENGINES for precision in ("fp32", "bf16")]
    cases += [("zero1", "fp16"), ("zero3", "fp16")]
    cases += [(engine, "bf16", True) for engine in ENGINES]
    files = [config_of(tmp_path, *case) for case in cases]
    of_ranks = run_ranks(sizes_of_engines, world_size, [str(file) for file in files])
    for case, file, *real in zip(cases, files, *of_ranks, strict=True):
        plan = make_plan(validate(load_config(file)), Request(world_size, None))
        for kind in KINDS:
            most = max(sizes[kind] for sizes in real)
            # parts are padded to equal sizes, of small parameters by a few percent
            assert plan.memory.state[kind] == pytest.approx(most, rel=0.02), (case, kind)
