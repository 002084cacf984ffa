"""Views and packing, in the training process or in worker processes; the result is the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from jepa_scale.data.draw import Draw, ViewMaker
from jepa_scale.data.stream import SampleStream
from jepa_scale.errors import InputError
from jepa_scale.packing import PackedBatch, pack


@dataclass(frozen=True, slots=True)
class Loader:
    """Iterates the optimizer steps ``start_step`` … ``steps`` - 1; each gives this rank's micro-batches.

    Attributes:
        examples: the training examples, picked by number.
        stream: which of them a step takes.
        view_maker: example → its segments.
        streams: names of the streams that the objective packs.
        start_step: the step to begin with; beginning anywhere gives what an uninterrupted run has there.
        steps: the step at which to stop (the run's length, not the number of steps still to go).
        seed: the run's seed, for :class:`Draw` and the batches.
        workers: processes that make micro-batches ahead of time; 0 = make them when they are asked for.
    """

    examples: Sequence[Any]
    stream: SampleStream
    view_maker: ViewMaker
    streams: Sequence[str]
    start_step: int
    steps: int
    seed: int
    workers: int = 0

    def __len__(self) -> int:
        return max(0, self.steps - self.start_step)

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        accumulation = range(self.stream.accumulation)
        if self.workers:
            ahead = self._ahead()
            for _ in range(len(self)):
                yield [next(ahead) for _ in accumulation]
        else:
            for step in range(self.start_step, self.steps):
                yield [self.micro_batch(step, micro) for micro in accumulation]

    def micro_batch(self, step: int, micro: int) -> PackedBatch:
        """Micro-batch number ``micro`` of this rank in a step."""
        epochs, samples = self.stream.micro_batch(step, micro)
        views = [
            self.view_maker(self.examples[sample], Draw(self.seed, epoch, step, sample))
            for epoch, sample in zip(epochs.tolist(), samples.tolist(), strict=True)
        ]
        return pack(views, self.streams, step=step, seed=self.seed)

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint before ``step`` keeps of the loader; :meth:`SampleStream.resume` reads it."""
        return self.stream.state(step)

    def _ahead(self) -> Iterator[PackedBatch]:
        accumulation = self.stream.accumulation
        fork = "fork" in multiprocessing.get_all_start_methods()  # examples are shared, not copied
        loader = DataLoader(
            _MicroBatches(self),
            batch_size=None,
            sampler=range(self.start_step * accumulation, self.steps * accumulation),
            num_workers=self.workers,
            collate_fn=_unchanged,
            worker_init_fn=_outlive_signals,
            multiprocessing_context="fork" if fork else None,
            generator=torch.Generator(),  # not the global one, whose state belongs to the model
        )
        for batch in loader:
            if isinstance(batch, InputError):
                raise batch
            yield batch


class _MicroBatches(TorchDataset[Any]):
    """Micro-batch number step · accumulation + j."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return self.loader.steps * self.loader.stream.accumulation

    def __getitem__(self, number: int) -> PackedBatch | InputError:
        """An InputError is handed over as a value: torch would wrap it into a traceback of many lines."""
        try:
            return self.loader.micro_batch(*divmod(number, self.loader.stream.accumulation))
        except InputError as error:
            return error


def _unchanged(batch: Any) -> Any:
    return batch


def _outlive_signals(worker: int) -> None:
    """A preemption sends SIGTERM (and Ctrl-C SIGINT) to all processes of a job, but it is the trainer who
    decides when to stop: the workers must live on until it has finished its step. Only the trainer's own
    SIGTERM ends a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS cannot tell who sent it
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        trainer = os.getppid()
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
