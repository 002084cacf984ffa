"""A model comes back into a run: bitwise, and training goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from jepa_scale import train
from jepa_scale.checkpoint import Manifest, store
from jepa_scale.cli.convert import import_model, parser
from jepa_scale.config.loading import load_config
from jepa_scale.convert.to_hf import ExportOptions, export
from jepa_scale.data import load_data
from jepa_scale.experiment import validate
from jepa_scale.models.loading import build_backbone
from jepa_scale.objectives.base import JepaModel
from jepa_scale.utils.errors import InputError
from tests.convert.runs import MODELS, NATIVE, config_file, make_run

CONCEPT = {"name": "concept", "tap_layer": 1, "memory": True, "concept_dim": 8}


def bring(source: Path, config: Path, out: Path, *overrides: str) -> dict[str, torch.Tensor]:
    """The command, and the tensors that it wrote."""
    import_model(
        parser().parse_args([str(source), "--from", "hf", "--config", str(config), "--out", str(out), *overrides])
    )
    tensors = out / "checkpoints" / "step_00000000" / "tensors"
    return store.read_whole(tensors, list(store.shapes(tensors)))


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_bitwise(tmp_path, name):
    module = make_run(tmp_path, "run", MODELS[name])
    export(tmp_path / "run", tmp_path / "hf", ExportOptions(progress=False, shard_bytes=30_000))
    found = bring(tmp_path / "hf", tmp_path / "run.yaml", tmp_path / "back")
    ours = dict(module.named_parameters())
    assert {n for n in found if n.startswith("model/")} == {f"model/{n}" for n in ours}
    for parameter, value in ours.items():
        assert torch.equal(found[f"model/{parameter}"], value)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert found[f"{moment}/{parameter}"].shape == value.shape and not found[f"{moment}/{parameter}"].any()
    manifest = Manifest.read(tmp_path / "back" / "checkpoints" / "step_00000000")
    assert manifest.step == manifest.updates == 0 and manifest.damage(tmp_path / "back/checkpoints/step_00000000") == []
    export(tmp_path / "back", tmp_path / "again", ExportOptions(progress=False, shard_bytes=30_000))
    for file in (tmp_path / "hf").glob("*.safetensors"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_a_teacher_begins_as_the_model(tmp_path):
    horizon = {"name": "horizon", "tap_layer": 1, "teacher": "backbone", "horizons": [1, 2], "horizon_probs": [1, 1]}
    module = make_run(tmp_path, "run", NATIVE, objective=horizon)
    export(tmp_path / "run", tmp_path / "hf", ExportOptions(progress=False, heads=True))
    found = bring(tmp_path / "hf", tmp_path / "run.yaml", tmp_path / "back")
    teacher = {name.removeprefix("teacher/"): t for name, t in found.items() if name.startswith("teacher/")}
    ours = dict(module.named_parameters())
    assert {name.split(".")[0] for name in teacher} == {"objective", "backbone"}
    assert not any("layers.1" in name or "lm_head" in name for name in teacher)  # above the tap
    for name, value in teacher.items():
        assert torch.equal(value, ours[name]), name
    train.main(["--config", str(tmp_path / "back" / "config.yaml"), "--resume", "auto", "train.steps=2"])
    assert (tmp_path / "back" / "checkpoints" / "step_00000002").is_dir()


def test_the_moments_are_those_of_the_method(tmp_path):
    make_run(tmp_path, "run", NATIVE)
    export(tmp_path / "run", tmp_path / "hf", ExportOptions(progress=False))
    found = bring(tmp_path / "hf", tmp_path / "run.yaml", tmp_path / "back", "optim.method=muon")
    momentum = {name.partition("/")[2] for name in found if name.startswith("momentum_buffer/")}
    others = {name.partition("/")[2] for name in found if name.startswith("exp_avg/")}
    assert momentum and all("_proj" in name for name in momentum) and not any("_proj" in name for name in others)
    assert momentum | others == {name.removeprefix("model/") for name in found if name.startswith("model/")}
    train.main(["--config", str(tmp_path / "back" / "config.yaml"), "--resume", "auto", "train.steps=2"])
    assert (tmp_path / "back" / "checkpoints" / "step_00000002").is_dir()


def test_heads_come_back_or_begin_as_in_a_new_run(tmp_path):
    module = make_run(tmp_path, "run", NATIVE, objective=CONCEPT)
    own = {f"model/objective.{n}": p for n, p in module.objective.named_parameters()}
    export(tmp_path / "run", tmp_path / "hf", ExportOptions(progress=False, heads=True))
    found = bring(tmp_path / "hf", tmp_path / "run.yaml", tmp_path / "back")
    assert len(own) > 2 and all(torch.equal(found[n], own[n]) for n in own)

    (tmp_path / "hf" / "jepa_heads.safetensors").unlink()
    found = bring(tmp_path / "hf", tmp_path / "run.yaml", tmp_path / "fresh")
    experiment = validate(load_config(tmp_path / "run.yaml"))
    data = load_data(experiment.data)
    torch.manual_seed(3)  # run.seed
    backbone = build_backbone(experiment.model, data.vocab_size)
    new = JepaModel(backbone, experiment.objective.build(backbone, data))
    for name, parameter in new.objective.named_parameters():
        assert torch.equal(found[f"model/objective.{name}"], parameter)
    norm = "backbone.decoder.model.norm.weight"
    assert torch.equal(found[f"model/{norm}"], dict(module.named_parameters())[norm])


@pytest.mark.parametrize("name", ["native", "gpt2"])
def test_training_goes_on_from_it(tmp_path, monkeypatch, name):
    """By `--resume auto`, with the weights that came in and not those of a new run."""
    make_run(tmp_path, "run", MODELS[name])
    export(tmp_path / "run", tmp_path / "hf", ExportOptions(progress=False))
    bring(tmp_path / "hf", tmp_path / "run.yaml", tmp_path / "back")
    monkeypatch.setattr("jepa_scale.training.run.quiet_libraries", lambda: None)
    assert train.main(["--config", str(tmp_path / "back" / "config.yaml"), "--resume", "auto"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "back" / "metrics.jsonl").read_text().splitlines()]
    fit = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in fit] == [1, 2, 3, 4]
    assert train.main(["--config", str(config_file(tmp_path, "scratch", MODELS[name]))]) == 0
    scratch = json.loads((tmp_path / "scratch" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(fit[0]["loss"] - scratch["loss"]) > 1e-3  # not the weights that a new run begins with
    assert (tmp_path / "back" / "checkpoints" / "step_00000004" / "manifest.json").is_file()


def test_what_does_not_fit_is_named(tmp_path):
    make_run(tmp_path, "run", NATIVE)
    hf = tmp_path / "hf"
    export(tmp_path / "run", hf, ExportOptions(progress=False))
    config, weights = (hf / "config.json").read_text(), load_file(hf / "model.safetensors")

    def refused(message: str, *overrides: str, **model: Any) -> None:
        file = config_file(tmp_path, "other", {**NATIVE, **model})
        with pytest.raises(InputError, match=message):
            bring(hf, file, tmp_path / "out", *overrides)
        assert not (tmp_path / "out").exists()

    def save(**changes: torch.Tensor | None) -> None:
        kept = {n: t for n, t in {**weights, **changes}.items() if t is not None}
        save_file(kept, hf / "model.safetensors", metadata={"format": "pt"})

    refused(r"config.json has rms_norm_eps=0.001, the config's model 1e-05", rms_norm_eps=1e-5)
    refused(r"rope_parameters=.*5000.0.*the config's model.*500.0", rope_theta=500.0)
    refused(r"num_hidden_layers=2, the config's model 3", num_hidden_layers=3)
    refused(r"is a Llama, which has no logit_scale.*tie_word_embeddings", tie_word_embeddings=True)
    refused(r"is a Llama, which has .* or bridge; .*model.bridge_after to null", bridge_after=1)
    refused(r"is a Llama, which has .* PoPE, .*model.position_embedding to rope", position_embedding="pope")
    refused(r"is a Llama, which has .* norm of the embedding .*model.embedding_norm", embedding_norm=True)
    refused(
        r"lm_head.weight has shape \(\d+, 32\), the config's model has \(500, 32\); set model.vocab_size",
        vocab_size=500,
    )
    name = "model.layers.1.mlp.up_proj.weight"
    save(**{name: None})
    refused(rf"has no {name}; it is of another model")
    save(**{name: weights[name][:-2].contiguous()})
    refused(rf"{name} has shape \(126, 32\), the config's model has \(128, 32\)$")
    save(extra=torch.zeros(3))
    refused(r"has a tensor that the model lacks, extra")
    (hf / "model.safetensors").write_bytes(b"\0" * 100)
    refused(r"model.safetensors: is truncated")
    save()
    (hf / "config.json").write_text(config.replace('"llama"', '"qwen3"'))
    refused(r"is a model of type 'qwen3', the config's is a 'jepa_decoder'")
    (hf / "config.json").unlink()
    refused(r"not a Hugging Face model \(no config.json\)")


def test_a_bridge_comes_back_into_a_run_that_trains_it_otherwise(tmp_path):
    """Where it is must agree; how gradient passes it and where its gate began are the new run's."""
    module = make_run(tmp_path, "run", MODELS["native_bridge"])
    hf = tmp_path / "hf"
    export(tmp_path / "run", hf, ExportOptions(progress=False))
    told = json.loads((hf / "config.json").read_text())
    assert (told["model_type"], told["bridge_after"], told["bridge_intermediate_size"]) == ("jepa_decoder", 1, 24)
    keys = {**MODELS["native_bridge"], "bridge_grad_barrier": False, "bridge_gate_init": -1.0, "bridge_dropout": 0.1}
    found = bring(hf, config_file(tmp_path, "free", keys), tmp_path / "back")
    gate = "backbone.decoder.model.bridge.gate"
    assert torch.equal(found[f"model/{gate}"], dict(module.named_parameters())[gate])
    for change, message in (
        ({"bridge_after": None}, r"config.json has bridge_after=1, the config's model None"),
        ({"num_hidden_layers": 3, "bridge_after": 2}, r"config.json has bridge_after=1, the config's model 2"),
        ({"bridge_intermediate_size": 16}, r"bridge_intermediate_size=24, the config's model 16"),
    ):
        with pytest.raises(InputError, match=message):
            bring(hf, config_file(tmp_path, "other", {**MODELS["native_bridge"], **change}), tmp_path / "out")


def test_heads_of_another_objective_are_named(tmp_path):
    make_run(tmp_path, "run", NATIVE, objective=CONCEPT)
    hf = tmp_path / "hf"
    export(tmp_path / "run", hf, ExportOptions(progress=False, heads=True))
    with pytest.raises(
        InputError, match=r"jepa_heads.safetensors: has, beyond the objective's, objective\.\S+; .*remove the file"
    ):
        bring(hf, config_file(tmp_path, "lm", NATIVE), tmp_path / "out")
    other = config_file(tmp_path, "other", NATIVE, objective={**CONCEPT, "concept_dim": 6})
    with pytest.raises(InputError, match=r"jepa_heads.safetensors: objective\.\S+ has shape"):
        bring(hf, other, tmp_path / "out")
    heads = load_file(hf / "jepa_heads.safetensors")
    (first, *_) = heads
    save_file({n: t for n, t in heads.items() if n != first}, hf / "jepa_heads.safetensors")
    with pytest.raises(InputError, match=rf"lacks {first}"):
        bring(hf, tmp_path / "run.yaml", tmp_path / "out")


def test_a_run_that_is_there_is_left_alone(tmp_path):
    make_run(tmp_path, "run", NATIVE)
    export(tmp_path / "run", tmp_path / "hf", ExportOptions(progress=False))
    before = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    with pytest.raises(InputError, match="already holds a run"):
        bring(tmp_path / "hf", tmp_path / "run.yaml", tmp_path / "run")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == before
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000007"]


def test_a_model_that_transformers_saved_comes_in(tmp_path):
    """A Llama in bf16 becomes the native decoder; its config, run by name and folder, belongs to the new run."""
    make_run(tmp_path, "run", NATIVE)
    export(tmp_path / "run", tmp_path / "hf", ExportOptions(progress=False))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    found = bring(tmp_path / "saved", tmp_path / "run.yaml", tmp_path / "new", "optim.lr=5e-4")
    for name, value in model.state_dict().items():
        assert torch.equal(found[f"model/backbone.decoder.{name}"], value.float())
    config = load_config(tmp_path / "new" / "config.yaml")
    assert (config.run.name, config.run.dir, config.optim.lr) == ("new", str(tmp_path), 5e-4)


def test_a_note_of_the_program_that_saved_a_model_is_no_architecture(tmp_path):
    module = make_run(tmp_path, "run", MODELS["llama"])
    export(tmp_path / "run", tmp_path / "hf", ExportOptions(progress=False))
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "unsloth_version": "2025.9.1", "unsloth_fixed": True}))
    found = bring(tmp_path / "hf", tmp_path / "run.yaml", tmp_path / "back")
    assert all(torch.equal(found[f"model/{n}"], p) for n, p in module.named_parameters())
