"""The codebook's state: who moves it, and when."""

import copy

import pytest
import torch

from jepa_scale.objectives.grid.quantizer import Quantizer

GOOD, BAD = torch.tensor(True), torch.tensor(False)
MOMENTUM = 0.8


def quantizer(**changes) -> Quantizer:
    torch.manual_seed(0)
    values = {"codes": 6, "dim": 3, "decay": 0.9, "refresh_every": 4, "threshold": 0.5, "window": 2}
    return Quantizer(**(values | changes))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lots(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**62, (n,), generator=torch.Generator().manual_seed(seed))


def state(module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def train_step(module: Quantizer, rows: torch.Tensor, step: int, good=GOOD, micros: int = 1) -> None:
    draws = lots(len(rows), step)
    for part, of in zip(rows.chunk(micros), draws.chunk(micros), strict=True):
        module.observe(part, module(part).codes, of, step)
    module.update(good, MOMENTUM)


def same(a, b) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_reading_never_moves_the_codes():
    module = quantizer()
    train_step(module, randn(20, 3), 0)
    before = state(module)
    for mode in (module.train(), module.eval()):
        out = mode(randn(50, 3, seed=1).requires_grad_())
        out.rows.sum().backward()
    assert same(before, state(module))
    assert torch.equal(out.table, module.codebook[out.codes])
    assert not module._observed and not module._drawn


def test_the_first_two_steps_put_the_codes_among_the_rows():
    module = quantizer()
    for step in range(2):
        rows = randn(20, 3, seed=step)
        train_step(module, rows, step)
        assert all((rows == code).all(dim=1).any() for code in module.codebook)
        assert len(module.codebook.unique(dim=0)) == 6
        assert (module.sizes == 0).all() and module.updates.item() == step + 1
        assert torch.equal(module.average_codebook, module.codebook)
    train_step(module, randn(20, 3, seed=3), 3)
    assert (module.sizes > 0).any()
    few = quantizer()
    random = few.codebook.clone()
    train_step(few, rows[:2], 0)
    moved = (few.codebook != random).any(dim=1)
    assert moved.sum() == 2 and torch.equal(few.codebook[~moved], random[~moved])


def test_dead_codes_move_at_the_steps_that_the_interval_names_alone():
    module = quantizer(refresh_every=6)
    for step in range(2):
        train_step(module, randn(20, 3), step)
    far = module.codebook.clone()
    at_one = module.codebook[:1].repeat(10, 1)  # all assigned to one code: the others die
    for step in (3, 5, 7, 6):
        before = module.codebook.clone()
        train_step(module, at_one + 1e-3 * randn(10, 3, seed=step), step)
        changed = (module.codebook != before).any(dim=1)
        assert changed.sum() == (6 if step == 6 else 1), step
    assert (module.codebook - far[0]).norm(dim=1).max() < 0.1  # all of them are where the rows are
    moved = torch.arange(6) > 0
    assert torch.equal(module.average_codebook[moved], module.codebook[moved])  # so are the averages


@pytest.mark.parametrize(
    ("every", "steps"),
    [(0, [0, 1]), (1, list(range(50))), (20, [0, 1, 2, 4, 8, 16, 20, 40]), (3000, [0, 1, 2, 4, 8, 16, 32])],
)
def test_when_it_looks_for_dead_codes(every, steps):
    module = quantizer(refresh_every=every)
    assert [step for step in range(50) if module.refreshes(step)] == steps


def test_a_teachers_copy_reads_an_average_with_the_teachers_momentum():
    module = quantizer(refresh_every=0)
    for step in range(2):
        train_step(module, randn(20, 3), step)
    expected = module.codebook.clone()
    for step in range(2, 6):
        train_step(module, randn(20, 3, seed=step), step)
        expected = MOMENTUM * expected + (1 - MOMENTUM) * module.codebook
    torch.testing.assert_close(module.average_codebook, expected)
    teacher = copy.deepcopy(module)
    teacher.of_teacher = True
    rows = randn(30, 3, seed=9)
    assert torch.equal(teacher(rows).table, module.average_codebook[teacher(rows).codes])
    assert not torch.equal(teacher(rows).table, module(rows).table)


def test_a_step_that_was_skipped_changes_nothing():
    module = quantizer()
    train_step(module, randn(20, 3), 0)
    before = state(module)
    for step in (2, 4):
        train_step(module, randn(20, 3) * float("nan"), step, BAD)
        assert same(before, state(module))
    train_step(module, randn(20, 3, seed=5), 5)
    assert module.codebook.isfinite().all() and module.updates.item() == 2


def test_micro_batches_make_no_difference():
    one, many = quantizer(), quantizer()
    for step in range(6):
        rows = randn(24, 3, seed=step)
        train_step(one, rows, step)
        train_step(many, rows, step, micros=3)
        for name, value in state(one).items():
            torch.testing.assert_close(state(many)[name], value, msg=f"{name}, step {step}")


def test_usage_looks_back_over_a_window():
    module = quantizer(refresh_every=0)
    assert module.usage() == 0
    rows = torch.eye(3).repeat(2, 1) * torch.tensor([1.0, -1.0]).repeat_interleave(3)[:, None]  # six places
    train_step(module, rows, 0)
    train_step(module, rows, 1)
    train_step(module, rows, 2)
    assert module.usage() == 1
    assert abs(float(module.perplexity()) - 6) < 1e-5
    used = []
    for step in range(3, 6):
        train_step(module, rows[:2], step)
        used.append(round(float(module.usage()) * 6))
    assert used == [6, 2, 2]  # a window of two updates
    assert 2 < float(module.perplexity()) < 6


def test_its_state_stays_in_fp32_and_is_saved():
    module = quantizer()
    train_step(module, randn(20, 3), 0)
    before = state(module)
    assert set(before) == {"codebook", "average_codebook", "sizes", "last_used", "updates"}
    root = torch.nn.Sequential(torch.nn.Linear(3, 3), module).bfloat16()
    assert root[0].weight.dtype == torch.bfloat16
    assert same(before, state(module)) and module.codebook.dtype == torch.float32
    assert copy.deepcopy(root).to(torch.float16)[1].codebook.dtype == torch.float32
    rows = randn(4, 3).bfloat16().requires_grad_()
    assert module(rows).rows.dtype == torch.bfloat16
