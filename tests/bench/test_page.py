"""The page: its rows are named by what differs, and its words hold for measures of both directions."""

from jepa_scale.bench.compare import Difference
from jepa_scale.bench.page import write_page
from jepa_scale.bench.results import ALL_CASES, Result
from jepa_scale.bench.task import ONLY, Task

TASK = Task.model_validate(
    {
        "title": "A title",
        "about": "What is asked.",
        "config": {},
        "measures": {"loss": {"of": "eval/test/lm_loss", "better": "lower"}},
        "arms": {"lm": {"objective": {"name": "lm"}}, "a": {"objective": {"name": "mtp"}}},
    }
)


def test_verdicts_and_differences(tmp_path):
    difference = Difference(-0.5, -0.75, -0.25, 3)
    results = [
        Result("t", case, "loss", "lower", "a", (0, 1, 2), (1.0, 2.0, 3.0), 1.5, difference, None)
        for case in (ONLY, "small", ALL_CASES)
    ]
    write_page(tmp_path / "page.md", {"t": TASK}, results, "jepa-scale bench t", {"t": "t.png"})
    page = (tmp_path / "page.md").read_text()
    for row in ("t loss", "t small loss", "t all cases loss"):
        assert f"| {row} | better |" in page
    assert (
        page.count(
            "| loss (lower is better) | `a` | 3 | 2.000 (1.000 to 3.000) | −0.5000 [−0.7500, −0.2500] |  | 1.50 | better |"
        )
        == 3
    )
    assert "jepa-scale bench t" in page and "](t.png)" in page
