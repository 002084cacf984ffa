import pickle
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.data.prepare.base import BadRecord, PrepareOptions, Record
from jepa_scale.data.prepare.formats.source import Part, Source, Vocabulary, identity
from jepa_scale.data.prepare.selection import held_out, select
from jepa_scale.utils.errors import InputError


def read(name: str, n: int):
    for k in range(n):
        yield BadRecord(f"{name}#{k}", "bad") if k % 7 == 6 else Record(f"{name}#{k}", k)


def source(kind="text", vocabulary=None, **sizes: int) -> Source:
    parts = {name: Part(partial(read, name, n), n) for name, n in sizes.items()}
    return Source(kind, parts, partial(identity, sizes), vocabulary)


def wheres(s: Source, split: str) -> list[str]:
    return [item.where for item in s.records(split)]


@given(st.integers(0, 200), st.floats(0.01, 0.99), st.integers(0, 3))
def test_a_fraction_is_held_out_and_nothing_is_lost(n, fraction, seed):
    chosen = select(source(train=n), PrepareOptions(valid_fraction=fraction, split_seed=seed))
    train, valid = wheres(chosen, "train"), wheres(chosen, "valid")
    assert not set(train) & set(valid)
    number = {f"train#{k}": k for k in range(n)}
    assert sorted([*train, *valid], key=number.get) == list(number)
    assert train == sorted(train, key=number.get)
    assert wheres(chosen, "valid") == valid
    larger = select(source(train=n), PrepareOptions(valid_fraction=min(fraction + 0.005, 0.999), split_seed=seed))
    assert set(valid) <= set(wheres(larger, "valid"))


def test_the_choice_is_fixed_and_near_the_fraction():
    # What is held out is part of what split_seed means: a change here changes every prepared data set.
    assert [n for n in range(60) if held_out(n, 0, 0.1)] == EXPECTED
    assert 880 < sum(held_out(n, 3, 0.1) for n in range(10_000)) < 1120
    assert [n for n in range(60) if held_out(n, 1, 0.1)] != EXPECTED


EXPECTED = [14, 34, 50]


def test_limits_count_bad_records_and_come_after_the_choice():
    limited = select(source(train=30, valid=20, test=20), PrepareOptions(max_items=8, max_eval_items=3))
    assert wheres(limited, "train") == [f"train#{k}" for k in range(8)]
    assert [isinstance(i, BadRecord) for i in limited.records("train")] == [False] * 6 + [True, False]
    assert wheres(limited, "valid") == ["valid#0", "valid#1", "valid#2"]
    assert wheres(limited, "test") == ["test#0", "test#1", "test#2"]
    assert [limited.count(s) for s in limited.splits] == [8, 3, 3]
    both = select(source(train=30), PrepareOptions(valid_fraction=0.5, max_items=4))
    free = select(source(train=30), PrepareOptions(valid_fraction=0.5))
    assert wheres(both, "train") == wheres(free, "train")[:4]
    assert wheres(both, "valid") == wheres(free, "valid")
    assert select(source(train=3), PrepareOptions(max_items=9)).count("train") == 3


def test_another_path_gives_valid():
    chosen = select(source(train=5, valid=2), PrepareOptions(), valid=source(train=3))
    assert wheres(chosen, "valid") == ["train#0", "train#1", "train#2"]
    assert len(wheres(chosen, "train")) == 5
    chosen = select(source(train=5), PrepareOptions(), valid=source(train=3, valid=1))
    assert wheres(chosen, "valid") == ["valid#0"]


def test_contradictions_are_refused():
    with pytest.raises(
        InputError, match=r"data\.valid_fraction: the data have evaluation splits of their own \(valid, test\)"
    ):
        select(source(train=5, valid=1, test=1), PrepareOptions(valid_fraction=0.1))
    with pytest.raises(InputError, match="data.valid_fraction"):
        select(source(train=5), PrepareOptions(valid_fraction=0.1), valid=source(train=1))
    with pytest.raises(InputError, match="data.valid_path: holds chat, the training data hold text"):
        select(source(train=5), PrepareOptions(), valid=source("chat", train=1))
    with pytest.raises(InputError, match="data.valid_path: has another vocab_size"):
        select(source(train=5, vocabulary=Vocabulary(9, {})), PrepareOptions(), valid=source(train=1))
    with pytest.raises(InputError, match="data.valid_fraction"):
        select(source("reversal", train=5, test=5), PrepareOptions(valid_fraction=0.1))


def test_every_choice_has_its_own_fingerprint_and_survives_pickling():
    base = source(train=20)
    made = [
        select(base, PrepareOptions(**o))
        for o in (
            {},
            {"valid_fraction": 0.1},
            {"valid_fraction": 0.2},
            {"valid_fraction": 0.1, "split_seed": 1},
            {"max_items": 3},
            {"max_items": 4},
            {"max_eval_items": 3},
        )
    ]
    made.append(select(base, PrepareOptions(), valid=source(train=2)))
    made.append(select(base, PrepareOptions(), valid=source(train=3)))
    prints = [m.fingerprint() for m in made]
    assert len(set(prints)) == len(prints)
    for one in made:
        again = pickle.loads(pickle.dumps(one))
        assert again.fingerprint() == one.fingerprint()
        assert wheres(again, "train") == wheres(one, "train")
