"""The table of GPUs."""

import pytest

from jepa_scale.plan.hardware import GPUS, find_gpu
from jepa_scale.utils.errors import InputError


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_a_peak(name):
    gpu = find_gpu(name)
    assert gpu.flops("bf16", True) > gpu.flops("fp32", True) > gpu.flops("fp32", False) / 2 > 0


def test_an_unknown_one_is_named():
    with pytest.raises(InputError, match="--gpu: unknown GPU 'h300'; did you mean 'h200'?"):
        find_gpu("h300")
    with pytest.raises(InputError, match="choose one of h100, h200"):
        find_gpu("potato")
