"""The evaluation harness (lm-eval, from PyPI) scores an exported model, on a task of ten rows made here."""

from __future__ import annotations

import json

import pytest
import torch

from jepa_scale.convert.to_hf import ExportOptions, export
from jepa_scale.data import load_data, parse_data
from jepa_scale.data.prepare.encoders.tokenizer import load_tokenizer
from tests.convert.runs import MODELS, logits, make_run, without_jepa_scale

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate", reason="lm-eval's models of transformers need lm_eval[hf]")

WORDS = ["red", "blue", "green", "grey", "white"]
HARNESS = """
import json
import lm_eval
from lm_eval.tasks import TaskManager

manager = TaskManager(include_path=sys.argv[1], include_defaults=False)
results = lm_eval.simple_evaluate(
    model="hf",
    model_args={"pretrained": sys.argv[2], "trust_remote_code": True, "dtype": "float32"},
    tasks=["colours"],
    device="cpu",
    batch_size=4,
    task_manager=manager,
    bootstrap_iters=0,
)
scores = [[r[0] for r in s["filtered_resps"]] for s in sorted(results["samples"]["colours"], key=lambda s: s["doc_id"])]
print(json.dumps({"metrics": results["results"]["colours"], "scores": scores}))
"""


@pytest.mark.matrix  # logits and tokens as transformers gives them: test_to_hf.py; here the harness as a whole
@pytest.mark.parametrize("name", ["native", "native_tied"])
def test_harness_gives_the_model_s_own_log_likelihoods(tmp_path, name):
    rows = [
        {"question": f"the {WORDS[i % 5]} fox likes", "choices": [" " + w for w in WORDS[:3]], "answer": i % 3}
        for i in range(10)
    ]
    text = "".join(json.dumps({"text": r["question"] + r["choices"][r["answer"]]}) + "\n" for r in rows)
    (tmp_path / "text.jsonl").write_text(text)
    data = {"source": "text", "path": str(tmp_path / "text.jsonl"), "vocab_size": 280, "cache": str(tmp_path / "cache")}
    module = make_run(tmp_path, "run", MODELS[name], data=data)
    export(tmp_path / "run", tmp_path / "hf", ExportOptions(progress=False))

    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "colours.yaml").write_text(
        "task: colours\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tasks / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ntarget_delimiter: ''\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    found = without_jepa_scale(HARNESS, str(tasks), str(tmp_path / "hf"), HF_DATASETS_CACHE=str(tmp_path / "hf_cache"))

    tokenizer = load_tokenizer(str(load_data(parse_data(data)).tokenizer))
    right = 0
    for row, scores in zip(rows, found["scores"], strict=True):
        ours = []
        for choice in row["choices"]:
            start, whole = tokenizer(row["question"]).input_ids, tokenizer(row["question"] + choice).input_ids
            (rows_of,) = logits(module.backbone, [whole])
            chances = torch.log_softmax(rows_of[:-1], -1).gather(1, torch.tensor(whole[1:])[:, None])[:, 0]
            ours.append(float(chances[len(start) - 1 :].sum()))
        assert scores == pytest.approx(ours, abs=1e-4)
        right += ours.index(max(ours)) == row["answer"]
    assert found["metrics"]["acc,none"] == pytest.approx(right / 10)
