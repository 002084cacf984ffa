"""Corpora by name: read from a data folder, downloaded, or taken from the Python installation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from jepa_scale.data.files.addresses import Refused
from jepa_scale.data.files.cache import cache_dir
from jepa_scale.data.files.download import read_address
from jepa_scale.data.files.raw import RawFile
from jepa_scale.data.prepare.base import PrepareOptions, Record
from jepa_scale.data.prepare.folders import data_folders
from jepa_scale.data.prepare.formats.grid_sources import arc, generated
from jepa_scale.data.prepare.formats.hub import Dataset, hub_rows, identify_hub
from jepa_scale.data.prepare.formats.rows import Schema, expanded
from jepa_scale.data.prepare.formats.source import Items, Part, Source, identify_files, identity, read_each
from jepa_scale.data.prepare.formats.table import read_jsonl
from jepa_scale.data.prepare.formats.text import cut_at_line, read_piece, read_text, split_documents
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.io import write_atomic

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_NAMES = ("tiny_shakespeare.txt", "tiny_shakespeare/input.txt")
WIKITEXT = (Dataset("Salesforce/wikitext"), "wikitext-2-raw-v1")
_SPLITS = {"train": "train", "valid": "validation", "test": "test"}  # split → its name on the hub


def tiny_shakespeare(options: PrepareOptions) -> Source:
    """Open Tiny Shakespeare, from a local file or downloaded.

    The first 90 % of the text (``1 - valid_fraction`` if that is set), cut at a line end, is ``train``, the rest ``valid``;
    one document each. With ``valid_path`` the whole text is ``train``.

    Raises:
        InputError: there is no local file, and the download failed.
    """
    candidates = [folder / name for folder in data_folders() for name in SHAKESPEARE_NAMES]
    file = next((c for c in candidates if c.is_file()), None)
    if file is None:
        file = cache_dir() / SHAKESPEARE_NAMES[0]
        _download(SHAKESPEARE_URL, file, candidates)
    return cut_text(file, 0.0 if options.valid_path else options.valid_fraction or 0.1)


def cut_text(file: RawFile, fraction: float) -> Source:
    """Open a file as one document, or as two if ``fraction`` of it becomes ``valid``."""
    at = cut_at_line(file, 1 - fraction) if fraction else None
    parts = {"train": Part(partial(read_piece, file, 0, at), 1)}
    if at is not None:
        parts["valid"] = Part(partial(read_piece, file, at, None), 1)
    folder = file.parent if isinstance(file, Path) else str(file).rpartition("/")[0]
    return Source("text", parts, partial(identify_files, {"all": (file,)}, folder, "cut", at), cut=bool(fraction))


def _download(url: str, file: Path, candidates: list[Path]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, read_address(url))
    except (OSError, Refused, InputError) as error:
        raise InputError(
            f"tiny_shakespeare: no file {SHAKESPEARE_NAMES[0]} and no download ({error}); put {url} at "
            f"{' or '.join(map(str, candidates))}, or set JEPA_SCALE_DATA to the folder that holds it"
        ) from None


def wikitext2(options: PrepareOptions) -> Source:
    """Open WikiText-2 (raw), one article a document: from local files, else streamed from the Hugging Face hub.

    Raises:
        InputError: a local folder lacks the training file; or there is no folder, and the hub cannot be reached.
    """
    folders = [folder / "wikitext2" for folder in data_folders()]
    for folder in folders:
        found = {split: file for split in _SPLITS if (file := _wikitext_file(folder, split))}
        if found:
            if "train" not in found:
                raise InputError(
                    f"{folder / 'train.txt'}: no such file, but {', '.join(f.name for f in found.values())} exist; "
                    f"add the training text of WikiText-2 (raw)"
                )
            files = {split: (file,) for split, file in found.items()}
            read = partial(read_text, documents="heading")
            parts = {split: Part(partial(read_each, read, paths)) for split, paths in files.items()}
            return Source("text", parts, partial(identify_files, files, folder, "heading"))
    try:
        next(iter(_wikitext_lines("test")))
    except InputError as error:
        where = " or ".join(str(folder) for folder in folders)
        raise InputError(
            f"wikitext2: no files train.txt, valid.txt, test.txt in {where} and no download; {error}"
        ) from None
    return Source(
        "text",
        {ours: Part(partial(_wikitext_articles, theirs)) for ours, theirs in _SPLITS.items()},
        partial(identify_hub, *WIKITEXT, "heading"),
    )


def _wikitext_file(folder: Path, split: str) -> Path | None:
    names = (f"{split}.txt", f"wiki.{split}.raw", f"wiki.{split}.tokens")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _wikitext_lines(split: str) -> Items:
    return hub_rows(*WIKITEXT, split)


def _wikitext_articles(split: str) -> Items:
    """Yield the articles of a split; the hub's rows are lines of text."""
    lines = (item.value["text"].encode() for item in _wikitext_lines(split) if isinstance(item, Record))
    return split_documents(lines, "heading", partial(_row_name, split))


def _row_name(split: str, line: int) -> str:
    return f"{WIKITEXT[0].name}/{split}#{line - 1}"


def nl_rx_synth(options: PrepareOptions) -> Source:
    """Open NL-RX-SYNTH (Locascio et al., EMNLP 2016), from the files that LLM-JEPA publishes.

    They hold English descriptions of regular expressions as chat messages: 8,000 training rows and 2,000 rows for the split
    ``test``.

    Raises:
        InputError: the files are missing.
    """
    folders = [folder / "nl_rx_synth" for folder in data_folders()]
    for folder in folders:
        names = {split: (f"{split}.jsonl", f"synth_{split}.jsonl") for split in ("train", "test")}
        found = {s: next((folder / n for n in of if (folder / n).is_file()), None) for s, of in names.items()}
        files = {split: (file,) for split, file in found.items() if file}
        if "train" in files:
            schema = Schema("chat", "messages", {"messages": "messages"})
            parts = {s: expanded(Part(partial(read_each, read_jsonl, f)), schema) for s, f in files.items()}
            return Source("chat", parts, partial(identify_files, files, folder, "messages"))
    raise InputError(
        f"nl_rx_synth: no train.jsonl and test.jsonl in {' or '.join(map(str, folders))}; take datasets/synth_train.jsonl and "
        "synth_test.jsonl of the LLM-JEPA repository, or set JEPA_SCALE_DATA to the folder that holds nl_rx_synth/"
    )


def python_docs(options: PrepareOptions) -> Source:
    """Open the reference topics of CPython's ``help()``, about 0.5 MB of English text.

    Each topic is a document, and every tenth one is ``valid``. The topics, and so the fingerprint, differ between versions of
    Python.
    """
    parts = {"train": Part(partial(_topics, False)), "valid": Part(partial(_topics, True))}
    return Source("text", parts, _identify_topics)


def _topics(valid: bool) -> Items:
    for number, (topic, text) in enumerate(_all_topics()):
        if (number % 10 == 0) is valid:
            yield Record(f"python_docs#{topic}", text)


def _all_topics() -> list[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError("python_docs: this Python has no pydoc_data; use another Python or other data") from None
    return sorted(topics.items())


def _identify_topics() -> str:
    return identity("python_docs", _all_topics())


ALIASES: dict[str, Callable[[PrepareOptions], Source]] = {
    "tiny_shakespeare": tiny_shakespeare,
    "tiny": tiny_shakespeare,
    "wikitext2": wikitext2,
    "wiki": wikitext2,
    "wt2": wikitext2,
    "python_docs": python_docs,
    "nl_rx_synth": nl_rx_synth,
    "grid_rules": generated,
    "arc": arc,
}
"""Alias → function that opens the corpus. A path equal to an alias never names a file; write ``./tiny`` for a file."""
