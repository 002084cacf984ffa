import threading
import time
from pathlib import Path

import torch

from jepa_scale.distributed import Ranks
from jepa_scale.watchdog import Watchdog


def ranks(rank: int, world_size: int = 3) -> Ranks:
    return Ranks(rank, world_size, rank, torch.device("cpu"), "python")


def test_progress_keeps_it_quiet_and_it_leaves_nothing_behind(tmp_path: Path) -> None:
    ended = threading.Event()
    with Watchdog(tmp_path, ranks(0, 1), 0.5, ended.set) as dog:
        for step in range(12):
            dog.enter(step, "data")
            time.sleep(0.08)
    assert not ended.is_set()
    assert not list((tmp_path / "watchdog").glob("*.json"))
    with Watchdog(tmp_path / "none", ranks(0, 1), 0) as dog:
        dog.enter(1, "data")
    assert not (tmp_path / "none").exists()


def verdicts(tmp_path: Path, capfd, places: dict[int, tuple[int, str]]) -> list[str]:
    ended = {rank: threading.Event() for rank in places}
    dogs = {rank: Watchdog(tmp_path, ranks(rank), 0.6, ended[rank].set) for rank in places}
    for rank, (step, phase) in places.items():
        dogs[rank].__enter__()
        dogs[rank].enter(step, phase)
    try:
        assert all(event.wait(10) for event in ended.values())
        time.sleep(0.1)
    finally:
        for dog in dogs.values():
            dog.__exit__()
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("jepa-scale: ")]


def test_the_rank_that_is_behind_is_named_by_all(tmp_path: Path, capfd) -> None:
    told = verdicts(tmp_path, capfd, {0: (7, "update"), 1: (7, "forward and backward"), 2: (7, "update")})
    assert len(told) == 3
    assert all("rank 1 hangs at step 7 in 'forward and backward'" in line for line in told)


def test_an_earlier_step_is_behind_whatever_the_phase(tmp_path: Path, capfd) -> None:
    told = verdicts(tmp_path, capfd, {0: (8, "data"), 1: (8, "data"), 2: (7, "save")})
    assert all("rank 2 hangs at step 7 in 'save'" in line for line in told)


def test_where_all_are_in_the_same_place_it_does_not_pretend_to_know(tmp_path: Path, capfd) -> None:
    told = verdicts(tmp_path, capfd, {rank: (3, "update") for rank in range(3)})
    assert all("one of rank 0, 1, 2 hangs at step 3" in line for line in told)


def test_a_rank_that_is_gone_is_named(tmp_path: Path, capfd) -> None:
    told = verdicts(tmp_path, capfd, {0: (3, "update"), 2: (3, "update")})
    assert all("rank 1 has ended without a word" in line for line in told)
