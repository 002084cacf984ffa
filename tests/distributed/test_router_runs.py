"""A mixture of experts with its balance loss trains alike on every engine, over ranks and micro-batches."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tests.distributed.launch import run_ranks
from tests.distributed.test_runs import ENGINES, config_file, rows, train_runs

STEPS = 4
"""The last loss follows three updates, of which a wrong share of the gradient would be seen."""


def curves(folder, name):
    found = rows(folder, name)
    assert len(found) == STEPS
    return {
        key: torch.tensor([row[key] for row in found]) for key in ("loss", "lm_loss", "router_aux_loss", "grad_norm")
    }


def train(folder, world_size, cases):
    files = []
    for name, (engine, accumulation, objective) in cases.items():
        keys = dict(name=name, backbone="mixtral", steps=STEPS, eval_every=0)
        files.append((str(config_file(folder, objective, engine, accumulation, **keys)), None))
    run_ranks(train_runs, world_size, files)


def assert_equal(folder, name, reference):
    for key, values in curves(folder, name).items():
        torch.testing.assert_close(
            values, reference[key], rtol=2e-4, atol=1e-5, msg=lambda m, k=key: f"{name} {k}: {m}"
        )


def test_ranks_and_micro_batches_change_nothing(tmp_path):
    train(tmp_path, 1, {"one": ("fsdp", 1, "lm")})
    reference = curves(tmp_path, "one")
    expected = reference["lm_loss"] + 0.5 * reference["router_aux_loss"]
    torch.testing.assert_close(reference["loss"], expected, rtol=1e-5, atol=1e-6)
    train(tmp_path, 2, {"two": ("zero3", 2, "lm")})
    assert_equal(tmp_path, "two", reference)


def test_a_mixture_that_runs_twice_in_a_forward_is_refused_under_zero3(tmp_path):
    """``concept`` encodes names by the lower blocks and facts by all."""
    with pytest.raises(
        AssertionError, match=r"InputError: engine\.deepspeed: ZeRO-3 runs a MixtralSparseMoeBlock once"
    ):
        train(tmp_path, 1, {"zero": ("zero3", 1, "concept")})


@pytest.mark.matrix
@pytest.mark.parametrize("objective", ["lm", "two_view_infonce"])
def test_every_engine_has_the_same_curve(tmp_path, objective):
    train(tmp_path, 1, {"one": ("fsdp", 1, objective)})
    reference = curves(tmp_path, "one")
    for world_size in (1, 2):
        cases = {f"{e}{a}_{world_size}": (e, a, objective) for e, a in product(ENGINES, (1, 2))}
        train(tmp_path, world_size, cases)
        for name in cases:
            assert_equal(tmp_path, name, reference)
