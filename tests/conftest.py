"""Shared by all tests: few threads, examples of properties that are the same every time, GPU tests skipped where there is no
GPU, and at the end the files that took longest."""

import gc
import logging
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)
# A shell that runs us in the background has switched Ctrl-C off, for our children too, of which some are to be stopped by it.
signal.signal(signal.SIGINT, signal.default_int_handler)
if torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cuda"

hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, print_blob=True)
hypothesis.settings.load_profile("fixed")  # pytest --hypothesis-profile explore draws new examples

SLOWEST = 10
_seconds: Counter[str] = Counter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What was imported stays: a million objects, which every full garbage collection would visit."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws without a seed does not depend on those before it."""
    random.seed(0), np.random.seed(0), torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """A test that runs a command in this process configures logging; the next one finds it as it was."""
    logger = logging.getLogger("jepa_scale")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], level, logger.propagate = before
    logger.setLevel(level)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.nodeid.partition("::")[0]] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if len(_seconds) > SLOWEST:
        terminalreporter.section(f"the {SLOWEST} slowest of {len(_seconds)} files")
        for file, seconds in _seconds.most_common(SLOWEST):
            terminalreporter.write_line(f"{seconds:7.1f} s  {seconds / _seconds.total():6.1%}  {file}")
