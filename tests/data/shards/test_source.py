from pathlib import Path
from typing import Any

import pytest

from jepa_scale.data import load_data, parse_data
from jepa_scale.utils.errors import DataError, InputError
from tests.data.corpus import write_text


def load(path: Path | str, **keys: Any) -> Any:
    return load_data(parse_data({"source": "text", "path": str(path), "max_length": 8, **keys}))


def test_prepared_shards_are_opened_where_they_lie(tmp_path: Path) -> None:
    index = write_text(tmp_path, [3, 4])
    data = load(tmp_path)
    assert data.vocab_size == index.vocab_size
    assert dict(data.special) == {"eos": 0}
    assert set(data.splits) == {"valid"}
    assert data.counts["samples"] == 7
    assert data.counts["pieces"] == len(data.train) == data.order(0).length
    assert data.train[0].tokens.max() < index.vocab_size
    assert len(load(f"{tmp_path}/train-000001.tar").train) < len(data.train)


def test_raw_text_is_prepared_into_the_cache_once(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("One fish, two fish.\n\nRed fish, blue fish.\n" * 40)
    keys = {"cache": str(tmp_path / "cache"), "vocab_size": 280, "documents": "paragraph"}
    data = load(tmp_path / "corpus.txt", **keys)
    assert data.counts["samples"] == 41
    assert data.tokenizer is not None
    shards = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.tar")}
    again = load(tmp_path / "corpus.txt", **keys)
    assert again.fingerprint == data.fingerprint
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.tar")} == shards
    (tmp_path / "corpus.txt").write_text("Something else entirely.\n\n" * 40)
    assert load(tmp_path / "corpus.txt", **keys).fingerprint != data.fingerprint


def test_what_decides_the_examples_is_in_the_fingerprint(tmp_path: Path) -> None:
    write_text(tmp_path, [3, 4])
    options: list[dict[str, Any]] = [{}, {"max_length": 9}, {"long": "drop"}, {"train_fraction": 0.5}]
    assert len({load(tmp_path, **o).fingerprint for o in options}) == 4
    assert load(tmp_path, workers=3, shuffle_window=2, on_error="skip").fingerprint == load(tmp_path).fingerprint


def test_train_fraction_is_of_the_training_samples(tmp_path: Path) -> None:
    write_text(tmp_path, [9, 9])
    whole, part = load(tmp_path), load(tmp_path, train_fraction=0.3)
    assert len(part.train) == -(-len(whole.train) * 3 // 10)
    assert len(part.splits["valid"]) == len(whole.splits["valid"])


def test_missing_shards_stop_the_run_or_are_told_and_the_order_stays(tmp_path: Path) -> None:
    write_text(tmp_path, [3, 4, 5])
    whole = load(tmp_path)
    expected = [e.tokens.tolist() for e in whole.train]
    (tmp_path / "train-000001.tar").unlink()
    with pytest.raises(InputError, match=r"train-000001.tar: .*data.on_error=skip"):
        load(tmp_path)
    data = load(tmp_path, on_error="skip")
    assert data.counts["missing_shards"] == 1
    assert data.fingerprint == whole.fingerprint  # so that a resumed run goes on
    start, stop = whole.train.shard_lengths[0], whole.train.shard_lengths[:2].sum()
    for number in range(len(data.train)):
        if start <= number < stop:
            with pytest.raises(DataError, match=r"train-000001.tar: "):
                data.train[number]
        else:
            assert data.train[number].tokens.tolist() == expected[number]


def test_data_of_another_kind_are_refused(tmp_path: Path) -> None:
    write_text(tmp_path, [3])
    with pytest.raises(InputError, match=r"^data.source: .* holds text, not chat"):
        load_data(parse_data({"source": "chat", "path": str(tmp_path)}))
    with pytest.raises(InputError, match=r"^data.path: a list names prepared shards"):
        load_data(parse_data({"source": "text", "path": [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]}))
