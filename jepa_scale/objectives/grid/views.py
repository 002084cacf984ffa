"""The views of ``grid``: a sequence of grids as objects, their adjacency and, for a decoder, their cells row by row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jepa_scale.data.examples import GridSequence, flatten_grid
from jepa_scale.data.grids.objects import Objects, find_objects, near
from jepa_scale.data.grids.transforms import TRANSFORMS
from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.objectives.grid.config import GridOptions
from jepa_scale.objectives.grid.quantizer import refreshes
from jepa_scale.packing import Segment, Views
from jepa_scale.utils.errors import DataError

TARGETS = "targets"
"""Name of the packed sequence with the targets."""
NOWHERE = np.array([1, 1, -1, -1]) << 40
"""A bounding box that is near no other."""


class _Sample(NamedTuple):
    """Grids of a sample: the context of each variant, and the target. The first variant is the sample itself."""

    contexts: list[list[np.ndarray]]
    target: np.ndarray


class _Part(NamedTuple):
    """Model inputs of the objects of consecutive grids, without empty slots.

    Attributes:
        counts: (g,) objects of each grid. slots: (n,) slot of each object. colours: (n,) its colour, 0 for the end of a grid.
        inputs: (n, 23) features, or (n,) number of cells of each object.
        cells: token offsets within the grid's segment, object after object; grid g has ``cell_counts[g]`` of them.
    """

    counts: np.ndarray
    slots: np.ndarray
    colours: np.ndarray
    inputs: np.ndarray
    cells: np.ndarray
    cell_counts: np.ndarray

    def of(self, grids: slice) -> _Part:
        before, now = self.counts[: grids.start].sum(), self.counts[grids].sum()
        cells = self.cell_counts[: grids.start].sum()
        rows, tokens = slice(before, before + now), slice(cells, cells + self.cell_counts[grids].sum())
        return _Part(
            self.counts[grids],
            self.slots[rows],
            self.colours[rows],
            self.inputs[rows],
            self.cells[tokens],
            self.cell_counts[grids],
        )


@dataclass(frozen=True, slots=True)
class GridViews:
    """View transform of a sequence of grids.

    V is 1 plus the number of invariances with a weight, L the length of a context, S the number of slots. Objects are ordered
    by variant, then by grid, then by size, the largest first. A context of fewer than L grids fills the last of the L time
    steps, or its last grid is repeated (``pad_context``).

    ========================== =========================================================================================
    value of a sample
    ========================== =========================================================================================
    ``objects``                (V, L) int64, objects of each grid of the context
    ``present``                (L,) bool, time steps of the context that have a grid
    ``target_objects``         (1, 1) int64, objects of the target
    ``adjacent``               (V · L, S, S) bool; ``target_adjacent`` (1, S, S); both with ``encoder: objects`` only
    ``self_pairs``             number of rows ``self_pair``; ``cross_pairs`` and ``target_pairs`` likewise
    ``key``                    identity of the target grid, 63 bits of a hash
    ========================== =========================================================================================

    ========================== =========================================================================================
    row of an object
    ========================== =========================================================================================
    ``inputs``                 (23,) features, or the number of its cells (``encoder: decoder``); ``target_inputs`` likewise
    ``slot``                   its slot in its grid; ``target_slot`` likewise
    ``priority``               a random number, in steps in which dead codes may be replaced; ``target_priority`` likewise, with
                               ``target: trained`` only
    ``self_pair``              a row for each pair of adjacent objects of the unchanged sample: their indices among the
                               context's objects
    ``target_pair``            the same of the target, with ``relational: gridjepa`` only
    ``cross_pair``             a row for each adjacent pair of an object of the last grid and one of the target: the index
                               among the context's objects, and the index among the target's; not with ``gridjepa``
    ========================== =========================================================================================

    With ``encoder: objects`` the tokens of a segment are the colours of the objects, and a context is one segment.
    With ``encoder: decoder`` a grid is one segment, and ``positions["cell"]`` and ``positions["target_cell"]`` are the cells of
    the objects. The token that ends a grid is then one more object, the last one, because its state depends on the whole grid.
    """

    options: GridOptions

    def __call__(self, example: GridSequence, draw: SampleRNG) -> Views:
        (views,) = self.many([example], [draw])
        if isinstance(views, DataError):
            raise views
        return views

    def many(self, examples: Sequence[GridSequence], draws: Sequence[SampleRNG]) -> list[Views | DataError]:
        """Make the views of several samples; the objects of all of them are found in one call."""
        if not examples:
            return []
        o = self.options
        samples = [self._grids(example, draw) for example, draw in zip(examples, draws, strict=True)]
        contexts = [grid for sample in samples for context in sample.contexts for grid in context]
        grids = contexts + [sample.target for sample in samples]
        objects = find_objects(grids, o.slots, o.connectivity, o.object_features)
        boxes = np.broadcast_to(NOWHERE, (len(grids), o.slots, 4)).copy()
        boxes[objects.grid, objects.slot] = objects.boxes
        adjacent = near(boxes, boxes, o.reach)
        part = self._part(objects, grids)

        results: list[Views | DataError] = []
        at = 0  # index of the sample's first grid
        for number, (example, draw, sample) in enumerate(zip(examples, draws, samples, strict=True)):
            own, length = len(sample.contexts) * len(sample.contexts[0]), len(sample.contexts[0])
            target = len(contexts) + number
            found = np.append(objects.found[at : at + length], objects.found[target])
            if o.overflow == "error" and found.max() > o.slots:
                results.append(_too_many(example, draw, found, o.slots))
            else:
                ours = slice(at, at + own), slice(target, target + 1)
                views = self._views(sample, draw, part.of(ours[0]), part.of(ours[1]), boxes, adjacent, ours)
                views.counts["truncated"] = int((found > o.slots).sum())
                if o.lm_weight:
                    given = tuple(sample.contexts[0][: len(example.context)])  # without repeated grids
                    tokens, labels = GridSequence(given, sample.target).lm_sequence()
                    views.segments.append(_segment(tokens[:-1], "lm", labels=labels[:-1]))
                results.append(views)
            at += own
        return results

    def _grids(self, example: GridSequence, draw: SampleRNG) -> _Sample:
        o = self.options
        context = list(example.context[-o.context_length :])
        if o.pad_context:
            context += context[-1:] * (o.context_length - len(context))
        grids: Sequence[np.ndarray] = [*context, example.target]
        for kind in o.augment:
            grids = TRANSFORMS[kind](grids, draw.rng(f"augment/{kind}"))
        variants = [list(grids[:-1])]
        for kind, _ in o.invariances:
            variants.append(TRANSFORMS[kind](grids, draw.rng(f"invariance/{kind}"))[:-1])
        return _Sample(variants, grids[-1])

    def _part(self, objects: Objects, grids: Sequence[np.ndarray]) -> _Part:
        if self.options.encoder == "objects":
            nothing = np.zeros(0, dtype=np.int64)
            none = np.zeros_like(objects.counts)
            return _Part(objects.counts, objects.slot, objects.colours, objects.features, nothing, none)
        shapes = np.array([grid.shape for grid in grids], dtype=np.int64)
        cells = np.bincount(objects.grid, objects.sizes, len(grids)).astype(np.int64)
        width = np.repeat(shapes[:, 1], cells)
        offsets = objects.cells + objects.cells // width  # each row ends with one more token
        last = shapes[:, 0] * (shapes[:, 1] + 1)
        ends, cell_ends = objects.counts.cumsum(), cells.cumsum()
        return _Part(
            counts=objects.counts + 1,
            slots=np.insert(objects.slot, ends, objects.counts),
            colours=np.insert(objects.colours, ends, 0),
            inputs=np.insert(objects.sizes, ends, 1),
            cells=np.insert(offsets, cell_ends, last),
            cell_counts=cells + 1,
        )

    def _views(
        self,
        sample: _Sample,
        draw: SampleRNG,
        context: _Part,
        target: _Part,
        boxes: np.ndarray,
        adjacent: np.ndarray,
        grids: tuple[slice, slice],
    ) -> Views:
        o, variants, length = self.options, len(sample.contexts), len(sample.contexts[0])
        first = slice(grids[0].start, grids[0].start + length)
        starts = context.counts.cumsum() - context.counts  # indices of the grids' first objects
        grid, one, other = np.triu(adjacent[first], 1).nonzero()
        pairs = {"self": np.stack([starts[grid] + one, starts[grid] + other], axis=1)}
        if o.relational == "gridjepa":
            pairs["target"] = np.stack(np.triu(adjacent[grids[1].start], 1).nonzero(), axis=1)
        else:
            one, other = near(boxes[first.stop - 1], boxes[grids[1].start], o.reach).nonzero()
            pairs["cross"] = np.stack([starts[length - 1] + one, other], axis=1)

        absent = o.context_length - length
        counts = np.zeros((variants, o.context_length), dtype=np.int64)
        counts[:, absent:] = context.counts.reshape(variants, length)
        values: dict[str, Any] = {
            "objects": counts,
            "present": np.arange(o.context_length) >= absent,
            "target_objects": target.counts[:, None],
            **{f"{name}_pairs": len(rows) for name, rows in pairs.items()},
            "key": _identity(sample.target),
        }
        if o.encoder == "objects":
            every = np.zeros((variants, o.context_length, o.slots, o.slots), dtype=bool)
            every[:, absent:] = adjacent[grids[0]].reshape(variants, length, o.slots, o.slots)
            values |= {"adjacent": every.reshape(-1, o.slots, o.slots), "target_adjacent": adjacent[grids[1]]}
        rows = {
            "inputs": context.inputs,
            "target_inputs": target.inputs,
            "slot": context.slots,
            "target_slot": target.slots,
            **{f"{name}_pair": rows for name, rows in pairs.items()},
        }
        priorities = self._priorities(len(context.inputs) + len(target.inputs), draw)
        rows["priority"] = priorities[: len(context.inputs)]
        if o.target == "trained":
            rows["target_priority"] = priorities[len(context.inputs) :]
        numbers = {
            "objects": len(context.inputs),
            "grids": length + 1,
            **{f"{name}_pairs": len(rows) for name, rows in pairs.items()},
        }
        return Views(self._segments(sample, context, target), values, rows, numbers)

    def _priorities(self, count: int, draw: SampleRNG) -> np.ndarray:
        if not self.options.vq_codes or not refreshes(draw.step, self.options.vq_refresh_every):
            return np.zeros(count, dtype=np.int64)
        return draw.rng("codes").integers(0, 2**62, count)

    def _segments(self, sample: _Sample, context: _Part, target: _Part) -> list[Segment]:
        if self.options.encoder == "objects":
            parts = [(context, "context", "main"), (target, "target", TARGETS)]
            return [
                _segment(part.colours, role, sequence=sequence) for part, role, sequence in parts if len(part.inputs)
            ]
        grids = [grid for each in sample.contexts for grid in each]
        ends = context.cell_counts.cumsum()
        cells = np.split(context.cells, ends[:-1])
        segments = [
            _segment(flatten_grid(grid), "context", positions={"cell": mine})
            for grid, mine in zip(grids, cells, strict=True)
        ]
        last = _segment(
            flatten_grid(sample.target), "target", sequence=TARGETS, positions={"target_cell": target.cells}
        )
        return [*segments, last]

    def most_tokens(self, sizes: np.ndarray) -> np.ndarray:
        """Return the most tokens that all views of a sample take in all sequences: (m,) tokens of samples → (m,)."""
        o, sizes = self.options, np.asarray(sizes)
        variants = 1 + len(o.invariances)
        if o.encoder == "objects":
            return np.full(sizes.shape, o.slots * (o.context_length * variants + 1), dtype=np.int64)
        repeats = o.context_length if o.pad_context else 1  # of the last grid
        return sizes * (variants * repeats + (o.lm_weight > 0))


def _segment(tokens: Any, role: str, **more: Any) -> Segment:
    return Segment(tokens, role, **more)


def _too_many(example: GridSequence, draw: SampleRNG, found: np.ndarray, slots: int) -> DataError:
    grid = int(found.argmax())
    name = f"context[{grid}]" if grid < len(found) - 1 else "target"
    return DataError(
        f"{example.where or f'sample {draw.sample}'}: {name}: {found[grid]} objects, more than objective.slots={slots}; raise "
        "it, or set objective.overflow: truncate or data.on_error: skip"
    )


def _identity(grid: np.ndarray) -> int:
    content = repr(grid.shape).encode() + np.ascontiguousarray(grid, dtype=np.int8).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1
