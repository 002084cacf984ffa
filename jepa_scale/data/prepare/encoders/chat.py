"""Conversations: normalised messages, and the character spans of the turns in the rendered text."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jepa_scale.data.prepare.base import BadRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
_THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


def normalise(messages: Any, where: str, remove_thinking: bool = False) -> list[Message]:
    """Convert messages to ``{"role", "content"}`` with the roles user, assistant, system and tool.

    ``tool_calls``, ``tool_call_id`` and ``name`` are kept.

    Args:
        messages: in this form or ShareGPT's ``{"from", "value"}``; a content may be a list of ``{"type": "text"}`` parts.
        remove_thinking: drop ``<think>…</think>``, and the white space after it, from the assistant's messages.

    Raises:
        BadRecord: the value is not a list of messages, a role is unknown, there is no message of the assistant, or all of
            them are empty.
    """
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise BadRecord(where, "not messages", f"must be a list of role and content, got {str(messages)[:60]!r}")
    found = [_message(m, where, n) for n, m in enumerate(messages)]
    if remove_thinking:
        for message in found:
            if message["role"] == "assistant":
                message["content"] = _THINKING.sub("", message["content"])
    answers = [m for m in found if m["role"] == "assistant"]
    if not answers:
        raise BadRecord(where, "no assistant turn", "there is no answer to train on")
    if not any(m["content"].strip() or m.get("tool_calls") for m in answers):
        raise BadRecord(where, "empty answer", "every message of the assistant is empty")
    return found


def _message(raw: Message, where: str, number: int) -> Message:
    role = raw.get("role", raw.get("from"))
    if role not in ROLES:
        raise BadRecord(where, "unknown role", f"message {number} has role {role!r}; known: {', '.join(ROLES)}")
    content = raw.get("content", raw.get("value"))
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if content is None and raw.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise BadRecord(where, "message without text", f"message {number} has content {str(content)[:60]!r}")
    try:
        content.encode()
    except UnicodeEncodeError:  # "\ud800" is valid JSON, but not a character
        raise BadRecord(where, "invalid UTF-8", f"message {number} holds half of a surrogate pair") from None
    kept = {name: raw[name] for name in ("tool_calls", "tool_call_id", "name") if raw.get(name) is not None}
    return {"role": ROLES[role], "content": content, **kept}


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, stop) of a rendered conversation: a message's turn, or its content alone."""

    start: int
    stop: int


Render = Callable[..., str]


def turn_spans(
    messages: list[Message], render: Render, special: re.Pattern[str] | None, where: str
) -> tuple[str, list[Span], list[Span]]:
    """Render messages and locate the turns.

    An assistant's turn begins at the end of the generation prompt. It ends with its closing token: the last special token
    that the template writes if the conversation ends there; without one, at the end of that text. The turn of another role
    is its content.

    The template is rendered a second time with marks in place of the contents. If the text between the marks is the same in
    both, the contents' positions follow from the marks. No search for headers is needed, so a content that resembles a
    header cannot be mistaken for one. Some templates depend on the assistant's content (they remove its thinking), which
    changes the text between the marks. Then only the contents of the other roles are marked.

    Args:
        render: (messages, add_generation_prompt=False) → text; raises for messages that the template refuses.
        special: matches any special token.

    Returns:
        The text, the turn of each message, and the contents that were marked.

    Raises:
        BadRecord: the template refuses the messages, or changes contents so that the turns cannot be found.
    """
    text = _rendered(render, messages, where)
    for roles in (None, ("user", "system", "tool")):
        marked = _Marked.make(messages, render, text, roles)
        if marked is not None:
            turns = [marked.turn(n, render, special) for n in range(len(messages))]
            if None not in turns:
                return text, [t for t in turns if t is not None], marked.contents()
    detail = "the chat template changes the content of earlier turns; try data.remove_thinking, or another template"
    raise BadRecord(where, "turns not found", detail)


def _rendered(render: Render, messages: list[Message], where: str) -> str:
    try:
        return render(messages)
    except Exception as error:  # jinja2's, or from the template's own expressions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadRecord(where, "chat template refuses the messages", reason) from None


@dataclass(frozen=True, slots=True)
class _Marked:
    """A conversation rendered with marks in place of contents.

    Attributes:
        messages: the messages with marks.
        text: the text rendered from them.
        marks: number of the message → (start in ``text``, length of the mark, start in the real text, length there).
    """

    messages: list[Message]
    text: str
    marks: dict[int, tuple[int, int, int, int]]

    @classmethod
    def make(cls, messages: list[Message], render: Render, real: str, roles: tuple[str, ...] | None) -> _Marked | None:
        """Render with marks; returns None if ``real`` is not the marked text with the contents inserted."""
        marks = {
            n: f"\ue000{n}\ue001" for n, m in enumerate(messages) if m["content"] and (not roles or m["role"] in roles)
        }
        marked = [{**m, "content": marks.get(n, m["content"])} for n, m in enumerate(messages)]
        try:
            text = render(marked)
        except Exception:  # a template may depend on contents
            return None
        spans: dict[int, tuple[int, int, int, int]] = {}
        done = at = 0  # positions in the marked text and in the real one
        for n, mark in marks.items():
            start = text.find(mark, done)
            if start < 0 or text.count(mark) != 1:
                return None
            at += start - done
            if text[done:start] != real[at - (start - done) : at]:
                return None
            done = start + len(mark)
            following = [text.find(other, done) for m, other in marks.items() if m > n]
            after = text[done : min((f for f in following if f >= 0), default=len(text))]
            content = messages[n]["content"]
            forms = (content, content.strip(), content.rstrip(), content.lstrip())
            length = next((len(f) for f in forms if real.startswith(f + after, at)), None)
            if length is None:
                return None
            spans[n] = (start, len(mark), at, length)
            at += length
        return cls(marked, text, spans) if real[at:] == text[done:] else None

    def real(self, position: int) -> int:
        """Map a position of ``text`` outside the marks to the real text."""
        shift = 0
        for start, mark, _, length in self.marks.values():
            if start + mark <= position:
                shift += length - mark
        return position + shift

    def contents(self) -> list[Span]:
        return [Span(at, at + length) for _, _, at, length in self.marks.values()]

    def turn(self, number: int, render: Render, special: re.Pattern[str] | None) -> Span | None:
        """Return the turn of a message in the real text; None if it cannot be found."""
        span = self.marks.get(number)
        if self.messages[number]["role"] != "assistant":
            # an empty content has no mark: it is placed where the last content before it ends
            before = max((at + length for n, (_, _, at, length) in self.marks.items() if n < number), default=0)
            return Span(span[2], span[2] + span[3]) if span else Span(before, before)
        prompt = self._prefix(render, self.messages[:number], add_generation_prompt=True)
        if prompt is None and span is None:
            return None
        start = prompt if prompt is not None else span[0] if span else 0
        content_end = span[0] + span[1] if span else start
        whole = self._prefix(render, self.messages[: number + 1])
        if whole is not None:
            ends = [m.end() for m in special.finditer(self.text, content_end, whole)] if special else []
            stop = ends[-1] if ends else whole
        elif span is not None:
            closing = special.search(self.text, content_end) if special else None
            stop = closing.end() if closing else content_end
        else:
            return None
        return Span(self.real(start), self.real(stop))

    def _prefix(self, render: Render, messages: list[Message], **options: bool) -> int | None:
        """Return the length of the text of ``messages`` alone, if the whole text begins with it; else None."""
        try:
            text = render(messages, **options)
        except Exception:  # e.g. an empty list, if the assistant's message is the first
            return None
        return len(text) if self.text.startswith(text) else None


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Compile a pattern that matches any of the tokenizer's special tokens, the longest first; None without any."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = {str(token.content) for token in added if token.special} | set(tokenizer.all_special_tokens)
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None
