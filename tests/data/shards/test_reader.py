import hashlib
import io
import multiprocessing
import os
import pickle
import re
import tarfile
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.data.examples import Conversation, GridSequence, Turn
from jepa_scale.data.shards import reader
from jepa_scale.data.shards.format import SAMPLE, Index, Sample, ShardInfo, index_name, write_shard
from jepa_scale.data.shards.locate import Located, locate
from jepa_scale.data.shards.reader import OPEN_SHARDS, ShardError, ShardExamples
from jepa_scale.packing import IGNORE
from jepa_scale.utils.errors import DataError, InputError

VOCABULARY = 1000


def document(length: int, seed: int = 0, dtype: Any = np.uint16) -> np.ndarray:
    return np.random.default_rng([length, seed]).integers(0, VOCABULARY, length).astype(dtype)


def text(*tokens: np.ndarray) -> list[Sample]:
    return [Sample({"npy": t}, len(t)) for t in tokens]


def write(folder: Path, shards: list[list[Sample]], kind: str = "text", **splits: list[list[Sample]]) -> Located:
    folder.mkdir(parents=True, exist_ok=True)
    infos = {
        split: [write_shard(folder, f"{split}-{i:06d}.tar", samples) for i, samples in enumerate(parts)]
        for split, parts in {"train": shards, **splits}.items()
    }
    Index(kind, infos, VOCABULARY, {}).write(folder)
    located = locate(str(folder), folder / "cache")
    assert located is not None
    return located


def examples(located: Located, split: str = "train", **changes: Any) -> ShardExamples:
    return ShardExamples(located, split, **{"max_length": 8, "long": "split"} | changes)


# --- what the examples are ------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    lengths=st.lists(st.lists(st.integers(0, 70), min_size=1, max_size=6), min_size=1, max_size=4),
    max_length=st.integers(1, 30),
)
def test_pieces_hold_every_token_and_predict_each_but_the_first_once(lengths, max_length):
    documents = [[document(n, seed=i * 10 + j) for j, n in enumerate(ns)] for i, ns in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as folder:
        data = examples(write(Path(folder), [text(*d) for d in documents]), max_length=max_length)
        pieces = list(data)
        sizes = data.sizes(np.arange(len(data)))
        assert sizes.dtype == np.int64 and sizes.tolist() == [len(p.tokens) for p in pieces]
        assert data.shard_lengths.sum() == len(data) == data.counts["pieces"]
        assert max(sizes, default=0) == data.max_size <= max_length + 1
        left = iter(pieces)
        expected_pieces = []
        for shard in documents:
            count = 0
            for tokens in shard:
                got, labels = [], []
                while len(got) < len(tokens) - 1:
                    piece = next(left)
                    inputs, wanted = piece.lm_sequence()
                    assert 2 <= len(inputs) <= max_length + 1 and wanted[-1] == IGNORE
                    got += inputs[:-1].tolist()
                    labels += wanted[:-1].tolist()
                    count += 1
                if len(tokens) >= 2:
                    assert got == tokens[:-1].tolist() and labels == tokens[1:].tolist()
            expected_pieces.append(count)
        assert next(left, None) is None
        assert data.shard_lengths.tolist() == expected_pieces
        flat = [n for ns in lengths for n in ns]
        assert data.counts == {
            "samples": len(flat),
            "pieces": len(pieces),
            "too_short": sum(n < 2 for n in flat),
            "split": sum(n > max_length + 1 for n in flat),
            "dropped": 0,
            "truncated": 0,
            "lost": 0,
        }


LENGTHS = (3, 9, 10, 1, 40, 2)  # with max_length 8, 9 tokens are a whole piece


@pytest.mark.parametrize(
    ("long", "sizes", "key", "count"),
    [
        ("split", [3, 9, 9, 2, 9, 9, 9, 9, 8, 2], "split", 2),
        ("drop", [3, 9, 2], "dropped", 2),
        ("truncate", [3, 9, 9, 9, 2], "truncated", 2),
    ],
)
def test_long_samples(tmp_path, long, sizes, key, count):
    located = write(tmp_path, [text(*[document(n) for n in LENGTHS[:3]]), text(*[document(n) for n in LENGTHS[3:]])])
    data = examples(located, long=long)
    assert [len(e.tokens) for e in data] == sizes == data.sizes(np.arange(len(data))).tolist()
    assert data.counts == {
        "samples": 6, "pieces": len(sizes), "too_short": 1, "split": 0, "dropped": 0, "truncated": 0, "lost": 0, key: count
    }  # fmt: skip
    if long != "split":
        kept = [n for n in LENGTHS if n > 1 and (long == "truncate" or n <= 9)]
        for example, n in zip(data, kept, strict=True):
            assert example.tokens.tolist() == document(n)[:9].tolist()


def test_a_long_sample_may_be_refused_before_anything_begins(tmp_path):
    located = write(tmp_path, [text(document(3)), text(document(9), document(10))])
    with pytest.raises(InputError, match=r"train-000001\.tar, sample train-000001-000001: has 10 tokens.*allows 9"):
        examples(located, long="error")
    assert len(examples(located, long="error", max_length=9)) == 3


def conversation(n: int, **more: str) -> Sample:
    turns = [[1, 4], [5, n]]
    messages = [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "x"}]
    return Sample({"npy": document(n), "json": {"messages": messages, "turns": turns, **more}}, n)


def test_a_long_conversation_is_refused_by_its_row(tmp_path):
    located = write(tmp_path, [[conversation(6), conversation(12, where="rows.jsonl:7")]], kind="chat")
    with pytest.raises(InputError, match=r"sample train-000000-000001 \(rows\.jsonl:7\): has 12 tokens"):
        examples(located, long="error")
    assert [example.where for example in examples(located, long="drop", max_length=20)] == ["", "rows.jsonl:7"]


def test_conversations(tmp_path):
    located = write(tmp_path, [[conversation(9), conversation(20)]], kind="chat")
    with pytest.raises(InputError, match=r"a conversation cannot be split.*drop or truncate"):
        examples(located)
    whole, cut = examples(located, long="truncate", train_all=True)
    assert isinstance(whole, Conversation) and whole.train_all and whole.messages[0]["content"] == "hé"
    assert whole.turns == (Turn("user", 1, 4), Turn("assistant", 5, 9))
    assert cut.tokens.tolist() == document(20)[:9].tolist() and cut.turns[1] == Turn("assistant", 5, 9)
    assert not examples(located, long="truncate")[0].train_all
    assert [e.tokens.tolist() for e in examples(located, long="drop")] == [document(9).tolist()]
    (first, short) = examples(located, long="truncate", max_length=4)
    assert first.turns == (Turn("user", 1, 4),) and len(first.tokens) == 5, "a turn that is cut off is no turn"
    assert (short.lm_sequence()[1] == IGNORE).all()


def test_grids(tmp_path):
    context, target = [[[0, 9], [3, 4]], [[1]]], [[5, 6, 7]]
    sample = Sample({"json": {"context": context, "target": target}}, 7 + 3 + 5)
    located = write(tmp_path, [[sample]], kind="grids")
    for long in ("split", "truncate"):
        with pytest.raises(InputError, match="grids cannot be cut; use drop or error"):
            examples(located, long=long)
    data = examples(located, long="error", max_length=14)
    (example,) = data
    assert isinstance(example, GridSequence) and example.target.dtype == np.int8
    assert [g.tolist() for g in (*example.context, example.target)] == [*context, target]
    assert len(example.lm_sequence()[0]) == data.sizes(np.array([0]))[0] == 15
    assert len(examples(located, long="drop", max_length=13)) == 0


def test_reversal_rows_come_as_they_are(tmp_path):
    row = {"input_text": [["Ann", "Lee"], ["r"]], "type": "train"}
    located = write(tmp_path, [[Sample({"json": row}, 5)]], kind="reversal")
    assert list(examples(located, long="drop")) == [row]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32, np.int64, ">i4"])
def test_token_types(tmp_path, dtype):
    (example,) = examples(write(tmp_path, [text(document(7, dtype=dtype))]))
    assert example.tokens.tolist() == document(7).tolist()
    assert example.tokens.dtype.isnative and not example.tokens.flags.writeable, "view makers may share them"


def test_an_index_as_a_sequence(tmp_path):
    data = examples(write(tmp_path, [text(document(3), document(4)), text(document(5))]))
    assert [len(e.tokens) for e in data[-2:]] == [4, 5] and len(data[np.int64(-1)].tokens) == 5
    for outside in (3, -4):
        with pytest.raises(IndexError):
            data[outside]
    assert data.sizes(np.array([2, 0, 2], dtype=np.int64)).tolist() == [5, 3, 5]
    assert data.sizes(np.array([], dtype=np.int64)).shape == (0,)


@pytest.mark.parametrize(
    ("fraction", "lengths"),
    [(1.0, [1, 60, 0, 39]), (0.61, [0, 37, 0, 24]), (0.07, [0, 4, 0, 3]), (0.901, [0, 55, 0, 36])],
)
def test_a_fraction_is_chosen_at_random_in_each_shard(tmp_path, fraction, lengths):
    """Documents of different lengths, by which they are known."""
    shards = [[2], range(3, 63), [1], range(63, 102)]
    located = write(tmp_path, [text(*map(document, of_shard)) for of_shard in shards])
    data = examples(located, max_length=200, fraction=fraction)
    assert data.shard_lengths.tolist() == lengths and len(data) == sum(lengths) and data.counts["pieces"] == 100
    chosen = [len(e.tokens) for e in data]
    assert chosen == data.sizes(np.arange(len(data))).tolist() == sorted(set(chosen))
    assert [sum(n in of_shard for n in chosen) for of_shard in shards] == lengths
    assert fraction == 1 or any(3 + k != n for k, n in enumerate(chosen[: lengths[1]]))  # not the first ones
    assert chosen == [len(e.tokens) for e in examples(located, max_length=200, fraction=fraction)]


def test_fingerprint(tmp_path):
    located = write(tmp_path / "a", [text(document(30)), text(document(5))], valid=[text(document(5))])
    same = examples(located).fingerprint
    fewer = locate(str(tmp_path / "a" / "train-000000.tar"), tmp_path)
    assert fewer is not None
    assert (
        examples(write(tmp_path / "b", [text(document(30)), text(document(5))], valid=[text(document(5))])).fingerprint
        == same
    )
    others = [
        examples(located, "valid"),
        examples(located, max_length=9),
        examples(located, long="drop"),
        examples(located, fraction=0.5),
        examples(located, train_all=True),
        examples(fewer),
        examples(write(tmp_path / "c", [text(document(30, seed=1)), text(document(5))], valid=[text(document(5))])),
    ]
    assert len({same, *(other.fingerprint for other in others)}) == 8


def test_unknown_split(tmp_path):
    with pytest.raises(InputError, match="has no split 'test'; it has train, valid"):
        examples(write(tmp_path, [text(document(5))], valid=[text(document(5))]), "test")


# --- processes ------------------------------------------------------------------------------------------------------


def tokens_of(data: ShardExamples) -> list[list[int]]:
    return [e.tokens.tolist() for e in data]


def test_pickling_spawning_and_forking(tmp_path):
    data = examples(write(tmp_path, [text(*[document(n, seed=i) for n in (3, 30, 9)]) for i in range(4)]))
    expected = tokens_of(data)  # files are open now
    assert tokens_of(pickle.loads(pickle.dumps(data))) == expected
    for method, processes in (("fork", 2), ("spawn", 1)):  # a spawned one shares no file with any other
        with multiprocessing.get_context(method).Pool(processes) as pool:
            assert pool.map(tokens_of, [data, data]) == [expected, expected]
    assert tokens_of(data) == expected


def test_open_files_are_bounded_and_closed(tmp_path):
    data = examples(write(tmp_path, [text(document(4, seed=i)) for i in range(OPEN_SHARDS + 6)]))

    def open_tars() -> int:
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return sum(os.readlink(link).startswith(f"{tmp_path}/train") for link in links if os.path.islink(link))

    for _ in range(2):
        assert tokens_of(data) == [document(4, seed=i).tolist() for i in range(OPEN_SHARDS + 6)]
    assert open_tars() == OPEN_SHARDS
    data._make_caches()
    assert open_tars() == 0


# --- faults ---------------------------------------------------------------------------------------------------------


def three_shards(folder: Path) -> Located:
    return write(folder, [text(*[document(n, seed=i) for n in (5, 6, 7)]) for i in range(3)])


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def read_all(data: ShardExamples) -> tuple[int, list[ShardError]]:
    """How many can be read, and the errors of the others."""
    errors, good = [], 0
    for number in range(len(data)):
        try:
            data[number]
            good += 1
        except ShardError as error:
            errors.append(error)
    return good, errors


@pytest.mark.parametrize("offset", [3, 125, 512 + 8, 512 + 130], ids=["name", "size", "npy header", "payload"])
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path, offset):
    data = examples(three_shards(tmp_path))
    start = int(np.load(tmp_path / "train-000001.idx.npy")["start"][1])
    flip(tmp_path / "train-000001.tar", start + offset)
    good, (error,) = read_all(data)
    assert good == 8
    assert (error.shard, error.member) == ("train-000001.tar", "train-000001-000001")
    assert isinstance(error, DataError)
    assert str(error).startswith(f"{tmp_path}/train-000001.tar, sample train-000001-000001: checksum differs")
    assert "data.on_error=skip" in str(error) and "\n" not in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) and copy.shard == error.shard and copy.member == error.member


@pytest.mark.parametrize("before", [True, False], ids=["before it is opened", "while it is open"])
def test_a_truncated_tar(tmp_path, before):
    data = examples(three_shards(tmp_path))
    if not before:
        assert read_all(data) == (9, [])
        data._document.cache_clear()
    os.truncate(tmp_path / "train-000002.tar", int(np.load(tmp_path / "train-000002.idx.npy")["stop"][1]) - 1)
    good, errors = read_all(data)
    assert good == 7 and [e.member for e in errors] == ["train-000002-000001", "train-000002-000002"]
    assert "train-000002.tar, sample train-000002-000001: the file ends before it; the shard is truncated" in str(
        errors[0]
    )


def test_a_missing_shard(tmp_path):
    data = examples(three_shards(tmp_path))
    (tmp_path / "train-000000.tar").unlink()
    good, errors = read_all(data)
    assert (
        good == 6
        and {e.shard for e in errors} == {"train-000000.tar"}
        and "train-000000.tar: is missing" in str(errors[0])
    )


def damage_index(folder: Path, how: str) -> None:
    index = folder / "train-000001.idx.npy"
    if how == "missing":
        index.unlink()
    elif how == "another":
        index.write_bytes((folder / "train-000002.idx.npy").read_bytes())
    else:
        flip(index, index.stat().st_size - 1)


@pytest.mark.parametrize(
    ("how", "message"),
    [("missing", "No such file"), ("another", "not the index of train-000001.tar"), ("flipped", "checksum differs")],
)
def test_a_bad_index_file(tmp_path, how, message):
    located = three_shards(tmp_path)
    whole = examples(located).fingerprint
    damage_index(tmp_path, how)
    with pytest.raises(ShardError, match=rf"train-000001\.idx\.npy: .*{re.escape(message)}") as caught:
        examples(located)
    assert caught.value.shard == "train-000001.tar"
    data = examples(located, on_error="skip")
    assert data.lost == ["train-000001.tar"] and data.counts["lost"] == 3 and data.shard_lengths.tolist() == [3, 0, 3]
    assert read_all(data) == (6, []) and data.fingerprint != whole


def rewrite(folder: Path, tar: bytes, bounds: list[int], tokens: list[int], kind: str = "text") -> ShardExamples:
    """One shard with this content, with a true index."""
    name = "train-000000.tar"
    rows = np.zeros(len(tokens), dtype=SAMPLE)
    rows["start"], rows["stop"], rows["tokens"] = bounds[:-1], bounds[1:], tokens
    rows["crc"] = [zlib.crc32(tar[a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    raw = io.BytesIO()
    np.save(raw, rows)
    (folder / name).write_bytes(tar)
    (folder / index_name(name)).write_bytes(raw.getvalue())
    hashes = [hashlib.sha256(data).hexdigest() for data in (tar, raw.getvalue())]
    info = ShardInfo(name, len(tokens), sum(tokens), len(tar), *hashes)
    Index(kind, {"train": [info]}, VOCABULARY, {}).write(folder)
    located = locate(str(folder), folder / "cache")
    assert located is not None
    return examples(located, long="split" if kind == "text" else "drop", max_length=50)


def npy(array: np.ndarray) -> bytes:
    raw = io.BytesIO()
    np.save(raw, array)
    return raw.getvalue()


FORMS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}
NAMES = {
    "short": "short",
    "prefix": "d" * 80 + "/" + "n" * 70,
    "unicode": "ünïcode",
    "long": "d" * 80 + "/" + "n" * 120,
}


@pytest.mark.parametrize(
    ("form", "name"),
    [
        pytest.param(FORMS[form], NAMES[name], id=f"{form}-{name}")
        for form in FORMS
        for name in NAMES
        if (form, name) != ("ustar", "long")  # there is no such thing
    ],
)
def test_members_that_tarfile_writes_in_its_own_ways(tmp_path, form, name):
    raw, bounds = io.BytesIO(), [0]
    documents = [document(5), document(20)]
    with tarfile.open(fileobj=raw, mode="w", format=form) as tar:
        for number, tokens in enumerate(documents):
            for extension, content in (("txt", b"kept beside"), ("npy", npy(tokens))):
                info = tarfile.TarInfo(f"{name}{number}.{extension}")
                info.size = len(content)
                info.mtime = 1.5 if form == tarfile.PAX_FORMAT else 1  # type: ignore[assignment]
                tar.addfile(info, io.BytesIO(content))
            bounds.append(tar.offset)
    data = rewrite(tmp_path, raw.getvalue(), bounds, [5, 20])
    assert tokens_of(data) == [d.tolist() for d in documents]


def tar_of(members: dict[str, bytes]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        return raw.getvalue()[: tar.offset]


@pytest.mark.parametrize(
    ("kind", "members", "member", "what"),
    [
        ("text", {"a.json": b"{}"}, "", r"has no member \.npy \(it has: json\)"),
        ("text", {"a.npy": npy(np.array([1, 2, VOCABULARY, 4, 5]))}, ".npy", "token id 1000 is outside the vocabulary of 1,000"),
        ("text", {"a.npy": npy(np.array([1, 2, -7, 4, 5]))}, ".npy", "token id -7 is outside"),
        ("text", {"a.npy": npy(np.arange(4))}, ".npy", "has 4 tokens, but 5 in its index"),
        ("text", {"a.npy": npy(np.arange(5))[:-1]}, ".npy", "ends too early or too late"),
        ("text", {"a.npy": b"\x93NUM"}, ".npy", "is not a NumPy array"),
        ("text", {"a.npy": npy(np.zeros((5, 1), dtype=int))}, ".npy", "integers in one dimension"),
        ("text", {"a.npy": npy(np.zeros(5))}, ".npy", "integers in one dimension"),
        ("chat", {"a.npy": npy(np.arange(5))}, "", r"has no member \.json"),
        ("chat", {"a.npy": npy(np.arange(5)), "a.json": b"{"}, ".json", "is not valid JSON"),
        ("chat", {"a.npy": npy(np.arange(5)), "a.json": b"{}"}, ".json", "has no valid messages and turns"),
        ("chat", {"a.npy": npy(np.arange(5)), "a.json": b'{"messages":[{"role":"user"}],"turns":[[0,6]]}'}, ".json", "user.*0:6 of 5"),
        ("chat", {"a.npy": npy(np.arange(5)), "a.json": b'{"messages":[],"turns":[[0,6]]}'}, ".json", "no valid"),
        ("grids", {"a.json": b'{"context":[]}'}, ".json", "has no valid context and target"),
        ("grids", {"a.json": b'{"context":[],"target":[[10]]}'}, ".json", "outside 0 … 9"),
        ("grids", {"a.json": b'{"context":[],"target":[[1,2],[3]]}'}, ".json", "has no valid"),
        ("grids", {"a.json": b'{"context":[],"target":[[1]]}'}, ".json", "has 3 tokens, but 5 in its index"),
        ("reversal", {"a.json": b"[]"}, ".json", "is not a JSON object"),
        ("reversal", {"a.json": b"\xff"}, ".json", "is not valid JSON"),
    ],
)  # fmt: skip
def test_a_sample_that_does_not_hold_what_it_should(tmp_path, kind, members, member, what):
    tar = tar_of(members)
    data = rewrite(tmp_path, tar + bytes(10240 - len(tar) % 10240), [0, len(tar)], [5], kind)
    with pytest.raises(
        ShardError, match=rf"train-000000\.tar, sample train-000000-000000{re.escape(member)}: .*{what}"
    ) as error:
        data[0]
    assert error.value.member == "train-000000-000000" + member and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "tar", [b"no tar at all " * 100, tar_of({"a.npy": npy(np.arange(5))})[:-512]], ids=["noise", "cut"]
)
def test_bytes_that_are_no_tar(tmp_path, tar):
    data = rewrite(tmp_path, tar, [0, len(tar)], [5])
    with pytest.raises(ShardError, match=r"train-000000\.tar, sample train-000000-000000: .*the shard is damaged"):
        data[0]


def test_a_shard_of_another_folder(tmp_path):
    located = three_shards(tmp_path / "a")
    other = write(tmp_path / "b", [text(*[document(n, seed=9) for n in (5, 6, 7)])])
    swapped = replace(located, source=tmp_path / "b")
    with pytest.raises(ShardError, match="checksum differs"):
        examples(swapped)
    os.replace(tmp_path / "b/train-000000.tar", tmp_path / "a/train-000000.tar")
    good, errors = read_all(examples(located))
    assert good == 6 and len(errors) == 3 and other.index.fingerprint != located.index.fingerprint


def test_the_pieces_of_one_document_are_read_once(tmp_path, monkeypatch):
    data = examples(write(tmp_path, [text(document(80), document(30))]))
    reads = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: reads.append(args) or pread(*args))
    assert tokens_of(data)[0] == document(80)[:9].tolist() and len(reads) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 4_000_000_000}, "sample train-000000-000001.*has bytes or tokens that cannot be in the shard"),
        ({"stop": 1 << 62}, "sample train-000000-000001.*has bytes or tokens that cannot be in the shard"),
        ({"start": 1 << 63}, "sample train-000000-000001.*has bytes or tokens that cannot be in the shard"),
        ({}, "does not have the 3 samples of the folder's index"),
        (b"no array", "is no index of a shard"),
    ],
)
def test_an_index_of_a_shard_that_lies(tmp_path, change, message):
    """With true checksums, as of a folder that somebody forged."""
    located = write(tmp_path, [text(document(9), document(20))])
    file = tmp_path / index_name("train-000000.tar")
    raw = change if isinstance(change, bytes) else None
    info = located.index.splits["train"][0]
    if raw is None:
        rows = np.load(file)
        for name, value in change.items():
            rows[name][1] = value
        raw = npy(rows)
        info = info if change else replace(info, samples=3)
    file.write_bytes(raw)
    info = replace(info, index_sha256=hashlib.sha256(raw).hexdigest())
    replace(located.index, splits={"train": [info]}).write(tmp_path)
    found = locate(str(tmp_path), tmp_path / "cache")
    assert found is not None
    with pytest.raises(ShardError, match=message):
        examples(found)


@pytest.mark.parametrize("samples", [1, 7, 10**6])
def test_an_index_is_read_as_numpy_reads_it(monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
    rows = np.zeros(samples, SAMPLE)
    rows["tokens"] = np.arange(samples)
    raw = io.BytesIO()
    np.save(raw, rows)
    wanted = np.load(io.BytesIO(raw.getvalue()))
    assert np.array_equal(reader._parse(raw.getvalue(), samples + 1), wanted)  # the header is parsed: it is another one
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("the header is parsed"))
    assert np.array_equal(reader._parse(raw.getvalue(), samples), wanted)
