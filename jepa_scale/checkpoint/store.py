"""Tensors in a folder as a PyTorch distributed checkpoint, read without executing code from it."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from jepa_scale.checkpoint.manifest import describe
from jepa_scale.checkpoint.shard_view import ShardView
from jepa_scale.utils.errors import InputError

METADATA_FILE = ".metadata"
_TRUSTED = {
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
}


class StoreError(Exception):
    """Error of ranks that could not write; ``failures`` maps rank → (exception, stack).

    DCP's own exception derives from ``BaseException``, so ``except Exception`` would not catch it.
    """

    def __init__(self, error: CheckpointException) -> None:
        super().__init__(_reason(error))
        self.failures = error.failures


def _reason(error: CheckpointException) -> str:
    number, (inner, _) = next(iter(sorted(error.failures.items())))
    return f"rank {number}: {type(inner).__name__}: {inner}".splitlines()[0]


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler that permits only the dataclasses of DCP's metadata, because a pickle can call any function by name.

    It permits names, not modules: ``os.system`` can be reached through any module that imports ``os``.
    """

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.memory_format)
        if (module, name) in _TRUSTED or dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of a checkpoint's metadata")


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict = self.original_state_dict = state_dict  # the base class would copy values of unknown types
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)

    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise AssertionError("checkpoints hold tensors only; the base class would unpickle bytes")


_AS_IT_IS = {"flatten_state_dict": False, "flatten_sharded_tensors": False}


class SafeReader(dcp.FileSystemReader):
    """DCP's reader with a safe unpickler for the metadata; tensors are read with ``weights_only``."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(Path(self.path))


class _Writer(dcp.FileSystemWriter):
    """DCP's writer, whose errors are those of the file system.

    A full disk makes ``torch.save`` fail with "unexpected pos" after an OSError. Only the error itself reaches the other ranks,
    without the OSError in its context.
    """

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except Exception as error:
            raise origin(error) from None


def origin(error: BaseException) -> BaseException:
    """Return the operating system's error that has led to this one, or the error itself if there is none."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.strerror):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def read_metadata(folder: Path) -> Metadata:
    """Read the metadata of the tensors in a folder.

    Raises:
        InputError: the metadata file is missing, damaged, or holds something that is not metadata.
    """
    file = folder / METADATA_FILE
    try:
        with open(file, "rb") as stream:
            metadata = _PlainUnpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata), f"{name} is no tensor"
            assert isinstance(tensor.size, torch.Size) and isinstance(tensor.properties.dtype, torch.dtype), name
        for stored in metadata.storage_data.values():
            if Path(stored.relative_path).name != stored.relative_path:
                raise pickle.UnpicklingError(f"it names {stored.relative_path}, which is not in its folder")
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(f"{file}: cannot be read: {error}") from None
    return metadata


def shapes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return name → shape and dtype of every tensor in a folder."""
    found: Any = read_metadata(folder).state_dict_metadata
    return {name: (tensor.size, tensor.properties.dtype) for name, tensor in found.items()}


def write(folder: Path, tensors: Mapping[str, ShardView], group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """Write the tensors; each rank writes files of its own. Collective over ``group``.

    It may run in a thread of its own if nothing else uses the group.

    Returns:
        The files that this rank wrote: name → ``bytes`` and ``sha256``. Rank 0 writes the metadata file.

    Raises:
        StoreError: on every rank, if any rank could not write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer = _Writer(folder, sync_files=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer, planner=_SavePlanner(**_AS_IT_IS), process_group=group)
    except CheckpointException as error:
        raise StoreError(error) from error
    rank = dist.get_rank() if dist.is_initialized() else 0
    files = sorted(folder.glob(f"__{rank}_*.distcp"))
    return describe([*files, *([folder / METADATA_FILE] if rank == 0 else [])])


def read(
    folder: Path, tensors: Mapping[str, ShardView], group: dist.ProcessGroup | None = None, alone: bool = False
) -> None:
    """Fill the shard views of this rank from a folder that any engine and world size wrote. Collective over ``group``.

    Args:
        alone: read in this process only; then the call is not collective.

    Raises:
        InputError: a tensor is missing or has another shape, or a file of tensors is missing or damaged.
    """
    there = shapes(folder)
    for name, view in tensors.items():
        if name not in there:
            raise InputError(f"{folder}: holds no tensor {name!r}; {_of_another_model(name, tensors, there)}")
        if there[name][0] != view.shape:
            raise InputError(
                f"{folder}: {name} has shape {tuple(there[name][0])}, the model's has {tuple(view.shape)}; "
                "set model and objective as in the run that wrote it"
            )
    _load(folder, dict(tensors), process_group=group, no_dist=alone)


def _of_another_model(name: str, wanted: Iterable[str], there: Iterable[str]) -> str:
    """Explain why a checkpoint may lack a tensor, and what to do. peft renames the layers that it adapts."""
    if not name.startswith("model/") and f"model/{name.partition('/')[2]}" in there:
        return "its run used another optimizer for this parameter, or none; set optim.method and optim.overrides as in that run"
    wants, has = (any(".lora_A." in name for name in names) for names in (wanted, there))
    if wants and not has:
        return (
            "its run trained all weights, this one has model.lora; convert the checkpoint to Hugging Face format and give "
            "that as model.pretrained"
        )
    if has and not wants:
        return (
            "its run has adapters, this one has no model.lora; set it as in that run, or convert the checkpoint to Hugging "
            "Face format and give that as model.pretrained"
        )
    return "it is the checkpoint of another model or objective; set both as in its run"


def read_whole(folder: Path, names: list[str]) -> dict[str, Tensor]:
    """Read whole tensors into host memory, in this process only; no process group is needed.

    Raises:
        InputError: a tensor is missing, or a file of tensors is missing or damaged.
    """
    there = shapes(folder)
    for name in names:
        if name not in there:
            raise InputError(f"{folder}: holds no tensor {name!r}")
    tensors = {name: torch.empty(there[name][0], dtype=there[name][1]) for name in names}
    _load(folder, {name: ShardView.whole(tensor) for name, tensor in tensors.items()}, no_dist=True)
    return tensors


def _load(folder: Path, tensors: dict[str, Any], **how: Any) -> None:
    try:
        dcp.load(tensors, storage_reader=SafeReader(folder), planner=_LoadPlanner(**_AS_IT_IS), **how)
    except CheckpointException as error:
        raise InputError(f"{folder}: cannot be read: {_reason(error)}") from error
