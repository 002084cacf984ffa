"""The figure has an interval and an entry in its legend for each kind of difference that is there."""

import pytest

from jepa_scale.bench import figure
from jepa_scale.bench.compare import Difference
from jepa_scale.bench.results import Result

FOUND = Difference(0.5, 0.25, 0.75, 3)


def result(arm, to_baseline, to_control):
    return Result("t", "all", "loss", "lower", arm, (0, 1, 2), (1.0, 2.0, 3.0), 1.5, to_baseline, to_control)


@pytest.mark.parametrize(
    ("results", "labels"),
    [
        ([result("a", FOUND, None), result("b", FOUND, FOUND)], ["to lm", "to its control"]),
        ([result("a", FOUND, FOUND), result("b", FOUND, None)], ["to lm", "to its control"]),
        ([result("a", None, FOUND)], ["to its control"]),
    ],
)
def test_the_legend_names_what_is_drawn(results, labels, monkeypatch, tmp_path):
    saved = []
    monkeypatch.setattr(figure, "save_figure", lambda found, path: saved.append(found))
    assert figure.draw(results, tmp_path / "f.png")
    (axis,) = saved[0].axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == labels
    assert sum(line.get_marker() == "o" for line in axis.lines) == sum(
        found is not None for r in results for found in (r.to_baseline, r.to_control)
    )


def test_without_differences_there_is_no_figure(tmp_path):
    assert not figure.draw([result("lm", None, None)], tmp_path / "f.png") and not list(tmp_path.iterdir())
