"""``transformers.Trainer`` on the same model and samples: padded, or flattened by its packing collator."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from benchmarks.peer_programs.ours import Found, Samples, gradient_norm
from jepa_scale.packing import IGNORE


class Pad:
    """Rows of a batch to the longest of them, or to ``width`` tokens."""

    def __init__(self, width: int = 0) -> None:
        self.width = width

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        width = self.width or max(len(row["input_ids"]) for row in rows)
        filled = {"input_ids": (0, "input_ids"), "labels": (IGNORE, "labels")}
        batch = {
            name: torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])
            for name, (fill, key) in filled.items()
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return {**batch, "attention_mask": (torch.arange(width) < lengths[:, None]).long()}


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.marks.append(time.perf_counter())


class HuggingFaceTrainer:
    """``Trainer`` with its defaults, but for the optimizer's numbers, which are those of the run.

    Its optimizer begins anew each time that :meth:`steps` is called, which takes a step that is not counted.

    Args:
        collator: ``"flatten"`` = ``DataCollatorWithFlattening``: one row of all samples, told apart by their positions, of
            which transformers makes a dense block mask for ``sdpa``; else rows padded to so many tokens, 0 = the longest.
    """

    def __init__(self, samples: Samples, collator: str | int, scratch: Path) -> None:
        logging.set_verbosity_error()
        self.samples, self.done, self.scratch = samples, 0, scratch
        self.model = samples.fresh_model().backbone.decoder
        self.model.set_attn_implementation("sdpa")
        self.collate = DataCollatorWithFlattening() if collator == "flatten" else Pad(int(collator))

    def rows(self, step: int) -> list[dict[str, Any]]:
        return [{"input_ids": i.tolist(), "labels": y.tolist()} for i, y in self.samples.of_step(step)]

    def trainer(self, count: int) -> tuple[Trainer, _Clock]:
        optim, clock = self.samples.experiment.optim, _Clock()
        dataset = [row for step in range(self.done, self.done + count) for row in self.rows(step)]
        arguments = TrainingArguments(
            output_dir=str(self.scratch / "trainer"),
            per_device_train_batch_size=len(dataset) // count,
            max_steps=count,
            learning_rate=optim.lr,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            weight_decay=optim.weight_decay,
            max_grad_norm=optim.clip_norm,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        made = Trainer(self.model, arguments, self.collate, train_dataset=dataset, callbacks=[clock])  # type: ignore[arg-type]
        return made, clock

    def look(self, step: int) -> Found:
        self.model.train()
        loss = self.trainer(1)[0].compute_loss(self.model, self.collate(self.rows(step)))
        loss.backward()
        return Found(float(loss.detach()), gradient_norm(self.model.parameters()))

    def steps(self, count: int) -> list[float]:
        trainer, clock = self.trainer(count + 1)
        trainer.train()
        self.done += count
        return [after - before for before, after in zip(clock.marks, clock.marks[1:], strict=False)]
