"""Check the files of a pretrained model before they are loaded. Nothing but names, headers and sizes is read, and torch is not
imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jepa_scale.utils.errors import InputError
from jepa_scale.utils.file_names import lies_within, read_json, shards_of

CONFIG, ADAPTER = "config.json", "adapter_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files of weights in the order in which transformers looks for them."""
_LFS = b"version https://git-lfs"


def check_folder(folder: Path, weights: bool = True) -> None:
    """Check that a local folder holds a whole model that can be trained.

    Args:
        weights: whether its weights are used, too.

    Raises:
        InputError: it holds an adapter alone, quantised weights, no weights, or damaged ones, or a file that names one outside
            of the folder.
    """
    if (folder / ADAPTER).is_file():
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
        raise InputError(
            f"{folder}: holds an adapter ({ADAPTER}), whose base is {base!r}; name the base, and make a run of the adapter with "
            "jepa-scale convert --from hf, or merge the two with peft's merge_and_unload and give what save_pretrained writes"
        )
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: not a Hugging Face model (no {CONFIG}); give a folder made by save_pretrained")
    config = read_json(folder / CONFIG)
    if weights:
        check_quantisation(config, str(folder))
        for file in _weights(folder, config):
            _check_whole(file)


def check_quantisation(config: dict[str, Any], name: str) -> None:
    """Check that a model's weights are no codes of fewer bits.

    Args:
        config: values of its ``config.json``.

    Raises:
        InputError: they are quantised.
    """
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            found = part.get(key)
            if found:
                method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
                raise InputError(
                    f"{name}: its weights are quantised ({key}: {getattr(method, 'value', method) or 'of unknown kind'}), and cannot "
                    "be trained; give the model that they were made from"
                )


def _weights(folder: Path, config: dict[str, Any]) -> list[Path]:
    """Return the paths of the files that transformers reads the weights from."""
    own = config.get("transformers_weights")
    if own is not None and not lies_within(own):
        raise InputError(
            f"{folder / CONFIG}: transformers_weights is {own!r}, outside of this folder; put the file in it"
        )
    for name in WEIGHTS if own is None else (own,):
        file = folder / name
        if file.is_file():
            return [folder / shard for shard in shards_of(file)] if name.endswith(".index.json") else [file]
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:6])
    raise InputError(f"{folder}: has no weights ({own or WEIGHTS[0]} or an index of shards), only {there}; add them")


def _check_whole(file: Path) -> None:
    """Check a file of weights: a safetensors file begins with the length of its header, which has the offsets of all tensors."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            start = stream.read(len(_LFS))
            if start == _LFS:
                raise InputError(f"{file}: is a pointer of Git LFS and no weights; run `git lfs pull` in its folder")
            if file.suffix != ".safetensors":
                return
            length = int.from_bytes(start[:8], "little")
            stream.seek(8)
            header = stream.read(length) if length <= size else b""
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); copy it again") from None
    try:
        entries = json.loads(header)
        end = max((e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise InputError(f"{file}: is truncated or no safetensors file ({size:,} bytes); copy it again") from None
    if 8 + length + end != size:
        raise InputError(f"{file}: has {size:,} bytes, its header says {8 + length + end:,}; copy it again")
