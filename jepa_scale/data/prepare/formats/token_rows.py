"""Rows of token ids with labels of their own: ``input_ids`` with ``labels`` or ``token_labels``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jepa_scale.data.prepare.base import BadRecord, LeftOut, Record
from jepa_scale.data.prepare.formats.chat_rows import unused_columns
from jepa_scale.packing import IGNORE

IDS, SHIFTED, ALIGNED, MASK = "input_ids", "labels", "token_labels", "attention_mask"
MOST = 2**31
"""One more than the largest id of a row."""


def looks_like_tokens(value: Any) -> bool:
    """Return whether a value is a list of integers, and not empty."""
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)


def token_record(where: str, row: Mapping[str, Any]) -> Record:
    """Return the record of a row.

    The row has ``input_ids`` and one of the following, or neither, to predict every next token:

    - ``labels``, as Hugging Face's models take them: the label at i is the token at i itself where it is to be predicted (from the
      tokens before it), -100 elsewhere. The first label has nothing before it and is not used;
    - ``token_labels``: the label at i is predicted at i, from the tokens up to and including i; -100 for none.

    ``attention_mask`` may mark padding at either end with 0; it is removed.

    Returns:
        A record whose value is ``tokens`` (n,) int64 and, unless every next token is predicted, ``labels`` (n,) int64: the label
        predicted at each token, ``IGNORE`` for none. The last token of a sample is never an input. So a row with
        ``token_labels`` gets its last token once more.

    Raises:
        BadRecord: a column has a value that cannot be used.
        LeftOut: no token has a label.
    """
    tokens = _ids(where, row, IDS, 0)
    if row.get(SHIFTED) is not None and row.get(ALIGNED) is not None:
        raise BadRecord(where, f"has both {SHIFTED} and {ALIGNED}", "remove one of them")
    keep = _kept(where, row, len(tokens))
    labels = None
    for name in (SHIFTED, ALIGNED):
        if row.get(name) is not None:
            labels = _ids(where, row, name, IGNORE)
            if len(labels) != len(tokens):
                raise BadRecord(where, f"{name} and {IDS} differ in length", f"{len(labels)} and {len(tokens)}")
            labels = labels[keep]
    tokens = tokens[keep]
    value = {"tokens": tokens}
    if labels is not None:
        end = np.array([IGNORE])
        if row.get(ALIGNED) is not None:
            value["tokens"] = np.append(tokens, tokens[-1:])
        value["labels"] = np.append(labels if row.get(ALIGNED) is not None else labels[1:], end)
        if (value["labels"] == IGNORE).all():
            raise LeftOut(where, "no label", "every label is -100")
    return Record(where, value, tuple(unused_columns(row, {IDS, SHIFTED, ALIGNED, MASK})))


def _ids(where: str, row: Mapping[str, Any], name: str, least: int) -> np.ndarray:
    """Return a column's list of integers from ``least`` on, (n,) int64; negative ones other than ``IGNORE`` are refused."""
    value = row[name]
    if not looks_like_tokens(value):
        raise BadRecord(where, f"field {name!r} is no list of integers", f"it is {str(value)[:60]!r}")
    wrong = next((i for i in value if not (0 <= i < MOST or i == least)), None)
    if wrong is not None:
        raise BadRecord(where, f"field {name!r} has a number that is no id", f"{wrong}")
    return np.array(value, dtype=np.int64)


def _kept(where: str, row: Mapping[str, Any], length: int) -> slice:
    """Return the tokens that ``attention_mask`` does not mark as padding."""
    mask: Sequence[int] | None = row.get(MASK)
    if mask is None:
        return slice(0, length)
    if not looks_like_tokens(mask) or len(mask) != length or not set(mask) <= {0, 1}:
        raise BadRecord(where, f"field {MASK!r} is no list of 0 and 1, one for each token", f"it is {str(mask)[:60]!r}")
    kept = np.flatnonzero(mask)
    if not len(kept):
        raise LeftOut(where, "padding alone", f"{MASK} is 0 everywhere")
    if kept[-1] - kept[0] + 1 != len(kept):
        raise BadRecord(where, f"{MASK} masks tokens in the middle", "only padding at the ends can be removed")
    return slice(int(kept[0]), int(kept[-1]) + 1)
