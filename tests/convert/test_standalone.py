"""The modelling file is complete in itself and has everything of the decoder."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import sys

import torch

from jepa_scale.convert.standalone import FILE, auto_map, modelling_source
from jepa_scale.models import decoder
from jepa_scale.models.layers import bridge, drop_path, pope, rotary


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
    parts = [decoder.JepaAttention, decoder.JepaDecoderModel, decoder.JepaLMHead, bridge.Bridge]
    parts += [pope.PolarEmbedding, pope.within_a_turn, drop_path.DropPath, drop_path.segments_kept, rotary.rotate]
    for part in parts:
        assert text.count(inspect.getsource(part)) == 1
    assert ".register(" not in text
    for target in auto_map().values():
        stem, _, name = target.partition(".")
        assert f"{stem}.py" == FILE and hasattr(decoder, name)
    assert text == modelling_source()[FILE]


def test_it_drops_the_branches_that_we_drop(tmp_path, monkeypatch):
    """Packed training with the file alone: what it needs of its neighbours, constants too, is there."""
    (tmp_path / FILE).write_text(modelling_source()[FILE])
    monkeypatch.syspath_prepend(tmp_path)
    theirs = importlib.import_module(FILE.removesuffix(".py"))
    seeds = torch.tensor([5, -7, 2**62])
    kept = [m.segments_kept(seeds, m.SegmentTable.from_lengths([1, 4, 2]), 0.7, 3) for m in (theirs, decoder)]
    assert torch.equal(*kept) and not kept[0].all()
