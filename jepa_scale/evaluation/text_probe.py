"""Probes at every evaluation: how well labels can be predicted from the states of labelled texts."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_scale.config.loading import find_file
from jepa_scale.data.labelled import LabelledTexts, read_labelled
from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.data.texts import Texts, tokenize
from jepa_scale.distributed.comm import ParallelContext, all_reduce_sum, broadcast_object, rank
from jepa_scale.evaluation.encode import encode_texts
from jepa_scale.evaluation.options import EvaluationOptions, PerplexityOptions
from jepa_scale.metrics.geometry import uniformity
from jepa_scale.metrics.probe import Labelled, accuracy, linear_probe, majority, neighbour_predictions
from jepa_scale.metrics.spectrum import effective_rank
from jepa_scale.models.backbone import Backbone
from jepa_scale.objectives.base import Objective
from jepa_scale.objectives.tasks import Call
from jepa_scale.utils.errors import InputError

logger = logging.getLogger(__name__)

SPLIT = "probe"
"""Name of the metrics' split."""
TOKENS = 4096
"""Greatest number of token states measured, evenly spread over all texts."""
ROWS = 4096
"""Greatest number of texts among which pairs are compared, evenly spread."""


@dataclass(frozen=True, slots=True)
class ProbeTest:
    """Labelled texts, read before the training begins.

    Attributes:
        starts: (n + 1,) int64, index of each text's first state in the concatenated states of all texts.
    """

    labelled: LabelledTexts
    texts: Texts
    starts: np.ndarray
    neighbours: int
    micro_tokens: int

    def run(self, objective: Objective, call: Call, ranks: ParallelContext) -> dict[str, float]:
        """Encode all texts with the objective's own pooling, and probe them. Collective; the same result on every rank.

        The metrics are ``knn_accuracy`` and ``probe_accuracy`` (see :mod:`jepa_scale.metrics.probe`), ``chance`` (the
        majority's share), ``effective_rank`` of the pooled states and ``effective_rank_tokens`` of token
        states, ``uniformity`` of the pooled states, ``texts`` and ``classes``. A metric of states that are not finite
        is NaN.
        """
        pooled, tokens = self.states(objective, call, ranks)
        return broadcast_object(self.measure(pooled, tokens) if ranks.is_main else None)

    def states(self, objective: Objective, call: Call, ranks: ParallelContext) -> tuple[Tensor, Tensor]:
        """Return (n, d) pooled and (m, d) token states, fp32, whole on every rank. Collective."""
        n, total = len(self.texts), int(self.starts[-1])
        wanted = np.arange(min(TOKENS, total)) * total // min(TOKENS, total)  # indices into the concatenated states
        firsts = np.searchsorted(wanted, self.starts)
        pooled = tokens = torch.zeros(0)
        for part in encode_texts(objective, call, self.texts, self.micro_tokens, ranks):
            if not len(pooled):
                pooled = part.pooled.new_zeros(n, part.pooled.shape[1])
                tokens = part.pooled.new_zeros(len(wanted), part.pooled.shape[1])
            pooled[part.numbers.to(pooled.device)] = part.pooled
            for number, states in zip(part.numbers.tolist(), part.tokens, strict=True):
                some = slice(firsts[number], firsts[number + 1])
                tokens[some] = states[torch.from_numpy(wanted[some] - self.starts[number]).to(states.device)]
        return all_reduce_sum(pooled), all_reduce_sum(tokens)  # each row comes from one rank and is zero on the others

    def measure(self, pooled: Tensor, tokens: Tensor) -> dict[str, float]:
        """Return the metrics of (n, d) pooled and (m, d) token states."""
        found = self.labelled
        labels = torch.from_numpy(found.labels).to(pooled.device)
        trains = torch.from_numpy(found.train).to(pooled.device)
        train, test = (Labelled(pooled[which], labels[which]) for which in (trains, ~trains))
        nearest = linear = spread = float("nan")
        if bool(pooled.isfinite().all()):
            nearest = accuracy(neighbour_predictions(train, test.rows, self.neighbours), test.labels)
            linear = accuracy(linear_probe(train, len(found.classes)).predictions(test.rows), test.labels)
            some = torch.arange(min(ROWS, len(pooled)), device=pooled.device) * len(pooled) // min(ROWS, len(pooled))
            spread = float(uniformity(pooled[some]))
        return {
            "knn_accuracy": nearest,
            "probe_accuracy": linear,
            "chance": majority(train, test),
            "effective_rank": float(effective_rank(pooled)),
            "effective_rank_tokens": float(effective_rank(tokens)),
            "uniformity": spread,
            "texts": float(len(labels)),
            "classes": float(len(found.classes)),
        }


def probe_test(options: EvaluationOptions, data: Any, backbone: Backbone, objective: Objective) -> ProbeTest | None:
    """Return the texts of ``eval.probe``; None if there are none.

    Raises:
        InputError: naming the key or the row: there is no such file, a row cannot be used or is too long for the model, the
            data have no tokenizer.
    """
    if not isinstance(options, PerplexityOptions) or options.probe is None:
        return None
    if getattr(data, "tokenizer", None) is None:
        raise InputError(
            "eval.probe: the data have no tokenizer to encode texts with; prepare the data again or remove the key"
        )
    if SPLIT in data.splits:
        raise InputError(
            f"eval.probe: the data have a split {SPLIT!r}, the name of the probe's metrics; rename the split"
        )
    labelled = read_labelled(find_file(options.probe, "eval.probe"), options.probe_test_fraction)
    texts = tokenize(
        data.load_tokenizer(),
        labelled.texts,
        data.vocab_size,
        objective.most_text_tokens(backbone),
        lambda number: f"eval.probe: {labelled.where[number]}",
        hint="shorten it",
    )
    if labelled.left_out and rank() == 0:
        logger.warning(
            f"eval.probe: {labelled.left_out} rows are left out: their labels have no other text to test with"
        )
    seen = [len(objective.text_views(texts[n], SampleRNG(0, 0, 0, n)).segments[0].tokens) for n in range(len(texts))]
    return ProbeTest(
        labelled, texts, np.cumsum([0, *seen], dtype=np.int64), options.probe_neighbours, options.micro_tokens
    )
