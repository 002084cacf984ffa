"""The job that turns raw data into a folder of shards: parallel, restartable, the same bytes every time.

During the work the folder also holds ``job.json`` (a description of the job; it stays), ``job.lock`` and a
``.done.json`` per finished shard. ``index.json`` is written last: a folder that has it is complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections import Counter
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jepa_scale.data.files.addresses import redacted_url
from jepa_scale.data.files.cache import CACHE_BYTES, Cache, cache_dir
from jepa_scale.data.prepare.base import BadRecord, Encoder, PrepareOptions, Record
from jepa_scale.data.prepare.blocks import BLOCK_BYTES, DONE_SUFFIX, EXAMPLES, ShardMaker, cannot_write, cut
from jepa_scale.data.prepare.encoders.chat_encoder import ChatEncoder
from jepa_scale.data.prepare.encoders.encode import make_encoder
from jepa_scale.data.prepare.formats.source import Source
from jepa_scale.data.prepare.readers import open_reader
from jepa_scale.data.prepare.workers import Workers, cores
from jepa_scale.data.shards.format import FORMAT, INDEX_FILE, Index, ShardInfo
from jepa_scale.data.shards.locate import shard_fault
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.io import write_atomic
from jepa_scale.utils.lock import JOB_LOCK, locked

logger = logging.getLogger(__name__)

JOB_FILE = "job.json"
TOKENIZER = "tokenizer"
CHECKED = 10
"""Rows whose prompts are compared with the chat template's before the work begins."""
OURS = {JOB_FILE, f"{JOB_FILE}.partial", JOB_LOCK}
"""Files of a job. A folder that holds other files and none of these is not overwritten."""


def prepare(
    path: str | Path,
    out: str | Path,
    options: PrepareOptions,
    processes: int | None = None,
    progress: bool = True,
    *,
    cache: Path | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Index:
    """Prepare the raw data ``path`` into the folder ``out``.

    If it is killed and called again with the same source and options, it keeps the finished shards. Shards and index
    are the same bytes for any number of processes and interruptions. A complete folder of the same job is left as it
    is.

    Args:
        path: the raw data, in a form that :func:`open_reader` supports.
        processes: worker processes, None = one a core; 1 = the work is done here, or beside it where much is to do and
            tcmalloc is installed (:class:`Workers`). Raw data of about 128 MiB a process are held in memory.
        progress: show a bar when stderr is a terminal.
        cache: folder of files that later jobs use again (None = :func:`cache_dir`).
        cache_bytes: size limit of the files in it that were downloaded.

    Raises:
        InputError: the source is bad, a record is bad and ``options.on_error`` is stop, nothing is left to train on,
            ``out`` holds something else or is being prepared by another process, or it cannot be written.
    """
    out = Path(out)
    with suppress(OSError):
        if Path(path).is_dir() and out.resolve().is_relative_to(Path(path).resolve()):
            raise InputError(f"{out}: lies in the source {path}, which must not change; choose another folder")
    cache = cache or cache_dir()
    reader = open_reader(str(path), options, Cache(cache, cache_bytes))
    try:
        _claim(out)
        with locked(out / JOB_LOCK, wait=0):
            return _fill(reader, path, out, options, processes, progress, cache)
    except OSError as error:
        raise cannot_write(error, out) from None


def prepared(
    path: str | Path,
    options: PrepareOptions,
    cache: Path,
    processes: int | None = None,
    progress: bool = True,
    cache_bytes: int = CACHE_BYTES,
) -> Path:
    """Return the folder below ``cache`` that holds ``path`` prepared with ``options``; make it if it is not there.

    May be called by many processes at once, also of several hosts that share ``cache``: one does the work, the others
    wait for it. If it is killed, the next one continues with the unfinished shards.

    Raises:
        InputError: as :func:`prepare`.
    """
    reader = open_reader(str(path), options, Cache(cache, cache_bytes))
    what = [FORMAT, BLOCK_BYTES, reader.fingerprint(), _named(options), _local_tokenizer(options.tokenizer)]
    folder = cache / "prepared" / hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
    try:
        if _complete(folder) is None:
            _claim(folder)
            with locked(folder / JOB_LOCK):
                if _complete(folder) is None:
                    _fill(reader, path, folder, options, processes, progress, cache)
    except OSError as error:
        raise cannot_write(error, folder) from None
    return folder


def _fill(
    reader: Source,
    path: str | Path,
    out: Path,
    options: PrepareOptions,
    processes: int | None,
    progress: bool,
    cache: Path,
) -> Index:
    """Do the work of :func:`prepare`, with the folder's lock held."""
    name = redacted_url(str(path))
    encoder = make_encoder(reader, options, cache)
    job = {
        "format": FORMAT,
        "block_bytes": BLOCK_BYTES,
        "source": reader.fingerprint(),
        "tokenizer": encoder.tokenizer_fingerprint,
        "options": _named(options),
    }
    resumes = _resumes(out, job)
    index = _complete(out)
    if index is not None:
        _clean(out, f"*{DONE_SUFFIX}", "*.partial")
        logger.info(f"{out}: is prepared already, nothing to do")
        return index
    if (out / INDEX_FILE).exists():
        logger.warning(f"{out}: shards are missing since it was prepared; they are made again")
        (out / INDEX_FILE).unlink()
    elif resumes:
        logger.info(f"{out}: continues where it was stopped")
    _clean(out, "*.partial")
    if isinstance(encoder, ChatEncoder):
        _check_prompts(reader, encoder)
    write_atomic(out / JOB_FILE, json.dumps(job, indent=1).encode())
    processes = processes or cores()

    splits: dict[str, list[ShardInfo]] = {}
    records: dict[str, int] = {}
    skipped: dict[str, int] = {}
    examples: dict[str, list[str]] = {}
    unused: Counter[str] = Counter()
    try:
        with Workers(ShardMaker(out, encoder, options.on_error), processes) as workers:
            for split in reader.splits:
                begin, there, shards = time.monotonic(), 0, []
                blocks = cut(reader.records(split), split, options.shard_samples)
                bar = tqdm(
                    total=reader.count(split),
                    desc=split,
                    unit=" records",
                    unit_scale=True,
                    dynamic_ncols=True,
                    disable=None if progress else True,  # None: off when stderr is no terminal
                )
                records[split] = 0
                with bar:
                    for done, was_there in workers.finish(blocks):
                        bar.update(done.records)
                        records[split] += done.records
                        there += done.records if was_there else 0
                        shards += [done.shard] if done.shard else []
                        unused.update(done.unused)
                        for reason, count in done.skipped.items():
                            skipped[reason] = skipped.get(reason, 0) + count
                            named = examples.setdefault(reason, [])
                            named += done.examples[reason][: EXAMPLES - len(named)]
                logger.info(_split_done(split, records[split], there, time.monotonic() - begin))
                if shards:
                    splits[split] = shards
                elif split == "train":
                    raise InputError(_nothing(name, records[split], skipped))
                else:
                    logger.warning(f"{split}: holds no samples, it is left out")
    finally:
        _clean(out, "*.partial")
    if reader.fingerprint() != job["source"]:
        raise InputError(f"{name}: has changed while it was being prepared; remove {out} and start again")
    if unused:
        names = ", ".join(f"{name} ({count:,})" for name, count in sorted(unused.items()))
        logger.warning(f"not used, with the number of records that hold it: {names}")
    index = Index(
        kind=reader.kind,
        splits=splits,
        vocab_size=encoder.vocab_size,
        special=encoder.special,
        tokenizer=TOKENIZER if _save_tokenizer(encoder, out) else None,
        tokenizer_fingerprint=encoder.tokenizer_fingerprint,
        skipped=skipped,
        made_from={
            "source": name,
            "fingerprint": job["source"],
            "options": job["options"],
            "records": records,
            "skipped": examples,
            "unused": dict(sorted(unused.items())),
        },
    )
    index.write(out)
    _clean(out, f"*{DONE_SUFFIX}")
    return index


def _named(options: PrepareOptions) -> dict[str, Any]:
    """Return the options that name a job. A key that earlier versions did not have is named where it is set."""
    return {key: value for key, value in options.resolved().items() if key != "add_eos" or value}


def _check_prompts(reader: Source, encoder: ChatEncoder) -> None:
    """Compare the prompts of the first rows with those that the model will be asked with.

    Raises:
        InputError: one differs; the message names its row.
    """
    changed = False
    for record in islice((r for r in reader.records("train") if isinstance(r, Record)), CHECKED):
        with suppress(BadRecord):  # reported with its block
            changed |= encoder.check(record)
    if changed:
        logger.warning(
            "the chat template renders answers that are followed by others in another way than last ones; they are trained as "
            "it renders them"
        )


def _claim(folder: Path) -> None:
    """Make the folder, or check that it holds a preparation by this command."""
    folder.mkdir(parents=True, exist_ok=True)
    there = set(os.listdir(folder))
    if there and not there & OURS:
        raise InputError(f"{folder}: is not empty and was not made by this command; choose another folder")


def _resumes(out: Path, job: dict[str, Any]) -> bool:
    """Return whether the folder holds this job already.

    A job that stopped and is resumed with ``on_error=skip`` is the same job: no finished shard has a bad record.

    Raises:
        InputError: it holds another job.
    """
    file = out / JOB_FILE
    try:
        found = json.loads(file.read_bytes())
        old, new = ({**values, **values["options"], "options": None} for values in (found, job))
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file}: is damaged; remove {out} or choose another folder") from None
    differ = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if differ == ["on_error"] and old["on_error"] == "stop":
        differ = []
    if differ:
        raise InputError(
            f"{out}: holds another preparation (differs in {', '.join(differ)}); remove it or choose another folder"
        )
    return True


def _complete(folder: Path) -> Index | None:
    """Return the index of a complete folder whose shards are all there and have the right size."""
    if not (folder / INDEX_FILE).exists():
        return None
    index = Index.read(folder)
    shards = (shard for of_split in index.splits.values() for shard in of_split)
    return None if any(shard_fault(folder, shard) for shard in shards) else index


def _save_tokenizer(encoder: Encoder, out: Path) -> bool:
    """Save the tokenizer, whole or not at all; return False when there is none."""
    partial, folder = out / f"{TOKENIZER}.partial", out / TOKENIZER
    partial.mkdir()
    if saved := encoder.save(partial):
        for file in (f for f in partial.rglob("*") if f.is_file()):
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    else:
        partial.rmdir()
    return saved


def _clean(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        for file in folder.glob(pattern):
            shutil.rmtree(file) if file.is_dir() else file.unlink()


def _local_tokenizer(name: str) -> str:
    """Return the hash of a local tokenizer folder or file, whose content may change; empty for other tokenizers."""
    path = Path(name)
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    digest = hashlib.sha256()
    for file in files:
        if file.suffix in (".json", ".txt", ".model", ".jinja") and file.is_file():  # no model weights
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest() if files else ""


def _split_done(split: str, records: int, there: int, seconds: float) -> str:
    before = f", {there:,} of them were there already" if there else ""
    return f"{split}: {records:,} records{before}; {seconds:,.1f} s, {(records - there) / max(seconds, 1e-9):,.0f} records/s"


def _nothing(path: str, records: int, skipped: dict[str, int]) -> str:
    if not records:
        return f"{path}: nothing to train on: it holds no records"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
    return f"{path}: nothing to train on: {sum(skipped.values()):,} records skipped: {reasons}"
