"""Comparison of runs: grouping, differences, and the page."""

import io
import re

import matplotlib.image
import pytest
import torch

from jepa_scale.cli.main import main
from jepa_scale.config.schema import LogConfig
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.evaluation.snapshot import save_snapshot
from jepa_scale.report.compare import differences, final_metrics, load_runs, projections, spectra, variants
from jepa_scale.report.compare_page import write_comparison
from jepa_scale.report.compare_plots import by_horizon, of_projection, of_spectrum, overlaid
from jepa_scale.report.page import headlines, write_report
from jepa_scale.report.step_time import mean_parts
from jepa_scale.report.step_time_plots import stacked
from jepa_scale.telemetry import RunLog
from jepa_scale.utils.errors import InputError
from tests.report.test_page import Page


def make_run(folder, name, seed=0, objective="lm", lr=0.1, ppl=10.0):
    directory = folder / name
    directory.mkdir(parents=True)
    config = (
        f"run: {{name: {name}, seed: {seed}}}\nobjective: {{name: {objective}}}\n"
        f"optim: {{lr: {lr}}}\nlog: {{progress: {seed > 0}}}\n"
    )
    ranks = ParallelContext(0, 1, 0, torch.device("cpu"), "python")
    with RunLog(directory, LogConfig(progress=False), ranks, name, 6, config) as log:
        for step in range(1, 7):
            parts = {"time_data": 0.1, "time_forward": 0.3 + seed, "time_per_step": 0.4 + seed}
            log.trained(step, {"loss": 5.0 / step, **(parts if objective == "horizon" else {})}, tokens=10)
            if step % 3 == 0:
                horizons = (
                    {f"retrieval_top1_h{h}": 0.1 + seed / h for h in (2, 8, 32)} if objective == "horizon" else {}
                )
                log.evaluated(step, "eval/valid", {"ppl": ppl / step, **horizons})
    if objective == "horizon":
        x = torch.randn(20, 8, generator=torch.Generator().manual_seed(seed))
        save_snapshot({"prediction": x, "target": x + 0.1}, directory, 6, "valid")
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [
        make_run(folder, "lm"),
        *(make_run(folder, f"jepa_seed{seed}", seed, "horizon", ppl=6.0 + 6 * seed) for seed in range(3)),
    ]


@pytest.fixture(scope="module")
def pages(runs):
    """Pages of all runs and of one run; made once, because figures take seconds."""
    several, one = write_comparison(runs, runs[0].parent / "page.html"), write_report(runs[1])
    return several.read_text(encoding="utf-8"), one.read_text(encoding="utf-8")


def test_runs_that_differ_by_seed_alone_belong_together(runs, tmp_path):
    other = make_run(tmp_path / "other", "lm", lr=0.2)
    found = variants(load_runs([*runs, other]))
    assert [len(variant.runs) for variant in found] == [1, 3, 1]
    assert found[1].name == "jepa (3 seeds)"
    assert [found[0].name, found[2].name] == [str(runs[0]), str(other)], "one name, two configs: told by their folders"


def test_what_differs(runs):
    lm, jepa = variants(load_runs(runs))
    assert differences([lm, jepa]) == {"objective.name": ["'lm'", "'horizon'"]}
    assert differences([lm]) == {}


def test_values_over_seeds(runs):
    lm, jepa = variants(load_runs(runs))
    assert lm.shown("eval/valid", "ppl") == "1.667"
    assert jepa.shown("eval/valid", "ppl") == "2.000 ± 1.000 (1.000 to 3.000)"
    assert lm.shown("eval/valid", "retrieval_top1_h2") == "-"
    assert final_metrics([lm, jepa])[0] == ("eval/valid", "ppl")


def test_pictures(runs):
    found = variants(load_runs(runs))
    assert {("eval/valid", "ppl"), ("train", "loss")} <= overlaid(found).keys()
    assert list(by_horizon(found)) == [("eval/valid", "retrieval_top1")]
    of_kinds = spectra(found)
    assert {kind: [name for name, _ in lines] for kind, lines in of_kinds.items()} == {
        f"valid: {kind}": ["jepa (3 seeds)"] * 3 for kind in ("prediction", "target")
    }
    [(name, saved)] = projections(found)["valid"]
    assert name == "jepa (3 seeds)"
    for png in (of_spectrum(of_kinds["valid: target"]), of_projection(saved)):
        assert png.startswith(b"\x89PNG")


def test_the_page_fetches_nothing_and_says_it_all(pages):
    text, _ = pages
    page = Page(text)
    assert not re.search(r"https?:|url\(", text) and "script" not in page.tags
    assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)
    said = " ".join(page.words)
    for expected in ("jepa (3 seeds)", "objective.name", "2.000 ± 1.000 (1.000 to 3.000)", "by horizon", "spectrum"):
        assert expected in said
    assert "parts of a step, mean" in said


def test_the_page_of_one_run_has_the_same_pictures(runs, pages):
    said = " ".join(Page(pages[1]).words)
    for expected in (
        "valid: retrieval_top1 by horizon",
        "valid: target, spectrum",
        "valid: jepa_seed0",
        "parts of a step, mean",
    ):
        assert expected in said, said
    plain = " ".join(Page(write_report(runs[0]).read_text(encoding="utf-8")).words)
    assert "Representations" not in plain and "parts of a step" not in plain


def test_what_a_run_is_judged_by_comes_before_the_pictures_and_the_rest_after(pages):
    of_several, of_one = pages
    for text, folded in ((of_several, {"retrieval_top1_h8"}), (of_one, {"retrieval_top1_h8", "time_data"})):
        above, _, below = text.partition("<img")
        below = below.rpartition("Everything else that was measured")[2].partition("</details>")[0]
        told = {
            where: re.findall(r"<tr><th>(?:[\w/]+: )?(\w+)", html)
            for where, html in (("above", above), ("below", below))
        }
        assert {"loss", "ppl"} <= set(told["above"]) and not {"loss", "ppl"} & set(told["below"])
        assert folded <= set(told["below"]) and not folded & set(told["above"])
    assert headlines(["lr", "ppl", "loss"]) == ["ppl", "loss"] and headlines(["lr", "ppl"], rest=True) == ["lr"]
    assert headlines(["lr"]) == ["lr"] and headlines(["lr"], rest=True) == []


def test_parts_of_a_step_are_bars_with_their_shares(runs):
    of = {variant.name: mean_parts(variant.runs[0].rows) for variant in variants(load_runs(runs))}
    assert of == {"lm": {}, "jepa (3 seeds)": pytest.approx({"data": 0.1, "forward": 0.3})}
    one = stacked({"jepa": of["jepa (3 seeds)"]})
    both = stacked(
        {"jepa": {"data": 0.1, "forward": 0.3}, "a name that is much too long for a picture": {"forward": 1.0}}
    )
    sizes = [matplotlib.image.imread(io.BytesIO(png)).shape[1::-1] for png in (one, both)]
    assert [width for width, _ in sizes] == [800, 800] and sizes[0][1] < sizes[1][1]


def test_the_command(tmp_path, capsys):
    runs = [make_run(tmp_path, "a"), make_run(tmp_path, "b", lr=0.2)]
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "a/b.html")]) == 0
    assert f"side by side: {tmp_path}/a/b.html" in capsys.readouterr().out
    assert (tmp_path / "a/b.html").is_file() and (runs[0] / "report.html").is_file()
    assert main(["report", *map(str, runs)]) == 0
    assert (tmp_path / "comparison.html").is_file()


def test_a_folder_without_a_run_is_refused(runs, tmp_path):
    with pytest.raises(InputError, match="nothing"):
        write_comparison([runs[0], tmp_path / "nothing"], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
