"""Early stopping and abort rules: what they decide, what a checkpoint remembers, and how a run ends."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from jepa_scale import train
from jepa_scale.config.schema import TrainConfig
from jepa_scale.data.reversal.facts import generate
from jepa_scale.training.stopping import StoppingRules
from jepa_scale.utils.errors import InputError


def criteria(**options) -> StoppingRules:
    return StoppingRules(TrainConfig(steps=100, eval_every=5, **options))


def check(who: StoppingRules, step: int, epochs: float = 0.0, split: str = "eval/valid", **values: float) -> bool:
    return who.check(step, {split: values}, lambda: epochs)


def patient(**changes) -> StoppingRules:
    return criteria(early_stopping={"metric": "eval/valid/ppl", "patience": 2, "min_delta": 0.1, **changes})


def test_it_ends_after_so_many_evaluations_without_an_improvement():
    who = patient()
    values = [9.0, 8.0, 7.95, 7.85, 7.9, 7.8]  # 7.95 is not enough of an improvement on 8.0, 7.85 is
    assert [check(who, step, ppl=v) for step, v in enumerate(values)] == [False] * 5 + [True]
    assert not who.aborted
    assert who.ended == (
        "stopped early: eval/valid/ppl has not improved by more than 0.1 in 2 evaluations; the best was 7.85 after step 3"
    )


def test_better_may_be_higher_and_nan_is_never_better():
    who = patient(metric="eval/valid/retrieval_top1", min_delta=0.0)
    assert [check(who, s, retrieval_top1=v) for s, v in enumerate([0.1, 0.2, 0.15, math.nan])] == [False] * 3 + [True]
    never = patient()
    assert [check(never, s, ppl=math.nan) for s in range(2)] == [False, True]
    assert "never a number" in never.ended


def test_rows_of_other_splits_say_nothing():
    who = patient()
    assert not any(check(who, step, split="train", loss=1.0) for step in range(50))
    assert not who.check(3, {}, lambda: pytest.fail("nobody wants to know"))


def test_a_checkpoint_remembers_and_more_patience_goes_on():
    who = patient()
    assert [check(who, s, ppl=v) for s, v in enumerate([8.0, 8.0])] == [False, False]
    state = json.loads(json.dumps(who.state()))
    again = patient()
    again.resume(state)
    assert not again.ended and check(again, 2, ppl=8.0)
    ended = json.loads(json.dumps(again.state()))
    for patience, ends in ((2, True), (3, False)):
        later = patient(patience=patience)
        later.resume(ended)
        assert bool(later.ended) is ends
    fresh = patient()
    fresh.resume(None)
    assert not fresh.ended


@pytest.mark.parametrize(
    ("rule", "value", "epochs", "why"),
    [
        ({"below": 0.08}, 0.07, 0, "0.07, below 0.08"),
        ({"below": 0.08}, 0.08, 0, ""),
        ({"above": 9.0}, 9.5, 0, "9.5, above 9"),
        ({"below": 1, "above": 2}, 1.5, 0, ""),
        ({}, 3.0, 0, ""),
        ({}, math.nan, 0, "nan, not a finite number"),
        ({"below": 0.0}, math.inf, 0, "inf, not a finite number"),
        ({"below": 0.08, "after_epochs": 10}, 0.01, 9, ""),
        ({"below": 0.08, "after_epochs": 10}, 0.01, 10, "0.01, below 0.08"),
        ({"below": 0.08, "after_steps": 7}, 0.01, 0, ""),
        ({"below": 0.08, "after_steps": 6}, 0.01, 0, "0.01, below 0.08"),
    ],
)
def test_abort_rules(rule, value, epochs, why):
    who = criteria(abort=[{"metric": "train/vq_usage", **rule}])
    assert check(who, 7, epochs, "train", vq_usage=value) == who.aborted == bool(why)
    assert who.ended == (f"aborted after step 7: train/vq_usage is {why}" if why else "")


def test_a_metric_that_has_gone_is_no_number():
    """Evaluations leave out what is not a number."""
    who = criteria(abort=[{"metric": "eval/valid/info_nce"}])
    assert not check(who, 1, info_nce=3.0, top1=0.1)
    assert check(who, 2, top1=0.1) and "nan" in who.ended


def test_metrics_that_are_not_there_are_named():
    for options, key in (
        ({"abort": [{"metric": "train/loss"}, {"metric": "eval/valid/ppk"}]}, "train.abort.1.metric"),
        ({"early_stopping": {"metric": "eval/valid/ppk"}}, "train.early_stopping.metric"),
    ):
        with pytest.raises(InputError, match=f"{key}: split 'eval/valid' logs no 'ppk'; choose one of loss, ppl"):
            check(criteria(**options), 5, ppl=1.0, loss=2.0)
    assert not check(criteria(abort=[{"metric": "train/skipped_steps", "above": 0}]), 5, split="train", loss=1.0)
    with pytest.raises(InputError, match="'train' logs no 'los'"):
        check(criteria(abort=[{"metric": "train/los"}]), 5, split="train", loss=1.0)


def test_the_metric_of_the_best_checkpoint_must_be_logged():
    who = StoppingRules(TrainConfig(), "eval/valid/ppk", last=9)
    assert who.active and not check(who, 5, split="train", loss=1.0)
    with pytest.raises(
        InputError, match="^checkpoint.keep_best: split 'eval/valid' logs no 'ppk'; choose one of loss, ppl"
    ):
        check(who, 5, ppl=1.0, loss=2.0)
    assert not check(StoppingRules(TrainConfig(), "eval/valid/ppl"), 5, ppl=1.0)


def test_after_the_last_step_an_unknown_metric_does_not_lose_the_checkpoint():
    for who in (
        StoppingRules(TrainConfig(), "eval/valid/ppk", last=9),
        StoppingRules(TrainConfig(abort=[{"metric": "eval/valid/ppk"}]), last=9),
    ):
        assert check(who, 9, ppl=1.0) and not who.aborted and "logs no 'ppk'" in who.ended


def test_options_that_make_no_sense_are_refused():
    for wrong in ("ppl", "valid/", "/ppl", "eval/valid/", "eval/valid/ppl/2"):
        with pytest.raises(ValidationError):
            TrainConfig(eval_every=1, early_stopping={"metric": wrong})
    with pytest.raises(ValidationError, match="set eval_every"):
        TrainConfig(early_stopping={"metric": "eval/valid/ppl"})


@pytest.fixture
def config(tmp_path) -> Path:
    values = {
        "run": {"dir": str(tmp_path / "runs"), "name": "small"},
        "engine": {"threads": 1},
        "model": {"family": "native", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        "data": {"source": "reversal", "entities_a": 50, "comb": 5, "relations": 2},
        "objective": {"name": "lm"},
        "optim": {"warmup_steps": 1, "lr": 1e-12},
        "train": {"steps": 20, "batch_size": 16, "log_every": 2, "eval_every": 2},
        "eval": {"max_facts": 4, "rank_facts": 2},
        "log": {"progress": False, "report": False},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def last_steps(tmp_path) -> tuple[int, list[str]]:
    folder = tmp_path / "runs" / "small"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows[-1]["step"], sorted(p.name for p in (folder / "checkpoints").glob("step_*"))


def test_a_run_that_stops_early_is_done_and_goes_on_if_it_is_to_be_more_patient(config, tmp_path, capsys):
    """With so small a learning rate nothing improves after the first evaluation."""
    early = "train.early_stopping={metric: eval/test/joint_nll, patience: 2, min_delta: 0.01}"
    assert train.main(["--config", str(config), early]) == 0
    assert "INFO stopped early: eval/test/joint_nll" in capsys.readouterr().err
    assert last_steps(tmp_path) == (6, ["step_00000006"])
    assert json.loads((tmp_path / "runs/small/summary.json").read_text())["steps"] == 6
    assert train.main(["--config", str(config), early, "--resume", "auto"]) == 0
    assert "stopped early" in capsys.readouterr().err and last_steps(tmp_path)[0] == 6  # it had ended
    assert train.main(["--config", str(config), early.replace("patience: 2", "patience: 4"), "--resume", "auto"]) == 0
    assert last_steps(tmp_path) == (10, ["step_00000006", "step_00000010"])


def test_a_run_that_is_aborted_has_saved_and_ends_with_an_error(config, tmp_path, capfd):
    rule = "train.abort=[{metric: train/lm_loss, above: 0.5, after_epochs: 1}]"
    assert train.main(["--config", str(config), rule, "-q"]) == 1
    logged = capfd.readouterr().err
    assert re.fullmatch(r"\d\d:\d\d:\d\d ERROR aborted after step .*train/lm_loss is .*\n", logged)
    step, saved = last_steps(tmp_path)
    facts = len(generate(50, 5, 2).train)
    assert step == 2 * math.ceil(facts / 16 / 2) and saved == [f"step_{step:08d}"]


@pytest.mark.parametrize(("after", "code"), [(2, 1), (3, 0)])
def test_at_the_end_of_the_data_as_many_epochs_are_done_as_there_were(config, tmp_path, after, code):
    rule = f"train.abort=[{{metric: train/lm_loss, above: 0.5, after_epochs: {after}}}]"
    assert train.main(["--config", str(config), rule, "train.epochs=2", "train.steps=0"]) == code
