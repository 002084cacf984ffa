"""Language modelling that waits in one step of one rank, for runs under real launchers, where faults cannot be installed.

``objective.name=tests.distributed.held:Held``, and in the environment of the ranks ``JEPA_SCALE_TEST_HOLD=RANK:STEP:GATE`` with
the path of a ``processes.Gate``.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from jepa_scale.objectives.lm import LanguageModeling

OBJECTIVE = f"objective.name={__name__}:Held"
VARIABLE = "JEPA_SCALE_TEST_HOLD"


def held_in_step(rank: int, step: int, gate: Path) -> dict[str, str]:
    """Environment of a run whose rank waits in a step until the gate is open or a stop was requested.

    The step counts from 1 in the run's first process. A process that reaches it later does not wait.
    """
    return {VARIABLE: f"{rank}:{step}:{gate}"}


class Held(LanguageModeling):
    """Language modelling with the same loss, but with a wait."""

    _step = 0

    def loss(self, *args: Any) -> Any:
        rank, step, gate = os.environ[VARIABLE].split(":", 2)
        self._step += torch.is_grad_enabled()
        reached = Path(f"{gate}.reached")
        if os.environ.get("RANK", "0") == rank and self._step == int(step) and not reached.exists():
            reached.touch()
            while not (os.path.exists(f"{gate}.open") or asked_to_stop()):
                time.sleep(0.01)
        return super().loss(*args)


def asked_to_stop() -> bool:
    handler: Any = signal.getsignal(signal.SIGTERM)
    return bool(getattr(getattr(handler, "__self__", None), "requested", False))
