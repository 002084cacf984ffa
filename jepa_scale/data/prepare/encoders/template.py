"""Chat templates: rendering, the fields that a template reads, and the token with which it closes an answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from jepa_scale.data.prepare.encoders.messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_DATE = "26 Jul 2024"
"""Fixed date for templates that would write today's date (Llama 3's), so that equal data give equal tokens on every day.
It is the default date of these templates."""
_DATE = date(2024, 7, 26)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    add_generation_prompt: bool = False,
    thinking: bool = False,
    values: Mapping[str, Any] | None = None,
) -> str:
    """Render messages by the tokenizer's chat template.

    Args:
        thinking: the assistant's messages contain thinking. If False, templates that support it (Qwen 3's) put an empty
            thought into the generation prompt, where it is not part of the answer.
        values: further values for the template, such as ``tools``.

    Raises:
        Exception: jinja2's, or any that the template's own expressions raise.
    """
    values = values or {}
    text = tokenizer.apply_chat_template(
        messages,
        chat_template=_dated(template_of(tokenizer, values)),
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        **{"enable_thinking": thinking, "date_string": TEMPLATE_DATE, **values},
    )
    assert isinstance(text, str)
    return text


def template_of(tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any] | None = None) -> str:
    """Return the text of the tokenizer's template, of several the one that applies to ``values``."""
    return str(tokenizer.get_chat_template(None, (values or {}).get("tools")))


@lru_cache
def _dated(template: str) -> str:
    """Return the template with its own ``strftime_now``, which knows a fixed date.

    The function of that name is no value that can be passed: transformers passes plain values alone.
    """
    if "strftime_now" not in template:
        return template
    calls = [c for c in _parsed(template).find_all(jinja2.nodes.Call) if _is_named(c.node, "strftime_now")]
    formats = {c.args[0].value for c in calls if c.args and isinstance(c.args[0], jinja2.nodes.Const)}
    dates = {format_: _DATE.strftime(format_) for format_ in sorted(formats) if isinstance(format_, str)}
    # the line end is removed after a block, and the template's own first line begins a line as before
    return f"{{% macro strftime_now(format) %}}{{{{ {dates!r}.get(format, {TEMPLATE_DATE!r}) }}}}{{% endmacro %}}\n{template}"


def _is_named(node: Any, name: str) -> bool:
    return getattr(node, "name", None) == name


@lru_cache
def names_read(template: str) -> frozenset[str]:
    """Return all names that a template may read of a message or of its values: variables, attributes, and strings."""
    tree = _parsed(template)
    attributes = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    strings = {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    return frozenset(attributes | strings | {node.name for node in tree.find_all(jinja2.nodes.Name)})


def _parsed(template: str) -> jinja2.nodes.Template:
    return jinja2.Environment(extensions=[jinja2.ext.loopcontrols, _Generation]).parse(template)


class _Generation(jinja2.ext.Extension):
    """Parser of transformers' block ``generation``, which marks an answer."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def special_pattern(tokenizer: PreTrainedTokenizerBase, added: bool = False) -> re.Pattern[str] | None:
    """Compile a pattern that matches any of the tokenizer's special tokens, the longest first; None without any.

    Args:
        added: match added tokens that are not special, too, but for white space.
    """
    found = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = {str(t.content) for t in found if t.special or (added and t.content.strip())}
    tokens |= set(tokenizer.all_special_tokens)
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None


def takes_objects(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the template takes a tool call's arguments as an object; else it inserts them as a string.

    Templates that insert a string either fail on an object or show it in Python's notation.
    """
    shown = {}
    for name, arguments in (("object", {"a": "b"}), ("string", '{"a": "b"}')):
        call = {"type": "function", "id": "call00000", "function": {"name": "f", "arguments": arguments}}
        asked: list[dict[str, Any]] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        try:
            shown[name] = "".join(render(tokenizer, asked).split())
        except Exception:  # jinja2's, or from the template's own expressions
            continue
    bad = "object" not in shown or "{'a':'b'}" in shown["object"]
    return not (bad and '{"a":"b"}' in shown.get("string", ""))
