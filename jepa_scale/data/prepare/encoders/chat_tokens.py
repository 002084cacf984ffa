"""Tokenization of rendered conversations, with the token range of each turn.

An answer begins at a border of tokens: the tokens before it are those of the rendered prompt alone, with which a model is
asked. A tokenizer may join characters across that border (``"\\n\\n"`` and a letter; a prompt that ends in a space). The
text is then cut there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from jepa_scale.data.prepare.encoders.chat import Span
from jepa_scale.data.prepare.encoders.messages import Message
from jepa_scale.data.prepare.encoders.template import special_pattern

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_ANCHORS = (",", ")", "a", "0", "\n")
_ALIASES = 0xF0000  # first character of a plane for private use


@dataclass(frozen=True, slots=True)
class Turns:
    """Token ids of a conversation.

    Attributes:
        ranges: token range [start, stop) of each message's turn.
        torn: earlier answers that begin within a token, because the prompt of the last answer is tokenised as a whole.
    """

    ids: list[int]
    ranges: list[tuple[int, int]]
    torn: tuple[int, ...] = ()


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, raw: bool = True) -> list[int]:
    """Tokenize a text without adding special tokens.

    Args:
        raw: treat the name of a special token within the text as text.
    """
    if not _is_backend_alone(type(tokenizer)):
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=raw, verbose=False)["input_ids"])
    backend = cast("PreTrainedTokenizerFast", tokenizer).backend_tokenizer
    if backend.truncation is not None:  # left behind by an earlier call, as are the next two
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != raw:
        backend.encode_special_tokens = raw
    return list(backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)  # fast: it computes no offsets


def _is_backend_alone(kind: type) -> bool:
    """Return whether calling a tokenizer of this class does nothing to a text but pass it to its Rust backend."""
    from transformers import PreTrainedTokenizerFast as Fast

    return issubclass(kind, Fast) and kind.__call__ is Fast.__call__ and kind._encode_plus is Fast._encode_plus


@dataclass(frozen=True, slots=True)
class _Encoded:
    """Tokens of a text.

    Attributes:
        offsets: (n, 2) characters [start, stop) of each token.
    """

    ids: list[int]
    offsets: np.ndarray

    def first_after(self, at: int) -> int:
        """Return the number of the first token that reaches beyond character ``at``."""
        return int(np.searchsorted(self.offsets[:, 1], at, side="right")) if at else 0

    def first_from(self, at: int) -> int:
        """Return the number of the first token that begins at or after character ``at``."""
        return int(np.searchsorted(self.offsets[:, 0], at, side="left"))


class TurnTokenizer:
    """Tokenizer of rendered conversations. Names of special tokens are special in the template, but text within contents."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = special_pattern(tokenizer)
        self._aliases: dict[str, str] | None = None
        self._aliased: Tokenizer | None = None
        self._begins_texts = self._after_anchor("a") != self._raw("a")

    def encode_turns(self, text: str, turns: Sequence[Span], contents: Sequence[Span], answers: Sequence[int]) -> Turns:
        """Tokenize a rendered conversation.

        The text is tokenised as a whole, as in later use of the model; a token across a turn's border belongs to the turn.
        The last answer begins at a border: before it are the tokens of the prompt alone.

        Args:
            answers: numbers of the messages that are predicted.
        """
        encoded = self._encode(text, contents, [at for turn in turns for at in (turn.start, turn.stop)])
        ranges = []
        for turn in turns:
            start = encoded.first_after(turn.start)
            stop = encoded.first_from(turn.stop) if turn.stop > turn.start else start
            ranges.append((start, max(start, stop)))
        torn: list[int] = []
        special = self._special_spans(text, contents)
        for number in answers:
            start = turns[number].start
            section = max((span.start for span in special if span.stop <= start), default=0)
            prompt = self._encode(text[section:start], _within(contents, section, start)).ids
            first = encoded.first_after(section)
            begin = first + len(prompt)
            if encoded.ids[first:begin] == prompt:
                ranges[number] = (begin, max(begin, ranges[number][1]))
            elif number == answers[-1]:
                end = next((span.start for span in special if span.start >= start), len(text))
                head = [*encoded.ids[:first], *prompt]
                return Turns(*self._cut_at(text, turns, ranges, number, end, head, encoded), tuple(torn))
            else:
                torn.append(number)
        return Turns(encoded.ids, ranges, tuple(torn))

    def _cut_at(
        self,
        text: str,
        turns: Sequence[Span],
        ranges: Sequence[tuple[int, int]],
        number: int,
        end: int,
        head: list[int],
        encoded: _Encoded,
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and ranges with a border of tokens where turn ``number`` begins.

        Args:
            end: end of the text from there to the next special token.
            head: tokens before the border.
        """
        start = turns[number].start
        answer = self._continue(text[start:end])
        rest = encoded.first_after(end) if end < len(text) else len(encoded.ids)
        shift = len(head) + len(answer) - rest

        def place(at: int, count: Callable[[int], int]) -> int:
            if at < end:
                return len(head) + len(self._continue(text[start:at]))
            return count(at) + shift if at > end else len(head) + len(answer)

        moved = [(place(t.start, encoded.first_after), place(t.stop, encoded.first_from)) for t in turns[number:]]
        return [*head, *answer, *encoded.ids[rest:]], [*ranges[:number], *moved]

    def _raw(self, text: str) -> list[int]:
        return encode_text(self._tokenizer, text)

    def _continue(self, text: str) -> list[int]:
        """Tokenize a text as it goes on after other text, without the space that some tokenizers put before a text."""
        return self._after_anchor(text) if self._begins_texts else self._raw(text)

    def _after_anchor(self, text: str) -> list[int]:
        for anchor in _ANCHORS:
            before, both = self._raw(anchor), self._raw(anchor + text)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self._raw(text)

    def _special_spans(self, text: str, contents: Sequence[Span]) -> list[Span]:
        """Return the special tokens that the template writes."""
        if self._special is None:
            return []
        edges = [0, *(at for c in contents for at in (c.start, c.stop)), len(text)]
        gaps = zip(edges[::2], edges[1::2], strict=True)
        return [Span(*m.span()) for start, stop in gaps for m in self._special.finditer(text, start, stop)]

    def _encode(self, text: str, contents: Sequence[Span], places: Sequence[int] = ()) -> _Encoded:
        said = self._special is not None and any(self._special.search(text, c.start, c.stop) for c in contents)
        if not self._tokenizer.is_fast:
            return self._by_sections(text, contents, places)
        if said:
            return self._with_aliases(text, contents) or self._by_sections(text, contents, places)
        encoding: Any = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        offsets = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        return _Encoded(list(encoding["input_ids"]), offsets)

    def _with_aliases(self, text: str, contents: Sequence[Span]) -> _Encoded | None:
        """Tokenize a text whose contents hold names of special tokens; None if it cannot be done in this way.

        The template's special tokens are replaced by characters for private use, which a copy of the tokenizer knows as
        added tokens. So all special tokens' names that are left are text, and the text is still tokenised as a whole.
        """
        if self._aliased is None or self._aliases is None:
            self._aliased, self._aliases = _with_aliases(self._tokenizer)
        if any(alias in text for alias in self._aliases.values()):
            return None
        spans = self._special_spans(text, contents)
        names = [text[s.start : s.stop] for s in spans]
        pieces, done, lengths = [], 0, []
        for span, name in zip(spans, names, strict=True):
            pieces += [text[done : span.start], self._aliases[name]]
            lengths += [*[1] * (span.start - done), len(name)]
            done = span.stop
        lengths += [1] * (len(text) - done)
        encoding = self._aliased.encode("".join([*pieces, text[done:]]), add_special_tokens=False)
        where = np.concatenate(
            [[0], np.cumsum(lengths, dtype=np.int64)]
        )  # character with aliases → character of the text
        offsets = where[np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)]
        ids = list(encoding.ids)
        for span, name in zip(spans, names, strict=True):
            ids[int(np.searchsorted(offsets[:, 1], span.start, side="right"))] = token_id(self._tokenizer, name)
        return _Encoded(ids, offsets)

    def _by_sections(self, text: str, contents: Sequence[Span], places: Sequence[int]) -> _Encoded:
        """Tokenize the special tokens and the texts between them one by one, for tokenizers without offsets.

        Args:
            places: characters before which the number of tokens is needed; it is that of the text up to there.
        """
        special = self._special_spans(text, contents)
        names = {span.start for span in special}
        borders = sorted({0, len(text)} | {at for span in special for at in (span.start, span.stop)})
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, stop in pairwise(borders):
            piece = encode_text(self._tokenizer, text[start:stop], raw=start not in names)
            inside = sorted({at for at in places if start < at < stop})
            counts = [0, *(min(len(self._raw(text[start:at])), len(piece)) for at in inside), len(piece)]
            for (first, last), span in zip(pairwise(counts), pairwise([start, *inside, stop]), strict=True):
                offsets += [span] * (last - first)
            ids += piece
        return _Encoded(ids, np.asarray(offsets, dtype=np.int64).reshape(-1, 2))


def _within(contents: Iterable[Span], start: int, stop: int) -> list[Span]:
    """Return the parts of contents in [start, stop), relative to ``start``."""
    cut = (replace(c, start=max(c.start, start), stop=min(c.stop, stop)) for c in contents)
    return [Span(c.start - start, c.stop - start) for c in cut if c.start < c.stop]


def _with_aliases(tokenizer: PreTrainedTokenizerBase) -> tuple[Tokenizer, dict[str, str]]:
    """Return a copy of a tokenizer that knows an alias of each special token, and the aliases by the tokens' names."""
    from tokenizers import AddedToken

    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    added = {str(token.content): token for token in tokenizer.added_tokens_decoder.values()}
    names = sorted({name for name, token in added.items() if token.special} | set(tokenizer.all_special_tokens))
    aliases = {name: chr(_ALIASES + n) for n, name in enumerate(names)}
    for name, alias in aliases.items():
        token = added.get(name, AddedToken(name))
        flags = {flag: getattr(token, flag) for flag in ("lstrip", "rstrip", "single_word")}
        backend.add_tokens([AddedToken(alias, special=False, normalized=False, **flags)])
    return backend, aliases


def encode_plain(tokenizer: PreTrainedTokenizerBase, messages: list[Message], prefix: list[int]) -> Turns:
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
    return Turns(ids, turns)


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Return the id of a token by its name in the vocabulary."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int), token
    return found


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the BOS id in a list if this tokenizer begins texts with it, else an empty list."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("a", verbose=False)["input_ids"])[:1] == [bos] else []
