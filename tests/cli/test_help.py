"""``--help`` of every command and every script: exit code 0, what it is for, and an example that is a command of it."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jepa_scale.cli import main as cli
from jepa_scale.cli import train

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCED = {"environment.sh", "help.sh", "launch_common.sh"}
SCRIPTS = sorted(
    path.relative_to(REPOSITORY)
    for path in (REPOSITORY / "scripts").rglob("*")
    if path.suffix in (".sh", ".sbatch", ".py") and path.name not in SOURCED | {"commands.py"}
)


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Every command and sub-command, as it is typed → its parser."""
    found = {"jepa-scale": cli.parser(), "jepa-scale train": train.parser()}
    found |= {
        f"jepa-scale {name}": importlib.import_module(module).parser() for name, (module, _) in cli.PARSERS.items()
    }
    for name, parser in list(found.items()):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found = {f"{name} {sub}": below for sub, below in action.choices.items()} | found
    return found


PARSERS = parsers()


@pytest.mark.parametrize("name", sorted(PARSERS))
def test_a_command_has_an_example_that_it_understands(name):
    shown = PARSERS[name].format_help()
    (line,) = [line.strip() for line in shown.partition("example:\n")[2].splitlines()]
    words = shlex.split(line)
    assert words[: len(name.split())] == name.split()
    longest = max((other for other in PARSERS if words[: len(other.split())] == other.split()), key=len)
    parser = PARSERS[longest]
    parse = parser.parse_intermixed_args if longest == "jepa-scale train" else parser.parse_args
    assert parse(words[len(longest.split()) :])


def test_the_first_help_names_every_command():
    shown = PARSERS["jepa-scale"].format_help()
    for name in cli.PARSERS:
        assert f"    {name} " in shown


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_script_says_what_it_is_for_and_how_it_is_started(script, tmp_path):
    """From another folder, and without an installation: nothing is started, and nothing is made."""
    runner = [sys.executable] if script.suffix == ".py" else ["bash"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHON": "/bin/false"}  # else it could install
    environment.pop("SLURM_SUBMIT_DIR", None)
    done = subprocess.run(
        [*runner, str(REPOSITORY / script), "--help"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr and not list(tmp_path.iterdir())
    started = {"convert_to_hf.py": "jepa-scale convert", "monitor.py": "jepa-scale watch"}
    started["prepare_data.py"] = "jepa-scale data prepare"
    assert f"  {started.get(script.name, '')}" in done.stdout
    if script.name not in started:
        assert any(str(script) in line and line.startswith("  ") for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim.lr=1e-4"], "--optim.lr=1e-4: unknown flag; keys of the config have no dashes; write optim.lr=1e-4"),
        (["--optim.lr", "1e-4"], "--optim.lr: unknown flag; keys of the config have no dashes; write optim.lr=VALUE"),
        (["--learning_rate", "1e-4"], "--learning_rate: unknown flag; TRL's learning_rate is optim.lr here"),
        (["--learning-rate=1e-4"], "--learning-rate=1e-4: unknown flag; TRL's learning_rate is optim.lr here"),
        (["--tap_layer=2"], "--tap_layer=2: unknown flag; it is objective.tap_layer (docs/migration"),
        (["--steps=2"], "--steps=2: unknown flag; it is train.steps"),
        (["--no-such-thing"], "error: unrecognized arguments: --no-such-thing"),
    ],
)
@pytest.mark.parametrize(
    "command", [["train", "--config", "configs/reversal.yaml"], ["config", "configs/reversal.yaml"]]
)
def test_a_flag_that_is_a_key_is_refused_with_the_key(command, words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
