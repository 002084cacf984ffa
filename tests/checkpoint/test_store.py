"""Tensors in a folder: any split over ranks can be read, damage is reported, and no code is executed."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.checkpoint import store
from jepa_scale.checkpoint.shard_view import ShardView
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.utils.errors import InputError
from tests.distributed.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SHAPES = [(7,), (5, 3), (4, 3, 5), (2, 3, 2, 4), (1,), ()]


def value(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cut(tensor: torch.Tensor, cuts: list[int]) -> list[ShardView]:
    """Split a contiguous tensor at ``cuts`` into shard views."""
    flat = tensor.view(-1)
    return [ShardView.of_range(tensor.shape, a, flat[a:b]) for a, b in pairwise([0, *sorted(cuts), len(flat)])]


def joined(parts: list[ShardView]) -> ShardView:
    return ShardView(parts[0].shape, parts[0].dtype, [part for boxes in parts for part in boxes.parts])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_split_is_read_by_any_other(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("tensors")
    shape = data.draw(st.sampled_from(SHAPES))
    expected = value(shape)
    cuts = st.lists(st.integers(0, expected.numel()), max_size=4)
    store.write(folder, {"a": joined(cut(expected, data.draw(cuts)))})
    got = torch.zeros(shape)
    store.read(folder, {"a": joined(cut(got, data.draw(cuts)))})
    assert torch.equal(got, expected)


def random_cuts(seed: int, elements: int, parts: int) -> list[int]:
    """Random cuts, equal on every rank; some parts are empty."""
    generator = random.Random(seed)
    return [generator.randint(0, elements) for _ in range(parts - 1)]


def write_split(ranks: ParallelContext, folder: str) -> dict[str, Any]:
    tensors = {"all": ShardView.whole(value((400, 500)))}
    for i, shape in enumerate(SHAPES * 3):
        tensor = value(shape, i)
        tensors[f"t{i}"] = cut(tensor, random_cuts(i, tensor.numel(), ranks.world_size))[ranks.rank]
    return store.write(Path(folder), tensors)


def read_split(ranks: ParallelContext, folder: str) -> bool:
    got = {"all": torch.zeros(400, 500)} | {f"t{i}": torch.zeros(shape) for i, shape in enumerate(SHAPES * 3)}
    tensors = {"all": ShardView.whole(got["all"])}
    mine = {}
    for i in range(len(SHAPES) * 3):
        tensor = got[f"t{i}"]
        bounds = [0, *sorted(random_cuts(100 + i, tensor.numel(), ranks.world_size)), tensor.numel()]
        mine[f"t{i}"] = slice(bounds[ranks.rank], bounds[ranks.rank + 1])
        tensors[f"t{i}"] = cut(tensor, bounds[1:-1])[ranks.rank]
    store.read(Path(folder), tensors)
    same = [torch.equal(got["all"], value((400, 500)))]
    for i, shape in enumerate(SHAPES * 3):
        part, flat = mine[f"t{i}"], got[f"t{i}"].view(-1)
        same.append(torch.equal(flat[part], value(shape, i).view(-1)[part]))
        same.append(int(flat.count_nonzero()) == part.stop - part.start)  # no other rank's part
    return all(same)


def test_ranks_write_and_other_numbers_of_ranks_read(tmp_path):
    files = run_ranks(write_split, 3, str(tmp_path))
    assert all(run_ranks(read_split, 2, str(tmp_path)))

    whole = store.read_whole(tmp_path, [f"t{i}" for i in range(len(SHAPES) * 3)])
    assert all(torch.equal(whole[f"t{i}"], value(shape, i)) for i, shape in enumerate(SHAPES * 3))

    everything = {name: told for of_rank in files for name, told in of_rank.items()}
    assert sorted(everything) == sorted(path.name for path in tmp_path.iterdir())
    assert sum(len(of_rank) for of_rank in files) == len(everything), "two ranks told of one file"
    assert everything == store.describe(list(tmp_path.iterdir()))
    tensors = sum(told["bytes"] for name, told in everything.items() if name != store.METADATA_FILE)
    assert 800_000 < tensors < 2 * 800_000, "what all ranks have was written more than once"


def test_dtypes_and_shapes_without_elements(tmp_path):
    tensors = {
        "bf16": value((3, 4)).bfloat16(),
        "int": torch.tensor(-(2**40)),
        "bool": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
        "transposed": value((3, 4)).t(),
    }
    store.write(tmp_path, {name: ShardView.whole(tensor) for name, tensor in tensors.items()})
    assert store.shapes(tmp_path) == {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    got = store.read_whole(tmp_path, list(tensors))
    assert all(torch.equal(got[name], tensors[name]) for name in tensors)
    wide = torch.zeros(3, 4)
    store.read(tmp_path, {"bf16": ShardView.whole(wide)})
    assert torch.equal(wide, tensors["bf16"].float())


def test_other_models_are_refused(tmp_path):
    store.write(tmp_path, {"a": ShardView.whole(torch.ones(2, 3))})
    with pytest.raises(InputError, match=r"holds no tensor 'b'"):
        store.read(tmp_path, {"b": ShardView.whole(torch.ones(2, 3))})
    with pytest.raises(InputError, match=r"a has shape \(2, 3\), the model's has \(3, 2\)"):
        store.read(tmp_path, {"a": ShardView.whole(torch.ones(3, 2))})
    with pytest.raises(InputError, match=r"holds no tensor 'b'"):
        store.read_whole(tmp_path, ["a", "b"])


def test_a_run_with_another_optimizer_is_told_what_to_set(tmp_path):
    store.write(tmp_path, {"model/a": ShardView.whole(torch.ones(2)), "exp_avg/a": ShardView.whole(torch.ones(2))})
    with pytest.raises(InputError, match=r"holds no tensor 'momentum_buffer/a'; .*set optim.method"):
        store.read(tmp_path, {"momentum_buffer/a": ShardView.whole(torch.ones(2))})
    with pytest.raises(InputError, match=r"holds no tensor 'momentum_buffer/b'; it is the checkpoint of another model"):
        store.read(tmp_path, {"momentum_buffer/b": ShardView.whole(torch.ones(2))})


def call(module: str, name: str, argument: str) -> bytes:
    """Return a pickle that calls a function when it is loaded."""

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("torch.distributed.checkpoint.filesystem", "os.system"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch", "os.system"),
        ("builtins", "eval"),
    ],
)
def test_metadata_that_names_anything_else_is_not_executed(tmp_path, module, name):
    ran = tmp_path / "ran"
    code = f"touch {ran}" if name.endswith("system") else f"open({str(ran)!r}, 'w')"
    payload = call(module, name, code)
    pickle.loads(payload)
    assert ran.exists(), "the payload works"
    ran.unlink()

    (tmp_path / store.METADATA_FILE).write_bytes(payload)
    for read in (store.read_metadata, store.shapes, lambda folder: store.read_whole(folder, ["a"])):
        with pytest.raises(InputError, match=rf"cannot be read: it names {module}\.{name}"):
            read(tmp_path)
    assert not ran.exists()


class Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        import os

        return os.system, (self.command,)


def test_a_tensor_file_with_a_pickle_is_not_executed(tmp_path):
    store.write(tmp_path, {"a": ShardView.whole(torch.ones(2, 3))})
    torch.save(Evil(f"touch {tmp_path / 'ran'}"), tmp_path / "__0_0.distcp")
    metadata = store.read_metadata(tmp_path)
    for stored in metadata.storage_data.values():
        stored.length = (tmp_path / "__0_0.distcp").stat().st_size
    (tmp_path / store.METADATA_FILE).write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match="cannot be read: rank 0: UnpicklingError"):
        store.read_whole(tmp_path, ["a"])
    assert not (tmp_path / "ran").exists()


def test_files_elsewhere_are_not_read(tmp_path):
    store.write(tmp_path / "one", {"a": ShardView.whole(torch.ones(2, 3))})
    metadata = store.read_metadata(tmp_path / "one")
    for stored in metadata.storage_data.values():
        stored.relative_path = "../one/__0_0.distcp"
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / store.METADATA_FILE).write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match=r"it names \.\./one/__0_0\.distcp, which is not in its folder"):
        store.read_whole(tmp_path / "two", ["a"])


def test_damaged_metadata_is_named(tmp_path):
    store.write(tmp_path, {"a": ShardView.whole(torch.ones(2, 3))})
    file = tmp_path / store.METADATA_FILE
    good = file.read_bytes()
    generator = random.Random(0)
    damaged = [b"", good[:100], b"garbage", pickle.dumps({}), pickle.dumps([1, 2])]
    for _ in range(100):
        position = generator.randrange(len(good))
        damaged.append(good[:position] + bytes([good[position] ^ 1 << generator.randrange(8)]) + good[position + 1 :])
    refused = 0
    for content in damaged:
        file.write_bytes(content)
        try:
            store.shapes(tmp_path)
        except InputError as error:
            refused += 1
            assert str(file) in str(error)
    assert refused >= 40
    file.unlink()
    with pytest.raises(InputError, match="No such file"):
        store.shapes(tmp_path)


def test_a_missing_or_truncated_tensor_file_is_named(tmp_path):
    store.write(tmp_path, {"a": ShardView.whole(torch.ones(20, 30))})
    file = tmp_path / "__0_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[:1000])
    with pytest.raises(InputError, match="cannot be read"):
        store.read_whole(tmp_path, ["a"])
    file.unlink()
    with pytest.raises(InputError, match=r"cannot be read: rank 0: .*__0_0\.distcp"):
        store.read(tmp_path, {"a": ShardView.whole(torch.ones(20, 30))})


def test_a_flipped_bit_changes_the_description(tmp_path):
    store.write(tmp_path, {"a": ShardView.whole(value((20, 30)))})
    for file in sorted(tmp_path.iterdir()):
        told, content = store.describe([file]), file.read_bytes()
        for position in range(0, len(content), max(1, len(content) // 50)):
            file.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
            other = store.describe([file])
            assert other[file.name]["bytes"] == told[file.name]["bytes"]
            assert other[file.name]["sha256"] != told[file.name]["sha256"]
        file.write_bytes(content)
        assert store.describe([file]) == told


def test_a_write_that_fails_is_an_ordinary_exception(tmp_path):
    (tmp_path / "__0_0.distcp").mkdir()
    with pytest.raises(store.StoreError, match="rank 0: IsADirectoryError") as error:
        store.write(tmp_path, {"a": ShardView.whole(torch.ones(2, 3))})
    assert isinstance(error.value, Exception)
    assert isinstance(error.value.failures[0][0], IsADirectoryError)
