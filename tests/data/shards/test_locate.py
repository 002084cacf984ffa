import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from jepa_scale.data.shards.format import Index, Sample, ShardInfo, write_shard
from jepa_scale.data.shards.locate import Located, check, locate
from jepa_scale.data.shards.reader import ShardExamples
from jepa_scale.utils.errors import InputError

TRAIN = [f"train-{i:06d}.tar" for i in range(4)]


def samples(seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [Sample({"npy": rng.integers(0, 50, n).astype(np.uint16)}, n) for n in (5, 6)]


def make(folder: Path) -> Index:
    folder.mkdir(parents=True)
    infos = {
        "train": [write_shard(folder, name, samples(i)) for i, name in enumerate(TRAIN)],
        "valid": [write_shard(folder, "valid-000000.tar", samples(9))],
    }
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer_config.json").write_text("{}")
    (folder / "tokenizer/tokenizer.json").write_text('{"version": "1"}')
    index = Index("text", infos, 50, {}, tokenizer="tokenizer")
    index.write(folder)
    return index


@pytest.fixture
def prepared(tmp_path) -> Path:
    make(tmp_path / "data")
    return tmp_path / "data"


def found(path: str | list[str], cache: Path = Path("unused")) -> Located:
    located = locate(path, cache)
    assert located is not None
    return located


def names(located: Located) -> dict[str, list[str]]:
    return {split: [shard.name for shard in shards] for split, shards in located.index.splits.items()}


def tokens(located: Located) -> list[list[int]]:
    return [e.tokens.tolist() for e in ShardExamples(located, "train", max_length=8, long="split")]


# --- on this machine ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["{}", "{}/", "{}/index.json", "file://{}"])
def test_a_folder(prepared, path):
    located = found(path.format(prepared))
    assert names(located) == {"train": TRAIN, "valid": ["valid-000000.tar"]}
    assert located.index == Index.read(prepared)
    assert located.fetch(TRAIN[0]) == prepared / TRAIN[0] == located.path(TRAIN[0])
    assert located.tokenizer() == prepared / "tokenizer"
    assert located.is_local and check(located) == []


def test_relative_and_home_paths(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    for path in (".", "train-*.tar", "index.json"):
        located = found(path)
        monkeypatch.chdir("/")
        assert len(tokens(located)) == 8, "wherever the process goes"
        monkeypatch.chdir(prepared)
    monkeypatch.setenv("HOME", str(prepared.parent))
    assert names(found("~/data"))["train"] == TRAIN


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.tar", {"train": TRAIN, "valid": ["valid-000000.tar"]}),
        ("train-{000001..000002}.tar", {"train": TRAIN[1:3]}),
        ("train-00000[03].tar", {"train": [TRAIN[0], TRAIN[3]]}),
        (
            "{train-000003,valid-000000,train-000000}.tar",
            {"train": [TRAIN[0], TRAIN[3]], "valid": ["valid-000000.tar"]},
        ),
        ("train-000002.tar", {"train": [TRAIN[2]]}),
        ("train-{000000,00000[23]}.tar", {"train": [TRAIN[0], *TRAIN[2:]]}),
    ],
)
def test_patterns_choose_shards_of_every_split(prepared, pattern, expected):
    located = found(f"{prepared}/{pattern}")
    assert names(located) == expected
    whole = found(str(prepared))
    assert (located.index.fingerprint == whole.index.fingerprint) == (
        len(expected) == 2 and len(expected["train"]) == 4
    )


def test_lists_and_wildcards_of_one_folder(prepared):
    both = [f"{prepared}/{TRAIN[3]}", f"{prepared}/train-00000[01].tar", f"{prepared}/{TRAIN[0]}"]
    assert names(found(both)) == {"train": [TRAIN[0], TRAIN[1], TRAIN[3]]}
    assert names(found([str(prepared), f"{prepared}/{TRAIN[3]}"]))["train"] == TRAIN
    assert names(found(f"{prepared.parent}/d?ta/train-*.tar")) == {"train": TRAIN}


def test_what_has_no_index_is_raw(prepared, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "a.txt").write_text("x")
    (raw / "b{1,2}.tar").write_text("x")
    for path in (
        raw,
        raw / "a.txt",
        raw / "*.tar",
        raw / "b{1,2}.tar",
        raw / "{a,b}.txt",
        tmp_path / "nowhere",
        "tiny",
    ):
        assert locate(str(path), tmp_path) is None
    assert locate([f"{raw}/a.txt", f"{raw}/b.txt"], tmp_path) is None
    assert locate(str(prepared / "tokenizer"), tmp_path) is None
    assert locate(str(prepared / "notes.txt"), tmp_path) is None, "a raw file beside shards"


def test_paths_that_are_wrong(prepared, tmp_path):
    make(tmp_path / "other")
    for path, message in [
        (f"{prepared}/valid-*.tar", "none of the chosen shards are of the split train"),
        (
            f"{prepared}/train-{{000003..000005}}.tar",
            r"train-000004\.tar is not in its index\.json, which has train-000000",
        ),
        (f"{prepared}/x-*.tar", "none of the chosen shards"),
        ([str(prepared), str(tmp_path / "other")], "several folders"),
        ([str(prepared), "http://localhost/x"], "cannot be mixed"),
        (f"{prepared}/train-{{0.tar", "is not a brace pattern"),
        ([], "empty"),
    ]:
        with pytest.raises(InputError, match=message):
            locate(path, tmp_path)


@pytest.mark.parametrize("name", ["../train-000000.tar", "x;touch y.tar", "a b.tar", "", "-rf.tar", "$(id).tar"])
def test_names_that_could_do_harm_are_refused(tmp_path, name):
    """They become parts of paths and shell commands."""
    Index("text", {"train": [ShardInfo(name, 1, 1, 512, "", "")]}, 50, {}).write(tmp_path)
    with pytest.raises(InputError, match="is not a plain file name"):
        locate(str(tmp_path), tmp_path)


def test_a_damaged_index(prepared, tmp_path):
    (prepared / "index.json").write_text(
        json.dumps(json.loads((prepared / "index.json").read_text()) | {"kind": "chat"})
    )
    with pytest.raises(InputError, match="contradicts its own fingerprint"):
        locate(str(prepared), tmp_path)


def test_check_names_the_first_fault_and_counts_them(prepared):
    located = found(str(prepared))
    os.truncate(prepared / TRAIN[1], 1000)
    with pytest.raises(
        InputError, match=r"train-000001\.tar: has 1,000 bytes, but .* in its index \(1 of 5 shards"
    ) as error:
        check(located)
    assert "data.on_error=skip" in str(error.value)
    (prepared / "train-000003.idx.npy").unlink()
    (prepared / TRAIN[0]).unlink()
    with pytest.raises(InputError, match=r"train-000000\.tar: No such file.*\(3 of 5 shards"):
        check(located)
    bad = [shard.name for shard in check(located, on_error="skip")]
    assert bad == [TRAIN[0], TRAIN[1], TRAIN[3]]
    (prepared / TRAIN[0]).mkdir()
    assert TRAIN[0] in [shard.name for shard in check(located, on_error="skip")]


def test_a_missing_tokenizer(prepared):
    located = found(str(prepared))
    os.rename(prepared / "tokenizer", prepared / "elsewhere")
    with pytest.raises(InputError, match="the tokenizer is missing"):
        located.tokenizer()


# --- through commands -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "chosen"),
    [
        ("pipe:cat {}/{{}}", TRAIN),
        ("pipe:dd if={}/{{}} bs=100 2>/dev/null | cat", TRAIN),
        ("pipe:cat {}/train-{{000001..000002}}.tar", TRAIN[1:3]),
        ("pipe:cat '{}/train-00000[03].tar'", [TRAIN[0], TRAIN[3]]),
    ],
)
def test_pipes(prepared, tmp_path, command, chosen):
    located = found(command.format(prepared), tmp_path / "cache")
    assert names(located)["train"] == chosen and not located.is_local and check(located) == []
    local = found([str(prepared / name) for name in chosen])
    assert tokens(located) == tokens(local)
    assert located.fetch(chosen[0]) == tmp_path / "cache/shards" / Index.read(prepared).fingerprint / chosen[0]
    located = pickle.loads(pickle.dumps(located))
    for name in TRAIN:
        (prepared / name).unlink()
    assert tokens(located) == tokens(found(command.format(prepared), tmp_path / "cache")), "from the cache"


def test_a_tokenizer_behind_a_pipe(prepared, tmp_path):
    located = found(f"pipe:cat {prepared}/{{}} 2>/dev/null", tmp_path / "cache")
    folder = located.tokenizer()
    assert folder is not None and (folder / "tokenizer.json").read_text() == '{"version": "1"}'
    assert sorted(p.name for p in folder.glob("[!.]*")) == ["tokenizer.json", "tokenizer_config.json"]
    (prepared / "tokenizer/tokenizer.json").unlink()
    assert located.tokenizer() == folder, "fetched once"


def test_commands_that_fail(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("jepa_scale.data.files.download.RETRY_DELAYS", (0.0,))
    for path, message in [
        (
            "pipe:cat /nowhere/{}",
            r"cat /nowhere/index.json: the command .* exit code 1 \(tried 2 times\).*only prepared shards can be read",
        ),
        ("pipe:no_such_program {}", "exit code 127"),
        (f"pipe:cat {prepared}/{{}}; exec >&-; sleep 0.1; exit 3", "exit code 3"),
        ("pipe:cat /nowhere/data", "has no place for a file's name in the command"),
        ("pipe:cat /x/a.tar /x/b.tar", "has no place for a file's name"),
        ("pipe:cat /{a,b}/train-000000.tar", "several folders"),
        ("pipe:echo {}", "not an index of shards"),
        ("odd://host/data", "no files can be read by odd://"),
    ]:
        with pytest.raises(InputError, match=message):
            locate(path, tmp_path / "cache")
