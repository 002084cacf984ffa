import math

import pytest

from jepa_scale.config.schema import TrainConfig
from jepa_scale.training.loss_checks import LossChecks


def test_bad_steps_in_a_row_end_the_run_across_rows(caplog):
    guard = LossChecks(TrainConfig(max_skipped_steps=3))
    guard.check({"loss": 1.0}, [0, 1, 2], [1, 2], logs=True)
    assert caplog.messages == ["no finite gradient in step 1, 2; skipped on all ranks"]
    guard.check({"loss": 1.0}, [3, 4], [3], logs=False)  # three in a row, then a good one
    guard.check({"loss": math.nan}, [5, 6, 7], [5, 6, 7], logs=False)
    assert len(caplog.messages) == 1
    with pytest.raises(FloatingPointError, match=r"steps 5 to 8 .*train.max_skipped_steps=3"):
        guard.check({"loss": math.nan}, [8], [8], logs=False)


def test_no_bad_step_is_allowed_where_the_limit_is_zero():
    with pytest.raises(FloatingPointError, match="steps 0 to 0"):
        LossChecks(TrainConfig(max_skipped_steps=0)).check({"loss": math.nan}, [0], [0], logs=False)


def test_a_spike_is_a_warning_when_it_is_looked_for(caplog):
    rows = [2.0, 2.2, 1.9, 9.0, 2.0]
    looking, careless = LossChecks(TrainConfig(spike_factor=3)), LossChecks(TrainConfig())
    found = [looking.check({"loss": loss}, [i], [], logs=True) for i, loss in enumerate(rows)]
    assert found == [{}, {}, {}, {"loss_spike": pytest.approx(4.5)}, {}]
    assert "the loss jumped to 9 from 2" in caplog.text
    assert [careless.check({"loss": loss}, [i], [], logs=True) for i, loss in enumerate(rows)] == [{}] * 5
