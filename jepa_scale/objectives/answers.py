"""How a model answers a question: by speaking, by the likelihood of an answer, by its rank among all answers.

A *question* is a prompt (token ids); an *answer* is a run of token ids. An objective that answers in another way than
plain next-token prediction supplies its own :class:`AnswerGenerator`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from jepa_scale.objectives.tasks import Call
from jepa_scale.packing import IGNORE, Segment, Views, pack


class Question(Protocol):
    """What an answerer needs of an example: the prompt and the right answer."""

    @property
    def prompt(self) -> tuple[int, ...]: ...

    @property
    def answer(self) -> tuple[int, ...]: ...


class AnswerGenerator(Protocol):
    """All methods are collective: every rank calls them equally often, each with its own questions (at least one)."""

    def prepare(self, answers: Sequence[tuple[int, ...]]) -> None:
        """Once before an evaluation: all answers that :meth:`ranks` compares with. The same list on every rank."""

    def verbalize(self, questions: Sequence[Question], length: int) -> list[tuple[int, ...]]:
        """Greedy generation of ``length`` tokens for each question."""

    def nll(self, questions: Sequence[Question]) -> np.ndarray:
        """(n,) negative log-likelihood, in nats, of each question's whole answer, spoken token by token."""

    def ranks(self, questions: Sequence[Question]) -> np.ndarray:
        """(n,) rank of the right answer among all answers, 1 = best; ties count against the right one by half."""


def stream_of(segments: Sequence[Segment]) -> Any:
    """Pack segments that belong to no sample, in the order given."""
    return pack([Views([s]) for s in segments])


class LanguageModelAnswerGenerator:
    """Answers with a plain language model, packed and greedy."""

    def __init__(self, call: Call, chunk: int = 16384):
        self.call = call
        self.chunk = chunk  # segments in one packed forward while ranking
        self.answers: list[tuple[int, ...]] = []

    def prepare(self, answers: Sequence[tuple[int, ...]]) -> None:
        self.answers = list(answers)

    def _next_log_probs(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """(n, V) log-probabilities of the token after each sequence."""
        batch = stream_of([Segment(tokens=s, role="prompt") for s in sequences])
        logits = self.call("next_token_logits", batch)
        return torch.log_softmax(logits, dim=-1)[batch.segments["prompt"].to(logits.device)]

    def verbalize(self, questions: Sequence[Question], length: int) -> list[tuple[int, ...]]:
        sequences = [list(q.prompt) for q in questions]
        for _ in range(length):
            following = self._next_log_probs(sequences).argmax(dim=-1).tolist()
            sequences = [[*s, t] for s, t in zip(sequences, following, strict=True)]
        return [tuple(s[len(q.prompt) :]) for s, q in zip(sequences, questions, strict=True)]

    def nll(self, questions: Sequence[Question]) -> np.ndarray:
        segments = []
        for q in questions:
            tokens, answer = [*q.prompt, *q.answer[:-1]], q.answer
            segments.append(Segment(tokens, "fact", labels=[IGNORE] * (len(q.prompt) - 1) + list(answer)))
        batch = stream_of(segments)
        log_probs = self.call("label_log_probs", batch).cpu().double().numpy()
        return -sum_by_segment(log_probs, batch)

    def ranks(self, questions: Sequence[Question]) -> np.ndarray:
        """Exact joint likelihood of every answer: one branch for each distinct prefix of an answer."""
        own = {a: i for i, a in enumerate(self.answers)}
        depth = max(len(a) for a in self.answers)
        device_scores: Tensor | None = None
        for t in range(depth):
            prefixes = sorted({a[:t] for a in self.answers if len(a) > t})
            where = {p: i for i, p in enumerate(prefixes)}
            rows = torch.tensor([where[a[:t]] if len(a) > t else 0 for a in self.answers])
            tokens = torch.tensor([a[t] if len(a) > t else 0 for a in self.answers])
            real = torch.tensor([len(a) > t for a in self.answers])
            parts = []
            per_call = max(1, self.chunk // len(prefixes))
            for start in range(0, len(questions), per_call):
                some = questions[start : start + per_call]
                log_probs = self._next_log_probs([[*q.prompt, *p] for q in some for p in prefixes])
                log_probs = log_probs.view(len(some), len(prefixes), -1)
                picked = log_probs[:, rows.to(log_probs.device), tokens.to(log_probs.device)]  # (questions, answers)
                parts.append(torch.where(real.to(picked.device), picked, 0.0))
            scores = torch.cat(parts).double()
            device_scores = scores if device_scores is None else device_scores + scores
        assert device_scores is not None
        right = torch.tensor([own[tuple(q.answer)] for q in questions], device=device_scores.device)
        return rank_of(device_scores, right)


def sum_by_segment(values: np.ndarray, batch: Any, stream: str = "main") -> np.ndarray:
    """(L,) values of a stream's labels → (n,) sums, one for each segment in the order that they were given in."""
    packed = batch.streams[stream]
    ends = np.cumsum(packed.table.lengths)
    owner = np.searchsorted(ends, packed.labelled.cpu().numpy(), side="right")
    sums = np.bincount(owner, weights=values, minlength=len(ends))
    role = next(iter(batch.segments))
    return sums[batch.segments[role].cpu().numpy()]


def rank_of(scores: Tensor, right: Tensor) -> np.ndarray:
    """(n, m) scores, (n,) column of the right one → (n,) rank, 1 = highest; a tie counts half."""
    own = scores.gather(1, right[:, None])
    above = (scores > own).sum(dim=1).double()
    ties = (scores == own).sum(dim=1).double() - 1
    return (1 + above + 0.5 * ties).cpu().numpy()
