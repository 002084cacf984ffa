"""Run a test function on N real gloo ranks of this machine.

The ranks are kept alive: each is a process that is forked once, with torch, DeepSpeed and the trainer imported. It runs one
function after another, each in a new process group. A call takes milliseconds, where new processes would take seconds.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib.util
import multiprocessing
import os
import pickle
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
}
PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "peft",
    "jepa_scale.train",
    "jepa_scale.engines.deepspeed.engine",
    "jepa_scale.engines.fsdp.engine",
    "jepa_scale.objectives.concept.objective",
    "jepa_scale.objectives.lm",
]
"""Modules imported before ranks are forked, here and by ``processes.ProcessPool``."""
HANG = 1200.0
"""Seconds after which a call counts as hanging. The limit only ends hangs; no result depends on it."""


MOST_THREADS = 48
"""Threads of a rank at which another takes its place. The libraries keep some process groups for good, and each has a thread
that wakes a hundred times a second; a few hundred of them took a third of both cores."""


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = HANG, fresh: bool = False
) -> list[Any]:
    """Call ``fn(ranks, *args)`` on every rank of a new process group, and return the results by rank.

    ``fn`` is a function at the top level of a file; its arguments and results are plain values and tensors. The processes
    also run other functions, so ``fn`` must undo its changes to the process (attributes of modules, global settings).

    Args:
        fresh: fork processes for this call only, which end with it.

    Raises:
        AssertionError: a rank failed (with its traceback) or the timeout passed. The ranks are ended first, and the next
            call starts new ones.
    """
    path, name = Path(fn.__code__.co_filename), fn.__qualname__
    assert "<locals>" not in name, f"{name} must be at the top of its file"
    ranks = [_Rank() for _ in range(world_size)] if fresh else _pool(world_size)
    done = False
    try:
        with tempfile.TemporaryDirectory() as folder:
            for number, rank in enumerate(ranks):
                rank.send(pickle.dumps((str(path), name, args, number, world_size, f"{folder}/store", timeout)))
            results = _collect([rank.results for rank in ranks], time.monotonic() + timeout)
        done = True
    finally:
        if fresh or not done:
            end_ranks(ranks)
    return results


class _Rank:
    """A rank: a process that waits for functions to run."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        saved = {key: os.environ.get(key) for key in ENVIRONMENT}
        os.environ.update(ENVIRONMENT)  # the server inherits them, and deepspeed reads them as it is imported
        try:
            jobs, self._jobs = context.Pipe(duplex=False)
            self.results, results = context.Pipe(duplex=False)
            self.process = context.Process(target=_rank_main, args=(jobs, results), daemon=True)
            self.process.start()
            jobs.close()
            results.close()
        finally:
            for key, value in saved.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})

    def send(self, job: bytes) -> None:
        with suppress(BrokenPipeError):  # it is dead, which its silent pipe of results will show
            self._jobs.send_bytes(job)

    def threads(self) -> int:
        """Return the number of its threads; 0 where the system does not tell, or if it has ended."""
        try:
            return len(os.listdir(f"/proc/{self.process.pid}/task"))
        except OSError:
            return 0

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self._jobs.close()
        self.results.close()


_living: list[_Rank] = []


def _pool(world_size: int) -> list[_Rank]:
    """Return the first ranks of the pool, and fork those that are missing or worn."""
    end_ranks([rank for rank in _living if rank.threads() > MOST_THREADS])
    while len(_living) < world_size:
        _living.append(_Rank())
    return _living[:world_size]


def end_ranks(ranks: Sequence[_Rank] | None = None) -> None:
    """End these processes, or all of the pool."""
    for rank in list(_living if ranks is None else ranks):
        rank.end()
        if rank in _living:
            _living.remove(rank)


atexit.register(end_ranks)


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        missing = sorted(set(range(len(pipes))) - set(results))
        assert ready, f"timeout: ranks {missing} have not finished"
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                ok, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                ok, value = False, "the process died without a word"
            assert ok, f"rank {rank} of {len(pipes)} failed:\n{value}"
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


# -- in a rank --------------------------------------------------------------------------------------------------------


def _rank_main(jobs: Connection, results: Connection) -> None:
    faulthandler.enable()  # a crash in a library says at least what Python was doing
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it may have loader workers
    gc.freeze()  # what was imported: half a million objects, which every full collection would visit and copy
    environment, folder = dict(os.environ), os.getcwd()
    while True:
        try:
            job = pickle.loads(jobs.recv_bytes())
        except EOFError:  # the tests are over
            os._exit(0)
        try:
            message = pickle.dumps((True, _run(*job)))
        except BaseException:
            message = pickle.dumps((False, traceback.format_exc()))
        results.send_bytes(message)
        sys.stdout.flush()
        _forget(environment, folder)


def _forget(environment: dict[str, str], folder: str) -> None:
    """Reset the state that a call leaves in the process: process groups, caches of them, settings."""
    import torch
    from deepspeed.comm import comm
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    from jepa_scale.distributed.comm import teardown

    teardown()
    groups._release_process_group_references()
    comm.cdb = None
    # ZeRO-3 numbers parameters and modules as they come, and all ranks of a group must have the same numbers
    Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    torch.nn.functional.linear = torch._C._nn.linear  # ZeRO-3 leaves its own there: other sums, hooks in another order
    _clear_sharding_prop_cache()  # its entries hold meshes of groups that are no more
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.set_float32_matmul_precision("highest")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    gc.collect()


def _run(path: str, name: str, args: tuple, rank: int, world_size: int, store: str, timeout: float) -> Any:
    import numpy as np
    import torch
    import torch.distributed as dist

    from jepa_scale.distributed.comm import ParallelContext

    warnings.simplefilter("ignore", FutureWarning)  # torch's and DeepSpeed's, of collectives that they call themselves
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    for key, value in {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank}.items():
        os.environ[key] = str(value)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    ranks = ParallelContext(rank, world_size, rank, torch.device("cpu"), "torchrun")
    value = getattr(_load(path), name)(ranks, *args)
    dist.barrier()
    return value


def _load(path: str) -> Any:
    """Return a file as a module; a rank loads it once."""
    name = f"rank_functions:{path}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
