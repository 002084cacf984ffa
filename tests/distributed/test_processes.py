"""Tests of the helpers for real processes."""

from __future__ import annotations

import socket
import sys
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from jepa_scale.training.preemption import parent_of
from tests.distributed.processes import Launched, held_port, until


def test_a_held_port_is_nobody_elses_and_a_store_can_listen_on_it():
    with held_port() as port, held_port() as other, socket.socket() as stranger:
        assert port != other
        with pytest.raises(OSError, match="in use"):
            stranger.bind(("", port))
        stores = [
            TCPStore("127.0.0.1", number, None, True, timedelta(minutes=10), wait_for_workers=False)
            for number in (port, other)
        ]
        for number, store in zip((port, other), stores, strict=True):
            store.set("port", str(number))
        assert [int(store.get("port")) for store in stores] == [port, other]


WITH_WORKER = "import os, time; os.environ['RANK'] == '1' and os.fork(); time.sleep(600)"


@pytest.mark.parametrize("order", [1, -1])
def test_a_rank_is_never_taken_for_its_worker(launch, monkeypatch, order):
    """Process ids start again at a low one after the highest, so a worker's can be lower than its rank's."""
    program = f'for RANK in 0 1; do export RANK; "{sys.executable}" -c "{WITH_WORKER}" & done; wait'
    started = launch("bash", "-c", program)
    until(lambda: len([e for e in started.marked().values() if e.get("RANK") == "1"]) == 2, "worker")
    found = Launched.marked
    monkeypatch.setattr(Launched, "marked", lambda self: dict(sorted(found(self).items())[::order]))
    pid = started.rank(1)
    assert parent_of(pid) == started.process.pid, "its parent is the command"
