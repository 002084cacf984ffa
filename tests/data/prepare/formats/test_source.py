import os
import pickle
from functools import partial

from jepa_scale.data.prepare.base import Record
from jepa_scale.data.prepare.formats import source
from jepa_scale.data.prepare.formats.source import Part, Source, hash_file, identify_files, identity, read_each


def test_small_files_count_by_content(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    before = hash_file(file)
    os.utime(file, (1, 1))
    assert hash_file(file) == before
    file.write_bytes(b"abd")
    assert hash_file(file) != before


def test_large_files_count_by_size_time_and_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "HASHED_WHOLE", 2**20)
    file = tmp_path / "a"

    def written(at: int | None = None, time: int = 7) -> str:
        data = bytearray(3 * 2**20)
        if at is not None:
            data[at] = 1
        file.write_bytes(data)
        os.utime(file, (time, time))
        return hash_file(file)

    before = written()
    assert written() == before
    assert written(at=0) != before
    assert written(at=-1) != before
    assert written(time=8) != before
    assert written(at=2**20 + 5) == before  # not looked at: its time would have changed


def test_files_are_known_by_name_under_the_root_and_by_split(tmp_path):
    prints = []
    for place in ("x", "y/deep"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a").write_text("1")
        (tmp_path / place / "b").write_text("2")
        files = (tmp_path / place / "a", tmp_path / place / "b")
        prints.append(identify_files({"train": files}, tmp_path / place, "line"))
    assert prints[0] == prints[1]
    root = tmp_path / "x"
    others = [
        identify_files({"train": (root / "a",), "valid": (root / "b",)}, root, "line"),
        identify_files({"train": (root / "b", root / "a")}, root, "line"),
        identify_files({"train": (root / "a", root / "b")}, root, "file"),
    ]
    assert len({prints[0], *others}) == 4


def read_words(path):
    for word in path.read_text().split():
        yield Record(str(path), word)


def test_a_source_is_made_of_functions_and_starts_anew_each_time(tmp_path):
    (tmp_path / "a").write_text("one two")
    (tmp_path / "b").write_text("three")
    part = Part(partial(read_each, read_words, (tmp_path / "a", tmp_path / "b")), 3)
    made = pickle.loads(pickle.dumps(Source("text", {"train": part}, partial(identity, "x"))))
    for _ in range(2):
        assert [r.value for r in made.records("train")] == ["one", "two", "three"]
    assert (made.kind, made.splits, made.count("train")) == ("text", ("train",), 3)
    assert made.fingerprint() == identity("x")
