"""A metric that a config names can appear, or the run does not begin."""

import pytest

from jepa_scale.config.metric_keys import check_intervals, check_splits
from jepa_scale.config.parsing import parse_section
from jepa_scale.config.schema import CheckpointConfig, TrainConfig
from jepa_scale.utils.errors import InputError

BEST = "eval/valid/ppl"


@pytest.mark.parametrize(("evaluated", "saved"), [(2, 2), (2, 4), (4, 2), (1, 7)])
def test_the_best_checkpoint_of_those_that_are_evaluated(evaluated, saved):
    check_intervals(TrainConfig(eval_every=evaluated), CheckpointConfig(keep_best=BEST, every=saved))


@pytest.mark.parametrize(
    ("evaluated", "saved", "message"),
    [
        (0, 2, "is measured at the end only; set train.eval_every"),
        (2, 0, "one checkpoint to choose from"),
        (3, 4, "evaluations every 3 steps and checkpoints every 4 are after the same step every 12 steps only"),
    ],
)
def test_a_best_checkpoint_that_there_cannot_be(evaluated, saved, message):
    with pytest.raises(InputError, match=f"^checkpoint.keep_best: {BEST}.* {message}"):
        check_intervals(TrainConfig(eval_every=evaluated), CheckpointConfig(keep_best=BEST, every=saved))
    check_intervals(TrainConfig(eval_every=evaluated), CheckpointConfig(every=saved))


def test_a_metric_of_a_split_that_is_not_evaluated():
    keep = CheckpointConfig(keep_best=BEST, every=2)
    assert check_splits(TrainConfig(eval_every=2), keep, {"valid", "test"}) == ""
    with pytest.raises(
        InputError, match="^checkpoint.keep_best: .*no split 'eval/valid' is evaluated; there is eval/test$"
    ):
        check_splits(TrainConfig(eval_every=2), keep, {"test"})
    with pytest.raises(
        InputError, match="^checkpoint.keep_best: .*the data have no split to evaluate; give data.valid_path"
    ):
        check_splits(TrainConfig(eval_every=2), keep, set())
    stops = TrainConfig(eval_every=2, early_stopping={"metric": "eval/a/ppl"})
    with pytest.raises(InputError, match="^train.early_stopping.metric: eval/a/ppl: no split"):
        check_splits(stops, CheckpointConfig(), {"valid"})
    aborts = TrainConfig(abort=[{"metric": "train/loss"}, {"metric": "eval/a/ppl"}])
    with pytest.raises(InputError, match="^train.abort.1.metric: eval/a/ppl: no split"):
        check_splits(aborts, CheckpointConfig(), {"valid"})


def test_nothing_to_evaluate_is_reported():
    assert "nothing is evaluated, as the data have no split" in check_splits(
        TrainConfig(eval_every=2), CheckpointConfig(), []
    )
    assert check_splits(TrainConfig(), CheckpointConfig(), []) == ""


def test_a_metric_of_training_is_none_of_an_evaluation():
    for key, section in (("keep_best", CheckpointConfig),):
        with pytest.raises(InputError, match=f"^x.{key}: 'train/loss' is no metric of an evaluation"):
            parse_section(section, {key: "train/loss"}, "x")
    with pytest.raises(InputError, match="^train.early_stopping.metric: 'train/loss' is no metric of an evaluation"):
        parse_section(TrainConfig, {"eval_every": 1, "early_stopping": {"metric": "train/loss"}}, "train")
    with pytest.raises(InputError, match="^train.abort.0: no value is allowed, as below is 2 and above is 1"):
        parse_section(TrainConfig, {"abort": [{"metric": "train/loss", "below": 2.0, "above": 1.0}]}, "train")
    with pytest.raises(InputError, match="^train.spike_factor: 0.5 would warn"):
        parse_section(TrainConfig, {"spike_factor": 0.5}, "train")
