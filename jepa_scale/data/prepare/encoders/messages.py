"""Messages of conversations in the forms of OpenAI, ShareGPT, LLaMA-Factory, TRL and axolotl, brought into one form."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator
from typing import Any

from jepa_scale.data.prepare.base import BadRecord, LeftOut

Message = dict[str, Any]
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Names of a thought beside the content. transformers gives a template that reads one of them the value of any."""
TRAINED = ("train", "training", "weight")
"""Names of the flag that excludes a message from training: axolotl's two, and OpenAI's, which is 0 or 1."""
_TOOLS = ("tool_calls", "tool_call_id", "name")
_OWN = {"role", "from", "content", "value", *TRAINED}
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


def normalise(
    messages: Any, where: str, remove_thinking: bool = False, reads: Container[str] = frozenset()
) -> list[Message]:
    """Convert messages to ``{"role", "content"}`` with the roles user, assistant, system and tool.

    ``tool_calls``, ``tool_call_id`` and ``name`` are kept; arguments of calls that are JSON strings become objects. An
    answer that is not to be trained on has ``train``: False.

    Args:
        messages: in this form or ShareGPT's ``{"from", "value"}``; a content may be a list of ``{"type": "text"}`` parts.
        remove_thinking: drop ``<think>…</think>``, and the white space after it, from the assistant's messages, and thoughts
            beside the content.
        reads: names of further fields to keep: those that the chat template reads.

    Raises:
        BadRecord: the value is not a list of messages, a role is unknown, there is no message of the assistant, all of them
            are empty, or a field has a value that cannot be used.
        LeftOut: all messages of the assistant are excluded from training.
    """
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise BadRecord(where, "not messages", f"must be a list of role and content, got {str(messages)[:60]!r}")
    found = [_message(m, where, n, reads) for n, m in enumerate(messages)]
    if remove_thinking:
        for message in found:
            if message["role"] == "assistant":
                message["content"] = _THINKING.sub("", message["content"])
                for name in THOUGHTS:
                    message.pop(name, None)
    answers = [m for m in found if m["role"] == "assistant"]
    if not answers:
        raise BadRecord(where, "no assistant turn", "there is no answer to train on")
    trained = [m for m in answers if is_trained(m)]
    if not trained:
        raise LeftOut(where, "no answer to train on", "weight or train excludes every message of the assistant")
    if not any(m["content"].strip() or m.get("tool_calls") for m in trained):
        raise BadRecord(where, "empty answer", "every message of the assistant is empty")
    return found


def is_trained(message: Message) -> bool:
    """Return whether a normalised message is an answer that is trained on."""
    return message["role"] == "assistant" and message.get("train", True) is not False


def thinks(messages: list[Message]) -> bool:
    """Return whether any message of the assistant has a thought."""
    answers = [m for m in messages if m["role"] == "assistant"]
    return any("<think>" in m["content"] or any(m.get(name) for name in THOUGHTS) for m in answers)


def unused_fields(messages: list[Message], reads: Container[str]) -> Iterator[str]:
    """Yield names of fields of raw messages that hold a value and are not used.

    Args:
        reads: names that the chat template reads.
    """
    read_thoughts = [name for name in THOUGHTS if name in reads]
    for raw in messages:
        answers = ROLES.get(str(raw.get("role", raw.get("from")))) == "assistant"
        for name, value in raw.items():
            if value is None or value in ([], {}) or name in reads or (read_thoughts and name in THOUGHTS):
                continue
            if name == "function_call" and "tool_calls" not in reads:
                yield "message field function_call"
            elif name in TRAINED and value and not answers:
                yield f"message field {name} (of messages that are not the assistant's)"
            elif name != "function_call" and name not in _OWN:
                yield f"message field {name}"
        content = raw.get("content", raw.get("value"))
        for part in content if isinstance(content, list) else ():
            yield from (f"field {k} of a content's part" for k, v in part.items() if v and k not in ("type", "text"))


def _message(raw: Message, where: str, number: int, reads: Container[str]) -> Message:
    name = raw.get("role", raw.get("from"))
    if not isinstance(name, str) or name not in ROLES:
        raise BadRecord(where, "unknown role", f"message {number} has role {name!r}; known: {', '.join(ROLES)}")
    role = ROLES[name]
    thoughts = THOUGHTS if any(key in reads for key in THOUGHTS) else ()
    wanted = [key for key in raw if (key in _TOOLS or key in reads or key in thoughts) and key not in _OWN]
    kept = {key: raw[key] for key in wanted if raw[key] is not None}
    content = raw.get("content", raw.get("value"))
    if name == "function_call":  # LLaMA-Factory's form: the content is the call
        kept["tool_calls"], content = content, None
    elif raw.get("function_call"):  # OpenAI's former form
        kept["tool_calls"] = [raw["function_call"]]
        kept.pop("function_call", None)
    if kept.get("tool_calls"):
        kept["tool_calls"] = _calls(kept["tool_calls"], f"message {number}", where)
    else:
        kept.pop("tool_calls", None)
    if content is None and kept.get("tool_calls"):
        content = ""
    text = _text(content, where, number)
    if raw.get("train_detail"):
        raise BadRecord(where, "train_detail", f"message {number} is trained in parts; use train for whole messages")
    trained = _flag(raw, where, number)
    if role == "assistant" and not trained:
        kept["train"] = False
    return {"role": role, "content": text, **kept}


def _text(content: Any, where: str, number: int) -> str:
    if isinstance(content, list) and all(map(_is_text, content)):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadRecord(where, "message without text", f"message {number} has content {str(content)[:60]!r}")
    try:
        content.encode()
    except UnicodeEncodeError:  # "\ud800" is valid JSON, but not a character
        raise BadRecord(where, "invalid UTF-8", f"message {number} holds half of a surrogate pair") from None
    return content


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type") in _TEXT_PARTS


def _flag(raw: Message, where: str, number: int) -> bool:
    """Return whether the message's flags allow training on it."""
    given = {name: raw[name] for name in TRAINED if raw.get(name) is not None}
    for name, value in given.items():
        if value not in (0, 1):
            raise BadRecord(where, f"{name} is neither 0 nor 1", f"message {number} has {str(value)[:60]!r}")
    return all(given.values())


def _calls(value: Any, what: str, where: str) -> list[Message]:
    """Return tool calls as a list of ``{"type", "function": {"name", "arguments": object}}``, further keys included."""
    calls = parsed(value, f"{what}: tool_calls", where)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) for call in calls):
        raise BadRecord(where, "tool call is no object", f"{what} has {str(value)[:60]!r}")
    found = []
    for call in calls:
        nested = isinstance(call.get("function"), dict)
        function = dict(call["function"] if nested else call)
        arguments = function.get("arguments")
        if arguments is None or arguments == "":
            arguments = {}
        function["arguments"] = parsed(arguments, f"{what}: arguments of a tool call", where)
        if not isinstance(function["arguments"], dict):
            raise BadRecord(where, "arguments are no object", f"{what} has {str(arguments)[:60]!r}")
        if nested:
            found.append({**call, "function": function})
        else:
            bare = set(function) <= {"name", "arguments"}
            found.append({"type": "function", "function": function} if bare else function)
    return found


def parsed(value: Any, what: str, where: str) -> Any:
    """Return a value that may be given as a JSON string.

    Raises:
        BadRecord: it is a string that is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadRecord(where, "invalid JSON", f"{what}: {error}") from None


def with_string_arguments(messages: list[Message]) -> list[Message]:
    """Return messages whose tool calls have their arguments as JSON strings, for templates that insert them as text."""
    return [
        {**m, "tool_calls": [_stringed(c) for c in m["tool_calls"]]} if m.get("tool_calls") else m for m in messages
    ]


def _stringed(call: Message) -> Message:
    function = call["function"] if isinstance(call.get("function"), dict) else call
    texts = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return {**call, "function": texts} if function is not call else texts
