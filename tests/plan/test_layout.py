"""How ranks are divided, and what cannot be."""

import pytest

from jepa_scale.plan.layout import layout_of
from jepa_scale.utils.errors import InputError
from tests.plan.small import config, zero


def test_ranks_are_replicas_times_shards_times_tp():
    layout = layout_of(config({"precision": "bf16"}).engine, 4096, tp=8, replicas=16)
    assert (layout.shards, layout.data_ranks, layout.width) == (32, 512, 2)
    assert "32 shards × 16 replicas × tp 8" in str(layout)


def test_auto_precision_is_that_of_gpus():
    assert layout_of(config({"precision": "auto"}).engine, 8).precision == "bf16"


def test_zero_has_the_stage_of_its_json():
    assert [layout_of(config(zero(stage)).engine, 2).stage for stage in range(4)] == [0, 1, 2, 3]
    assert layout_of(config(zero(2)).engine, 2).zero["reduce_bucket_size"] == 50_000_000


@pytest.mark.parametrize(
    ("engine", "arguments", "message"),
    [
        ({}, (6, 4), "--world-size 6: is no multiple of tp × replicas = 4 × 1; make it one of 4"),
        ({}, (12, 2, 4), "tp × replicas = 2 × 4; make it one of 8"),
        ({}, (0,), "--world-size 0: must be at least 1"),
        (zero(1), (4, 1, 2), "--replicas: is for FSDP2"),
        (zero(1, deepspeed="none.json"), (4,), "engine.deepspeed: no file 'none.json'"),
        ({}, (4, 1, 1, "some"), "engine.activation_checkpointing: 'some'; one of none, full, selective"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(engine, arguments, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        layout_of(config(engine).engine, *arguments)
