"""Evaluation of conversations by generation: each last answer of the assistant is generated, saved and scored."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from jepa_scale.data.examples import Conversation
from jepa_scale.data.prepare.encoders.messages import is_trained
from jepa_scale.distributed.comm import ParallelContext, all_gather_object
from jepa_scale.evaluation.generations import generations_file
from jepa_scale.evaluation.options import DATABASE, ChatEvalOptions
from jepa_scale.metrics.text_match import Wanted, metric_of
from jepa_scale.models.generation.batches import Answer, answer, rounds
from jepa_scale.objectives.tasks import Call
from jepa_scale.utils.errors import DataError, InputError
from jepa_scale.utils.io import write_atomic
from jepa_scale.utils.logging import shows_progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Question:
    """The question of a row of a split.

    Attributes:
        row: its number in the split.
        prompt: (n,) token ids up to the start of the last answer, including the template's opening of the answer.
        asked: the user's last message.
        problem: why the question cannot be answered; '' if it can.
    """

    row: int
    prompt: np.ndarray
    asked: str
    wanted: Wanted
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Output:
    """Output of a generation.

    Attributes:
        run_dir: run whose folder ``generations`` gets the records; None = they are not saved.
        step: optimizer step, part of the file's name.
        progress: whether to log how many answers are done.
    """

    run_dir: Path | None = None
    step: int = 0
    progress: bool = False


@dataclass(frozen=True, slots=True)
class ChatTest:
    """Questions of every split, read before training begins, with the means to answer and score them.

    Attributes:
        decode: token ids → text, special tokens left out.
        stop: tokens that close an answer.
        positions: number of positions of the decoder; None = no limit.
    """

    options: ChatEvalOptions
    questions: Mapping[str, Sequence[Question]]
    decode: Callable[[list[int]], str]
    stop: tuple[int, ...]
    positions: int | None = None

    def run(self, call: Call, ranks: ParallelContext, output: Output) -> dict[str, dict[str, float]]:
        """Answer all questions. Collective; the same result on every rank.

        The result has, for each split, the mean of every metric value over the rows that all metrics can score,
        ``generated`` (number of answers), ``stopped`` (share of the answers that a closing token ended) and
        ``unscored`` (number of rows in no mean: no answer is wanted, or no answer could match it).
        """
        results = {}
        for split, questions in self.questions.items():
            if not questions:
                continue
            mine = list(self._answers(call, split, questions, ranks, output))
            records = [record for of_rank in all_gather_object(mine) for record in of_rank]
            records.sort(key=lambda record: record["row"])
            results[split] = summary(records)
            if ranks.is_main and output.run_dir is not None:
                save(generations_file(output.run_dir, output.step, split), records)
        return results

    def _answers(
        self, call: Call, split: str, questions: Sequence[Question], ranks: ParallelContext, output: Output
    ) -> Iterator[dict[str, Any]]:
        """Yield this rank's records as they are generated."""
        asked = [q for q in questions if not q.problem]
        prompts = [q.prompt for q in asked]
        size = self.options.generation_batch * ranks.dp_size
        plan = rounds([len(p) for p in prompts], self.options.max_new_tokens, self.positions, size)
        with Counter(f"generate {split}", len(asked), output.progress and ranks.is_main) as counter:
            for part in plan:
                for answered in answer(call, prompts, part, self.stop, ranks):
                    yield self._record(asked[answered.number], answered)
                counter.add(len(part.prompts))
        planned = {number for part in plan for number in part.prompts}
        without_room = [q for number, q in enumerate(asked) if number not in planned]
        without_prompt = [q for q in questions if q.problem]
        for question in without_room[ranks.dp_rank :: ranks.dp_size]:
            yield self._record(question, Answer(0, [], False))
        for question in without_prompt[ranks.dp_rank :: ranks.dp_size]:
            yield self._record(question, None)

    def _record(self, question: Question, answered: Answer | None) -> dict[str, Any]:
        text = None if answered is None else self.decode(answered.tokens)
        values: dict[str, float] = {}
        notes: dict[str, str] = {}
        problem = question.problem
        if text is not None:
            for name in self.options.metrics:
                try:
                    score = metric_of(name)(text, question.wanted)
                except DataError as error:
                    problem = problem or str(error)
                    continue
                values |= score.values
                notes |= {name: score.note} if score.note else {}
        return {
            "row": question.row,
            "prompt": question.asked,
            "wanted": question.wanted.answer,
            "generated": text,
            "tokens": None if answered is None else len(answered.tokens),
            "stopped": answered is not None and answered.stopped,
            "values": values,
            "notes": notes,
            "unscored": problem,
        }


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the metrics of a split from the records of its rows; see :meth:`ChatTest.run`."""
    scored = [r for r in records if not r["unscored"]]
    generated = [r for r in records if r["generated"] is not None]
    names = list(scored[0]["values"]) if scored else []
    found = {name: sum(r["values"][name] for r in scored) / len(scored) for name in names}
    if generated:
        found["stopped"] = sum(r["stopped"] for r in generated) / len(generated)
    return found | {"generated": float(len(generated)), "unscored": float(len(records) - len(scored))}


def save(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write the records. A full disk causes a warning only, and the evaluation goes on."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    except OSError as error:
        logger.warning(f"{path} was not written: {error.strerror or error}; the metrics do not need it")


# ---------------------------------------------------------------------------------------------- from rows to questions


def chosen(total: int, wanted: int) -> list[int]:
    """Return the numbers of ``wanted`` of ``total`` rows, evenly spread; 0 = all."""
    some = min(total, wanted or total)
    return [i * total // some for i in range(some)]


def question(example: Conversation, row: int, split: str, options: ChatEvalOptions) -> Question:
    """Return the question whose answer is the assistant's last message, of those that the data allow training on.

    Raises:
        InputError: naming ``eval.database`` or ``eval.database_id`` and the row: its SQLite file does not exist.
    """
    name = f"{split} row {row}"
    last = max(n for n, message in enumerate(example.messages) if is_trained(message))
    users = [message["content"] for message in example.messages[:last] if message["role"] == "user"]
    asked = users[-1] if users else ""
    database = _database(asked, name, options) if "sql_execution" in options.metrics else None
    wanted = Wanted(example.messages[last]["content"], name, dict.fromkeys(options.choices, ""), database)
    if last >= len(example.turns):
        return Question(row, example.tokens[:0], asked, wanted, f"{name}: data.max_length cuts it before its answer")
    prompt = example.tokens[: example.turns[last].start].copy()  # a view would keep the whole conversation
    return Question(row, prompt, asked, wanted, "" if len(prompt) else f"{name}: its answer has no prompt")


def _database(asked: str, name: str, options: ChatEvalOptions) -> Path:
    assert options.database
    path = options.database
    if DATABASE in path:
        match = re.search(options.database_id, asked)
        if match is None or not match[1] or Path(match[1]).name != match[1]:
            raise InputError(
                f"eval.database_id: matches no database name in {name}, {asked[:80]!r}; correct the expression or the row"
            )
        path = path.replace(DATABASE, match[1])
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"eval.database: {file} does not exist, but {name} needs it; correct the path")
    return file


# ---------------------------------------------------------------------------------------------- progress


class Counter:
    """Progress over ``total`` answers: a bar on a terminal, elsewhere a message at most every ``SECONDS`` seconds."""

    SECONDS = 30.0

    def __init__(self, name: str, total: int, shown: bool, stream: TextIO | None = None) -> None:
        self._name, self._total, self._shown = name, total, shown
        self._stream = stream if stream is not None else sys.stderr
        self._done, self._last_logged = 0, time.monotonic()
        self._bar: tqdm | None = None

    def __enter__(self) -> Counter:
        if self._shown and self._stream.isatty() and shows_progress():
            self._bar = tqdm(
                total=self._total,
                desc=self._name,
                unit="answer",
                file=self._stream,
                dynamic_ncols=True,
                leave=False,  # the run's own bar stays the last line
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, answers: int) -> None:
        self._done += answers
        if self._bar is not None:
            self._bar.update(answers)
        elif self._shown and time.monotonic() - self._last_logged >= self.SECONDS:
            self._last_logged = time.monotonic()
            logger.info(f"{self._name}  {self._done}/{self._total}")
