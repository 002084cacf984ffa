"""What an editor is told of configs: it accepts every shipped one, and marks what the trainer refuses."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from jepa_scale.cli.config.reference import reference
from jepa_scale.cli.config.schema import config_schema, kinds
from jepa_scale.cli.main import main
from jepa_scale.config.loading import load_config
from jepa_scale.experiment import OBJECTIVES, validate

REPOSITORY = Path(__file__).resolve().parents[3]
EXPERIMENTS = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def schema():
    return jsonschema.Draft202012Validator(config_schema())


def test_it_is_a_schema(capsys):
    assert main(["config", "--schema"]) == 0
    jsonschema.Draft202012Validator.check_schema(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_shipped_configs_fit(schema, path):
    schema.validate(yaml.safe_load(path.read_text()))
    schema.validate(validate(load_config(path)).resolved())


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("optim", "learning_rate", 1e-3),
        ("optim", "lr", -1),
        ("optim", "schedule", "cosin"),
        ("engine", "tp", 0),
        ("objective", "tap_layr", 3),
        ("objective", "name", "lmm"),
        ("data", "sorce", "text"),
        ("data", "source", "texts"),
        ("data", "entities_a", "many"),
        ("model", "hidden", 3),
        ("eval", "metric", []),
        ("trian", "steps", 3),
    ],
)
def test_what_is_wrong_is_marked(schema, section, key, value):
    values = yaml.safe_load((REPOSITORY / "configs/reversal.yaml").read_text())
    values["model"] = {"family": "native"}
    schema.validate(values)
    values.setdefault(section, {})[key] = value
    assert not schema.is_valid(values)


def test_an_objectives_keys_are_its_own(schema):
    values = yaml.safe_load((REPOSITORY / "configs/nl_rx_synth.yaml").read_text())
    values["objective"]["name"] = "lm"
    assert "distance" in {part for error in schema.iter_errors(values) for part in error.message.split("'")}


def test_an_objective_of_ones_own_fits(schema):
    values = yaml.safe_load((REPOSITORY / "configs/reversal.yaml").read_text())
    values["objective"] = {"name": "my_package.mine:Mine", "whatever": 3}
    schema.validate(values)


def test_every_key_says_what_it_means():
    """An editor shows it, and the reference page."""
    definitions = config_schema()["$defs"]
    for by_name in kinds().values():
        for cls in by_name.values():
            for key, field in cls.model_fields.items():
                assert field.description, f"{cls.__name__}.{key}"
    for name, definition in definitions.items():
        for key, value in definition.get("properties", {}).items():
            assert "description" in value or "const" in value, f"{name}.{key}"


def test_the_reference_page_is_what_the_code_says():
    page = (REPOSITORY / "docs/config.md").read_text()
    assert page == reference(), "run: jepa-scale config --reference > docs/config.md"
    for name in OBJECTIVES:
        assert f"### `objective.name: {name}`" in page
    assert "| `lr` | number > 0 | `0.001` | Peak learning rate of the backbone. |" in page
