"""A run that goes on from a checkpoint: with what it may differ, what is said, and which samples are left."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale import inference, train
from jepa_scale.checkpoint import Manifest, complete
from jepa_scale.config.loading import load_config
from jepa_scale.distributed import comm
from jepa_scale.experiment import validate
from jepa_scale.training.build import build
from jepa_scale.training.resume import differing
from tests.text_runs import NATIVE, config_file

HEADS = "model.num_attention_heads,model.num_key_value_heads"
"""The second follows from the first."""


def run(config, *arguments):
    return train.main(["--config", str(config), *arguments])


def rows(folder, name):
    lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if row["split"] == "train"]


def last_line(capfd):
    return capfd.readouterr().err.strip().splitlines()[-1]


# -- the samples that are left --------------------------------------------------------------------------------------------


@contextmanager
def one_rank():
    yield comm.setup()
    comm.teardown()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    config_file(folder)
    return folder


def taken(run, step):
    """The (epoch, sample) pairs of a step."""
    pairs = [run.sampler.micro_batch(step, micro) for micro in range(run.sampler.accumulation)]
    return [pair for epochs, samples in pairs for pair in zip(epochs.tolist(), samples.tolist(), strict=True)]


@settings(max_examples=6)
@given(changes=st.data(), tokens=st.booleans())
def test_every_sample_comes_once_an_epoch_whatever_changes_on_the_way(corpus, changes, tokens):
    """The batch, the micro-batches and their number change at any step; no step is empty, and none is missing."""
    manifest, step, seen = None, 0, []
    for stop in (changes.draw(st.integers(1, 4)), changes.draw(st.integers(1, 4)), None):
        accumulation = changes.draw(st.integers(1, 3))
        size = accumulation * changes.draw(st.integers(64, 100) if tokens else st.integers(1, 9))
        keys = (
            {"batch_tokens": size, "micro_tokens": size // accumulation}
            if tokens
            else {"batch_size": size, "accumulation": accumulation}
        )
        config = config_file(corpus, train={"epochs": 2, "steps": 0, "batch_size": 0, **keys})
        with one_rank() as ranks:
            part = build(validate(load_config(config)), ranks, manifest)
        end = part.steps if stop is None else min(step + stop, part.steps)
        for number in range(step, end):
            assert (batch := taken(part, number))
            seen += batch
        step = end
        state = {"data": part.sampler.state(step), "steps": part.steps}
        manifest = Manifest(step, "fsdp", "", 1, step, state=state, config=part.experiment.resolved())
    samples = len(part.data.train)
    assert Counter(seen) == {(epoch, sample): 1 for epoch in range(2) for sample in range(samples)}


def test_a_larger_batch_ends_with_the_data(tmp_path, capfd):
    """57 documents: 3 steps of 4, then 6 of 8, the last one of 5."""
    epoch = {"epochs": 1, "steps": 0, "batch_size": 4, "log_every": 1}
    assert run(config_file(tmp_path, "whole", train=epoch)) == 0
    config = config_file(tmp_path, train=epoch)
    assert run(config, "train.steps=3") == 0
    assert run(config, "train.batch_size=8", "--resume", "auto") == 0
    said = capfd.readouterr().err
    assert "train.batch_size 8 (was 4)" in said and "6 steps are left" in said
    whole, got = (rows(tmp_path, name)[-1] for name in ("whole", "run"))
    assert (whole["step"], got["step"]) == (15, 9) and whole["tokens"] == got["tokens"]


def test_what_is_left_of_a_budget_pays_for_the_steps_that_follow(tmp_path):
    """Four steps of 4 samples are paid for. After two of them a step has 2 samples, so some four follow."""
    every = {"steps": 4, "batch_size": 4, "log_every": 1}
    assert run(config_file(tmp_path, "whole", train=every)) == 0
    budget = rows(tmp_path, "whole")[-1]["flops"]
    config = config_file(tmp_path, "halves", train={"flops": budget, "steps": 0, "batch_size": 4, "log_every": 1})
    manifest = Manifest.read(complete(tmp_path / "whole" / "checkpoints")[-1].path)
    with one_rank() as ranks:
        resumed = build(validate(load_config(config)), ranks).experiment.resolved()
        middle = next(row["flops"] for row in rows(tmp_path, "whole") if row["step"] == 2)
        state = {**manifest.state, "flops": middle, "data": {**manifest.state["data"], "step": 2, "position": 8}}
        manifest = replace(manifest, step=2, state=state, config=resumed)
        same = build(validate(load_config(config)), ranks, manifest)
        fewer = build(validate(load_config(config, ["train.batch_size=2"])), ranks, manifest)
        spent = replace(manifest, state={**state, "flops": 2 * budget})
        none = build(validate(load_config(config, ["train.batch_size=2"])), ranks, spent)
    assert same.steps == 4
    assert 5 <= fewer.steps <= 7
    assert none.steps == 2


# -- other settings -------------------------------------------------------------------------------------------------------


def test_other_settings_are_refused_allowed_or_reported(tmp_path, capfd):
    config = config_file(tmp_path, objective={"name": "stp", "jepa_weight": 0.1}, train={"steps": 2, "batch_size": 4})
    assert run(config) == 0
    folder = tmp_path / "run"
    before = {file: file.read_bytes() for file in (folder / "config.yaml", folder / "metrics.jsonl")}
    more = ("train.steps=3", "--resume", "auto")
    for change, told, keys in (
        ("model.num_attention_heads=4", "model.num_attention_heads 4 (was 2)", HEADS),
        ("model.rope_theta=5000", "model.rope_theta 5000.0 (was 10000.0)", "model.rope_theta"),
        ("objective.jepa_weight=0.2", "objective.jepa_weight 0.2 (was 0.1)", "objective.jepa_weight"),
    ):
        assert run(config, change, *more) == 2
        line = last_line(capfd)
        assert told in line and f"checkpoint.resume_with_changes=[{keys}]" in line and "step_00000002" in line
    assert before == {file: file.read_bytes() for file in before}  # nothing has begun

    heads = ("model.num_attention_heads=4", f"checkpoint.resume_with_changes=[{HEADS}]")
    assert run(config, *heads, "objective.jepa_weight=0.2", *more) == 2
    assert "heads" not in last_line(capfd)
    assert run(config, *heads, "optim.lr=0.005", "model.initializer_range=0.5", *more) == 0
    said = capfd.readouterr().err
    assert "model.num_attention_heads 4 (was 2)" in said and "optim.lr 0.005 (was 0.01)" in said
    assert "initializer" not in said and "run.name" not in said
    # a whole section, and the older checkpoint is still the model that it was
    assert (
        run(config, "objective.jepa_weight=0.3", *heads[:1], "checkpoint.resume_with_changes=[model,objective]", *more)
        == 0
    )
    heads_of = {
        step: inference.load(folder, f"step_{step:08}").module.backbone.decoder.config.num_attention_heads
        for step in (2, 3)
    }
    assert heads_of == {2: 2, 3: 4}


def test_a_value_that_is_spelt_out_is_no_change(tmp_path, capfd):
    config = config_file(tmp_path, train={"steps": 1, "batch_size": 4})
    assert run(config) == 0
    width = 4 * NATIVE["hidden_size"]
    spelt = ("model.num_key_value_heads=2", f"model.intermediate_size={width}", "run.seed=3")
    capfd.readouterr()
    assert run(config, *spelt, "log.progress=false", "--resume", "auto") == 0
    assert "other settings" not in capfd.readouterr().err


@pytest.mark.parametrize("keys", [{"num_attention_heads": 4}, {"layer_norm_epsilon": 1e-3}])
def test_a_family_of_transformers_is_compared_by_its_own_config(tmp_path, capfd, keys):
    family = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}
    model = {"family": "huggingface", "config": family}
    assert run(config_file(tmp_path, model=model, train={"steps": 1, "batch_size": 4})) == 0
    changed = {"n_head": 4} if "num_attention_heads" in keys else keys
    config = config_file(
        tmp_path, model={**model, "config": {**family, **changed}}, train={"steps": 2, "batch_size": 4}
    )
    assert run(config, "--resume", "auto") == 2
    key = next(iter(changed))
    assert f"model.config.{key} {changed[key]}" in last_line(capfd)


def test_an_evaluation_of_another_model_is_refused(tmp_path, capfd):
    config = config_file(tmp_path, train={"steps": 1, "batch_size": 4})
    assert run(config) == 0
    from jepa_scale.cli.main import main

    assert main(["eval", str(tmp_path / "run"), "model.num_attention_heads=4"]) == 2
    assert "model.num_attention_heads 4 (was 2)" in last_line(capfd)


def test_only_keys_that_both_versions_have_are_compared():
    assert differing({"a.b": 1, "a.former": 2}, {"a.b": 1.5, "a.new": 2}) == {"a.b": (1, 1.5)}


def test_changed_data_go_on_at_the_same_count(tmp_path, capfd):
    config = config_file(tmp_path, train={"steps": 3, "batch_size": 4})
    assert run(config) == 0
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(corpus.read_text() + corpus.read_text())
    tokenizer = next((tmp_path / "cache" / "tokenizers").iterdir())
    fixed = (f"data.tokenizer={tokenizer}", "train.steps=4", "--resume", "auto")
    assert run(config, *fixed) == 2
    assert "data.accept_changes=true" in last_line(capfd)
    assert run(config, "data.accept_changes=true", *fixed) == 0
    assert "data: changed since step_00000003" in capfd.readouterr().err
    assert complete(tmp_path / "run" / "checkpoints")[-1].manifest.state["data"]["position"] == 16
