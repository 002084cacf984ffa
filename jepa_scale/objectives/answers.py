"""Answers of a model: by greedy generation, by an answer's likelihood, or by its rank among all answers.

A *question* is a prompt (token ids); an *answer* is a sequence of token ids. An objective whose model does not answer by
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
    """The part of an example that an answer generator needs: the prompt and the right answer."""

    @property
    def prompt(self) -> tuple[int, ...]: ...

    @property
    def answer(self) -> tuple[int, ...]: ...


class AnswerGenerator(Protocol):
    """Interface that evaluation uses to get a model's answers.

    All methods are collective: every rank calls them equally often, each with its own questions (at least one).
    """

    def prepare(self, answers: Sequence[tuple[int, ...]]) -> None:
        """Set all answers that :meth:`ranks` compares; called once before an evaluation, with the same list on every rank."""

    def verbalize(self, questions: Sequence[Question], length: int) -> list[tuple[int, ...]]:
        """Generate ``length`` tokens greedily for each question."""

    def nll(self, questions: Sequence[Question]) -> np.ndarray:
        """Return the negative log-likelihood of each question's whole answer: (n,) sums over its tokens, in nats."""

    def ranks(self, questions: Sequence[Question]) -> np.ndarray:
        """Return the rank of the right answer among all answers, (n,), 1 = best. Each tie adds one half to the rank."""


def pack_segments(segments: Sequence[Segment]) -> Any:
    """Pack segments that belong to no sample, in the order given."""
    return pack([Views([s]) for s in segments])


class LanguageModelAnswerGenerator:
    """Answer generator for a plain language model; sequences are packed, and generation is greedy."""

    def __init__(self, call: Call, chunk: int = 16384):
        self.call = call
        self.chunk = chunk  # segments in one packed forward while ranking
        self.answers: list[tuple[int, ...]] = []

    def prepare(self, answers: Sequence[tuple[int, ...]]) -> None:
        self.answers = list(answers)

    def _next_log_probs(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Return the log-probabilities of the token after each sequence, (n, V)."""
        batch = pack_segments([Segment(tokens=s, role="prompt") for s in sequences])
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
        batch = pack_segments(segments)
        log_probs = self.call("label_log_probs", batch).cpu().double().numpy()
        return -sum_by_segment(log_probs, batch)

    def ranks(self, questions: Sequence[Question]) -> np.ndarray:
        """Rank all answers by their exact joint likelihood; each distinct beginning of an answer is a branch of the question."""
        prefixes = sorted(
            {a[:t] for a in self.answers for t in range(len(a))}
        )  # the first is empty: the question itself
        number = {prefix: i for i, prefix in enumerate(prefixes)}
        steps = [(i, number[a[:t]], a[t]) for i, a in enumerate(self.answers) for t in range(len(a))]
        answer, row, token = torch.tensor(steps).T
        parts = []
        per_call = max(1, self.chunk // len(prefixes))
        for start in range(0, len(questions), per_call):
            some = questions[start : start + per_call]
            batch = pack([Views(_beginnings(q.prompt, prefixes)) for q in some])
            log_probs = torch.log_softmax(self.call("next_token_logits", batch), dim=-1)
            device = log_probs.device
            asked = [
                batch.segments[role].view(len(some), -1) for role in ("prompt", "prefix") if role in batch.segments
            ]
            rows = torch.cat(asked, dim=1)[:, row].to(device)  # (questions, steps)
            picked = log_probs[rows, token.to(device)].double()
            scores = picked.new_zeros(len(some), len(self.answers))
            parts.append(scores.index_add(1, answer.to(device), picked))
        own = {a: i for i, a in enumerate(self.answers)}
        right = torch.tensor([own[tuple(q.answer)] for q in questions], device=parts[0].device)
        return rank_of(torch.cat(parts), right)


def _beginnings(prompt: tuple[int, ...], prefixes: Sequence[tuple[int, ...]]) -> list[Segment]:
    """Return a question as a segment, and each beginning of an answer but the empty one as a branch of it."""
    branches = [Segment(prefix, "prefix", prefix=("prompt", len(prompt))) for prefix in prefixes if prefix]
    return [Segment(prompt, "prompt"), *branches]


def sum_by_segment(values: np.ndarray, batch: Any, sequence: str = "main") -> np.ndarray:
    """Sum the values of a packed sequence's labels by segment: (L,) → (n,), in the order in which the segments were packed."""
    packed = batch.sequences[sequence]
    ends = np.cumsum(packed.table.lengths)
    owner = np.searchsorted(ends, packed.labelled.cpu().numpy(), side="right")
    sums = np.bincount(owner, weights=values, minlength=len(ends))
    role = next(iter(batch.segments))
    return sums[batch.segments[role].cpu().numpy()]


def rank_of(scores: Tensor, right: Tensor) -> np.ndarray:
    """Return the rank of the right answer's score, (n,), 1 = highest; a tie counts half.

    Args:
        scores: (n, m).
        right: (n,) column of the right answer.
    """
    own = scores.gather(1, right[:, None])
    above = (scores > own).sum(dim=1).double()
    ties = (scores == own).sum(dim=1).double() - 1
    return (1 + above + 0.5 * ties).cpu().numpy()
