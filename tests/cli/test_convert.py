"""The command line: what it prints, what it refuses, and that it stops on a signal so that it can go on."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jepa_scale.cli import convert as convert_cli
from jepa_scale.cli.main import main
from jepa_scale.convert import to_hf
from jepa_scale.convert.folder import read_journal
from jepa_scale.utils.errors import InputError
from tests.convert.runs import NATIVE, make_run

REPOSITORY = Path(__file__).resolve().parents[2]


def command(*arguments: object) -> int:
    args = convert_cli.parser().parse_args([str(a) for a in arguments])
    return args.command(args)


@pytest.mark.parametrize(
    ("text", "bytes"),
    [("2GB", 2 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("64KiB", 65536), ("1000", 1000)],
)
def test_sizes(text, bytes):
    assert convert_cli.size(text) == bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2 boxes", "0", "0.1", "1TB"])
def test_what_is_no_size(text):
    with pytest.raises(InputError, match=r"--shard-size .*2GB, 500MB"):
        convert_cli.size(text)


def test_there_and_back(tmp_path, capsys):
    make_run(tmp_path, "run", NATIVE)
    assert (
        command(tmp_path / "run", "--to", "hf", "--out", tmp_path / "hf", "--shard-size", "30KB", "--no-progress") == 0
    )
    out = capsys.readouterr().out
    assert f"step_00000007 → {tmp_path / 'hf'}: LlamaForCausalLM, " in out and " bytes in 7 files, " in out
    assert (
        command(tmp_path / "run", "--to", "hf", "--out", tmp_path / "hf", "--shard-size", "30KB", "--no-progress") == 0
    )
    assert "in 7 files, 7 of them there already" in capsys.readouterr().out
    arguments = ["--from", "hf", "--config", tmp_path / "run.yaml", "run.seed=9", "--out", tmp_path / "new"]
    assert main(["convert", *map(str, [tmp_path / "hf", *arguments, "train.steps=5"])]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'hf'} → {tmp_path / 'new' / 'checkpoints' / 'step_00000000'}: JepaDecoderForCausalLM" in out
    assert f"jepa-scale train --config {tmp_path / 'new' / 'config.yaml'} --resume auto" in out
    text = (tmp_path / "new" / "config.yaml").read_text()
    assert "seed: 9" in text and "steps: 5" in text
    assert main(["convert", str(tmp_path / "new2"), "--to", "hf", "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not a run directory" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "hf", "--config", "x.yaml"], "--config and overrides belong to --from hf"),
        (["--to", "hf", "train.steps=3"], "--config and overrides belong to --from hf"),
        (["--from", "hf"], "--from hf needs --config"),
        (["--from", "hf", "--config", "x.yaml", "--heads"], "--heads: belongs to --to"),
        (["--from", "hf", "--config", "x.yaml", "--prompt", "query=x"], "--prompt: belongs to --to"),
        (["--from", "hf", "--config", "x.yaml", "--shard-size", "1GB"], "--shard-size: belongs to --to"),
    ],
)
def test_flags_of_the_other_way_are_refused(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        command(tmp_path, *arguments, "--out", tmp_path / "out")


def test_one_way_must_be_chosen(tmp_path, capsys):
    for arguments in ([], ["--to", "hf", "--from", "hf"], ["--to", "gguf"]):
        with pytest.raises(SystemExit):
            command(tmp_path, "--out", tmp_path / "out", *arguments)
    capsys.readouterr()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_it_and_the_next_start_goes_on(tmp_path, monkeypatch, capsys, number, code):
    make_run(tmp_path, "run", NATIVE)
    real, written = to_hf.write_tensors, []

    def slow(path, entries, tensors):
        if len(written) == 2:
            os.kill(os.getpid(), number)
            threading.Event().wait(5)
        written.append(path)
        return real(path, entries, tensors)

    arguments = ["convert", str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "hf"), "--shard-size", "30KB"]
    with monkeypatch.context() as patched:
        patched.setattr(to_hf, "write_tensors", slow)
        assert main(arguments) == code
    goes_on = "what is finished stays: start the same command again to go on"
    assert f"WARNING stopped by {number.name}; {goes_on}\n" in capsys.readouterr().err
    journal = read_journal(tmp_path / "hf")
    assert journal is not None and len(journal.files) == 2 and not journal.complete
    assert main(arguments) == 0
    assert "in 7 files, 2 of them there already" in capsys.readouterr().out


def test_script_converts_and_shows_its_progress(tmp_path, monkeypatch, capsys):
    make_run(tmp_path, "run", NATIVE)
    script = str(REPOSITORY / "scripts" / "convert_to_hf.py")
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path / "run"), "--out", str(tmp_path / "hf")])
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script puts itself first
    with pytest.raises(SystemExit) as left:
        runpy.run_path(script, run_name="__main__")
    assert not left.value.code
    error = capsys.readouterr().err
    assert "convert: 100%" in error and "Warning" not in error
    assert (tmp_path / "hf" / "model.safetensors").is_file()


@pytest.mark.matrix
def test_script_as_a_program_of_its_own(tmp_path):
    make_run(tmp_path, "run", NATIVE)
    script = [sys.executable, str(REPOSITORY / "scripts" / "convert_to_hf.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*script, str(tmp_path / "run"), "--out", str(tmp_path / "hf")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "convert: 100%" in done.stderr and "Warning" not in done.stderr
    assert (tmp_path / "hf" / "model.safetensors").is_file()


def test_without_room_the_message_says_what_to_do(tmp_path, monkeypatch):
    make_run(tmp_path, "run", NATIVE)

    def full(path, entries, tensors):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(to_hf, "write_tensors", full)
    with pytest.raises(InputError, match=r"model.safetensors: No space left on device; start the same command again"):
        command(tmp_path / "run", "--to", "hf", "--out", tmp_path / "hf", "--no-progress")
