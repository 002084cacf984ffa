"""Mixtures of experts are planned in every dtype, and their products counted as the model counts them."""

import pytest
import torch
from torch.utils.flop_counter import flop_registry
from transformers.integrations import moe

from jepa_scale.plan.experts import grouped_products
from tests.models.test_token_rows import FAMILIES
from tests.plan.small import config, planned


def plan_of(name, precision):
    model = {"family": "huggingface", "config": FAMILIES[name], "vocab_size": 128}
    return planned(config({"precision": precision}, model=model))


def uncounted(plan):
    """FLOPs of operators that the model does not count: attention's kernel makes the scores once more in the backward."""
    return sum(op.flops for op in plan.memory.ops) - plan.flops


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_flops_of_operators_are_those_that_the_objective_counts(precision):
    mixture, dense = (plan_of(name, precision) for name in ("mixtral", "llama"))
    assert mixture.flops > dense.flops and uncounted(mixture) == uncounted(dense)


def test_a_recurrence_is_planned_packed():
    """Without its kernels, as on a laptop: by transformers' plain operations, which do more than the recurrence needs."""
    plan = plan_of("qwen3_next", "fp32")
    assert uncounted(plan) > uncounted(plan_of("llama", "fp32"))


def test_what_was_known_before_is_known_after():
    usable, known = moe._can_use_grouped_mm, dict(flop_registry)
    with grouped_products():
        assert torch.ops.transformers.grouped_mm_fallback in flop_registry
        rows, weight = torch.empty(6, 4, device="meta"), torch.empty(3, 4, 5, device="meta", requires_grad=True)
        out = moe._grouped_mm(rows, weight, torch.empty(3, dtype=torch.int32, device="meta"))
        assert out.shape == (6, 5) and out.requires_grad
    assert moe._can_use_grouped_mm is usable and flop_registry == known
