from pathlib import Path

import pytest

from jepa_scale.data.prepare.formats.files import expand, find, split_of
from jepa_scale.utils.errors import InputError


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def names(found) -> dict[str, list[str]]:
    return {split: [f.relative_to(found.root).as_posix() for f in files] for split, files in found.splits.items()}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("valid.jsonl", "valid"),
        ("validation-00000-of-00002.parquet", "valid"),
        ("my_eval.json", "valid"),
        ("dev.txt", "valid"),
        ("wiki.test.tokens", "test"),
        ("Training.txt", "train"),
        ("trainer.txt", None),
        ("latest.txt", None),
        ("contest.jsonl", None),
    ],
)
def test_splits_by_name(name, split):
    assert split_of(name) == split


def test_patterns_name_files_in_order(tmp_path, monkeypatch):
    make(tmp_path, "b.txt", "a.txt", "c/d.txt", "x{1}.txt")
    assert [p.name for p in expand(f"{tmp_path}/*.txt")] == ["a.txt", "b.txt", "x{1}.txt"]
    assert [p.name for p in expand(f"{tmp_path}/**/*.txt")] == ["a.txt", "b.txt", "d.txt", "x{1}.txt"]
    assert [p.name for p in expand(f"{tmp_path}/{{b,a}}.txt")] == ["b.txt", "a.txt"]
    assert [p.name for p in expand(f"{tmp_path}/{{a,b}}*")] == ["a.txt", "b.txt"]
    assert [p.name for p in expand(f"{tmp_path}/x{{1}}.txt")] == ["x{1}.txt"]
    assert expand(f"{tmp_path}/*.none") == []
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/a.txt") == [tmp_path / "a.txt"]
    with pytest.raises(InputError, match="z.txt: no such file, but"):
        expand(f"{tmp_path}/{{a,z}}.txt")
    with pytest.raises(InputError, match="braces are not closed"):
        expand(f"{tmp_path}/{{a,z.txt")


def test_a_folder_is_walked_in_order_without_what_is_beside_the_data(tmp_path):
    make(tmp_path, "b/2.txt", "b/10.md", "a.txt", ".git/c.txt", ".hidden.txt", "README.md", "LICENSE", "z")
    found = find([tmp_path])
    assert found.format == "text"
    assert names(found) == {"train": ["a.txt", "b/10.md", "b/2.txt", "z"]}


def test_a_readme_alone_is_data(tmp_path):
    assert names(find([make(tmp_path, "README.md")])) == {"train": ["README.md"]}


def test_named_splits_are_told_apart(tmp_path):
    make(tmp_path, "train.jsonl", "valid.jsonl", "test.jsonl", "README.md")
    assert names(find([tmp_path])) == {"train": ["train.jsonl"], "valid": ["valid.jsonl"], "test": ["test.jsonl"]}
    assert list(find(expand(f"{tmp_path}/*.jsonl")).splits) == ["train", "test", "valid"]
    assert names(find([tmp_path], by_name=False)) == {"train": ["test.jsonl", "train.jsonl", "valid.jsonl"]}
    assert names(find([tmp_path / "test.jsonl"])) == {"train": ["test.jsonl"]}  # one file is what it is asked to be


def test_folders_name_splits_too(tmp_path):
    make(tmp_path, "training/a.json", "training/b.json", "evaluation/c.json")
    assert names(find([tmp_path])) == {"train": ["training/a.json", "training/b.json"], "valid": ["evaluation/c.json"]}


def test_compressed_files_are_of_the_format_within(tmp_path):
    make(tmp_path / "rows", "train-0.jsonl.gz", "train-1.jsonl", "valid.ndjson.zst")
    found = find([tmp_path / "rows"])
    assert found.format == "jsonl"
    assert names(found) == {"train": ["train-0.jsonl.gz", "train-1.jsonl"], "valid": ["valid.ndjson.zst"]}
    for name, format_ in [
        ("a.TGZ", "tar"),
        ("a.tar.xz", "tar"),
        ("a.json.bz2", "json"),
        ("a.gz", "text"),
        ("a.txt.gz", "text"),
    ]:
        assert find([make(tmp_path, name) / name]).format == format_


def test_unnamed_files_are_trained_on_but_never_a_test_beside_them(tmp_path):
    make(tmp_path, "data.jsonl", "test.jsonl")
    assert names(find([tmp_path])) == {"train": ["data.jsonl"], "test": ["test.jsonl"]}


def test_text_is_split_only_when_the_names_mean_it(tmp_path):
    make(tmp_path / "docs", "test.md", "intro.md")
    assert names(find([tmp_path / "docs"])) == {"train": ["intro.md", "test.md"]}
    make(tmp_path / "wiki", "train.txt", "valid.txt")
    assert names(find([tmp_path / "wiki"])) == {"train": ["train.txt"], "valid": ["valid.txt"]}
    make(tmp_path / "half", "test.txt", "valid.txt")
    with pytest.raises(InputError, match="holds test and valid but nothing named train"):
        find([tmp_path / "half"])


def test_what_cannot_be_one_source_is_refused(tmp_path):
    make(tmp_path / "mixed", "a.txt", "b.jsonl")
    with pytest.raises(InputError, match=r"several formats \(.*a.txt, .*b.jsonl\); choose by a pattern"):
        find([tmp_path / "mixed"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: holds no files"):
        find([tmp_path / "empty"])
    for name in ("a.zip", "a.jsonl.7z", "a.txt.lz4"):
        with pytest.raises(InputError, match=rf"{name}: files with the suffix .* unpack it first"):
            find([make(tmp_path, name) / name])
    with pytest.raises(InputError, match="a.parquet.gz: unpack it first"):
        find([make(tmp_path, "a.parquet.gz") / "a.parquet.gz"])
    with pytest.raises(InputError, match="is a folder; several paths"):
        find([tmp_path / "mixed" / "a.txt", tmp_path / "empty"])


def test_relative_paths_have_a_relative_root(tmp_path, monkeypatch):
    make(tmp_path, "d/x.txt", "d/y.txt")
    monkeypatch.chdir(tmp_path)
    for pattern in ("d/*.txt", "./d/*.txt"):
        found = find(expand(pattern))
        assert found.root == Path("d")
        assert names(found) == {"train": ["x.txt", "y.txt"]}
    monkeypatch.chdir(tmp_path / "d")
    assert names(find(expand("*.txt"))) == {"train": ["x.txt", "y.txt"]}
