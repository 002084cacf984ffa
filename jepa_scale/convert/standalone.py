"""The native decoder's code as one file, made of the project's sources. It needs only torch and transformers."""

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
    """Return the ``auto_map`` of the config, which names the file's classes for ``trust_remote_code``."""
    stem = FILE.removesuffix(".py")
    classes = {
        "AutoConfig": decoder.JepaDecoderConfig,
        "AutoModel": decoder.JepaDecoderModel,
        "AutoModelForCausalLM": decoder.JepaDecoderForCausalLM,
    }
    return {auto: f"{stem}.{cls.__name__}" for auto, cls in classes.items()}


def modelling_source() -> dict[str, str]:
    """Return the file's source text by its name.

    It is the decoder's module with two changes: definitions that it imports from the project's other modules are copied in
    front of it, and it does not register its classes, because transformers does that for remote code.
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
    """Statements of one of the project's modules."""

    def __init__(self, name: str) -> None:
        self.source = inspect.getsource(importlib.import_module(name))
        self.statements = ast.parse(self.source).body

    def written_out(self, wanted: set[str] | None = None) -> tuple[set[tuple[str, str]], list[str]]:
        """Collect definitions and their dependencies, from this module and the project's others.

        Args:
            wanted: names to define; None = all of the module's.

        Returns:
            Imports from other packages as (module, name), the module empty in ``import name``; and the source of the
            statements, each once.
        """
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
        """Return this module's statements for ``wanted``, and all names that occur in them."""
        # an Expr is the docstring, or registers a class
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
    """Return the names that a module's statement binds."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _import_lines(imports: set[tuple[str, str]]) -> list[str]:
    """Return import statements, one for each module, those of the standard library first."""
    lines: list[str] = []
    for standard in (True, False):
        lines += [""] if lines else []
        chosen = {(m, n) for m, n in imports if ((m or n).split(".")[0] in sys.stdlib_module_names) is standard}
        lines += [f"import {name}" for module, name in sorted(chosen) if not module]
        for module in sorted({m for m, _ in chosen if m}):
            lines.append(f"from {module} import {', '.join(sorted(n for m, n in chosen if m == module))}")
    return lines


def _text(source: str, node: ast.stmt) -> str:
    """Return a statement's source text, with its decorators and comments."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno])
