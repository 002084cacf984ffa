"""Run a test function on N real gloo ranks of this machine.

Ranks are forked from a server that has imported torch, DeepSpeed and the trainer once, so that starting them costs a
fraction of a second instead of several seconds a rank.
"""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
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
    "jepa_scale.engines.deepspeed",
    "jepa_scale.engines.fsdp",
    "jepa_scale.objectives.concept",
    "jepa_scale.objectives.lm",
]
"""What ranks are forked with, here and by ``processes.Nursery``."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0) -> list[Any]:
    """Call ``fn(ranks, *args)`` on every rank of a fresh process group; returns what each rank returned, by rank.

    ``fn`` is a function at the top of a file; its arguments and results are plain values and tensors.

    Raises:
        AssertionError: a rank failed (with its traceback) or the timeout passed. The other ranks are ended first.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    path, name = Path(fn.__code__.co_filename), fn.__qualname__
    assert "<locals>" not in name, f"{name} must be at the top of its file"
    saved = {key: os.environ.get(key) for key in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)  # the server inherits them, and deepspeed reads them as it is imported
    try:
        with tempfile.TemporaryDirectory() as folder:
            pipes, processes = [], []
            for rank in range(world_size):
                mine, theirs = context.Pipe(duplex=False)
                job = (str(path), name, args, rank, world_size, f"{folder}/store", timeout)
                process = context.Process(target=_rank_main, args=(theirs, pickle.dumps(job)), daemon=True)
                process.start()
                theirs.close()
                pipes.append(mine)
                processes.append(process)
            try:
                return _collect(pipes, time.monotonic() + timeout)
            finally:
                for process in processes:
                    process.join(timeout=0.5)
                    if process.is_alive():
                        process.kill()
                        process.join()
    finally:
        for key, value in saved.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        missing = sorted(set(range(len(pipes))) - set(results))
        assert ready, f"timeout: ranks {missing} have not finished"
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                ok, value = False, "the process died without a word"
            assert ok, f"rank {rank} of {len(pipes)} failed:\n{value}"
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(pipe: Connection, job: bytes) -> None:
    path, name, args, rank, world_size, store, timeout = pickle.loads(job)
    multiprocessing.current_process()._config["daemon"] = False  # a rank may have loader workers
    gc.freeze()  # what was imported: half a million objects, which every full collection would visit and copy
    try:
        result = (True, _run(path, name, args, rank, world_size, store, timeout))
        message = pickle.dumps(result)
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(message)
    pipe.close()
    sys.stdout.flush()
    os._exit(0)  # a rank whose peers have failed would wait for them in its exit handlers


def _run(path: str, name: str, args: tuple, rank: int, world_size: int, store: str, timeout: float) -> Any:
    import torch
    import torch.distributed as dist

    from jepa_scale.distributed import Ranks

    warnings.simplefilter("ignore", FutureWarning)  # torch's and DeepSpeed's, of collectives that they call themselves
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for key, value in {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank}.items():
        os.environ[key] = str(value)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"), "torchrun")
    value = getattr(_load(path), name)(ranks, *args)
    dist.barrier()
    return value


def _load(path: str) -> Any:
    module = sys.modules.get("rank_function_file")
    if module is None:
        spec = importlib.util.spec_from_file_location("rank_function_file", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules["rank_function_file"] = module
        spec.loader.exec_module(module)
    return module
