"""Who may import whom, read off the source: downwards only, in however many steps."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "jepa_scale"

LAYERS = (
    ("__main__",),
    ("cli", "train"),
    ("bench",),
    ("training", "inference", "plan"),
    ("convert",),
    ("experiment", "report"),
    ("evaluation",),
    ("objectives",),
    ("models", "metrics", "telemetry", "engines"),
    ("data", "losses", "optim", "checkpoint"),
    ("distributed", "config", "packing"),
    ("utils",),
)
"""Packages and modules of ``jepa_scale``, the highest first. A layer imports those below it; within one, what ``BESIDE`` says."""
BESIDE = {
    "train": {"cli"},  # the parser and a bad config's refusal
    "cli": {"train"},  # jepa-scale train is that script
}
LAYER_OF = {name: number for number, layer in enumerate(LAYERS) for name in layer}
"""``jepa_scale/__init__.py`` holds the version, which everyone may import, and loads a run when it is asked to."""
NEVER = {
    "engines": {"objectives", "models", "data", "telemetry"},
    "telemetry": {"objectives", "models", "data", "engines"},
    "checkpoint": {"objectives", "models", "data", "engines", "telemetry", "optim"},
    "optim": {"objectives", "models", "data", "engines", "checkpoint"},
    "objectives": {"engines", "telemetry", "checkpoint", "optim"},
    "losses": {"models", "data", "config", "packing"},
    "data": {"models", "losses", "engines"},
}
"""A package → what it reaches in no number of imports, though some of it lies on a lower layer."""
ENTRY, TYPES = "jepa_scale", "TYPE_CHECKING"


def module_name(path: Path) -> str:
    parts = ["jepa_scale", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Our own modules that a file imports, at its top or within a function; not those that only a type checker reads."""
    tree = ast.parse(path.read_text())
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == TYPES
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names | ({node.module} if names - SOURCES.keys() else set())
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & SOURCES.keys()


GRAPH = {name: imports(path) for name, path in SOURCES.items()}


def part(module: str) -> str:
    """The package, or the module at the top, that a module belongs to."""
    return module.split(".")[1] if module != ENTRY else ENTRY


@cache
def reached(module: str) -> frozenset[str]:
    """Everything that a module imports, and what that imports, and so on; not by way of the top of the package."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        for other in GRAPH[waiting.pop()] - found - {ENTRY}:
            found.add(other)
            waiting.append(other)
    return frozenset(found)


def test_every_part_has_its_layer():
    assert {part(module) for module in SOURCES} - {ENTRY} == LAYER_OF.keys()


def test_nothing_imports_in_a_circle():
    for module in SOURCES:
        own = {other for other in reached(module) if module in reached(other)}
        assert not own, f"{module} and {sorted(own)} import each other"


def test_imports_lead_downwards():
    wrong = [
        f"{module} imports {other}"
        for module, imported in GRAPH.items()
        for other in imported - {ENTRY}
        if module != ENTRY and part(module) != part(other) and part(other) not in BESIDE.get(part(module), ())
        if LAYER_OF[part(other)] <= LAYER_OF[part(module)]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", NEVER)
def test_what_a_package_never_reaches(name):
    for module in SOURCES:
        if part(module) == name:
            wrong = {other for other in reached(module) if part(other) in NEVER[name]}
            assert not wrong, f"{module} reaches {sorted(wrong)}"


def test_loop_and_checkpoint_know_the_engines_protocol_alone():
    """The loop names no engine and no objective: those are chosen where a run is built."""
    for module in ("jepa_scale.training.trainer", "jepa_scale.training.metrics"):
        assert {other for other in GRAPH[module] if part(other) == "engines"} <= {"jepa_scale.engines.base"}
        assert {other for other in GRAPH[module] if part(other) == "objectives"} <= {"jepa_scale.objectives.base"}


def outside(path: Path) -> set[str]:
    """The modules of other packages that a file imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module}
    return found - SOURCES.keys()


def test_deepspeed_is_imported_by_its_engine_alone():
    """Its submodules, which are no public interface, by one file of it."""
    engine = PACKAGE / "engines" / "deepspeed"
    for path in SOURCES.values():
        found = {name for name in outside(path) if name.split(".")[0] == "deepspeed"}
        allowed = found if path == engine / "internals.py" else {"deepspeed"} if path.parent == engine else set()
        assert found <= allowed, f"{path} imports {sorted(found - allowed)}"


def test_a_command_line_has_no_other_way_in():
    """Whoever imports the package imports no command."""
    users = {module for module in SOURCES if "jepa_scale.cli.main" in GRAPH[module]}
    assert users == {"jepa_scale.__main__", "jepa_scale.cli.__main__"}


def test_the_top_is_small_and_no_folder_is_full():
    files = [path for path in PACKAGE.iterdir() if path.suffix == ".py"]
    assert len(files) <= 6, sorted(path.name for path in files)
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        assert len(list(folder.glob("*.py"))) <= 17, folder


def test_files_are_short():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 500, path
