"""Names of files that come from elsewhere."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.utils.errors import InputError
from jepa_scale.utils.file_names import check_tokenizer_config, lies_within, shards_of

OUTSIDE = ["../a", "a/../../b", "/etc/a", "C:\\a", "\\\\host\\a", "..\\a", "s3://b/a", "", "a\0b", None, 3, ["a"]]


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_what_leads_outside(name):
    assert not lies_within(name)


@pytest.mark.parametrize("name", ["a", "a.b", "sub/a", "..a", "a..", "...", "tokenizer.1.0.json"])
def test_what_stays(name):
    assert lies_within(name)


@given(st.lists(st.sampled_from(["..", ".", "a", "b", "/"]), min_size=1, max_size=6))
def test_no_accepted_name_resolves_outside(parts):
    import posixpath

    name = "/".join(parts)
    if lies_within(name):
        assert posixpath.normpath(posixpath.join("/folder", name)).startswith("/folder")


def test_an_index_names_files_beside_it(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}}))
    assert shards_of(index) == ["a.safetensors", "b.safetensors"]
    for content, message in (
        (
            {"weight_map": {"x": "../secret.safetensors"}},
            "says that x is in '../secret.safetensors', outside of this folder",
        ),
        ({"weight_map": {"x": "/secret.safetensors"}}, "outside of this folder"),
        ({"weight_map": {}}, "has no weight_map"),
        ([], "is no JSON object"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            shards_of(index)
    index.write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        shards_of(index)


def test_a_tokenizer_names_no_file_elsewhere(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    check_tokenizer_config(folder)
    (tmp_path / "there.json").write_text("{}")

    def write(**keys):
        (folder / "tokenizer_config.json").write_text(json.dumps(keys))

    write(vocab_file="/of/another/machine.json", tokenizer_file=None, fast_tokenizer_files=["tokenizer.json"])
    check_tokenizer_config(folder)
    for keys in ({"vocab_file": "../there.json"}, {"fast_tokenizer_files": ["../tokenizer.9.json"]}):
        write(**keys)
        with pytest.raises(InputError, match="outside of this folder"):
            check_tokenizer_config(folder)
