"""Tokenization of rendered conversations, with the token range of each turn."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from jepa_scale.data.prepare.encoders.chat import Message, Span

if TYPE_CHECKING:
    import re

    from transformers import PreTrainedTokenizerBase

Tokens = tuple[list[int], list[tuple[int, int]]]
"""Token ids, and the token range [start, stop) of each message's turn."""


TEMPLATE_DATE = "26 Jul 2024"
"""Fixed date for templates that would write today's date (Llama 3's), so that equal data give equal tokens on every day.
It is the default date of these templates."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    add_generation_prompt: bool = False,
    thinking: bool = False,
) -> str:
    """Render messages by the tokenizer's chat template.

    Args:
        thinking: the assistant's messages contain thinking. If False, templates that support it (Qwen 3's) put an empty
            thought into the generation prompt, where it is not part of the answer.

    Raises:
        Exception: jinja2's, or any that the template's own expressions raise.
    """
    text = tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=thinking,
        date_string=TEMPLATE_DATE,
    )
    assert isinstance(text, str)
    return text


def thinks(messages: list[Message]) -> bool:
    """Return whether any message of the assistant contains ``<think>``."""
    return any(m["role"] == "assistant" and "<think>" in m["content"] for m in messages)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, raw: bool = True) -> list[int]:
    """Tokenize a text without adding special tokens.

    Args:
        raw: treat the name of a special token within the text as text.
    """
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=raw, verbose=False)["input_ids"])


def encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    turns: list[Span],
    contents: list[Span],
    special: re.Pattern[str] | None,
) -> Tokens:
    """Tokenize a rendered conversation. Names of special tokens are special in the template, but text within contents.

    The text is tokenised as a whole, as in later use of the model; a token across a turn's border belongs to the turn. It is
    tokenised piece by piece if the tokenizer provides no offsets, or if a content holds the name of a special token.
    """
    said_special = special is not None and any(special.search(text, c.start, c.stop) for c in contents)
    if not tokenizer.is_fast or said_special:
        return _by_pieces(tokenizer, text, turns, contents)
    encoding = tokenizer(
        text, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    offsets = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    ranges = []
    for turn in turns:
        start = int(np.searchsorted(offsets[:, 1], turn.start, side="right"))
        stop = int(np.searchsorted(offsets[:, 0], turn.stop, side="left")) if turn.stop > turn.start else start
        ranges.append((start, max(start, stop)))
    return list(encoding["input_ids"]), ranges


def _by_pieces(tokenizer: PreTrainedTokenizerBase, text: str, turns: list[Span], contents: list[Span]) -> Tokens:
    borders = sorted({0, len(text)} | {at for span in (*turns, *contents) for at in (span.start, span.stop)})
    ids: list[int] = []
    before = {0: 0}  # border → number of tokens before it
    for start, stop in pairwise(borders):
        is_content = any(c.start <= start and stop <= c.stop for c in contents)
        ids += encode_text(tokenizer, text[start:stop], raw=is_content)
        before[stop] = len(ids)
    return ids, [(before[turn.start], before[turn.stop]) for turn in turns]


def encode_plain(tokenizer: PreTrainedTokenizerBase, messages: list[Message], prefix: list[int]) -> Tokens:
    """Tokenize messages without a template: contents joined by line ends, EOS after each answer of the assistant.

    The line end before an answer is tokenised separately, as it is in a prompt that ends there.
    """
    ids, turns = list(prefix), []
    for number, message in enumerate(messages):
        if number:
            ids += encode_text(tokenizer, "\n")
        start = len(ids)
        ids += encode_text(tokenizer, message["content"])
        if message["role"] == "assistant":
            assert tokenizer.eos_token_id is not None
            ids.append(tokenizer.eos_token_id)
        turns.append((start, len(ids)))
    return ids, turns


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the BOS id in a list if this tokenizer begins texts with it, else an empty list."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("a", verbose=False)["input_ids"])[:1] == [bos] else []
