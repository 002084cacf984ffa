"""Base classes of encoders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepa_scale.data.prepare.base import Record
from jepa_scale.data.prepare.encoders.chat_tokens import bos_prefix
from jepa_scale.data.prepare.encoders.tokenizer import special_ids, tokenizer_fingerprint, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class BaseEncoder:
    """Base class of encoders that use all that their records hold."""

    def unused(self, record: Record) -> Iterable[str]:
        return ()


class TokenizerEncoder(BaseEncoder):
    """Base class of encoders with a tokenizer.

    Attributes:
        bos: the BOS id in a list if the tokenizer begins texts with it, else an empty list.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocabulary_size(tokenizer)
        self.special: dict[str, Any] = special_ids(tokenizer)
        self.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
        self.bos = bos_prefix(tokenizer)

    def save(self, folder: Path) -> bool:
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        return True


def file_name(where: str) -> str:
    """Return a record's name without the folder, so that equal data give equal bytes in any folder."""
    return where.rpartition("/")[2]
