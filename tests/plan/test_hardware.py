"""The table of GPUs."""

import pytest

from jepa_scale.plan.hardware import GPUS, find_gpu
from jepa_scale.utils.errors import InputError


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_a_peak(name):
    gpu = find_gpu(name)
    half = "fp16" if name == "t4" else "bf16"
    assert gpu.flops(half, True) > gpu.flops("fp32", True) > gpu.flops("fp32", False) / 2 > 0


def test_what_a_gpu_does_not_compute_in_is_refused_by_key():
    with pytest.raises(InputError, match="engine.precision: Tesla T4 has no bf16; set fp16 or fp32"):
        find_gpu("t4").flops("bf16", True)


def test_an_unknown_one_is_named():
    with pytest.raises(InputError, match="--gpu: unknown GPU 'h300'; did you mean 'h200'?"):
        find_gpu("h300")
    with pytest.raises(InputError, match="choose one of h100, h200"):
        find_gpu("potato")
