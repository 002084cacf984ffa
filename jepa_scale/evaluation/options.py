"""The keys of ``eval:``; ``data.source`` decides which of them apply."""

from __future__ import annotations

import re

from pydantic import Field, model_validator

from jepa_scale.config.schema import Section
from jepa_scale.config.values import LocalPath, Text
from jepa_scale.data.base import Evaluation
from jepa_scale.metrics.text_match import METRICS, metric_of
from jepa_scale.utils.errors import suggestion

DATABASE = "{db_id}"


class EvalOptions(Section):
    """Keys of ``eval:`` for facts."""

    max_facts: int = Field(3000, ge=0, description="Facts of a split to evaluate, a fixed random choice; 0 = all.")
    rank_facts: int = Field(512, ge=0, description="Facts of these that are also ranked against all entities; 0 = all.")
    batch_size: int = Field(512, ge=1, description="Questions in one forward on a rank.")


class PerplexityOptions(Section):
    """Keys of ``eval:`` for text and chat."""

    micro_tokens: int = Field(8192, ge=1, description="Tokens in one forward on a rank.")
    max_samples: int = Field(0, ge=0, description="Samples of a split to evaluate, evenly spread; 0 = all.")
    probe: LocalPath | None = Field(
        None,
        description="JSONL file with the keys text, label and, by option, split (train or test): probes predict the labels.",
    )
    probe_test_fraction: float = Field(
        0.3, gt=0, lt=1, description="Share of each label's texts for testing, if the rows have no split."
    )
    probe_neighbours: int = Field(10, ge=1, description="Nearest training texts that vote on a test text's label.")
    lm_eval: list[Text] = Field(
        default_factory=list,
        description="Tasks of lm-eval, its groups or tags by name, or your own as .yaml files; their metrics are the split lm_eval.",
    )
    lm_eval_every: int = Field(
        1, ge=1, description="Run these tasks at every so many evaluations; at the end they always run."
    )
    lm_eval_limit: int = Field(0, ge=0, description="Examples of a task to evaluate, the first ones; 0 = all.")


class ChatEvalOptions(PerplexityOptions):
    """Keys of ``eval:`` for chat."""

    metrics: list[str] = Field(
        default_factory=list,
        description=f"Metrics of generated answers: {', '.join(METRICS)}, or module:function of your own; empty = generate nothing.",
    )
    max_new_tokens: int = Field(128, ge=1, description="Most tokens of an answer, the closing token included.")
    max_generations: int = Field(0, ge=0, description="Rows of a split to answer, evenly spread; 0 = all.")
    generation_batch: int = Field(64, ge=1, description="Answers generated together on a rank.")
    choices: list[Text] = Field(default_factory=list, description="multiple_choice: the labels, e.g. [A, B, C, D].")
    database: LocalPath | None = Field(
        None, description="sql_execution: path of the SQLite file; {db_id} stands for the name found by database_id."
    )
    database_id: str = Field(
        r"For db_id:\[([^\]/\\]+)\]",
        description="sql_execution: regular expression whose one group matches the database's name in the user's message.",
    )

    @model_validator(mode="after")
    def _complete(self) -> ChatEvalOptions:
        for name in self.metrics:
            if name not in METRICS and ":" not in name:
                hint = suggestion(name, METRICS, f"known: {', '.join(METRICS)}, or module:function of your own")
                raise ValueError(f"metrics: unknown metric {name!r}; {hint}")
            metric_of(name)
        short = [name.rpartition(":")[2] for name in self.metrics]
        if twice := next((name for name in short if short.count(name) > 1), None):
            raise ValueError(f"metrics: {twice!r} is there twice; give each once, and functions names of their own")
        if "multiple_choice" in self.metrics and not self.choices:
            raise ValueError("choices: multiple_choice needs the labels, e.g. [A, B, C, D]")
        if len(set(self.choices)) < len(self.choices) or not all(label.strip() for label in self.choices):
            raise ValueError(f"choices: labels must differ and not be empty, got {self.choices}")
        if "sql_execution" in self.metrics and not self.database:
            raise ValueError(f"database: sql_execution needs an SQLite file, e.g. databases/{DATABASE}.sqlite")
        try:
            groups = re.compile(self.database_id).groups
        except re.error as error:
            raise ValueError(f"database_id: is no regular expression: {error}; correct it") from None
        if groups != 1:
            raise ValueError(f"database_id: must have one group, for the database's name, but has {groups}")
        return self


EvaluationOptions = EvalOptions | PerplexityOptions | ChatEvalOptions
"""The keys of ``eval:``: which class applies follows from ``data.source``."""

OPTIONS: dict[Evaluation, type[EvaluationOptions]] = {
    "answers": EvalOptions,
    "perplexity": PerplexityOptions,
    "chat": ChatEvalOptions,
}
"""Name of an evaluation (``DataOptions.evaluation``) → the keys of its ``eval:``."""
