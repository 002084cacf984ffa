"""A config of another program → one of ours, with what is not carried over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

from jepa_scale.config.foreign import JEPA_LLM, LIT_JEPA, Program
from jepa_scale.utils.errors import InputError

PRECISION = {
    "32": "fp32",
    "32-true": "fp32",
    "float32": "fp32",
    "fp32": "fp32",
    "bf16-mixed": "bf16",
    "bf16-true": "bf16",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "16-mixed": "fp16",
    "16": "fp16",
    "float16": "fp16",
    "fp16": "fp16",
    "auto": "auto",
}
NOT_CARRIED = {
    "jepa-llm": {
        "general.debug": "errors name the key, file or row",
        "general.wandb_entity": "W&B reads WANDB_ENTITY",
        "general.wandb_group": "W&B reads WANDB_RUN_GROUP",
        "general.wandb_tags": "W&B reads WANDB_TAGS",
        "general.wandb_mode": "online where a key is set, else offline",
        "dataset.preprocess_num_proc": "a worker for each core",
        "dataset.tokenize_num_proc": "a worker for each core",
        "dataset.tokenize_batch_size": "none needed",
        "training.track_flop": "flops are in every row of metrics.jsonl",
        "training.additive_mask": "all views run packed in one forward",
        "training.memory_efficient": "all views run packed in one forward",
    },
    "LitJEPA": {
        "trainer.check_val_every_n_epoch": "evaluations are counted in steps: train.eval_every",
        "trainer.accelerator": "the device is found",
        "trainer.devices": "the launcher says it",
        "trainer.strategy": "engine.name says it",
        "trainer.logger": "log.wandb, log.tensorboard",
        "model.vocab_size": "it is the data's",
        "model.jepa.recur_at": "there is no recurrence",
        "model.jepa.gamma_var": "of an earlier objective of LitJEPA",
        "model.jepa.gamma_cov": "of an earlier objective of LitJEPA",
        "model.jepa.lambda_weight": "of an earlier objective of LitJEPA; objective.jepa_weight is near it",
        "model.jepa.tau": "of an earlier objective of LitJEPA",
        "data.data_dir": "corpora with a name are in $JEPA_SCALE_DATA",
        "data.download_url": "corpora with a name are downloaded",
        "data.subset_seed": "all runs choose the same share",
        "data.bpe_lowercase": "the BPE keeps capitals",
        "data.bpe_min_frequency": "not offered",
        "data.bpe_special_tokens": "the BPE has those that are needed",
    },
}
"""Program → its key for which ours has none → why. Each is a comment in the translated config."""


class Source:
    """The keys of a foreign config. Each is taken once, and what nobody has taken is refused by name.

    A key whose value is null is as one that is not there.
    """

    def __init__(self, program: Program, values: Mapping[str, Any], where: str) -> None:
        self.program, self.where = program, where
        self._left = {key: value for key, value in _leaves(values) if value is not None}

    def take(self, key: str, otherwise: Any = None) -> Any:
        return self._left.pop(key, otherwise)

    def notes(self) -> list[str]:
        """Return a line for each key that is not carried over.

        Raises:
            InputError: there is a key that the program is not known to have.
        """
        reasons = NOT_CARRIED[self.program.name]
        for key in self._left:
            if key not in reasons:
                raise InputError(
                    f"{self.where}: {key}: is no key of {self.program.name} that can be translated ({self.program.page}); remove it"
                )
        return [f"not carried over: {key}: {value} ({reasons[key]})" for key, value in self._left.items()]

    def refuse(self, key: str, value: Any, why: str) -> InputError:
        return InputError(f"{self.where}: {key}: {value!r}: {why} ({self.program.page})")

    def choose(self, key: str, choices: Mapping[str, str]) -> str | None:
        """Take a key whose values have other names here."""
        value = self.take(key)
        if value is not None and str(value) not in choices:
            raise self.refuse(key, value, f"must be one of {', '.join(choices)}")
        return None if value is None else choices[str(value)]


def translate(flag: str, values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Return the sections of our config, and lines about what is to be known of it.

    Args:
        flag: ``jepa-llm`` or ``litjepa``. values: the other program's config, of the file ``where``.

    Raises:
        InputError: a key cannot be translated; nothing is dropped in silence.
    """
    program, write = TRANSLATORS[flag]
    source = Source(program, values, where)
    found: dict[str, Any] = {}
    notes = write(source, found)
    return found, [*notes, *source.notes()]


def _jepa_llm(source: Source, ours: dict[str, Any]) -> list[str]:
    take, put = source.take, _setter(ours)
    ours["base"] = "configs/finetune_example.yaml"
    notes = ["base: has the schedule and the objective of LLM-JEPA; docs/config.md lists every key"]
    if folder := take("training.output_dir"):
        path = PurePath(str(folder))
        put("run.dir", str(path.parent))
        put("run.name", path.name)
    put("run.name", take("general.wandb_run_name"))
    for theirs in ("general.finetune_seed", "general.use_wandb", "general.wandb_project", "model.cache_dir"):
        put(source.program.keys[theirs], take(theirs))

    model = take("model.name")
    put("model.pretrained", model)
    put("data.tokenizer", model)
    trust = take("model.trust_remote_code")
    put("model.trust_remote_code", trust)
    put("data.trust_remote_code", trust)
    random, adapts, rank = take("model.pretrain", False), take("model.use_lora", False), take("model.lora_rank")
    put("model.random_init", bool(random))
    if adapts and not random:
        put("model.lora.rank", rank)
    else:
        ours.setdefault("model", {})["lora"] = None

    combined, held_out = take("dataset.data_file"), take("dataset.eval_file")
    put("data.path", take("dataset.train_file", combined))
    share = take("dataset.eval_split", 0.0)
    ours.setdefault("data", {})["valid_path"] = held_out
    put("data.valid_fraction", 0.0 if held_out else share)
    for theirs in (
        "split_seed",
        "max_items",
        "max_eval_items",
        "config_name",
        "train_split",
        "max_length",
        "predictors",
    ):
        put(source.program.keys[f"dataset.{theirs}"], take(f"dataset.{theirs}"))
    put("data.remove_thinking", take("dataset.remove_thinking", True))  # true by default there
    for theirs in ("train_all", "plain", "cache_dir"):
        put(source.program.keys[f"dataset.{theirs}"], take(f"dataset.{theirs}"))

    parts = take("training.grad_accum", 1)
    put("train.accumulation", parts)
    if size := take("training.batch_size"):
        put("train.batch_size", size * parts)
        notes.append("train.batch_size is batch_size x grad_accum of one rank; multiply it by the number of ranks")
    for theirs in ("learning_rate", "num_epochs", "save_total_limit", "logging_steps", "gamma", "lbd"):
        put(source.program.keys[f"training.{theirs}"], take(f"training.{theirs}"))
    every = take("training.eval_steps")
    put("train.eval_every", every)
    put("checkpoint.every", every)
    if take("training.regular", False):
        put("objective.jepa_weight", 0.0)
    last = take("training.last_token")
    put("objective.last_token", None if last is None else last - 1)
    put("engine.precision", source.choose("training.dtype", PRECISION))
    if (name := take("training.optimizer")) is not None and not str(name).startswith("adamw_torch") and name != "adamw":
        raise source.refuse("training.optimizer", name, "optim.method is adamw or muon; remove the key")
    return notes


def _lit_jepa(source: Source, ours: dict[str, Any]) -> list[str]:
    take, put = source.take, _setter(ours)
    ours["base"] = "configs/tiny_shakespeare.yaml"
    notes = ["base: has the keys that LitJEPA's config does not set"]
    scheduled, warmup = take("model.jepa.lm_weight_use_scheduler", False), take("model.jepa.lm_warmup_steps")
    width, length = take("model.d_model"), take("data.block_size")
    put("model.hidden_size", width)
    put("data.max_length", length)
    for theirs in (
        "seed_everything",
        *(f"trainer.{key}" for key in ("max_steps", "log_every_n_steps", "val_check_interval", "gradient_clip_val")),
        *(f"model.{key}" for key in ("n_layers", "n_heads", "rope_base", "weight_tying")),
        *(f"model.optimizer.{key}" for key in ("lr", "lr_head", "betas", "warmup_steps", "weight_decay")),
        *(f"data.{key}" for key in ("module", "train_fraction", "num_workers", "bpe_vocab_size", "hf_cache_dir")),
    ):
        put(source.program.keys[theirs], take(theirs))
    put("engine.precision", source.choose("trainer.precision", PRECISION))
    if (multiplier := take("model.ff_multiplier")) is not None:
        if width is None:
            raise source.refuse("model.ff_multiplier", multiplier, "needs model.d_model beside it")
        put("model.intermediate_size", int(multiplier * width))
    if not take("model.use_rope", True):
        raise source.refuse("model.use_rope", False, "the decoder always has rotary positions; remove the key")
    dropout = take("model.dropout")
    for key in ("model.hidden_dropout", "model.bridge_dropout", "objective.dropout"):
        put(key, dropout)
    if (size := take("data.batch_size")) is not None:
        if length is None:
            raise source.refuse("data.batch_size", size, "needs data.block_size beside it")
        put("train.batch_tokens", size * length)
        put("train.micro_tokens", size * length)
        notes.append("train.batch_tokens is that of one device; multiply it by the number of devices")

    jepa = "model.jepa."
    if steps := take(f"{jepa}simple_recurrence_steps", 0):
        raise source.refuse(f"{jepa}simple_recurrence_steps", steps, "is not offered; remove it")
    if (tap := take(f"{jepa}tap_layer")) is not None:
        put("objective.tap_layer", tap if tap < 0 else tap + 1)
    put("model.bridge_grad_barrier", take(f"{jepa}grad_barrier"))
    multiple = take(f"{jepa}predictor_hidden_multiplier")
    put("objective.projector_multiple", multiple)
    put("objective.predictor_multiple", multiple)
    momentum, ends, updates = (take(f"{jepa}{key}") for key in ("ema_momentum", "ema_schedule", "ema_schedule_steps"))
    if ends is not None:
        put("objective.ema.momentum", ends[0])
        put("objective.ema.final_momentum", ends[1])
        put("objective.ema.steps", updates)
    elif momentum is not None:
        ours.setdefault("objective", {})["ema"] = {"momentum": momentum, "schedule": "constant"}
    for key in (
        "tap_norm", "latent_dim", "horizons", "horizon_probs", "pairs_per_seq", "loss_type", "align_scale", "off_diag_scale",
        "jepa_weight", "kl_future_weight", "kl_temp", "kl_weight_warmup_steps", "freeze_lm_head_for_kl", "lm_weight",
    ):  # fmt: skip
        put(source.program.keys[jepa + key], take(jepa + key))
    if scheduled and warmup:
        put("objective.lm_start", warmup)
        steps = ours.get("train", {}).get("steps")
        put("objective.lm_ramp", steps and steps - warmup)
    elif warmup is not None:
        notes.append(
            f"not carried over: model.jepa.lm_warmup_steps: {warmup} (without lm_weight_use_scheduler it has no effect)"
        )
    if take(f"{jepa}run_baseline", False):
        ours["objective"] = {"name": "lm"}
        put("model.bridge_grad_barrier", False)  # it would keep the lower blocks from training
        notes.append(
            "model.jepa.run_baseline: next-token prediction alone, so that the other keys of model.jepa have no effect"
        )
    return notes


TRANSLATORS: dict[str, tuple[Program, Callable[[Source, dict[str, Any]], list[str]]]] = {
    JEPA_LLM.flag: (JEPA_LLM, _jepa_llm),
    LIT_JEPA.flag: (LIT_JEPA, _lit_jepa),
}
"""Name on the command line → the program, and what fills our sections and returns notes."""


def _setter(ours: dict[str, Any]) -> Callable[[str, Any], None]:
    def put(key: str, value: Any) -> None:
        """Set a dotted key; None leaves it as it is."""
        if value is None:
            return
        *parents, leaf = key.split(".")
        section = ours
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value

    return put


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return found
