"""Two tasks of MTEB made from passages with a label: `SectionRetrieval` finds a passage's second half, `SectionSTS` ranks pairs of halves.

    jepa-scale data sections python_docs --out sections.jsonl
    SECTIONS=sections.jsonl PYTHONPATH=docs/examples jepa-scale eval RUN --mteb section_tasks:SectionRetrieval section_tasks:SectionSTS

Nothing is downloaded and nobody has judged the pairs: what is alike is known from where the passages are from.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

FILE = Path(os.environ.get("SECTIONS", "sections.jsonl"))


def halves() -> list[tuple[str, str, str]]:
    """Return the label, the first and the second half of the words of each passage."""
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    words = [(row["label"], row["text"].split()) for row in rows]
    return [(label, " ".join(w[: len(w) // 2]), " ".join(w[len(w) // 2 :])) for label, w in words]


def about(name: str, kind: Any, score: str) -> TaskMetadata:
    unknown = ("reference", "date", "domains", "task_subtypes", "license", "annotations_creators", "dialect")
    return TaskMetadata(
        name=name,
        type=kind,
        main_score=score,
        description="made from labelled passages of a local corpus",
        dataset={"path": str(FILE), "revision": "1"},
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        sample_creation=None,
        bibtex_citation=None,
        **dict.fromkeys(unknown),
    )


class SectionRetrieval(AbsTaskRetrieval):
    """The inverse cloze task (Lee et al. 2019, arXiv 1906.00300): a query is a first half, and its own second half is to be found."""

    metadata = about("SectionRetrieval", "Retrieval", "ndcg_at_10")

    def load_data(self, **_: Any) -> None:
        parts = halves()
        self.dataset = {
            "default": {
                "test": {
                    "corpus": Dataset.from_list(
                        [{"id": f"d{i}", "text": b, "title": ""} for i, (_, _, b) in enumerate(parts)]
                    ),
                    "queries": Dataset.from_list([{"id": f"q{i}", "text": a} for i, (_, a, _) in enumerate(parts)]),
                    "relevant_docs": {f"q{i}": {f"d{i}": 1} for i in range(len(parts))},
                    "top_ranked": None,
                }
            }
        }
        self.data_loaded = True


class SectionSTS(AbsTaskSTS):
    """Pairs of a first and a second half: 2 = of one passage, 1 = of two passages of a section, 0 = of two sections; equally many."""

    metadata = about("SectionSTS", "STS", "cosine_spearman")
    min_score, max_score = 0, 2

    def load_data(self, **_: Any) -> None:
        rng, parts, pairs = random.Random(0), halves(), []
        for i, (label, first, second) in enumerate(parts):
            same = [b for j, (other, _, b) in enumerate(parts) if other == label and j != i]
            different = [b for other, _, b in parts if other != label]
            pairs.append({"sentence1": first, "sentence2": second, "score": 2.0})
            pairs += [{"sentence1": first, "sentence2": rng.choice(same), "score": 1.0}] if same else []
            pairs += [{"sentence1": first, "sentence2": rng.choice(different), "score": 0.0}] if different else []
        self.dataset = DatasetDict({"test": Dataset.from_list(pairs)})
        self.data_loaded = True
