"""Whole runs with tensor parallelism and with replicas, on real ranks: heads, an EMA teacher, clipping by group, evaluation,
checkpoints and conversion, all equal to one rank."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jepa_scale.cli.main import main
from jepa_scale.distributed.comm import ParallelContext
from tests.data.corpus import write_text
from tests.distributed.compiled import train_compiled
from tests.distributed.launch import run_ranks
from tests.distributed.processes import REPOSITORY
from tests.distributed.same_runs import resumed_bitwise
from tests.distributed.small_runs import tensors
from tests.distributed.test_horizon_runs import config_file as horizon_file
from tests.distributed.test_runs import rows, train_runs

STEPS, SAVED = 8, 4
"""Number of steps, and step of the save. Warm-up ends at step 3, so updates on both sides of the save detect a stale or doubled
part."""
SMALL = 60
"""Tokens of a micro-batch in runs with four a step (on four data-parallel ranks, or two each on two ranks). Other runs have two
of 120 tokens."""
ENGINES = ("fsdp", "zero0", "zero1", "zero2", "zero3")
MODELS: dict[str, dict[str, Any]] = {
    "native": {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "bridge_after": -2},
    "tied": {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "tie_word_embeddings": True,
        "output_bias": True,
    },
    "qwen3": {
        "family": "huggingface",
        "config": {"model_type": "qwen3", "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
        | {"head_dim": 8, "num_key_value_heads": 2, "intermediate_size": 24},
    },
}
OBJECTIVE = {"native": "barlow", "tied": "smooth_l1", "qwen3": "vicreg"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_text(folder, [10, 1, 50, 8], valid=9)
    return folder


def config_file(
    folder: Path, name: str, corpus: Path, model: str, engine: str, micro_tokens: int = 120, **options: Any
) -> str:
    """Write a config whose micro-batches of a step are the same for any number of data-parallel ranks."""
    train = {"steps": STEPS, "batch_tokens": 240, "micro_tokens": micro_tokens, "eval_every": SAVED}
    return horizon_file(
        folder,
        name,
        corpus,
        OBJECTIVE[model],
        engine,
        model=MODELS[model],
        train=train,
        checkpoint={"every": SAVED},
        engine=options,
    )


@pytest.fixture(scope="module")
def references(corpus, tmp_path_factory):
    """Function from the name of a model, or ``MODEL-small`` for small micro-batches, to the folder of its run on one rank.

    The run is trained on first use.
    """
    folder = tmp_path_factory.mktemp("reference")

    def trained(name: str) -> Path:
        if not (folder / name).exists():
            model, _, small = name.partition("-")
            file = config_file(folder, name, corpus, model, "fsdp", *([SMALL] if small else []))
            run_ranks(train_runs, 1, [(file, None)])
        return folder / name

    return trained


def assert_same_run(got: Path, expected: Path, start: int = 0) -> None:
    for split, tolerance in (("train", 1e-4), ("eval/valid", 1e-2)):
        both = (rows(run.parent, run.name, split) for run in (expected, got))
        theirs, ours = ([row for row in of_run if row["step"] > start] for of_run in both)
        assert len(theirs) == len(ours) > 0
        for a, b in zip(theirs, ours, strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() - {"data_wait", "seconds", "tokens_per_second", "flops", "packing_efficiency", "split"}:
                allowed = max(tolerance, 1e-3) if "norm" in key else tolerance
                assert b[key] == pytest.approx(a[key], abs=allowed, rel=allowed), (got.name, a["step"], key)


@pytest.mark.parametrize(("ranks", "tp"), [(2, 2), pytest.param(4, 2, marks=pytest.mark.matrix)])
def test_curves_do_not_depend_on_the_degree(references, corpus, tmp_path, ranks, tp):
    """Runs clip in two groups, whose norms must count each split part and each replicated weight once."""
    cases = {f"native-{engine}": ("native", engine) for engine in ENGINES}
    files = [config_file(tmp_path, name, corpus, model, engine, tp=tp) for name, (model, engine) in cases.items()]
    run_ranks(train_runs, ranks, [(file, None) for file in files])
    for name, (model, _) in cases.items():
        assert_same_run(tmp_path / name, references(model))


@pytest.mark.matrix
def test_a_team_trains_in_bf16_on_every_engine(references, corpus, tmp_path):
    files = [config_file(tmp_path, engine, corpus, "native", engine, tp=2, precision="bf16") for engine in ENGINES]
    run_ranks(train_runs, 2, [(file, None) for file in files])
    expected = [row["lm_loss"] for row in rows(references("native").parent, "native")]
    for engine in ENGINES:
        assert [row["lm_loss"] for row in rows(tmp_path, engine)] == pytest.approx(expected, rel=0.02), engine


@pytest.mark.matrix
def test_curves_do_not_depend_on_replicas(references, corpus, tmp_path):
    """Test HSDP with two replicas, each sharded over two ranks, and two replicas of a tensor-parallel group of two."""
    cases = {"hybrid": {"replicas": 2}, "hybrid-team": {"replicas": 2, "tp": 2}, "copies": {"replicas": 4}}
    files = [config_file(tmp_path, name, corpus, "native", "fsdp", SMALL, **case) for name, case in cases.items()]
    run_ranks(train_runs, 4, [(file, None) for file in files])
    for name in cases:
        assert_same_run(tmp_path / name, references("native-small"))


@pytest.fixture(scope="module")
def team(corpus, tmp_path_factory):
    """Folder of a run on a tensor-parallel group of two ranks, with an EMA teacher of the decoder."""
    folder = tmp_path_factory.mktemp("team")
    run_ranks(train_runs, 2, [(config_file(folder, "qwen3", corpus, "qwen3", "fsdp", tp=2), None)])
    return folder / "qwen3"


def test_a_teams_checkpoint_is_one_like_any_other(references, team):
    a, b = (tensors(run / "checkpoints/step_00000004") for run in (team, references("qwen3")))
    assert a.keys() == b.keys() and any(name.startswith("teacher/backbone") for name in a)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("engine", "ranks", "tp", "by_team"),
    [
        ("zero3", 2, 1, True),
        *(pytest.param(*case, marks=pytest.mark.matrix) for case in [("fsdp", 1, 1, True), ("zero1", 4, 2, True)]),
        ("fsdp", 2, 2, False),
    ],
)
def test_a_run_goes_on_with_another_degree(references, team, corpus, tmp_path, engine, ranks, tp, by_team):
    start = (team if by_team else references("qwen3")) / "checkpoints/step_00000004"
    file = config_file(tmp_path, "goes-on", corpus, "qwen3", engine, tp=tp)
    run_ranks(train_runs, ranks, [(file, str(start))])
    assert_same_run(tmp_path / "goes-on", references("qwen3"), start=SAVED)


@pytest.mark.matrix
def test_resume_of_a_team_continues_bitwise(corpus, tmp_path):
    cases = ("fsdp", "zero2", "zero3")
    files = {engine: config_file(tmp_path, engine, corpus, "native", engine, SMALL, tp=2) for engine in cases}
    for held in resumed_bitwise(files, tmp_path, SAVED, ranks=4).values():
        assert any(name.startswith("exp_avg/") for name in held)


def test_a_teams_checkpoint_becomes_a_hugging_face_model(team, tmp_path):
    from transformers import AutoModelForCausalLM

    assert main(["convert", str(team), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    trained = tensors(team / "checkpoints/step_00000008")
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[f"model/backbone.decoder.{name}"].to(value.dtype)), name


def refused(ranks: ParallelContext, file: str) -> str:
    from jepa_scale.config.loading import load_config
    from jepa_scale.experiment import validate
    from jepa_scale.training.build import build
    from jepa_scale.utils.errors import InputError

    try:
        build(validate(load_config(file)), ranks)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("engine", "options", "told"),
    [
        ("fsdp", {"tp": 3}, "engine.tp: 3 does not divide the 2 ranks of this run; start a multiple of 3"),
        ("fsdp", {"replicas": 3}, "engine.replicas: 3 does not divide the 2 ranks with different samples"),
        ("fsdp", {"tp": 2, "replicas": 2}, "engine.replicas: 2 does not divide the 1 ranks with different samples"),
        ("zero3", {"compile": True}, "engine.compile: ZeRO-3 gathers parameters by hooks"),
        ("zero3", {"replicas": 2}, "engine.replicas: only FSDP2 supports replicas; remove it"),
    ],
)
def test_a_mesh_that_the_ranks_cannot_have_is_refused(corpus, tmp_path, engine, options, told):
    file = config_file(tmp_path, "refused", corpus, "native", engine, **options)
    assert all(told in said for said in run_ranks(refused, 2, file))


def test_secondary_shards_are_refused_in_a_team(corpus, tmp_path):
    file = config_file(tmp_path, "refused", corpus, "native", "zero3", tp=2, deepspeed="configs/ds/zero3_hpz.json")
    assert all("zero_hpz_partition_size" in said for said in run_ranks(refused, 2, file))


def test_muon_is_refused_in_a_team(corpus, tmp_path):
    file = config_file(tmp_path, "refused", corpus, "native", "fsdp", tp=2)
    values = yaml.safe_load(Path(file).read_text())
    values["optim"]["method"] = "muon"
    Path(file).write_text(json.dumps(values))
    assert all("engine.tp: Muon needs whole matrices" in said for said in run_ranks(refused, 2, file))


@pytest.mark.matrix
def test_compiling_changes_nothing_and_is_done_once(corpus, tmp_path):
    """Compile blocks on FSDP2 and ZeRO, with and without recomputing, and with tensor parallelism.

    All graphs exist after three steps, although all batches have different documents. Micro-batches have more than one
    token, because one token would need another graph.
    """
    cases: dict[str, tuple[str, str, dict[str, Any]]] = {
        "fsdp-selective": ("qwen3", "fsdp", {"activation_checkpointing": "selective"}),
        "zero1-full": ("qwen3", "zero1", {"activation_checkpointing": "full"}),
        "team": ("native", "fsdp", {"activation_checkpointing": "full", "tp": 2}),
    }

    def larger(name: str, model: str, engine: str, **options: Any) -> str:
        file = config_file(tmp_path, name, corpus, model, engine, **options)
        values = yaml.safe_load(Path(file).read_text())
        values["train"] |= {"batch_tokens": 480, "micro_tokens": 120, "steps": 9, "eval_every": 6}
        Path(file).write_text(yaml.safe_dump(values))
        return file

    files = [larger(name, model, engine, compile=True, **more) for name, (model, engine, more) in cases.items()]
    plain = [(larger(f"{model}-plain", model, "fsdp"), None) for model in ("native", "qwen3")]
    run_ranks(train_runs, 2, plain)
    for found in run_ranks(train_compiled, 2, files):
        for name in cases:
            first, second = found[name][3:6], found[name][6:]  # an evaluation between them, which has graphs of its own
            assert first[0] > 0, f"{name}: nothing was compiled"
            assert set(first) == {first[0]} and set(second) == {second[0]}, f"{name} {found[name]}"
    for name, (model, _, _) in cases.items():
        assert_same_run(tmp_path / name, tmp_path / f"{model}-plain")


SHARDED = {
    "zero3_hpz": {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0},
    "zero2_offload": {},
    "zero3_offload": {"stage3_param_persistence_threshold": 0},
}


@pytest.mark.matrix
def test_where_zero_keeps_things_changes_nothing(references, corpus, tmp_path):
    """Test hpZ (secondary shards within a node) and offloading to host memory, with tensor parallelism and a resume."""
    files = []
    for name, changes in SHARDED.items():
        for tp in (1, 2):
            shipped = json.loads((REPOSITORY / f"configs/ds/{name}.json").read_text())
            shipped["zero_optimization"] |= changes if tp == 1 else {}
            if tp == 2 and "hpz" in name:
                continue
            (tmp_path / f"{name}-{tp}.json").write_text(json.dumps(shipped))
            model = "qwen3" if "offload" in name else "native"
            file = config_file(tmp_path, f"{name}-{tp}", corpus, model, "zero3", SMALL, tp=tp)
            values = yaml.safe_load(Path(file).read_text())
            values["engine"]["deepspeed"] = str(tmp_path / f"{name}-{tp}.json")
            Path(file).write_text(yaml.safe_dump(values))
            files.append((file, model))
    run_ranks(train_runs, 4, [(file, None) for file, _ in files])
    for file, model in files:
        assert_same_run(Path(file).with_suffix(""), references(f"{model}-small"))
    file, model = files[1]
    shutil.move(tmp_path / "zero2_offload-1", tmp_path / "before")
    run_ranks(train_runs, 4, [(file, str(tmp_path / "before/checkpoints/step_00000004"))])
    assert_same_run(tmp_path / "zero2_offload-1", tmp_path / "before", start=SAVED)
