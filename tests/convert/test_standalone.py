"""The modelling file is complete in itself and has everything of the decoder."""

from __future__ import annotations

import ast
import builtins
import inspect
import sys

from jepa_scale.convert.standalone import FILE, auto_map, modelling_source
from jepa_scale.models import bridge, decoder


def names(tree: ast.AST) -> set[str]:
    return {node.name for node in getattr(tree, "body", []) if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def test_it_needs_torch_numpy_and_transformers_alone():
    tree = ast.parse(modelling_source()[FILE])
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
    assert modules - sys.stdlib_module_names == {"torch", "numpy", "transformers"}
    assert "__future__" in modules


def test_every_name_that_it_uses_is_there():
    text = modelling_source()[FILE]
    tree = ast.parse(text)
    known = names(tree) | set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            known |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.arg):
            known.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            known.add(node.id)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert used <= known, used - known


def test_it_has_the_decoder_as_it_is():
    text = modelling_source()[FILE]
    ours = ast.parse(inspect.getsource(decoder))
    assert names(ours) <= names(ast.parse(text))
    for cls in (decoder.JepaAttention, decoder.JepaDecoderModel, decoder.JepaLMHead, bridge.Bridge):
        assert inspect.getsource(cls) in text
    assert ".register(" not in text
    for target in auto_map().values():
        stem, _, name = target.partition(".")
        assert f"{stem}.py" == FILE and hasattr(decoder, name)
    assert text == modelling_source()[FILE]
