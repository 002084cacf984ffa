"""Going on from a checkpoint: what has changed since it was saved, and the restoring of the run's state."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jepa_scale import checkpoint
from jepa_scale.checkpoint import Manifest
from jepa_scale.models.frozen.base import confirmed
from jepa_scale.training.build import TrainingComponents
from jepa_scale.utils.errors import InputError

logger = logging.getLogger(__name__)

REFUSED = ("model.", "objective.")
"""Keys that change what the model computes or learns. Their change has to be allowed."""
UNREPORTED = ("run.", "log.", "checkpoint.", "eval.")
"""Keys that leave training as it is."""


def restore(run: TrainingComponents, found: Path, manifest: Manifest) -> None:
    """Restore the state of a run from a checkpoint that was verified. Collective.

    Args:
        manifest: of the checkpoint. The run was built with it, so its sampler is at the checkpoint's position in the data.

    Raises:
        InputError: the checkpoint is of another model or objective, or of other settings (:func:`check_changes`).
    """
    changes = check_changes(run, found, manifest)
    load(run, found, manifest)
    if run.engine.loss_scale and "loss_scale" in manifest.state:
        run.engine.loss_scale.load_state(manifest.state["loss_scale"])
    if run.ranks.is_main:
        if manifest.state["data"]["fingerprint"] != run.sampler.fingerprint:
            logger.warning(
                f"data: changed since {found.name}, and go on at the same count of samples; some may be seen again, "
                "others never"
            )
        if changes:
            left = max(0, run.steps - manifest.step)
            logger.warning(f"{found.name} is resumed with other settings: {_listed(changes)}; {left:,} steps are left")


def load(run: TrainingComponents, found: Path, manifest: Manifest) -> None:
    """Load the tensors of a checkpoint. Collective.

    Frozen weights that it leaves out are those of the run's base. If it holds them, the run's next checkpoints hold them too.

    Raises:
        InputError: the checkpoint is of another model or objective, or its adapters are of other weights than the run's base.
    """
    run.base = confirmed(run.base, manifest.state, found)
    if run.base is None and run.experiment.model.load_in_4bit:
        raise InputError(
            f"{found}: holds the frozen weights itself, which model.load_in_4bit cannot replace; convert it to Hugging Face format, and give "
            "that as model.pretrained of a new run"
        )
    checkpoint.load(found, run.parts)


def check_changes(run: TrainingComponents, found: Path, manifest: Manifest) -> dict[str, tuple[Any, Any]]:
    """Compare a run's settings with those that a checkpoint was trained with.

    Returns:
        Key → (value then, value now) of the settings that differ and may.

    Raises:
        InputError: the model or the objective differs, and ``checkpoint.resume_with_changes`` does not allow it.
    """
    experiment = run.experiment
    changes = differing(_flat(manifest.config), _flat(experiment.resolved()))
    if "model" in manifest.state:  # checkpoints of 0.1 have the config alone
        changes = {key: pair for key, pair in changes.items() if not key.startswith("model.")}
        changes |= differing(manifest.state["model"], run.model_fingerprint)
    changes = {key: pair for key, pair in changes.items() if not key.startswith(UNREPORTED)}
    allowed = experiment.checkpoint.resume_with_changes
    refused = {
        key: pair
        for key, pair in changes.items()
        if key.startswith(REFUSED) and not any(f"{key}.".startswith(f"{name}.") for name in allowed)
    }
    if refused:
        raise InputError(
            f"{found}: was trained with other settings, which change what the model computes or learns: "
            f"{_listed(refused)}; set them back, or allow this with checkpoint.resume_with_changes=[{','.join(refused)}]"
        )
    return changes


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return key → (value then, value now) of the keys that both have, with different values.

    A key that only one of them has is of another version or another class, whose name differs then.
    """
    return {key: (then[key], now[key]) for key in then if key in now and then[key] != now[key]}


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``section.key`` → value."""
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in dict(keys).items()}


def _listed(changes: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key} {now} (was {then})" for key, (then, now) in changes.items())
