"""Tests of the helpers for real processes."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from tests.distributed.processes import held_port


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
