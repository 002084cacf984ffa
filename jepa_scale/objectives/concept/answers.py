"""Answers of a ``concept`` model: predict a concept, then rank all known concepts by it or decode it to a name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_scale.distributed.comm import all_gather_rows, dp_rank, dp_size
from jepa_scale.objectives.answers import rank_of, sum_by_segment
from jepa_scale.objectives.tasks import Call
from jepa_scale.packing import PackedBatch, Segment, Views, pack


@dataclass(frozen=True, slots=True)
class NamePair:
    """Fact of two names without further fields, for encoding the names."""

    subject: tuple[int, ...]
    object: tuple[int, ...]


class NameViews(Protocol):
    """The part of the view transform that evaluation needs."""

    def names(self, fact: Any) -> Views: ...

    def question(self, fact: Any) -> Views: ...


class ConceptAnswerGenerator:
    """Answer generator that predicts in concept space.

    With ``snap``, it decodes the known concept nearest to the prediction, else the prediction. Known concepts are those of
    the names given to :meth:`prepare`; the right answer is used in no other way.
    """

    def __init__(
        self,
        call: Call,
        views: NameViews,
        decode_segment: Callable[[int, tuple[int, ...]], Segment],
        sequences: tuple[str, ...],
        snap: bool,
        chunk: int = 8192,
    ):
        self.call, self.views, self.decode_segment = call, views, decode_segment
        self.sequences, self.snap, self.chunk = sequences, snap, chunk
        self.own: dict[tuple[int, ...], int] = {}
        self.index = torch.empty(0)

    def prepare(self, answers: Sequence[tuple[int, ...]]) -> None:
        """Encode all names into ``index`` (M, dim), rows of unit norm. Each rank encodes its share."""
        self.own = {tuple(a): i for i, a in enumerate(answers)}
        share = -(-len(answers) // dp_size())
        mine = [answers[min(i, len(answers) - 1)] for i in range(dp_rank() * share, (dp_rank() + 1) * share)]
        parts = []
        for start in range(0, share, self.chunk):
            pairs = [NamePair(n, n) for n in mine[start : start + self.chunk]]
            parts.append(self.call("encode_names", self._pack([self.views.names(p) for p in pairs]))[:, 0])
        self.index = F.normalize(all_gather_rows(torch.cat(parts))[: len(answers)], dim=-1)

    def _pack(self, views: list[Views]) -> PackedBatch:
        return pack(views, self.sequences)

    def _predict(self, questions: Sequence[Any]) -> Tensor:
        return F.normalize(self.call("predict", self._pack([self.views.question(q) for q in questions])), dim=-1)

    def ranks(self, questions: Sequence[Any]) -> np.ndarray:
        right = torch.tensor([self.own[q.answer] for q in questions], device=self.index.device)
        return rank_of(self._predict(questions) @ self.index.T, right)

    def _concepts_to_decode(self, questions: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Return the concepts to decode, (n, dim), and the nearest known names, (n,)."""
        predicted = self._predict(questions)
        nearest = (predicted @ self.index.T).argmax(dim=-1)
        return (self.index[nearest] if self.snap else predicted), nearest

    def _logits(
        self, questions: Sequence[Any], texts: Sequence[tuple[int, ...]], concepts: Tensor, nearest: Tensor
    ) -> Any:
        views = [Views([self.decode_segment(q.mask, text)]) for q, text in zip(questions, texts, strict=True)]
        batch = self._pack(views)
        return batch, self.call("decode_logits", batch, concepts, nearest)

    def verbalize(self, questions: Sequence[Any], length: int) -> list[tuple[int, ...]]:
        concepts, nearest = self._concepts_to_decode(questions)
        generated: list[tuple[int, ...]] = [() for _ in questions]
        for _ in range(length):
            # The last token is a dummy label: it adds a labelled position for the next token's logits, but is not read.
            batch, logits = self._logits(questions, [(*s, 0) for s in generated], concepts, nearest)
            ends = torch.tensor(np.cumsum(batch.sequences["decode"].table.lengths) - 1, device=logits.device)
            following = logits[ends].argmax(dim=-1)[batch.segments["decode"].to(logits.device)].tolist()
            generated = [(*s, t) for s, t in zip(generated, following, strict=True)]
        return generated

    def nll(self, questions: Sequence[Any]) -> np.ndarray:
        concepts, nearest = self._concepts_to_decode(questions)
        batch, logits = self._logits(questions, [q.answer for q in questions], concepts, nearest)
        packed = batch.sequences["decode"]
        wanted = packed.labels[packed.labelled].to(logits.device)
        log_probs = torch.log_softmax(logits, dim=-1).gather(1, wanted[:, None])[:, 0]
        return -sum_by_segment(log_probs.cpu().double().numpy(), batch, "decode")
