"""The scripts of the gallery, from end to end at small size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.processes import HANG

REPOSITORY = Path(__file__).resolve().parent.parent
GALLERY = REPOSITORY / "scripts" / "gallery"
pytestmark = pytest.mark.matrix


def run(tmp_path, *command, **variables):
    """What it printed; run elsewhere, as a user may, with nothing of ours in the environment but the cache."""
    environment = {**os.environ, "JEPA_SCALE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def splits(run_dir):
    return {json.loads(line)["split"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Where the fine-tuning script left its files, and what it said."""
    folder = tmp_path_factory.mktemp("tuned")
    return folder, run(folder, sys.executable, GALLERY / "finetune.py", "--small", "--out", "made")


def test_a_local_model_is_fine_tuned_and_answers_in_transformers(tuned):
    folder, said = tuned
    for name in ("lm", "two_view"):
        assert "eval/valid" in splits(folder / "made" / name)
    assert (folder / "made" / "hf" / "model.safetensors").is_file()
    alone = said[said.index("in transformers, without jepa_scale:") :]
    asked = json.loads((folder / "made" / "test.jsonl").read_text().splitlines()[0])["messages"]
    assert asked[0]["content"] in alone and asked[1]["content"] in alone and alone.count("  right  ") == 3


def test_your_own_model_and_conversations_are_taken_instead(tuned):
    folder, _ = tuned
    given = ["--model", "made/model", "--train", "made/train.jsonl", "--test", "made/test.jsonl"]
    given += ["data.max_length=128", "log.report=false"]
    run(folder, sys.executable, GALLERY / "finetune.py", "--small", "--out", "mine", *given)
    config = (folder / "mine" / "two_view" / "config.yaml").read_text()
    assert "rank: 16" in config and "lr: 2.0e-05" in config  # LoRA, at its rate


def test_a_span_encoder_is_trained_and_probed(tmp_path):
    less = ["model.hidden_size=32", "model.num_hidden_layers=1", "data.vocab_size=512", "log.report=false"]
    said = run(tmp_path, sys.executable, GALLERY / "span_probe.py", "--small", "--out", "made", *less)
    for name in ("untrained", "lm", "span"):
        assert "eval/probe" in splits(tmp_path / "made" / name)
    assert "probe/knn_accuracy" in said and "the nearest passage:" in said


@pytest.mark.skipif(
    not (REPOSITORY / ".venv" / ".installed").is_file(), reason="the quick start would install into .venv"
)
def test_the_quick_start_compares_a_language_model_and_a_jepa(tmp_path):
    small = ["train.steps=2", "train.epochs=0", "train.batch_size=16", "train.eval_every=0", "data.workers=0"]
    small += ["eval.max_facts=4", "eval.rank_facts=4"]
    said = run(tmp_path, "bash", REPOSITORY / "scripts" / "quickstart.sh", *small, RUNS=str(tmp_path / "runs"))
    assert (tmp_path / "runs" / "reversal" / "report.html").is_file()
    assert "reversal_lm" in said and "reversal" in said.replace("reversal_lm", "")
