"""Evaluate a run's splits, by the options of ``eval:`` that belong to its data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from jepa_scale.data.sampling.rng import ViewTransform
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.evaluation import chat, lm_eval_tasks, perplexity, reversal, text_probe, token_accuracy
from jepa_scale.evaluation.encode import text_batches
from jepa_scale.evaluation.lm_eval_tasks import LmEvalTest
from jepa_scale.evaluation.options import ChatEvalOptions, EvalOptions, EvaluationOptions
from jepa_scale.evaluation.snapshot import save_snapshot
from jepa_scale.evaluation.text_probe import ProbeTest
from jepa_scale.models.backbone import Backbone
from jepa_scale.objectives.base import Objective
from jepa_scale.objectives.lm import lm_views
from jepa_scale.objectives.tasks import Call, Task
from jepa_scale.packing import PackedBatch
from jepa_scale.utils.errors import InputError

Results = dict[str, dict[str, float]]


def generates(options: EvaluationOptions) -> bool:
    """Return whether the evaluation generates answers, with a key-value cache."""
    return isinstance(options, ChatEvalOptions) and bool(options.metrics)


def chat_test(
    options: EvaluationOptions, data: Any, backbone: Backbone, predicts_tokens: bool = True
) -> chat.ChatTest | None:
    """Return the questions for generation, from the rows of every split; None if the evaluation generates nothing.

    Raises:
        InputError: naming the key: the objective trains no model that generates, the data have no tokenizer, or a row's
            database does not exist.
    """
    if not generates(options):
        return None
    assert isinstance(options, ChatEvalOptions)
    if not predicts_tokens:
        raise InputError(
            "eval.metrics: the objective trains no next-token prediction, so nothing can be generated; remove the key"
        )
    if data.tokenizer is None:
        raise InputError("eval.metrics: the data have no tokenizer to decode answers with; prepare the data again")
    tokenizer = data.load_tokenizer()

    def decode(tokens: list[int]) -> str:
        text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    questions = {
        split: [
            chat.question(examples[row], row, split, options)
            for row in chat.chosen(len(examples), options.max_generations)
        ]
        for split, examples in data.splits.items()
    }
    stop = sorted({data.special[name] for name in ("end", "eos") if name in data.special})
    positions = getattr(backbone.decoder.config, "max_position_embeddings", None)
    return chat.ChatTest(options, questions, decode, tuple(stop), positions)


def evaluate(
    objective: Objective,
    call: Call,
    data: Any,
    options: EvaluationOptions,
    ranks: ParallelContext,
    test: chat.ChatTest | None = None,
    output: chat.Output | None = None,
    probe: ProbeTest | None = None,
    tasks: LmEvalTest | None = None,
) -> Results:
    """Return the metrics of every split, of ``probe`` and of ``lm_eval``. Collective; the same result on every rank.

    Args:
        test: result of :func:`chat_test`. output: where generations and snapshots are saved; None = nowhere.
        probe: result of :func:`jepa_scale.evaluation.text_probe.probe_test`.
        tasks: result of :func:`jepa_scale.evaluation.lm_eval_tasks.lm_eval_test`.
    """
    if isinstance(options, EvalOptions):
        return reversal.evaluate(objective.answer_generator(call), data.splits, data.names, options, ranks.device)

    def batches(examples: Any, views: ViewTransform, samples: int, **more: Any) -> Iterator[PackedBatch]:
        return text_batches(examples, views, samples, options.micro_tokens, ranks, near=objective.padded, **more)

    results: Results = {split: {} for split, each in data.splits.items() if len(each)}
    if objective.predicts_tokens:
        whole: dict[str, Callable[[], Any]]
        whole = {s: partial(batches, each, lm_views, options.max_samples) for s, each in data.splits.items()}
        results = perplexity.evaluate(partial(call, "label_log_probs"), whole, ranks.device)
        if data.kind == "tokens":
            for split, values in token_accuracy.evaluate(partial(call, "label_matches"), whole, ranks.device).items():
                results[split] |= values
    if diagnostics := objective.diagnostics(call):
        for split in results:
            more = {"sequences": objective.sequences, "tokens": diagnostics.view_tokens}
            fixed = batches(data.splits[split], diagnostics.views, diagnostics.samples, **more)
            results[split] |= (measured := diagnostics.measure(fixed))
            if measured and output and output.run_dir and ranks.is_main:
                save_snapshot(diagnostics.representations, output.run_dir, output.step, split)
    if test is not None:
        for split, values in test.run(call, ranks, output or chat.Output()).items():
            results[split] = results.get(split, {}) | values
    if probe is not None:
        results[text_probe.SPLIT] = probe.run(objective, call, ranks)
    if tasks is not None:
        results[lm_eval_tasks.SPLIT] = tasks.run(call, ranks)
    return {split: values for split, values in results.items() if values}


def device_call(engine: Any, device: torch.device, between: Callable[[], None]) -> Call:
    """Return a :class:`Call` through an engine; ``between`` is called before each forward."""

    def call(task: Task, batch: Any, *args: Any) -> Any:
        between()
        return engine.forward(task, batch.to(device), *args)

    return call
