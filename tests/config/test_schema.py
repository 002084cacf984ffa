"""Configuration: what is wrong is named, what is right is resolved."""

import pytest
import yaml

from jepa_scale.config.loading import load_config, to_yaml
from jepa_scale.config.parsing import parse_section
from jepa_scale.config.schema import Config, OptimConfig
from jepa_scale.experiment import validate
from jepa_scale.utils.errors import InputError

MINIMAL = {"model": {"family": "native"}, "data": {"source": "reversal"}, "objective": {"name": "lm"}}


def write(folder, values, name="run.yaml"):
    path = folder / name
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def test_defaults_are_filled_in_and_the_name_is_the_files(tmp_path):
    config = load_config(write(tmp_path, MINIMAL, "experiment.yaml"))
    assert config.run.name == "experiment"
    assert config.optim == OptimConfig()


def test_overrides_are_typed(tmp_path):
    path = write(tmp_path, MINIMAL)
    config = load_config(
        path, ["optim.lr=3e-4", "run.name=x", "log.wandb=true", "optim.betas=[0.8, 0.9]", "model.hidden_size=7"]
    )
    assert config.optim.lr == 3e-4
    assert config.run.name == "x"
    assert config.log.wandb is True
    assert config.optim.betas == (0.8, 0.9)
    assert config.model["hidden_size"] == 7


def test_model_may_be_a_file_of_its_own(tmp_path):
    write(tmp_path, {"family": "native", "hidden_size": 32}, "small.yaml")
    path = write(tmp_path, {**MINIMAL, "model": "small.yaml"})
    assert load_config(path, ["model.hidden_size=64"]).model == {"family": "native", "hidden_size": 64}


def test_a_resolved_config_loads_again_as_itself(tmp_path):
    config = load_config(write(tmp_path, MINIMAL), ["train.steps=7"])
    again = load_config(write(tmp_path, to_yaml(config.model_dump(mode="json")), "again.yaml"))
    assert again == config


def test_a_length_in_flops(tmp_path):
    path = write(tmp_path, MINIMAL)
    assert load_config(path, ["train.flops=1e15"]).train.steps == 0
    other = tmp_path / "runs" / "lm"
    other.mkdir(parents=True)
    (other / "summary.json").write_text('{"steps": 7, "flops": 1234567}')
    experiment = validate(load_config(path, ["run.name=a", f"train.same_flops_as={other}"]))
    assert (experiment.train.flops, experiment.train.steps, experiment.train.epochs) == (1234567.0, 0, 0)
    resolved = write(tmp_path, experiment.to_yaml(), "again.yaml")
    assert validate(load_config(resolved)) == experiment
    (other / "summary.json").unlink()
    assert validate(load_config(resolved)) == experiment  # it has the number, and needs the run no more


def test_a_config_is_read_without_the_files_of_another_run(tmp_path):
    """That run may lie on another machine; only what trains needs its number."""
    assert load_config(write(tmp_path, MINIMAL), ["train.same_flops_as=nowhere"]).train.steps == 0


@pytest.mark.parametrize(
    ("train", "summary", "message"),
    [
        ({"flops": 1e9, "steps": 3}, None, r"flops: sets the length of training, and so does steps; remove one"),
        ({"same_flops_as": "x", "epochs": 3}, None, r"same_flops_as: sets the length of training, and so does epochs"),
        ({"same_flops_as": "x"}, None, r"same_flops_as: 'x' is no run directory with a summary.json"),
        ({"same_flops_as": "x"}, "{", r"same_flops_as: the summary.json of 'x' is damaged"),
        ({"same_flops_as": "x"}, "{}", r"same_flops_as: the summary.json of 'x' has no flops; train that run again"),
        ({"same_flops_as": "x"}, '{"flops": 0}', r"has no flops"),
        ({"same_flops_as": "x", "flops": 5}, '{"flops": 7}', r"'x' took 7 FLOPs, and train.flops is 5; remove one"),
        ({"flops": -1}, None, r"flops: .*greater than or equal to 0"),
        ({"flops": float("inf")}, None, r"flops: .*finite"),
    ],
)
def test_a_length_in_flops_that_is_none(tmp_path, monkeypatch, train, summary, message):
    monkeypatch.chdir(tmp_path)
    if summary is not None:
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "summary.json").write_text(summary)
    with pytest.raises(InputError, match=r"^train.*" + message):
        validate(load_config(write(tmp_path, {**MINIMAL, "train": train})))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": {"weight_decya": 1}}, r"optim\.weight_decya: unknown key; did you mean 'weight_decay'\?"),
        ({"optmi": {}}, r"optmi: unknown key; did you mean 'optim'\?"),
        ({"train": {"steps": "many"}}, r"train\.steps: .*integer.*'many'"),
        ({"train": {"steps": -1}}, r"train\.steps: .*greater than or equal to 0"),
        ({"train": {"batch_size": 8, "batch_tokens": 64}}, r"train: .*one of batch_size"),
        ({"train": {"batch_tokens": 64}}, r"train: .*batch_tokens and micro_tokens"),
        ({"train": {"batch_tokens": 64, "micro_tokens": 32, "accumulation": 2}}, r"train: .*accumulation"),
        ({"train": {"abort": [{"metric": "train/loss", "abov": 1}]}}, r"^train\.abort\.0\.abov: .*mean 'above'\?$"),
        ({"optim": {"overrides": {"backbone.x": {"lrr": 1}}}}, r"^optim\.overrides\.backbone\.x\.lrr: .*mean 'lr'\?$"),
        ({"engine": {"precision": "fp8"}}, r"engine\.precision: .*'auto', 'fp32', 'bf16' or 'fp16'.*'fp8'"),
        ({"objective": None}, r"objective: .*dictionary"),
        ({"train": 3}, r"train: .*"),
    ],
)
def test_bad_values_are_named(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        load_config(write(tmp_path, {**MINIMAL, **change}))


def test_a_former_name_of_a_metric_is_read_as_its_name_now(tmp_path):
    train = {
        "eval_every": 5,
        "abort": [{"metric": "valid/effective_rank_context", "below": 3.0}],
        "early_stopping": {"metric": "valid/effective_rank_target"},
    }
    checkpoint = {"keep_best": "valid/effective_rank_context"}
    with pytest.warns(FutureWarning, match="write eval/valid/covariance_entropy_rank_context in the config"):
        config = load_config(write(tmp_path, {**MINIMAL, "train": train, "checkpoint": checkpoint}))
    assert config.train.abort[0].metric == config.checkpoint.keep_best == "eval/valid/covariance_entropy_rank_context"
    assert config.train.early_stopping.metric == "eval/valid/covariance_entropy_rank_target"


def test_missing_section(tmp_path):
    with pytest.raises(InputError, match="data: required key is missing"):
        load_config(write(tmp_path, {k: v for k, v in MINIMAL.items() if k != "data"}))


def test_an_override_builds_a_section_that_is_null(tmp_path):
    path = write(tmp_path, {**MINIMAL, "model": {"family": "native", "lora": None}, "train": None})
    config = load_config(path, ["model.lora.rank=4", "train.steps=3", "eval.a.b.c=1"])
    assert config.model["lora"] == {"rank": 4} and config.train.steps == 3 and config.eval == {"a": {"b": {"c": 1}}}
    with pytest.raises(InputError, match="override 'run.seed.x=1': 'seed' is not a section"):
        load_config(write(tmp_path, {**MINIMAL, "run": {"seed": 1}}), ["run.seed.x=1"])


def test_a_text_on_the_command_line_keeps_its_end(tmp_path):
    path = write(tmp_path, MINIMAL)
    for name in ("try #2", "007", "1e3", "2024-13-45", "on", "a=b,c", "it's"):
        assert load_config(path, [f"run.name={name}"]).run.name == name
    with pytest.raises(InputError, match=r"override 'optim.betas=\[0, 0\] # x': .*would be a comment"):
        load_config(path, ["optim.betas=[0, 0] # x"])


def test_a_name_that_the_file_cannot_give(tmp_path):
    path = write(tmp_path, MINIMAL, "what?.yaml")
    with pytest.raises(
        InputError, match=r"^run\.name: 'what\?' has '\?'.*\(this is the config's file name; give run\.name\)$"
    ):
        load_config(path)
    assert load_config(path, ["run.name=a"]).run.name == "a"


def test_ones_own_file_comes_before_the_shipped_one(tmp_path, monkeypatch):
    (tmp_path / "configs" / "models").mkdir(parents=True)
    write(tmp_path, {**MINIMAL, "model": "configs/models/tiny.yaml"}, "configs/reversal.yaml")
    write(tmp_path, {"family": "native", "hidden_size": 6}, "configs/models/tiny.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/reversal.yaml").model["hidden_size"] == 6
    assert "source" in load_config("configs/grid_arc.yaml").data  # else the shipped one is found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"bad\.yaml: is empty; it must hold sections"),
        (b"# nothing\n", r"bad\.yaml: is empty"),
        (b"- a\n", r"bad\.yaml: holds a list; it must"),
        (b"text\n", r"bad\.yaml: holds a single value; it must"),
        ("model: {}\n# r\xe9glage".encode("latin-1"), r"bad\.yaml, line 2: is not UTF-8 text"),
        (bytes(range(256)), r"bad\.yaml, line \d+: is not UTF-8 text"),
        (b"a: 1\n\0\0", r"bad\.yaml, line 2: not valid YAML"),
        ("a: 1".encode("utf-16"), r"bad\.yaml, line 1: is not UTF-8 text"),
        (b"run: {}\nrun: {}\n", r"bad\.yaml, line 2: the key 'run' is there a second time, after line 1"),
        (None, r"--config: '.*bad\.yaml' is a folder; give a file"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_config(path)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no file 'xxx"):
        load_config("x" * 300)


def test_a_byte_order_mark_is_no_part_of_a_key(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbf" + to_yaml(MINIMAL).encode())
    assert load_config(tmp_path / "a.yaml").run.name == "a"


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"--config: no file .*nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(InputError, match=r"model: no file 'absent\.yaml'"):
        load_config(write(tmp_path, {**MINIMAL, "model": "absent.yaml"}))


def test_damaged_yaml_names_the_line(tmp_path):
    with pytest.raises(InputError, match=r"run\.yaml, line 3"):
        load_config(write(tmp_path, "model: {}\ndata: [1, 2\nobjective: }"))


@pytest.mark.parametrize("override", ["train.steps", "=3", "train.steps.x=1"])
def test_malformed_overrides(tmp_path, override):
    with pytest.raises(InputError, match="override"):
        load_config(write(tmp_path, {**MINIMAL, "train": {"steps": 3}}), [override])


def test_every_key_of_every_section_is_described():
    def check(section, path):
        for name, field in section.model_fields.items():
            assert field.description, f"{path}{name} has no description"
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                check(field.annotation, f"{path}{name}.")

    check(Config, "")


def test_sections_of_parts_are_named_by_their_prefix():
    with pytest.raises(InputError, match=r"objective\.lrr: unknown key; did you mean 'lr'"):
        parse_section(OptimConfig, {"lrr": 1}, "objective")
