import copy

import torch

from jepa_scale.models.layers.standardize import DECAY, EPSILON, Standardize

GOOD, BAD = torch.tensor(True), torch.tensor(False)
MOMENTUM = 0.9


def rows(seed: int, n: int = 50) -> torch.Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)) * torch.tensor([0.1, 1.0, 5.0, 30.0]) + 7


def step(module: Standardize, x: torch.Tensor, good=GOOD, micros: int = 1) -> None:
    for part in x.chunk(micros):
        module.observe(module(part))
    module.update(good, MOMENTUM)


def test_after_one_step_rows_have_mean_0_and_variance_1():
    module, x = Standardize(4), rows(0)
    torch.testing.assert_close(module(x), x)
    step(module, x, micros=3)
    torch.testing.assert_close(module.mean, x.mean(dim=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.deviation, x.std(dim=0, correction=0) + EPSILON, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(module(x).mean(dim=0), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(module(x).std(dim=0, correction=0), torch.ones(4), atol=2e-2, rtol=0)


def test_the_moments_follow_and_their_averages_lag():
    module = Standardize(4)
    step(module, rows(0))
    mean, average = module.mean.clone(), module.mean.clone()
    for number in range(1, 5):
        x = rows(number) + number
        step(module, x)
        mean = DECAY * mean + (1 - DECAY) * x.mean(dim=0)
        average = MOMENTUM * average + (1 - MOMENTUM) * mean
        torch.testing.assert_close(module.mean, mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(module.average_mean, average, rtol=1e-4, atol=1e-4)
    teacher = copy.deepcopy(module)
    teacher.of_teacher = True
    torch.testing.assert_close(teacher(x), (x - module.average_mean) / module.average_deviation)


def test_steps_that_were_skipped_and_steps_without_rows_change_nothing():
    module = Standardize(4)
    step(module, rows(0))
    before = copy.deepcopy(module.state_dict())
    step(module, rows(1) * torch.nan, BAD)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    step(module, rows(1)[:0])
    for name in ("mean", "deviation"):
        torch.testing.assert_close(module.state_dict()[name], before[name], rtol=1e-6, atol=0)
    step(module, rows(1))
    assert module.mean.isfinite().all()


def test_rows_that_are_all_the_same_do_not_blow_up():
    module = Standardize(2)
    for _ in range(200):
        step(module, torch.ones(5, 2))
    assert module(torch.ones(5, 2)).abs().max() < 1e-3 and (module.deviation > 0).all()


def test_no_gradient_reaches_the_moments_and_the_dtype_stays():
    module = Standardize(4).bfloat16()
    assert module.mean.dtype == torch.float32
    x = rows(0).bfloat16().requires_grad_()
    out = module(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    torch.testing.assert_close(x.grad.float(), (torch.ones(50, 4) / module.deviation).bfloat16().float())
