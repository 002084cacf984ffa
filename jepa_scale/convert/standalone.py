"""The native decoder's code as one file that needs torch and transformers alone, made of the project's own sources."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys

from jepa_scale import __version__
from jepa_scale.models import decoder

FILE = "modeling_jepa_decoder.py"
_OWN = "jepa_scale"


def auto_map() -> dict[str, str]:
    """Which class of the file is whose, for ``trust_remote_code``."""
    stem = FILE.removesuffix(".py")
    classes = {
        "AutoConfig": decoder.JepaDecoderConfig,
        "AutoModel": decoder.JepaDecoderModel,
        "AutoModelForCausalLM": decoder.JepaDecoderForCausalLM,
    }
    return {auto: f"{stem}.{cls.__name__}" for auto, cls in classes.items()}


def modelling_source() -> dict[str, str]:
    """File name → source text.

    The decoder's module stands there as it is, except that what it takes from other modules of ours is written out before
    it, and that it does not register itself: whoever loads the file does that.
    """
    imports, body = _Module(decoder.__name__).written_out()
    text = "\n".join(
        [
            f'"""The decoder of jepa_scale {__version__} in one file; it needs torch and transformers 5.17 or later."""',
            "",
            "from __future__ import annotations",
            "",
            *_import_lines(imports),
            *("\n\n" + statement for statement in body),
            "",
        ]
    )
    compile(text, FILE, "exec")
    return {FILE: text}


class _Module:
    """A module of ours in pieces."""

    def __init__(self, name: str) -> None:
        self.source = inspect.getsource(importlib.import_module(name))
        self.statements = ast.parse(self.source).body

    def written_out(self, wanted: set[str] | None = None) -> tuple[set[tuple[str, str]], list[str]]:
        """The statements that define ``wanted`` (None = everything) and what these use, of this and of our other modules,
        each once, and what they all import from elsewhere: (module, name), the module empty in ``import name``."""
        kept, used = self._needed(wanted)
        imports: set[tuple[str, str]] = set()
        body: list[str] = []
        for node in self.statements:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            aliases = [a for a in node.names if (a.asname or a.name.partition(".")[0]) in used]
            origin = getattr(node, "module", None) or ""
            if aliases and origin.split(".")[0] == _OWN:
                further, before = _Module(origin).written_out({a.name for a in aliases})
                imports |= further
                body += before
            else:
                imports |= {(origin, ast.unparse(alias)) for alias in aliases}
        return imports, list(dict.fromkeys(body + [_text(self.source, node) for node in kept]))

    def _needed(self, wanted: set[str] | None) -> tuple[list[ast.stmt], set[str]]:
        """This module's statements for ``wanted``, and all names that occur in them."""
        # an Expr: the docstring, registering
        own = [s for s in self.statements if not isinstance(s, ast.Expr | ast.Import | ast.ImportFrom)]
        used = {node: {name.id for name in ast.walk(node) if isinstance(name, ast.Name)} for node in own}
        names = set().union(*map(_defines, own)) if wanted is None else set(wanted)
        while True:
            kept = [node for node in own if _defines(node) & names]
            more = set().union(*(used[node] for node in kept))
            if more <= names:
                return kept, more
            names |= more


def _defines(node: ast.stmt) -> set[str]:
    """Names that a statement of a module gives something to."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _import_lines(imports: set[tuple[str, str]]) -> list[str]:
    """Of the standard library first, one statement a module."""
    lines: list[str] = []
    for standard in (True, False):
        lines += [""] if lines else []
        chosen = {(m, n) for m, n in imports if ((m or n).split(".")[0] in sys.stdlib_module_names) is standard}
        lines += [f"import {name}" for module, name in sorted(chosen) if not module]
        for module in sorted({m for m, _ in chosen if m}):
            lines.append(f"from {module} import {', '.join(sorted(n for m, n in chosen if m == module))}")
    return lines


def _text(source: str, node: ast.stmt) -> str:
    """A statement as it is written, decorators and comments within it included."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno])
