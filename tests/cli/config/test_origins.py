"""Where the values of a resolved config come from."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.cli.config.origins import annotate
from jepa_scale.config.loading import load_config
from jepa_scale.experiment import validate

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
EXPERIMENT = """\
model: small.yaml
data:
  source: text
  path: [a.txt,
    b.txt]
objective: {name: lm}
optim:
  betas: [0.8, 0.9]
  overrides:
    backbone.embed: {lr: 0.1}
"""


def origins(folder, overrides=(), text=EXPERIMENT):
    (folder / "run.yaml").write_text(text)
    (folder / "small.yaml").write_text("# a model\nfamily: native\nhidden_size: 32\n")
    (folder / "large.yaml").write_text("family: native\n\nhidden_size: 64\n")
    experiment = validate(load_config(folder / "run.yaml", list(overrides)))
    annotated = annotate(experiment, folder / "run.yaml", list(overrides))
    assert yaml.safe_load(annotated) == experiment.resolved()
    found, path = {}, []
    for line in annotated.splitlines():
        key, _, rest = line.partition(":")
        depth = (len(key) - len(key.lstrip())) // 2
        if not key.lstrip().startswith("- "):
            path = [*path[:depth], key.strip()]
            if "  # " in rest:
                found[".".join(path)] = rest.rpartition("  # ")[2].replace(f"{folder}/", "")
    return found


def test_files_command_line_and_defaults(tmp_path):
    found = origins(tmp_path, ["optim.lr=0.5", "objective.name=lm", "model.num_hidden_layers=2"])
    assert found["run.name"] == "name of the file"
    assert found["run.seed"] == found["optim.eps"] == found["data.workers"] == "default"
    assert found["model.hidden_size"] == "small.yaml, line 3"
    assert found["data.source"] == "run.yaml, line 3"
    assert found["data.path"] == "run.yaml, line 4"
    assert found["optim.betas"] == "run.yaml, line 8"
    assert found["optim.overrides.backbone.embed.lr"] == "run.yaml, line 10"
    assert found["optim.overrides.backbone.embed.method"] == "default"
    assert found["optim.lr"] == found["objective.name"] == found["model.num_hidden_layers"] == "command line"
    assert found["train.steps"] == found["train.batch_size"] == "follows from other keys"


def test_another_model_file(tmp_path):
    found = origins(tmp_path, ["model.num_hidden_layers=2", f"model={tmp_path}/large.yaml"])
    assert found["model.hidden_size"] == "large.yaml, line 3"
    assert found["model.num_hidden_layers"] == "command line"


def test_merged_keys_are_from_the_line_that_gives_them(tmp_path):
    text = EXPERIMENT.replace("optim:\n", "optim:\n  <<: {lr: 0.5, eps: 1.0e-6}\n  eps: 1e-7\n")
    found = origins(tmp_path, text=text)
    assert (found["optim.lr"], found["optim.eps"]) == ("run.yaml, line 8", "run.yaml, line 9")


def test_a_section_that_is_given_whole(tmp_path):
    found = origins(tmp_path, ["optim.overrides={objective: {weight_decay: 0}}"])
    assert found["optim.overrides.objective.weight_decay"] == "command line"
    assert not [key for key in found if key.startswith("optim.overrides.backbone")]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_of_every_experiment(path, tmp_path):
    """It loads again as the same config, and only what nobody wrote is a default."""
    experiment = validate(load_config(path))
    annotated = annotate(experiment, path)
    (tmp_path / path.name).write_text(annotated)
    assert validate(load_config(tmp_path / path.name)) == experiment
    assert f"configs/{path.name}, line " in annotated


@given(st.text(st.characters(blacklist_categories=["Cs"]), max_size=200))
def test_whatever_a_text_holds_the_result_is_yaml(text):
    experiment = validate(load_config(CONFIGS / "reversal.yaml"))
    experiment = replace(experiment, run=experiment.run.model_copy(update={"dir": text}))
    assert yaml.safe_load(annotate(experiment, CONFIGS / "reversal.yaml")) == experiment.resolved()
