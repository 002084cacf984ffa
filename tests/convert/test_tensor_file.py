"""Files written tensor by tensor are what the safetensors library reads, whatever the tensors are."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from jepa_scale.convert import tensor_file
from jepa_scale.convert.tensor_file import Entry, write_tensors
from jepa_scale.utils.errors import InputError

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])


@settings(max_examples=40)
@given(st.lists(st.tuples(SHAPES, DTYPES), min_size=1, max_size=6), st.integers(1, 9))
def test_the_library_reads_what_was_written(kinds, slab):
    kinds = sorted(kinds, key=lambda kind: -kind[1].itemsize)
    torch.manual_seed(0)
    tensors = [(torch.randn(shape) * 3).to(dtype) for shape, dtype in kinds]
    entries = [Entry(f"t{i}.ü", shape, dtype) for i, (shape, dtype) in enumerate(kinds)]
    before, tensor_file._SLAB = tensor_file._SLAB, slab
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file.safetensors"
            told = write_tensors(path, entries, iter(tensors))
            data = path.read_bytes()
            assert told == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            assert [p.name for p in Path(folder).iterdir()] == ["file.safetensors"]
            read = load_file(path)
    finally:
        tensor_file._SLAB = before
    assert len(read) == len(entries)
    for entry, tensor in zip(entries, tensors, strict=True):
        assert read[entry.name].dtype == tensor.dtype and torch.equal(read[entry.name], tensor)


def test_what_does_not_lie_in_order_is_written_in_order(tmp_path):
    tensor = torch.arange(12.0).view(3, 4).T
    write_tensors(tmp_path / "x", [Entry("a", (4, 3), torch.bfloat16)], [tensor])
    assert torch.equal(load_file(tmp_path / "x")["a"], tensor.bfloat16())


def test_infinities_stay_and_overflow_is_refused(tmp_path):
    infinite = torch.tensor([1.0, float("inf"), float("nan")])
    write_tensors(tmp_path / "x", [Entry("a", (3,), torch.float16)], [infinite])
    assert load_file(tmp_path / "x")["a"].isinf().tolist() == [False, True, False]
    with pytest.raises(InputError, match=r"a: holds 1e\+05, more than torch.float16 can"):
        write_tensors(tmp_path / "y", [Entry("a", (2,), torch.float16)], [torch.tensor([1.0, -1e5])])
    assert not (tmp_path / "y").exists()
