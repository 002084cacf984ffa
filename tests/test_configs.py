"""Every shipped experiment: it validates, its keys are explained, and it says how to be run."""

from pathlib import Path

import pytest

from jepa_scale.config.loading import load_config, shipped_configs
from jepa_scale.experiment import validate

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
EXPERIMENTS = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_experiment_validates(path):
    assert validate(load_config(path)).run.name == path.stem


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
@pytest.mark.parametrize("model", [None, "configs/models/gpt2_tiny.yaml"])
def test_a_resolved_experiment_resolves_to_itself(path, model, tmp_path):
    once = validate(load_config(path, [f"model={model}"] if model else [])).to_yaml()
    (tmp_path / path.name).write_text(once)
    assert validate(load_config(tmp_path / path.name)).to_yaml() == once


@pytest.mark.parametrize("path", [*EXPERIMENTS, *sorted(CONFIGS.glob("models/*.yaml"))], ids=lambda p: p.stem)
def test_every_key_is_explained(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        key, _, value = line.partition(":")
        if key.strip() and not key.lstrip().startswith("#") and value.split("#")[0].strip():
            assert "#" in value, f"{path.name}, line {number}: {key.strip()} has no comment"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_an_experiment_names_its_command(path):
    assert f"--config configs/{path.name}" in path.read_text()


def test_the_list_says_what_each_experiment_is_in_one_whole_sentence():
    listed = dict(shipped_configs())
    assert list(listed) == [f"configs/{path.name}" for path in EXPERIMENTS]
    for name, sentence in listed.items():
        assert sentence[0].isupper() and sentence[-1] == "." and ". " not in sentence and len(sentence) < 160, name


def test_baselines_differ_from_the_concept_run_in_the_objective_alone():
    """Same data, seed, backbone and optimizer: otherwise the table compares nothing."""
    plain = {
        name: load_config(CONFIGS / f"{name}.yaml").model_dump()
        for name in ("reversal", "reversal_lm", "reversal_two_view")
    }
    for values in plain.values():
        values.pop("objective"), values["run"].pop("name")
    assert plain["reversal"] == plain["reversal_lm"] == plain["reversal_two_view"]
