import pytest
import torch

from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.engines import resolve
from jepa_scale.utils.errors import InputError


@pytest.mark.parametrize(
    ("name", "launcher", "expected"),
    [
        ("auto", "deepspeed", "deepspeed"),
        ("auto", "torchrun", "fsdp"),
        ("auto", "python", "fsdp"),
        ("fsdp", "deepspeed", "fsdp"),
        ("deepspeed", "python", "deepspeed"),
    ],
)
def test_resolve(name, launcher, expected):
    assert resolve(name, ParallelContext(0, 1, 0, torch.device("cpu"), launcher)) == expected


def test_resolve_refuses_an_unknown_engine():
    with pytest.raises(InputError, match="unknown engine 'megatron'; one of auto, deepspeed, fsdp"):
        resolve("megatron", ParallelContext(0, 1, 0, torch.device("cpu"), "python"))
