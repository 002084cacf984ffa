"""The floors of the house: who may import whom, read off the source."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "jepa_scale"


def module_name(path: Path) -> str:
    parts = ["jepa_scale", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Our own modules that a file imports, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & SOURCES.keys()


GRAPH = {name: imports(path) for name, path in SOURCES.items()}
TOP = ("jepa_scale.cli", "jepa_scale.train", "jepa_scale.train_cli", "jepa_scale.build", "jepa_scale.experiment")


def under(name: str, *prefixes: str) -> bool:
    return any(name == f"jepa_scale.{p}" or name.startswith(f"jepa_scale.{p}.") for p in prefixes)


def test_nothing_imports_in_a_circle():
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join([*trail, name])
        if name not in done:
            for other in GRAPH[name] - {name}:
                if not name.startswith(f"{other}."):  # a package's own __init__
                    visit(other, (*trail, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


@pytest.mark.parametrize(
    ("floor", "above"),
    [
        (
            ("losses", "packing", "config", "optim", "attention"),
            ("objectives", "models", "data", "engines", "evaluate"),
        ),
        (("engines", "evaluate", "telemetry", "checkpoint"), ("objectives", "models", "data")),
        (("data", "models"), ("objectives", "engines", "evaluate", "telemetry", "checkpoint")),
        (("objectives",), ("engines", "telemetry", "checkpoint")),
    ],
)
def test_no_floor_imports_a_higher_one(floor, above):
    for name, imported in GRAPH.items():
        if under(name, *floor):
            wrong = {other for other in imported if under(other, *above) or other in TOP}
            assert not wrong, f"{name} imports {wrong}"


def test_loop_and_checkpoint_know_the_engines_protocol_alone():
    for name in ("jepa_scale.train", "jepa_scale.checkpoint", "jepa_scale.meter"):
        assert not {o for o in GRAPH[name] if under(o, "engines")} - {"jepa_scale.engines", "jepa_scale.engines.base"}
        assert not {o for o in GRAPH[name] if under(o, "objectives")} - {
            "jepa_scale.objectives",
            "jepa_scale.objectives.base",
        }


def test_no_module_shadows_a_package():
    """`deepspeed jepa_scale/train.py` puts this folder first on sys.path of the worker processes that it may start."""
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    packages = {"torch", "deepspeed", "transformers", "datasets", "tokenizers", "webdataset", "wandb", "tensorboard"}
    packages |= {"numpy", "pydantic", "yaml", "tqdm", "matplotlib", "flash_attn", "safetensors", "peft", "hjson"}
    assert not names & (packages | set(sys.stdlib_module_names))


def test_files_are_short():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 500, path
