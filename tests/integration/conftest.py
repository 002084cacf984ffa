"""Launchers on real daemons and networks, all of the test's own. ``scripts/install_integration.sh`` installs what they need."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed.conftest import process_pool  # noqa: F401  (the undisturbed runs to compare with)
from tests.distributed.processes import Launched


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """``launch(command …, environment=, mark=)`` starts a launcher; what is left of it at the end of the test is killed."""
    started: list[Launched] = []

    def start(*command: str, **options) -> Launched:
        started.append(Launched(command, tmp_path / f"launched_{len(started)}.txt", **options))
        return started[-1]

    yield start
    for launched in started:
        launched.close()


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    """A folder whose path leaves room for sockets in it (107 characters in all)."""
    folder = Path(tempfile.mkdtemp(prefix="jepa_", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
