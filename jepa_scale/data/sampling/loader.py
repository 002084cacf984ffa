"""Loading of micro-batches: views and packing, in the training process or in workers, with the same result."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from jepa_scale.data.base import Examples
from jepa_scale.data.sampling.batches import BatchSampler
from jepa_scale.data.sampling.rng import SampleRNG, ViewTransform, views_of
from jepa_scale.packing import PackedBatch, Views, pack
from jepa_scale.utils.errors import DataError, InputError
from jepa_scale.utils.logging import configure, configured_level

logger = logging.getLogger(__name__)

_START = "fork" if "fork" in multiprocessing.get_all_start_methods() else None  # examples are shared, not copied
JOB_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}
"""Signals that schedulers, launchers and terminals send to all processes of a job. Workers block them."""


@dataclass(frozen=True, slots=True)
class Loader:
    """An iterator over the optimizer steps ``start_step`` … ``steps`` - 1; each yields this rank's micro-batches.

    Attributes:
        examples: the training examples, picked by number.
        sampler: the samples of each micro-batch, and its token budget.
        view_transform: example → its views.
        sequences: names of the sequences that the objective packs.
        start_step: the first step; its micro-batches are those of an uninterrupted run at that step.
        steps: the step at which to stop (the run's length, not the number of steps still to go).
        seed: the run's seed, for :class:`SampleRNG` and the batches.
        workers: processes that make micro-batches ahead of time; 0 = make them on demand.
        on_error: a damaged sample stops the run, or is left out with a warning and counted (``skipped``).
    """

    examples: Examples
    sampler: BatchSampler
    view_transform: ViewTransform
    sequences: Sequence[str]
    start_step: int
    steps: int
    seed: int
    workers: int = 0
    on_error: Literal["stop", "skip"] = "stop"

    def __len__(self) -> int:
        return max(0, self.steps - self.start_step)

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        accumulation = range(self.sampler.accumulation)
        if self.workers:
            ahead = self._ahead()
            for _ in range(len(self)):
                yield [next(ahead) for _ in accumulation]
        else:
            for step in range(self.start_step, self.steps):
                yield [self.micro_batch(step, micro) for micro in accumulation]

    def micro_batch(self, step: int, micro: int) -> PackedBatch:
        """Return micro-batch number ``micro`` of this rank in a step."""
        epochs, samples = self.sampler.micro_batch(step, micro)
        examples, draws, faults = [], [], []
        for epoch, sample in zip(epochs.tolist(), samples.tolist(), strict=True):
            try:
                examples.append(self.examples[sample])
                draws.append(SampleRNG(self.seed, epoch, step, sample))
            except DataError as error:
                faults.append(error)
                self._skip(error)
        views = []
        for made, draw in zip(views_of(self.view_transform, examples, draws), draws, strict=True):
            if isinstance(made, DataError):
                faults.append(made)
                self._skip(made)
            else:
                views.append(replace(made, seed=draw.number("model")))
        batch = pack(
            views,
            self.sequences,
            step=step,
            seed=self.seed,
            max_samples=self.sampler.max_samples(step),
            like=None if views else self._any_views(step),
        )
        budget = self.sampler.budget()
        if budget and batch.num_tokens > budget and views:
            raise InputError(
                f"train.micro_tokens: a micro-batch has {batch.num_tokens} tokens of views, more than {budget}; correct the "
                "objective's sizes, which must be upper bounds of its views' tokens"
            )
        batch.counts.update(skipped=len(faults), budget=budget)
        return batch

    def _skip(self, error: DataError) -> None:
        """Skip a damaged sample with a warning, or stop."""
        if self.on_error == "stop":
            raise error
        logger.warning(f"skipped: {error}")

    def _any_views(self, step: int) -> Views:
        """Return the views of the first readable sample; they give an empty micro-batch its shapes."""
        for sample in range(len(self.examples)):
            try:
                return self.view_transform(self.examples[sample], SampleRNG(self.seed, 0, step, sample))
            except DataError:
                continue
        raise InputError("data: none of the training examples can be read")

    def _ahead(self) -> Iterator[PackedBatch]:
        accumulation = self.sampler.accumulation
        loader = DataLoader(
            _MicroBatches(self),
            batch_size=None,
            sampler=range(self.start_step * accumulation, self.steps * accumulation),
            num_workers=self.workers,
            worker_init_fn=partial(_init_worker, configured_level()),
            multiprocessing_context=_START,
            generator=torch.Generator(),  # not the global one, whose state belongs to the model
        )
        before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)  # workers inherit the mask
        try:
            arriving = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for sent in arriving:
            batch = pickle.loads(sent)
            if isinstance(batch, InputError):
                raise batch
            yield batch


def check_workers(workers: int) -> None:
    """Check that so many loader processes can be connected: their queues have semaphores, which take space in ``/dev/shm``.

    Raises:
        InputError: they cannot, as in a container without ``/dev/shm``.
    """
    if not workers:
        return
    context = multiprocessing.get_context(_START)
    try:
        _ = [*(context.Queue() for _ in range(workers + 1)), context.Event()]  # those of a DataLoader
    except OSError as error:
        raise InputError(
            f"data.workers: {workers} loader processes need room in /dev/shm ({error.strerror}); give the container more by "
            "--shm-size=64m or --ipc=host, or set data.workers=0"
        ) from None


class _MicroBatches(TorchDataset[Any]):
    """A data set of micro-batches; number step · accumulation + j is micro-batch j of a step."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getitem__(self, number: int) -> bytes:
        """Return the pickled micro-batch. An InputError is returned as a value: torch would wrap it into a long
        traceback."""
        batch: PackedBatch | InputError
        try:
            batch = self.loader.micro_batch(*divmod(number, self.loader.sampler.accumulation))
        except InputError as error:
            batch = error
        sent = io.BytesIO()
        _Pickler(sent, protocol=5).dump(batch)
        return sent.getvalue()


class _Pickler(pickle.Pickler):
    """A pickler that stores tensors as plain bytes.

    Torch would put each of the dozen small tensors of a batch into a shared memory file of its own, which takes longer
    than making the batch.
    """

    def reducer_override(self, value: Any) -> Any:
        return (_tensor, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)


def _init_worker(log_level: int | None, worker: int) -> None:
    """Set up a worker process: log as the trainer does, also if the worker is not a fork of it, and ignore signals to
    the job."""
    if log_level is not None:
        configure(log_level)
    _ignore_job_signals()


def _ignore_job_signals() -> None:
    """Ignore the signals to the job, except for a SIGTERM of the trainer's own.

    The trainer alone decides when to stop, and the workers must run until it has finished its step. They were started with
    these signals blocked.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not report the sender
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return

    def wait() -> None:
        trainer = os.getppid()
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
