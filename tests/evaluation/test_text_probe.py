"""Probes during training, on real ranks: each text encoded once, the same figures on any engine and number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jepa_scale.config.loading import load_config
from jepa_scale.data import load_data
from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.evaluation.options import ChatEvalOptions
from jepa_scale.evaluation.run import chat_test, evaluate
from jepa_scale.evaluation.text_probe import probe_test
from jepa_scale.experiment import validate
from jepa_scale.metrics.geometry import uniformity
from jepa_scale.metrics.probe import Labelled, linear_probe, neighbour_predictions
from jepa_scale.metrics.spectrum import effective_rank
from jepa_scale.models.loading import build_backbone
from jepa_scale.objectives.lm import LanguageModeling
from jepa_scale.objectives.lm_options import LmOptions
from jepa_scale.packing import Segment, Views, pack_sequence
from jepa_scale.training.build import build
from jepa_scale.utils.errors import InputError
from tests.distributed.launch import run_ranks
from tests.distributed.small_runs import rows
from tests.distributed.test_runs import train_runs
from tests.distributed.toy import small_buckets
from tests.objectives.helpers import alone
from tests.text_runs import config_file, write_labelled

RANKS = ParallelContext(0, 1, 0, torch.device("cpu"), "python")


def parts(config: str) -> tuple[Any, Any, Any, Any]:
    """experiment, data, backbone, objective."""
    experiment = validate(load_config(config))
    data = load_data(experiment.data)
    torch.manual_seed(0)
    backbone = build_backbone(experiment.model, data.vocab_size)
    return experiment, data, backbone.eval(), experiment.objective.build(backbone, data)


class Silent(LanguageModeling):
    """Trains no next-token prediction, reads the last state, and leaves out the first token of each text."""

    pooling = "last"
    predicts_tokens = False

    def text_views(self, example: Any, draw: SampleRNG) -> Views:
        return Views([Segment(example.tokens[1:], "text", position_ids=np.arange(1, len(example.tokens)))])


def evaluate_on_rank(ranks: ParallelContext, config: str, silent: bool) -> tuple[Any, list[str]]:
    experiment, data, backbone, objective = parts(config)
    if silent:
        objective = Silent(LmOptions(), backbone, data)
    test = probe_test(experiment.eval, data, backbone, objective)
    calls: list[str] = []

    def call(task: str, batch: Any) -> Any:
        calls.append(task)
        return getattr(objective, task)(backbone, batch)

    with torch.no_grad():
        results = evaluate(objective, call, data, experiment.eval, ranks, probe=test)
    return results, calls


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probing")
    probe = write_labelled(folder / "labelled.jsonl")
    return str(config_file(folder, eval={"probe": str(probe), "probe_neighbours": 3, "micro_tokens": 60}))


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_figures_are_those_of_texts_encoded_one_by_one(config, world_size, silent):
    found = run_ranks(evaluate_on_rank, world_size, config, silent)
    assert all(f == found[0] for f in found)  # the same result and, lest ranks wait for each other, as many calls
    results, calls = found[0]
    assert calls.count("encode") >= 2
    assert results.keys() == ({"probe"} if silent else {"valid", "probe"})
    assert ("label_log_probs" in calls) is not silent

    experiment, data, backbone, _ = parts(config)
    tokenizer = data.load_tokenizer()
    pooled, every, labels = [], [], []
    for line in Path(experiment.eval.probe).read_text().splitlines():
        row = json.loads(line)
        ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            states = backbone.hidden(stream_from(ids[1:], 1)) if silent else alone(backbone, ids)
        pooled.append(states[-1] if silent else states.mean(0))
        every.append(states)
        labels.append(["court", "farm", "kitchen", "sea"].index(row["label"]))
    test = probe_test(experiment.eval, data, backbone, LanguageModeling(LmOptions(), backbone, data))
    assert test is not None
    x, y, train = torch.stack(pooled), torch.tensor(labels), torch.from_numpy(test.labelled.train)
    known = Labelled(x[train], y[train])
    expected = {
        "knn_accuracy": float((neighbour_predictions(known, x[~train], 3) == y[~train]).double().mean()),
        "probe_accuracy": float((linear_probe(known, 4).predictions(x[~train]) == y[~train]).double().mean()),
        "chance": 0.25,
        "effective_rank": float(effective_rank(x)),
        "effective_rank_tokens": float(effective_rank(torch.cat(every))),  # fewer than are looked at
        "uniformity": float(uniformity(x)),
        "texts": 40.0,
        "classes": 4.0,
    }
    assert results["probe"] == pytest.approx(expected, abs=1e-4)
    assert (~train).sum() == 12


def stream_from(ids: list[int], start: int) -> Any:
    return pack_sequence([Segment(ids, "x", position_ids=range(start, start + len(ids)))])


def test_some_token_states_are_evenly_spread(config, monkeypatch):
    experiment, data, backbone, objective = parts(config)
    monkeypatch.setattr("jepa_scale.evaluation.text_probe.TOKENS", 7)
    test = probe_test(experiment.eval, data, backbone, objective)
    assert test is not None
    with torch.no_grad():
        _, tokens = test.states(objective, lambda task, batch: getattr(objective, task)(backbone, batch), RANKS)
        every = torch.cat([alone(backbone, ids.tolist()) for ids in test.texts.tokens])
    torch.testing.assert_close(tokens, every[[i * len(every) // 7 for i in range(7)]])


def test_states_that_are_not_finite_have_no_figures(config):
    experiment, data, backbone, objective = parts(config)
    test = probe_test(experiment.eval, data, backbone, objective)
    assert test is not None
    found = test.measure(torch.full((40, 4), torch.nan), torch.full((9, 4), torch.inf))
    assert all(np.isnan(found[name]) for name in ("knn_accuracy", "probe_accuracy", "uniformity", "effective_rank"))
    assert found["chance"] == 0.25


def test_runs_on_every_engine_have_the_same_probe(tmp_path):
    probe = {"probe": str(write_labelled(tmp_path / "labelled.jsonl")), "micro_tokens": 60}
    files = []
    for engine in ("fsdp", "zero3"):
        sharded = {} if engine == "fsdp" else {"deepspeed": str(small_buckets(engine, str(tmp_path)))}
        name = "fsdp" if engine == "fsdp" else "deepspeed"
        changes = {"engine": {"name": name, **sharded}, "train": {"eval_every": 2}, "eval": probe}
        changes["checkpoint"] = {"keep_best": "eval/probe/probe_accuracy", "every": 2}
        files.append((str(config_file(tmp_path, engine, **changes)), None))
    run_ranks(train_runs, 2, files)
    expected = rows(tmp_path / "fsdp", "eval/probe")
    assert [row["step"] for row in expected] == [2, 4]
    assert expected[-1]["probe_accuracy"] > 0.6 > 2 * expected[-1]["chance"]  # other words: they are told apart easily
    for a, b in zip(rows(tmp_path / "zero3", "eval/probe"), expected, strict=True):
        assert a["effective_rank"] == pytest.approx(b["effective_rank"], rel=1e-3)
        assert a["uniformity"] == pytest.approx(b["uniformity"], abs=1e-3)
        assert a["probe_accuracy"] == pytest.approx(b["probe_accuracy"], abs=0.1)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, r"eval.probe: no file .*labelled.jsonl"),
        (["{"], r"labelled.jsonl:1: invalid JSON"),
        (['{"text": "a wave", "label": "x"}'] * 3, r"1 of 1 labels .* a probe needs two"),
        (
            ['{"text": "sea", "label": "x"}', f'{{"text": "{"wave " * 200}", "label": "y"}}'] * 2,
            r"eval.probe: .*labelled.jsonl:2: has \d+ tokens, the model takes 128; shorten it",
        ),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, config, lines, message):
    path = tmp_path / "labelled.jsonl"
    if lines is not None:
        path.write_text("\n".join(lines) + "\n")
    experiment, data, backbone, objective = parts(config)
    with pytest.raises(InputError, match=message):
        probe_test(experiment.eval.model_copy(update={"probe": str(path)}), data, backbone, objective)


def test_it_ends_the_run_before_it_begins(config):
    with pytest.raises(InputError, match=r"eval.probe: no file 'nowhere.jsonl'"):
        build(validate(load_config(config, ["eval.probe=nowhere.jsonl"])), RANKS)


def test_data_without_a_tokenizer_and_a_split_of_that_name_are_refused(config):
    experiment, data, backbone, objective = parts(config)

    class Other:
        tokenizer = None
        splits = {"valid": []}

    with pytest.raises(InputError, match=r"eval.probe: the data have no tokenizer"):
        probe_test(experiment.eval, Other, backbone, objective)
    Other.tokenizer, Other.splits = data.tokenizer, {"probe": []}
    with pytest.raises(InputError, match=r"eval.probe: the data have a split 'probe'"):
        probe_test(experiment.eval, Other, backbone, objective)
    assert probe_test(experiment.eval.model_copy(update={"probe": None}), data, backbone, objective) is None


def test_an_objective_that_predicts_no_tokens_is_not_asked_for_answers():
    with pytest.raises(InputError, match=r"eval.metrics: the objective trains no next-token prediction"):
        chat_test(ChatEvalOptions(metrics=["exact_match"]), None, None, predicts_tokens=False)  # type: ignore[arg-type]
