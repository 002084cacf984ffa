"""Conversations: the character spans of the turns in the text that a chat template renders."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from jepa_scale.data.prepare.base import BadRecord
from jepa_scale.data.prepare.encoders.messages import Message


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, stop) of a rendered conversation: a message's turn, or its content alone."""

    start: int
    stop: int


Render = Callable[..., str]


def turn_spans(
    messages: list[Message], render: Render, special: re.Pattern[str] | None, where: str, marker: bool = False
) -> tuple[str, list[Span], list[Span]]:
    """Render messages and locate the turns.

    An assistant's turn begins at the end of the generation prompt. It ends with its closing token: the last special token
    that the template writes if the conversation ends there; without one, at the end of that text. The turn of another role
    is its content.

    The template is rendered a second time with marks in place of the contents. If the text between the marks is the same in
    both, the contents' positions follow from the marks. No search for headers is needed, so a content that resembles a
    header cannot be mistaken for one. Some templates depend on the assistant's content (they remove its thinking), which
    changes the text between the marks. Then only the contents of the other roles are marked, and an answer ends where the
    text begins that separates its mark from the next one.

    Args:
        render: (messages, add_generation_prompt=False) → text; raises for messages that the template refuses.
        special: matches any token that may close a turn.
        marker: a turn without a closing token of its own is closed by the token with which the next one opens.

    Returns:
        The text, the turn of each message, and the contents that were marked.

    Raises:
        BadRecord: the template refuses the messages, or changes contents so that the turns cannot be found.
    """
    text = _rendered(render, messages, where)
    for roles in (None, ("user", "system", "tool")):
        marked = _Marked.make(messages, render, text, roles)
        if marked is not None:
            after = _text_after(messages, render) if roles else {}
            turns = [marked.turn(n, render, special, marker, after.get(n)) for n in range(len(messages))]
            found = [t for t in turns if t is not None]
            if len(found) == len(turns):
                unmarked = [n for n, m in enumerate(messages) if m["content"] and n not in marked.marks]
                said = [_said(text, messages[n]["content"], found[n]) for n in unmarked]
                return text, found, sorted([*marked.contents(), *said], key=lambda span: span.start)
    detail = "the chat template changes the content of earlier turns; try data.remove_thinking, or another template"
    raise BadRecord(where, "turns not found", detail)


def _said(text: str, content: str, turn: Span) -> Span:
    """Locate what a template keeps of an answer, the part after its thought, within the answer's turn; empty if it is
    changed."""
    kept = content.rpartition("</think>")[2].strip()
    at = text.rfind(kept, turn.start, turn.stop) if kept else -1
    return Span(at, at + len(kept)) if at >= 0 else Span(turn.start, turn.start)


@dataclass(frozen=True, slots=True)
class _After:
    """Text that a template writes after a content.

    Attributes:
        text: up to the next content, or the end.
        own: length of the part that is there if the conversation ends with this message.
    """

    text: str
    own: int


def _text_after(messages: list[Message], render: Render) -> dict[int, _After]:
    """Return the text after each content, from a rendering with marks in place of all contents."""
    marks = {n: _mark(n) for n, m in enumerate(messages) if m["content"]}
    marked = [{**m, "content": marks.get(n, "")} for n, m in enumerate(messages)]
    found = {}
    try:
        text = render(marked)
        for n, mark in marks.items():
            if text.count(mark) != 1:
                continue
            begin = text.index(mark) + len(mark)
            following = [at for other in marks.values() if (at := text.find(other, begin)) >= 0]
            alone = render(marked[: n + 1])
            own = len(alone) - begin if text.startswith(alone) else 0
            found[n] = _After(text[begin : min(following, default=len(text))], max(own, 0))
    except Exception:  # a template may depend on contents
        return {}
    return found


def _mark(number: int) -> str:
    return f"\ue000{number}\ue001"


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
        marks = {n: _mark(n) for n, m in enumerate(messages) if m["content"] and (not roles or m["role"] in roles)}
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

    def turn(
        self, number: int, render: Render, special: re.Pattern[str] | None, marker: bool, after: _After | None
    ) -> Span | None:
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
        stop = self._prefix(render, self.messages[: number + 1])
        if span is None and after is not None:
            content_end = max(self._before_next(number) - len(after.text), start)
            if not self.text.startswith(after.text, content_end):
                return None
            stop = content_end + after.own if stop is None and after.own else stop
        if stop is not None:
            stop = self._closed(content_end, stop, special, marker)
        elif span is not None or after is not None:
            closing = special.search(self.text, content_end, self._before_next(number)) if special else None
            stop = closing.end() if closing else content_end
        else:
            return None
        return Span(self.real(start), self.real(stop))

    def _closed(self, content_end: int, stop: int, special: re.Pattern[str] | None, marker: bool) -> int:
        """Return the end of the closing token of a turn whose own text is [content_end, stop)."""
        if special is None:
            return stop
        ends = [m.end() for m in special.finditer(self.text, content_end, stop)]
        if ends or not marker:
            return ends[-1] if ends else stop
        white = re.compile(r"\s*").match(self.text, stop)
        opening = special.match(self.text, white.end() if white else stop)
        return opening.end() if opening else stop

    def _before_next(self, number: int) -> int:
        """Return where the next mark after a message begins; the end of the text if there is none."""
        return min((start for n, (start, *_) in self.marks.items() if n > number), default=len(self.text))

    def _prefix(self, render: Render, messages: list[Message], **options: bool) -> int | None:
        """Return the length of the text of ``messages`` alone, if the whole text begins with it; else None."""
        try:
            text = render(messages, **options)
        except Exception:  # e.g. an empty list, if the assistant's message is the first
            return None
        return len(text) if self.text.startswith(text) else None
