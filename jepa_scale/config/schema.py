"""The sections of a config and their keys.

Sections are pydantic models: unknown keys and wrong types are errors that name the key, and every key is declared with
its description. The options of an objective, a source, a model and an evaluation are declared as :class:`Section`
classes
beside their code.
"""

from __future__ import annotations

import warnings
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, field_validator, model_validator

from jepa_scale.config.values import LocalPath, RunName, Text
from jepa_scale.utils.errors import suggestion
from jepa_scale.utils.splits import TRAIN, current_key, split_key


class Section(BaseModel):
    """A group of keys. Unknown keys are errors, and a section is frozen once it has been checked.

    A value must have the type of its key: true is no number, "3" is no number, 3.0 is no integer (3 is a float, too). Infinity
    and NaN are refused.

    To change a value, make a new section with ``section.model_copy(update={...})``. The new value is not checked.
    """

    # a validator is built when its section is first used: an experiment uses few of the many sections
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
        defer_build=True,
    )

    former_names: ClassVar[dict[str, str]] = {}
    """A key's name in the last release → its name now. A config may use the former name for one more release."""

    @model_validator(mode="before")
    @classmethod
    def _read_former_names(cls, values: Any) -> Any:
        for former, name in cls.former_names.items():
            if isinstance(values, dict) and former in values:
                if name in values:
                    raise ValueError(f"{former} is the former name of {name}, and both are set; remove {former}")
                warnings.warn(
                    f"the key {former} has a new name; write {name} in the config", FutureWarning, stacklevel=1
                )
                values = {(name if key == former else key): value for key, value in values.items()}
        return values

    def resolved(self) -> dict[str, Any]:
        """Return all keys in use, with defaults filled in, as plain YAML values that load as the same section."""
        return self.model_dump(mode="json", exclude_none=True)

    def _fill(self, **values: Any) -> None:
        """Set keys that follow from others. Only a validator of the section may call this, before the section is in
        use."""
        self.__dict__.update(values)


T = TypeVar("T")
Pair = Annotated[tuple[T, T], Strict(False)]
"""A list of two values: YAML has no tuples."""


class RunConfig(Section):
    name: RunName = Field("", description="Name of the run, and of its folder; empty = the config's file name.")
    dir: LocalPath = Field("runs", description="Folder that holds the run directories.")
    seed: int = Field(0, ge=0, description="Seed of everything random: weights, data order, views.")


class EngineConfig(Section):
    name: Literal["auto", "deepspeed", "fsdp"] = Field(
        "auto", description="auto = DeepSpeed under its own launcher, FSDP2 otherwise."
    )
    deepspeed: LocalPath = Field("configs/ds/zero1.json", description="DeepSpeed JSON; its stage is the ZeRO stage.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="Compute dtype; masters and moments stay fp32. auto = bf16 where every rank's device has instructions "
        "for it, fp32 elsewhere. fp16 has dynamic loss scaling.",
    )
    tp: int = Field(
        1, ge=1, description="Degree of tensor parallelism: so many neighbouring ranks share each layer; 1 = none."
    )
    replicas: int = Field(
        1, ge=1, description="FSDP2: copies of the model, each sharded over its own ranks (HSDP); 1 = over all ranks."
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="What of a block is computed again in the backward pass: full = all; selective = all but matrix "
        "products and attention.",
    )
    compile: bool = Field(
        False, description="torch.compile each block, and the LM head's loss; its first steps take a minute or more."
    )
    tf32: bool = Field(True, description="fp32 matrix products in TF32 on GPUs that have it; 3 digits instead of 7.")
    threads: int = Field(0, ge=0, description="CPU threads a rank; 0 = cores / ranks on this host (CPU runs only).")


class GroupOverride(Section):
    lr: float | None = Field(None, gt=0, description="Peak learning rate of these parameters; null = as without.")
    weight_decay: float | None = Field(
        None, ge=0, description="Their weight decay, whatever their shape; null = as without."
    )
    method: Literal["adamw", "muon"] | None = Field(
        None,
        description="What steps them; muon = linear layers' weights, or the matrix named in full; null = as without.",
    )


class OptimConfig(Section):
    method: Literal["adamw", "muon"] = Field(
        "adamw", description="muon = the weights of linear layers by Muon, everything else and the LM head by AdamW."
    )
    lr: float = Field(1e-3, gt=0, description="Peak learning rate of the backbone.")
    lr_head: float | None = Field(
        None, gt=0, description="Peak learning rate of the objective's heads and memory; null = lr."
    )
    lr_muon: float | None = Field(
        None, gt=0, description="Peak learning rate of Muon's matrices, everywhere; null = lr, and lr_head in heads."
    )
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum (Nesterov's).")
    muon_steps: int = Field(5, ge=1, le=20, description="Newton-Schulz iterations in an update by Muon.")
    adjust_lr: Literal["match_rms_adamw", "original", "none"] = Field(
        "match_rms_adamw",
        description="Muon's learning rate by shape: match_rms_adamw = 0.2 sqrt(max(out, in)), so that AdamW's suits it; original = "
        "sqrt(max(1, out / in)); none = 1.",
    )
    betas: Pair[Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="AdamW betas, each from 0 to below 1."
    )
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon.")
    weight_decay: float = Field(
        0.1, ge=0, description="Decoupled weight decay, on parameters of two or more dimensions."
    )
    decay_embeddings: bool = Field(True, description="Whether weight decay applies to embeddings too.")
    overrides: dict[str, GroupOverride] = Field(
        default_factory=dict,
        description="Parameters by the start of their dotted name, e.g. objective.memory; the longest match counts.",
    )
    clip_norm: float = Field(1.0, ge=0, description="Global gradient norm limit; 0 = no clipping.")
    warmup_steps: int = Field(50, ge=0, description="Steps of linear warm-up.")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="Shape after warm-up; wsd = constant, then linear over the last decay_steps."
    )
    decay_steps: int = Field(
        0,
        ge=0,
        description="With schedule: wsd, steps at the end in which the rate falls to final_lr; 0 = a tenth of all.",
    )
    final_lr: float = Field(0.0, ge=0, le=1, description="Learning rate at the last step, as a fraction of the peak.")

    @property
    def uses_muon(self) -> bool:
        return self.method == "muon" or any(override.method == "muon" for override in self.overrides.values())

    @model_validator(mode="after")
    def _decays(self) -> OptimConfig:
        if self.decay_steps and self.schedule != "wsd":
            raise ValueError(
                f"decay_steps: has no effect with schedule: {self.schedule}; set schedule=wsd or remove the key"
            )
        return self

    @model_validator(mode="after")
    def _muons_keys_are_of_use(self) -> OptimConfig:
        if self.uses_muon:
            return self
        for key in ("lr_muon", "muon_momentum", "muon_steps", "adjust_lr"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: is set, but no parameter uses Muon; set optim.method=muon or remove the key")
        return self


RENAMED_METRICS = {
    "effective_rank_context": "covariance_entropy_rank_context",
    "effective_rank_target": "covariance_entropy_rank_target",
}
"""A metric's name in version 0.1 → its name now. A config may use the former name until 0.3."""


def _current_metric(key: str) -> str:
    """Return the key of a metric with the present names of its split and of the metric."""
    split, name = split_key(current_key(key))
    current = f"{split}/{RENAMED_METRICS.get(name, name)}"
    if current != key:
        warnings.warn(f"the metric {key} has a new name; write {current} in the config", FutureWarning, stacklevel=1)
    return current


def _of_evaluation(key: str) -> str:
    if split_key(key)[0] == TRAIN:
        raise ValueError(f"{key!r} is no metric of an evaluation; give one such as eval/valid/ppl")
    return key


MetricKey = Annotated[str, Field(pattern=r"^[^/]+(/[^/]+){1,2}$"), AfterValidator(_current_metric)]
"""``train/<metric>`` for a metric of training, ``eval/<split>/<metric>`` for one of an evaluation."""
EvaluationMetricKey = Annotated[MetricKey, AfterValidator(_of_evaluation)]
"""``eval/<split>/<metric>``."""


class EarlyStopping(Section):
    """End the run when an evaluation's metric stops improving. The metric's kind decides the direction: a loss must
    fall."""

    metric: EvaluationMetricKey = Field(description="Metric of an evaluation, e.g. eval/valid/ppl.")
    patience: int = Field(
        10, ge=1, description="Evaluations in a row without an improvement, after which the run ends."
    )
    min_delta: float = Field(0.0, ge=0, description="Least change that counts as an improvement.")


class AbortRule(Section):
    """End the run, with an error, when a metric leaves its allowed range. NaN and infinity are never allowed."""

    metric: MetricKey = Field(
        description="Metric of the logged training rows, e.g. train/loss, or of an evaluation, e.g. eval/valid/ppl."
    )
    below: float | None = Field(None, description="Least allowed value; null = any.")
    above: float | None = Field(None, description="Greatest allowed value; null = any.")
    after_steps: int = Field(0, ge=0, description="Optimizer steps before which the rule does not apply.")
    after_epochs: float = Field(0, ge=0, description="Passes over the data before which the rule does not apply.")

    @model_validator(mode="after")
    def _is_a_range(self) -> AbortRule:
        if self.below is not None and self.above is not None and self.below > self.above:
            raise ValueError(f"no value is allowed, as below is {self.below:g} and above is {self.above:g}; swap them")
        return self


class TrainConfig(Section):
    steps: int = Field(0, ge=0, description="Optimizer steps; 0 = as many as epochs take, or 1000.")
    epochs: int = Field(
        0, ge=0, description="Passes over the data, each sample once a pass; 0 = as many as steps need."
    )
    flops: float = Field(
        0, ge=0, description="FLOPs to train with instead of steps or epochs; 0 = not counted in them."
    )
    same_flops_as: LocalPath | None = Field(
        None, description="A run directory: train with the FLOPs that this run took."
    )
    batch_size: int = Field(
        0, ge=0, description="Samples in an optimizer step, over all ranks; 0 = set by batch_tokens, else 256."
    )
    accumulation: int = Field(1, ge=1, description="Micro-batches a rank and step; batch_size is divided by it.")
    batch_tokens: int = Field(
        0, ge=0, description="Tokens in an optimizer step, over all ranks, instead of batch_size: samples are packed."
    )
    micro_tokens: int = Field(
        0, ge=0, description="With batch_tokens: tokens in a micro-batch of a rank; the accumulation follows from it."
    )
    log_every: int = Field(10, ge=1, description="Steps between rows of metrics.jsonl.")
    eval_every: int = Field(0, ge=0, description="Steps between evaluations; 0 = at the end only.")
    max_skipped_steps: int = Field(
        10,
        ge=0,
        description="Steps in a row without a finite gradient, all skipped, after which the run stops. In fp16 they count only "
        "when the scale of the loss cannot be lowered any more.",
    )
    spike_factor: float = Field(
        0.0, ge=0, description="Warn of losses above this many times the median of the last 20 rows; 0 = no check."
    )
    hang_minutes: float = Field(
        30.0,
        ge=0,
        description="Minutes without progress after which a rank counts as hung and the run ends; 0 = never.",
    )

    early_stopping: EarlyStopping | None = Field(
        None, description="Rule that ends the run when it stops improving; null = none."
    )
    abort: list[AbortRule] = Field(default_factory=list, description="Rules that end the run with an error.")
    callbacks: list[str] = Field(
        default_factory=list, description="Classes of your own that the run calls, each as module:Class."
    )

    @model_validator(mode="after")
    def _complete(self) -> TrainConfig:
        if (self.flops or self.same_flops_as) and (self.steps or self.epochs):
            given = "flops" if self.flops else "same_flops_as"
            raise ValueError(
                f"{given}: sets the length of training, and so does {'steps' if self.steps else 'epochs'}; remove one"
            )
        if not (self.steps or self.epochs or self.flops or self.same_flops_as):
            self._fill(steps=1000)
        if self.early_stopping and not self.eval_every:
            raise ValueError("early_stopping: needs evaluations; set eval_every")
        if 0 < self.spike_factor <= 1:
            raise ValueError(
                f"spike_factor: {self.spike_factor:g} would warn of ordinary losses; give a factor above 1, or 0 for no check"
            )
        if self.batch_size and self.batch_tokens:
            raise ValueError("give one of batch_size (samples) and batch_tokens, and leave the other one 0")
        if not self.batch_size and not self.batch_tokens:
            self._fill(batch_size=256)
        if bool(self.batch_tokens) != bool(self.micro_tokens):
            raise ValueError("batch_tokens and micro_tokens belong together")
        if self.batch_tokens and self.accumulation != 1:
            raise ValueError("with batch_tokens the accumulation follows from micro_tokens; leave it out")
        return self


class CheckpointConfig(Section):
    every: int = Field(0, ge=0, description="Steps between checkpoints; 0 = at the end only.")
    keep_last: int = Field(2, ge=1, description="Newest checkpoints to keep.")
    keep_every: int = Field(0, ge=0, description="Also keep those whose step is a multiple of this; 0 = none.")
    keep_best: EvaluationMetricKey | None = Field(
        None,
        description="Also keep the best one by this metric of an evaluation, e.g. eval/valid/ppl, of those that were evaluated; "
        "null = none.",
    )
    ephemeral_every: int = Field(
        0, ge=0, description="Steps between further checkpoints of which only the newest is kept; 0 = none."
    )
    asynchronous: bool = Field(True, description="Write while training goes on; host memory holds a copy meanwhile.")
    verify: bool = Field(True, description="Compare the checksums of a checkpoint before it is resumed from.")
    resume_with_changes: list[str] = Field(
        [],
        description="Keys of model: and objective:, or whole sections, that may differ from the checkpoint a run goes on "
        "from, e.g. [objective.weight].",
    )


TRACKERS = ("mlflow", "trackio", "comet_ml")
"""Names of ``log.trackers``; each is the name of its package too."""


class LogConfig(Section):
    former_names: ClassVar[dict[str, str]] = {"wandb_project": "project"}

    wandb: bool = Field(False, description="Log to Weights & Biases (offline unless a key is set).")
    trackers: list[Text] = Field(
        default_factory=list,
        description=f"Further trackers, e.g. [mlflow], of {', '.join(TRACKERS)}; each must be installed. Addresses and keys come from their own "
        "environment variables.",
    )
    project: Text = Field(
        "jepa_scale",
        pattern=r"^[^/\\#?%:\x00-\x1f]{1,128}$",
        description="Project at W&B and other trackers, an experiment of MLflow; without / \\ # ? % and :.",
    )
    tensorboard: bool = Field(False, description="Write TensorBoard events into the run directory.")
    progress: bool = Field(True, description="Progress bar on rank 0.")
    report: bool = Field(True, description="Write report.html and plots/*.png at the end.")
    breakdown: bool = Field(
        False,
        description="Seconds of each part of a step (data, forward, backward, optimizer …) in the rows of training.",
    )
    profile: list[int] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="First and last optimizer step of which each rank writes a trace by torch.profiler, and on CUDA a snapshot of "
        "memory, into the run's folder, e.g. [10, 12]; null = none.",
    )

    @field_validator("trackers")
    @classmethod
    def _are_known(cls, names: list[str]) -> list[str]:
        hint = ", ".join(TRACKERS)
        for name in names:
            if name in ("wandb", "tensorboard"):
                raise ValueError(f"{name} has a key of its own; set log.{name}: true in place of it")
            if name not in TRACKERS:
                raise ValueError(f"unknown tracker {name!r}; {suggestion(name, TRACKERS, f'known: {hint}')}")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{twice!r} is there twice; give each once")
        return names

    @field_validator("profile")
    @classmethod
    def _is_range(cls, steps: list[int] | None) -> list[int] | None:
        if steps and not 1 <= steps[0] <= steps[1]:
            raise ValueError(f"{steps} are no first and last step; steps are counted from 1, e.g. [10, 12]")
        return steps


class Config(Section):
    """A whole experiment."""

    # The four mappings stay unparsed here, because their keys depend on the class that each names.
    # jepa_scale.experiment.validate turns them into options, and the config into an Experiment.
    run: RunConfig = Field(RunConfig(), description="Name, place and seed.")
    engine: EngineConfig = Field(EngineConfig(), description="Sharding of the model, precision, parallelism.")
    model: dict[str, Any] = Field(description="Backbone: a file of configs/models or its keys (jepa_scale.models).")
    data: dict[str, Any] = Field(description="Source and its options (jepa_scale.data).")
    objective: dict[str, Any] = Field(description="Objective and its options (jepa_scale.objectives).")
    optim: OptimConfig = Field(OptimConfig(), description="Optimizer and schedule.")
    train: TrainConfig = Field(TrainConfig(), description="Length, batch size, intervals.")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="When to save and what to keep.")
    eval: dict[str, Any] = Field(default_factory=dict, description="Evaluation options (jepa_scale.evaluation).")
    log: LogConfig = Field(LogConfig(), description="Where metrics go.")
