"""scripts/launch_deepspeed.sh with a real sshd: two host names, each an address of the loopback network."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.processes import ENVIRONMENT, HANG, MARK, REPOSITORY, held_port, until
from tests.distributed.small_runs import assert_same, check_checkpoints, newest
from tests.distributed.test_runs import config_file
from tests.integration.daemons import Daemons, needs, program

LAUNCHER = str(REPOSITORY / "scripts/launch_deepspeed.sh")
STEPS = 6
with_sshd = needs("sshd", "ssh", "ssh-keygen", "pdsh")


@pytest.fixture(scope="module")
def hosts(short_folder: Path) -> Iterator[dict[str, str]]:
    """An sshd that answers as ``first`` and ``second``, and on whose port nothing answers as ``third``.

    Gives the environment in which ``ssh`` knows them: a wrapper that names our own configuration.
    """
    folder = short_folder
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    with held_port() as port, Daemons(folder) as daemons:
        wrapper = configured(folder, port)
        daemons.start("sshd", ["sshd", "-D", "-e", "-f", str(folder / "sshd_config")])

        def answers() -> bool:
            daemons.check()
            return subprocess.run([str(wrapper), "second", "true"], capture_output=True).returncode == 0

        until(lambda: answers() or "account is locked" in daemons.output(), "answer of sshd")
        if "account is locked" in daemons.output():
            pytest.skip(f"sshd lets nobody in as {getpass.getuser()}: the account is locked")
        yield {"PATH": os.pathsep.join([str(wrapper.parent), str(Path(sys.executable).parent), os.environ["PATH"]])}


def configured(folder: Path, port: int) -> Path:
    """Write what sshd and ssh read; the wrapper."""
    (folder / "authorized_keys").write_text((folder / "user_key.pub").read_text())
    host_key = (folder / "host_key.pub").read_text().rsplit(maxsplit=1)[0]
    (folder / "known_hosts").write_text("".join(f"[127.0.0.{n}]:{port} {host_key}\n" for n in (1, 2, 3)))
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nListenAddress 127.0.0.2\nHostKey {folder}/host_key\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPidFile none\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n"
    )
    (folder / "ssh_config").write_text(
        "".join(f"Host {name}\n  HostName 127.0.0.{n}\n" for n, name in enumerate(("first", "second", "third"), 1))
        + f"Host *\n  Port {port}\n  User {getpass.getuser()}\n  IdentityFile {folder}/user_key\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  StrictHostKeyChecking yes\n"
    )
    wrapper = folder / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {program("ssh")} -F {folder}/ssh_config "$@"\n')
    wrapper.chmod(0o755)
    return wrapper


def hostfile(folder: Path, text: str) -> str:
    path = folder / "hosts"
    path.write_text(text)
    return str(path)


@pytest.mark.matrix
@with_sshd
def test_two_hosts_train_as_two_ranks_of_one_do(process_pool, launch, hosts, tmp_path):
    """Six steps: warm-up is over at the third, and the checkpoints of two saves are replaced by later ones."""
    config = config_file(tmp_path, "lm", "zero2", name="run", steps=STEPS, checkpoint={"every": 2})
    process_pool.run(["--config", str(config), f"run.dir={tmp_path}/expected"], 2)
    mark = f"hosts_{os.getpid()}_{tmp_path.name}"
    variables = {**ENVIRONMENT, MARK: mark}
    (tmp_path / "variables").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    file = hostfile(tmp_path, "# two hosts\nfirst slots=1\n\nsecond slots=1\n")
    with held_port() as port:
        environment = {**hosts, "DS_ENV_FILE": str(tmp_path / "variables"), "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": str(port)}
        run = launch(LAUNCHER, file, "--config", str(config), environment=environment, mark=mark)
        assert run.wait() == 0, run.output()
    assert "first: " in run.output() and "second: " in run.output()  # pdsh names whose line it is
    check_checkpoints(tmp_path / "run")
    assert newest(tmp_path / "run") == STEPS
    assert_same(tmp_path / "run", tmp_path / "expected" / "run", STEPS)


def refused(hosts: dict[str, str], *arguments: str) -> str:
    """What the launcher says, in one line, when it starts nothing."""
    done = subprocess.run(
        [LAUNCHER, *arguments], env={**os.environ, **ENVIRONMENT, **hosts}, capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 2, done
    assert done.stdout == "" and done.stderr.count("\n") == 1, done
    return done.stderr


@pytest.mark.matrix
@with_sshd
def test_a_host_that_does_not_answer_is_refused_by_name(hosts, tmp_path):
    file = hostfile(tmp_path, "first slots=1\nthird slots=1\nsecond slots=1\n")
    said = refused(hosts, file, "--config", "configs/reversal.yaml", f"run.dir={tmp_path}/runs")
    assert "'third' (line 2: " in said and "refused" in said
    assert "first" not in said and "second" not in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.matrix
@with_sshd
def test_every_host_that_does_not_answer_is_named(hosts, tmp_path):
    file = hostfile(tmp_path, "third slots=8\nfirst slots=8\nno-such-host.invalid slots=8\n")
    said = refused(hosts, file, "--config", "configs/reversal.yaml")
    assert "'third' (line 1: " in said and "'no-such-host.invalid' (line 3: " in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("first slots=1\nsecond\n", "line 2: must read 'host slots=GPUS', not 'second'"),
        ("first slots=0\n", "line 1: must read 'host slots=GPUS', not 'first slots=0'"),
        ("first slots=1\n# again\nfirst slots=2\n", "line 3: host 'first' is in line 1 already"),
        ("# nobody\n\n", "names no host"),
    ],
)
def test_a_damaged_hostfile_is_refused_with_its_line(tmp_path, text, says):
    assert says in refused({}, hostfile(tmp_path, text), "--config", "configs/reversal.yaml")


def test_no_hostfile(tmp_path):
    assert "no such hostfile" in refused({}, str(tmp_path / "none"), "--config", "configs/reversal.yaml")
    assert "usage" in refused({}, str(tmp_path / "none"))
