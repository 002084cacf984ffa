"""Whole plans."""

import pytest

from jepa_scale.plan.hardware import GIB, Gpu
from jepa_scale.plan.planner import largest_within
from jepa_scale.utils.errors import InputError
from tests.plan.small import MODEL, config, planned

BIG = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip


@pytest.mark.parametrize("usable", [0, 9, 10, 11, 59, 60, 61, 1000, 10**9])
@pytest.mark.parametrize(
    "peak", [lambda n: 10 * n, lambda n: max(10, 7 * n - 3), lambda n: n * n, lambda n: 5 + n // 3]
)
def test_the_largest_that_fits_is_the_largest(peak, usable):
    found = largest_within(peak, usable, 100)
    assert found == max((n for n in range(1, 101) if peak(n) <= usable), default=0)


def test_the_largest_micro_batch_fits_and_one_more_sample_does_not():
    gpu = Gpu("NVIDIA H100 80GB HBM3", 0.02, 1e12, 1e9, 1e9)
    batch = {"batch_tokens": 64, "micro_tokens": 64}
    plan = planned(config(train=batch), gpu=gpu, search=True)
    assert plan.largest and plan.largest == 16 * plan.largest_samples
    for samples, fits in ((plan.largest_samples, True), (plan.largest_samples + 1, False)):
        tokens = {"batch_tokens": 16 * samples, "micro_tokens": 16 * samples}
        assert planned(config(train=tokens), gpu=gpu).fits_step is fits


def test_nothing_fits_into_too_little():
    plan = planned(config(), gpu=Gpu("NVIDIA H100 80GB HBM3", 1e-6, 1e12, 1e9, 1e9), search=True)
    assert (plan.largest, plan.fits) == (0, False)


def test_a_batch_that_cannot_be_dealt_out_is_refused():
    with pytest.raises(InputError, match="train.batch_tokens: 64 is no multiple of train.micro_tokens=64 on each of 2"):
        planned(config(train={"batch_tokens": 64, "micro_tokens": 64}), 2)


def test_eight_billion_parameters_on_4096_ranks():
    """Llama 3 8B's size (Dubey et al., arXiv 2407.21783): 8.03 billion."""
    batch = {"batch_tokens": 2048 * 2048, "micro_tokens": 2048}
    data = {"source": "text", "path": "nowhere", "max_length": 1025}
    layout = {"tp": 2, "replicas": 4}
    plan = planned(config({"precision": "bf16"}, model=BIG, train=batch, data=data), 4096, **layout)
    assert plan.parameters == 8_030_261_248
    assert plan.memory.state["parameters"] == pytest.approx(4 * plan.parameters / 1024, rel=0.01)
    assert plan.start < 3 * GIB < 4 * plan.parameters / 8  # shards, and the largest parameter whole


def test_plans_do_not_depend_on_what_was_planned_before():
    first = planned(config())
    planned(config(model={**MODEL, "num_hidden_layers": 2}), 4)
    again = planned(config())
    assert first.memory.peak == again.memory.peak and first.flops == again.flops
