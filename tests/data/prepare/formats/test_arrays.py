import json

import numpy as np
import pytest

from jepa_scale.data.prepare.base import BadRecord, PrepareOptions
from jepa_scale.data.prepare.formats.arrays import is_token_folder, open_tokens
from jepa_scale.data.prepare.job import prepare
from jepa_scale.utils.errors import InputError

METADATA = {"vocab_size": 50, "max_seq_len": 6, "eos_id": 1, "pad_id": 0, "mask_id": 49}
ROWS = np.array([[5, 6, 7, 1, 0, 0], [1, 0, 0, 0, 0, 0], [8, 1, 9, 0, 49, 1]], dtype=np.int32)


def folder(tmp_path, arrays=(ROWS, ROWS[:1] + 2), **changes):
    metadata = {**METADATA, **changes}
    (tmp_path / "metadata.json").write_text(json.dumps({k: v for k, v in metadata.items() if v is not None}))
    for n, array in enumerate(arrays):
        np.save(tmp_path / f"shard_{n:03d}.npy", array)
    return tmp_path


def test_rows_lose_padding_and_eos_wherever_they_stand(tmp_path):
    source = open_tokens(folder(tmp_path))
    items = list(source.records("train"))
    assert [i.value.tolist() if not isinstance(i, BadRecord) else i.reason for i in items] == [
        [5, 6, 7],
        "empty document",
        [8, 9, 49],
        [7, 8, 9, 3, 2, 2],
    ]
    assert items[1].where == f"{tmp_path}/shard_000.npy#1"
    assert source.count("train") == 4
    assert source.vocabulary.vocab_size == 50
    assert source.vocabulary.special == {"eos": 1, "pad": 0, "mask": 49}


def test_rows_of_one_token_or_none_are_left_out_and_counted_though_others_would_stop(tmp_path):
    """SpanJEPA's script cuts a text into rows and writes its last token as a row of its own."""
    rows = np.array([[5, 6, 7, 1, 0, 0], [8, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]], dtype=np.int32)
    raw = tmp_path / "rows"
    raw.mkdir()
    index = prepare(folder(raw, [rows]), tmp_path / "out", PrepareOptions(), 1, progress=False)
    assert index.skipped == {"single token": 1, "empty document": 1}
    assert sum(shard.samples for shard in index.splits["train"]) == 1


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64])
def test_any_integers_will_do(tmp_path, dtype):
    assert len(list(open_tokens(folder(tmp_path, [ROWS.astype(dtype)])).records("train"))) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": None}, "metadata.json: key 'vocab_size' is missing"),
        ({"max_seq_len": 7}, "shard_000.npy: rows have 6 ids, max_seq_len of .*metadata.json is 7"),
        ({"vocab_size": 9, "mask_id": 8}, "shard_000.npy, row 2: id 9 is not in 0 … vocab_size - 1 = 8"),
        ({"mask_id": 50}, "metadata.json: mask_id 50 is not below vocab_size 50"),
        ({"pad_id": -1}, "metadata.json: pad_id must be a whole number, got -1"),
        ({"eos_id": "1"}, "metadata.json: eos_id must be a whole number, got '1'"),
        ({"max_seq_len": 0}, "max_seq_len must be a whole number, got 0"),
    ],
)
def test_metadata_that_contradicts_the_shards_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        open_tokens(folder(tmp_path, **changes))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (ROWS.astype(np.float32), r"shard_001.npy: must be \(rows, T\) of integers, is \(3, 6\) of float32"),
        (ROWS[0], r"shard_001.npy: must be \(rows, T\) of integers, is \(6,\) of int32"),
        (np.where(ROWS == 7, -3, ROWS), "shard_001.npy, row 0: id -3 is not in"),
        (ROWS[:, :5], "shard_001.npy: rows have 5 ids"),
        (np.array([[{}]], dtype=object), "shard_001.npy: is not a complete NumPy array"),
    ],
)
def test_a_shard_that_contradicts_the_metadata_is_refused(tmp_path, array, message):
    with pytest.raises(InputError, match=message):
        open_tokens(folder(tmp_path, [ROWS, array]))


def test_a_bad_id_after_the_first_block_of_rows_is_found(tmp_path):
    rows = np.full((9000, 6), 3, dtype=np.int32)
    rows[8999, 5] = 50
    with pytest.raises(InputError, match="row 8999: id 50"):
        open_tokens(folder(tmp_path, [rows]))


def test_missing_and_damaged_files_are_refused(tmp_path):
    folder(tmp_path)
    (tmp_path / "shard_000.npy").write_bytes((tmp_path / "shard_000.npy").read_bytes()[:-9])
    with pytest.raises(InputError, match="shard_000.npy: is not a complete NumPy array"):
        open_tokens(tmp_path)
    (tmp_path / "metadata.json").write_text("{")
    with pytest.raises(InputError, match="metadata.json: not valid JSON"):
        open_tokens(tmp_path)
    (tmp_path / "metadata.json").unlink()
    assert is_token_folder(tmp_path)
    with pytest.raises(InputError, match="metadata.json: cannot be read"):
        open_tokens(tmp_path)
    folder(tmp_path, [])
    for shard in tmp_path.glob("*.npy"):
        shard.unlink()
    assert is_token_folder(tmp_path)
    with pytest.raises(InputError, match="holds metadata.json but no shard"):
        open_tokens(tmp_path)
    (tmp_path / "metadata.json").write_text('{"name": "something else"}')
    assert not is_token_folder(tmp_path)


def test_the_fingerprint_follows_content_not_place(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = open_tokens(folder(tmp_path / "a")), open_tokens(folder(tmp_path / "b"))
    assert one.fingerprint() == two.fingerprint()
    folder(tmp_path / "b", eos_id=2)
    assert one.fingerprint() != two.fingerprint()
