"""Which runs a task has: baselines, arms, controls, seeds, and their configs."""

import pytest

from jepa_scale.bench.runs import build, check, control_of, make_data, plan_runs
from jepa_scale.bench.task import Arm, Task, built_in, read_task
from jepa_scale.utils.errors import InputError


def task(**changes) -> Task:
    values = {
        "title": "t",
        "about": "a",
        "config": {
            "model": {},
            "data": {"source": "reversal", "seed": "{seed}"},
            "train": {"steps": 7, "batch_size": 4},
        },
        "measures": {"exact": {"of": "eval/test/exact_match", "better": "higher"}},
        "arms": {"lm": {"objective": {"name": "lm"}}, "next_latent": {"objective": {"name": "next_latent"}}},
    }
    return Task.model_validate({**values, **changes})


def test_an_arm_stands_beside_its_baseline_and_its_control(tmp_path):
    runs = plan_runs("t", task(), tmp_path, range(3))
    assert [run.name for run in runs[:3]] == ["t/all/lm/0", "t/all/next_latent/0", "t/all/next_latent/control/0"]
    assert len(runs) == 9
    for run in runs:
        assert run.config["run"]["seed"] == run.config["data"]["seed"] == run.seed
    objectives = [run.config["objective"] for run in runs[:3]]
    assert objectives == [{"name": "lm"}, {"name": "next_latent"}, {"name": "next_latent", "detach": True}]


@pytest.mark.parametrize(
    ("arm", "control"),
    [
        ({"objective": {"name": "next_latent"}}, {"name": "next_latent", "detach": True}),
        ({"objective": {"name": "lm"}}, None),
        ({"objective": {"name": "stp"}, "control": {"jepa_weight": 0.0}}, {"name": "stp", "jepa_weight": 0.0}),
        ({"objective": {"name": "next_latent"}, "control": {}}, None),
    ],
)
def test_controls(arm, control):
    assert control_of(Arm.model_validate(arm)) == control


def test_a_shared_control_is_trained_once_and_without_its_owner_if_that_takes_no_part(tmp_path):
    arms = {name: arm.model_dump() for name, arm in task().arms.items()}
    arms["late"] = {"objective": {"name": "next_latent", "jepa_start": 3}, "control": "next_latent"}
    names = [run.arm for run in plan_runs("t", task(arms=arms), tmp_path, range(1))]
    assert names == ["lm", "next_latent", "next_latent/control", "late"]
    names = [run.arm for run in plan_runs("t", task(arms=arms), tmp_path, range(1), arms=["late"])]
    assert names == ["lm", "late", "next_latent/control"]


def test_a_newcomers_objective_is_an_arm_like_any_other(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend("docs/examples")
    arms = {"lm": {"objective": {"name": "lm"}}, "mine": {"objective": {"name": "neighbour:Neighbour"}}}
    runs = plan_runs("t", task(arms=arms), tmp_path, range(1))
    assert [run.arm for run in runs] == ["lm", "mine"]  # it has no option `detach`, so it has no control
    check(runs[1])


def test_the_same_flops_instead_of_steps(tmp_path):
    lm, arm, _ = plan_runs("t", task(), tmp_path, range(1), same_flops=True)
    assert lm.config["train"]["steps"] == 7 and lm.same_flops_as is None
    assert arm.config["train"] == {"batch_size": 4, "same_flops_as": str(lm.directory)}
    assert arm.same_flops_as == lm.directory
    check(arm)  # though that run isn't there yet


def test_another_config_is_another_run(tmp_path):
    plain = plan_runs("t", task(), tmp_path, range(1))
    other = plan_runs("t", task(), tmp_path, range(1), config={"train": {"steps": 8}})
    assert not {run.directory for run in plain} & {run.directory for run in other}
    assert [run.directory for run in plain] == [run.directory for run in plan_runs("t", task(), tmp_path, range(2))[:3]]


def test_unknown_arms_and_cases_and_bad_configs_are_named(tmp_path):
    with pytest.raises(InputError, match="--arms mtp: there is none of that name; there are lm, next_latent"):
        plan_runs("t", task(), tmp_path, range(1), arms=["mtp"])
    with pytest.raises(InputError, match="--cases none: there is none of that name; there are all"):
        plan_runs("t", task(), tmp_path, range(1), cases=["none"])
    (run, *_) = plan_runs("t", task(), tmp_path, range(1), config={"train": {"stpes": 8}})
    with pytest.raises(InputError, match=r"t/all/lm/0: train.stpes: unknown key"):
        check(run)


def test_data_are_generated_once_for_all_arms(tmp_path):
    calls = tmp_path / "calls"
    (tmp_path / "made.py").write_text(
        "def write(folder, seed, *, size):\n"
        f"    open({str(calls)!r}, 'a').write(f'{{seed}} {{size}}\\n')\n"
        "    (folder / 'train.jsonl').write_text('{}')\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        made = task(generator="made:write", data={"size": 3}, data_seed=None)
        for _ in range(2):
            make_data(plan_runs("t", made, tmp_path, range(2)))
        assert calls.read_text() == "0 3\n1 3\n"
        assert {path.name for path in plan_runs("t", made, tmp_path, range(1))[0].data.iterdir()} == {"train.jsonl"}
        wrong = task(generator="made:write", data={"size": 3, "length": 3})
        with pytest.raises(InputError, match="t: data: .*length"):
            make_data(plan_runs("t", wrong, tmp_path, range(1)))
        with pytest.raises(InputError, match="generators: there is no 'none' in jepa_scale.bench.generators"):
            plan_runs("t", task(generator="none"), tmp_path, range(1))


@pytest.mark.parametrize("name", built_in())
def test_every_arm_of_the_tasks_can_be_trained(tmp_path, monkeypatch, name):
    """Without weights or data: which layers an objective reads depends on the decoder's depth."""
    monkeypatch.setenv("JEPA_SCALE_DATA", str(tmp_path))
    _, task = read_task(name)
    first = next(iter(task.cases))
    for run in plan_runs(name, task, tmp_path, [0], cases=[first]):
        check(run)
        build(run)
