"""Batch samplers: the samples of an optimizer step, as pure functions of the seed and of the run's position.

There are two ways to cut the endless sequence of samples (:mod:`jepa_scale.data.sampling.order`) into micro-batches: a
fixed number of samples (:class:`SampleBatchSampler`), or as many as fit a budget of tokens (:class:`TokenBatchSampler`). In both,
micro-batch j of rank r is slice j·world + r of the step. So the number of ranks decides which rank computes a sample,
but not which samples a step has.

Segments that run in padded rows take as much as the longest of their micro-batch. For these both samplers can put samples of near
sizes together: the first within a step, the second within a window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jepa_scale.data.sampling.order import Order
from jepa_scale.data.sampling.packing_bins import bins_of_near_sizes, first_fit_decreasing
from jepa_scale.data.sampling.rng import generator
from jepa_scale.utils.errors import InputError

WINDOW_BINS = 256
"""Size of a packing window, in micro-batches. Only the last bin of a window stays partly empty, so at most 1/256 of the
budget is lost, and half of that on average."""


@dataclass(frozen=True, slots=True)
class DataParallelSlice:
    """The split of a step over ranks: micro-batches per rank (``accumulation``), this rank, and the number of ranks."""

    accumulation: int = 1
    rank: int = 0
    world_size: int = 1

    @property
    def parts(self) -> int:
        """Micro-batches in a step, over all ranks."""
        return self.accumulation * self.world_size

    def part(self, micro: int) -> int:
        return micro * self.world_size + self.rank


ALONE = DataParallelSlice()


class BatchSampler(ABC):
    """Base of both batch samplers, as the loader and the checkpoint use them."""

    kind: str

    def __init__(self, order: Order, seed: int, dp_slice: DataParallelSlice, fingerprint: str, epochs: int) -> None:
        assert 0 <= dp_slice.rank < dp_slice.world_size, dp_slice
        if order.length == 0:
            raise InputError("data: holds no examples to train on")
        if epochs and order.length is None:
            raise InputError("train.epochs: a mixture has no epochs; give train.steps instead")
        self.order, self.seed, self.dp_slice, self.fingerprint = order, seed, dp_slice, fingerprint
        self.end = epochs * order.length if epochs and order.length else None
        self.first_step = 0

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank in a step."""
        return self.dp_slice.accumulation

    @property
    @abstractmethod
    def steps(self) -> int | None:
        """Optimizer steps until the data end; None = the data never end."""

    @abstractmethod
    def micro_batch(self, step: int, micro: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (m,) int64 epochs and (m,) int64 sample numbers of this rank's micro-batch; m = 0 after the data end."""

    @abstractmethod
    def max_samples(self, step: int) -> int:
        """Return the samples in the largest micro-batch of the step on any rank; at least 1."""

    @abstractmethod
    def budget(self) -> int:
        """Return the largest number of tokens in a micro-batch; 0 = no limit."""

    @abstractmethod
    def state(self, step: int) -> dict[str, Any]:
        """Return the sampler's state before ``step``, for a checkpoint; it is the same on every rank."""

    @abstractmethod
    def resume(self, state: dict[str, Any], accept_changes: bool = False) -> int:
        """Restore a :meth:`state`, also one of another world size or accumulation; returns the step to continue with.

        Raises:
            InputError: the state belongs to other data, another seed or another kind of batches.
        """

    def _header(self, step: int) -> dict[str, Any]:
        return {"step": step, "batching": self.kind, "seed": self.seed, "fingerprint": self.fingerprint}

    def _check(self, state: dict[str, Any], accept_changes: bool) -> None:
        if state["batching"] != self.kind:
            raise InputError(
                f"train: the checkpoint's batches are counted in {state['batching']}, this run's in {self.kind}; "
                "resume with the same one of train.batch_size and train.batch_tokens"
            )
        if state["fingerprint"] != self.fingerprint and not accept_changes:
            raise InputError(
                "data: is not what the checkpoint was trained on (its fingerprint differs); use the same data, or "
                "set data.accept_changes=true to continue at the same position in the new data"
            )
        if state["seed"] != self.seed:
            raise InputError(f"run.seed: {self.seed} is not the checkpoint's; set it to {state['seed']}")


class SampleBatchSampler(BatchSampler):
    """Batch sampler with a fixed number of samples per step.

    Step s takes the positions [s·B, (s+1)·B). A step may contain the end of one epoch and the start of the next.

    Args:
        order: position → sample.
        seed: the run's seed.
        batch_size: B, samples in an optimizer step over all ranks and micro-batches.
        dp_slice: the split of a step over ranks.
        fingerprint: fingerprint of the data; a saved position is only valid for the same data.
        epochs: number of epochs after which the data end; 0 = never. The last step may be smaller.
        near: (m,) sample numbers → (m,) sizes: the samples of a step are sorted by them before they are cut into micro-batches;
            ``None`` = they stay in their order.

    Raises:
        InputError: there are no examples, the order has no epochs though ``epochs`` is set, or the batch cannot be split
            evenly.
    """

    kind = "samples"

    def __init__(
        self,
        order: Order,
        seed: int,
        batch_size: int,
        dp_slice: DataParallelSlice = ALONE,
        fingerprint: str = "",
        epochs: int = 0,
        near: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        super().__init__(order, seed, dp_slice, fingerprint, epochs)
        if batch_size < 1 or batch_size % dp_slice.parts:
            raise InputError(
                f"train.batch_size: {batch_size} samples cannot be split evenly over "
                f"train.accumulation={dp_slice.accumulation} micro-batches on each of {dp_slice.world_size} ranks; "
                f"make it a multiple of {dp_slice.parts}"
            )
        self.batch_size, self.near = batch_size, near
        self.first_position = 0

    @property
    def steps(self) -> int | None:
        if self.end is None:
            return None
        return self.first_step + -(-max(0, self.end - self.first_position) // self.batch_size)

    def _position(self, step: int) -> int:
        return self.first_position + (step - self.first_step) * self.batch_size

    def micro_batch(self, step: int, micro: int) -> tuple[np.ndarray, np.ndarray]:
        m = self.batch_size // self.dp_slice.parts
        before, position = self.dp_slice.part(micro) * m, self._position(step)
        start, count = (position + before, m) if self.near is None else (position, self.batch_size)
        if self.end is not None:
            count = max(0, min(count, self.end - start))
        epochs, samples = self.order.take(start, count)
        if self.near is None:
            return epochs, samples
        mine = np.argsort(self.near(samples), kind="stable")[before : before + m]
        return epochs[mine], samples[mine]

    def max_samples(self, step: int) -> int:
        return self.batch_size // self.dp_slice.parts

    def budget(self) -> int:
        return 0

    def state(self, step: int) -> dict[str, Any]:
        position = self._position(step)
        return {**self._header(step), "position": position if self.end is None else min(position, self.end)}

    def resume(self, state: dict[str, Any], accept_changes: bool = False) -> int:
        self._check(state, accept_changes)
        self.first_step, self.first_position = int(state["step"]), int(state["position"])
        return self.first_step


class TokenBatchSampler(BatchSampler):
    """Batch sampler with a token budget per micro-batch.

    Windows of the order are packed into bins by first-fit decreasing, and the bins of a window are shuffled. Each step
    takes the next accumulation · world bins.

    The samples of a bin depend on the data, the seed and the budget alone. If the product of accumulation and world size
    stays the same, another world size gives the same steps.

    A state is the position where the current window begins, and the number of its bins that are done. If the budget or ``near`` has
    changed at :meth:`resume`, that window is packed again as before, and its remaining samples become the first
    window. If the data have changed, which are accepted only on request, as many samples are passed over as were done.

    Args:
        order: position → sample.
        seed: the run's seed.
        sizes: (m,) sample numbers → (m,) largest number of tokens of each sample's views, as the objective makes them.
        budget: tokens in a micro-batch of a rank.
        mean_size: mean tokens of a sample; it sets the number of samples in a window (``WINDOW_BINS`` bins on average).
        dp_slice, fingerprint, epochs: as for :class:`SampleBatchSampler`.
        near: put samples of near sizes together, and count each as large as the largest of its micro-batch.
    """

    kind = "tokens"

    def __init__(
        self,
        order: Order,
        seed: int,
        sizes: Callable[[np.ndarray], np.ndarray],
        budget: int,
        mean_size: float,
        dp_slice: DataParallelSlice = ALONE,
        fingerprint: str = "",
        epochs: int = 0,
        near: bool = False,
    ) -> None:
        super().__init__(order, seed, dp_slice, fingerprint, epochs)
        self.sizes, self._budget, self._near = sizes, budget, near
        self.window = max(1, round(WINDOW_BINS * budget / max(mean_size, 1.0)))
        self._begin_at(0)

    def _begin_at(self, position: int, skip: int = 0, left: np.ndarray | None = None) -> None:
        """Restart the windows. Window 0 holds the positions ``left``, if given, and the others begin at ``position``.

        The first ``skip`` bins are done.
        """
        self.position, self.skip, self.left = position, skip, left
        self._starts = [0]  # number of bins before window i, for the windows counted so far
        self._planned: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

    # -- windows ------------------------------------------------------------------------------------------------------

    def _positions(self, number: int) -> np.ndarray:
        """Return the positions of window ``number``, ascending; empty beyond the end of the data."""
        if self.left is not None:
            if number == 0:
                return self.left
            number -= 1
        start = self.position + number * self.window
        stop = start + self.window if self.end is None else min(start + self.window, self.end)
        return np.arange(start, max(start, stop), dtype=np.int64)

    def _bins(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the bins of a window in shuffled order, (epochs, samples) each."""
        if number not in self._planned:
            positions = self._positions(number)
            bins = []
            if len(positions):
                epochs, samples = self.order.take(int(positions[0]), int(positions[-1] - positions[0]) + 1)
                chosen = positions - positions[0]
                epochs, samples = epochs[chosen], samples[chosen]
                bins = [(epochs[b], samples[b]) for b in self._pack(samples, int(positions[0]))]
            while len(self._planned) >= 3:
                self._planned.pop(next(iter(self._planned)))
            self._planned[number] = bins
        return self._planned[number]

    def _pack(self, samples: np.ndarray, position: int) -> list[np.ndarray]:
        packed = (bins_of_near_sizes if self._near else first_fit_decreasing)(self.sizes(samples), self._budget)
        shuffled = generator(f"bins/{self.seed}/{position}").permutation(len(packed))
        return [packed[i] for i in shuffled]

    def _find(self, number: int) -> tuple[int, int]:
        """Return the window of bin ``number`` and the bin's index in it; (-1, -1) past the end of the data."""
        while self._starts[-1] <= number:
            bins = self._bins(len(self._starts) - 1)
            if not bins:
                return -1, -1
            self._starts.append(self._starts[-1] + len(bins))
        window = bisect_right(self._starts, number) - 1
        return window, number - self._starts[window]

    def _first_bin(self, step: int) -> int:
        return self.skip + (step - self.first_step) * self.dp_slice.parts

    # -- the protocol -------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int | None:
        """Optimizer steps until the data end; None = never. Packs all remaining windows: some milliseconds a million
        tokens."""
        if self.end is None:
            return None
        while self._find(self._starts[-1])[0] >= 0:
            pass
        return self.first_step + -(-(self._starts[-1] - self.skip) // self.dp_slice.parts)

    def micro_batch(self, step: int, micro: int) -> tuple[np.ndarray, np.ndarray]:
        return self._bin(self._first_bin(step) + self.dp_slice.part(micro))

    def _bin(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        window, place = self._find(number)
        if window < 0:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        return self._bins(window)[place]

    def max_samples(self, step: int) -> int:
        first = self._first_bin(step)
        return max(1, *(len(self._bin(first + part)[0]) for part in range(self.dp_slice.parts)))

    def budget(self) -> int:
        return self._budget

    def state(self, step: int) -> dict[str, Any]:
        window, place = self._find(self._first_bin(step))
        state = {**self._header(step), "budget": self._budget, "near": self._near}
        state |= {"window": self.window, "left": None}
        if window < 0:
            return {**state, "position": self.end, "bins_done": 0, "samples_done": 0, "tokens": 0}
        positions = self._positions(window)
        if window == 0 and self.left is not None:
            state["left"] = positions.tolist()
            begin = self.position
        else:
            begin = int(positions[0])
        bins = self._bins(window)
        tokens = int(self.sizes(np.concatenate([samples for _, samples in bins])).sum())
        done = sum(len(samples) for _, samples in bins[:place])
        return {**state, "position": begin, "bins_done": place, "samples_done": done, "tokens": tokens}

    def resume(self, state: dict[str, Any], accept_changes: bool = False) -> int:
        self._check(state, accept_changes)
        self.first_step = int(state["step"])
        changed = state["fingerprint"] != self.fingerprint
        left = None if state["left"] is None else np.asarray(state["left"], dtype=np.int64)
        now = self._budget, self.window, self._near
        if changed:  # the window's samples are others now: skip as many as were done
            self._begin_after(state["position"], left, int(state.get("samples_done", 0)))
            return self.first_step
        if not state["bins_done"]:
            self._begin_at(state["position"], left=left)
            return self.first_step
        # pack the window as it was when the state was saved
        self._budget, self.window, self._near = state["budget"], state["window"], state.get("near", False)
        self._begin_at(state["position"], state["bins_done"], left)
        bins = self._bins(0)
        tokens = int(self.sizes(np.concatenate([samples for _, samples in bins])).sum()) if bins else 0
        if tokens != state["tokens"]:
            raise InputError(
                "objective: its views have other numbers of tokens than in the checkpoint, so the data cannot continue "
                "at the same position; resume with the same objective options"
            )
        if (self._budget, self.window, self._near) != now:
            rest = self._remaining(state["bins_done"])
            after = state["position"] if left is not None else state["position"] + state["window"]
            self._budget, self.window, self._near = now
            self._begin_at(after, left=rest)
        return self.first_step

    def _begin_after(self, position: int, left: np.ndarray | None, done: int) -> None:
        """Restart the windows after the first ``done`` positions of a saved window, in data that may have become smaller."""
        if left is None:
            self._begin_at(position + done)
            return
        left = left[done:]
        left = left if self.end is None else left[left < self.end]
        self._begin_at(position, left=left if len(left) else None)

    def _remaining(self, bins_done: int) -> np.ndarray:
        """Return the positions of window 0 that are not in its first ``bins_done`` bins, ascending."""
        positions = self._positions(0)
        epochs, samples = self.order.take(int(positions[0]), int(positions[-1] - positions[0]) + 1)
        packed = self._pack(samples[positions - positions[0]], int(positions[0]))
        return positions[np.sort(np.concatenate(packed[bins_done:]))]
