import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from jepa_scale.config import OptimConfig
from jepa_scale.optim import build_optimizer, lr_factor, parameter_groups


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


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("cosine", 0, 1 / 10),
        ("cosine", 4, 5 / 10),
        ("cosine", 9, 1.0),
        ("cosine", 54, 0.2 + 0.8 * 0.5),
        ("cosine", 32, 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 23 / 90))),
        ("cosine", 99, 0.2),
        ("linear", 54, 0.6),
        ("linear", 99, 0.2),
        ("constant", 4, 0.5),
        ("constant", 99, 1.0),
    ],
)
def test_lr_factor_closed_form(schedule, step, expected):
    options = OptimConfig(schedule=schedule, warmup_steps=10, final_lr=0.2)
    assert lr_factor(step, options, 100) == pytest.approx(expected, abs=1e-12)


@given(
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    warmup=st.integers(0, 40),
    total=st.integers(1, 60),
    final=st.floats(0, 1),
)
def test_lr_factor_rises_then_falls(schedule, warmup, total, final):
    options = OptimConfig(schedule=schedule, warmup_steps=warmup, final_lr=final)
    factors = [lr_factor(step, options, total) for step in range(total)]
    assert all(0 < f <= 1 or (f == 0 and final == 0) for f in factors[:-1]) and -1e-12 <= factors[-1] <= 1
    rising, falling = factors[:warmup], factors[max(0, warmup - 1) :]
    assert rising == sorted(rising)
    assert all(a >= b - 1e-12 for a, b in zip(falling, falling[1:], strict=False))
    if warmup < total:
        assert factors[-1] == pytest.approx(1.0 if schedule == "constant" else final, abs=1e-12)
    else:
        assert factors[-1] == pytest.approx(total / warmup)
