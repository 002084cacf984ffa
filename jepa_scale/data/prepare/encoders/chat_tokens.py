"""From a conversation's text and its turns' characters to token ids and their turns."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from jepa_scale.data.prepare.encoders.chat import Message, Span

if TYPE_CHECKING:
    import re

    from transformers import PreTrainedTokenizerBase

Tokens = tuple[list[int], list[tuple[int, int]]]
"""Ids, and [start, stop) of each message's turn in them."""


TEMPLATE_DATE = "26 Jul 2024"
"""What templates that write today's date (Llama 3's) write instead, so that the same data are the same tokens on every day.
It is the date that these templates fall back to themselves."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    add_generation_prompt: bool = False,
    thinking: bool = False,
) -> str:
    """What the tokenizer's chat template makes of messages.

    Args:
        thinking: the assistant thinks aloud. If not, templates that offer it (Qwen 3's) put an empty thought into the generation
            prompt, where it is no part of the answer.

    Raises:
        Exception: jinja2's, or whatever the template's own expressions raise.
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
    """Whether the assistant thinks aloud in any message."""
    return any(m["role"] == "assistant" and "<think>" in m["content"] for m in messages)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, raw: bool = True) -> list[int]:
    """Ids of a text alone, nothing added.

    Args:
        raw: a special token's name in the text is text.
    """
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=raw, verbose=False)["input_ids"])


def encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    turns: list[Span],
    contents: list[Span],
    special: re.Pattern[str] | None,
) -> Tokens:
    """Tokens of a rendered conversation. The template's special tokens are special, those that somebody has said are text.

    The text is tokenised as a whole, as it will be by whoever uses the model; a token across a turn's border belongs to the
    turn. Piece by piece instead when the tokenizer tells no offsets, or when somebody has said a special token.
    """
    said_special = special is not None and any(special.search(text, c.start, c.stop) for c in contents)
    if not tokenizer.is_fast or said_special:
        return _by_pieces(tokenizer, text, turns, contents)
    encoding = tokenizer(
        text, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    offsets = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    places = []
    for turn in turns:
        start = int(np.searchsorted(offsets[:, 1], turn.start, side="right"))
        stop = int(np.searchsorted(offsets[:, 0], turn.stop, side="left")) if turn.stop > turn.start else start
        places.append((start, max(start, stop)))
    return list(encoding["input_ids"]), places


def _by_pieces(tokenizer: PreTrainedTokenizerBase, text: str, turns: list[Span], contents: list[Span]) -> Tokens:
    borders = sorted({0, len(text)} | {at for span in (*turns, *contents) for at in (span.start, span.stop)})
    ids: list[int] = []
    before = {0: 0}  # tokens before a border
    for start, stop in pairwise(borders):
        is_content = any(c.start <= start and stop <= c.stop for c in contents)
        ids += encode_text(tokenizer, text[start:stop], raw=is_content)
        before[stop] = len(ids)
    return ids, [(before[turn.start], before[turn.stop]) for turn in turns]


def encode_plain(tokenizer: PreTrainedTokenizerBase, messages: list[Message], prefix: list[int]) -> Tokens:
    """Without a template: contents joined by line ends, EOS after each of the assistant's. The line end before an answer is
    tokenised apart from it, as a prompt that ends there is."""
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
    """The BOS id if it is this tokenizer's habit to begin a text with it."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("a", verbose=False)["input_ids"])[:1] == [bos] else []
