import json

import pytest

from jepa_scale.data.prepare.aliases import ALIASES
from jepa_scale.data.prepare.base import BadRecord, PrepareOptions
from jepa_scale.data.prepare.formats import grid_sources
from jepa_scale.data.prepare.job import prepare
from jepa_scale.utils.errors import InputError

A, B, C, D, E, F = ([[n, 0], [n, n]] for n in range(1, 7))


def test_generated_sequences_need_no_file(monkeypatch):
    monkeypatch.setattr(grid_sources, "SEQUENCES", {"train": 4, "valid": 2})
    source = ALIASES["grid_rules"](PrepareOptions())
    train, valid = (list(source.records(split)) for split in ("train", "valid"))
    assert len(train) == source.count("train") == 12 and len(valid) == source.count("valid") == 6
    assert train == list(source.records("train"))
    assert [r.where for r in train[2:4]] == ["grid_rules-train#0#frames[5]", "grid_rules-train#1#frames[3]"]
    assert train[1].value["context"][:2] == train[0].value["context"][1:]
    assert train[1].value["context"][2] == train[0].value["target"]
    assert not [r for r in valid if r.value in [t.value for t in train]]


def test_arc_is_chained(tmp_path, monkeypatch):
    folder = tmp_path / "arc" / "training"
    folder.mkdir(parents=True)
    pairs = [{"input": A, "output": B}, {"input": C, "output": D}]
    (folder / "a.json").write_text(json.dumps({"train": pairs, "test": [{"input": E, "output": F}]}))
    ragged = [[1, 2], [3]]
    (folder / "b.json").write_text(json.dumps({"train": pairs[:1], "test": [{"input": E, "output": F}]}))
    (folder / "c.json").write_text(json.dumps({"train": [*pairs, {"input": ragged, "output": A}], "test": []}))
    monkeypatch.setenv("JEPA_SCALE_DATA", str(tmp_path))
    source = ALIASES["arc"](PrepareOptions())
    train, valid = (list(source.records(split)) for split in ("train", "valid"))
    good = [r for r in train if not isinstance(r, BadRecord)]
    assert [r.value for r in good[:2]] == [
        {"context": [C, D, A], "target": B},
        {"context": [A, B, C], "target": D},
    ]
    assert [r.where.rpartition("/")[2] for r in good[:2]] == ["a.json#train[1]#train[0]", "a.json#train[0]#train[1]"]
    bad = [str(r).rpartition("/")[2] for r in train if isinstance(r, BadRecord)]
    assert bad[0].startswith("b.json: too few pairs: train holds 1")
    assert len(bad) == 1 + 4 and all("ragged grid" in line for line in bad[1:]) and "c.json#train[2]" in bad[1]
    assert [r.value for r in valid] == [{"context": [C, D, E], "target": F}, {"context": [A, B, E], "target": F}]
    with pytest.raises(InputError, match="b.json: too few pairs"):
        prepare("arc", tmp_path / "out", PrepareOptions(), processes=1, progress=False)
    index = prepare("arc", tmp_path / "more", PrepareOptions(on_error="skip"), processes=1, progress=False)
    assert index.skipped == {"too few pairs": 1, "ragged grid": 4} and index.kind == "grids"


def test_without_arc_it_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("JEPA_SCALE_DATA", str(tmp_path / "nothing"))
    monkeypatch.setenv("JEPA_SCALE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="JEPA_SCALE_DATA"):
        ALIASES["arc"](PrepareOptions())
