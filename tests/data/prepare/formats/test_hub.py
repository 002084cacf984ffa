import datasets
import pytest

from jepa_scale.data.prepare.base import PrepareOptions
from jepa_scale.data.prepare.formats.hub import (
    Dataset,
    choose_splits,
    dataset_of,
    hub_parts,
    hub_rows,
    identify_hub,
    is_saved,
    saved_files,
    saved_parts,
)
from jepa_scale.utils.errors import InputError

ROWS = [{"text": f"t{n}", "n": n} for n in range(5)]


@pytest.mark.parametrize(
    ("path", "dataset"),
    [
        ("Salesforce/wikitext", Dataset("Salesforce/wikitext")),
        ("a.b/c-d_e", Dataset("a.b/c-d_e")),
        ("a/v1.5", Dataset("a/v1.5")),
        ("hf://datasets/openai/gsm8k", Dataset("openai/gsm8k")),
        ("hf://datasets/openai/gsm8k/", Dataset("openai/gsm8k")),
        ("hf://datasets/gsm8k", Dataset("gsm8k")),
        ("hf://datasets/openai/gsm8k@refs%2Fpr%2F1", Dataset("openai/gsm8k", "refs/pr/1")),
    ],
)
def test_names_of_data_sets(path, dataset):
    assert dataset_of(path) == dataset


FILES = ["a/b/c", "./a", "/a", "~/a", "a.txt", "data*", "", "../a", "a/", "x{1,2}", "corpus", "data/train.jsonl"]
FILES += ["data/a.txt", "data/a.csv", "data/a.jsonl.gz", "data/a.tar", "hf://datasets/a/b/train.jsonl", "hf://a/b"]


@pytest.mark.parametrize("path", FILES)
def test_names_of_files(path):
    assert dataset_of(path) is None


def test_what_begins_with_a_folder_here_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dataset_of("corpus/train") == Dataset("corpus/train")
    (tmp_path / "corpus").mkdir()
    assert dataset_of("corpus/train") is None


def test_splits_are_chosen_by_name():
    assert choose_splits(["train", "validation", "test"], None, "d") == {
        "train": "train",
        "valid": "validation",
        "test": "test",
    }
    assert choose_splits(["only"], None, "d") == {"train": "only"}
    assert choose_splits(["train", "unsupervised", "test"], None, "d") == {"train": "train", "test": "test"}
    names = ["train_gen", "test_gen", "train_sft", "test_sft"]
    assert choose_splits(names, "train_sft", "d") == {"train": "train_sft", "test": "test_sft"}
    assert choose_splits(["train", "test"], "test", "d") == {"train": "test"}
    with pytest.raises(InputError, match=r"d: has no split 'train', but train_gen, .*set data\.train_split"):
        choose_splits(names, None, "d")


def test_a_saved_data_set_and_a_saved_dict(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, validation=data.select([3, 1])).save_to_disk(tmp_path / "dict")
    assert is_saved(tmp_path / "one")
    assert is_saved(tmp_path / "dict")
    assert not is_saved(tmp_path)
    one = saved_parts(tmp_path / "one", PrepareOptions())
    assert [r.value for r in one["train"].read()] == ROWS
    assert next(one["train"].read()).where == f"{tmp_path}/one#0"
    both = saved_parts(tmp_path / "dict", PrepareOptions())
    assert {k: p.count for k, p in both.items()} == {"train": 5, "valid": 2}
    assert [(r.where, r.value["n"]) for r in both["valid"].read()] == [
        (f"{tmp_path}/dict/validation#0", 3),
        (f"{tmp_path}/dict/validation#1", 1),
    ]
    assert list(saved_parts(tmp_path / "dict", PrepareOptions(train_split="validation"))) == ["train"]
    before = saved_files(tmp_path / "one")
    (tmp_path / "one" / "cache-1.arrow").touch()
    assert saved_files(tmp_path / "one") == before


def test_a_damaged_folder_is_the_users_error(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    with pytest.raises(InputError, match="set data.train_split to null"):
        saved_parts(tmp_path / "one", PrepareOptions(train_split="train"))
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(InputError, match="one: cannot be read as a saved dataset"):
        saved_parts(tmp_path / "one", PrepareOptions())


def test_a_named_data_set_is_streamed(tmp_path):
    """The library takes a folder for a name, which needs no network."""
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "validation.jsonl").write_text('{"text": "c"}\n')
    parts = hub_parts(Dataset(str(tmp_path)), PrepareOptions())
    assert list(parts) == ["train", "valid"]
    assert [(r.where, r.value) for r in parts["train"].read()] == [
        (f"{tmp_path}/train#0", {"text": "a"}),
        (f"{tmp_path}/train#1", {"text": "b"}),
    ]
    assert [r.value for r in parts["valid"].read()] == [{"text": "c"}]
    with pytest.raises(InputError, match=r"has no split 'dev', but train, validation"):
        hub_parts(Dataset(str(tmp_path)), PrepareOptions(train_split="dev"))


def test_without_a_network_the_error_says_what_to_do():
    message = "dataset 'no/such' cannot be read from the Hugging Face hub: .*local file or folder"
    with pytest.raises(InputError, match=message) as caught:
        hub_parts(Dataset("no/such"), PrepareOptions())
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=message):
        next(hub_rows(Dataset("no/such"), None, "train"))
    assert len({identify_hub(Dataset(*d), None) for d in (("no/such",), ("no/other",), ("no/such", "v1"))}) == 3


def test_a_column_that_cannot_be_decoded_is_not_read(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    broken = {"text": ["a", "b"], "image": [{"bytes": b"no image", "path": None}] * 2}
    datasets.Dataset.from_dict(broken, features=features).save_to_disk(tmp_path / "d")
    found = [r.value for r in saved_parts(tmp_path / "d", PrepareOptions())["train"].read()]
    assert found == [{"text": t, "image": {"bytes": b"no image"}} for t in "ab"]
