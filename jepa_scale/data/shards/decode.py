"""Decoding of the bytes of one sample in a tar to an example.

Members in the form that :mod:`jepa_scale.data.shards.format` writes are parsed here, in a few microseconds. Any other valid tar
or ``.npy`` is read by ``tarfile`` and NumPy.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from dataclasses import replace
from typing import Any

import numpy as np

from jepa_scale.data.examples import Conversation, Document, GridSequence, LabelledTokens, Turn
from jepa_scale.packing import IGNORE

BLOCK = 512
COLOURS = 10
LABELS = "labels.npy"
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<|][iu][1248])', 'fortran_order': False, 'shape': \((\d+),\), \} *\n", re.DOTALL
)


class BadSample(Exception):
    """A damaged sample.

    Attributes:
        extension: extension of the bad member; empty if the fault is not in one member.
        what: the fault.
    """

    def __init__(self, extension: str, what: str) -> None:
        super().__init__(extension, what)
        self.extension, self.what = extension, what


def decode(
    data: bytes, kind: str, num_tokens: int, vocab_size: int, train_all: bool = False
) -> Document | LabelledTokens | Conversation | GridSequence | dict[str, Any]:
    """Decode the example of a sample; for the kind ``reversal``, the row as it was written.

    Args:
        data: bytes of the sample's members, headers and padding included.
        kind: :attr:`jepa_scale.data.shards.format.Index.kind`.
        num_tokens: number of tokens that the sample must have.
        vocab_size: upper bound (exclusive) of all token ids.
        train_all: :attr:`~jepa_scale.data.examples.Conversation.train_all` of a conversation.

    Raises:
        BadSample: a member is missing, cannot be read, or has invalid content.
    """
    members = read_members(data)
    if kind == "reversal":
        row = _json(members)
        if not isinstance(row, dict):
            raise BadSample("json", "is not a JSON object")
        return row
    if kind == "grids":
        return _grids(_json(members), num_tokens)
    tokens = _tokens(members, num_tokens, vocab_size)
    if kind == "text" or (kind == "tokens" and LABELS not in members):
        return Document(tokens)
    if kind == "tokens":
        return LabelledTokens(tokens, _labels(members, num_tokens, vocab_size))
    assert kind == "chat", kind
    return _conversation(tokens, _json(members), train_all)


def truncate(example: Document | LabelledTokens | Conversation, size: int) -> Document | LabelledTokens | Conversation:
    """Keep the first ``size`` tokens, the last of which has no label.

    Turns are cut there, and later turns are left out; ``messages`` is not changed.
    """
    tokens = example.tokens[:size]
    if isinstance(example, Document):
        return Document(tokens)
    if isinstance(example, LabelledTokens):
        return LabelledTokens(tokens, np.append(example.labels[: size - 1], IGNORE))
    turns = tuple(replace(turn, stop=min(turn.stop, size)) for turn in example.turns if turn.start < size)
    return replace(example, tokens=tokens, turns=turns)


def read_members(data: bytes) -> dict[str, bytes]:
    """Return the members' contents by extension (the name after its first dot).

    Raises:
        BadSample: the bytes are not a sequence of tar members.
    """
    members = {}
    offset, end = 0, len(data)
    while offset + BLOCK <= end:
        header = data[offset : offset + BLOCK]
        if header[257:263] != b"ustar\0" or header[156] != 48 or header[124] >= 128:
            return _read_any_members(data)  # GNU, pax, a link, a directory … (the name's prefix is not needed)
        try:
            size = int(header[124:136].rstrip(b"\0 "), 8)
        except ValueError:
            raise BadSample("", "its tar header has no size; the shard is damaged") from None
        begin = offset + BLOCK
        offset = begin + (size + BLOCK - 1) // BLOCK * BLOCK
        if offset > end:
            raise BadSample("", "its tar header has a wrong size; the shard is damaged")
        name = header[: header.index(0)] if not header[99] else header[:100]
        members[_extension(name.decode("utf-8", "replace"))] = data[begin : begin + size]
    return members


def _read_any_members(data: bytes) -> dict[str, bytes]:
    members = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    file = tar.extractfile(member)
                    assert file is not None
                    members[_extension(member.name)] = file.read()
    except tarfile.TarError as error:
        raise BadSample("", f"is not a part of a tar file ({error}); the shard is damaged") from None
    return members


def _extension(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2]


def _member(members: dict[str, bytes], extension: str) -> bytes:
    try:
        return members[extension]
    except KeyError:
        raise BadSample("", f"has no member .{extension} (it has: {', '.join(sorted(members)) or 'none'})") from None


def _tokens(members: dict[str, bytes], num_tokens: int, vocab_size: int) -> np.ndarray:
    """Read the token ids as a read-only (n,) array of the stored integer type."""
    tokens = _integers(members, "npy", num_tokens)
    if num_tokens and (int(tokens.max()) >= vocab_size or (tokens.dtype.kind == "i" and int(tokens.min()) < 0)):
        wrong = next(int(t) for t in tokens if not 0 <= int(t) < vocab_size)
        raise BadSample("npy", f"token id {wrong} is outside the vocabulary of {vocab_size:,}")
    return tokens


def _labels(members: dict[str, bytes], num_tokens: int, vocab_size: int) -> np.ndarray:
    """Read the labels as a read-only (n,) array of the stored integer type."""
    labels = _integers(members, LABELS, num_tokens)
    outside = labels[(labels != IGNORE) & ((labels < 0) | (labels >= vocab_size))]
    if len(outside):
        raise BadSample(LABELS, f"label {outside[0]} is outside the vocabulary of {vocab_size:,}")
    return labels


def _integers(members: dict[str, bytes], extension: str, count: int) -> np.ndarray:
    """Read ``count`` integers as a read-only array of the stored type."""
    raw = _member(members, extension)
    if (match := _NPY.match(raw)) and match.end() == int.from_bytes(raw[8:10], "little") + 10:
        dtype = np.dtype(match[1].decode())
        if len(raw) - match.end() != int(match[2]) * dtype.itemsize:
            raise BadSample(extension, "ends too early or too late; the shard is damaged")
        tokens = np.frombuffer(raw, dtype, offset=match.end())
    else:
        try:
            tokens = np.load(io.BytesIO(raw), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise BadSample(extension, f"is not a NumPy array ({error})") from None
        if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise BadSample(extension, "must hold integers in one dimension")
        tokens = tokens.astype(tokens.dtype.newbyteorder("="))
        tokens.setflags(write=False)
    if len(tokens) != count:
        raise BadSample(extension, f"has {len(tokens):,} tokens, but {count:,} in its index")
    return tokens


def _json(members: dict[str, bytes]) -> Any:
    try:
        return json.loads(_member(members, "json"))
    except ValueError as error:
        raise BadSample("json", f"is not valid JSON ({error})") from None


def _conversation(tokens: np.ndarray, values: Any, train_all: bool) -> Conversation:
    try:
        messages = values["messages"]
        spans = zip(messages, values["turns"], strict=True)
        turns = tuple(_turn(message, span, len(tokens)) for message, span in spans)
    except (KeyError, TypeError, ValueError) as error:
        raise BadSample("json", f"has no valid messages and turns ({error!r})") from None
    if not isinstance(messages, list):
        raise BadSample("json", "messages must be a list")
    return Conversation(tokens, turns, messages, train_all, str(values.get("where", "")))


def _turn(message: Any, span: Any, n: int) -> Turn:
    role = message["role"]
    start, stop = span
    if not (isinstance(role, str) and 0 <= start <= stop <= n):
        raise ValueError(f"turn {role!r} {start}:{stop} of {n} tokens")
    return Turn(role, start, stop, message.get("train", True) is not False)


def _grids(values: Any, num_tokens: int) -> GridSequence:
    try:
        context, target = tuple(_grid(grid) for grid in values["context"]), _grid(values["target"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadSample("json", f"has no valid context and target ({error!r})") from None
    found = sum(grid.shape[0] * (grid.shape[1] + 1) + 1 for grid in (*context, target))
    if found != num_tokens:
        raise BadSample("json", f"has {found:,} tokens, but {num_tokens:,} in its index")
    return GridSequence(context, target, str(values.get("where", "")))


def _grid(values: Any) -> np.ndarray:
    grid = np.array(values, dtype=np.int8)
    if grid.ndim != 2 or not grid.size or grid.min() < 0 or grid.max() >= COLOURS:
        raise ValueError(f"a grid of shape {grid.shape} is empty or has values outside 0 … {COLOURS - 1}")
    return grid
