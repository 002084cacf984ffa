"""Shards are what webdataset writes; an index from elsewhere says what is of the right type and can be true."""

import hashlib
import io
import json
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset import TarWriter

from jepa_scale.data.shards import tar
from jepa_scale.data.shards.format import Index, Sample, ShardInfo, write_shard
from jepa_scale.utils.errors import InputError

INDEX = Index("text", {"train": [ShardInfo("a.tar", 4, 40, 8192, "", "")]}, 50, {"eos": 0})


def by_webdataset(stem: str, samples: list[Sample]) -> tuple[bytes, list[int]]:
    """The shard by webdataset's writer and numpy's ``save``, and the end of each sample in it."""

    def encoded(value) -> bytes:
        if isinstance(value, dict):
            return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
        raw = io.BytesIO()
        np.save(raw, value)
        return raw.getvalue()

    file, ends = io.BytesIO(), []
    with TarWriter(file, encoder=False, user="", group="", mode=0o644, mtime=0) as writer:
        for number, sample in enumerate(samples):
            members = {name: encoded(value) for name, value in sample.members.items()}
            writer.write({"__key__": f"{stem}-{number:06d}", **members})
            ends.append(writer.tarstream.offset)
    return file.getvalue(), ends


def test_a_shard_is_the_one_that_webdataset_writes(tmp_path):
    rng = np.random.default_rng(0)
    samples = [
        Sample({"npy": rng.integers(0, 9, n).astype(kind), "labels.npy": np.arange(n, dtype=np.int32)}, n)
        for n, kind in (
            (1, np.uint16),
            (192, np.uint16),
            (193, np.uint32),
            (7000, np.uint16),
        )  # to a block's end and over it
    ]
    samples += [Sample({"json": {"a": "ü", "b": [1]}, "npy": np.arange(6, dtype=np.int64).reshape(2, 3)}, 6)]
    info = write_shard(tmp_path, "train-000000.tar", iter(samples))
    expected, ends = by_webdataset("train-000000", samples)
    assert (tmp_path / "train-000000.tar").read_bytes() == expected
    assert (info.sha256, info.bytes) == (hashlib.sha256(expected).hexdigest(), len(expected))
    table = np.load(tmp_path / "train-000000.idx.npy")
    assert table["stop"].tolist() == ends and table["start"].tolist() == [0, *ends[:-1]]
    assert table["crc"].tolist() == [zlib.crc32(expected[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    with pytest.raises(ValueError, match="at least one sample"):
        write_shard(tmp_path, "empty.tar", [])
    assert not list(tmp_path.glob("*.partial"))


@settings(max_examples=30)
@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=120), st.binary(max_size=1100)
)
def test_any_member_is_as_tarfile_has_it(name, content):
    file = io.BytesIO()
    with TarWriter(file, encoder=False, user="", group="", mode=0o644, mtime=0) as writer:
        writer.write({"__key__": name, "x": content})
    made = tar.member(f"{name}.x", content)
    assert made + tar.end(len(made)) == file.getvalue()


def changed(**changes):
    """The index's text after changes of top-level keys, or of the shard's."""
    values = json.loads(INDEX.to_json())
    shard = values["splits"]["train"][0]
    for key, value in changes.items():
        (shard if key in shard else values)[key] = value
    return json.dumps(values)


def test_a_true_index_is_read():
    assert Index.from_json(INDEX.to_json(), "i") == INDEX


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 10**12}, r"a.tar cannot hold 1,000,000,000,000 samples of 40 tokens in 8,192 bytes; prepare"),
        ({"tokens": 10**12}, r"a.tar cannot hold"),
        ({"bytes": 100}, r"a.tar cannot hold"),
        ({"samples": -1}, r"splits.train.0.samples: input should be greater than or equal to 0"),
        ({"samples": 10**30}, r"splits.train.0.samples: "),
        ({"samples": True}, r"splits.train.0.samples: input should be a valid integer"),
        ({"samples": "4"}, r"splits.train.0.samples: input should be a valid integer"),
        ({"samples": 4.0}, r"splits.train.0.samples: input should be a valid integer"),
        ({"name": 3}, r"splits.train.0.name: input should be a valid string"),
        ({"vocab_size": 10**12}, r"vocab_size: input should be less than or equal to 4294967296"),
        ({"vocab_size": 0}, r"vocab_size: "),
        ({"kind": "pictures"}, r"kind: input should be "),
        ({"splits": {"train": {"a": 1}}}, r"splits.train: "),
        ({"splits": None}, r"splits: "),
        ({"skipped": {"x": -1}}, r"skipped.x: "),
        ({"more": 1}, r"more: "),
    ],
)
def test_what_cannot_be_true_is_refused_in_one_line(changes, message):
    with pytest.raises(InputError, match=rf"^i: {message}") as error:
        Index.from_json(changed(**changes), "i")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", "null", "[" * 100_000, '{"format": 1}'])
def test_what_is_no_index_is_refused(text):
    with pytest.raises(InputError, match=r"^i: "):
        Index.from_json(text, "i")
