"""Selection of records: a fraction held out as ``valid``, limits, and another path's records as ``valid``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice

from jepa_scale.data.prepare.base import PrepareOptions
from jepa_scale.data.prepare.formats.source import Items, Part, Source, identity
from jepa_scale.utils.errors import InputError


def held_out(number: int, seed: int, fraction: float) -> bool:
    """Return whether record ``number`` belongs to ``valid``, which is so for a share ``fraction`` of all numbers.

    The result depends on the three arguments alone. A larger fraction holds out the same records and more.
    """
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64 < fraction


def select(source: Source, options: PrepareOptions, valid: Source | None = None) -> Source:
    """Return ``source`` with a split ``valid`` (another source's records, or a fraction of its own) and with limits applied.

    Records are numbered in order, including bad ones, so that repairing one does not renumber the others.
    ``max_eval_items`` limits every split except ``train``.

    Raises:
        InputError: ``valid`` has another kind, or ``valid_fraction`` is set although the data have a split ``valid``.
    """
    if valid is not None:
        source = _with_valid(source, valid)
    if options.valid_fraction and not source.cut:
        if "valid" in source.parts or source.kind == "reversal":
            has = ", ".join(s for s in source.splits if s != "train")
            raise InputError(f"data.valid_fraction: the data have evaluation splits of their own ({has}); set it to 0")
        source = _hold_out(source, options.valid_fraction, options.split_seed)
    return _limit(source, options.max_items, options.max_eval_items)


def _with_valid(source: Source, other: Source) -> Source:
    if other.kind != source.kind:
        raise InputError(f"data.valid_path: holds {other.kind}, the training data hold {source.kind}")
    if source.vocabulary != other.vocabulary and source.kind != "reversal":
        raise InputError("data.valid_path: has another vocab_size or other special ids than the training data")
    if source.kind == "reversal":
        raise InputError("data.valid_path: a folder of facts has its own valid.json; set it to null")
    part = other.parts["valid" if "valid" in other.parts else "train"]
    return replace(
        source, parts={**source.parts, "valid": part}, identify=partial(_identify, (source, other), "valid_path")
    )


def _hold_out(source: Source, fraction: float, seed: int) -> Source:
    read = source.parts["train"].read
    parts = {
        "train": Part(partial(_chosen, read, seed, fraction, False)),
        "valid": Part(partial(_chosen, read, seed, fraction, True)),
    }
    others = {name: part for name, part in source.parts.items() if name != "train"}
    return replace(
        source, parts=parts | others, identify=partial(_identify, (source,), f"valid_fraction {fraction} {seed}")
    )


def _limit(source: Source, train: int, others: int) -> Source:
    if not train and not others:
        return source
    parts = {}
    for name, part in source.parts.items():
        limit = train if name == "train" else others
        if limit:
            part = Part(partial(_first, part.read, limit), None if part.count is None else min(part.count, limit))
        parts[name] = part
    return replace(source, parts=parts, identify=partial(_identify, (source,), f"limits {train} {others}"))


def _identify(sources: tuple[Source, ...], how: str) -> str:
    return identity([source.fingerprint() for source in sources], how)


def _chosen(read: Callable[[], Items], seed: int, fraction: float, wanted: bool) -> Items:
    return (item for number, item in enumerate(read()) if held_out(number, seed, fraction) is wanted)


def _first(read: Callable[[], Items], limit: int) -> Items:
    return islice(read(), limit)
