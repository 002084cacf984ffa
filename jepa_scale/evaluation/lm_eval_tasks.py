"""Tasks of lm-eval (github.com/EleutherAI/lm-evaluation-harness) at an evaluation, on the model that is being trained."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jepa_scale.config.loading import find_file
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.evaluation.lm_eval_model import TextModel, harness_model
from jepa_scale.evaluation.options import EvaluationOptions, PerplexityOptions
from jepa_scale.models.backbone import Backbone
from jepa_scale.objectives.base import Objective
from jepa_scale.objectives.tasks import Call
from jepa_scale.utils.errors import InputError, one_line, suggestion

logger = logging.getLogger(__name__)

SPLIT = "lm_eval"
"""Name of the metrics' split."""
KEY = "eval.lm_eval"
SEED = 1234
"""Seed of a task's examples in its prompts, lm-eval's own default."""


@dataclass(frozen=True, slots=True)
class LmEvalTasks:
    """The tasks of one entry of ``eval.lm_eval``: a task, or all those of a group or tag.

    Attributes:
        name: as the config has it. title: the name of the task or group in metrics.
        loaded: lm-eval's dictionary of tasks and groups, with their data.
    """

    name: str
    title: str
    loaded: Any

    @property
    def generates(self) -> bool:
        return any(task.OUTPUT_TYPE == "generate_until" for task in self.loaded["tasks"].values())

    def run(self, lm: Any, limit: int, chat: bool) -> dict[str, float]:
        """Return the metrics by ``task/metric``: those of the group, if it has any, or else of each task.

        Args:
            chat: ask through the chat template; examples in a prompt are turns of the conversation then.
        """
        from lm_eval.evaluator import evaluate

        for task in self.loaded["tasks"].values():
            task.set_fewshot_seed(seed=SEED)  # the same prompts at every evaluation
        with _without_bars():
            found = evaluate(
                lm,
                self.loaded,
                limit=limit or None,
                bootstrap_iters=0,
                log_samples=False,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
        assert found is not None
        of_group = _numbers(self.title, found["results"].get(self.title, {}))
        return of_group or {
            k: v for task in self.loaded["tasks"] for k, v in _numbers(task, found["results"][task]).items()
        }


@dataclass(frozen=True, slots=True)
class LmEvalTest:
    """The tasks of ``eval.lm_eval`` with all that they need of the model, checked before training begins."""

    tasks: list[LmEvalTasks]
    model: TextModel
    limit: int

    def run(self, call: Call, ranks: ParallelContext) -> dict[str, float]:
        """Return the metrics of all tasks by ``task/metric``, or ``task/metric/filter``. Collective; the same on every rank."""
        lm = harness_model(self.model, call, ranks)
        return {name: value for each in self.tasks for name, value in each.run(lm, self.limit, self.model.chat).items()}


def _numbers(task: str, values: dict[str, Any]) -> dict[str, float]:
    """Return the metrics among lm-eval's results of a task, whose names there are ``metric,filter``."""
    found = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            found[f"{task}/{metric}" if kind == "none" else f"{task}/{metric}/{kind}"] = float(value)
    return found


@contextmanager
def _without_bars() -> Iterator[None]:
    """Have lm-eval build its requests without a progress bar, for which it has no option."""
    from lm_eval.api import task

    bars: Any = task.tqdm
    task.tqdm = lambda rows, **_: rows  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        task.tqdm = bars


def find_tasks(options: EvaluationOptions) -> list[LmEvalTasks]:
    """Load the tasks of ``eval.lm_eval`` with their data; [] if there are none.

    Raises:
        InputError: lm-eval is not installed, there is no such task or file, or a task cannot be loaded.
    """
    names = getattr(options, "lm_eval", [])
    if not names:
        return []
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"{KEY}: needs the package lm-eval ({error}); install it: pip install 'jepa-scale[lm-eval]'"
        ) from None
    files = {name: find_file(name, KEY) for name in names if name.endswith((".yaml", ".yml"))}
    manager = TaskManager(include_defaults=len(files) < len(names))  # the index of all takes seconds
    found: list[LmEvalTasks] = []
    owner: dict[str, str] = {}
    for name in names:
        if name not in files and name not in manager.all_tasks:
            hint = suggestion(name, manager.all_tasks, "`lm-eval ls tasks` lists them")
            raise InputError(f"{KEY}: {name!r} is no task, group or tag of lm-eval, nor a .yaml file; {hint}")
        each = _load(manager, name, files.get(name))
        for task in each.loaded["tasks"]:
            if task in owner:
                raise InputError(f"{KEY}: task {task!r} is in both {owner[task]!r} and {name!r}; remove one of them")
            owner[task] = name
        found.append(each)
    return found


def _load(manager: Any, name: str, file: Path | None) -> LmEvalTasks:
    try:
        loaded = manager.load([str(file) if file else name])
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
    except Exception as error:  # of the hub, the network, a script or a file: whatever a task's loader meets
        raise InputError(
            f"{KEY}: {name!r} cannot be loaded ({_reason(error)}); correct it, or load its data once where the Hugging Face hub can "
            "be reached"
        ) from error
    if not loaded["tasks"]:
        raise InputError(f"{KEY}: {name!r} has no tasks; give a task, a group or a tag")
    groups = loaded.get("groups") or {}
    return LmEvalTasks(name, next(iter(groups), name) if file else name, loaded)


def lm_eval_test(
    tasks: list[LmEvalTasks],
    options: EvaluationOptions,
    data: Any,
    backbone: Backbone,
    objective: Objective,
    ranks: ParallelContext,
) -> LmEvalTest | None:
    """Prepare the tasks for a model, and run each through lm-eval once without a forward; None if there are none.

    Raises:
        InputError: the objective predicts no tokens, the data have no tokenizer, or a task cannot be evaluated as it is.
    """
    if not tasks:
        if ranks.is_main:
            _warn_of_unused(options)
        return None
    assert isinstance(options, PerplexityOptions)
    if not objective.predicts_tokens:
        raise InputError(f"{KEY}: the objective trains no next-token prediction, which the tasks need; remove the key")
    if getattr(data, "tokenizer", None) is None:
        raise InputError(
            f"{KEY}: the data have no tokenizer to read tasks with; prepare the data again or remove the key"
        )
    if SPLIT in data.splits:
        raise InputError(f"{KEY}: the data have a split {SPLIT!r}, the name of the tasks' metrics; rename the split")
    tokenizer = data.load_tokenizer()
    ends = [tokenizer.eos_token_id, *(data.special.get(name) for name in ("end", "eos"))]
    stop = tuple(dict.fromkeys(n for n in ends if n is not None))
    prefix = next((n for n in (tokenizer.bos_token_id, *stop) if n is not None), None)
    if prefix is None:
        raise InputError(f"{KEY}: the data's tokenizer has neither a BOS nor an EOS token, one of which begins a text")
    chat = getattr(data, "kind", "") == "chat" and not data.plain and bool(getattr(tokenizer, "chat_template", None))
    model = TextModel(tokenizer, prefix, stop, backbone.position_limit, options.micro_tokens, objective.padded, chat)
    for each in tasks:
        _check(partial(each.run, harness_model(model, None, ranks), options.lm_eval_limit, chat), each.name)
    return LmEvalTest(tasks, model, options.lm_eval_limit)


def _warn_of_unused(options: EvaluationOptions) -> None:
    """Warn of keys that have no effect without tasks. They are not refused: ``lm_eval=[]`` takes a config's tasks away."""
    for key in ("lm_eval_every", "lm_eval_limit"):
        field = type(options).model_fields.get(key)
        if field is not None and getattr(options, key) != field.default:
            logger.warning(f"eval.{key}: has no effect without {KEY}; name tasks there, or remove the key")


def _check(run: Any, name: str) -> None:
    try:
        metrics = run()
    except Exception as error:  # of a template, a function of the task's, a metric's package
        raise InputError(
            f"{KEY}: {name!r} cannot be evaluated here: {_reason(error)}; leave it out or correct it"
        ) from error
    if not metrics:
        raise InputError(f"{KEY}: {name!r} has no metric that is a number; leave it out or correct it")


def _reason(error: Exception) -> str:
    """Return the text of an error; that of a KeyError is quoted otherwise."""
    return one_line(Exception(error.args[0]) if isinstance(error, KeyError) and error.args else error)
