import base64
import json
import math
import re
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
import torch

from jepa_scale.config.schema import LogConfig
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.report.compare_page import write_comparison
from jepa_scale.report.page import compare_table, runs_table, write_report
from jepa_scale.report.plots import curves, plot_all, wants_log_axis
from jepa_scale.telemetry import RunLog
from jepa_scale.utils.errors import InputError

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """HTML parser that checks the nesting of tags, and collects references and words."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.words, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [v for k, v in attributes if k in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def make_run(directory, name="demo", reverse=0.9, flops=0, **more):
    directory.mkdir(parents=True)
    config = f"run:\n  name: {name}\nobjective:\n  note: <script>alert(1)</script> & more\n"
    ranks = ParallelContext(0, 1, 0, torch.device("cpu"), "python")
    with RunLog(directory, LogConfig(progress=False), ranks, name, 6, config, **more) as log:
        for step in range(1, 7):
            loss = math.nan if step == 3 else 10.0 ** (2 - step)
            log.trained(step, {"loss": loss, "lr": 1e-3 / step, "grad_norm": 1.0}, tokens=10, flops=flops)
            if step % 3 == 0:
                for split, value in (("train", 1.0), ("atomic", 0.75), ("test", reverse)):
                    log.evaluated(step, f"eval/{split}", {"exact_match": value * step / 6, "mrr": value})
    return directory


def ink(pixels):
    """Share of pixels that are not background."""
    return float((pixels[..., :3].min(axis=-1) < 0.8).mean())


def test_the_report_is_one_self_contained_page(tmp_path):
    run = make_run(tmp_path / "demo")
    path = write_report(run)
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(r"https?:|url\(", text) and "@import" not in text and "script" not in page.tags
    assert page.sources and all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    said = " ".join(page.words)
    for expected in (
        "demo",
        "exact_match",
        "atomic",
        "0.7500",
        torch.__version__,
        "<script>alert(1)</script> & more",
    ):
        assert expected in said, expected
    assert "train/loss was not finite in 1 of 6 rows, first at step 3" in said
    assert "best" not in said.split("mrr")[1].split("lr")[0]  # final mrr is the best mrr: said once


def test_plots_are_there_and_have_something_on_them(tmp_path):
    run = make_run(tmp_path / "demo")
    text = write_report(run).read_text(encoding="utf-8")
    expected = {"loss", "exact_match", "mrr", "lr", "grad_norm", "tokens_per_second", "seconds"}
    assert {p.stem for p in (run / "plots").glob("*")} == expected
    for path in (run / "plots").glob("*.png"):
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[:2] == (480, 800)
        assert 0.005 < ink(pixels) < 0.5, path
        assert base64.b64encode(path.read_bytes()).decode() in text


def test_each_split_has_a_line_of_its_own(tmp_path):
    rows = [{"step": s, "split": split, "mrr": v} for s in (1, 100) for split, v in (("a", 0.2), ("b", 0.8))]
    both = matplotlib.image.imread(plot_all(rows, tmp_path / "both")["mrr"])
    one = matplotlib.image.imread(plot_all(rows[::2], tmp_path / "one")["mrr"])
    orange = lambda p: int(((p[..., 0] > 0.7) & (p[..., 2] < 0.3)).sum())  # noqa: E731
    assert orange(one) == 0 and orange(both) > 500


def test_a_metric_that_was_never_finite_has_no_plot_and_old_plots_go(tmp_path):
    rows = [{"step": step, "split": "train", "loss": None, "a/b": 1.0} for step in (1, 2)]
    (tmp_path / "gone.png").touch()
    assert {m: p.name for m, p in plot_all(rows, tmp_path).items()} == {"a/b": "a_b.png"}
    assert [p.name for p in tmp_path.iterdir()] == ["a_b.png"]


def test_a_metric_with_one_value_is_in_the_table_and_has_no_plot(tmp_path):
    """Neither one evaluation of several splits nor one finite value among others makes a curve."""
    values = [
        {"mrr": 0.5, "gate": None, "loss": 2.0},
        {"gate": 0.75, "loss": 1.0, "time_per_step": 0.4, "time_data": 0.4},
    ]
    rows = [{"step": step, "split": "train", **each} for step, each in enumerate(values, 1)]
    rows += [{"step": 2, "split": f"eval/{split}", "exact_match": 0.25} for split in ("valid", "test")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["loss.png"]
    said = " ".join(page.words)
    for name, value in (("mrr", "0.5000"), ("gate", "0.7500"), ("exact_match", "0.2500"), ("time_per_step", "0.4000")):
        assert re.search(rf"{name}[^.]*{value}", said), name


def test_a_run_with_single_values_alone_has_no_section_of_curves(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "split": "train", "loss": 2.5}) + "\n")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "Curves" not in page.words and "2.500" in page.words and not page.sources


def test_parameters_are_counted_on_the_page(tmp_path):
    older = make_run(tmp_path / "older")
    run = make_run(tmp_path / "run", parameters=(8_000_000, 20_000))
    words = [" ".join(Page(write_report(r).read_text(encoding="utf-8")).words) for r in (run, older)]
    assert "8,000,000 parameters, 20,000 trainable (0.25%)" in words[0] and "parameters" not in words[1]
    both = Page(write_comparison([run, older], tmp_path / "both.html").read_text(encoding="utf-8")).words
    assert both.count("8,000,000") == both.count("20,000") == 1 and {"parameters", "trainable"} <= set(both)


def test_curves_are_sorted_and_a_repeated_step_counts_once():
    rows = [
        {"step": 2, "split": "eval/test", "loss": 5.0},
        {"step": 1, "split": "eval/test", "loss": 6.0},
        {"step": 2, "split": "eval/test", "loss": 4.0},
        {"step": 1, "split": "train", "loss": None},
    ]
    train, test = curves(rows)["loss"]
    assert (train.label, test.label) == ("train", "eval/test")
    assert (test.steps, test.values) == ([1, 2], [6.0, 4.0])
    assert np.isnan(train.values).all() and train.finite == []


def test_what_is_measured_by_horizon_is_one_plot():
    rows = [{"step": s, "split": "eval/valid", "margin_h2": 0.5 + s, "margin_h16": 0.25, "margin": 0.1} for s in (1, 2)]
    found = curves(rows)
    assert found.keys() == {"margin", "margin_by_horizon"}
    assert {c.label: c.values for c in found["margin_by_horizon"]} == {
        "eval/valid, 2 tokens": [1.5, 2.5],
        "eval/valid, 16 tokens": [0.25, 0.25],
    }


def test_log_axis_only_where_it_makes_sense():
    assert wants_log_axis("lm_loss", [10.0, 0.1]) and wants_log_axis("grad_norm", [100.0, 0.5])
    assert not wants_log_axis("lm_loss", [3.0, 1.0])
    assert not wants_log_axis("lm_loss", [10.0, 0.0]) and not wants_log_axis("lm_loss", [])
    assert not wants_log_axis("mrr", [0.001, 1.0])


def test_a_killed_run_gets_a_report_too(tmp_path):
    run = make_run(tmp_path / "demo")
    for name in ("summary.json", "config.yaml"):
        (run / name).unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "sp')
    assert "not recorded" in " ".join(Page(write_report(run).read_text(encoding="utf-8")).words)
    with pytest.raises(InputError, match="nothing here"):
        write_report(tmp_path / "nothing here")


def test_runs_side_by_side(tmp_path):
    good, poor = make_run(tmp_path / "a", "reversal", 0.9), make_run(tmp_path / "b", "reversal_lm", 0.003)
    table = runs_table([good, poor])
    head, _, first, second, _, place, _ = table.splitlines()
    assert "forward accuracy (train)" in head and "reverse MRR (test)" in head
    assert first.split() == ["reversal", "1.000", "0.7500", "0.9000", "0.9000"]
    assert second.split() == ["reversal_lm", "1.000", "0.7500", "0.003000", "0.003000"]
    assert str(good / "report.html") in place and str(good / "plots") in place

    by_default = compare_table([good, poor]).splitlines()
    assert by_default[0].split() == [
        "run",
        "steps",
        "tokens_per_second",
        *(f"eval/{s}/{m}" for s in ("train", "atomic", "test") for m in ("exact_match", "mrr")),
    ]
    chosen = compare_table([good], {"steps": "steps", "loss": "train/loss", "none": "eval/x/y"}, which="best")
    assert chosen.splitlines()[2].split() == ["reversal", "6", "0.0001000", "-"]


def test_flops_have_a_column_where_they_were_counted(tmp_path):
    counted = make_run(tmp_path / "a", "a", flops=206 * 10**12, budget=1e15)
    older = make_run(tmp_path / "b", "b")
    head, _, first, second, *_ = runs_table([counted, older]).splitlines()
    assert head.endswith("training FLOPs")
    assert (first.split()[-1], second.split()[-1]) == ("1.24e15", "-")
    assert [line.split()[2] for line in compare_table([counted, older]).splitlines()] == [
        "flops",
        "-" * 7,
        "1.24e15",
        "-",
    ]
    words = " ".join(Page(write_report(counted).read_text(encoding="utf-8")).words)
    assert "1.24e15 FLOPs of training" in words and "+23.6% off the budget of 1.00e15" in words
    assert "FLOPs" not in " ".join(Page(write_report(older).read_text(encoding="utf-8")).words)
    (counted / "summary.json").unlink()  # a killed run
    assert compare_table([counted]).splitlines()[2].split()[2] == "1.24e15"


def test_a_run_that_was_never_evaluated_is_compared_by_its_loss(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "split": "train", "loss": 2.5}) + "\n")
    assert compare_table([tmp_path]).splitlines()[0].split()[-1] == "train/loss"


def test_an_older_run_is_reported_under_the_names_that_it_has(tmp_path):
    """Version 0.1 logged the covariance entropy ranks of ``grid`` as effective ranks."""
    rows = [{"step": s, "split": "eval/valid", "loss": 1.0 / s, "effective_rank_context": 10.0 + s} for s in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = " ".join(Page(write_report(tmp_path).read_text(encoding="utf-8")).words)
    assert "effective_rank_context" in words and "12" in words and "covariance_entropy_rank" not in words
    shown = compare_table([tmp_path], {"rank": "eval/valid/effective_rank_context"})
    assert shown.splitlines()[2].split()[-1].startswith("12")


def test_runs_on_text_are_compared_by_perplexity(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "split": "eval/valid", "lm_loss": 2.0, "ppl": 7.39}) + "\n"
    )
    head, _, row, _, place = runs_table([tmp_path]).splitlines()
    assert "eval/valid/ppl" in head.split() and "7.390" in row.split()
    assert "report.html" in place
