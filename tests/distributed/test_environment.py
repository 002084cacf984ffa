"""The environment variables of a launcher, whole, none, and left over."""

import pytest

from jepa_scale.distributed.environment import Place, is_first, read_place
from jepa_scale.utils.errors import InputError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "CROSS_SIZE")
MEETING = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.fixture
def environment(monkeypatch):
    def set_to(**values):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    set_to()
    return set_to


def test_a_process_alone_and_a_rank(environment):
    assert read_place() == Place(0, 1, 0) and read_place().alone and is_first()
    environment(RANK="0", WORLD_SIZE="1")
    assert read_place().alone and is_first()
    environment(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", **MEETING)
    assert read_place() == Place(3, 4, 1) and not read_place().alone and not is_first()
    environment(RANK="0", WORLD_SIZE="4", **MEETING)
    assert is_first()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": "1"}, "RANK=1: a rank must be below the number of ranks, 1; .* unset RANK,"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2: a rank must be below"),
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            "there are other ranks, and MASTER_ADDR, MASTER_PORT of this one is not set",
        ),
        ({"WORLD_SIZE": "2", **MEETING}, "there are other ranks, and RANK of this one is not set"),
        ({"RANK": "4", "WORLD_SIZE": "4", **MEETING}, "RANK=4, WORLD_SIZE=4: a rank must be below"),
        ({"RANK": "-1"}, "RANK=-1: these must be numbers"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=: these must be numbers"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "a rank must be below the number of ranks, 0"),
    ],
)
def test_what_is_left_over_is_named(environment, values, message):
    environment(**values)
    with pytest.raises(InputError, match=f"^environment: .*{message}"):
        read_place()
    assert is_first()  # nobody else would say so


def test_a_rank_that_a_launcher_started_is_not_the_first(environment):
    for mark in ("TORCHELASTIC_RUN_ID", "CROSS_SIZE"):
        environment(RANK="1", WORLD_SIZE="2", **{mark: "1"})
        assert not is_first()
