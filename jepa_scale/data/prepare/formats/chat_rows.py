"""Rows of conversations: the columns of Alpaca, Dolly, ShareGPT, OpenAI, LLaMA-Factory, TRL and axolotl (``docs/data.md``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jepa_scale.data.prepare.base import BadRecord, LeftOut, Record
from jepa_scale.data.prepare.encoders.messages import ROLES, TRAINED, Message, parsed

SYSTEM = ("system", "system_prompt")
CONTEXT = "context"
LABELS = ("label", "kto_tag")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
VALUES = ("tools", "functions", "documents", "chat_template_kwargs")
_JOINED = "messages of prompt and completion"
"""Name, which no column has, of the two lists after each other."""
_OPTIONAL = (CONTEXT, "history", *VALUES, *LABELS)
_NO_VALUES = ("messages", "add_generation_prompt", "tokenize", "chat_template", "conversation", "tools", "documents")


def conversation(where: str, row: Mapping[str, Any], columns: Mapping[str, str], form: str) -> Record:
    """Return the record of a row in the form ``messages``, a list of messages, or ``pair``, a question and its answer.

    Args:
        columns: role → column, for the roles ``messages``, ``input``, ``more``, ``output``, ``system``.

    Raises:
        BadRecord: a column has a value that cannot be used.
        LeftOut: the row is labelled as an example of what not to say.
    """
    for name in LABELS:
        if row.get(name) is False:
            raise LeftOut(where, f"labelled as unwanted ({name}: false)", "there is no loss for unwanted answers")
    for name in MEDIA:
        if _filled(row.get(name)):
            raise BadRecord(where, f"field {name!r}: only text can be used", "leave the row out, or remove the column")
    names = dict(columns)
    if "system" not in names:
        names["system"] = next((name for name in SYSTEM if _filled(row.get(name))), SYSTEM[0])
    used = set(names.values())
    if form == "pair" and _talks(where, row, names):
        form, row = "messages", {**row, _JOINED: _joined(where, row, names)}
        names = {"messages": _JOINED, "system": names["system"]}
    messages = _messages(where, row, names) if form == "messages" else _pair(where, row, names)
    value: dict[str, Any] = {"messages": messages}
    if values := _values(where, row):
        value["template"] = values
    return Record(where, value, tuple(unused_columns(row, {*used, *names.values(), *_used(row, form)})))


def unused_columns(row: Mapping[str, Any], used: set[str]) -> Iterator[str]:
    """Yield names, for messages, of the columns of a row that hold a value and are not used."""
    yield from (f"column {name}" for name, value in row.items() if name not in used and _filled(value))


def _used(row: Mapping[str, Any], form: str) -> Iterator[str]:
    for name in _OPTIONAL:
        if name in LABELS:
            if isinstance(row.get(name), bool):
                yield name
        elif form == "pair" or name in VALUES:
            yield name


def _filled(value: Any) -> bool:
    return value is not None and value not in ("", [], {}) if isinstance(value, str | list | dict | None) else True


def text_fault(value: Any) -> str | None:
    """Return what is wrong with a text; None if nothing is."""
    if not isinstance(value, str):
        return "not text"
    try:
        value.encode()
    except UnicodeEncodeError:  # "\ud800" is valid JSON, but no character
        return "invalid UTF-8"
    return None


def _text(where: str, row: Mapping[str, Any], column: str) -> str:
    """Return the text of a column; empty if there is no value."""
    value = row.get(column)
    value = "" if value is None else str(value) if type(value) is int else value  # the answer to a sum
    if fault := text_fault(value):
        raise BadRecord(where, fault, f"field {column!r}")
    assert isinstance(value, str)
    return value


def _pair(where: str, row: Mapping[str, Any], names: Mapping[str, str]) -> list[Message]:
    asked = [_text(where, row, names[role]) for role in ("input", "more") if role in names]
    if CONTEXT not in names.values():
        asked.append(_text(where, row, CONTEXT))
    question = "\n\n".join(text for text in asked if text.strip())
    messages = [*_history(where, row.get("history")), {"role": "user", "content": question}]
    messages.append({"role": "assistant", "content": _text(where, row, names["output"])})
    system = _text(where, row, names["system"])
    return [{"role": "system", "content": system}, *messages] if system.strip() else messages


def _history(where: str, value: Any) -> list[Message]:
    """Return the exchanges of LLaMA-Factory's ``history``, a list of ``[question, answer]``."""
    if not _filled(value):
        return []
    pairs = isinstance(value, list) and all(isinstance(p, list) and len(p) == 2 for p in value)
    if not pairs or any(text_fault(text) for pair in value for text in pair):
        raise BadRecord(where, "field 'history' is no list of [question, answer]", f"it is {str(value)[:60]!r}")
    return [{"role": role, "content": t} for p in value for role, t in zip(("user", "assistant"), p, strict=True)]


def _talks(where: str, row: Mapping[str, Any], names: Mapping[str, str]) -> bool:
    """Return whether question and answer are lists of messages, as in TRL's conversational prompts and completions.

    Raises:
        BadRecord: one of them is such a list, and the other is not.
    """
    talk = {role: _is_talk(row[names[role]]) for role in ("input", "output")}
    if all(talk.values()) or not any(talk.values()):
        return all(talk.values())
    which, other = sorted(talk, key=lambda role: not talk[role])
    raise BadRecord(
        where,
        f"field {names[which]!r} is a list of messages and {names[other]!r} is not",
        "both must be texts, or lists of messages",
    )


def _is_talk(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _joined(where: str, row: Mapping[str, Any], names: Mapping[str, str]) -> list[Any]:
    """Return the messages of a prompt and of its completion. As in TRL, answers within the prompt are not trained on,
    unless the message itself says that it is."""
    asked = [
        {**message, "train": False}
        if _role(message) == "assistant" and all(message.get(flag) is None for flag in TRAINED)
        else message
        for message in row[names["input"]]
    ]
    if not any(_role(message) == "assistant" for message in row[names["output"]]):
        raise BadRecord(
            where, f"field {names['output']!r} has no message of the assistant", "there is no answer to train on"
        )
    return [*asked, *row[names["output"]]]


def _role(message: Mapping[str, Any]) -> str | None:
    return ROLES.get(str(message.get("role", message.get("from"))))


def _messages(where: str, row: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    messages = row[names["messages"]]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages) or not messages:
        return messages  # the encoder words the error
    roles = [m.get("role", m.get("from")) for m in messages]
    if _filled(row.get("chosen")) and _filled(row.get("rejected")) and roles[-1] in ("user", "human"):
        raise BadRecord(
            where,
            "its answers are in 'chosen' and 'rejected'",
            "there is no loss for preferences; append the chosen answer to the messages",
        )
    system = _text(where, row, names["system"])
    if not system.strip():
        return messages
    if roles[0] not in ("system", "developer"):
        return [{"role": "system", "content": system}, *messages]
    if messages[0].get("content", messages[0].get("value")) != system:
        raise BadRecord(where, "two system messages", f"one in {names['messages']!r}, another in {names['system']!r}")
    return messages


def _values(where: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row's values for the chat template: ``tools``, ``documents``, and those of ``chat_template_kwargs``."""
    values: dict[str, Any] = {}
    tools = parsed(row.get("tools") or None, "field 'tools'", where)
    functions = parsed(row.get("functions") or None, "field 'functions'", where)
    if not tools and functions:  # OpenAI's former name
        tools = functions
    if tools:
        tools = [
            parsed(tool, "a tool of field 'tools'", where) for tool in (tools if isinstance(tools, list) else [tools])
        ]
        if not all(isinstance(tool, dict) for tool in tools):
            raise BadRecord(where, "field 'tools' is no list of objects", f"it is {str(tools)[:60]!r}")
        values["tools"] = [t if "function" in t or "type" in t else {"type": "function", "function": t} for t in tools]
    documents = row.get("documents")
    if _filled(documents):
        if not isinstance(documents, list) or not all(isinstance(d, dict) for d in documents):
            raise BadRecord(where, "field 'documents' is no list of objects", f"it is {str(documents)[:60]!r}")
        values["documents"] = documents
    more = row.get("chat_template_kwargs") or {}
    if not isinstance(more, dict) or set(more) & set(_NO_VALUES):
        raise BadRecord(where, "field 'chat_template_kwargs' cannot be used", f"it is {str(more)[:60]!r}")
    return values | {name: value for name, value in more.items() if value is not None}
