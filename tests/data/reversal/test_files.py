import json
from pathlib import Path
from typing import Any

import pytest

from jepa_scale.data import load_data, parse_data
from jepa_scale.data.reversal.facts import generate
from jepa_scale.data.reversal.files import read, write
from jepa_scale.utils.errors import InputError

Row = dict[str, Any]


def row(subject: list[Any], relation: Any, answer: list[Any], kind: str, mask: Any = "<mask>") -> Row:
    return {"input_text": [subject, [relation], [mask]], "target_text": [answer], "type": kind}


VOCABULARY = ["<PRED>", "Ann", "<r_1_inv>", "Bo", "<r_0>", "<mask>", "Cy", "<r_1>", "<r_0_inv>", "<pad>", "Di"]
"""Special tokens anywhere, inverses in no order."""

TRAIN = [
    row(["Ann"], "<r_0>", ["Bo", "Cy"], "train"),
    row(["Bo", "Cy"], "<r_0_inv>", ["Ann"], "train"),
    row(["Di"], "<r_1_inv>", ["Cy"], "atomic"),
]
TEST = [row(["Cy"], "<r_1>", ["Di"], "test")]


def folder(path: Path, train: Any = TRAIN, valid: Any = None, vocabulary: Any = VOCABULARY) -> Path:
    valid = {"train": TRAIN[:1], "atomic": TRAIN[2:], "test": TEST} if valid is None else valid
    for name, content in (("train", train), ("valid", valid), ("vocab", vocabulary)):
        (path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def as_ids(content: Any) -> Any:
    """The same content with ids instead of strings."""
    if isinstance(content, dict):
        return {k: v if k == "type" else as_ids(v) for k, v in content.items()}
    if isinstance(content, list):
        return [as_ids(c) for c in content]
    return VOCABULARY.index(content)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    data = generate(100, comb=4, relations=3, seed=1)
    write(data, tmp_path / "facts", valid_train=50)
    again = read(tmp_path / "facts")
    assert again.fingerprint == data.fingerprint
    assert again.special == data.special
    assert again.vocab_size == data.vocab_size
    assert list(again.names) == list(data.names)
    assert list(again.train) == list(data.train)
    assert list(again.splits["test"]) == list(data.splits["test"])
    assert list(again.splits["atomic"]) == list(data.splits["atomic"])
    sample, known = list(again.splits["train"]), list(data.splits["train"])
    assert len(sample) == 50
    assert all(f in known for f in sample)
    assert sample != known[:50]


def test_written_files_have_the_seeds_format(tmp_path: Path) -> None:
    data = generate(100, comb=4)
    write(data, tmp_path)
    train = json.loads((tmp_path / "train.json").read_text())
    valid = json.loads((tmp_path / "valid.json").read_text())
    f = data.train[0]
    assert len(train) == len(data.train)
    assert train[0] == {
        "input_text": [list(f.subject), [f.relation], [f.mask]],
        "target_text": [list(f.object)],
        "type": "train",
    }
    assert {r["type"] for r in train} == {"train", "atomic"}
    assert list(valid) == ["train", "atomic", "test"]
    assert len((tmp_path / "train.json").read_text().splitlines()) == len(train) + 2  # row n stands in line n + 1
    with pytest.raises(InputError, match="already exists"):
        write(data, tmp_path)


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("form", ["list", "token to id", "id to token"])
def test_a_foreign_file_with_any_ids(tmp_path: Path, form: str, ids: bool) -> None:
    forms = {
        "list": VOCABULARY,
        "token to id": {t: i for i, t in reversed(list(enumerate(VOCABULARY)))},
        "id to token": {str(i): t for i, t in enumerate(VOCABULARY)},
    }
    valid = {"test": TEST, "train": TRAIN[:1], "atomic": TRAIN[2:]}
    train, valid = (as_ids(TRAIN), as_ids(valid)) if ids else (TRAIN, valid)
    data = read(folder(tmp_path, train, valid, forms[form]))
    assert data.special == {"mask": 5, "pad": 9, "pred": 0, "relations": [4, 8, 7, 2]}
    assert data.vocab_size == 11
    assert list(data.names) == [(1,), (3, 6), (6,), (10,)]
    told, back, atomic = data.train
    assert (told.subject, told.relation, told.inverse, told.object, told.kind) == ((1,), 4, 8, (3, 6), "train")
    assert (back.subject, back.relation, back.inverse, back.object) == ((3, 6), 8, 4, (1,))
    assert (atomic.relation, atomic.inverse, atomic.kind) == (2, 7, "atomic")
    (test,) = data.splits["test"]
    assert (test.subject, test.relation, test.inverse, test.object, test.kind) == ((6,), 7, 2, (10,), "test")


def test_without_names_of_relations_parity_decides(tmp_path: Path) -> None:
    vocabulary = ["a", "b", "m", "q", "x0", "x1", "x2", "x3"]
    train = [row([0], 4, [1], "train", 2), row([1], 5, [0], "train", 2), row([0], 7, [1], "atomic", 2)]
    valid = {"train": [], "atomic": [], "test": [row([1], 6, [0], "test", 2)]}
    data = read(folder(tmp_path, train, valid, vocabulary))
    assert data.special == {"mask": 2, "pad": 8, "pred": 9, "relations": [4, 5, 6, 7]}
    assert data.vocab_size == 10
    assert [(f.relation, f.inverse) for f in data.train] == [(4, 5), (5, 4), (7, 6)]


def test_the_first_relation_can_be_given(tmp_path: Path) -> None:
    vocabulary = {t: i for i, t in enumerate(["a", "b", "m", "x0", "x1", "x2"])}
    train = [row([0], 4, [1], "train", 2)]
    valid = {"train": [], "atomic": [], "test": [row([1], 3, [0], "test", 2)]}
    folder(tmp_path, train, valid, vocabulary)
    assert read(tmp_path).train[0].inverse == 3  # the smallest relation is 3
    (tmp_path / "valid.json").write_text(json.dumps({**valid, "test": [row([1], 5, [0], "test", 2)]}))
    assert read(tmp_path).train[0].inverse == 5  # the smallest relation is 4
    (tmp_path / "valid.json").write_text(json.dumps({**valid, "test": []}))
    assert read(tmp_path, first_relation=3).train[0].inverse == 3
    with pytest.raises(InputError, match="train.json, row 1: token 4 is not a relation"):
        read(tmp_path, first_relation=5)
    (tmp_path / "vocab.json").write_text(json.dumps(["a", "b", "m", "x0", "x1"]))
    with pytest.raises(InputError, match="vocab.json: has no id 5"):
        read(tmp_path)


def changed(**change: Any) -> list[Row]:
    return [TRAIN[0], {**TRAIN[1], **change}, TRAIN[2]]


@pytest.mark.parametrize(
    ("train", "says"),
    [
        (changed(type="test"), "row 2: type must be"),
        (changed(type=["train"]), "row 2: type must be"),
        ([TRAIN[0], {k: v for k, v in TRAIN[1].items() if k != "type"}], "row 2: key 'type' is missing"),
        ([TRAIN[0], {k: v for k, v in TRAIN[1].items() if k != "input_text"}], "row 2: key 'input_text' is missing"),
        ([TRAIN[0], {}], "row 2: must be a mapping"),
        ([TRAIN[0], 7], "row 2: must be a mapping"),
        (changed(input_text=[["Zoe"], ["<r_0>"], ["<mask>"]]), "row 2: token 'Zoe' is not in vocab.json"),
        (changed(input_text=[[11], ["<r_0>"], ["<mask>"]]), "row 2: id 11 is not in vocab.json"),
        (changed(input_text=[[-1], ["<r_0>"], ["<mask>"]]), "row 2: id -1 is not in vocab.json"),
        (changed(input_text=[[1.5], ["<r_0>"], ["<mask>"]]), "row 2: 1.5 is not a token"),
        (changed(input_text=[[["Ann"]], ["<r_0>"], ["<mask>"]]), r"row 2: \['Ann'\] is not a token"),
        (changed(input_text=[[{"input_text": 1}], ["<r_0>"], ["<mask>"]]), "row 2: .* is not a token"),
        (changed(input_text=["Ann", ["<r_0>"], ["<mask>"]]), "row 2: the name in input_text must be a list"),
        (changed(input_text=[[], ["<r_0>"], ["<mask>"]]), "row 2: the name in input_text must be a list"),
        (changed(input_text=[["Ann"], "<r_0>", ["<mask>"]]), "row 2: the relation must be a list"),
        (changed(input_text=[["Ann"], ["<r_0>"]]), "row 2: input_text must be"),
        (changed(input_text=[["Ann"], ["Bo"], ["<mask>"]]), "row 2: token 3 is not a relation"),
        (changed(input_text=[["Ann"], ["<r_0>"], ["Bo"]]), "row 2: token 3 is in the mask's position, expected 5"),
        (changed(target_text=["Ann"]), "row 2: the name in target_text must be a list"),
        (changed(target_text=[["Ann"], ["Bo"]]), "row 2: target_text must be"),
        ([], "holds no facts"),
        ({"train": TRAIN}, "must be a list of rows"),
        ('[\n{"input_text": [["Ann"]],\n', "line 3, column 1: not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        (f"[{'9' * 5000}]", "not valid JSON"),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, train: Any, says: str) -> None:
    with pytest.raises(InputError, match=f"train.json.*{says}") as caught:
        read(folder(tmp_path, train))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("vocabulary", "says"),
    [
        ([], "holds no tokens"),
        ([*VOCABULARY, "Ann"], "token 'Ann' is listed twice, with ids 1 and 11"),
        ([*VOCABULARY, 4], "4 ↔ 11 is not a token"),
        ({"Ann": -1}, "'Ann' ↔ -1 is not a token"),
        ({"Ann": 2**40}, "is not a token string with an id"),
        ({"model": {"Ann": 1}}, "is not a token"),
        ("3", "must map tokens to ids"),
        ([*VOCABULARY, "<r_7>"], "<r_7> and its inverse <r_7_inv> must both exist"),
    ],
)
def test_a_damaged_vocabulary_is_refused(tmp_path: Path, vocabulary: Any, says: str) -> None:
    with pytest.raises(InputError, match=f"vocab.json: .*{says}"):
        read(folder(tmp_path, vocabulary=vocabulary))


def test_a_held_out_fact_that_is_trained_on_is_refused(tmp_path: Path) -> None:
    leak = row([6], 7, [10], "atomic", 5)  # the test fact, in ids
    with pytest.raises(InputError, match=r"valid.json, test, row 1: .* also in .*train.json"):
        read(folder(tmp_path, [*TRAIN, leak]))
    valid = {"train": [], "atomic": [], "test": [*TEST, TRAIN[1]]}
    with pytest.raises(InputError, match=r"valid.json, test, row 2: "):
        read(folder(tmp_path, valid=valid))


@pytest.mark.parametrize(
    ("valid", "says"),
    [
        ({"train": [], "test": TEST}, "must be"),
        ({"train": [], "atomic": [], "test": TEST, "more": []}, "must be"),
        ({"train": [], "atomic": 3, "test": TEST}, "atomic: must be a list"),
        ({"train": [], "atomic": [], "test": [TEST[0], {"input_text": []}]}, "test, row 2: key 'target_text'"),
    ],
)
def test_a_damaged_valid_file_is_refused(tmp_path: Path, valid: Any, says: str) -> None:
    with pytest.raises(InputError, match=f"valid.json.*{says}"):
        read(folder(tmp_path, valid=valid))


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vocab.json: no such file"):
        read(tmp_path)
    folder(tmp_path)
    (tmp_path / "train.json").write_bytes(b"[\xff]")
    with pytest.raises(InputError, match="train.json: not UTF-8 text at byte 1"):
        read(tmp_path)
    (tmp_path / "train.json").unlink()
    (tmp_path / "train.json").mkdir()
    with pytest.raises(InputError, match="train.json: cannot be read: Is a directory"):
        read(tmp_path)


def test_a_byte_order_mark_is_no_damage(tmp_path: Path) -> None:
    folder(tmp_path)
    for name in ("train", "valid", "vocab"):
        file = tmp_path / f"{name}.json"
        file.write_text(file.read_text(), encoding="utf-8-sig")
    assert len(read(tmp_path).train) == 3


def test_the_type_of_a_row_of_valid_is_its_split(tmp_path: Path) -> None:
    untyped = {k: v for k, v in TEST[0].items() if k != "type"}
    data = read(folder(tmp_path, valid={"train": [], "atomic": [], "test": [untyped]}))
    assert data.splits["test"][0].kind == "test"
    assert len(data.splits["train"]) == 0


def test_load_data_generates_or_reads(tmp_path: Path) -> None:
    data = load_data(parse_data({"source": "reversal", "entities_a": 100, "comb": 4, "relations": 2, "seed": 3}))
    assert data.fingerprint == generate(100, 4, 2, 3).fingerprint
    assert set(data.splits) == {"train", "atomic", "test"}
    assert len(data.train) == 260
    write(generate(100, 4, 2, 3), tmp_path)
    assert (
        load_data(parse_data({"source": "reversal", "path": str(tmp_path), "workers": 2})).fingerprint
        == data.fingerprint
    )
    assert parse_data({"source": "reversal", "path": str(tmp_path), "workers": 2}).workers == 2


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "^data.source: required key is missing"),
        ({"source": "reversl"}, "^data.source: unknown source 'reversl'; did you mean 'reversal'"),
        ({"source": "reversal", "entites_a": 5}, "^data.entites_a: unknown key; did you mean 'entities_a'"),
        ({"source": "reversal", "comb": "x"}, "^data.comb: "),
        ({"source": "reversal", "path": "x", "comb": 10}, "^data.comb: has no meaning"),
        ({"source": "reversal", "path": "no/such/folder"}, "^data.path: no file"),
        ({"source": "reversal", "first_relation_token_id": 5}, "^data.first_relation_token_id: "),
        ({"source": "reversal", "workers": -1}, "^data.workers: "),
    ],
)
def test_wrong_keys_are_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_data(parse_data(values))


def test_prepared_shards_hold_the_same_facts(tmp_path: Path) -> None:
    from jepa_scale.data import load_data, parse_data
    from jepa_scale.data.prepare.base import PrepareOptions
    from jepa_scale.data.prepare.job import prepare

    data = generate(50, comb=5, relations=2)
    write(data, tmp_path / "files")
    prepare(tmp_path / "files", tmp_path / "shards", PrepareOptions(shard_samples=40), processes=1, progress=False)
    options = {"source": "reversal", "atomic_repeats": 2}
    from_files = load_data(parse_data({**options, "path": str(tmp_path / "files")}))
    from_shards = load_data(parse_data({**options, "path": str(tmp_path / "shards")}))
    assert from_shards.fingerprint == from_files.fingerprint
    assert from_shards.special == from_files.special
    for split in ("train", "atomic", "test"):
        assert list(from_shards.splits[split]) == list(from_files.splits[split])
    assert (tmp_path / "shards" / "train-000001.tar").is_file()


def test_valid_holds_as_many_facts_of_each_split_as_asked_for(tmp_path: Path) -> None:
    data = generate(100, 4, 2, 3)
    write(data, tmp_path, valid_samples=7)
    valid = json.loads((tmp_path / "valid.json").read_text())
    assert {split: len(rows) for split, rows in valid.items()} == {"train": 7, "atomic": 7, "test": 7}
    found = read(tmp_path)
    assert len(found.splits["test"]) == 7 and len(found.train) == len(data.train)
    held_out = {(*f.subject, f.relation, *f.object) for f in data.splits["test"]}
    chosen = [(*f.subject, f.relation, *f.object) for f in found.splits["test"]]
    assert held_out.issuperset(chosen) and chosen != [
        (*f.subject, f.relation, *f.object) for f in data.splits["test"][:7]
    ]
