"""Keys and flags of other programs, and of ours in another section, each with the key that is meant.

:mod:`jepa_scale.config.translate` writes a whole config of ours from one of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """A program whose users type its keys.

    Attributes:
        flag: its name on our command line. section: its heading's anchor in ``docs/migration.md``.
        keys: its key, dotted as in its configs → ours, or what to do where none stands for it.
    """

    name: str
    flag: str
    section: str
    keys: Mapping[str, str]

    @property
    def page(self) -> str:
        return f"docs/migration.md#{self.section}"


JEPA_LLM = Program(
    "jepa-llm",
    "jepa-llm",
    "jepa-llm",
    {
        "general.finetune_seed": "run.seed",
        "general.use_wandb": "log.wandb",
        "general.wandb_project": "log.project",
        "general.wandb_run_name": "run.name",
        "model.name": "model.pretrained",
        "model.use_lora": "model.lora, which is there or null",
        "model.lora_rank": "model.lora.rank",
        "model.pretrain": "model.random_init",
        "model.cache_dir": "model.cache_dir",
        "model.trust_remote_code": "model.trust_remote_code",
        "dataset.train_file": "data.path",
        "dataset.data_file": "data.path",
        "dataset.eval_file": "data.valid_path",
        "dataset.eval_split": "data.valid_fraction",
        "dataset.split_seed": "data.split_seed",
        "dataset.max_items": "data.max_items",
        "dataset.max_eval_items": "data.max_eval_items",
        "dataset.config_name": "data.config_name",
        "dataset.train_split": "data.train_split",
        "dataset.max_length": "data.max_length",
        "dataset.predictors": "objective.predictor_tokens",
        "dataset.train_all": "data.train_all",
        "dataset.remove_thinking": "data.remove_thinking",
        "dataset.plain": "data.plain",
        "dataset.cache_dir": "data.cache",
        "training.output_dir": "run.dir with run.name",
        "training.batch_size": "train.batch_size",
        "training.grad_accum": "train.accumulation",
        "training.learning_rate": "optim.lr",
        "training.num_epochs": "train.epochs",
        "training.eval_steps": "train.eval_every",
        "training.save_total_limit": "checkpoint.keep_last",
        "training.logging_steps": "train.log_every",
        "training.lbd": "objective.jepa_weight",
        "training.gamma": "objective.lm_weight",
        "training.last_token": "objective.last_token",
        "training.regular": "objective.jepa_weight=0",
        "training.dtype": "engine.precision",
        "training.optimizer": "optim.method",
    },
)
LIT_JEPA = Program(
    "LitJEPA",
    "litjepa",
    "python--m-srctrain-fit",
    {
        "seed_everything": "run.seed",
        "trainer.max_steps": "train.steps",
        "trainer.log_every_n_steps": "train.log_every",
        "trainer.val_check_interval": "train.eval_every",
        "trainer.gradient_clip_val": "optim.clip_norm",
        "trainer.precision": "engine.precision",
        "model.d_model": "model.hidden_size",
        "model.n_layers": "model.num_hidden_layers",
        "model.n_heads": "model.num_attention_heads",
        "model.dropout": "model.hidden_dropout",
        "model.ff_multiplier": "model.intermediate_size, in units",
        "model.rope_base": "model.rope_theta",
        "model.weight_tying": "model.tie_word_embeddings",
        "model.jepa.tap_layer": "objective.tap_layer",
        "model.jepa.tap_norm": "objective.tap_norm",
        "model.jepa.latent_dim": "objective.latent_dim",
        "model.jepa.predictor_hidden_multiplier": "objective.predictor_multiple",
        "model.jepa.grad_barrier": "model.bridge_grad_barrier",
        "model.jepa.horizons": "objective.horizons",
        "model.jepa.horizon_probs": "objective.horizon_probs",
        "model.jepa.pairs_per_seq": "objective.pairs_per_sequence",
        "model.jepa.ema_momentum": "objective.ema.momentum",
        "model.jepa.ema_schedule": "objective.ema.momentum with objective.ema.final_momentum",
        "model.jepa.ema_schedule_steps": "objective.ema.steps",
        "model.jepa.loss_type": "objective.loss",
        "model.jepa.align_scale": "objective.align_scale",
        "model.jepa.off_diag_scale": "objective.off_diag_scale",
        "model.jepa.jepa_weight": "objective.jepa_weight",
        "model.jepa.kl_future_weight": "objective.kl_weight",
        "model.jepa.kl_temp": "objective.kl_temperature",
        "model.jepa.kl_weight_warmup_steps": "objective.kl_ramp",
        "model.jepa.freeze_lm_head_for_kl": "objective.kl_freeze_head",
        "model.jepa.lm_weight": "objective.lm_weight",
        "model.optimizer.lr": "optim.lr",
        "model.optimizer.lr_head": "optim.lr_head",
        "model.optimizer.betas": "optim.betas",
        "model.optimizer.warmup_steps": "optim.warmup_steps",
        "model.optimizer.weight_decay": "optim.weight_decay",
        "data.module": "data.path",
        "data.block_size": "data.max_length",
        "data.batch_size": "train.batch_tokens with train.micro_tokens",
        "data.train_fraction": "data.train_fraction",
        "data.num_workers": "data.workers",
        "data.bpe_vocab_size": "data.vocab_size",
        "data.hf_cache_dir": "data.cache",
    },
)
TRL = Program(
    "TRL",
    "trl",
    "trls-sfttrainer",
    {
        "model_name_or_path": "model.pretrained",
        "dataset_name": "data.path",
        "dataset_config": "data.config_name",
        "dataset_train_split": "data.train_split",
        "dataset_num_proc": "--processes of jepa-scale data prepare",
        "output_dir": "run.dir with run.name",
        "run_name": "run.name",
        "seed": "run.seed",
        "learning_rate": "optim.lr",
        "lr_scheduler_type": "optim.schedule",
        "warmup_steps": "optim.warmup_steps",
        "warmup_ratio": "optim.warmup_steps, in steps",
        "weight_decay": "optim.weight_decay",
        "max_grad_norm": "optim.clip_norm",
        "adam_beta1": "optim.betas",
        "adam_beta2": "optim.betas",
        "adam_epsilon": "optim.eps",
        "optim": "optim.method",
        "per_device_train_batch_size": "train.batch_size, over all ranks and micro-batches",
        "per_device_eval_batch_size": "eval.micro_tokens, in tokens",
        "gradient_accumulation_steps": "train.accumulation",
        "num_train_epochs": "train.epochs",
        "max_steps": "train.steps",
        "logging_steps": "train.log_every",
        "eval_steps": "train.eval_every",
        "save_steps": "checkpoint.every",
        "save_total_limit": "checkpoint.keep_last",
        "metric_for_best_model": "checkpoint.keep_best",
        "resume_from_checkpoint": "the flag --resume auto",
        "report_to": "log.wandb or log.tensorboard",
        "bf16": "engine.precision=bf16",
        "fp16": "engine.precision=fp16",
        "torch_dtype": "engine.precision",
        "gradient_checkpointing": "engine.activation_checkpointing=full",
        "torch_compile": "engine.compile",
        "deepspeed": "engine.deepspeed",
        "max_length": "data.max_length",
        "max_seq_length": "data.max_length",
        "packing": "none, as sequences are always packed; remove it",
        "completion_only_loss": "data.train_all=false",
        "assistant_only_loss": "data.train_all=false",
        "dataloader_num_workers": "data.workers",
        "use_peft": "model.lora, which is there or null",
        "lora.r": "model.lora.rank",
        "lora_r": "model.lora.rank",
        "lora_alpha": "model.lora.alpha",
        "lora_dropout": "model.lora.dropout",
        "lora_target_modules": "model.lora.targets",
        "target_modules": "model.lora.targets",
        "load_in_4bit": "model.load_in_4bit, beside model.lora",
        "load_in_8bit": "none, as weights are quantised to 4 bits alone, by model.load_in_4bit",
    },
)
PROGRAMS = (TRL, JEPA_LLM, LIT_JEPA)
"""The first one that has a key counts."""
_COMMON_WORDS = {"name", "module", "optimizer", "plain", "optim", "dropout", "precision", "cache_dir", "r"}
"""Last parts of keys that mean something else in other sections."""
PLACES = {
    "model": ("family", "pretrained", "random_init", "lora", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    "data": ("source", "path", "valid_path", "valid_fraction", "tokenizer", "max_length", "long", "workers", "shuffle_window"),
    "objective": ("tap_layer", "jepa_weight", "lm_weight", "predictor_tokens", "readout", "distance", "horizons", "regularizer",
                  "ema", "target", "detach"),
    "eval": ("micro_tokens", "max_samples", "metrics", "max_new_tokens", "probe"),
}  # fmt: skip
"""Section whose keys depend on other keys → its keys that are most often written elsewhere."""


def meant(name: str, sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Return which key is meant by ``name``, dotted, which no section has: the key and the page; empty if nothing is known.

    Args:
        sections: section → its keys, of the sections that have the same keys in every config.
    """
    last = name.rpartition(".")[2]
    found = next(
        ((program, ours) for program in PROGRAMS for theirs, ours in program.keys.items() if _same(theirs, name)), None
    )
    page = f" ({found[0].page})" if found else ""
    for section, keys in ({section: tuple(keys) for section, keys in sections.items()} | PLACES).items():
        if last in keys and name != f"{section}.{last}":
            return f"it is {section}.{last}{page}"
    if found and found[1].partition("=")[0] != name:
        return f"{found[0].name}'s {last} is {found[1]} here{page}"
    return ""


def _same(theirs: str, name: str) -> bool:
    """Return whether ``name`` ends with a program's key, or with its last part if that means one thing alone."""
    *parents, key = theirs.split(".")
    return key == name.rpartition(".")[2] and (
        key not in _COMMON_WORDS or bool(parents) and f".{name}".endswith(f".{theirs}")
    )


def flag_meant(flag: str, sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what is meant by an unknown flag such as ``--optim.lr=1e-4`` or ``--learning_rate``; empty if nothing is known."""
    name, equals, value = flag.lstrip("-").partition("=")
    if "." in name:
        return f"keys of the config have no dashes; write {name}{equals or '='}{value if equals else 'VALUE'}"
    return meant(name.replace("-", "_"), sections)


def program_of(values: Mapping[str, Any]) -> Program | None:
    """Return the program whose config this is, by the sections that only it has."""
    model = values.get("model")
    if "trainer" in values and isinstance(model, dict) and {"jepa", "d_model"} & model.keys():
        return LIT_JEPA
    return JEPA_LLM if {"dataset", "training"} <= values.keys() else None
