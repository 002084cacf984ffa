"""From measured runs to results: pairing by seed, verdicts, measures that only some arms have."""

from pathlib import Path

import pytest

from jepa_scale.bench.results import Result, results_of
from jepa_scale.bench.runs import Run, plan_runs
from jepa_scale.bench.task import Task, read_task
from jepa_scale.utils.errors import InputError

TASK = Task.model_validate(
    {
        "title": "t",
        "about": "a",
        "config": {},
        "measured_by": ["drafting"],
        "measures": {
            "exact": {"of": "eval/test/exact_match", "better": "higher"},
            "accepted": {"of": "drafting/accepted", "better": "higher"},
        },
        "arms": {"lm": {"objective": {"name": "lm"}}, "a": {"objective": {"name": "next_latent"}}},
    }
)
EXACT = {"lm": [1.0, 2.0, 3.0], "a": [2.0, 4.0, 6.0], "a/control": [2.5, 3.5, 5.0]}
ACCEPTED = {"a": [2.0, 2.1, 2.2], "a/control": [1.0, 1.1, 1.2]}


def found(exact=EXACT, accepted=ACCEPTED) -> list[Result]:
    runs = [Run("t", "all", arm, seed, Path("r"), {}) for seed in (5, 6, 7) for arm in exact]
    measured = {}
    for run in runs:
        at = run.seed - 5
        values = {"flops": 3.0 if run.arm == "a" else 2.0, "eval/test/exact_match": exact[run.arm][at]}
        measured[run.name] = values | ({"drafting/accepted": accepted[run.arm][at]} if run.arm in accepted else {})
    return results_of("t", TASK, runs, measured)


def test_differences_are_to_the_same_seeds_of_baseline_and_control():
    by_name = {(r.measure, r.arm): r for r in found()}
    arm = by_name["exact", "a"]
    assert (arm.seeds, arm.values, arm.mean, arm.flops) == ((5, 6, 7), (2.0, 4.0, 6.0), 4.0, 1.5)
    assert (arm.to_baseline.mean, arm.to_baseline.low, arm.to_baseline.high) == (2.0, 1.0, 3.0)
    assert (arm.to_control.mean, arm.to_control.low, arm.to_control.high) == pytest.approx((1 / 3, -0.5, 1.0))
    assert by_name["exact", "lm"].to_baseline is None and by_name["exact", "lm"].verdict == ""
    assert by_name["exact", "a/control"].to_control is None


def test_a_measure_of_heads_is_compared_with_the_control_alone():
    by_name = {(r.measure, r.arm): r for r in found()}
    arm = by_name["accepted", "a"]
    assert ("accepted", "lm") not in by_name and arm.to_baseline is None
    assert arm.to_control.mean == pytest.approx(1.0) and arm.verdict == "better"


@pytest.mark.parametrize(
    ("control", "verdict"),
    [([1.0, 1.0, 1.0], "better"), ([2.0, 4.5, 5.5], "same"), ([3.0, 5.0, 7.0], "worse")],
)
def test_better_means_than_the_baseline_and_the_control(control, verdict):
    (arm,) = (r for r in found({**EXACT, "a/control": control}) if (r.measure, r.arm) == ("exact", "a"))
    assert arm.to_baseline.verdict("higher") == "better" and arm.verdict == verdict
    row = arm.as_row()
    assert (row["name"], row["n"], row["min"], row["max"], row["value"]) == ("t/all/a/exact", 3, 2.0, 6.0, 4.0)
    assert row["to_baseline"]["verdict"] == "better" and row["seeds"] == [5, 6, 7]


def test_a_measure_that_no_run_has_is_named_with_those_there_are():
    with pytest.raises(
        InputError, match=r"t: measures.accepted.of: no run has 'drafting/accepted'; there are eval/test"
    ):
        found(accepted={})


def test_arms_may_share_a_control():
    arms = {
        **{name: arm.model_dump() for name, arm in TASK.arms.items()},
        "b": {"objective": {"name": "mtp"}, "control": "a"},
    }
    task = Task.model_validate({**TASK.model_dump(), "arms": arms})
    runs = [Run("t", "all", arm, seed, Path("r"), {}) for seed in range(3) for arm in ("lm", "a", "a/control", "b")]
    values = {"lm": 0.0, "a": 1.0, "a/control": 2.0, "b": 3.0}
    measured = {r.name: {"flops": 1.0, "eval/test/exact_match": values[r.arm], "drafting/accepted": 1.0} for r in runs}
    found = {r.arm: r for r in results_of("t", task, runs, measured) if r.measure == "exact"}
    assert (found["a"].to_control.mean, found["b"].to_control.mean) == (-1.0, 1.0)


def test_figures_are_derived_from_all_cases_of_an_arm_and_seed(tmp_path, monkeypatch):
    (tmp_path / "slopes.py").write_text(
        "def derive(cases):\n"
        "    (a, x), (b, y) = cases\n"
        "    return {'slope': (y['eval/test/m'] - x['eval/test/m']) / (b['depth'] - a['depth'])}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    measures = {"m": {"of": "eval/test/m", "better": "higher"}, "slope": {"of": "derived/slope", "better": "lower"}}
    changes = {"derived_by": "slopes:derive", "measures": measures, "cases": {"d2": {}, "d4": {}}}
    task = Task.model_validate({**TASK.model_dump(), **changes})
    runs = [
        Run("t", f"d{depth}", arm, seed, Path("r"), {}, options={"depth": depth})
        for depth in (2, 4)
        for seed in range(3)
        for arm in ("lm", "a")
    ]
    steep = {"lm": 3.0, "a": 1.0}
    measured = {r.name: {"flops": 1.0, "eval/test/m": steep[r.arm] * r.options["depth"] + r.seed} for r in runs}
    found = {(r.case, r.arm): r for r in results_of("t", task, runs, measured) if r.measure == "slope"}
    assert list(found) == [("all cases", "lm"), ("all cases", "a")]
    assert found["all cases", "a"].values == (1.0, 1.0, 1.0)
    assert found["all cases", "a"].to_baseline.mean == -2.0 and found["all cases", "a"].verdict == "better"


def test_a_derived_figure_that_a_selection_of_cases_cannot_have_is_left_out_with_a_warning(tmp_path, caplog):
    name, task = read_task("hierarchy")
    runs = plan_runs(name, task, tmp_path, range(2), quick=True)  # one number of samples: nothing crosses a height
    values = {"flops": 1.0, **{f"hierarchy/level_{level}": 0.9 for level in (1, 2, 3)}}
    found = {r.measure for r in results_of(name, task, runs, {run.name: values for run in runs})}
    assert found == {"level_1", "level_2", "level_3"}
    assert "hierarchy: level_1_samples_L3 is left out; it could not be derived" in caplog.text


def test_an_arm_that_lacks_a_measure_on_some_seeds_is_left_out_with_a_warning(caplog):
    runs = [Run("t", "all", arm, seed, Path("r"), {}) for seed in range(2) for arm in ("lm", "a")]
    measured = {r.name: {"flops": 1.0, "eval/test/exact_match": 1.0, "drafting/accepted": 1.0} for r in runs}
    del measured["t/all/a/1"]["drafting/accepted"]
    found = {(r.measure, r.arm) for r in results_of("t", TASK, runs, measured)}
    assert ("accepted", "lm") in found and ("accepted", "a") not in found
    assert "t/all/a: is left out of accepted, which the seeds [1] do not have" in caplog.text
