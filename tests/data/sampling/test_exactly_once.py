"""From shards on the disk to the batches of every rank: each sample once an epoch, whatever is killed and changed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.data.sampling.batches import BatchSampler, DataParallelSlice, SampleBatchSampler, TokenBatchSampler
from jepa_scale.data.sampling.loader import Loader
from jepa_scale.data.sampling.order import Windowed
from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.data.shards.format import Index, Sample, write_shard
from jepa_scale.data.shards.locate import locate
from jepa_scale.data.shards.reader import ShardExamples
from jepa_scale.packing import PackedBatch, Segment, Views

MAX_LENGTH = 5


def shards_of(lengths: list[list[int]], folder: Path) -> ShardExamples:
    """Shards of documents of these lengths; token 0 of a document is its number + 10, the others count from 0."""
    infos, number = [], 10
    for shard, documents in enumerate(lengths):
        samples = []
        for n in documents:
            samples.append(Sample({"npy": np.array([number, *range(n - 1)], dtype=np.uint32)}, n))
            number += 1
        infos.append(write_shard(folder, f"train-{shard:06d}.tar", samples))
    Index("text", {"train": infos}, vocab_size=10_000, special={}).write(folder)
    located = locate(str(folder), folder)
    assert located is not None
    return ShardExamples(located, "train", max_length=MAX_LENGTH, long="split")


def views(document: Any, draw: SampleRNG) -> Views:
    return Views(
        [Segment(document.tokens[:-1], "text", labels=document.tokens[1:].astype(np.int64))],
        values={"who": np.array([draw.epoch, draw.sample]), "noise": draw.rng("noise").random()},
    )


def stream_of(examples: ShardExamples, dp_slice: DataParallelSlice, batching: str, epochs: int) -> BatchSampler:
    order = Windowed(examples.shard_lengths, 7, window=6)
    if batching == "samples":
        return SampleBatchSampler(order, 7, 3 * dp_slice.parts, dp_slice, examples.fingerprint, epochs)
    return TokenBatchSampler(
        order, 7, lambda s: examples.sizes(s) - 1, 11, examples.mean_size, dp_slice, examples.fingerprint, epochs
    )


def step_batches(
    examples: ShardExamples, streams: list[BatchSampler], start: int, stop: int, workers: int
) -> list[list[PackedBatch]]:
    """All ranks' micro-batches of the steps [start, stop), rank by rank in each step."""
    ranks = [list(Loader(examples, s, views, ("main",), start, stop, seed=7, workers=workers)) for s in streams]
    return [[batch for rank in ranks for batch in rank[i]] for i in range(stop - start)]


def train(
    examples: ShardExamples, plan: list[tuple[int, int, int, int]], batching: str, epochs: int
) -> list[list[PackedBatch]]:
    """Run with (world size, accumulation, workers, steps until killed) after (…): each goes on from the last state."""
    state, steps = None, []
    while True:
        world, accumulation, workers, lives = plan.pop(0) if plan else (1, 1, 0, 10**9)
        streams = [
            stream_of(examples, DataParallelSlice(accumulation, rank, world), batching, epochs) for rank in range(world)
        ]
        start = 0 if state is None else {stream.resume(state) for stream in streams}.pop()
        last = streams[0].steps
        assert last is not None
        assert {s.steps for s in streams} == {last}  # no rank waits for another at the end
        stop = min(start + lives, last)
        # killed in the middle of the next step: what it has loaded ahead comes again
        steps += step_batches(examples, streams, start, stop, workers)
        if stop == last:
            return steps
        state = streams[0].state(stop)
        assert all(stream.state(stop) == state for stream in streams)


def check(examples: ShardExamples, lengths: list[list[int]], steps: list[list[PackedBatch]], epochs: int) -> None:
    batches = [batch for step in steps for batch in step]
    sizes = examples.sizes(np.arange(len(examples)))
    assert examples.mean_size == pytest.approx(sizes.mean())
    who = [tuple(row) for batch in batches for row in batch.values["who"].tolist()]
    assert Counter(who) == {(e, i): 1 for e in range(epochs) for i in range(len(examples))}
    labels = Counter(int(t) for b in batches for t in b.sequences["main"].labels if t >= 0)
    expected = Counter(t for shard in lengths for n in shard for t in range(n - 1))
    assert labels == {t: n * epochs for t, n in expected.items()}  # every token but the first is predicted once


lives = st.tuples(st.integers(1, 8), st.integers(1, 2), st.just(0), st.integers(0, 5))
documents = st.lists(st.lists(st.integers(2, 14), min_size=1, max_size=6), min_size=1, max_size=17)


@settings(max_examples=40)
@given(lengths=documents, plan=st.lists(lives, max_size=3), batching=st.sampled_from(["samples", "tokens"]))
def test_every_sample_comes_once_an_epoch_through_kills_and_other_world_sizes(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[list[int]], plan: list[Any], batching: str
) -> None:
    examples = shards_of(lengths, tmp_path_factory.mktemp("shards"))
    check(examples, lengths, train(examples, list(plan), batching, epochs=2), epochs=2)


@pytest.mark.parametrize(
    "plan",
    [
        [(1, 1, 4, 3), (4, 2, 1, 2), (2, 1, 0, 9), (3, 1, 2, 10**9)],
        [(8, 1, 1, 1), (5, 1, 3, 10**9)],  # more ranks than the two shards
    ],
    ids=["to-and-fro", "more-ranks-than-shards"],
)
@pytest.mark.parametrize("batching", ["samples", "tokens"])
def test_worker_processes_change_nothing(tmp_path: Path, plan: list[Any], batching: str) -> None:
    rng = np.random.default_rng(0)
    lengths = [rng.integers(2, 30, 40).tolist(), rng.integers(2, 9, 3).tolist()]
    examples = shards_of(lengths, tmp_path)
    with_workers = train(examples, list(plan), batching, epochs=1)
    without = train(examples, [(w, a, 0, n) for w, a, _, n in plan], batching, epochs=1)
    check(examples, lengths, with_workers, epochs=1)
    for a, b in zip(with_workers, without, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.sequences["main"].input_ids.equal(y.sequences["main"].input_ids)
            assert x.values["noise"].equal(y.values["noise"])


def test_batches_after_a_resume_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    examples = shards_of([np.random.default_rng(s).integers(2, 30, 9).tolist() for s in range(5)], tmp_path)
    for batching in ("samples", "tokens"):
        whole = train(examples, [(2, 2, 0, 10**9)], batching, epochs=2)
        again = train(examples, [(2, 2, 1, 3), (2, 2, 0, 4), (2, 2, 2, 10**9)], batching, epochs=2)
        assert len(whole) == len(again) > 8
        for a, b in zip(whole, again, strict=True):
            for x, y in zip(a, b, strict=True):
                assert x.sequences["main"].input_ids.equal(y.sequences["main"].input_ids)
                assert x.values["noise"].equal(y.values["noise"])
                assert x.values["who"].equal(y.values["who"])
