"""Rows of token ids from a file to examples: what is stored, cut and refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from jepa_scale.data import load_data, parse_data
from jepa_scale.data.examples import Document, LabelledTokens
from jepa_scale.packing import IGNORE
from jepa_scale.utils.errors import InputError


def opened(folder: Path, rows: list[dict], **options):
    (folder / "data").mkdir()
    for split in ("train", "test"):
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"vocab_size": 50, "cache": str(folder / "cache"), **options}
    return load_data(parse_data({"source": "tokens", "path": str(folder / "data"), **values}))


def test_examples_are_the_rows(tmp_path):
    rows = [
        {"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]},
        {"input_ids": [7, 8, 9], "token_labels": [40, -100, 49]},
        {"input_ids": [7, 8, 9]},
    ]
    data = opened(tmp_path, rows)
    assert (data.kind, data.vocab_size, data.tokenizer) == ("tokens", 50, None)
    shifted, aligned, plain = (data.splits["test"][number] for number in range(3))
    assert isinstance(shifted, LabelledTokens) and isinstance(plain, Document)
    assert [side.tolist() for side in shifted.lm_sequence()] == [[3, 4, 5, 6], [IGNORE, 5, 6, IGNORE]]
    assert [side.tolist() for side in aligned.lm_sequence()] == [[7, 8, 9, 9], [40, IGNORE, 49, IGNORE]]
    assert [side.tolist() for side in plain.lm_sequence()] == [[7, 8, 9], [8, 9, IGNORE]]
    assert data.train.sizes(np.arange(3)).tolist() == [4, 4, 3]


def test_a_long_row_is_dropped_or_cut_with_its_labels(tmp_path):
    rows = [{"input_ids": [1, 2, 3, 4, 5, 6], "token_labels": [11, 12, 13, 14, 15, 16]}, {"input_ids": [1, 2]}]
    dropped, truncated = tmp_path / "a", tmp_path / "b"
    dropped.mkdir()
    data = opened(dropped, rows, max_length=3)
    assert len(data.train) == 1 and data.train.counts["dropped"] == 1
    truncated.mkdir()
    cut = opened(truncated, rows, max_length=3, long="truncate").train[0]
    assert [side.tolist() for side in cut.lm_sequence()] == [[1, 2, 3, 4], [11, 12, 13, IGNORE]]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"input_ids": [1, 50]}, {}, "token id outside the vocabulary: 50 of 50; set data.vocab_size"),
        ({"input_ids": [1, 2], "labels": [1, 60]}, {}, "label outside the vocabulary: 60 of 50"),
        (
            {"input_ids": [1, 2]},
            {"tokenizer": "bpe", "vocab_size": 300},
            "data.tokenizer: none can be trained on token ids",
        ),
        ({"input_ids": [1, 2]}, {"long": "split"}, "data.long: split: tokens cannot be cut"),
        ({"text": "a b c"}, {}, "not recognised"),
    ],
)
def test_what_is_refused(tmp_path, row, options, message):
    with pytest.raises(InputError) as error:
        opened(tmp_path, [row, row], **options)
    assert message in str(error.value)


def test_a_tokenizer_of_none_is_for_token_ids_alone(tmp_path):
    (tmp_path / "a.txt").write_text("some words\n")
    values = {"source": "text", "path": str(tmp_path / "a.txt"), "tokenizer": "none", "cache": str(tmp_path / "cache")}
    with pytest.raises(InputError, match="data.tokenizer: none is for rows of token ids, but the data are text"):
        load_data(parse_data(values))


def test_a_damaged_label_is_named(tmp_path):
    from jepa_scale.data.shards.decode import BadSample, decode
    from jepa_scale.data.shards.format import Sample, write_shard

    for labels, message in (([60, IGNORE], "label 60 is outside"), ([1, 2, IGNORE], "has 3 tokens, but 2")):
        sample = Sample({"npy": np.array([1, 2], np.uint16), "labels.npy": np.array(labels, np.int32)}, 2)
        write_shard(tmp_path, "train-000000.tar", [sample])
        table = np.load(tmp_path / "train-000000.idx.npy")
        data = (tmp_path / "train-000000.tar").read_bytes()[table["start"][0] : table["stop"][0]]
        with pytest.raises(BadSample, match=message) as error:
            decode(data, "tokens", 2, 50)
        assert error.value.extension == "labels.npy"
