"""The optimizer in one process against torch.optim.Muon and AdamW, and against a plain fp64 reference."""

import copy
import math

import pytest
import torch
from torch import nn

from jepa_scale.config.schema import GroupOverride, OptimConfig
from jepa_scale.optim import MatrixOptimizer, Part, build_optimizer, parameter_groups

OPTIM = OptimConfig(method="muon", lr=0.05, lr_head=0.02, weight_decay=0.3)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6, bias=False)
        self.same, self.head = nn.Linear(16, 6, bias=False), nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)


def build(model, options=OPTIM, bind=True):
    groups = parameter_groups(model, options, ["head"])
    optimizer = build_optimizer(groups, options)
    if bind and isinstance(optimizer, MatrixOptimizer):
        parameters = dict(model.named_parameters())
        optimizer.bind([(parameters[n], [Part(n, 0, 0, m.numel)]) for n, m in optimizer.matrices.items()])
    return optimizer


def give_gradients(model, seed, bad=None):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 0.1
        if name == bad:
            parameter.grad.view(-1)[0] = math.nan


def run(model, optimizer, steps, bad=None):
    for step in range(steps):
        give_gradients(model, step, bad)
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def newton_schulz(m, steps):
    """Reference for one matrix, which multiplies on the shorter side instead of transposing."""
    x = m / m.norm()
    for _ in range(steps):
        a = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
        p = -4.7750 * a + 2.0315 * a @ a
        x = 3.4445 * x + (p @ x if x.shape[0] <= x.shape[1] else x @ p)
    return x


def reference(model, options, steps):
    """Reference for all matrices, in fp64."""
    groups = [g for g in parameter_groups(model, options, ["head"]) if g["method"] == "muon"]
    rates = {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["names"]}
    values = {name: p.detach().double() for name, p in model.named_parameters() if name in rates}
    buffers = {name: torch.zeros_like(value) for name, value in values.items()}
    mu = options.muon_momentum
    for step in range(steps):
        give_gradients(model, step)
        for name, p in model.named_parameters():
            if name in values:
                g = p.grad.double()
                buffers[name] = mu * buffers[name] + (1 - mu) * g
                update = newton_schulz((1 - mu) * g + mu * buffers[name], options.muon_steps)
                rows, cols = p.shape
                original = options.adjust_lr == "original"
                scale = math.sqrt(max(1, rows / cols)) if original else 0.2 * math.sqrt(max(rows, cols))
                lr, decay = rates[name]
                values[name] = values[name] * (1 - lr * decay) - lr * scale * update
    return values


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adjust_lr": "original", "lr_muon": 0.3, "muon_momentum": 0.5, "muon_steps": 3},
        {"muon_momentum": 0.0, "overrides": {"up": GroupOverride(lr=0.01, weight_decay=0.0)}},
    ],
)
def test_equals_the_plain_reference(changes):
    options = OptimConfig.model_validate({**OPTIM.model_dump(), **changes})
    expected = reference(Model(), options, 6)
    assert set(expected) == {"up.weight", "down.weight", "same.weight", "head.weight"}
    model = Model()
    got = run(model, build(model, options), 6)
    for name, value in expected.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_equals_torchs_muon_up_to_its_bf16(adjust):
    options = OPTIM.model_copy(update={"adjust_lr": adjust, "lr_head": 0.05})
    model, other = Model(), Model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    got = run(model, build(model, options), 3)
    theirs = [p for name, p in other.named_parameters() if p.ndim == 2 and name != "embed.weight"]
    muon = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.3, momentum=0.95, adjust_lr_fn=adjust)
    expected = run(other, muon, 3)
    for name in ("up.weight", "down.weight", "same.weight", "head.weight"):
        moved = (expected[name] - before[name]).norm()
        assert (got[name] - expected[name]).norm() < 0.02 * moved, name


def test_the_others_are_stepped_by_torchs_adamw_to_the_bit():
    model, other = Model(), Model()
    optimizer = build(model)
    run(model, optimizer, 5)
    groups = [g for g in parameter_groups(other, OPTIM, ["head"]) if g["method"] == "adamw"]
    plain = [{"params": g["params"], "lr": g["lr"], "weight_decay": g["weight_decay"]} for g in groups]
    adamw = torch.optim.AdamW(plain, betas=OPTIM.betas, eps=OPTIM.eps, fused=True)
    run(other, adamw, 5)
    theirs = dict(other.named_parameters())
    count = 0
    for name, parameter in model.named_parameters():
        if name not in optimizer.matrices:
            assert torch.equal(parameter, theirs[name]), name
            state, expected = optimizer.state[parameter], adamw.state[theirs[name]]
            assert state.keys() == expected.keys() and all(torch.equal(state[k], expected[k]) for k in state)
            count += 1
    assert count == 5


def test_without_muon_it_is_torchs_adamw():
    options = OptimConfig()
    optimizer = build(Model(), options)
    assert type(optimizer) is torch.optim.AdamW
    assert set(optimizer.param_groups[0]) == {*torch.optim.AdamW([torch.zeros(1)]).param_groups[0], "name"}
    only = nn.Linear(3, 4, bias=False)  # and with nothing but matrices, there is no AdamW
    groups = parameter_groups(only, OPTIM, [])
    optimizer = build_optimizer(groups, OPTIM)
    optimizer.bind([(only.weight, [Part("weight", 0, 0, 12)])])
    only.weight.grad = torch.randn(4, 3)
    before = only.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(only.weight, before)


def snapshot(model, optimizer):
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        tensors |= {f"{name}/{key}": value for key, value in optimizer.state[p].items()}
    return {name: value.clone().view(torch.int32) for name, value in tensors.items()}  # to the bit, −0 and +0 too


@pytest.mark.parametrize("bad", ["up.weight", "norm.bias"])
def test_a_step_with_found_inf_changes_nothing(bad):
    model = Model()
    with torch.no_grad():
        model.up.weight[0] = -0.0
    optimizer = build(model)
    run(model, optimizer, 2)
    for p in model.parameters():  # signs of zeros, too
        for value in optimizer.state[p].values():
            if value.ndim:
                value.view(-1)[1] = -0.0
    before = snapshot(model, optimizer)
    optimizer.found_inf = torch.ones(())
    give_gradients(model, 9, bad)
    optimizer.step()
    after = snapshot(model, optimizer)
    assert before.keys() == after.keys() and "up.weight/momentum_buffer" in before and "up.weight/step" in before
    assert not [name for name in before if not torch.equal(before[name], after[name])]

    other_model = copy.deepcopy(model)
    other = build(other_model)
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        other.state[q] = {key: value.clone() for key, value in optimizer.state[p].items()}
    optimizer.found_inf = torch.zeros(())  # and where it is 0, a step is one as without it
    run(model, optimizer, 1)
    run(other_model, other, 1)
    for a, b in zip(model.parameters(), other_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert {int(optimizer.state[p]["step"]) for p in model.parameters()} == {3}


def test_hooks_of_a_step_run_once():
    model = Model()
    optimizer = build(model)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    run(model, optimizer, 1)
    assert calls == ["before", "after"]


def test_before_it_is_bound_a_step_creates_the_state_alone():
    model = Model()
    optimizer = build(model, bind=False)
    give_gradients(model, 0)
    with pytest.raises(AssertionError, match=r"call bind\(\) before the first step"):
        optimizer.step()
    optimizer.found_inf = torch.ones(())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    state = optimizer.state[model.up.weight]
    assert state["step"] == 0 and state["momentum_buffer"].shape == (16, 6) and not state["momentum_buffer"].any()
    assert "exp_avg" in optimizer.state[model.norm.bias] and "exp_avg" not in state


def test_parameters_without_a_gradient_are_left_out():
    model = Model()
    optimizer = build(model)
    give_gradients(model, 0)
    model.up.weight.grad = None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before) - {"up.weight"}


def test_a_weight_need_not_be_contiguous():
    model, other = Model(), Model()
    model.up.weight.data = model.up.weight.data.T.contiguous().T
    assert not model.up.weight.is_contiguous()
    got, expected = run(model, build(model), 3), run(other, build(other), 3)
    torch.testing.assert_close(got["up.weight"], expected["up.weight"])


def test_deepspeed_does_not_take_it_for_its_own():
    """DeepSpeed orthogonalises itself if a class name contains "muon", or if parameters or groups have use_muon."""
    model = Model()
    optimizer = build(model)
    assert "muon" not in type(optimizer).__name__.lower()
    assert not any("muon" in key for group in optimizer.param_groups for key in group)
    assert not any(hasattr(p, "use_muon") for p in model.parameters())


@pytest.mark.gpu
def test_on_a_gpu_it_is_torchs_muon():
    """On a GPU both implementations orthogonalise in bf16."""
    model, other = Model().cuda(), Model().cuda()
    theirs = [p for name, p in other.named_parameters() if p.ndim == 2 and name != "embed.weight"]
    options = OPTIM.model_copy(update={"lr_head": 0.05})
    optimizer = build(model, options)
    muon = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        for of_model in (model, other):
            generator = torch.Generator().manual_seed(step)
            for parameter in of_model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).cuda()
        optimizer.step()
        muon.step()
    for name in optimizer.matrices:
        a, b = model.get_parameter(name), other.get_parameter(name)
        torch.testing.assert_close(a, b, rtol=0.01, atol=0.01)
