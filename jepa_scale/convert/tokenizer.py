"""The tokenizer of a run's data, and the special ids."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jepa_scale.data.files.cache import cache_dir
from jepa_scale.data.options import MixtureOptions, ReversalOptions, SourceOptions
from jepa_scale.data.prepare.encoders.tokenizer import load_tokenizer, special_ids, vocabulary_size
from jepa_scale.data.shards.source import open_shards
from jepa_scale.utils.errors import InputError


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Files of a tokenizer, as ``save_pretrained`` writes them, by path; empty if the data have no tokenizer.

    special: ids of ``eos``, ``pad``, ``bos``, and ``end`` (of an answer in a chat), as far as they exist.
    size: one more than the largest id, 0 if the data have no tokenizer. chat: whether it has a chat template.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    special: Mapping[str, int] = field(default_factory=dict)
    size: int = 0
    chat: bool = False


def named_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer of a folder; ``"none"`` = none.

    Raises:
        InputError: the folder cannot be read.
    """
    return Tokenizer() if name == "none" else _load(name, {})


def data_tokenizer(data: SourceOptions) -> Tokenizer:
    """Return the tokenizer with which a run's data were made.

    Raises:
        InputError: the data cannot be read.
    """
    options = data.parts[0] if isinstance(data, MixtureOptions) else data  # the parts share one tokenizer
    if isinstance(options, MixtureOptions | ReversalOptions):
        return Tokenizer()
    try:
        located = open_shards(options, cache_dir(options.cache))
        folder = located.tokenizer()
    except InputError as error:
        raise InputError(f"{error}; or name the tokenizer's folder with --tokenizer (none = leave it out)") from None
    special = {name: value for name, value in located.index.special.items() if isinstance(value, int)}
    return Tokenizer(special=special) if folder is None else _load(str(folder), special)


def _load(name: str, special: Mapping[str, int]) -> Tokenizer:
    tokenizer = load_tokenizer(name)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = read_files(Path(folder))
    chat = bool(getattr(tokenizer, "chat_template", None))
    return Tokenizer(files, {**special_ids(tokenizer), **special}, vocabulary_size(tokenizer), chat)


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files of a folder, by path within it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
