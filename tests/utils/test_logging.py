"""Messages go to stderr with time, level and rank; flags choose how many."""

import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from jepa_scale.cli.main import main, parsed
from jepa_scale.cli.train import parser as train_parser
from jepa_scale.utils.logging import configure, configured_level, shows_progress

REPOSITORY = Path(__file__).resolve().parents[2]
logger = logging.getLogger("jepa_scale.some.module")


def log_all() -> None:
    logger.debug("a detail")
    logger.info("a note")
    logger.warning("a warning")


@pytest.fixture
def as_rank(monkeypatch):
    """Give this process the environment of a rank; ``None`` = the only one."""

    def become(rank: int | None) -> None:
        for name, value in {"RANK": rank, "WORLD_SIZE": None if rank is None else 2}.items():
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, str(value))

    become(None)
    return become


def said(capsys) -> list[str]:
    """The lines on stderr without the time, which they begin with; nothing is on stdout."""
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    return [line[9:] for line in lines]


def test_a_line_has_time_level_and_the_rank_of_several(capsys, as_rank):
    configure()
    log_all()
    assert said(capsys) == ["INFO a note", "WARNING a warning"]
    as_rank(0)
    log_all()
    assert said(capsys) == ["INFO [rank 0] a note", "WARNING [rank 0] a warning"]


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        (logging.INFO, ["WARNING [rank 1] a warning"]),
        (logging.WARNING, ["WARNING [rank 1] a warning"]),
        (logging.DEBUG, ["DEBUG [rank 1] a detail", "INFO [rank 1] a note", "WARNING [rank 1] a warning"]),
    ],
)
def test_other_ranks_log_warnings_and_all_only_with_details(capsys, as_rank, level, shown):
    as_rank(1)
    configure(level)
    log_all()
    assert said(capsys) == shown


def test_configuring_again_repeats_nothing_and_neither_does_the_root_logger(capsys, as_rank):
    configure(logging.DEBUG)
    configure()
    root = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(root)
    try:
        log_all()
    finally:
        logging.getLogger().removeHandler(root)
    assert said(capsys) == ["INFO a note", "WARNING a warning"]


def test_with_warnings_alone_there_is_no_progress():
    assert configured_level() is None and shows_progress()
    for level, shown in ((logging.DEBUG, True), (logging.INFO, True), (logging.WARNING, False)):
        configure(level)
        assert configured_level() == level and shows_progress() is shown


COMMANDS = [
    ["eval", "run"],
    ["config", "--list"],
    ["report", "run"],
    ["data", "prepare", "raw", "--out", "out"],
    ["data", "verify", "out"],
    ["data", "sections", "raw", "--out", "x.jsonl"],
    ["data", "reversal", "--out", "out"],
    *([["checkpoint", command, "run"] for command in ("ls", "verify", "prune")]),
    ["convert", "run", "--to", "hf", "--out", "out"],
    ["encode", "run", "x.txt", "--out", "x.npy"],
    ["generate", "run", "hello"],
    ["plan", "--config", "x.yaml", "--world-size", "2"],
    ["watch", "run"],
    ["bench", "--quick"],
    ["new", "objective", "mine"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words[:2]))
def test_every_command_has_the_flags(command):
    for flags, level in (([], logging.INFO), (["-v"], logging.DEBUG), (["--quiet"], logging.WARNING)):
        assert parsed([*command, *flags]).log_level == level


def test_the_trainer_has_the_flags_and_not_both():
    words = ["--config", "x.yaml", "optim.lr=1"]
    for flags, level in (([], logging.INFO), (["--verbose"], logging.DEBUG), (["-q"], logging.WARNING)):
        assert train_parser().parse_intermixed_args([*flags, *words]).log_level == level
    with pytest.raises(SystemExit):
        train_parser().parse_intermixed_args([*words, "-q", "-v"])


def test_results_are_on_stdout_also_of_a_quiet_command(capsys):
    assert main(["config", "--list", "-q"]) == 0
    out, err = capsys.readouterr()
    assert "configs/reversal.yaml" in out and not err
    assert configured_level() == logging.WARNING


def test_a_program_that_imports_the_package_sees_warnings_alone():
    """And no torch is imported for it."""
    program = (
        "import logging, sys\nimport jepa_scale, jepa_scale.utils.logging, jepa_scale.cli.flags\n"
        "logger = logging.getLogger('jepa_scale.x')\nlogger.info('a note')\nlogger.warning('a warning')\n"
        "assert 'torch' not in sys.modules and not logging.getLogger('jepa_scale').handlers\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "a warning\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_without_room_for_a_line_the_program_goes_on(capsys, monkeypatch):
    full = open("/dev/full", "w")  # noqa: SIM115
    configure()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", full)
        logger.warning("hello")
    assert capsys.readouterr().err == ""
    with pytest.raises(OSError):  # else this test shows nothing
        full.close()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_does_not_run_into_a_progress_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    configure()
    with tqdm(total=10, file=terminal, desc="demo") as bar:
        bar.update(3)
        logger.info("a note")
        shown = terminal.getvalue()
    line = next(line for line in shown.replace("\r", "\n").split("\n") if "a note" in line)
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO a note", line)
    assert shown.rstrip().rpartition("a note")[2].strip().startswith("demo:"), "the bar is drawn again below"


def test_a_result_for_a_full_disk_is_logged_and_the_process_ends_well():
    program = "from jepa_scale.utils.logging import *; configure(); print_result('report: there'); print_result('more')"
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr
    assert "stdout: No space left on device; it would have had: report: there" in ended.stderr


def test_a_result_for_a_reader_that_is_gone_is_logged():
    program = "from jepa_scale.utils.logging import *; configure(); input(); print_result('report: there')"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    _, stderr = process.communicate("\n")
    assert process.returncode == 0 and "stdout: Broken pipe" in stderr
