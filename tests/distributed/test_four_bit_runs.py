"""LoRA on weights of 4 bits: the curve of a plain loop on the matrices that the codes stand for, on every engine, and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import jepa_scale
from jepa_scale.checkpoint import Manifest
from jepa_scale.config.ema import TeacherOptions
from jepa_scale.convert.to_hf import ExportOptions, export
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.engines.ema import Teacher, TeacherModel
from jepa_scale.models.frozen.four_bit import Codes, FourBitLinear, quantise, replace_layers
from jepa_scale.optim import parameter_groups
from jepa_scale.packing import Segment, pack_sequence
from tests.distributed.launch import run_ranks
from tests.distributed.small_runs import checkpoint, rows, tensors
from tests.distributed.test_horizon_runs import config_file
from tests.distributed.test_lora_runs import (
    KNOWN,
    OPTIM,
    QWEN3,
    Root,
    batch,
    corpus,
    make_root,
    model,
    pretrained,
    train_lora,
)
from tests.distributed.toy import ENGINES, sharded

pytest.importorskip("bitsandbytes")

STEPS = 6  # B moves from the first step on, A from the second
WORDS = [Segment([1, 41, 3], "a")]
__all__ = ["corpus"]


def rounded(root: Root) -> Root:
    """Replace the frozen matrices by those that their codes stand for, in place."""
    import bitsandbytes.functional as functional

    def of_codes(name: str, layer: Any) -> nn.Module:
        codes = Codes(layer.weight.detach(), torch.float32)
        layer.weight.data = functional.dequantize_4bit(codes.packed, codes.state)
        return layer  # type: ignore[no-any-return]

    replace_layers(root.backbone, of_codes)
    return root


def reference(folder: str) -> tuple[list[float], Tensor]:
    """Train with plain PyTorch in one process; return the losses, and states of the EMA of the first block."""
    root, average = rounded(make_root(folder)), rounded(make_root(folder))
    groups = [{k: g[k] for k in ("params", "lr", "weight_decay")} for g in parameter_groups(root, OPTIM, ["objective"])]
    optimizer = torch.optim.AdamW(groups, betas=OPTIM.betas, eps=OPTIM.eps)
    losses = []
    for step in range(STEPS):
        loss = root(batch(step)).total
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in root.parameters() if p.requires_grad], OPTIM.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for mine, its in zip(average.parameters(), root.parameters(), strict=True):
                mine.lerp_(its, 0.1)
    with torch.no_grad():
        return losses, average.backbone.hidden(pack_sequence(WORDS), until=1)


def train_all(ranks: ParallelContext, folder: str, cases: list[tuple[str, str]]) -> list[dict[str, Any]]:
    results = []
    for name, precision in cases:
        root = make_root(folder)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        quantise(root.backbone, dtype, lambda _, weight: weight.detach())
        copies = {"backbone": root.backbone.lower(1)}
        engine = sharded(
            name,
            root,
            root.backbone.layers,
            ["objective"],
            ranks,
            OPTIM,
            precision=precision,
            clip_norm=OPTIM.clip_norm,
        )
        constant = TeacherOptions(momentum=0.9, final_momentum=None, schedule="constant")
        teacher = Teacher(engine, TeacherModel(copies), constant, STEPS)
        losses = []
        for step in range(STEPS):
            loss = engine.forward(batch(step).chunk(ranks.world_size)[ranks.rank]).total
            engine.backward(loss)
            engine.step()
            teacher.update(step)
            losses.append(float(loss.detach()))
        coded = [part._codes for part in root.modules() if isinstance(part, FourBitLinear)]
        of_teacher = [part._codes for part in copies["backbone"].modules() if isinstance(part, FourBitLinear)]
        results.append(
            {
                "losses": losses,
                "teacher": teacher.forward("backbone", pack_sequence(WORDS)).float(),
                "names": list(engine.sharded_state()),
                "layers": len(coded),
                "shared": all(any(codes is other for other in coded) for codes in of_teacher),
            }
        )
    return results


@pytest.mark.parametrize(
    "cases",
    [
        [("fsdp", "fp32"), ("zero3", "fp32"), ("zero1", "bf16")],
        pytest.param(
            [(engine, precision) for engine in ENGINES for precision in ("fp32", "bf16")], marks=pytest.mark.matrix
        ),
    ],
    ids=["some", "all"],
)
def test_every_engine_trains_what_a_plain_loop_trains(tmp_path, cases):
    """Every rank has all codes, and the teacher those of the student."""
    folder = pretrained(tmp_path / "base", QWEN3, KNOWN)
    losses, wanted = reference(folder)
    assert losses[-1] < 0.95 * losses[0]
    by_rank = run_ranks(train_all, 2, folder, cases)
    for i, case in enumerate(cases):
        curve = torch.tensor([rank[i]["losses"] for rank in by_rank], dtype=torch.float64).sum(0)
        loose = 1e-4 if case[1] == "fp32" else 0.05
        assert (curve - torch.tensor(losses, dtype=torch.float64)).abs().max() < loose, case
        got = by_rank[0][i]
        torch.testing.assert_close(got["teacher"], wanted, rtol=0, atol=1e-3 if case[1] == "fp32" else 0.1)
        assert got["layers"] == 14 and got["shared"]
        assert not any("proj.base_layer" in name for name in got["names"])


def test_a_run_goes_on_is_loaded_and_leaves(corpus, tmp_path):
    """The checkpoint holds adapters. The merged model has them on the weights as they are in the base's files."""
    four = {**model(tmp_path, rank=2), "load_in_4bit": True}
    how: dict[str, Any] = {
        "model": four,
        "checkpoint": {"every": 2, "keep_last": 9},
        "engine": {"precision": "fp32", "activation_checkpointing": "full"},
    }
    how["train"] = {"batch_tokens": 240, "micro_tokens": 60, "steps": 4}
    first = config_file(tmp_path, "first", corpus, "vicreg", "zero3", **how)
    assert run_ranks(train_lora, 2, [(first, None)]) == ["", ""]
    after = config_file(tmp_path, "after", corpus, "vicreg", "fsdp", **how)
    assert run_ranks(train_lora, 2, [(after, str(checkpoint(tmp_path / "first", 2)))]) == ["", ""]
    mine, theirs = ({r["step"]: r["loss"] for r in rows(tmp_path / run, "train")} for run in ("after", "first"))
    assert set(mine) == {3, 4} and all(loss == pytest.approx(theirs[step], abs=1e-4) for step, loss in mine.items())
    held = tensors(checkpoint(tmp_path / "after", 4))
    assert not any("base_layer" in name for name in held) and any("lora_B" in name for name in held)
    assert Manifest.read(checkpoint(tmp_path / "after", 4)).state["model"]["model.load_in_4bit"] is True

    loaded = jepa_scale.load(tmp_path / "after", device="cpu")
    assert sum(isinstance(part, FourBitLinear) for part in loaded.module.modules()) == 14
    export(tmp_path / "after", tmp_path / "hf", ExportOptions(progress=False, tokenizer="none"))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    merged = whole.state_dict()
    base = AutoModelForCausalLM.from_pretrained(four["pretrained"], dtype=torch.float32).state_dict()
    name = "model.layers.0.self_attn.q_proj"
    a, b = (held[f"model/backbone.decoder.{name}.lora_{x}.default.weight"] for x in "AB")
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + 2 * b @ a)
    with torch.no_grad():
        backbone = loaded.module.backbone
        ours = backbone.logits(backbone.hidden(pack_sequence([Segment([1, 7, 3], "a")])))
        theirs = whole(torch.tensor([[1, 7, 3]])).logits[0]
    assert 0 < (ours - theirs).abs().mean() < 0.3 * theirs.std()  # the codes' rounding

    how["model"] = {**four, "load_in_4bit": False}
    without = config_file(tmp_path, "after", corpus, "vicreg", "fsdp", **how)
    for error in run_ranks(train_lora, 2, [(without, "auto")]):
        assert "model.load_in_4bit False (was True)" in error
    how |= {"model": four, "engine": {"compile": True}}
    compiled = config_file(tmp_path, "compiled", corpus, "vicreg", "fsdp", **how)
    for error in run_ranks(train_lora, 2, [(compiled, None)]):
        assert error.startswith("engine.compile: is not tried with model.load_in_4bit")
    assert not (Path(tmp_path) / "compiled/metrics.jsonl").exists()


def test_frozen_weights_of_a_checkpoint_cannot_be_quantised(corpus, tmp_path):
    whole = model(tmp_path, rank=2)
    how: dict[str, Any] = {"train": {"batch_tokens": 240, "micro_tokens": 60, "steps": 1}}
    held = config_file(tmp_path, "held", corpus, "vicreg", "fsdp", model=whole, **how)
    assert run_ranks(train_lora, 1, [(held, None)], True) == [""]
    how["checkpoint"] = {"resume_with_changes": ["model"]}
    how["train"]["steps"] = 2
    four = config_file(tmp_path, "held", corpus, "vicreg", "fsdp", model={**whole, "load_in_4bit": True}, **how)
    (error,) = run_ranks(train_lora, 1, [(four, "auto")])
    assert "step_00000001: holds the frozen weights itself, which model.load_in_4bit cannot replace" in error
