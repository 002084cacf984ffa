"""Whatever becomes of a run, its newest whole state is not lost: saves, kills, damage, rewinds, prunes and resumes in any order."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jepa_scale.checkpoint import Manifest, Policy, Saver, find, saver, set_aside, store, sweep
from jepa_scale.checkpoint.manifest import TENSORS
from jepa_scale.checkpoint.retention import checkpoint_folders
from jepa_scale.checkpoint.shard_view import ShardView
from jepa_scale.cli import checkpoint as checkpoint_cli
from jepa_scale.utils.errors import InputError


class Killed(BaseException):
    """The end of the process, in the middle of a save."""


class Weights:
    """Weights with one value, which names the line of training that has made them."""

    def __init__(self) -> None:
        self.tensor = torch.zeros(8)

    def sharded_state(self) -> dict[str, ShardView]:
        return {"weights": ShardView.whole(self.tensor)}

    def post_load(self, updates: int) -> None:
        pass


def line_of(path: Path) -> float:
    """Return the line of training that a whole checkpoint is of."""
    return float(store.read_whole(path / TENSORS, ["weights"])["weights"][0])


class Run(RuleBasedStateMachine):
    """A run of one rank. ``step``: of the state in memory. ``line``: number of rewinds so far."""

    @initialize(last=st.integers(1, 3), every=st.sampled_from([0, 4]))
    def begin(self, last: int, every: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.run, self.checkpoints = self.folder / "run", self.folder / "run" / "checkpoints"
        self.checkpoints.mkdir(parents=True)
        self.policy = Policy(last=last, every=every)
        self.weights, self.step, self.line = Weights(), 0, 0
        self.newest: int | None = None
        """Step of the newest state that was saved and has not been damaged or left since."""
        self.start()

    def start(self) -> None:
        """Begin a process, which sweeps before it searches."""
        sweep(self.checkpoints)
        self.saver = Saver(self.checkpoints, self.policy, asynchronous=False)

    def save_next(self, steps: int, permanent: bool) -> None:
        self.step += steps
        self.weights.tensor.fill_(self.line)
        self.saver.save([self.weights], Manifest(self.step, "fsdp", "FSDP2 fp32", 1, self.step, permanent))

    def whole(self) -> list[int]:
        """Steps of all checkpoints whose files have all their bytes."""
        found = []
        for path in checkpoint_folders(self.checkpoints):
            with suppress(InputError):
                if not Manifest.read(path).damage(path):
                    found.append(int(path.name[5:]))
        return found

    @rule(steps=st.integers(1, 3), permanent=st.booleans())
    def saved(self, steps: int, permanent: bool) -> None:
        self.save_next(steps, permanent)
        self.newest = self.step

    @rule(steps=st.integers(1, 3), permanent=st.booleans(), moment=st.integers(0, 9))
    def killed(self, steps: int, permanent: bool, moment: int) -> None:
        """The process ends before one of the renames and removals of a save; the next process resumes."""
        left = moment

        def until_killed(function):
            def called(*arguments, **options):
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return function(*arguments, **options)

            return called

        with (
            patch.object(saver.os, "replace", until_killed(os.replace)),
            patch.object(Path, "rename", until_killed(Path.rename)),
            patch.object(saver.shutil, "rmtree", until_killed(shutil.rmtree)),
            suppress(Killed),
        ):
            self.save_next(steps, permanent)
        self.start()
        if self.whole() and self.whole()[-1] == self.step:
            self.newest = self.step
        self.resumed()

    @precondition(lambda self: self.whole())
    @rule(data=st.data(), cut=st.booleans())
    def damaged(self, data: st.DataObject, cut: bool) -> None:
        step = data.draw(st.sampled_from(self.whole()))
        (file,) = (self.checkpoints / f"step_{step:08d}" / TENSORS).glob("*.distcp")
        if cut:
            os.truncate(file, file.stat().st_size - 1)
        else:
            file.unlink()
        if self.newest == step:
            self.newest = self.whole()[-1] if self.whole() else None

    @precondition(lambda self: self.whole())
    @rule(data=st.data())
    def rewound(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(self.whole()))
        path = find(self.run, f"step_{step:08d}", alone=True)
        set_aside(self.checkpoints, step)
        assert path is not None and path.is_dir()
        self.step = self.newest = step
        self.line += 1
        self.start()

    @rule(last=st.integers(1, 3))
    def pruned(self, last: int) -> None:
        given = SimpleNamespace(run=self.run, keep_last=last, keep_every=0, dry_run=False, abandoned=False)
        with suppress(InputError):
            checkpoint_cli.prune_checkpoints(given)

    @rule()
    def resumed(self) -> None:
        """A new process goes on by ``--resume auto``; if all is damaged it refuses, and the run begins anew elsewhere."""
        if self.newest is None:
            return
        path = find(self.run, "auto", alone=True)
        assert path is not None and int(path.name[5:]) == self.newest
        self.step = self.newest
        set_aside(self.checkpoints, self.step)
        self.start()

    @invariant()
    def the_newest_whole_state_is_there(self) -> None:
        if getattr(self, "newest", None) is not None:
            assert self.whole()[-1:] == [self.newest], sorted(path.name for path in self.checkpoints.iterdir())

    def teardown(self) -> None:
        shutil.rmtree(getattr(self, "folder", ""), ignore_errors=True)


def test_the_newest_whole_state_is_never_lost() -> None:
    run_state_machine_as_test(Run, settings=settings(max_examples=40, stateful_step_count=14))
