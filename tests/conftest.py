"""Shared by all tests: few threads, GPU tests skipped where there is no GPU."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch

torch.set_num_threads(1)
# A shell that runs us in the background has switched Ctrl-C off, for our children too, of which some are to be stopped by it.
signal.signal(signal.SIGINT, signal.default_int_handler)
if torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cuda"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
