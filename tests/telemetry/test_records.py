import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.telemetry.metrics import describe, in_report_order
from jepa_scale.telemetry.records import clean, load_run, read_rows, summarize, truncate_rows
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.io import write_atomic


def write_rows(directory, rows, tail=""):
    directory.mkdir(exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + tail)


def test_clean_keeps_numbers_and_turns_what_json_lacks_into_none():
    assert clean(np.float32(0.5)) == 0.5 and type(clean(np.int64(3))) is int and clean(True) == 1
    assert clean(math.nan) is None and clean(math.inf) is None and clean(None) is None
    for no_number in (torch.tensor(1.0), "1"):
        with pytest.raises(AssertionError, match="Python number"):
            clean(no_number)


def test_damaged_lines_are_skipped(tmp_path):
    whole = [{"step": 1, "split": "train", "loss": 2.0}, {"step": 2, "split": "train", "loss": 1.0}]
    write_rows(tmp_path, whole, tail='[1]\n{"step": "x", "split": "train"}\n{"step": 3, "split": "train", "lo')
    assert read_rows(tmp_path) == whole
    assert truncate_rows(tmp_path, 10) == whole
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


@given(steps=st.lists(st.integers(0, 30), max_size=20), cut=st.integers(0, 30))
def test_truncation_keeps_exactly_the_rows_up_to_the_step(tmp_path_factory, steps, cut):
    directory = tmp_path_factory.mktemp("run")
    rows = [{"step": s, "split": "train", "tokens": i} for i, s in enumerate(steps)]
    write_rows(directory, rows)
    kept = truncate_rows(directory, cut)
    assert kept == read_rows(directory)
    assert kept == ([r for r in rows if r["step"] <= cut] if cut else [])
    assert [p.name for p in directory.iterdir()] == ["metrics.jsonl"]  # no partial file left


def test_write_atomic_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "summary.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")  # a lone surrogate has no UTF-8
    assert path.read_text() == "old"


def test_summarize_knows_which_way_is_better_and_leaves_out_nan():
    rows = [
        {"step": 1, "split": "eval/test", "loss": 3.0, "mrr": 0.1, "gate": 0.2},
        {"step": 2, "split": "eval/test", "loss": 1.0, "mrr": 0.9, "gate": 0.3},
        {"step": 3, "split": "eval/test", "loss": 2.0, "mrr": 0.5, "gate": 0.4},
        {"step": 4, "split": "eval/test", "loss": None},
        {"step": 4, "split": "train", "loss": None, "tokens": 7},
    ]
    summary = summarize(rows)
    assert summary["final"] == {"eval/test": {"loss": None, "mrr": 0.5, "gate": 0.4}, "train": {"loss": None}}
    assert summary["best"] == {"eval/test": {"loss": {"value": 1.0, "step": 2}, "mrr": {"value": 0.9, "step": 2}}}


def test_names_tell_direction():
    for lower in ("loss", "lm_loss", "seq_rec_loss", "ppl", "joint_nll", "kl_future"):
        assert describe(lower).better == "lower", lower
    for higher in (
        "exact_match",
        "starts_with",
        "mrr",
        "retrieval_top1",
        "effective_rank",
        "effective_rank_directions",
        "covariance_entropy_rank_context",
        "covariance_entropy_rank_target",
        "vq_usage",
        "mfu",
    ):
        assert describe(higher).better == "higher", higher
    for neither in ("lr", "grad_norm", "temperature", "seconds", "std_gap"):
        assert describe(neither).better is None, neither
    assert in_report_order({"lr", "zeta", "mrr", "loss", "alpha"}) == ["loss", "mrr", "alpha", "zeta", "lr"]


def test_a_killed_run_loads_without_a_summary(tmp_path):
    rows = [{"step": 5, "split": "train", "tokens": 100, "loss": 1.5, "seconds": 2.0}]
    write_rows(tmp_path, rows, tail='{"step": 6')
    (tmp_path / "config.yaml").write_text("run: {name: lost}\n")
    run = load_run(tmp_path)
    assert (run.name, run.rows) == ("lost", rows)
    assert run.summary["steps"] == 5 and run.summary["tokens"] == 100 and run.summary["tokens_per_second"] == 50
    assert run.value("train", "loss") == 1.5 == run.value("train", "loss", "best")
    assert run.value("eval/test", "mrr") is None
    (tmp_path / "summary.json").write_text('{"name": "cut of')
    (tmp_path / "config.yaml").write_text("a: [")
    run = load_run(tmp_path)
    assert run.name == tmp_path.name and run.config == {} and run.config_text == "a: ["


def test_load_run_names_what_is_not_a_run(tmp_path):
    for bad in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=bad.name):
            load_run(bad)


FOREIGN = [
    '{"step": 9, "split": "train", "loss": "abc", "lr": 0.5}',
    '{"step": 9, "split": "train", "loss": [1], "note": {"a": 1}, "lr": 0.5}',
    '{"step": 9, "split": "train", "tokens": "9", "seconds": "x", "flops": true, "lr": 0.5}',
]
NO_ROWS = [
    '{"step": true, "split": "train", "loss": 1.0}',
    '{"step": -1, "split": "train"}',
    '{"step": 1e3, "split": "train"}',
    '{"step": 1' + 400 * "0" + ', "split": "train"}',
    '{"step": 9, "split": ["train"]}',
    "[" * 100_000,
    "1" * 5000,
    "\0" * 300,
]


def test_what_is_no_number_in_a_row_is_left_out_and_told_once(tmp_path, caplog):
    whole = {"step": 1, "split": "train", "tokens": 3, "loss": 2.0}
    write_rows(tmp_path, [whole], tail="\n".join([*FOREIGN, *NO_ROWS]) + "\n")
    kept = [{"step": 9, "split": "train", "lr": 0.5}] * 3
    with caplog.at_level("WARNING", logger="jepa_scale"):
        assert read_rows(tmp_path) == read_rows(tmp_path) == [whole, *kept]
    where = f"{tmp_path / 'metrics.jsonl'}, line"
    assert [record.message for record in caplog.records] == [
        f"{where} 2: loss: no number, and left out",
        f"{where} 3: loss, note: no number, and left out",
        f"{where} 4: flops, seconds, tokens: no number, and left out",
    ]
    assert load_run(tmp_path).summary["tokens"] == 3
    assert truncate_rows(tmp_path, 9) == [whole, *kept] == read_rows(tmp_path)


def test_infinities_and_integers_that_are_no_floats_become_none(tmp_path):
    write_rows(tmp_path, [], tail='{"step": 1, "split": "train", "a": 1e999, "b": NaN, "c": -1' + 400 * "0" + "}\n")
    assert truncate_rows(tmp_path, 1) == [{"step": 1, "split": "train", "a": None, "b": None, "c": None}]


def test_a_summary_of_another_program_is_read_as_far_as_it_is_one(tmp_path):
    foreign = {
        "name": ["x"],
        "steps": "many",
        "tokens": 7,
        "final": {"train": {"loss": "low", "lr": 1.0}, "eval/valid": 3},
        "best": {"train": {"loss": {"value": "x", "step": 1}, "lr": {"value": 1.0, "step": 2}, "ppl": 4}, "b": []},
        "environment": "mine",
    }
    (tmp_path / "summary.json").write_text(json.dumps(foreign))
    run = load_run(tmp_path)
    assert run.name == tmp_path.name and run.summary == {
        "tokens": 7,
        "final": {"train": {"lr": 1.0}, "eval/valid": {}},
        "best": {"train": {"lr": {"value": 1.0, "step": 2}}, "b": {}},
    }
    assert run.value("train", "lr", "best") == 1.0 and run.value("train", "loss", "best") is None
    (tmp_path / "summary.json").write_text('{"final": [], "best": 3, "tokens": 1}')
    assert load_run(tmp_path).value("train", "loss") is None


def test_rows_that_cannot_be_read_are_an_error_of_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match=r"metrics.jsonl: cannot be read: Is a directory"):
        read_rows(tmp_path)
    with pytest.raises(InputError, match="no such run directory"):
        load_run("x" * 300)
