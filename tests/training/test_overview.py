"""The block of lines before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jepa_scale.config.loading import load_config
from jepa_scale.distributed import comm
from jepa_scale.experiment import validate
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.training.build import build
from jepa_scale.training.overview import overview

VALUES = {
    "engine": {"name": "fsdp", "threads": 1},
    "model": {"hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "data": {"source": "reversal", "entities_a": 50, "comb": 5, "relations": 2},
    "objective": {"name": "lm"},
    "train": {"epochs": 3, "batch_size": 20, "accumulation": 2},
    "checkpoint": {"every": 50},
}


@pytest.fixture
def ranks():
    yield comm.setup()
    comm.teardown()


def lines_of(tmp_path, ranks, start=0, **sections):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(VALUES | sections))
    run = build(validate(load_config(tmp_path / "run.yaml")), ranks)
    lines = overview(run, Path("runs/demo"), start)
    return run, {line[:9].rstrip(): line[11:] for line in lines}


def test_all_of_a_run_is_named_and_counted(ranks, tmp_path):
    run, lines = lines_of(tmp_path, ranks)
    facts, tokens = len(run.data.train), run.data.train.sizes(range(len(run.data.train)))
    block = 4 * 8 * 8 + 3 * 8 * 32 + 2 * 8  # attention, SwiGLU, two norms
    parameters = 2 * run.data.vocab_size * 8 + 2 * block + 8
    steps = -(-3 * facts // 20)  # the last one is smaller; nothing follows a sample's last token
    assert lines == {
        "model": f"JepaDecoderForCausalLM, {parameters:,} parameters, all trained",
        "objective": "lm",
        "data": f"reversal: {facts:,} samples, about {sum(tokens):,} tokens an epoch",
        "engine": "FSDP2 fp32 on 1 rank, started by python; CPU, 1 thread a rank",
        "steps": f"{steps:,}; each 20 samples, about {round(20 * (sum(tokens) / facts - 1)):,} tokens, in 2 micro-batches, "
        "3 epochs in all",
        "writes to": "runs/demo: metrics.jsonl, a checkpoint every 50 steps",
    }


def test_what_is_frozen_and_what_heads_add_is_counted_apart(ranks, tmp_path):
    lora = VALUES["model"] | {"lora": {"rank": 2, "targets": ["q_proj"]}}
    run, lines = lines_of(
        tmp_path,
        ranks,
        start=7,
        model=lora,
        objective={"name": "concept", "bridge_width": 8},
        train={"steps": 9, "batch_size": 8},
        checkpoint={},
        log={"tensorboard": True, "trackers": ["mlflow"]},
    )
    trained = 2 * 2 * (8 + 8)  # two blocks, A and B of rank 2
    whole = sum(parameter.numel() for parameter in run.engine.module.backbone.parameters())
    heads = sum(parameter.numel() for parameter in run.objective.parameters())
    share = f"{100 * trained / whole:.3g}%"
    assert lines["model"].endswith(f" with LoRA of rank 2, {whole:,} parameters, {share} trained")
    assert lines["objective"] == f"concept, with {heads:,} parameters of its own" and heads
    assert lines["steps"].startswith("9, from step 7 on; each 8 samples")
    assert lines["writes to"] == "runs/demo: metrics.jsonl, a checkpoint at the end, TensorBoard, mlflow"


def test_weights_of_4_bits_are_named(ranks, tmp_path):
    pytest.importorskip("bitsandbytes")
    llama = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    plain = ModelOptions(family="huggingface", config={**llama, "num_attention_heads": 2, "num_key_value_heads": 2})
    build_backbone(plain, 20).decoder.save_pretrained(tmp_path / "base")
    model = {"family": "huggingface", "pretrained": str(tmp_path / "base"), "lora": {"rank": 2}, "load_in_4bit": True}
    run, lines = lines_of(tmp_path, ranks, model=model)
    assert " with LoRA of rank 2 on weights of 4 bits, " in lines["model"]
    counted = int(lines["model"].split(" bits, ")[1].split(" ")[0].replace(",", ""))
    left = sum(parameter.numel() for parameter in run.engine.module.backbone.parameters())
    assert counted == left + 7 * 64 * 64  # the weights that have become codes count


def test_a_batch_of_tokens_is_told_as_one(ranks, tmp_path):
    _, lines = lines_of(tmp_path, ranks, train={"steps": 4, "batch_tokens": 4096, "micro_tokens": 1024})
    assert lines["steps"] == "4; each at most 4,096 tokens in 4 micro-batches"
