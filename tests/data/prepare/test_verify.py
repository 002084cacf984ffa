import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jepa_scale.cli.main import main
from jepa_scale.data.prepare.verify import verify
from jepa_scale.data.shards.format import Index, Sample, write_shard
from jepa_scale.utils.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    out = tmp_path / "shards"
    out.mkdir()
    shards = []
    for number in range(2):
        samples = [Sample({"npy": np.arange(20 + n, dtype=np.uint16), "json": {"n": n}}, 20 + n) for n in range(9)]
        shards.append(write_shard(out, f"train-{number:06d}.tar", samples))
    Index("chat", {"train": shards}, 100, {"eos": 0}, tokenizer="tokenizer").write(out)
    (out / "tokenizer").mkdir()
    yield out


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def starts(folder: Path) -> np.ndarray:
    return np.load(folder / "train-000001.idx.npy")["start"].astype(int)


def test_a_whole_folder(folder: Path) -> None:
    assert verify(folder, progress=False) == []
    assert main(["data", "verify", str(folder)]) == 0


@pytest.mark.parametrize(
    ("offset", "says"),
    [
        (0, r"sample train-000001-000004 \(member train-000001-000004.\*\) is damaged"),  # the member's name
        (124, r"sample train-000001-000004 \(member train-000001-000004.(npy|json)\) is damaged"),  # its length
        (
            512 + 5,
            r"sample train-000001-000004 \(member train-000001-000004.(npy|json)\) is damaged in bytes [\d,]+ to",
        ),
        (1023, r"sample train-000001-000004 "),  # padding
    ],
)
def test_a_flipped_bit_in_a_tar(folder: Path, offset: int, says: str, capsys: pytest.CaptureFixture) -> None:
    flip(folder / "train-000001.tar", starts(folder)[4] + offset)
    (line,) = verify(folder, progress=False)
    assert re.search(rf"train-000001.tar: {says}", line)
    assert main(["data", "verify", str(folder)]) == 2
    shown = capsys.readouterr()
    assert shown.out == line + "\n"
    assert shown.err == f"jepa-scale: {folder}: is damaged; remove it and prepare the data again\n"


def test_a_flipped_bit_at_the_end_of_a_tar(folder: Path) -> None:
    flip(folder / "train-000001.tar", -1)
    assert verify(folder, progress=False) == [
        f"{folder / 'train-000001.tar'}: SHA-256 differs from the index's, after its last sample"
    ]


def test_a_flipped_bit_in_an_index(folder: Path) -> None:
    flip(folder / "train-000000.idx.npy", -3)
    idx = f"{folder / 'train-000000.idx.npy'}: SHA-256 differs from the index's"
    assert verify(folder, progress=False) == [idx]
    flip(folder / "train-000000.tar", 600)
    assert verify(folder, progress=False) == [idx, f"{folder / 'train-000000.tar'}: SHA-256 differs from the index's"]


def test_a_truncated_tar(folder: Path) -> None:
    file = folder / "train-000001.tar"
    size = file.stat().st_size
    cut = starts(folder)[7] + 700
    file.write_bytes(file.read_bytes()[:cut])
    assert verify(folder, progress=False) == [
        f"{file}: has {cut:,} bytes instead of {size:,}",
        f"{file}: sample train-000001-000007 is cut off",
        f"{file}: sample train-000001-000008 is cut off",
    ]
    file.write_bytes(b"")
    found = verify(folder, progress=False)
    assert len(found) == 1 + 5 + 1
    assert found[-1] == f"{file}: 4 more of its 9 samples are damaged"


def test_missing_files(folder: Path) -> None:
    (folder / "train-000000.tar").unlink()
    (folder / "train-000001.idx.npy").unlink()
    shutil.rmtree(folder / "tokenizer")
    assert verify(folder, progress=False) == [
        f"{folder / 'train-000000.tar'}: is missing",
        f"{folder / 'train-000001.idx.npy'}: is missing",
        f"{folder / 'tokenizer'}: the tokenizer is missing",
    ]
    (folder / "index.json").unlink()
    with pytest.raises(InputError, match=r"index.json: cannot be read"):
        verify(folder)
