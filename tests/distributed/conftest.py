"""Fixtures of processes for the tests of whole runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed.processes import Launched, ProcessPool, shared_process_pool


@pytest.fixture(scope="session")
def process_pool() -> ProcessPool:
    return shared_process_pool()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """``launch(command …)`` starts a launcher; processes left at the end of the test are killed."""
    started: list[Launched] = []

    def start(*command: str) -> Launched:
        started.append(Launched(command, tmp_path / f"launched_{len(started)}.txt"))
        return started[-1]

    yield start
    for launched in started:
        launched.close()
