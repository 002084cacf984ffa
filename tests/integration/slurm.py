"""A SLURM cluster of a test's own: munge, slurmctld and two slurmd on this machine, the nodes n1 and n2."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

from tests.distributed.processes import HANG, held_port, until
from tests.integration.daemons import SBIN, Daemons

NODES = ("n1", "n2")


class Slurm:
    """``with Slurm(folder) as cluster: cluster.run("sinfo")``.

    Args:
        folder: for everything that the daemons write; its path must be short, as sockets are in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SBIN}
        self._daemons = Daemons(folder)
        self._ports = ExitStack()

    def __enter__(self) -> Slurm:
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        self._configure()
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _configure(self) -> None:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        key = folder / "munge.key"
        key.touch(mode=0o400)
        key.chmod(0o600)
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={self._port()}",
            "SlurmUser=root",
            "AuthType=auth/munge",
            # a job that is put back is not started before its credential has expired: 2 minutes if not told otherwise
            f"AuthInfo=socket={folder}/munge.socket,cred_expire=5",
            "CryptoType=crypto/munge",
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/%n",
            f"SlurmctldPidFile={folder}/slurmctld.pid",
            f"SlurmdPidFile={folder}/slurmd_%n.pid",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "SlurmdParameters=config_overrides",
            "MpiDefault=none",
            "ReturnToService=2",
            "KillWait=20",
            "MailProg=/bin/true",
        ]
        for name in NODES:
            lines.append(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={self._port()} CPUs=1 State=UNKNOWN"
            )
        lines.append(f"PartitionName=all Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP")
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        version = tuple(map(int, self.run("slurmd", "-V").split()[1].split(".")[:2]))
        plugin = "disabled" if version >= (23, 11) else "cgroup/v1"  # loaded, and not used by anything
        (folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")

    def _port(self) -> int:
        return self._ports.enter_context(held_port())

    def _start(self) -> None:
        folder, daemons = self.folder, self._daemons
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={folder}/munge.{ending}" for option, ending in files.items()]
        daemons.start("munged", ["munged", "--foreground", "--force", *options])
        until(lambda: (folder / "munge.socket").exists(), "socket of munged")
        configuration = ["-f", str(folder / "slurm.conf")]
        daemons.start("slurmctld", ["slurmctld", "-D", "-i", *configuration])
        for name in NODES:
            daemons.start(f"slurmd_{name}", ["slurmd", "-D", "-N", name, *configuration])

        def idle() -> bool:
            daemons.check()
            return self.run("sinfo", "-h", "-o", "%t %D", check=False) == "idle 2\n"

        try:
            until(idle, "idle nodes")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.run('sinfo', '-N', '-l', check=False)}\n{daemons.output()}") from None

    def run(self, *command: str, check: bool = True) -> str:
        """What a client of SLURM prints."""
        done = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=HANG
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}\n{self._daemons.output()}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` says of a job, by key."""
        words = self.run("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def __exit__(self, *error: object) -> None:
        self.run("scancel", "--user=root", "--signal=KILL", "--full", check=False)
        self.run("scancel", "--user=root", check=False)
        self._daemons.__exit__()
        self._ports.close()
