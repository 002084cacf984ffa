import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.training import watchdog
from jepa_scale.training.watchdog import Watchdog
from tests.distributed.processes import HANG, until

LIMIT = 0.5


class Hand:
    """The watchdog's clock: it stands where it was put, and counts the looks that watchdogs take at it."""

    def __init__(self) -> None:
        self.at, self.looks = 0.0, 0

    def time(self) -> float:
        if threading.current_thread().name == "watchdog":
            self.looks += 1
        return self.at

    def until_looked_at(self, ended: threading.Event) -> None:
        """Until the one watchdog has seen what it shows now, or has ended; it may have been in the middle of a look."""
        seen = self.looks
        until(lambda: self.looks >= seen + 2 or ended.is_set(), "look at the clock")


@pytest.fixture
def hand(monkeypatch) -> Hand:
    """The monotonic clock. That of the wall is far ahead."""
    hand = Hand()
    clocks = SimpleNamespace(monotonic=hand.time, time=lambda: hand.time() + 1e9, sleep=time.sleep)
    monkeypatch.setattr(watchdog, "time", clocks)
    return hand


def ranks(rank: int, world_size: int = 3) -> ParallelContext:
    return ParallelContext(rank, world_size, rank, torch.device("cpu"), "python")


def test_progress_keeps_it_quiet_and_it_leaves_nothing_behind(tmp_path: Path, hand: Hand) -> None:
    ended = threading.Event()
    with Watchdog(tmp_path, ranks(0, 1), LIMIT, ended.set) as dog:
        for step in range(6):
            dog.enter(step, "data")
            hand.at += 0.9 * LIMIT
            hand.until_looked_at(ended)
        assert not ended.is_set()
        hand.at += 0.2 * LIMIT
        assert ended.wait(HANG)
    assert not list((tmp_path / "watchdog").glob("*.json"))
    with Watchdog(tmp_path / "none", ranks(0, 1), 0) as dog:
        dog.enter(1, "data")
    assert not (tmp_path / "none").exists()


def verdicts(tmp_path: Path, caplog, hand: Hand, places: dict[int, tuple[int, str]]) -> list[str]:
    """What the watchdogs of the ranks say when nothing goes on after each has told in its file where it is."""
    ended = {rank: threading.Event() for rank in places}
    dogs = {rank: Watchdog(tmp_path, ranks(rank), LIMIT, ended[rank].set) for rank in places}
    for rank, (step, phase) in places.items():
        dogs[rank].enter(step, phase)
        dogs[rank].__enter__()
    try:
        until(lambda: len(list((tmp_path / "watchdog").glob("rank_*.json"))) == len(places), "word of all ranks")
        hand.at += 2 * LIMIT
        assert all(event.wait(HANG) for event in ended.values())
    finally:
        for dog in dogs.values():
            dog.__exit__()
    return caplog.messages


def test_the_rank_that_is_behind_is_named_by_all(tmp_path: Path, caplog, hand: Hand) -> None:
    told = verdicts(tmp_path, caplog, hand, {0: (7, "update"), 1: (7, "forward and backward"), 2: (7, "update")})
    assert len(told) == 3
    assert all("rank 1 hangs at step 7 in 'forward and backward'" in line for line in told)


def test_an_earlier_step_is_behind_whatever_the_phase(tmp_path: Path, caplog, hand: Hand) -> None:
    told = verdicts(tmp_path, caplog, hand, {0: (8, "data"), 1: (8, "data"), 2: (7, "save")})
    assert len(told) == 3 and all("rank 2 hangs at step 7 in 'save'" in line for line in told)


def test_where_all_are_in_the_same_place_it_does_not_pretend_to_know(tmp_path: Path, caplog, hand: Hand) -> None:
    told = verdicts(tmp_path, caplog, hand, {rank: (3, "update") for rank in range(3)})
    assert len(told) == 3 and all("one of rank 0, 1, 2 hangs at step 3" in line for line in told)


def test_a_rank_that_is_gone_is_named(tmp_path: Path, caplog, hand: Hand) -> None:
    told = verdicts(tmp_path, caplog, hand, {0: (3, "update"), 2: (3, "update")})
    assert len(told) == 2 and all("rank 1 has ended and left no watchdog file" in line for line in told)
