import json

import pytest

from jepa_scale.data.prepare.formats.facts import is_fact_folder, open_facts
from jepa_scale.data.reversal import facts as reversal
from jepa_scale.data.reversal import files as reversal_files
from jepa_scale.utils.errors import InputError


@pytest.fixture
def folder(tmp_path):
    reversal_files.write(reversal.generate(50, comb=5, relations=2), tmp_path / "facts", valid_train=7)
    return tmp_path / "facts"


def test_rows_come_as_they_are(folder):
    source = open_facts(folder)
    train, valid = (json.loads((folder / name).read_text()) for name in ("train.json", "valid.json"))
    assert source.kind == "reversal"
    assert source.splits == ("train", "valid_train", "valid_atomic", "test")
    assert [r.value for r in source.records("train")] == train
    assert [r.value for r in source.records("valid_train")] == valid["train"]
    assert [r.value for r in source.records("valid_atomic")] == valid["atomic"]
    assert [r.value for r in source.records("test")] == valid["test"]
    assert [source.count(s) for s in source.splits] == [len(train), 7, len(valid["atomic"]), len(valid["test"])]
    assert next(source.records("train")).where == f"{folder}/train.json#0"
    assert next(source.records("test")).where == f"{folder}/valid.json#test[0]"


def test_ids_with_a_meaning_are_those_of_the_whole_reader(folder):
    data, source = reversal_files.read(folder), open_facts(folder)
    assert source.vocabulary.vocab_size == data.vocab_size
    assert source.vocabulary.special == data.special
    assert source.vocabulary.file == folder / "vocab.json"


def test_a_bad_row_stops_everything_before_it_begins(folder):
    rows = json.loads((folder / "train.json").read_text())
    rows[4]["input_text"][0] = [99999]
    (folder / "train.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match="train.json, row 5: id 99999 is not in vocab.json"):
        open_facts(folder)


def test_a_folder_of_facts_is_known_by_its_files(folder, tmp_path):
    assert is_fact_folder(folder)
    (folder / "valid.json").unlink()
    assert is_fact_folder(folder)  # and reading it says what is missing
    with pytest.raises(InputError, match="valid.json: no such file"):
        open_facts(folder)
    assert not is_fact_folder(tmp_path)


def test_the_fingerprint_is_of_all_three_files(folder):
    before = open_facts(folder).fingerprint()
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {"<new>": len(vocabulary)}))
    assert open_facts(folder).fingerprint() != before
