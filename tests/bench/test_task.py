"""The files of tasks: the built-in ones are complete, and wrong ones are refused by key."""

import pytest
import yaml

from jepa_scale.bench.runs import check, plan_runs
from jepa_scale.bench.task import built_in, filled, merged, read_task
from jepa_scale.utils.errors import InputError

SMALL = {
    "title": "t",
    "about": "a",
    "config": {"data": {"source": "reversal"}},
    "measures": {"exact": {"of": "eval/test/exact_match", "better": "higher"}},
    "arms": {"lm": {"objective": {"name": "lm"}}},
}


@pytest.mark.parametrize("name", built_in())
def test_every_run_of_a_built_in_task_has_a_valid_config(name, tmp_path, monkeypatch):
    monkeypatch.setenv("JEPA_SCALE_DATA", str(tmp_path))
    _, task = read_task(name)
    for quick in (False, True):
        runs = plan_runs(name, task, tmp_path, range(2), quick)
        assert len({run.directory for run in runs}) == len(runs)
        for run in runs:
            check(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"mine": {"objective": {"name": "mtp"}}}}, "arms: has no arm 'lm'"),
        (
            {"measures": {"m": {"of": "drafting/accepted", "better": "higher"}}},
            "measures.m.of: 'drafting/accepted' begins",
        ),
        ({"measures": {"m": {"of": "eval/test/x", "better": "more"}}}, "measures.m.better"),
        ({"measures": {}}, "measures"),
        ({"measured_by": ["a:measure", "b:measure"]}, "measured_by: 'measure' is the name of two"),
        ({"measured_by": ["a:eval"]}, "measured_by: 'eval' is the name of two"),
        ({"quick": {"arms": ["none"]}}, "quick.arms: there is no 'none'; there are lm"),
        ({"quick": {"cases": ["none"]}}, "quick.cases: there is no 'none'; there are all"),
        (
            {"arms": {"lm": {"objective": {}, "control": "none"}}},
            "arms.lm.control: 'none' is no arm with a control of its own",
        ),
        ({"seeds": 0}, "seeds"),
        ({"typo": 1}, "typo: unknown key"),
    ],
)
def test_a_wrong_file_is_refused_by_key(tmp_path, changes, message):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    with pytest.raises(InputError) as error:
        read_task(str(path))
    assert message in str(error.value) and "mine.yaml" in str(error.value)


def test_an_unknown_task_is_named_with_the_known_ones(tmp_path):
    with pytest.raises(InputError, match="task 'reversl': there is none of that name; did you mean 'reversal'"):
        read_task("reversl")
    with pytest.raises(InputError, match=r"none.yaml: no such file"):
        read_task(str(tmp_path / "none.yaml"))


def test_merging_and_filling():
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"c": 4}, "d": {"e": 5}}) == {
        "a": {"b": 1, "c": 4},
        "d": {"e": 5},
    }
    values = {"a": "{seed}", "b": ["{data}/x", 1], "c": "run {seed}"}
    assert filled(values, data="/d", seed="7") == {"a": 7, "b": ["/d/x", 1], "c": "run 7"}
