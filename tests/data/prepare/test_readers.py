import json
import pickle
import subprocess
import sys

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from webdataset import TarWriter

from jepa_scale.data.files.suffixes import FORMATS
from jepa_scale.data.prepare.base import BadRecord, PrepareOptions, Record
from jepa_scale.data.prepare.readers import READERS, open_reader
from jepa_scale.data.reversal import facts as reversal
from jepa_scale.data.reversal import files as reversal_files
from jepa_scale.utils.errors import InputError

CHAT = [
    {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]} for n in range(4)
]
PAIRS = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(4)]
TEXTS = [{"text": f"text {n}"} for n in range(4)]
TASK = {
    "train": [{"input": [[0]], "output": [[1]]}, {"input": [[2]], "output": [[3]]}],
    "test": [{"input": [[4]], "output": [[5]]}],
}


def test_every_suffix_has_a_reader():
    assert set(FORMATS.values()) == READERS.keys()


def jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def saved(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


def tar(path, rows):
    with TarWriter(str(path), encoder=False) as writer:
        for n, row in enumerate(rows):
            writer.write({"__key__": f"{n}", "json": json.dumps(row).encode()})
    return path


def opened(path, **options):
    """A reader that has gone through pickling, as it may on its way to another process."""
    return pickle.loads(pickle.dumps(open_reader(str(path), PrepareOptions(**options))))


def values(reader, split="train"):
    return [i.value if isinstance(i, Record) else f"!{i.reason}" for i in reader.records(split)]


@pytest.mark.parametrize("write", [jsonl, parquet, saved, tar])
@pytest.mark.parametrize(
    ("rows", "kind", "expected"),
    [(CHAT, "chat", CHAT), (PAIRS, "chat", CHAT), (TEXTS, "text", [r["text"] for r in TEXTS])],
)
def test_rows_of_every_form_and_kind(tmp_path, write, rows, kind, expected):
    reader = opened(write(tmp_path / {jsonl: "a.jsonl", parquet: "a.parquet", saved: "a", tar: "a.tar"}[write], rows))
    assert reader.kind == kind
    assert reader.splits == ("train",)
    assert [i.value for i in reader.records("train")] == expected
    assert values(reader) == values(reader)
    assert reader.count("train") == (4 if write in (parquet, saved) else None)


def test_a_folder_of_named_splits(tmp_path):
    for name, rows in (("train", PAIRS), ("validation", PAIRS[:2]), ("test", PAIRS[:1])):
        jsonl(tmp_path / f"{name}.jsonl", rows)
    reader = opened(tmp_path)
    assert set(reader.splits) == {"train", "valid", "test"}
    assert [len(values(reader, s)) for s in ("train", "valid", "test")] == [4, 2, 1]


def test_a_valid_path_of_every_kind(tmp_path):
    jsonl(tmp_path / "a.jsonl", PAIRS)
    jsonl(tmp_path / "b.jsonl", CHAT[:1])
    reader = opened(tmp_path / "a.jsonl", valid_path=str(tmp_path / "b.jsonl"))
    assert values(reader, "valid") == CHAT[:1]
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "test.txt").write_text("x")
    (tmp_path / "t" / "valid.txt").write_text("y")
    (tmp_path / "a.txt").write_text("a")
    # all of a folder that is asked to be valid is valid, whatever its files are called
    assert values(opened(tmp_path / "a.txt", valid_path=str(tmp_path / "t")), "valid") == ["x", "y"]
    with pytest.raises(InputError, match="data.valid_path: holds text, the training data hold chat"):
        opened(tmp_path / "a.jsonl", valid_path=str(tmp_path / "a.txt"))


def test_text_files_folders_and_patterns(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text("bee")
    (tmp_path / "a.txt").write_bytes(b"good\n\n\xff\n\nend\n")
    (tmp_path / "sub" / "c.rst").write_text("sea")
    assert values(opened(tmp_path)) == ["!invalid UTF-8", "bee", "sea"]
    assert values(opened(tmp_path, documents="paragraph")) == ["good", "!invalid UTF-8", "end", "bee", "sea"]
    assert values(opened(f"{tmp_path}/{{sub/c.rst,b.md}}")) == ["sea", "bee"]
    assert values(opened(f"{tmp_path}/**/*.[mr]*")) == ["bee", "sea"]
    assert opened(tmp_path).count("train") == 3


def test_one_document_is_cut_for_evaluation(tmp_path):
    text = "".join(f"line {n}\n" for n in range(1000))
    (tmp_path / "a.txt").write_text(text)
    reader = opened(tmp_path / "a.txt", valid_fraction=0.2)
    (train,), (valid,) = values(reader), values(reader, "valid")
    assert train + valid == text
    assert len(valid) == pytest.approx(0.2 * len(text), rel=0.02)
    by_line = opened(tmp_path / "a.txt", valid_fraction=0.2, documents="line")
    assert 150 < len(values(by_line, "valid")) < 250
    assert values(opened(tmp_path / "a.txt", valid_path=str(tmp_path / "a.txt"))) == [text]


def test_records_are_held_out_and_limited(tmp_path):
    jsonl(tmp_path / "a.jsonl", [{"text": f"{n}"} for n in range(200)])
    reader = opened(tmp_path / "a.jsonl", valid_fraction=0.25, max_items=20, max_eval_items=5)
    assert len(values(reader)) == 20
    assert len(values(reader, "valid")) == 5
    assert not set(values(reader)) & set(values(reader, "valid"))


def test_facts(tmp_path):
    reversal_files.write(reversal.generate(50, comb=5, relations=2), tmp_path, valid_train=7)
    reader = opened(tmp_path)
    assert reader.kind == "reversal"
    assert reader.splits == ("train", "valid_train", "valid_atomic", "test")
    assert len(values(opened(tmp_path, kind="reversal", max_eval_items=3), "test")) == 3
    with pytest.raises(InputError, match="data.valid_fraction"):
        opened(tmp_path, valid_fraction=0.1)
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(InputError, match="vocab.json: no such file"):
        opened(tmp_path, kind="reversal")


def test_token_ids(tmp_path):
    metadata = {"vocab_size": 50, "max_seq_len": 4, "eos_id": 1, "pad_id": 0, "mask_id": 49}
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    np.save(tmp_path / "shard_0.npy", np.array([[5, 6, 1, 0]] * 100, dtype=np.int32))
    reader = opened(tmp_path, valid_fraction=0.3)
    assert reader.kind == "text"
    assert reader.vocabulary.vocab_size == 50
    assert len(values(reader)) + len(values(reader, "valid")) == 100
    with pytest.raises(InputError, match="holds text, not chat"):
        opened(tmp_path, kind="chat")


def test_arc_tasks(tmp_path):
    (tmp_path / "b.json").write_text(json.dumps(TASK))
    (tmp_path / "a.json").write_text(json.dumps({"train": [{"input": [[1, 2], [3]], "output": [[0]]}]}))
    reader = opened(tmp_path)
    assert reader.kind == "grids"
    assert [i.where for i in reader.records("train")] == [
        f"{tmp_path}/a.json#train[0]",
        f"{tmp_path}/b.json#train[0]",
        f"{tmp_path}/b.json#train[1]",
        f"{tmp_path}/b.json#test[0]",
    ]
    assert values(reader) == [
        "!ragged grid",
        {"context": [[[0]]], "target": [[1]]},
        {"context": [[[2]]], "target": [[3]]},
        {"context": [[[4]]], "target": [[5]]},
    ]


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_frames_become_windows(tmp_path, write):
    rows = [{"frames": [[[n]] for n in range(5)]}, {"frames": [[[1]]]}]
    reader = opened(write(tmp_path / f"a.{write.__name__}", rows))
    assert reader.kind == "grids"
    assert values(reader) == [
        {"context": [[[0]], [[1]], [[2]]], "target": [[3]]},
        {"context": [[[1]], [[2]], [[3]]], "target": [[4]]},
        "!too few frames",
    ]
    assert reader.count("train") is None  # a row is any number of records


def test_shards_go_on_after_a_damaged_one(tmp_path):
    for n in range(3):
        tar(tmp_path / f"s-{n:03d}.tar", TEXTS)
    whole = (tmp_path / "s-001.tar").read_bytes()
    (tmp_path / "s-001.tar").write_bytes(whole[: len(whole) // 3])
    reader = opened(f"{tmp_path}/s-{{000..002}}.tar")
    found = values(reader)
    texts = [r["text"] for r in TEXTS]
    assert found[:4] == texts
    assert found[-4:] == texts
    bad = [i for i in reader.records("train") if isinstance(i, BadRecord)]
    assert [b.reason for b in bad] == ["truncated tar"]
    assert "s-001.tar:" in bad[0].where
    with pytest.raises(InputError, match="s-003.tar: no such file"):
        opened(f"{tmp_path}/s-{{000..003}}.tar")


def test_aliases_are_words_and_paths_are_paths(tmp_path, monkeypatch):
    assert opened("python_docs").splits == ("train", "valid")
    assert values(opened("python_docs", max_eval_items=1), "valid")
    (tmp_path / "python_docs").mkdir()
    (tmp_path / "python_docs" / "a.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert values(opened("./python_docs")) == ["mine"]
    with pytest.raises(InputError, match="'python_docs': holds text, not grids"):
        opened("python_docs", kind="grids")
    with pytest.raises(InputError, match="data.valid_fraction"):
        opened("python_docs", valid_fraction=0.1)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing.txt", "'nothing.txt': no such file, folder or pattern"),
        ("/nothing/*.jsonl", "no such file, folder or pattern"),
        ("corpus", "'corpus': no such file, folder or pattern; a dataset of the .* is hf://datasets/corpus"),
        ("data/train.jsonl", "'data/train.jsonl': no such file, folder or pattern"),
        ("pipe:cat a.tar", "raw data are not read from a command"),
        ("odd://host/a.jsonl", "odd://host/a.jsonl: no files can be read by odd://; use http, https, s3"),
        ("owner/nothing", "dataset 'owner/nothing' cannot be read"),
        ("hf://datasets/owner/nothing", "dataset 'owner/nothing' cannot be read"),
    ],
)
def test_what_is_not_there_is_the_users_error(path, message):
    with pytest.raises(InputError, match=message) as caught:
        opened(path)
    assert "\n" not in str(caught.value)


def test_prepared_data_are_not_prepared_again(tmp_path):
    (tmp_path / "index.json").write_text('{"format": 1, "fingerprint": "x"}')
    (tmp_path / "train-000000.tar").touch()
    with pytest.raises(InputError, match="is already prepared"):
        opened(tmp_path)


def test_the_kind_must_fit(tmp_path):
    jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(InputError, match=r"a.jsonl:1: the kind of the row is not recognised \(kind chat\)"):
        opened(tmp_path / "a.jsonl", kind="chat")
    with pytest.raises(InputError, match="data.kind=reversal needs a folder"):
        opened(tmp_path / "a.jsonl", kind="reversal")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match="holds text, not grids"):
        opened(tmp_path / "a.txt", kind="grids")


def test_the_fingerprint_follows_content_and_options(tmp_path):
    for place in ("x", "y"):
        (tmp_path / place).mkdir()
        jsonl(tmp_path / place / "a.jsonl", [{"text": "t", "body": "b"}])
        (tmp_path / place / "a.txt").write_text("one\n\ntwo")
    same = [opened(tmp_path / place / "a.jsonl").fingerprint() for place in ("x", "y")]
    assert same[0] == same[1]
    others = [
        opened(tmp_path / "x" / "a.jsonl", columns={"text": "body"}).fingerprint(),
        opened(tmp_path / "x" / "a.jsonl", max_items=1).fingerprint(),
        *(opened(tmp_path / "x" / "a.txt", documents=d).fingerprint() for d in ("file", "line", "paragraph")),
        opened(tmp_path / "x" / "a.txt", valid_fraction=0.5).fingerprint(),
    ]
    assert len({same[0], *others}) == len(others) + 1


def test_importing_readers_is_light():
    heavy = "{'transformers', 'datasets', 'pyarrow', 'tokenizers'}"
    code = (
        "import sys; before = set(sys.modules); import jepa_scale.data.prepare.readers, jepa_scale.data.prepare.encoders.encode; "
        f"print(sorted((set(sys.modules) - before) & {heavy}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
