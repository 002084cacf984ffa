"""Assignment of parameters to groups and methods."""

import pytest
import torch
from torch import nn

from jepa_scale.config.parsing import parse_section
from jepa_scale.config.schema import GroupOverride, OptimConfig
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.optim import build_optimizer, parameter_groups
from jepa_scale.optim.matrices import Matrix
from jepa_scale.utils.errors import InputError


class Model(nn.Module):
    def __init__(self, tied: bool):
        super().__init__()
        self.backbone = nn.ModuleDict({"embed": nn.Embedding(7, 4), "linear": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
        self.objective = nn.ModuleDict({"memory": nn.Embedding(5, 4), "predictor": nn.Linear(4, 4, bias=False)})
        self.objective2 = nn.Linear(4, 7, bias=False)  # shares a prefix of letters, not of names
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        if tied:
            self.objective["head"] = nn.Linear(4, 7, bias=False)
            self.objective["head"].weight = self.backbone["embed"].weight


def names(groups):
    return {group["name"]: set(group["names"]) for group in groups}


def test_groups_split_by_part_and_by_decay():
    options = OptimConfig(lr=1e-2, lr_head=3e-3, weight_decay=0.2)
    groups = parameter_groups(Model(tied=False), options, ["objective."])
    assert names(groups) == {
        "backbone.decay": {"backbone.embed.weight", "backbone.linear.weight", "objective2.weight"},
        "backbone.no_decay": {"backbone.linear.bias", "backbone.norm.weight", "backbone.norm.bias"},
        "head.decay": {"objective.memory.weight", "objective.predictor.weight"},
    }
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-2, 0.2), (1e-2, 0.0), (3e-3, 0.2)]
    for group in groups:
        assert [p.shape for p in group["params"]]
        assert len(group["params"]) == len(group["names"])


def test_embeddings_can_be_spared_from_decay():
    groups = names(parameter_groups(Model(tied=False), OptimConfig(decay_embeddings=False), ["objective"]))
    assert groups["backbone.no_decay"] >= {"backbone.embed.weight"}
    assert groups["head.no_decay"] == {"objective.memory.weight"}
    assert groups["head.decay"] == {"objective.predictor.weight"}


def test_a_tied_embedding_is_once_in_the_head():
    groups = parameter_groups(Model(tied=True), OptimConfig(), ["objective"])
    everywhere = [name for group in groups for name in group["names"]]
    assert len(everywhere) == len(set(everywhere)) == 8
    assert "backbone.embed.weight" in names(groups)["head.decay"]
    assert all(group["lr"] == OptimConfig().lr for group in groups)  # lr_head: null = lr


def test_optimizer_decays_matrices_only():
    model = Model(tied=False)
    options = OptimConfig(lr=0.1, lr_head=0.05, weight_decay=0.5)
    optimizer = build_optimizer(parameter_groups(model, options, ["objective"]), options)
    assert optimizer.defaults["betas"] == options.betas and optimizer.defaults["eps"] == options.eps
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        shrink = 1 - (0.05 if name.startswith("objective.") else 0.1) * 0.5 if p.ndim >= 2 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * shrink)


MUON = OptimConfig(method="muon", lr=1e-2, lr_head=3e-3, weight_decay=0.2)


def test_muon_steps_the_weights_of_linear_layers_and_nothing_else():
    groups = parameter_groups(Model(tied=False), MUON, ["objective"])
    assert names(groups) == {
        "backbone.decay": {"backbone.embed.weight"},
        "backbone.muon.decay": {"backbone.linear.weight", "objective2.weight"},
        "backbone.no_decay": {"backbone.linear.bias", "backbone.norm.weight", "backbone.norm.bias"},
        "head.decay": {"objective.memory.weight"},
        "head.muon.decay": {"objective.predictor.weight"},
    }
    found = {g["name"]: (g["lr"], g["weight_decay"], g["method"]) for g in groups}
    assert found["backbone.muon.decay"] == (1e-2, 0.2, "muon") and found["head.muon.decay"] == (3e-3, 0.2, "muon")
    assert found["head.decay"] == (3e-3, 0.2, "adamw")
    matrices = [matrix for group in groups for matrix in group.get("matrices", [])]
    assert matrices == [
        Matrix("backbone.linear.weight", 4, 4),
        Matrix("objective2.weight", 7, 4),
        Matrix("objective.predictor.weight", 4, 4),
    ]


def test_a_weight_tied_to_an_embedding_is_none_of_muons():
    found = names(parameter_groups(Model(tied=True), MUON, ["objective"]))
    assert "backbone.embed.weight" in found["head.decay"]
    assert found["head.muon.decay"] == {"objective.predictor.weight"}


def test_muons_learning_rate_holds_everywhere_but_under_an_override():
    options = MUON.model_copy(
        update={"lr_muon": 0.5, "overrides": {"objective.predictor": GroupOverride(lr=0.7, weight_decay=0.0)}}
    )
    model = Model(tied=False)
    model.objective["other"] = nn.Linear(4, 4)
    lrs = {g["name"]: g["lr"] for g in parameter_groups(model, options, ["objective"])}
    assert lrs == {
        "backbone.decay": 1e-2,
        "backbone.no_decay": 1e-2,
        "backbone.muon.decay": 0.5,
        "head.decay": 3e-3,
        "head.no_decay": 3e-3,
        "head.muon.decay": 0.5,
        "objective.predictor.muon.no_decay": 0.7,
    }


def test_overrides_choose_the_method():
    """A prefix selects the linear layers under it, a full name any matrix; the longest match applies."""
    overrides = {
        "backbone": GroupOverride(method="muon"),
        "objective.memory.weight": GroupOverride(method="muon"),
    }
    found = names(parameter_groups(Model(tied=False), OptimConfig(overrides=overrides), ["objective"]))
    assert found["backbone.muon.decay"] == {"backbone.linear.weight"}
    assert found["objective.memory.weight.muon.decay"] == {"objective.memory.weight"}
    assert found["head.decay"] == {"objective.predictor.weight"}

    overrides = {"backbone": GroupOverride(method="adamw"), "backbone.linear": GroupOverride(lr=0.5)}
    options = OptimConfig(method="muon", overrides=overrides)
    found = names(parameter_groups(Model(tied=False), options, ["objective"]))
    assert found["backbone.linear.muon.decay"] == {"backbone.linear.weight"}  # as without an override
    assert found["backbone.decay"] == {"backbone.embed.weight"}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "backbone.norm.weight",
            r"backbone\.norm\.weight has shape \(4,\) and is no weight of a linear layer.*; remove it",
        ),
        ("backbone.norm", r"there is no weight of a linear layer, and Muon updates only these; remove it"),
        (
            "objective.memory",
            r"there is no weight of a linear layer, and Muon updates only these; give the full name of a matrix",
        ),
        ("backbone.linear.bias", r"backbone\.linear\.bias has shape \(4,\)"),
    ],
)
def test_muon_for_what_is_no_matrix_is_refused(key, message):
    options = OptimConfig(overrides={key: GroupOverride(method="muon")})
    with pytest.raises(InputError, match=rf"^optim\.overrides\.{key}\.method: {message}"):
        parameter_groups(Model(tied=False), options, ["objective"])


@pytest.mark.parametrize(
    "values", [{"lr_muon": 0.1}, {"muon_momentum": 0.9}, {"muon_steps": 4}, {"adjust_lr": "original"}]
)
def test_muons_keys_are_refused_where_nothing_is_stepped_by_it(values):
    key = next(iter(values))
    with pytest.raises(InputError, match=f"^optim.{key}: is set, but no parameter uses Muon"):
        parse_section(OptimConfig, values, "optim")
    parse_section(OptimConfig, {"method": "muon", **values}, "optim")
    parse_section(OptimConfig, {"overrides": {"backbone": {"method": "muon"}}, **values}, "optim")


def test_a_resolved_config_loads_again():
    assert parse_section(OptimConfig, OptimConfig().resolved(), "optim") == OptimConfig()


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
LLAMA = {"model_type": "llama", **SMALL, "intermediate_size": 24}
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ({"family": "native", **SMALL}, LINEAR),
        ({"family": "native", **SMALL, "tie_word_embeddings": False}, LINEAR),
        ({"family": "huggingface", "config": {**LLAMA, "tie_word_embeddings": False}}, LINEAR),
        ({"family": "huggingface", "config": GPT2}, {"c_attn", "c_proj", "c_fc"}),
        ({"family": "huggingface", "config": LLAMA, "lora": {"rank": 2, "new_ids_from": 20}}, {"lora_A", "lora_B"}),
    ],
)
def test_muons_matrices_of_real_decoders(model, layers):
    """Muon gets all linear layers of the blocks, and no embedding, norm or LM head; GPT-2's weights are transposed."""
    backbone = build_backbone(ModelOptions.model_validate(model), 23)
    groups = parameter_groups(backbone, MUON, [])
    matrices = [matrix for group in groups for matrix in group.get("matrices", [])]
    parameters = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    expected = {
        name for name, p in parameters.items() if backbone.blocks_at in name and p.ndim == 2 and "norm" not in name
    }
    assert {matrix.name for matrix in matrices} == expected
    kinds = {name.removesuffix(".weight").removesuffix(".default").rpartition(".")[2] for name in expected}
    assert kinds == layers and any("embed" in name or "wte" in name for name in parameters.keys() - expected)
    assert all(matrix.transposed == ("c_" in next(iter(layers))) for matrix in matrices)
    assert all((matrix.rows, matrix.cols) == tuple(parameters[matrix.name].shape) for matrix in matrices)


@pytest.mark.parametrize(
    ("matrix", "adjust", "expected"),
    [
        (Matrix("w", 8, 2), "original", 2.0),
        (Matrix("w", 2, 8), "original", 1.0),
        (Matrix("w", 2, 8, transposed=True), "original", 2.0),
        (Matrix("w", 8, 2, transposed=True), "original", 1.0),
        (Matrix("w", 100, 25), "match_rms_adamw", 2.0),
        (Matrix("w", 25, 100), "match_rms_adamw", 2.0),
        (Matrix("w", 25, 100), "none", 1.0),
    ],
)
def test_the_scale_of_the_learning_rate(matrix, adjust, expected):
    assert matrix.lr_scale(adjust) == pytest.approx(expected)


def test_two_learning_rates_under_one_override_are_two_groups():
    options = OptimConfig(lr=1e-2, lr_head=1e-3, overrides={"objective": GroupOverride(weight_decay=0.3)})
    groups = parameter_groups(Model(tied=False), options, ["objective.memory"])
    assert {(g["name"], g["lr"]) for g in groups if "objective" in g["name"]} == {
        ("objective.decay", 1e-2),
        ("objective.decay", 1e-3),
    }
