"""Nodes of a test's own: network namespaces that meet on a bridge, whose links can be cut."""

from __future__ import annotations

import os
import subprocess

from tests.distributed.processes import HANG
from tests.integration.daemons import SBIN

PREFIX = 24


def ip(*arguments: str) -> str:
    done = subprocess.run(
        ["ip", *arguments], env={**os.environ, "PATH": SBIN}, capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def possible() -> str:
    """Why namespaces and pairs of veth cannot be made here; empty if they can."""
    name = f"jsprobe{os.getpid()}"
    try:
        ip("netns", "add", name)
    except (AssertionError, OSError) as error:
        return f"no network namespaces here: {error}"
    try:
        ip("-n", name, "link", "add", "probe0", "type", "bridge")
        ip("-n", name, "link", "add", "probe1", "type", "veth", "peer", "name", "probe2")
    except AssertionError as error:
        return f"no bridges or veth pairs here: {error}"
    finally:
        ip("netns", "del", name)
    return ""


class Network:
    """Nodes 0 … n-1, each in a namespace of its own with the address ``address(i)`` on ``net0``.

    The bridge is in a further namespace: the machine's own network is not touched.
    """

    def __init__(self, nodes: int) -> None:
        self.switch = f"js{os.getpid()}sw"
        self.nodes = [f"js{os.getpid()}n{i}" for i in range(nodes)]

    def __enter__(self) -> Network:
        try:
            ip("netns", "add", self.switch)
            ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
            ip("-n", self.switch, "link", "set", "bridge", "up")
            for i, node in enumerate(self.nodes):
                ip("netns", "add", node)
                port = f"port{i}"
                ip("-n", self.switch, "link", "add", port, "type", "veth", "peer", "name", "net0", "netns", node)
                ip("-n", self.switch, "link", "set", port, "master", "bridge", "up")
                ip("-n", node, "address", "add", f"{self.address(i)}/{PREFIX}", "dev", "net0")
                ip("-n", node, "link", "set", "net0", "up")
                ip("-n", node, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def address(self, node: int) -> str:
        return f"10.123.45.{node + 1}"

    def within(self, node: int) -> list[str]:
        """Put before a command: it then runs on that node."""
        return ["ip", "netns", "exec", self.nodes[node]]

    def cut(self, node: int) -> None:
        ip("-n", self.switch, "link", "set", f"port{node}", "down")

    def mend(self, node: int) -> None:
        ip("-n", self.switch, "link", "set", f"port{node}", "up")

    def __exit__(self, *error: object) -> None:
        for name in [*self.nodes, self.switch]:
            if name in ip("netns", "list"):
                ip("netns", "del", name)
