import pytest
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.utils.splits import current_key, current_splits, eval_split, split_key

names = st.from_regex(r"[a-z_0-9]+", fullmatch=True)


@given(names, names)
def test_a_key_is_its_split_and_its_metric(split, metric):
    assert split_key(f"train/{metric}") == ("train", metric)
    assert split_key(f"{eval_split(split)}/{metric}") == (f"eval/{split}", metric)


@given(names.filter(lambda name: name not in ("fit", "train")), names)
def test_a_former_key_is_read_once_and_a_present_one_stays(split, metric):
    assert current_key(f"{split}/{metric}") == f"eval/{split}/{metric}"
    assert current_key(f"fit/{metric}") == f"train/{metric}"
    for key in (f"eval/{split}/{metric}", f"train/{metric}_loss"):
        assert current_key(key) == key


@pytest.mark.parametrize("metric", ["exact_match", "mrr", "joint_nll"])
def test_the_former_evaluation_of_the_split_train_is_no_training(metric):
    """Facts have an evaluation split of that name; training logs none of its metrics."""
    assert current_key(f"train/{metric}") == f"eval/train/{metric}"


def test_a_run_has_all_former_names_or_none():
    former = current_splits(["fit", "train", "atomic"])
    assert former == {"fit": "train", "train": "eval/train", "atomic": "eval/atomic"}
    present = ["train", "eval/train", "eval/atomic"]
    assert current_splits(present) == {name: name for name in present}
