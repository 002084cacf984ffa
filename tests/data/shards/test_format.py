"""An index from elsewhere: what it says is of the right type and can be true."""

import json

import pytest

from jepa_scale.data.shards.format import Index, ShardInfo
from jepa_scale.utils.errors import InputError

INDEX = Index("text", {"train": [ShardInfo("a.tar", 4, 40, 8192, "", "")]}, 50, {"eos": 0})


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
