"""Daemons of a test's own: started in the foreground, ended by their pids. And why a test cannot run here."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

SBIN = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
INSTALL = "scripts/install_integration.sh installs it"


def program(name: str) -> str:
    """Its path; daemons are often not on a user's PATH."""
    found = shutil.which(name, path=SBIN)
    assert found, name
    return found


def needs(*programs: str, root: bool = False) -> pytest.MarkDecorator:
    """Skips, with the reason, where a program is not installed or root is needed and we are not."""
    missing = [name for name in programs if shutil.which(name, path=SBIN) is None]
    reasons = [f"no {', '.join(missing)} here ({INSTALL})"] if missing else []
    if root and os.geteuid() != 0:
        reasons.append("needs root")
    return pytest.mark.skipif(bool(reasons), reason="; ".join(reasons) or "can run")


class Daemons:
    """``with Daemons(folder) as daemons: daemons.start("sshd", [...])``; the last one started ends first."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._running = folder, list[tuple[str, subprocess.Popen[bytes]]]()

    def __enter__(self) -> Daemons:
        return self

    def start(self, name: str, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        """Start it in the foreground; what it prints goes to ``<name>.log``."""
        with open(self._folder / f"{name}.log", "wb") as log:
            process = subprocess.Popen(
                [program(command[0]), *command[1:]],
                env={**os.environ, "PATH": SBIN, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running.append((name, process))

    def check(self) -> None:
        """They all run."""
        for name, process in self._running:
            assert process.poll() is None, f"{name} ended with {process.returncode}:\n{self.output([name])}"

    def output(self, names: Iterable[str] | None = None) -> str:
        names = names or [name for name, _ in self._running]
        return "\n".join(f"{n}: {(self._folder / f'{n}.log').read_text(errors='replace')[-3000:]}" for n in names)

    def __exit__(self, *error: object) -> None:
        for _, process in reversed(self._running):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
