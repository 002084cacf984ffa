"""Conversations: messages of any common form made one form, and tokens with the turns found in them."""

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
    """Messages as ``{"role", "content"}`` with the roles user, assistant, system and tool; ``tool_calls``, ``tool_call_id``
    and ``name`` are kept.

    Args:
        messages: the same, or ShareGPT's ``{"from", "value"}``; a content may be a list of ``{"type": "text"}`` parts.
        remove_thinking: drop ``<think>…</think>``, and the white space after it, from what the assistant says.

    Raises:
        BadRecord: not messages, an unknown role, no turn of the assistant, or nothing said in any of them.
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
        raise BadRecord(where, "no assistant turn", "there is nothing to learn to say")
    if not any(m["content"].strip() or m.get("tool_calls") for m in answers):
        raise BadRecord(where, "empty answer", "the assistant says nothing in any turn")
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
    except UnicodeEncodeError:  # "\ud800" is valid JSON and no character
        raise BadRecord(where, "invalid UTF-8", f"message {number} holds half of a surrogate pair") from None
    kept = {name: raw[name] for name in ("tool_calls", "tool_call_id", "name") if raw.get(name) is not None}
    return {"role": ROLES[role], "content": content, **kept}


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, stop) of a rendered conversation; for a message's turn, and for its content alone."""

    start: int
    stop: int


Render = Callable[..., str]


def turn_spans(
    messages: list[Message], render: Render, special: re.Pattern[str] | None, where: str
) -> tuple[str, list[Span], list[Span]]:
    """The text that a template makes of messages, what of it each message's turn is, and each content's place.

    The assistant's turn goes from the end of the generation prompt to its closing token, the last special token that the
    template writes when the conversation ends there; without one, to all that it writes. Another role's turn is its content.

    The template is run once more with marks in the contents' places. Where what is between the marks is the same, nothing
    has to be searched for, so that a content which looks like a header cannot be mistaken for one. Templates that look
    into the assistant's words (to remove its thinking) change what is between; then the other roles' contents alone are
    marked.

    Args:
        render: (messages, add_generation_prompt=False) → text; raises for messages that the template refuses.
        special: matches any special token.

    Raises:
        BadRecord: the template refuses the messages, or changes what was said so that no turn can be told.
    """
    text = _rendered(render, messages, where)
    for roles in (None, ("user", "system", "tool")):
        marked = _Marked.make(messages, render, text, roles)
        if marked is not None:
            turns = [marked.turn(n, render, special) for n in range(len(messages))]
            if None not in turns:
                return text, [t for t in turns if t is not None], marked.contents()
    detail = "the chat template changes what earlier turns say; try data.remove_thinking, or another template"
    raise BadRecord(where, "turns not found", detail)


def _rendered(render: Render, messages: list[Message], where: str) -> str:
    try:
        return render(messages)
    except Exception as error:  # jinja2's, or whatever the template's own expressions raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadRecord(where, "chat template refuses the messages", reason) from None


@dataclass(frozen=True, slots=True)
class _Marked:
    """A conversation rendered with marks for contents.

    Attributes:
        messages: with marks.
        text: rendered from these.
        marks: number of the message → (start in ``text``, length of the mark, start in the real text, length there).
    """

    messages: list[Message]
    text: str
    marks: dict[int, tuple[int, int, int, int]]

    @classmethod
    def make(cls, messages: list[Message], render: Render, real: str, roles: tuple[str, ...] | None) -> _Marked | None:
        """None when the text is not the marked text with the contents put in."""
        marks = {
            n: f"\ue000{n}\ue001" for n, m in enumerate(messages) if m["content"] and (not roles or m["role"] in roles)
        }
        marked = [{**m, "content": marks.get(n, m["content"])} for n, m in enumerate(messages)]
        try:
            text = render(marked)
        except Exception:  # a template may look into contents
            return None
        places: dict[int, tuple[int, int, int, int]] = {}
        done = at = 0  # in the marked text, in the real one
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
            places[n] = (start, len(mark), at, length)
            at += length
        return cls(marked, text, places) if real[at:] == text[done:] else None

    def real(self, position: int) -> int:
        """Where a place outside of the marks is in the real text."""
        shift = 0
        for start, mark, _, length in self.marks.values():
            if start + mark <= position:
                shift += length - mark
        return position + shift

    def contents(self) -> list[Span]:
        return [Span(at, at + length) for _, _, at, length in self.marks.values()]

    def turn(self, number: int, render: Render, special: re.Pattern[str] | None) -> Span | None:
        """None when it cannot be told."""
        place = self.marks.get(number)
        if self.messages[number]["role"] != "assistant":
            # an empty content has no place of its own: it lies where the last one before it ends
            before = max((at + length for n, (_, _, at, length) in self.marks.items() if n < number), default=0)
            return Span(place[2], place[2] + place[3]) if place else Span(before, before)
        prompt = self._prefix(render, self.messages[:number], add_generation_prompt=True)
        if prompt is None and place is None:
            return None
        start = prompt if prompt is not None else place[0] if place else 0
        said = place[0] + place[1] if place else start
        whole = self._prefix(render, self.messages[: number + 1])
        if whole is not None:
            ends = [m.end() for m in special.finditer(self.text, said, whole)] if special else []
            stop = ends[-1] if ends else whole
        elif place is not None:
            closing = special.search(self.text, said) if special else None
            stop = closing.end() if closing else said
        else:
            return None
        return Span(self.real(start), self.real(stop))

    def _prefix(self, render: Render, messages: list[Message], **options: bool) -> int | None:
        """Length of what ``messages`` alone are rendered to, when that is how the whole text begins."""
        try:
            text = render(messages, **options)
        except Exception:  # e.g. no messages at all, before an assistant that speaks first
            return None
        return len(text) if self.text.startswith(text) else None


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Matches any of the tokenizer's special tokens, the longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = {str(token.content) for token in added if token.special} | set(tokenizer.all_special_tokens)
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None
