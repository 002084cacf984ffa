"""Generated answers on real ranks are the same for every engine and any distribution of the questions over the ranks."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jepa_scale.distributed.comm import ParallelContext
from tests.distributed.launch import run_ranks
from tests.distributed.processes import Gate
from tests.distributed.small_runs import rows
from tests.distributed.test_runs import train_runs
from tests.distributed.toy import small_buckets

STEPS = 80
ENGINES = ("fsdp", "zero0", "zero3")


def write_data(folder: Path) -> None:
    """Write questions about animals, with answers of different lengths; five of the seven in ``valid`` occur in training."""
    sounds = {"cat": "meow meow", "dog": "woof", "cow": "moo moo moo moo", "owl": "hoo hoo hoo", "bee": "bzz"}
    pairs = [(f"what says the {a}{' please' * k}", s) for a, s in sounds.items() for k in range(5)]
    pairs += [("and the fish", ""), ("and a very old cat", "meow")]

    def line(pair: tuple[str, str]) -> str:
        said = [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        return json.dumps(
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, *said]}
        )

    (folder / "train.jsonl").write_text("\n".join(map(line, pairs[:25] * 8)) + "\n")
    (folder / "valid.jsonl").write_text("\n".join(map(line, [*pairs[2:25:5], *pairs[25:]])) + "\n")


def config_file(folder: Path, into: Path, **changes: Any) -> Path:
    """Write the config of a run in ``into`` on the data in ``folder``."""
    values: dict[str, Any] = {
        "run": {"name": "run", "dir": str(into), "seed": 3},
        "engine": {"name": "fsdp", "threads": 1},
        "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "bridge_after": 1},
        "data": {
            "source": "chat",
            "path": str(folder / "train.jsonl"),
            "valid_path": str(folder / "valid.jsonl"),
            "vocab_size": 300,
            "cache": str(folder / "cache"),
        },
        "objective": {"name": "lm"},
        "optim": {"lr": 1e-2, "warmup_steps": 3},
        "train": {"steps": STEPS, "batch_size": 16, "eval_every": STEPS // 2},
        "eval": {"metrics": ["exact_match", "starts_with"], "max_new_tokens": 9, "generation_batch": 3},
        "log": {"progress": False, "report": False},
    }
    for section, keys in changes.items():
        values[section] |= keys
    path = into / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def evaluate_runs(ranks: ParallelContext, cases: list[tuple[str, list[str]]]) -> None:
    """Evaluate runs one after another, as ``jepa-scale eval RUN overrides …`` does."""
    from jepa_scale.training.run import evaluate_checkpoint

    for run, overrides in cases:
        evaluate_checkpoint(argparse.Namespace(run=Path(run), checkpoint="auto", overrides=overrides))


def generations(run: Path, step: int = STEPS, split: str = "valid") -> list[dict[str, Any]]:
    text = (run / "generations" / f"step_{step:08d}_{split}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a run with its generated answers."""
    folder = tmp_path_factory.mktemp("chat")
    write_data(folder)
    run_ranks(train_runs, 1, [(str(config_file(folder, folder)), None)])
    return folder


def test_training_saves_and_scores_what_it_says(folder):
    for step in (STEPS // 2, STEPS):
        records = generations(folder / "run", step)
        assert [r["row"] for r in records] == list(range(7))
        row = next(row for row in rows(folder / "run", "eval/valid") if row["step"] == step)
        scored = [r for r in records if not r["unscored"]]
        assert [r["row"] for r in records if r["unscored"]] == [5]  # the fish
        for name in ("exact_match", "exact_match_upstream", "starts_with", "starts_with_upstream"):
            assert row[name] == pytest.approx(sum(r["values"][name] for r in scored) / 6, rel=1e-4)
        assert (row["generated"], row["unscored"]) == (7, 1)
        assert row["stopped"] == pytest.approx(sum(r["stopped"] for r in records) / 7, rel=1e-4)
        assert {"lm_loss", "ppl", "labels"} <= row.keys()
    assert row["exact_match"] >= 0.5  # the five that it has learnt, or nearly
    assert len({r["generated"] for r in records}) > 2


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.matrix), 2])
def test_the_same_answers_on_any_engine_and_number_of_ranks(folder, tmp_path, world_size):
    cases: list[tuple[str, list[str]]] = []
    for engine in ENGINES:
        run = tmp_path / engine
        shutil.copytree(folder / "run", run)
        shutil.rmtree(run / "generations")
        overrides = ["engine.name=fsdp"]
        if engine != "fsdp":  # nothing is too small to be sharded
            overrides = ["engine.name=deepspeed", f"engine.deepspeed={small_buckets(engine, str(tmp_path))}"]
        overrides.append("eval.generation_batch=1")  # ranks go on for one another's longer answers
        cases.append((str(run), overrides))
    run_ranks(evaluate_runs, world_size, cases)
    expected = generations(folder / "run")
    assert len({r["tokens"] for r in expected}) > 2  # ranks have finished while others had not
    for engine in ENGINES:
        assert generations(tmp_path / engine) == expected, engine
        assert not list((tmp_path / engine).rglob("*.partial"))


@pytest.mark.matrix
def test_bf16_generates_on_every_engine(folder, tmp_path):
    cases = []
    for engine in ENGINES:
        shutil.copytree(folder / "run", tmp_path / engine)
        overrides = ["engine.precision=bf16", f"engine.name={'fsdp' if engine == 'fsdp' else 'deepspeed'}"]
        overrides += [] if engine == "fsdp" else [f"engine.deepspeed={small_buckets(engine, str(tmp_path))}"]
        cases.append((str(tmp_path / engine), overrides))
    run_ranks(evaluate_runs, 2, cases)
    expected = [r["generated"] for r in generations(folder / "run")]
    for engine in ENGINES:
        same = [a == b["generated"] for a, b in zip(expected, generations(tmp_path / engine), strict=True)]
        assert sum(same) >= 5, engine


def test_a_signal_between_batches_ends_the_evaluation(folder, tmp_path, process_pool):
    """On two ranks an interrupted evaluation is not saved; the resumed run repeats it."""
    arguments = [
        "--config",
        str(config_file(folder, tmp_path, eval={"generation_batch": 1, "metrics": ["exact_match"]})),
    ]
    run, gate = tmp_path / "run", Gate(tmp_path / "answers")
    # one forward of the perplexity, then the answers
    fault = {"name": "holds_evaluating", "who": 1, "gate": str(gate.path), "forward": 2}
    stopped = process_pool.start([*arguments, "train.eval_every=0", "train.steps=4"], 2, [fault])
    gate.reached(stopped)
    stopped.send(1, signal.SIGTERM)
    gate.open()
    assert stopped.wait() == [0, 0], stopped.output()
    assert "after step 4; go on with --resume auto" in stopped.output(0)
    assert not (run / "generations").exists() and not rows(run, "eval/valid")
    process_pool.run([*arguments, "train.eval_every=4", "train.steps=4", "--resume", "auto"], 2)
    assert len(generations(run, 4)) == 7 and len(rows(run, "eval/valid")) == 1


def test_other_objectives_answer_too(folder, tmp_path):
    config = config_file(folder, tmp_path, objective={"name": "two_view"}, train={"steps": 3, "eval_every": 0})
    run_ranks(train_runs, 2, [(str(config), None)])
    assert len(generations(tmp_path / "run", 3)) == 7
    assert torch.isfinite(torch.tensor(rows(tmp_path / "run", "eval/valid")[-1]["lm_loss"]))
