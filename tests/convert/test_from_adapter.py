"""An adapter of peft becomes a run's, on top of the same base, and computes what peft computes."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import jepa_scale
from jepa_scale.cli.main import main
from jepa_scale.convert.to_hf import ExportOptions, export
from tests.convert.runs import config_file, logits
from tests.convert.test_lora import ROWS, SEQUENCES, base_folder, lora_run

OTHER_ROWS = [[1, 5, 9, 2], [4, 8]]


@pytest.fixture
def base(tmp_path):
    return base_folder(tmp_path / "base", "llama", ROWS)


def adapter_of(base, folder, **options):
    """An adapter as peft trains and saves it, none of whose matrices is zero."""
    torch.manual_seed(2)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **options}
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return model.eval()


def conversion(tmp_path, config, name="run", source="adapter"):
    """The command that makes a run of an adapter."""
    return ["convert", str(tmp_path / source), "--from", "hf", "--config", str(config), "--out", str(tmp_path / name)]


def convert(tmp_path, base, source="adapter", name="run", **lora):
    lora = {"rank": 4, "alpha": 6.0, "targets": ["q_proj", "v_proj"], **lora}
    config = config_file(tmp_path, name, {"family": "huggingface", "pretrained": base, "lora": lora})
    return main(conversion(tmp_path, config, name, source))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_run_goes_on_from_an_adapter_of_peft(tmp_path, base, capsys, rslora):
    model = adapter_of(base, tmp_path / "adapter", use_rslora=rslora)
    assert convert(tmp_path, base, alpha=12.0 if rslora else 6.0) == 0  # 6 / sqrt(4) is 12 / 4
    assert f"LoRA adapters on {base}" in capsys.readouterr().out
    found = logits(jepa_scale.load(tmp_path / "run", device="cpu").module.backbone, OTHER_ROWS)
    for ours, tokens in zip(found, OTHER_ROWS, strict=True):
        with torch.no_grad():
            theirs = model(torch.tensor([tokens])).logits[0]
            with model.disable_adapter():
                plain = model(torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert (ours - plain).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_what_left_comes_back_bit_by_bit(tmp_path, name):
    """Adapters and new rows, tied ones too."""
    base = base_folder(tmp_path / "base", name)
    lora_run(tmp_path, base)
    export(tmp_path / "run", tmp_path / "adapter", ExportOptions(progress=False, adapter=True))
    config = config_file(
        tmp_path, "again", {"family": "huggingface", "pretrained": base, "lora": {"rank": 3, "alpha": 7.5}}
    )
    assert main(conversion(tmp_path, config, "again")) == 0
    before, after = (jepa_scale.load(tmp_path / run, device="cpu").module.backbone for run in ("run", "again"))
    theirs = dict(before.named_parameters())
    trained = [n for n, p in after.named_parameters() if p.requires_grad]
    assert trained and all(torch.equal(theirs[n], dict(after.named_parameters())[n]) for n in trained)
    for ours, wanted in zip(logits(after, SEQUENCES), logits(before, SEQUENCES), strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 8}, "r: 4 is not the run's model.lora.rank, 8; set model.lora.rank=4"),
        ({"alpha": 8.0}, "scaled by 1.5, the run's model.lora by 2; set model.lora.alpha=6"),
        (
            {"targets": ["q_proj"]},
            "v_proj.lora_A.weight, which the run's model.lora does not adapt; set model.lora.targets=[q_proj, v",
        ),
        ({"targets": None}, "which the run's model.lora adapts; set model.lora.targets=[q_proj, v_proj]"),
    ],
)
def test_another_lora_is_refused_with_the_key_to_set(tmp_path, base, capsys, lora, message):
    adapter_of(base, tmp_path / "adapter")
    assert convert(tmp_path, base, **lora) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora: True: model.lora has no such adapters"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: ['lm_head']: model.lora has no such"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern: "),
        ({"bias": "all"}, "bias: 'all': model.lora trains no biases"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; LORA alone can be read"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa': it changes the base's weights"),
        ({"r": "4"}, "r: '4', lora_alpha: 6: must be numbers"),
    ],
)
def test_another_kind_of_adapter_is_refused(tmp_path, base, capsys, change, message):
    adapter_of(base, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert convert(tmp_path, base) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_damaged_and_missing_files_and_configs_without_a_base(tmp_path, base, capsys):
    adapter_of(base, tmp_path / "adapter")
    weights = tmp_path / "adapter/adapter_model.safetensors"
    config = config_file(tmp_path, "plain", {"family": "huggingface", "pretrained": base})
    words = conversion(tmp_path, config, "plain")
    assert main(words) == 2 and "is an adapter; the run's config needs the base" in capsys.readouterr().err
    tensors = load_file(weights)
    save_file({name: t[:, :3].contiguous() for name, t in tensors.items()}, weights)
    assert convert(tmp_path, base) == 2 and "give the base that the adapter was trained on" in capsys.readouterr().err
    weights.write_bytes(b"x" * 100)
    assert convert(tmp_path, base) == 2 and "cannot be read" in capsys.readouterr().err
    weights.unlink()
    assert convert(tmp_path, base) == 2 and "has no adapter_model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_weights_of_4_bits_take_an_adapter_and_no_whole_model(tmp_path, base, capsys):
    """An adapter is converted without bitsandbytes: the codes are made when the run goes on."""
    adapter_of(base, tmp_path / "adapter")
    lora = {"rank": 4, "alpha": 6.0, "targets": ["q_proj", "v_proj"]}
    model = {"family": "huggingface", "pretrained": base, "lora": lora, "load_in_4bit": True}
    config = config_file(tmp_path, "run", model)
    assert main(conversion(tmp_path, config, "run", "base")) == 2
    assert "model.load_in_4bit: a run's frozen weights come from model.pretrained" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(conversion(tmp_path, config)) == 0
    assert (tmp_path / "run/checkpoints/step_00000000/manifest.json").is_file()
