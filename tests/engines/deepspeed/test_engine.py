"""The DeepSpeed JSON is checked before anything is built."""

import json
from pathlib import Path

import pytest

from jepa_scale.engines.deepspeed.engine import OWNED, validate_deepspeed_config
from jepa_scale.utils.errors import InputError

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "ds"


def refused(tmp_path: Path, content: object, *words: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError) as error:
        validate_deepspeed_config(file)
    message = str(error.value)
    assert "\n" not in message
    for word in (str(file), *words):
        assert word in message, (word, message)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_our_files_are_accepted(stage):
    assert validate_deepspeed_config(CONFIGS / f"zero{stage}.json")["zero_optimization"]["stage"] == stage


def test_every_key_of_our_files_is_documented():
    text = (CONFIGS / "README.md").read_text()
    for stage in range(4):
        config = json.loads((CONFIGS / f"zero{stage}.json").read_text())
        for key in [*config, *config["zero_optimization"]]:
            assert f"`{key}`" in text, key


def test_missing_file_names_the_key(tmp_path):
    with pytest.raises(InputError, match=r"engine\.deepspeed: no file 'nowhere\.json'"):
        validate_deepspeed_config("nowhere.json")


@pytest.mark.parametrize("key", OWNED)
def test_keys_of_our_own_config_are_refused(tmp_path, key):
    refused(tmp_path, {key: 1, "zero_optimization": {"stage": 1}}, repr(key), OWNED[key])


@pytest.mark.parametrize("zero", [{"stage": 4}, {"stage": "2"}, {"stage": True}, {}, None, [1]])
def test_invalid_stages_are_refused(tmp_path, zero):
    refused(tmp_path, {"zero_optimization": zero}, "zero_optimization.stage")


def test_a_missing_stage_is_refused(tmp_path):
    refused(tmp_path, {}, "zero_optimization.stage")


def test_damaged_files_are_refused(tmp_path):
    refused(tmp_path, '{"zero_optimization":\n {"stage": 1,}}', "line 2")
    refused(tmp_path, [], "JSON object")


def test_what_deepspeed_itself_refuses_is_refused(tmp_path):
    refused(tmp_path, {"zero_optimization": {"stage": 1, "reduce_bucket": 5}}, "zero_optimization.reduce_bucket")
    refused(
        tmp_path,
        {"zero_optimization": {"stage": 1, "overlap_comm": "sometimes"}},
        "zero_optimization.overlap_comm",
    )


def test_what_cannot_be_offloaded_is_refused(tmp_path):
    cpu, nvme = {"device": "cpu"}, {"device": "nvme", "nvme_path": "/nowhere"}
    refused(tmp_path, {"zero_optimization": {"stage": 1, "offload_optimizer": cpu}}, "offload_optimizer: needs stage 2")
    refused(tmp_path, {"zero_optimization": {"stage": 2, "offload_param": cpu}}, "offload_param: needs stage 3")
    refused(
        tmp_path, {"zero_optimization": {"stage": 3, "offload_optimizer": nvme}}, "offload_optimizer.device: 'nvme'"
    )
    refused(
        tmp_path, {"zero_optimization": {"stage": 3, "offload_optimizer": {**cpu, "ratio": 0.5}}}, "ratio: must be 1"
    )
    refused(tmp_path, {"zero_optimization": {"stage": 2, "cpu_offload": True}}, "cpu_offload")
    refused(tmp_path, {"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "mics_shard_size")
