"""Encoder of conversations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from jepa_scale.data.prepare.base import BadRecord, Record
from jepa_scale.data.prepare.encoders.base import TokenizerEncoder, file_name
from jepa_scale.data.prepare.encoders.chat import turn_spans
from jepa_scale.data.prepare.encoders.chat_tokens import Turns, TurnTokenizer, encode_plain, encode_text, token_id
from jepa_scale.data.prepare.encoders.messages import (
    Message,
    is_trained,
    normalise,
    thinks,
    unused_fields,
    with_string_arguments,
)
from jepa_scale.data.prepare.encoders.template import (
    names_read,
    render,
    special_pattern,
    takes_objects,
    template_of,
)
from jepa_scale.data.shards.format import Sample, token_dtype
from jepa_scale.utils.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TAIL = 40  # characters of a prompt shown in an error
_PROBES = (("user", "assistant") * 2, ("system", *("user", "assistant") * 2), ("user", "assistant"))


class ChatEncoder(TokenizerEncoder):
    """Encoder of conversations: ids by the tokenizer's chat template, the messages, and each message's token range.

    Conversations are not cut. ``special["end"]`` is the token that closes an answer, if there is one. A conversation becomes
    several samples, one for each of some answers, where the tokens before these answers depend on whether the conversation
    goes on.

    Args:
        plain: use no template; see :func:`~jepa_scale.data.prepare.encoders.chat_tokens.encode_plain`.
        name: name of the tokenizer, for errors.
        add_eos: close answers with EOS where the template writes no token that ends them.

    Attributes:
        closes: whether a token that ends an answer is learned.

    Raises:
        InputError: the tokenizer has no chat template, or no EOS where one is needed.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, plain: bool, remove_thinking: bool, name: str, add_eos: bool = False
    ) -> None:
        super().__init__(tokenizer)
        self._plain, self._remove_thinking = plain, remove_thinking
        if (plain or add_eos) and tokenizer.eos_token_id is None:
            key = "plain" if plain else "add_eos"
            raise InputError(
                f"data.{key}: tokenizer {name!r} has no EOS token to close an answer; use another tokenizer"
            )
        self._special = special_pattern(tokenizer)
        self._closers = special_pattern(tokenizer, added=True)
        self._marker = False
        self._appended: int | None = None
        self._adds_eos = False
        if plain:
            self._reads: frozenset[str] = frozenset()
            end: int | None = tokenizer.eos_token_id
        else:
            if not tokenizer.chat_template:
                raise InputError(
                    f"data.tokenizer: {name!r} has no chat template; use a tokenizer that has one, or set data.plain: true"
                )
            self._reads = names_read(template_of(tokenizer)) | names_read(template_of(tokenizer, {"tools": [{}]}))
            self._takes_objects = takes_objects(tokenizer)
            self._turns = TurnTokenizer(tokenizer)
            end = self._closing_token()
            if end is None and add_eos:
                self._adds_eos, self._appended, end = True, tokenizer.eos_token_id, tokenizer.eos_token_id
        self.closes = end is not None
        if end is not None:
            self.special["end"] = end

    def _closing_token(self) -> int | None:
        """Return the token that closes an answer: its own, or the one with which the next message opens."""
        for roles in _PROBES:
            messages = [{"role": role, "content": f"a{n}"} for n, role in enumerate(roles)]
            try:
                text, turns, contents = turn_spans(messages, partial(render, self.tokenizer), self._closers, "")
            except BadRecord:  # the template requires another conversation
                continue
            if self._closers is None:
                return None
            own = [m.group() for m in self._closers.finditer(text, contents[-1].stop, turns[-1].stop)]
            if own:
                return token_id(self.tokenizer, own[-1])
            first = roles.index("assistant")
            stop = turns[first].stop
            after = self._closers.match(text, stop + len(text[stop:]) - len(text[stop:].lstrip()))
            if after and first + 1 < len(roles):
                self._marker = True
                self._appended = token_id(self.tokenizer, after.group())
            return self._appended
        return None

    def __call__(self, record: Record) -> list[Sample]:
        messages = normalise(record.value["messages"], record.where, self._remove_thinking, self._reads)
        found = []
        for shown, turns in self._conversations(messages, record.value.get("template"), record.where):
            if len(turns.ids) < 2:
                raise BadRecord(record.where, "single token", "it predicts nothing")
            assert len(turns.ranges) == len(shown)
            tokens = np.array(turns.ids, dtype=token_dtype(self.vocab_size))
            spans = [list(span) for span in turns.ranges]
            values = {"messages": shown, "turns": spans, "where": file_name(record.where)}
            found.append(Sample({"npy": tokens, "json": values}, len(tokens)))
        return found

    def unused(self, record: Record) -> Iterator[str]:
        for name in record.value.get("template", ()):
            if name not in self._reads:
                yield f"column {name} (the chat template does not read it)"
        yield from unused_fields(record.value["messages"], self._reads)

    def check(self, record: Record) -> bool:
        """Compare the prompt of each sample with what the chat template and the tokenizer make of its messages.

        Returns:
            Whether an earlier answer stands after another text than its own generation prompt, because the template changes
            turns that are followed by others.

        Raises:
            BadRecord: the record cannot become a sample.
            InputError: a prompt differs. The message names the row.
        """
        if self._plain:
            return False
        messages = normalise(record.value["messages"], record.where, self._remove_thinking, self._reads)
        values = record.value.get("template")
        changed = False
        for shown, turns in self._conversations(messages, values, record.where):
            answers = [n for n, m in enumerate(shown) if is_trained(m)]
            prompts = {n: self._prompt(shown, n, values) for n in answers}
            changed |= any(ids and turns.ids[: len(ids)] != ids for n, ids in prompts.items() if n != answers[-1])
            if self._special and any(self._special.search(m["content"]) for m in shown):
                continue  # there the reference would take the names of special tokens for the tokens
            trained, used = turns.ids[: turns.ranges[answers[-1]][0]], prompts[answers[-1]]
            if used is not None and trained != used:
                decode = partial(self.tokenizer.decode, clean_up_tokenization_spaces=False)
                raise InputError(
                    f"{record.where}: the prompt that would be trained ends in {str(decode(trained))[-_TAIL:]!r} "
                    f"({len(trained)} tokens), but a model is asked with the chat template's generation prompt, which ends in "
                    f"{str(decode(used))[-_TAIL:]!r} ({len(used)} tokens); correct the template, or set data.plain: true"
                )
        return changed

    def _prompt(self, messages: list[Message], number: int, values: Mapping[str, Any] | None) -> list[int] | None:
        """Return the tokens of the rendered prompt of an answer; None if the template refuses it."""
        shown = self._shown(messages)
        try:
            text = render(self.tokenizer, shown[:number], True, thinks(messages), values)
        except Exception:  # e.g. an empty list, if the assistant's message is the first
            return None
        return encode_text(self.tokenizer, text, raw=False)

    def _shown(self, messages: list[Message]) -> list[Message]:
        """Return the messages as the template gets them."""
        return messages if self._takes_objects else with_string_arguments(messages)

    def _conversations(
        self, messages: list[Message], values: Mapping[str, Any] | None, where: str
    ) -> Iterator[tuple[list[Message], Turns]]:
        """Yield the conversation, and its beginnings whose last answers it does not train, each with its tokens."""
        if self._plain:
            yield messages, encode_plain(self.tokenizer, messages, self.bos)
            return
        turns = self._encode(messages, values, where)
        whole = _untrained(messages, turns.torn)
        if any(map(is_trained, whole)):
            yield whole, turns
        for number in turns.torn:
            beginning = _untrained(messages[: number + 1], range(number))
            yield beginning, self._encode(beginning, values, where)

    def _encode(self, messages: list[Message], values: Mapping[str, Any] | None, where: str) -> Turns:
        rendered = partial(render, self.tokenizer, thinking=thinks(messages), values=values)
        text, spans, contents = turn_spans(self._shown(messages), rendered, self._closers, where, self._marker)
        answers = [n for n, m in enumerate(messages) if is_trained(m)]
        turns = self._turns.encode_turns(text, spans, contents, answers)
        if self._adds_eos:  # a rendered conversation has none after the answers before its end
            turns = replace(turns, torn=tuple(n for n in answers if n < len(messages) - 1))
        start, stop = turns.ranges[-1]
        if (
            self._appended is None
            or messages[-1]["role"] != "assistant"
            or turns.ids[start:stop][-1:] == [self._appended]
        ):
            return turns
        ids = [*turns.ids, self._appended]
        return replace(turns, ids=ids, ranges=[*turns.ranges[:-1], (start, len(ids))])


def _untrained(messages: Sequence[Message], numbers: Sequence[int]) -> list[Message]:
    """Return messages of which those with the given numbers are not trained."""
    return [{**m, "train": False} if n in numbers and m["role"] == "assistant" else m for n, m in enumerate(messages)]
