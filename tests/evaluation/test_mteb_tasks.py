"""``jepa-scale eval RUN --mteb``: scores of tasks made from local files, as plain code counts them from the run's rows."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

import jepa_scale
from jepa_scale.cli.main import main
from jepa_scale.data.sampling.rng import generator
from jepa_scale.evaluation.mteb_tasks import find_tasks
from jepa_scale.utils.errors import InputError
from tests.convert.runs import NATIVE, make_run
from tests.text_runs import WORDS, data_section, sentence, write_corpus

EXAMPLES = Path(__file__).resolve().parents[2] / "docs/examples"
TASKS = '''
import json
from pathlib import Path
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

HERE = Path(__file__).parent
REST = dict(reference=None, category="t2t", modalities=["text"], eval_splits=["test"], eval_langs=["eng-Latn"], date=None)
REST |= dict(domains=None, task_subtypes=None, license=None, annotations_creators=None, dialect=None, bibtex_citation=None)
REST |= dict(sample_creation=None, description="made from local files")


def metadata(name, folder, kind, score):
    return TaskMetadata(name=name, type=kind, main_score=score, dataset={"path": str(folder), "revision": "1"}, **REST)


class LocalPairs(AbsTaskSTS):
    """Read by the loader of mteb itself."""

    metadata = metadata("LocalPairs", HERE / "pairs", "STS", "cosine_spearman")


class LocalSearch(AbsTaskRetrieval):
    metadata = metadata("LocalSearch", HERE / "search.json", "Retrieval", "ndcg_at_10")

    def load_data(self, **_):
        content = json.loads((HERE / "search.json").read_text())
        rows = {name: Dataset.from_list(content[name]) for name in ("corpus", "queries")}
        self.dataset = {"default": {"test": {**rows, "relevant_docs": content["relevant"], "top_ranked": None}}}
        self.data_loaded = True


class Gone(AbsTaskSTS):
    metadata = metadata("Gone", HERE / "gone", "STS", "cosine_spearman")
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("mteb")
    folder = tmp_path_factory.mktemp("mteb")
    write_corpus(folder)
    make_run(folder, "run", NATIVE, data=data_section(folder), eval={}, objective={"name": "span"})
    make_run(folder, "facts", NATIVE)
    rng = generator("mteb")
    topics = list(WORDS)
    pairs = [
        {"sentence1": sentence(topics[i % 4], rng), "sentence2": sentence(topics[i % 3], rng), "score": float(i % 6)}
        for i in range(24)
    ]
    (folder / "pairs").mkdir()
    (folder / "pairs" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    corpus = [{"id": f"d{i}", "text": sentence(topics[i % 4], rng, 14), "title": ""} for i in range(20)]
    queries = [{"id": f"q{i}", "text": corpus[3 * i]["text"][: 12 + i]} for i in range(6)]
    relevant = {f"q{i}": {f"d{3 * i}": 1} for i in range(6)}
    (folder / "search.json").write_text(json.dumps({"corpus": corpus, "queries": queries, "relevant": relevant}))
    (folder / "local_tasks.py").write_text(TASKS)
    return folder


@pytest.fixture
def importable(folder, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    yield
    sys.modules.pop("local_tasks", None)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_scores_are_those_of_the_run_s_rows(folder, importable, capsys):
    run = jepa_scale.load(folder / "run")
    pairs = [json.loads(line) for line in (folder / "pairs" / "test.jsonl").read_text().splitlines()]
    one, two = (unit(run.encode([row[name] for row in pairs])) for name in ("sentence1", "sentence2"))
    spearman = spearmanr((one * two).sum(axis=1), [row["score"] for row in pairs])[0]
    search = json.loads((folder / "search.json").read_text())
    documents, asked = (unit(run.encode([row["text"] for row in search[name]])) for name in ("corpus", "queries"))
    order = np.argsort(-asked @ documents.T, axis=1)
    ranks = np.array([1 + order[i].tolist().index(3 * i) for i in range(6)])
    ndcg = np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0).mean()
    assert 0.05 < abs(spearman) < 0.95 and 0 < ndcg < 1  # else anything could be right

    assert main(["eval", str(folder / "run"), "--mteb", "local_tasks:LocalPairs", "local_tasks:LocalSearch"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0].endswith("step_00000007")
    found = {m[1]: float(m[2]) for m in re.finditer(r"(\w+) test: \w+ (-?[\d.]+)\n", said)}
    assert found == {
        "LocalPairs": pytest.approx(spearman, abs=1e-4),
        "LocalSearch": pytest.approx(ndcg, abs=1e-4),
    }
    saved = {path.stem: json.loads(path.read_text()) for path in (folder / "run" / "mteb").rglob("Local*.json")}
    assert saved.keys() == found.keys()
    assert saved["LocalPairs"]["scores"]["test"][0]["cosine_spearman"] == pytest.approx(spearman, abs=1e-5)
    assert "step_00000007" in str(next((folder / "run" / "mteb").rglob("LocalPairs.json")))


@pytest.mark.parametrize(
    ("run", "arguments", "message"),
    [
        ("run", ["--mteb", "STS_12"], "--mteb STS_12: is no task of mteb, nor module:Class of your own ('STS_12' not found. Did"),
        ("run", ["--mteb", "nowhere:Task"], "--mteb: 'nowhere:Task' cannot be imported (No module"),
        ("run", ["--mteb", "local_tasks:Absent"], "has no attribute 'Absent'"),
        ("run", ["eval.max_samples=3", "--mteb", "local_tasks:LocalPairs"], "overrides have no meaning for --mteb"),
        ("nothing", ["--mteb", "local_tasks:LocalPairs"], "not a run directory"),
        ("facts", ["--mteb", "local_tasks:LocalPairs"], "the run's data have no tokenizer, and the tasks have texts"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_before_any_work(folder, importable, capsys, run, arguments, message):
    assert main(["eval", str(folder / run), *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out
    assert not (folder / "facts" / "mteb").exists()


def test_data_that_are_not_there_are_named(folder, importable, capsys):
    assert main(["eval", str(folder / "run"), "--mteb", "local_tasks:Gone"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"--mteb Gone: its data '.*gone' cannot be loaded \(.+\); load them once where", error)


def test_without_the_package_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(InputError, match=r"needs the package mteb .*pip install 'jepa-scale\[embeddings\]'"):
        find_tasks(["STS12"])


def test_a_task_that_is_named_twice_is_evaluated_once(folder, importable):
    assert len(find_tasks(["local_tasks:LocalPairs", "local_tasks:LocalPairs"])) == 1


def test_the_example_makes_tasks_of_labelled_passages(folder, importable, monkeypatch, tmp_path, capsys):
    """``docs/examples/section_tasks.py``: which halves belong together, by the rows of the run."""
    rng = generator("sections")
    rows = [{"text": sentence(topic, rng, 20), "label": topic} for topic in list(WORDS)[:3] for _ in range(5)]
    file = tmp_path / "sections.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("SECTIONS", str(file))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = ["section_tasks:SectionRetrieval", "section_tasks:SectionSTS"]
    try:
        assert main(["eval", str(folder / "run"), "--mteb", *names]) == 0
        tasks = sys.modules["section_tasks"]
        pairs = tasks.SectionSTS()
        pairs.load_data()
    finally:
        sys.modules.pop("section_tasks", None)
    found = {m[1]: float(m[2]) for m in re.finditer(r"(\w+) test: \w+ (-?[\d.]+)\n", capsys.readouterr().out)}

    encode = jepa_scale.load(folder / "run").encode
    words = [row["text"].split() for row in rows]
    first, second = [" ".join(w[:10]) for w in words], [" ".join(w[10:]) for w in words]
    similar = unit(encode(first)) @ unit(encode(second)).T
    ranks = 1 + (similar > similar.diagonal()[:, None]).sum(axis=1)
    assert found["SectionRetrieval"] == pytest.approx(np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0).mean(), abs=1e-4)
    table = pairs.dataset["test"].to_list()
    where = [(first.index(row["sentence1"]), second.index(row["sentence2"])) for row in table]
    labels = [row["label"] for row in rows]
    assert [row["score"] for row in table] == [2.0 if i == j else float(labels[i] == labels[j]) for i, j in where]
    assert len(table) == 3 * len(rows)
    assert found["SectionSTS"] == pytest.approx(
        spearmanr([similar[at] for at in where], [row["score"] for row in table])[0], abs=1e-4
    )
