"""Tasks of the benchmark MTEB (Muennighoff et al., arXiv 2210.07316), by its package ``mteb``, for a run's texts → states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jepa_scale.utils.errors import InputError, one_line
from jepa_scale.utils.importing import imported

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask


@dataclass(frozen=True, slots=True)
class TaskScore:
    """Main score of a task on one of its splits; subsets, such as languages, have scores of their own."""

    task: str
    split: str
    subset: str
    metric: str
    value: float


def find_tasks(names: Sequence[str]) -> list[AbsTask]:
    """Return tasks by the names of mteb, or ``module:Class`` for one's own subclass of its tasks.

    Raises:
        InputError: mteb is not installed, or there is no such task.
    """
    try:
        import mteb
    except ImportError as error:
        raise InputError(
            f"--mteb: needs the package mteb ({error}); install it: pip install 'jepa-scale[embeddings]'"
        ) from None
    found = []
    for name in dict.fromkeys(names):
        if ":" in name:
            found.append(imported(name, "--mteb")())
            continue
        try:
            found.append(mteb.get_task(name))
        except KeyError as error:
            reason = str(error.args[0] if error.args else error).removeprefix("KeyError: ")
            raise InputError(
                f"--mteb {name}: is no task of mteb, nor module:Class of your own ({reason}); correct the name"
            ) from None
    return found


def evaluate_tasks(
    encode: Callable[[list[str]], np.ndarray], name: str, revision: str, tasks: Sequence[AbsTask], folder: Path
) -> list[TaskScore]:
    """Evaluate the tasks one after the other. Each result is saved as soon as it is there, in mteb's format.

    Texts get no prompt, as in ``jepa-scale encode``. They are compared by cosine where a task leaves that to the model.

    Args:
        encode: n texts → (n, d) float32. name, revision: of the model in the results.
        folder: where the results are written.

    Raises:
        InputError: a task's data cannot be loaded.
    """
    import mteb

    model = _encoder(encode, name, revision)
    scores = []
    for task in tasks:
        metadata = task.metadata
        try:
            task.load_data()
        except Exception as error:  # of the hub, the network, a script or a file: whatever a task's loader meets
            raise InputError(
                f"--mteb {metadata.name}: its data {metadata.dataset['path']!r} cannot be loaded ({one_line(error)}); load them once "
                "where the Hugging Face hub can be reached, or leave the task out"
            ) from None
        result = mteb.evaluate(
            model, task, cache=mteb.ResultCache(folder), overwrite_strategy="always", show_progress_bar=False
        )
        for each in result.task_results:
            for split, subsets in each.scores.items():
                for values in subsets:
                    value = float(values["main_score"])
                    scores.append(TaskScore(metadata.name, split, str(values["hf_subset"]), metadata.main_score, value))
    return scores


def _encoder(encode: Callable[[list[str]], np.ndarray], name: str, revision: str) -> Any:
    """Return what mteb takes for a model."""
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder

    class Encoder(AbsEncoder):
        mteb_model_meta = ModelMeta.create_empty({"name": name, "revision": revision})

        def __init__(self) -> None:
            pass

        def encode(self, inputs: Any, **_: Any) -> np.ndarray:
            return encode([text for batch in inputs for text in batch["text"]])

    return Encoder()
