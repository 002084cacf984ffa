"""What `engine.precision` comes to."""

from unittest.mock import patch

import pytest
import torch

from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.engines import precision
from jepa_scale.engines.precision import compute_dtype, has_bf16, resolve_precision
from tests.distributed.launch import run_ranks

CPU = ParallelContext(0, 1, 0, torch.device("cpu"), "python")


@pytest.mark.parametrize(
    ("capabilities", "there"),
    [
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({"architecture": "riscv"}, False),
    ],
)
def test_a_cpu_has_bf16_if_one_of_its_instruction_sets_does(monkeypatch, capabilities, there):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert has_bf16(CPU.device) is there


@pytest.mark.parametrize(
    ("asked", "there", "settled", "told"),
    [
        ("auto", True, "bf16", False),
        ("auto", False, "fp32", False),
        ("bf16", True, "bf16", False),
        ("bf16", False, "bf16", True),
        ("fp32", True, "fp32", False),
        ("fp32", False, "fp32", False),
    ],
)
def test_what_is_asked_for_is_done_and_auto_is_what_is_there(monkeypatch, caplog, asked, there, settled, told):
    monkeypatch.setattr(precision, "has_bf16", lambda device: there)
    assert resolve_precision(asked, CPU) == settled
    assert ("engine.precision: this CPU has no instructions for bf16" in caplog.text) is told
    compute_dtype(settled)


def settled_where_rank_1_lacks_it(ranks):
    with patch.object(precision, "has_bf16", lambda device: ranks.rank != 1):
        return resolve_precision("auto", ranks)


def test_all_ranks_compute_alike():
    assert run_ranks(settled_where_rank_1_lacks_it, 2) == ["fp32", "fp32"]
