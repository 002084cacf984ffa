"""The tokenizer that a run's data were made with, and the ids that have a meaning."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jepa_scale.data import parse_data
from jepa_scale.data.options import ShardOptions
from jepa_scale.data.prepare.encoders.tokenizer import load_tokenizer, special_ids
from jepa_scale.data.shards.cache import cache_dir
from jepa_scale.data.shards.source import open_shards
from jepa_scale.utils.errors import InputError


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Attributes:
    files: as ``save_pretrained`` writes them, by their path; empty if the data have no tokenizer.
    special: ``eos``, ``pad``, ``bos``, and ``end`` of an answer in a chat, those that there are.
    size: number of ids, 0 if the data have no tokenizer. chat: whether it has a chat template.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    special: Mapping[str, int] = field(default_factory=dict)
    size: int = 0
    chat: bool = False


def find_tokenizer(data: dict[str, Any], given: str | None) -> Tokenizer:
    """The tokenizer of a run.

    Args:
        data: the run's ``data:``. given: a folder to take instead, or ``"none"``; None = that of the data.

    Raises:
        InputError: the data or the folder cannot be read.
    """
    if given == "none":
        return Tokenizer()
    if given is not None:
        return _load(given, {})
    values = dict(data)
    while values.get("source") == "mixture":  # its parts share one tokenizer
        values = {k: v for k, v in values["parts"][0].items() if k not in ("weight", "name")}
    options = parse_data(values)
    if not isinstance(options, ShardOptions):
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
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    chat = bool(getattr(tokenizer, "chat_template", None))
    return Tokenizer(files, {**special_ids(tokenizer), **special}, len(tokenizer), chat)
