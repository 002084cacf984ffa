"""Build model, objective, engine, data and evaluation from an experiment: the one module that imports every part."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jepa_scale.checkpoint import Manifest
from jepa_scale.checkpoint.partial_state import PartialState
from jepa_scale.checkpoint.shard_view import Checkpointable
from jepa_scale.checkpoint.split_state import SplitState
from jepa_scale.config.schema import EngineConfig
from jepa_scale.data import load_data
from jepa_scale.data.sampling.batches import BatchSampler, DataParallelSlice, SampleBatchSampler, TokenBatchSampler
from jepa_scale.data.sampling.loader import Loader
from jepa_scale.distributed.comm import ParallelContext, broadcast_object, init_tp_group, tp_group
from jepa_scale.distributed.tp_group import Split, TensorParallelGroup
from jepa_scale.engines import check_engine, create_engine, resolve
from jepa_scale.engines.base import Engine, EngineOptions
from jepa_scale.engines.ema import Teacher, TeacherModel
from jepa_scale.engines.precision import compute_dtype, resolve_precision
from jepa_scale.engines.weights import Weights, built_by_rank_0
from jepa_scale.evaluation import lm_eval_tasks
from jepa_scale.evaluation.chat import Output
from jepa_scale.evaluation.lm_eval_tasks import find_tasks, lm_eval_test
from jepa_scale.evaluation.run import Results, chat_test, device_call, evaluate, generates
from jepa_scale.evaluation.text_probe import SPLIT, probe_test
from jepa_scale.experiment import Experiment
from jepa_scale.models.backbone import Backbone
from jepa_scale.models.compiling import compile_blocks
from jepa_scale.models.families.fingerprint import model_fingerprint
from jepa_scale.models.families.probe import probe
from jepa_scale.models.frozen.base import STATE, Base, base_of
from jepa_scale.models.frozen.four_bit import check_device, quantise
from jepa_scale.models.generation.cache_check import check_generation
from jepa_scale.models.head import compile_head
from jepa_scale.models.loading import build_backbone, check_pretrained
from jepa_scale.models.options import check_options
from jepa_scale.models.recompute import recompute
from jepa_scale.models.tensor_parallel import layers as tensor_parallel
from jepa_scale.objectives.base import DECODER, JepaModel, Objective
from jepa_scale.objectives.costs import StepFlops
from jepa_scale.optim import parameter_groups
from jepa_scale.training.flop_budget import steps_of_run
from jepa_scale.training.overview import ModuleSize
from jepa_scale.training.padding import announce_layout
from jepa_scale.utils.errors import InputError


@dataclass(slots=True)
class TrainingComponents:
    """Everything a training loop needs."""

    experiment: Experiment
    """``engine.precision`` is ``fp32`` or ``bf16`` here, never ``auto``."""
    ranks: ParallelContext
    engine: Engine
    objective: Objective
    teacher: Teacher | None
    data: Any
    sampler: BatchSampler
    batches: Callable[[int, int], Loader]  # (first step, end) → this rank's micro-batches of each step
    evaluate: Callable[..., Results]
    """(between, step, run_dir, with_tasks): ``between()`` is called between the forwards, and may raise to end the evaluation;
    generated answers are saved under that step in the run directory, if one is given; the tasks of ``eval.lm_eval`` run by default."""
    steps: int  # of the whole run: ``train.steps``, those that ``train.flops`` pay for, or fewer if the data end
    model_fingerprint: dict[str, Any]  # what decides, besides the weights, what the backbone computes
    flops: StepFlops  # this rank's micro-batches of a step → FLOPs of training on them, over its tensor-parallel group
    splits: dict[str, Split]  # of the parameters that are split over the tensor-parallel group, by name
    model_size: ModuleSize
    objective_size: ModuleSize
    base: Base | None  # the frozen weights that checkpoints leave out, as they can be read again

    @property
    def evaluated(self) -> list[str]:
        """Names of the splits that are evaluated."""
        options = self.experiment.eval
        probe = [SPLIT] if getattr(options, "probe", None) else []
        tasks = [lm_eval_tasks.SPLIT] if getattr(options, "lm_eval", None) else []
        return [*(name for name, split in self.data.splits.items() if len(split)), *probe, *tasks]

    @property
    def parts(self) -> list[Checkpointable]:
        """The objects whose state a checkpoint saves."""
        parts: list[Checkpointable] = [self.engine, *([self.teacher] if self.teacher else [])]
        if self.base:
            parts = [PartialState(part, {f"{DECODER}{name}" for name in self.base.tensors}) for part in parts]
        return [SplitState(part, self.splits) for part in parts] if self.splits else parts


def set_threads(options: EngineConfig, ranks: ParallelContext) -> None:
    """Share the host's cores among its ranks; BLAS threads that outnumber the cores fight each other."""
    if ranks.device.type == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))
        torch.set_num_threads(options.threads or max(1, len(os.sched_getaffinity(0)) // local))


def create_sampler(experiment: Experiment, data: Any, objective: Objective, ranks: ParallelContext) -> BatchSampler:
    """Return the batch sampler of ``train:``, which counts a batch in samples or in tokens.

    Raises:
        InputError: the batch cannot be split over so many ranks, or a sample's views do not fit a micro-batch.
    """
    train, seed = experiment.train, experiment.run.seed
    order = data.order(seed)
    sizes = objective.view_tokens(np.array([data.train.mean_size])) if train.batch_tokens else np.ones(1)
    samples = train.batch_size or int(train.batch_tokens / sizes[0])
    if samples < objective.least_samples:
        raise InputError(
            f"train.{'batch_size' if train.batch_size else 'batch_tokens'}: about {samples} samples in a step; objective "
            f"{experiment.objective.name!r} compares the samples of a step, and needs at least {objective.least_samples}"
        )
    if train.batch_size:
        dp_slice = DataParallelSlice(train.accumulation, ranks.dp_rank, ranks.dp_size)
        near = data.train.sizes if objective.padded else None
        return SampleBatchSampler(order, seed, train.batch_size, dp_slice, data.fingerprint, train.epochs, near)
    accumulation, rest = divmod(train.batch_tokens, train.micro_tokens * ranks.dp_size)
    if rest:
        raise InputError(
            f"train.batch_tokens: {train.batch_tokens} is no multiple of train.micro_tokens={train.micro_tokens} "
            f"on each of {ranks.dp_size} ranks; make it one of {train.micro_tokens * ranks.dp_size}"
        )
    longest = int(objective.view_tokens(np.array([data.train.max_size]))[0])
    if longest > train.micro_tokens:
        raise InputError(
            f"train.micro_tokens: the longest sample's views take {longest} tokens, more than {train.micro_tokens}; "
            "raise it, or lower data.max_length"
        )
    return TokenBatchSampler(
        order,
        seed,
        lambda samples: objective.view_tokens(data.train.sizes(samples)),
        train.micro_tokens,
        float(sizes[0]),
        DataParallelSlice(accumulation, ranks.dp_rank, ranks.dp_size),
        data.fingerprint,
        train.epochs,
        objective.padded,
    )


def build(
    experiment: Experiment, ranks: ParallelContext, resumed: Manifest | None = None, steps: int = 0
) -> TrainingComponents:
    """Build all parts of a run, identically on every rank except for the weights.

    Rank 0 alone has the weights; the engine takes them from it one at a time.

    Args:
        resumed: manifest of the checkpoint that training goes on from. The steps that are left follow from its position
            in the data, as the batches may have another size now.
        steps: the run's number of steps, if it is not to be computed.
    """
    precision = resolve_precision(experiment.engine.precision, ranks)
    experiment = replace(experiment, engine=experiment.engine.model_copy(update={"precision": precision}))
    options, optim = experiment.engine, experiment.optim
    set_threads(options, ranks)
    torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
    engine_name = resolve(options.name, ranks)
    ranks = init_tp_group(ranks, options.tp)
    check_engine(engine_name, options, optim, ranks)  # before the data is read and the model made
    check_options(experiment.model)
    if experiment.model.load_in_4bit:
        if options.compile:
            raise InputError("engine.compile: is not tried with model.load_in_4bit; remove one of them")
        check_device(ranks.device)
    check_pretrained(experiment.model)
    tasks = find_tasks(experiment.eval)

    data = load_data(experiment.data)
    answers = generates(experiment.eval) or any(each.generates for each in tasks)
    module = built_by_rank_0(lambda: probed(model_of(experiment, data), experiment, ranks, answers), ranks)
    backbone, objective = module.backbone, module.objective
    check_fit(experiment, backbone, objective, data)
    test = chat_test(experiment.eval, data, backbone, objective.predicts_tokens)
    probe = probe_test(experiment.eval, data, backbone, objective)
    harness = lm_eval_test(tasks, experiment.eval, data, backbone, objective, ranks)
    sampler = create_sampler(experiment, data, objective, ranks)
    start = sampler.resume(resumed.state["data"], experiment.data.accept_changes) if resumed else 0
    flops = objective.flops(backbone)
    fingerprint = model_fingerprint(backbone, experiment.model)
    # a checkpoint that names no base holds all weights, and so do those that follow it
    names_base = resumed is None or STATE in resumed.state
    base = broadcast_object(base_of(backbone.decoder, experiment.model) if names_base and ranks.is_main else None)
    model_size, objective_size = ModuleSize.of(backbone.decoder), ModuleSize.of(objective)
    weights = Weights(module, ranks)
    if experiment.model.load_in_4bit:
        quantise(backbone, compute_dtype(precision), lambda name, _: weights.take(f"{DECODER}{name}"))
    splits = split_over_tp_group(backbone, ranks)
    copies = objective.teacher_copies(backbone)

    def batches(start_step: int, steps: int) -> Loader:
        return Loader(
            data.train,
            sampler,
            objective.view_transform(),
            sequences=objective.sequences,
            start_step=start_step,
            steps=steps,
            seed=experiment.run.seed,
            workers=experiment.data.workers,
            on_error=experiment.data.on_error,
        )

    if backbone.padded or backbone.reads_neighbours:
        announce_layout(backbone, batches(start, 0), ranks)
    if not steps:
        kind = partial(objective.kind_of_step, seed=experiment.run.seed)
        steps = steps_of_run(experiment, batches(start, 0), flops, kind, start, resumed, ranks.dp_size)
    blocks = [*backbone.layers, *objective.blocks]
    if options.compile:
        compile_blocks(blocks)
        compile_head(backbone.decoder.get_output_embeddings())
    recompute(blocks, options.activation_checkpointing)

    engine = create_engine(
        engine_name,
        module,
        shard=blocks,
        groups=parameter_groups(module, optim, objective.head_prefixes(backbone)),
        optim_options=optim,
        engine_options=EngineOptions(
            precision=precision,
            clip_norm=optim.clip_norm,
            accumulation=sampler.accumulation,
            deepspeed=Path(options.deepspeed),
            clip_groups=objective.clip_groups(module),
            split=splits,
            replicas=options.replicas,
            bounds=objective.bounds,
        ),
        ranks=ranks,
        weights=weights,
    )
    teacher = None
    if copies:
        teacher = Teacher(engine, TeacherModel(copies), objective.teacher_options(), steps)
        objective.teacher = teacher

    def run_evaluation(
        between: Callable[[], None] = lambda: None,
        step: int = 0,
        run_dir: Path | None = None,
        with_tasks: bool = True,
    ) -> Results:
        output = Output(run_dir, step, experiment.log.progress)
        engine.eval()
        try:
            with torch.no_grad():
                call = device_call(engine, ranks.device, between)
                due = harness if with_tasks else None
                return evaluate(objective, call, data, experiment.eval, ranks, test, output, probe, due)
        finally:
            engine.train()

    return TrainingComponents(
        experiment,
        ranks,
        engine,
        objective,
        teacher,
        data,
        sampler,
        batches,
        run_evaluation,
        steps,
        fingerprint,
        flops,
        splits,
        model_size,
        objective_size,
        base,
    )


def check_fit(experiment: Experiment, backbone: Backbone, objective: Objective, data: Any) -> None:
    """Raise InputError if nothing would train some blocks, or a sample is longer than the model's positions."""
    if backbone.stop_gradient_layer and objective.detached:
        raise InputError(
            f"objective.detach: nothing would train blocks 1 to {backbone.stop_gradient_layer}, which model.bridge_grad_barrier shuts off "
            "from next-token prediction; remove one of the two"
        )
    if backbone.stop_gradient_layer and (objective.tap or backbone.num_layers) > backbone.stop_gradient_layer:
        raise InputError(
            f"model.bridge_grad_barrier: nothing would train blocks 1 to {backbone.stop_gradient_layer}, as objective "
            f"{experiment.objective.name!r} has no tap there; remove it, or lower objective.tap_layer"
        )
    positions = backbone.position_limit
    longest = data.train.max_size - 1  # nothing follows the last token
    if objective.predicts_tokens and positions is not None and longest > positions:
        raise InputError(
            f"data.max_length: a sample has {longest} tokens to predict from, and the model is made for {positions} "
            f"({backbone.limited_by}); lower it, or raise model.max_position_embeddings if this decoder is a new one"
        )


def model_of(experiment: Experiment, data: Any) -> JepaModel:
    """Build the model of a run from its seed, on one device."""
    torch.manual_seed(experiment.run.seed)  # the backbone first: its weights do not depend on the objective
    backbone = build_backbone(experiment.model, data.vocab_size)
    return JepaModel(backbone, experiment.objective.build(backbone, data))


def probed(module: JepaModel, experiment: Experiment, ranks: ParallelContext, answers: bool) -> JepaModel:
    """Probe a decoder of transformers on rank 0, which has the weights, and return the module unchanged.

    Args:
        answers: whether the evaluation generates.

    Raises:
        InputError: the family does not compute on packed or padded segments what it computes on each alone, or the evaluation
            generates and a family in padded rows or with recurrences cannot.
    """
    if experiment.model.family == "huggingface" and ranks.is_main:
        backbone, dtype = module.backbone, compute_dtype(experiment.engine.precision)
        probe(backbone, ranks.device, dtype)
        if (backbone.padded or backbone.reads_neighbours) and answers:
            check_generation(backbone, ranks.device, dtype)
    return module


def split_over_tp_group(backbone: Backbone, ranks: ParallelContext) -> dict[str, Split]:
    """Split the backbone over the tensor-parallel group, in place, and return name → split of each split parameter.

    The names are those in :class:`JepaModel`. The result is empty without tensor parallelism.
    """
    group = tp_group()
    if group is None:
        return {}
    found = tensor_parallel.split(backbone, TensorParallelGroup(group, ranks.rank % ranks.tp_size, ranks.tp_size))
    return {f"backbone.{name}": where for name, where in found.items()}
