"""The sub-command ``jepa-scale new``: files to begin with."""

from __future__ import annotations

import argparse
import keyword
import logging
from importlib.resources import files
from pathlib import Path

from jepa_scale.cli.flags import Parser, logging_flags
from jepa_scale.utils.errors import InputError

TEMPLATES = {"objective.py.txt": "{}.py", "objective.yaml.txt": "{}.yaml", "test_objective.py.txt": "test_{}.py"}
"""Template → name of the file that is made of it."""

log = logging.getLogger(__name__)


def parser() -> Parser:
    example = "jepa-scale new objective my_objective"
    new = Parser(prog="jepa-scale new", description="Write files to begin with.", example=example)
    kinds = new.add_subparsers(required=True, metavar="objective")
    objective = kinds.add_parser(
        "objective",
        help="an objective of your own that trains already, with its config and its test",
        parents=[logging_flags()],
        example=example,
    )
    objective.add_argument("name", help="name of the module, such as my_objective; its class is then MyObjective")
    objective.add_argument("--dir", type=Path, default=Path(), help="folder to write into (default: this one)")
    objective.set_defaults(command=new_objective)
    return new


def new_objective(args: argparse.Namespace) -> int:
    name = args.name
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower() or not name.strip("_"):
        raise InputError(f"{name!r}: must be the name of a Python module in small letters, such as my_objective")
    written = {args.dir / file.format(name): text for file, text in rendered(name).items()}
    if there := [path for path in written if path.exists()]:
        raise InputError(f"{there[0]}: is there already; choose another name, or remove it")
    args.dir.mkdir(parents=True, exist_ok=True)
    for path, text in written.items():
        path.write_text(text, encoding="utf-8")
        print(path)
    config = args.dir / f"{name}.yaml"
    log.info(f"train it:  PYTHONPATH={args.dir} jepa-scale train --config {config}")
    return 0


def rendered(name: str) -> dict[str, str]:
    """Return the text of each file by the pattern of its name, for the module ``name``."""
    found = {}
    for template, file in TEMPLATES.items():
        text = files("jepa_scale.cli").joinpath("templates", template).read_text(encoding="utf-8")
        found[file] = text.replace("@name@", name).replace("@Class@", class_of(name))
    return found


def class_of(name: str) -> str:
    """Return the class's name of a module's: my_objective → MyObjective."""
    return "".join(part.capitalize() for part in name.split("_"))
