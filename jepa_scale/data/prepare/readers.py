"""Opening of raw data: turn a path of any supported format into a reader of records."""

from __future__ import annotations

import json
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from jepa_scale.data.files.addresses import redacted_url
from jepa_scale.data.files.cache import Cache, cache_dir
from jepa_scale.data.files.listing import RemoteFolder
from jepa_scale.data.files.raw import RawFile, RemoteFile
from jepa_scale.data.prepare.aliases import ALIASES, cut_text
from jepa_scale.data.prepare.base import PrepareOptions
from jepa_scale.data.prepare.formats import arrays, facts, hub
from jepa_scale.data.prepare.formats.files import Found, expand, find
from jepa_scale.data.prepare.formats.rows import CHAT_VERSION, expanded, find_schema
from jepa_scale.data.prepare.formats.source import Items, Part, Source, identify_files, read_each, relative
from jepa_scale.data.prepare.formats.table import count_parquet, read_json, read_jsonl, read_parquet
from jepa_scale.data.prepare.formats.tar import read_tar
from jepa_scale.data.prepare.formats.text import read_text
from jepa_scale.data.prepare.selection import select
from jepa_scale.data.shards.format import INDEX_FILE
from jepa_scale.utils.errors import InputError

READERS: dict[str, Callable[[RawFile], Items]] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "parquet": read_parquet,
    "tar": read_tar,
}
"""Format of :data:`~jepa_scale.data.files.suffixes.FORMATS` → function that yields the rows of a file."""


def open_reader(path: str, options: PrepareOptions, cache: Cache | None = None) -> Source:
    """Open the data that ``path`` names, with ``valid_path``, ``valid_fraction`` and the limits applied.

    Args:
        path: an alias (``tiny_shakespeare``, ``wikitext2``, ``python_docs`` …), a file, a folder, a glob, a brace pattern,
            the address of any of these (``s3://``, ``gs://``, ``hf://``, ``https://``), or a Hugging Face dataset
            (``hf://datasets/owner/name``, or ``owner/name`` if no local folder is called ``owner``). Supported formats are plain
            text, JSON lines, JSON, parquet, saved Hugging Face datasets, ARC tasks, webdataset shards, folders of facts
            (:mod:`~jepa_scale.data.prepare.formats.facts`) and of token ids (:mod:`~jepa_scale.data.prepare.formats.arrays`).
        cache: where files behind addresses are kept; None = :func:`cache_dir`.

    Raises:
        InputError: nothing has that name, or the files contradict ``options``.
    """
    cache = cache or Cache(cache_dir())
    valid = _open(options.valid_path, options, cache, valid=True) if options.valid_path else None
    return select(_open(path, options, cache), options, valid)


def _open(path: str, options: PrepareOptions, cache: Cache, valid: bool = False) -> Source:
    """Open ``path``, without the selection.

    Args:
        valid: all records are for the split ``valid``, so files are not divided into splits and none are held out.
    """
    if path in ALIASES:
        return _checked(ALIASES[path](options), path, options)
    if path.startswith("pipe:"):
        raise InputError(f"data path {path!r}: raw data are not read from a command; give files or an address")
    dataset = hub.dataset_of(path)
    if dataset:
        return _checked(_open_hub(dataset, options), path, options)
    paths = expand(path, cache)
    if not paths:
        raise InputError(f"data path {path!r}: no such file, folder or pattern{hub.advice(path)}")
    if len(paths) == 1 and isinstance(paths[0], RemoteFolder):
        _refuse_remote(paths[0])
    elif len(paths) == 1 and isinstance(paths[0], Path) and paths[0].is_dir():
        source = _open_folder(paths[0], options)
        if source:
            return _checked(source, path, options)
    return _checked(_open_files(find(paths, by_name=not valid), options, valid), path, options)


def _checked(source: Source, path: str, options: PrepareOptions) -> Source:
    if options.kind not in ("auto", source.kind):
        raise InputError(
            f"data path {redacted_url(path)!r}: holds {source.kind}, not {options.kind}; correct data.kind or the path"
        )
    return source


def _open_folder(folder: Path, options: PrepareOptions) -> Source | None:
    """Open a folder whose files form one data set. Returns None for a folder of independent files."""
    if _is_prepared(folder):
        raise InputError(f"{folder}: is already prepared (it holds an {INDEX_FILE}); train on it directly")
    if options.kind == "reversal" or (options.kind == "auto" and facts.is_fact_folder(folder)):
        return facts.open_facts(folder)
    if arrays.is_token_folder(folder):
        return arrays.open_tokens(folder)
    if hub.is_saved(folder):
        identify = partial(identify_files, {"all": hub.saved_files(folder)}, folder, options.train_split)
        return _rows(hub.saved_parts(folder, options), options, str(folder), identify)
    return None


def _refuse_remote(folder: RemoteFolder) -> None:
    """Refuse a folder elsewhere whose files are one data set, which are read where they lie.

    Raises:
        InputError: it is prepared, saved by ``datasets``, or holds token ids or facts.
    """
    names = {relative(file, str(folder)) for file in folder.files}
    if INDEX_FILE in names:
        raise InputError(f"{folder}: is already prepared (it holds an {INDEX_FILE}); train on it directly")
    saved = names & {"dataset_dict.json", "state.json"}
    arrays_there = any(fnmatch(name, arrays.PATTERN) for name in names)
    if saved or arrays_there or ("vocab.json" in names and names & {"train.json", "valid.json"}):
        what = "saved by datasets" if saved else "of token arrays" if arrays_there else "of facts"
        raise InputError(f"{folder}: a folder {what} is read from a disk; copy it here and give its local path")


def _is_prepared(folder: Path) -> bool:
    try:
        return "fingerprint" in json.loads((folder / INDEX_FILE).read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def _open_files(found: Found, options: PrepareOptions, valid: bool) -> Source:
    if found.format == "text":
        return _open_text(found, options, valid)
    read = READERS[found.format]
    parts = {
        split: Part(partial(read_each, read, files), _count(found, split)) for split, files in found.splits.items()
    }
    what = " and ".join(str(f) for f in found.splits["train"][:1]) + (" …" if len(found.splits["train"]) > 1 else "")
    return _rows(parts, options, what, partial(identify_files, found.splits, found.root))


def _count(found: Found, split: str) -> int | None:
    files = found.splits[split]
    if found.format != "parquet" or any(
        isinstance(file, RemoteFile) for file in files
    ):  # do not download all of them now
        return None
    counts = [count_parquet(file) for file in files]
    return None if None in counts else sum(c for c in counts if c is not None)


def _open_text(found: Found, options: PrepareOptions, valid: bool) -> Source:
    files = found.splits["train"]
    one_document = options.documents == "file" and len(files) == 1 and len(found.splits) == 1
    if one_document and options.valid_fraction and not valid and not options.valid_path:
        return cut_text(files[0], options.valid_fraction)
    read = partial(read_text, documents=options.documents)
    parts = {
        split: Part(partial(read_each, read, paths), len(paths) if options.documents == "file" else None)
        for split, paths in found.splits.items()
    }
    return Source("text", parts, partial(identify_files, found.splits, found.root, options.documents))


def _open_hub(dataset: hub.Dataset, options: PrepareOptions) -> Source:
    parts = hub.hub_parts(dataset, options)
    identify = partial(hub.identify_hub, dataset, options.config_name, options.train_split)
    return _rows(parts, options, f"dataset {dataset.name!r}", identify)


def _rows(parts: dict[str, Part], options: PrepareOptions, what: str, identify: Callable[..., str]) -> Source:
    """Make a source from raw rows; the schema of the first row applies to all."""
    if options.kind == "reversal":
        raise InputError(f"{what}: data.kind=reversal needs a folder of train.json, valid.json and vocab.json")
    schema = find_schema(parts["train"].read(), options, what)
    converted = {split: expanded(part, schema) for split, part in parts.items()}
    version = (CHAT_VERSION,) if schema.kind == "chat" else ()
    return Source(schema.kind, converted, partial(identify, schema.kind, schema.form, dict(schema.columns), *version))
