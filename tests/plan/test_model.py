"""The model without numbers has the parameters of the real one."""

import pytest
import torch

from jepa_scale.experiment import validate
from jepa_scale.models.loading import build_backbone
from jepa_scale.objectives.base import JepaModel
from jepa_scale.plan.synthetic import synthetic_data
from tests.plan.small import BLOCK, HORIZON, LAYERS, MODEL, PARAMETERS, VOCAB, WIDTH, config, modelled


def test_parameters_in_closed_form():
    model, _ = modelled(config())
    assert model.whole == sum(s.numel for s in model.parameters.values()) == PARAMETERS
    assert all(s.trains and s.moments == 2 for s in model.parameters.values())


def test_names_and_shapes_are_those_of_the_built_model():
    experiment = validate(config(objective=HORIZON))
    data = synthetic_data(experiment, None, None)
    backbone = build_backbone(experiment.model, data.vocab_size)
    real = JepaModel(backbone, experiment.objective.build(backbone, data))
    model, _ = modelled(config(objective=HORIZON))
    assert {n: tuple(p.shape) for n, p in real.named_parameters()} == {n: s.shape for n, s in model.parameters.items()}
    assert all(p.is_meta for p in model.module.parameters())


def test_a_tied_matrix_counts_once():
    model, _ = modelled(config(model={**MODEL, "tie_word_embeddings": True}))
    assert model.whole == PARAMETERS - VOCAB * WIDTH + 1  # and the logits' scale


def test_muon_keeps_one_moment_of_a_matrix_and_frozen_weights_have_none():
    model, _ = modelled(config(optim={"method": "muon"}))
    kinds = (
        {s.moments for n, s in model.parameters.items() if "proj" in n},
        {s.moments for n, s in model.parameters.items() if "norm" in n or "embed" in n},
    )
    assert kinds == ({1}, {2})
    lora = {"family": "huggingface", "vocab_size": VOCAB, "lora": {"rank": 2},
            "config": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                       "num_attention_heads": 4}}  # fmt: skip
    adapted, _ = modelled(config(model=lora))
    assert all(s.trains == ("lora_" in n) == (s.moments == 2) for n, s in adapted.parameters.items())


def test_the_teacher_is_what_the_objective_copies():
    model, _ = modelled(config(objective={**HORIZON, "teacher": "backbone"}))
    encoder = sum(p.numel() for p in model.objective.encoder.parameters())
    assert model.taught == encoder + VOCAB * WIDTH + 2 * BLOCK
    assert modelled(config())[0].teacher is None


@pytest.mark.parametrize("tp", [2])
def test_a_tp_rank_has_its_part_of_every_matrix_and_all_of_the_norms(tp):
    model, _ = modelled(config(), world_size=tp, tp=tp)
    norms = WIDTH * (2 * LAYERS + 1)
    assert sum(s.numel for s in model.parameters.values()) == norms + (PARAMETERS - norms) // tp
    assert model.whole == PARAMETERS


def test_computes_in_the_precision():
    model, _ = modelled(config({"precision": "bf16"}))
    assert {p.dtype for p in model.module.parameters()} == {torch.bfloat16}
