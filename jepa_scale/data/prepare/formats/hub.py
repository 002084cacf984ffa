"""Hugging Face datasets: streamed from the hub by name, or read from a folder written by ``save_to_disk``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from jepa_scale.data.files.suffixes import is_raw_name
from jepa_scale.data.prepare.base import PrepareOptions, Record
from jepa_scale.data.prepare.formats.files import split_of
from jepa_scale.data.prepare.formats.source import Items, Part, identity
from jepa_scale.data.prepare.formats.table import without_fill
from jepa_scale.utils.errors import InputError

_BATCH = 1024  # rows converted to Python objects at a time
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ADDRESS = re.compile(r"hf://datasets/([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@([\w.%-]+))?/?")


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset of the Hugging Face hub, by name; ``revision`` is a branch, tag or commit, None = the newest."""

    name: str
    revision: str | None = None


def dataset_of(path: str) -> Dataset | None:
    """Return the dataset that a path names, None if it names files.

    It is ``hf://datasets/owner/name``, with ``@revision`` perhaps, or ``owner/name`` alone. The latter is taken for a local
    path if something here is called ``owner``, or if it ends as a file of data does.
    """
    if found := _ADDRESS.fullmatch(path):
        return Dataset(found[1], found[2] and unquote(found[2]))
    owner, _, name = path.partition("/")
    is_file = is_raw_name(name) or name.lower().endswith((".tar", ".json"))
    return None if _NAME.fullmatch(path) is None or os.path.exists(owner) or is_file else Dataset(path)


def advice(path: str) -> str:
    """Return the end of an error about a local path that is not there."""
    if re.fullmatch(r"[A-Za-z0-9][\w-]*", path):
        return f"; a dataset of the Hugging Face hub is hf://datasets/{path}"
    return "; correct it" if _NAME.fullmatch(path) is None else f"; for a dataset of the hub write hf://datasets/{path}"


def is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def choose_splits(names: list[str], train: str | None, what: str) -> dict[str, str]:
    """Map the project's split names to the dataset's: the training split and its evaluation splits.

    Evaluation splits are recognised by name (``validation``, ``test``; for ``train_sft``: ``test_sft``). Other splits are not
    used.

    Raises:
        InputError: the dataset has no split of the wanted name.
    """
    wanted = train or ("train" if "train" in names or len(names) != 1 else names[0])
    if wanted not in names:
        raise InputError(f"{what}: has no split {wanted!r}, but {', '.join(names)}; set data.train_split")
    chosen = {"train": wanted}
    suffix = wanted.partition("_")[2]
    for name in names:
        split = split_of(name.partition("_")[0])
        if name != wanted and split in ("valid", "test") and name.partition("_")[2] == suffix:
            chosen.setdefault(split, name)
    return chosen


def saved_parts(folder: Path, options: PrepareOptions) -> dict[str, Part]:
    """Open the splits of a saved dataset as parts of raw rows, named ``folder/split#n``.

    Raises:
        InputError: the folder cannot be read as a dataset, or has no such split.
    """
    content = _load_saved(folder)
    if not isinstance(content, dict):
        if options.train_split:
            raise InputError(f"{folder}: is one dataset without splits; set data.train_split to null")
        return {"train": Part(partial(_saved_rows, folder, None), content.num_rows)}
    chosen = choose_splits(list(content), options.train_split, str(folder))
    return {ours: Part(partial(_saved_rows, folder, name), content[name].num_rows) for ours, name in chosen.items()}


def saved_files(folder: Path) -> tuple[Path, ...]:
    """Return the dataset's own files, without the library's cache files beside them."""
    return tuple(sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.startswith(("cache-", "."))))


def _load_saved(folder: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises many types for a damaged folder
        raise InputError(f"{folder}: cannot be read as a saved dataset: {_first_line(error)}") from None


def _saved_rows(folder: Path, split: str | None) -> Items:
    content = _load_saved(folder)
    rows = content if split is None else content[split]
    # in Arrow's format nothing is decoded, so a column that is not used may hold what cannot be
    values = (row for batch in rows.with_format("arrow").iter(_BATCH) for row in batch.to_pylist())
    for number, row in enumerate(values):
        yield Record(f"{folder}{f'/{split}' if split else ''}#{number}", without_fill(row))


def hub_parts(dataset: Dataset, options: PrepareOptions) -> dict[str, Part]:
    """Open the splits of a dataset on the hub as parts of raw rows, named ``name/split#n``. Rows are streamed.

    Raises:
        InputError: the dataset cannot be reached, or has no such split or configuration.
    """
    import datasets

    try:
        names = datasets.get_dataset_split_names(dataset.name, options.config_name, revision=dataset.revision)
    except Exception as error:  # no network, no such dataset, gated, needs a configuration …
        raise unreachable(dataset.name, error) from None
    chosen = choose_splits(list(map(str, names)), options.train_split, f"dataset {dataset.name!r}")
    return {ours: Part(partial(hub_rows, dataset, options.config_name, theirs)) for ours, theirs in chosen.items()}


def hub_rows(dataset: Dataset, config: str | None, split: str) -> Items:
    """Stream the rows of a split from the hub."""
    import datasets

    try:
        rows = datasets.load_dataset(
            dataset.name, config, split=split, revision=dataset.revision, streaming=True
        ).decode(False)
        for number, row in enumerate(rows):
            yield Record(f"{dataset.name}/{split}#{number}", without_fill(row))
    except Exception as error:
        raise unreachable(dataset.name, error) from None


def unreachable(name: str, error: Exception) -> InputError:
    return InputError(
        f"dataset {name!r} cannot be read from the Hugging Face hub: {_first_line(error)}; check the name, "
        f"data.config_name and the network, or give it as a local file or folder (JSONL, parquet, save_to_disk)"
    )


def identify_hub(dataset: Dataset, *choices: Any) -> str:
    """Return the SHA-256, in hex, of the name, the options, and the revision's commit if the hub can be reached."""
    return identity(dataset.name, _commit(dataset), *choices)


def _commit(dataset: Dataset) -> str | None:
    try:
        from huggingface_hub import HfApi

        return HfApi().dataset_info(dataset.name, revision=dataset.revision, timeout=20).sha
    except Exception:  # offline: the name, the revision and the options identify the data
        return dataset.revision


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
