"""Conversion of a Hugging Face model to a checkpoint of step 0, from which a run starts."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel

from jepa_scale.checkpoint import store
from jepa_scale.checkpoint.generators import rng_state
from jepa_scale.checkpoint.manifest import TENSORS, Manifest
from jepa_scale.checkpoint.retention import folder_name
from jepa_scale.checkpoint.shard_view import ShardView
from jepa_scale.config.schema import OptimConfig
from jepa_scale.convert.plan import HEADS_FILE, MODEL
from jepa_scale.convert.skeleton import llama_config
from jepa_scale.engines.base import persistent_buffers
from jepa_scale.engines.ema import TEACHER, TeacherModel
from jepa_scale.models.decoder import JepaDecoderConfig
from jepa_scale.models.families.files import check_folder
from jepa_scale.models.frozen.base import Base
from jepa_scale.models.loading import known_keys
from jepa_scale.models.lora import copy_plain
from jepa_scale.objectives.base import DECODER, JepaModel
from jepa_scale.optim import parameter_groups
from jepa_scale.optim.groups import MOMENTS
from jepa_scale.telemetry import package_versions
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.io import sync_folder

_OTHER = {  # keys that change no output of the model in evaluation, or that the weights' shapes determine
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "bridge_gate_init",
    "bridge_grad_barrier",
    "dtype",
    "embedding_init_std",
    "eos_token_id",
    "initializer_range",
    "max_position_embeddings",
    "n_ctx",
    "n_positions",
    "pad_token_id",
    "pretraining_tp",
    "task_specific_params",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "vocab_size",
}


@torch.no_grad()
def load_decoder(decoder: PreTrainedModel, folder: Path) -> None:
    """Give a decoder the weights of a folder, in place and in the decoder's own dtype.

    Args:
        decoder: the run's decoder, on the CPU. The native one takes a ``LlamaForCausalLM`` as well, if its options are Llama's.
        folder: folder made by ``save_pretrained``, or by :func:`jepa_scale.convert.to_hf.export`.

    Raises:
        InputError: the architecture, or a tensor's name or shape differs; the message names the first one.
    """
    check_folder(folder)
    _compare(decoder, folder)
    cls: Any = type(decoder)
    try:
        loaded, info = cls.from_pretrained(
            folder,
            config=copy.deepcopy(decoder.config),
            dtype=torch.float32,
            attn_implementation="eager",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be loaded: {' '.join(str(error).split())}") from None
    for name, theirs, ours in sorted(info["mismatched_keys"]):
        rows = ours[0] == decoder.config.get_text_config().vocab_size and theirs[1:] == ours[1:]
        hint = "; set model.vocab_size" if rows else ""
        raise InputError(f"{folder}: {name} has shape {tuple(theirs)}, the config's model has {tuple(ours)}{hint}")
    for what, names in (
        ("has no", info["missing_keys"]),
        ("has a tensor that the model lacks,", info["unexpected_keys"]),
    ):
        if names:
            more = f" and {len(names) - 1} others" if len(names) > 1 else ""
            raise InputError(f"{folder}: {what} {min(names)}{more}; it is of another model than the config's")
    copy_plain(loaded.state_dict(), decoder)


def _compare(decoder: PreTrainedModel, folder: Path) -> None:
    """Check that the folder's config describes the decoder's computation: equal shapes alone would hide another RoPE
    base."""
    try:
        found = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: config.json cannot be used: {' '.join(str(error).split())}") from None
    ours: PreTrainedConfig | None = decoder.config
    if isinstance(ours, JepaDecoderConfig) and isinstance(found, LlamaConfig):
        ours = llama_config(ours)
        if ours is None:
            raise InputError(
                f"{folder}: is a Llama, which has no logit_scale, bias in the head, PoPE, norm of the embedding or bridge; "
                "set model.tie_word_embeddings, model.output_bias and model.embedding_norm to false, "
                "model.position_embedding to rope and model.bridge_after to null"
            )
    assert ours is not None
    if found.model_type != ours.model_type:
        raise InputError(f"{folder}: is a model of type {found.model_type!r}, the config's is a {ours.model_type!r}")
    theirs, wanted = found.to_dict(), ours.to_dict()
    # notes of the programs that saved the model: no code of the family reads them
    notes = theirs.keys() - known_keys(type(found)) - PreTrainedConfig().to_dict().keys() - wanted.keys()
    for key in sorted(theirs.keys() | wanted.keys()):
        if key not in _OTHER | notes and "drop" not in key and theirs.get(key) != wanted.get(key):
            raise InputError(
                f"{folder}: config.json has {key}={theirs.get(key)!r}, the config's model {wanted.get(key)!r}; "
                "change the section model: to match"
            )


@torch.no_grad()
def load_heads(module: JepaModel, folder: Path) -> int:
    """Load the objective's parameters from ``jepa_heads.safetensors``, and return the number of its tensors.

    Without such a file, the objective stays as it was built.

    Raises:
        InputError: the parameters are those of another objective.
    """
    file = folder / HEADS_FILE
    if not file.is_file():
        return 0
    wanted = {
        n.removeprefix(MODEL): t for n, t in state_tensors(module).items() if not n.startswith(f"{MODEL}backbone.")
    }
    try:
        with safe_open(file, framework="pt") as tensors:
            names = set(tensors.keys())
            for what, other in (
                ("lacks", wanted.keys() - names),
                ("has, beyond the objective's,", names - wanted.keys()),
            ):
                if other:
                    raise InputError(f"{file}: {what} {min(other)}; it is of another objective, or remove the file")
            for name, tensor in wanted.items():
                theirs = tensors.get_tensor(name)
                if theirs.shape != tensor.shape:
                    raise InputError(
                        f"{file}: {name} has shape {tuple(theirs.shape)}, the objective's has {tuple(tensor.shape)}"
                    )
                tensor.copy_(theirs)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None
    return len(wanted)


def state_tensors(module: nn.Module, part: str = MODEL, base: Base | None = None) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint's ``model/…``, or of another part.

    These are each parameter, under its first name, without those of the ``base``, and the persistent buffers.
    """
    left_out = {f"{DECODER}{name}" for name in base.tensors} if base else set()
    kept = [(name, parameter) for name, parameter in module.named_parameters() if name not in left_out]
    tensors = {f"{part}{name}": parameter.detach() for name, parameter in kept}
    return tensors | {f"{part}{name}": buffer for name, buffer in persistent_buffers(module)}


def write_checkpoint(
    directory: Path,
    module: JepaModel,
    state: Mapping[str, Any],
    optim: OptimConfig,
    config: Mapping[str, Any],
    base: Base | None = None,
) -> Path:
    """Write ``step_00000000``, whole or not at all: the module's tensors, moments of zero, and the objective's EMA
    teacher.

    The teacher starts as a copy of the module.

    Args:
        directory: the run's folder ``checkpoints``. state: the run's initial state. optim: determines the moments.
        config: the run's resolved config, which the manifest keeps. base: the frozen weights to leave out.
    """
    final = directory / folder_name(0)
    partial = final.with_name(f"{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = state_tensors(module, base=base)
    if copies := module.objective.teacher_copies(module.backbone):
        tensors |= state_tensors(TeacherModel(copies), TEACHER, base)
    views = {name: ShardView.whole(tensor) for name, tensor in tensors.items()}
    for group in parameter_groups(module, optim, ()):
        for name, parameter in zip(group["names"], group["params"], strict=True):
            nothing = torch.zeros((), dtype=torch.float32).expand(parameter.shape)  # takes no memory
            views |= {f"{moment}/{name}": ShardView.whole(nothing) for moment in MOMENTS[group["method"]]}
    files = {f"{TENSORS}/{name}": entry for name, entry in store.write(partial / TENSORS, views).items()}
    generators = partial / "rng_rank00000.pt"
    torch.save(rng_state(), generators)
    manifest = Manifest(
        step=0,
        engine="none",
        layout="converted from Hugging Face",
        world_size=1,
        updates=0,
        state={**state, **(base.state() if base else {})},
        config=dict(config),
        versions=package_versions(),
        files={**files, **store.describe([generators])},
    )
    manifest.write(partial)
    sync_folder(partial)
    os.replace(partial, final)
    sync_folder(directory)
    (directory / "latest").write_text(final.name, encoding="utf-8")
    return final
