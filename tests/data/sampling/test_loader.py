import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

from jepa_scale.data.reversal.facts import Fact, ReversalData, generate
from jepa_scale.data.sampling.batches import ALONE, DataParallelSlice, SampleBatchSampler, TokenBatchSampler
from jepa_scale.data.sampling.loader import JOB_SIGNALS, Loader, check_workers
from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.packing import PackedBatch, Segment, Views
from jepa_scale.utils.errors import DataError, InputError
from jepa_scale.utils.logging import configure
from tests.text_runs import config_file


def fact_views(fact: Fact, draw: SampleRNG) -> Views:
    """Three segments in two streams, one of them shared, and everything that a draw offers."""
    tokens, labels = fact.lm_sequence()
    segments = [
        Segment(tokens, "forward", labels=labels),
        Segment(fact.subject, "name", sequence="names", key=fact.subject),
        Segment(fact.object, "name", sequence="names", key=fact.object),
    ]
    if draw.rng("drop").random() < 0.3:
        segments = segments[:1]
    values = {
        "noise": draw.rng("noise").standard_normal(3),
        "step": draw.step_rng("x").random(),
        "sample": draw.sample,
        "epoch": draw.epoch,
    }
    return Views(segments, values=values, counts={"paired": int(fact.kind == "train")})


def refuses_sample_7(fact: Fact, draw: SampleRNG) -> Views:
    if draw.sample == 7:
        raise InputError("data: row 7 is odd")
    return fact_views(fact, draw)


def says_its_process(fact: Fact, draw: SampleRNG) -> Views:
    info = get_worker_info()
    return Views([Segment([1], "x")], values={"pid": os.getpid(), "worker": -1 if info is None else info.id})


class Together:
    """Makes the views of a micro-batch in one call; alone they are the same."""

    def __call__(self, fact: Fact, draw: SampleRNG) -> Views:
        return fact_views(fact, draw)

    def many(self, facts: list[Fact], draws: list[SampleRNG]) -> list[Views | DataError]:
        made = [fact_views(fact, draw) for fact, draw in zip(facts, draws, strict=True)]
        return [DataError("fact 7: odd") if d.sample == 7 else v for v, d in zip(made, draws, strict=True)]


@pytest.fixture(scope="module")
def data() -> ReversalData:
    return generate(50, comb=4, relations=2)


def stream_of(
    data: ReversalData, batch: int, dp_slice: DataParallelSlice = ALONE, **options: Any
) -> SampleBatchSampler:
    return SampleBatchSampler(data.order(5), 5, batch, dp_slice, **options)


def loader(data: ReversalData, **changes: Any) -> Loader:
    """130 facts, 24 a step: a step in six crosses an epoch's end."""
    stream = {"accumulation": 2, "rank": 0, "world_size": 1} | {
        k: changes.pop(k) for k in ("accumulation", "rank", "world_size") if k in changes
    }
    options = {"start_step": 0, "steps": 8, "seed": 5, "workers": 0, "view_transform": fact_views} | changes
    return Loader(data.train, stream_of(data, 24, DataParallelSlice(**stream)), sequences=("main", "names"), **options)


def same(a: Any, b: Any) -> bool:
    """Equal in every field, bit by bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(data: ReversalData, workers: int) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    steps = list(loader(data, workers=workers))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(steps) == 8
    assert all(len(step) == 2 for step in steps)
    assert same(steps, list(loader(data)))
    assert not same(steps, list(loader(data, seed=6)))


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_anywhere_gives_what_an_uninterrupted_run_has_there(data: ReversalData, workers: int) -> None:
    whole = list(loader(data))
    for start in (0, 1, 5, 8):
        resumed = loader(data, start_step=start, workers=workers)
        assert len(resumed) == 8 - start
        assert same(list(resumed), whole[start:])
    assert whole[5][1].step == 5


def contents(steps: list[list[PackedBatch]]) -> list[tuple[Any, ...]]:
    """What was drawn for each sample, in order, whatever the micro-batch it came in."""
    names = ("epoch", "sample", "step", "noise")
    return [
        tuple(np.ravel(batch.values[name][i]).tolist() for name in names)
        for step in steps
        for batch in step
        for i in range(batch.counts["samples"])
    ]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 4), (4, 2), (3, 2), (8, 3)])
def test_world_size_and_accumulation_change_no_sample_and_no_draw(
    data: ReversalData, world: int, accumulation: int
) -> None:
    ranks = [list(loader(data, world_size=world, rank=r, accumulation=accumulation, steps=7)) for r in range(world)]
    dp_slice = [[rank[s][j] for j in range(accumulation) for rank in ranks] for s in range(7)]
    assert contents(dp_slice) == contents(list(loader(data, accumulation=1, steps=7)))


def test_a_sample_keeps_its_draws_at_another_batch_size(data: ReversalData) -> None:
    def noise(batch: int) -> dict[tuple[int, int], list[float]]:
        stream = stream_of(data, batch)
        steps = Loader(data.train, stream, fact_views, ("main", "names"), 0, 120 // batch, 5)
        values = [step[0].values for step in steps]
        return {
            (int(e), int(s)): n.tolist()
            for v in values
            for e, s, n in zip(v["epoch"], v["sample"], v["noise"], strict=True)
        }

    assert noise(24) == noise(40)


def test_a_segments_seed_follows_its_sample_and_epoch(data: ReversalData) -> None:
    """Whatever the ranks and micro-batches, and another one in another epoch and run."""

    def seeds(**changes: Any) -> dict[tuple[int, int], int]:
        found = {}
        for step in loader(data, **changes):
            for batch in step:
                of = batch.sequences["main"].seeds[batch.segments["forward"]].tolist()
                keys = zip(batch.values["epoch"].tolist(), batch.values["sample"].tolist(), strict=True)
                found |= dict(zip(keys, of, strict=True))
        return found

    whole = seeds()
    parts = seeds(world_size=2, rank=0, accumulation=3) | seeds(world_size=2, rank=1, accumulation=3)
    assert whole == parts and len(set(whole.values())) == len(whole) == 8 * 24
    assert {epoch for epoch, _ in whole} == {0, 1}
    assert whole[0, 7] == SampleRNG(5, 0, 99, 7).number("model")
    assert not set(whole.values()) & set(seeds(seed=6).values())


def test_batches_hold_the_facts_of_the_stream(data: ReversalData) -> None:
    (batch,) = next(iter(loader(data, accumulation=1)))
    _, samples = stream_of(data, 24).micro_batch(0, 0)
    assert batch.values["sample"].tolist() == samples.tolist()
    main = batch.sequences["main"]
    for sample, segment in zip(samples, batch.segments["forward"].tolist(), strict=True):
        a, b = main.table.cu_seqlens[segment : segment + 2].tolist()
        assert main.input_ids[a:b].tolist() == data.train[int(sample)].lm_sequence()[0]
    assert batch.counts["samples"] == 24
    later = list(loader(data))[6][1]
    assert set(later.values["step"].tolist()) == {SampleRNG(5, 0, 6, 0).step_rng("x").random()}
    assert later.step == 6
    assert (batch.step, batch.seed) == (0, 5)


def test_no_held_out_fact_comes_out_of_the_loader(data: ReversalData) -> None:
    held_out = {tuple(f.lm_sequence()[0]) for f in data.splits["test"]}
    seen = set()
    for step in loader(data, steps=12):  # two epochs
        for batch in step:
            main = batch.sequences["main"]
            seen |= {tuple(x.tolist()) for x in main.input_ids.split(list(main.table.lengths))}
    assert len(seen) == len(data.train)
    assert held_out
    assert not seen & held_out


def test_batches_and_loaders_can_be_pickled(data: ReversalData) -> None:
    of = loader(data)
    batches = next(iter(of))
    assert same(pickle.loads(pickle.dumps(batches)), batches)
    assert same(next(iter(pickle.loads(pickle.dumps(of)))), batches)  # what a spawned worker gets


def test_workers_work_in_their_own_processes(data: ReversalData) -> None:
    steps = list(loader(data, workers=2, view_transform=says_its_process))
    pids = {int(p) for step in steps for batch in step for p in batch.values["pid"]}
    assert len(pids) == 2
    assert os.getpid() not in pids


@pytest.mark.parametrize("workers", [0, 1])
def test_an_input_error_arrives_as_it_was_raised(data: ReversalData, workers: int) -> None:
    with pytest.raises(InputError, match="^data: row 7 is odd$"):
        list(loader(data, workers=workers, view_transform=refuses_sample_7))


def test_workers_outlive_a_signal_to_the_whole_job(data: ReversalData) -> None:
    steps: Iterator[list[PackedBatch]] = iter(loader(data, workers=1, steps=40, view_transform=says_its_process))
    pid = int(next(steps)[0].values["pid"][0])
    for name in ("TERM", "INT", "HUP", "USR1"):
        subprocess.run(["kill", f"-{name}", str(pid)], check=True)  # from another process than the trainer
    rest = list(steps)
    assert len(rest) == 39
    assert {int(p) for step in rest for batch in step for p in batch.values["pid"]} == {pid}


born_with: list[set[signal.Signals]] = []
"""In a forked process: the signals that it blocked from its first moment."""


def says_what_it_was_born_with(example: Fact, draw: SampleRNG) -> Views:
    return Views([Segment([1], "x")], values={"blocked": float(born_with[-1] >= JOB_SIGNALS)})


def test_no_signal_to_the_job_finds_a_worker_unprepared(data: ReversalData) -> None:
    """A signal may come between the fork and the first line of the worker."""
    os.register_at_fork(after_in_child=lambda: born_with.append(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    (step, *_) = loader(data, workers=1, view_transform=says_what_it_was_born_with)
    assert step[0].values["blocked"].all()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before, "the trainer's own mask is as it was"


def test_a_trainer_that_fails_takes_its_workers_along(tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(
        "from jepa_scale.data.sampling.loader import Loader\n"
        "from jepa_scale.data.sampling.order import Permuted, shuffled\n"
        "from jepa_scale.data.sampling.batches import SampleBatchSampler\n"
        "from jepa_scale.packing import Segment, Views\n"
        "import os\n"
        "def views(example, draw):\n"
        "    return Views([Segment([1], 'x')], values={'pid': os.getpid()})\n"
        "order = Permuted(50, lambda epoch: shuffled(0, epoch, 50))\n"
        "steps = iter(Loader(range(50), SampleBatchSampler(order, 0, 2), views, ('main',), 0, 10_000, 0, workers=2))\n"
        "print(*{int(next(steps)[0].values['pid'][0]) for _ in range(8)}, flush=True)\n"
        "raise SystemExit(3)\n"  # with the iterator, and so the workers, still alive
    )
    paths = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 3, done.stderr
    pids = [int(p) for p in done.stdout.split()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


class Damaged:
    """The facts, some of which cannot be read."""

    def __init__(self, data: ReversalData, bad: set[int]) -> None:
        self.facts, self.bad = data.train, bad

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, number: int) -> Fact:
        if number in self.bad:
            raise DataError(f"shard-3.tar, sample {number}: is damaged")
        return self.facts[number]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_stops_the_run_or_is_counted(
    data: ReversalData, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    configure()
    bad = {3, 4, 77}
    stream = stream_of(data, 10, epochs=1)
    assert stream.steps == 13

    def damaged(**options: Any) -> Loader:
        return Loader(Damaged(data, bad), stream, fact_views, ("main", "names"), 0, 13, 5, workers, **options)

    with pytest.raises(DataError, match=r"^shard-3.tar, sample (3|4|77): is damaged$"):
        list(damaged())
    batches = [batch for step in damaged(on_error="skip") for batch in step]
    assert sum(batch.counts["skipped"] for batch in batches) == 3
    seen = sorted(int(n) for batch in batches for n in batch.values["sample"])
    assert seen == sorted(set(range(130)) - bad)
    logged = capfd.readouterr().err
    assert all(f"WARNING skipped: shard-3.tar, sample {n}: is damaged\n" in logged for n in bad)


def test_a_micro_batch_without_samples_has_the_shapes_of_one(data: ReversalData) -> None:
    """After the end of the data, and when every sample of it is damaged."""
    full = loader(data).micro_batch(0, 0)
    beyond = Loader(data.train, stream_of(data, 10, epochs=1), fact_views, ("main", "names"), 0, 14, 5)
    lost = Loader(
        Damaged(data, set(range(1, 130))), stream_of(data, 10), fact_views, ("main", "names"), 0, 1, 5, on_error="skip"
    )
    (_, samples) = lost.sampler.micro_batch(0, 0)
    empties = [beyond.micro_batch(13, 0)] + ([lost.micro_batch(0, 0)] if 0 not in samples else [])
    assert len(empties) == 2
    for empty in empties:
        assert empty.counts["samples"] == empty.counts["labels"] == empty.counts["paired"] == 0
        assert {k: (v.shape[1:], v.dtype) for k, v in empty.values.items()} == {
            k: (v.shape[1:], v.dtype) for k, v in full.values.items()
        }
        assert all(len(v) == 0 for v in [*empty.values.values(), *empty.segments.values(), *empty.samples.values()])
        assert set(empty.segments) <= {"forward", "name"}
        assert "forward" in empty.segments
        assert {s.num_tokens for s in empty.sequences.values()} == {1}


def twice(fact: Fact, draw: SampleRNG) -> Views:
    tokens, _ = fact.lm_sequence()
    return Views([Segment(tokens * 2, "x")])


def test_views_larger_than_announced_are_refused(data: ReversalData) -> None:
    def tokens(sizes: int) -> TokenBatchSampler:
        return TokenBatchSampler(data.order(5), 5, lambda s: np.full(len(s), sizes), 24, 6.0)

    fits = Loader(data.train, tokens(12), twice, ("main",), 0, 3, 5)
    assert [batch.counts for step in fits for batch in step] == [
        {"samples": 2, "tokens": 24, "labels": 0, "skipped": 0, "budget": 24}
    ] * 3
    with pytest.raises(InputError, match=r"^train.micro_tokens: a micro-batch has 48 tokens of views, more than 24"):
        list(Loader(data.train, tokens(6), twice, ("main",), 0, 1, 5))


@pytest.mark.parametrize("workers", [0, 2])
def test_views_that_are_made_together_are_those_made_alone(data: ReversalData, workers: int, capfd: Any) -> None:
    configure()
    alone = list(loader(data, on_error="skip"))
    together = list(loader(data, on_error="skip", workers=workers, view_transform=Together()))
    skipped = 0
    for ours, theirs in zip((b for s in together for b in s), (b for s in alone for b in s), strict=True):
        skipped += ours.counts["skipped"]
        if not ours.counts["skipped"]:
            assert same(ours, theirs)
        else:
            assert ours.counts["samples"] == theirs.counts["samples"] - 1 and 7 not in ours.values["sample"]
    assert skipped >= 1 and capfd.readouterr().err.count("skipped: fact 7: odd") == skipped
    with pytest.raises(DataError, match="fact 7: odd"):
        list(loader(data, view_transform=Together()))


def with_shm(options: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command where ``/dev/shm`` is mounted with these options, or skip the test where it cannot be mounted."""
    prefix = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    prefix += [f'mount -t tmpfs -o {options} none /dev/shm && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    return subprocess.run([*prefix, *command], capture_output=True, text=True)


def test_workers_without_shared_memory_are_refused_before_any_work(tmp_path):
    config = config_file(tmp_path, data={"source": "text", "path": str(tmp_path / "corpus.txt"), "workers": 2})
    train = "import sys; from jepa_scale.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = with_shm("size=4k,nr_inodes=2", sys.executable, "-c", train, "train", "--config", str(config))
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert (
        "data.workers: 2 loader processes need room in /dev/shm (No space left on device); give the container" in line
    )
    assert "data.workers=0" in line and not (tmp_path / "run").exists()


def test_workers_are_connected_where_there_is_room():
    check_workers(0)
    check_workers(3)
