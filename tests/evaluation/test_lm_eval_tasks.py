"""Tasks of lm-eval at evaluations: the scores of lm-eval's own model on the export, on any engine and number of ranks."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("lm_eval")

from jepa_scale.config.loading import load_config
from jepa_scale.convert.to_hf import ExportOptions, export
from jepa_scale.data import load_data
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.evaluation import lm_eval_tasks
from jepa_scale.evaluation.lm_eval_model import TextModel, ended_by
from jepa_scale.evaluation.lm_eval_tasks import find_tasks, lm_eval_test
from jepa_scale.evaluation.options import PerplexityOptions
from jepa_scale.experiment import validate
from jepa_scale.models.loading import build_backbone
from jepa_scale.objectives.lm import LanguageModeling
from jepa_scale.objectives.lm_options import LmOptions
from jepa_scale.training.build import build
from jepa_scale.utils.errors import InputError
from tests.distributed.launch import run_ranks
from tests.distributed.small_runs import rows
from tests.distributed.test_runs import train_runs
from tests.distributed.toy import small_buckets
from tests.text_runs import GLUE, WORDS, config_file, sentence

RANKS = ParallelContext(0, 1, 0, torch.device("cpu"), "python")
LLAMA = {
    "family": "huggingface",
    "config": {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 96,
    },
}
SPLIT = "eval/lm_eval"
MEAN = {"aggregation": "mean", "higher_is_better": True}


def write_task(folder: Path, name: str, **keys: Any) -> str:
    """Write the YAML file of a task on the rows of ``rows.jsonl`` beside it, and return its path."""
    values = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        **keys,
    }
    text = yaml.safe_dump(values).replace("'!function lengths.of'", "!function lengths.of")
    (folder / f"{name}.yaml").write_text(text)
    return str(folder / f"{name}.yaml")


def write_tasks(folder: Path) -> list[str]:
    """Write a task of each kind of request, on rows of the corpus' words."""
    folder.mkdir()
    rng = np.random.default_rng(5)
    found = []
    for i in range(13):  # no multiple of the ranks
        topics = [list(WORDS)[(i + k) % 4] for k in range(3)]
        found.append(
            {
                "question": sentence(topics[0], rng, int(rng.integers(2, 20))),
                "choices": [" " + sentence(topic, rng, int(rng.integers(1, 5))) for topic in topics],
                "answer": i % 3,
                "next": " was" if i % 2 else f" {GLUE[i % 10]}",  # " was" is what a few steps make the likeliest word
                "page": " ".join(sentence(topic, rng, 30) for topic in topics),
            }
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (folder / "lengths.py").write_text("def of(doc, results):\n    return {'length': len(results[0])}\n")
    return [
        write_task(
            folder,
            "colours",
            output_type="multiple_choice",
            doc_to_text="{{question}}",
            doc_to_choice="{{choices}}",
            doc_to_target="answer",
            target_delimiter="",
            num_fewshot=1,
            fewshot_split="test",
            metric_list=[
                {"metric": "acc", **MEAN},
                {"metric": "acc_norm", **MEAN},
                {"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False},
            ],
        ),
        write_task(
            folder,
            "next_word",
            output_type="loglikelihood",
            doc_to_text="{{question}}",
            doc_to_target="{{next}}",
            target_delimiter="",
            metric_list=[
                {"metric": "acc", **MEAN},
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ],
        ),
        write_task(
            folder,
            "pages",
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{page}}",
            metric_list=[{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
        ),
        write_task(
            folder,
            "answers",
            output_type="generate_until",
            doc_to_text="{{question}}",
            doc_to_target="{{next}}",
            generation_kwargs={"until": ["s was w", "near"], "max_gen_toks": 20},
            process_results="!function lengths.of",
            metric_list=[{"metric": "length", **MEAN}],
        ),
    ]


def harness_scores(folder: Path, tasks: list[str], chat: bool = False) -> dict[str, float]:
    """The metrics of lm-eval's own model of transformers, by default or through the chat template."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4)
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        log_samples=False,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    return {
        f"{task}/{key.removesuffix(',none')}": value
        for task, values in found["results"].items()
        for key, value in values.items()
        if key.endswith(",none") and "stderr" not in key
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a run whose evaluations had tasks."""
    folder = tmp_path_factory.mktemp("harness")
    tasks = write_tasks(folder / "tasks")
    changes = {
        "eval": {"micro_tokens": 150, "lm_eval": tasks, "lm_eval_every": 2},
        "train": {"steps": 5, "eval_every": 1},
    }
    run_ranks(train_runs, 1, [(str(config_file(folder, model=LLAMA, **changes)), None)])
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    export(folder / "run", folder / "hf", ExportOptions(progress=False))
    return harness_scores(folder / "hf", sorted(str(path) for path in (folder / "tasks").glob("*.yaml")))


def evaluated(ranks: ParallelContext, run: str, overrides: list[str]) -> dict[str, float]:
    """What ``jepa-scale eval RUN overrides …`` prints of the tasks."""
    from jepa_scale.training.run import evaluate_checkpoint

    with contextlib.redirect_stdout(io.StringIO()) as out:
        evaluate_checkpoint(argparse.Namespace(run=Path(run), checkpoint="auto", overrides=overrides))
    line = next((each for each in out.getvalue().splitlines() if each.startswith("lm_eval")), "")
    words = line.split()[1:]
    return {name: float(value) for name, value in zip(words[::2], words[1::2], strict=True)}


def test_scores_are_those_of_the_export(folder, expected):
    assert expected.keys() == {
        *("colours/acc", "colours/acc_norm", "colours/brier_score", "next_word/acc", "next_word/perplexity"),
        *("pages/bits_per_byte", "answers/length"),
    }
    assert 0 < expected["next_word/acc"] < 1  # some are the likeliest tokens
    found = rows(folder / "run", SPLIT)
    assert [row["step"] for row in found] == [2, 4, 5]
    assert [row["step"] for row in rows(folder / "run", "eval/valid")] == [1, 2, 3, 4, 5]
    assert {name: found[-1][name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert found[-1]["answers/length"] < 20  # ended by a text within five words, as 20 tokens make twenty
    assert found[0]["pages/bits_per_byte"] > found[-1]["pages/bits_per_byte"]


@pytest.mark.parametrize(
    "engine", ["fsdp", pytest.param("zero3", marks=pytest.mark.matrix), pytest.param("tp", marks=pytest.mark.matrix)]
)
def test_two_ranks_share_the_requests(folder, expected, tmp_path, engine):
    overrides = ["engine.name=fsdp"]
    if engine == "zero3":  # nothing is too small to be sharded
        overrides = ["engine.name=deepspeed", f"engine.deepspeed={small_buckets(engine, str(tmp_path))}"]
    elif engine == "tp":
        overrides.append("engine.tp=2")
    found, none = run_ranks(evaluated, 2, str(folder / "run"), overrides)
    assert found == pytest.approx(expected, abs=1e-3, rel=1e-4)  # printed with four decimals
    assert not none


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory, folder):
    """Folder of a run on conversations, whose answers to the tasks' questions are what follows in them."""
    own = tmp_path_factory.mktemp("chat")
    asked = [json.loads(line) for line in (folder / "tasks" / "rows.jsonl").read_text().splitlines()]
    said = [
        {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["next"]}]}
        for row in asked
    ]
    (own / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said * 4))
    for name in ("colours", "next_word", "answers"):  # the likelihood of a text alone has no template
        text = (folder / "tasks" / f"{name}.yaml").read_text()
        described = "description: Answer in the words of the corpus.\n" if name == "next_word" else ""
        (folder / "tasks" / f"chat_{name}.yaml").write_text(
            described + text.replace(f"task: {name}", f"task: chat_{name}")
        )
    changes: dict[str, Any] = {
        "data": {"source": "chat", "path": str(own / "chat.jsonl"), "valid_fraction": 0.1, "vocab_size": 300},
        "eval": {"micro_tokens": 150, "lm_eval": chat_tasks(folder)},
        "train": {"steps": 5, "eval_every": 5},
    }
    config = config_file(own, model=LLAMA, **changes)
    values = yaml.safe_load(config.read_text())
    for key in ("documents", "max_length"):
        del values["data"][key]
    config.write_text(yaml.safe_dump(values))
    run_ranks(train_runs, 1, [(str(config), None)])
    return own


def chat_tasks(folder: Path) -> list[str]:
    return sorted(str(path) for path in (folder / "tasks").glob("chat_*.yaml"))


def test_runs_on_conversations_are_asked_through_their_template(folder, chat_folder):
    export(chat_folder / "run", chat_folder / "hf", ExportOptions(progress=False))
    expected = harness_scores(chat_folder / "hf", chat_tasks(folder), chat=True)
    assert len(expected) == 6 and expected != harness_scores(chat_folder / "hf", chat_tasks(folder))
    (row,) = rows(chat_folder / "run", SPLIT)
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_a_limit_takes_the_first_examples(folder):
    tasks = yaml.safe_dump([str(folder / "tasks" / "colours.yaml")], default_flow_style=True).strip()
    (found,) = run_ranks(evaluated, 1, str(folder / "run"), [f"eval.lm_eval={tasks}", "eval.lm_eval_limit=3"])
    assert found.keys() == {"colours/acc", "colours/acc_norm", "colours/brier_score"}
    assert found["colours/acc"] * 3 == pytest.approx(round(found["colours/acc"] * 3), abs=1e-3)


class Calls:
    """Runs tasks of an objective, and keeps their names and what they gave."""

    def __init__(self, objective: Any, backbone: Any) -> None:
        self.objective, self.backbone, self.made = objective, backbone, []

    def __call__(self, task: str, batch: Any, *args: Any) -> Any:
        out = getattr(self.objective, task)(self.backbone, batch, *args)
        self.made.append((task, out))
        return out


def parts(folder: Path) -> tuple[Any, Any, Any, Any]:
    """experiment, data, backbone, objective."""
    experiment = validate(load_config(str(folder / "run.yaml")))
    data = load_data(experiment.data)
    torch.manual_seed(0)
    backbone = build_backbone(experiment.model, data.vocab_size)
    return experiment, data, backbone.eval(), experiment.objective.build(backbone, data)


def test_only_what_is_asked_for_is_computed(folder):
    """Perplexities take no logits of all tokens, and answers end with the text that ends them."""
    experiment, data, backbone, objective = parts(folder)
    call = Calls(objective, backbone)
    for name, task in (("pages", "label_log_probs"), ("colours", "label_scores"), ("answers", "generate")):
        options = experiment.eval.model_copy(update={"lm_eval": [str(folder / "tasks" / f"{name}.yaml")]})
        test = lm_eval_test(find_tasks(options), options, data, backbone, objective, RANKS)
        assert test is not None and not call.made  # nothing is computed before the training
        with torch.no_grad():
            assert {key.split("/")[0] for key in test.run(call, RANKS)} == {name}
        assert {made for made, _ in call.made} == {task}
        call.made.clear()


def test_a_text_ends_an_answer_at_once(folder):
    _, data, backbone, objective = parts(folder)
    tokenizer = data.load_tokenizer()
    model = TextModel(tokenizer, 0, (0,), 96, 100)
    ended = ended_by(model, ("was w", "\n\n"))
    assert ended is not None and ended_by(model, ()) is None
    texts = [" the was was", " the was sail", " was was and much more of the same sail and net"]
    ids = [tokenizer.encode(text) for text in texts]
    assert [bool(ended(torch.tensor([row]))) for row in ids] == [True, False, False]  # the last has ended long before


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"doc_to_text": "{{nothing | fail}}"}, r"eval.lm_eval: '.*wrong.yaml' cannot be loaded .*named 'fail'"),
        ({"metric_list": [{"metric": "nowhere"}]}, r"eval.lm_eval: '.*wrong.yaml' cannot be (loaded|evaluated)"),
        (
            {"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}},
            r"'.*wrong.yaml' cannot be loaded .*nowhere.jsonl",
        ),
        ({"generation_kwargs": {"do_sample": True, "temperature": 0.7}}, r"'.*wrong.yaml' .* here they are greedy"),
        ({"generation_kwargs": {"max_gen_toks": 96}}, r"may have 96 tokens \(max_gen_toks\), and the model takes 96"),
        ({"output_type": "loglikelihood", "doc_to_target": ""}, r"cannot be evaluated here: .*no token of its own"),
        (
            {"output_type": "loglikelihood", "doc_to_target": "{{page}}"},
            r"the continuation '.*' has \d+ tokens, the model takes 96",
        ),
    ],
)
def test_a_task_that_cannot_be_evaluated_is_refused(folder, tmp_path, keys, message):
    source = folder / "tasks" / "answers.yaml"
    values = yaml.safe_load(source.read_text().replace("!function lengths.of", "null"))
    values |= {"process_results": None, "metric_list": [{"metric": "acc", **MEAN}], "task": "wrong"}
    if "output_type" not in keys:
        values["metric_list"] = [{"metric": "exact_match", **MEAN}]
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (values | keys).items() if v is not None}))
    experiment, data, backbone, objective = parts(folder)
    options = experiment.eval.model_copy(update={"lm_eval": [str(path)]})
    with pytest.raises(InputError, match=message):
        lm_eval_test(find_tasks(options), options, data, backbone, objective, RANKS)


class Silent(LanguageModeling):
    predicts_tokens = False


def test_models_and_data_that_cannot_are_refused(folder):
    experiment, data, backbone, objective = parts(folder)
    tasks = find_tasks(experiment.eval)
    test = lambda data, objective: lm_eval_test(tasks, experiment.eval, data, backbone, objective, RANKS)  # noqa: E731
    with pytest.raises(InputError, match=r"eval.lm_eval: the objective trains no next-token prediction"):
        test(data, Silent(LmOptions(), backbone, data))

    class Other:
        tokenizer = None
        splits = {"valid": []}

    with pytest.raises(InputError, match=r"eval.lm_eval: the data have no tokenizer"):
        test(Other, objective)
    Other.tokenizer, Other.splits = data.tokenizer, {"lm_eval": []}
    with pytest.raises(InputError, match=r"eval.lm_eval: the data have a split 'lm_eval'"):
        test(Other, objective)
    assert lm_eval_test([], experiment.eval, data, backbone, objective, RANKS) is None


@pytest.fixture
def few_tasks(folder, tmp_path, monkeypatch):
    """Has lm-eval know the tasks of ``folder`` and of ``tmp_path`` by name instead of its own, whose index takes seconds."""
    from lm_eval.tasks import TaskManager

    places = [folder / "tasks", tmp_path]
    few = lambda include_defaults: TaskManager(include_defaults=False, include_path=places)  # noqa: E731
    monkeypatch.setattr("lm_eval.tasks.TaskManager", few)


def test_names_are_checked_before_the_data_are_read(folder, few_tasks, monkeypatch):
    monkeypatch.setattr("jepa_scale.training.build.load_data", None)
    config = lambda value: validate(load_config(str(folder / "run.yaml"), [f"eval.lm_eval={value}"]))  # noqa: E731
    with pytest.raises(InputError, match=r"eval.lm_eval: 'colors' is no task.* did you mean 'colours'\?"):
        build(config("[colors]"), RANKS)
    with pytest.raises(InputError, match=r"eval.lm_eval: no file 'nowhere.yaml'"):
        build(config("[nowhere.yaml]"), RANKS)
    with pytest.raises(InputError, match=r"eval.lm_eval: task 'colours' is in both 'colours' and '.*yaml'"):
        build(config(f"[colours, {folder / 'tasks' / 'colours.yaml'}]"), RANKS)


def test_keys_without_tasks_are_told(folder, caplog):
    experiment, data, backbone, objective = parts(folder)
    options = experiment.eval.model_copy(update={"lm_eval": [], "lm_eval_limit": 3})
    for ranks in (RANKS, ParallelContext(1, 2, 0, torch.device("cpu"), "python")):
        assert lm_eval_test([], options, data, backbone, objective, ranks) is None
    assert caplog.messages == [
        f"eval.{key}: has no effect without eval.lm_eval; name tasks there, or remove the key"
        for key in ("lm_eval_every", "lm_eval_limit")
    ]


@pytest.mark.matrix  # the index of lm-eval's own tasks takes seconds
def test_tasks_of_lm_eval_are_known_by_name():
    with pytest.raises(InputError, match=r"eval.lm_eval: 'helaswag' is no task.* did you mean 'hellaswag'\?"):
        find_tasks(PerplexityOptions(lm_eval=["helaswag"]))


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(
        InputError, match=r"eval.lm_eval: needs the package lm-eval .*pip install 'jepa-scale\[lm-eval\]'"
    ):
        find_tasks(PerplexityOptions(lm_eval=["hellaswag"]))


@pytest.mark.parametrize("aggregated", [True, False])
def test_metrics_of_a_group_stand_for_its_tasks(folder, tmp_path, few_tasks, aggregated):
    of_group = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    group = {"group": "both", "task": ["colours", "next_word"]} | (
        {"aggregate_metric_list": of_group} if aggregated else {}
    )
    (tmp_path / "group.yaml").write_text(yaml.safe_dump(group))
    experiment, data, backbone, objective = parts(folder)
    options = experiment.eval.model_copy(update={"lm_eval": ["both"], "lm_eval_limit": 2})
    test = lm_eval_test(find_tasks(options), options, data, backbone, objective, RANKS)
    assert test is not None
    with torch.no_grad():
        found = test.run(Calls(objective, backbone), RANKS).keys()
    of_tasks = {"colours/acc", "colours/acc_norm", "colours/brier_score", "next_word/acc", "next_word/perplexity"}
    assert found == ({"both/acc"} if aggregated else of_tasks)


def test_names_of_metrics():
    found = {
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "exact_match,strict": 1,
        "alias": "t",
        "sample_len": 3,
        "x,none": "N/A",
    }
    assert lm_eval_tasks._numbers("t", found) == {"t/acc": 0.5, "t/exact_match/strict": 1.0}
