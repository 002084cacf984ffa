import json
import math
import resource
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from jepa_scale.config.schema import LogConfig
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.telemetry import RunLog, prepare_run_dir
from jepa_scale.telemetry.records import load_run, read_rows
from jepa_scale.telemetry.run_log import Stopwatch

CONFIG = "run:\n  name: demo\nengine:\n  name: auto\n  precision: bf16\n"
QUIET = LogConfig(progress=False)


@pytest.fixture
def wait(monkeypatch) -> Callable[[float], None]:
    """Advance the clock of a run log, which is otherwise fixed."""
    now = 100.0

    def move(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr("jepa_scale.telemetry.run_log.time", SimpleNamespace(perf_counter=lambda: now))
    return move


def ranks(rank=0, world_size=1):
    return ParallelContext(rank, world_size, rank, torch.device("cpu"), "python")


def run_log(directory, total=10, rank=0, world_size=1, **options):
    prepare_run_dir(directory, resume=True)
    return RunLog(directory, QUIET, ranks(rank, world_size), "demo", total, CONFIG, **options)


def test_rows_and_summary_round_trip(tmp_path):
    with run_log(tmp_path, engine="fsdp", precision="bf16") as log:
        for step in range(1, 5):
            log.tick(step, tokens=50)
            if step % 2 == 0:
                log.trained(step, {"loss": 4.0 / step, "gate": None}, tokens=10)
                assert len(read_rows(tmp_path)) == step // 2  # flushed line by line
        log.evaluated(4, "eval/test", {"mrr": 0.75})
    rows = read_rows(tmp_path)
    assert [(r["step"], r["split"], r["tokens"]) for r in rows] == [
        (2, "train", 110),
        (4, "train", 220),
        (4, "eval/test", 220),
    ]
    assert rows[0]["loss"] == 2.0 and "gate" not in rows[0] and rows[2]["mrr"] == 0.75
    assert rows[1]["tokens_per_second"] > 0 and rows[1]["seconds"] >= rows[0]["seconds"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["name"], summary["steps"], summary["tokens"]) == ("demo", 4, 220)
    assert summary["tokens_per_second"] > 0
    assert summary["final"]["eval/test"] == {"mrr": 0.75} and summary["final"]["train"]["loss"] == 1.0
    assert summary["best"]["train"]["loss"] == {"value": 1.0, "step": 4}
    environment = summary["environment"]
    assert (environment["engine"], environment["precision"], environment["launcher"]) == (
        "fsdp",
        "bf16",
        "python",
    )
    assert environment["torch"] == torch.__version__ and environment["world_size"] == 1 and environment["cpu"]
    assert (tmp_path / "config.yaml").read_text() == CONFIG


def test_every_line_is_valid_json_whatever_the_values(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    with run_log(tmp_path) as log:
        log.trained(1, {"loss": math.nan, "grad_norm": -math.inf, "lr": 1e-3})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=refuse)
    assert row["loss"] is None and row["grad_norm"] is None and row["lr"] == 1e-3
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert summary["final"]["train"]["loss"] is None and "loss" not in summary["best"].get("train", {})


def test_tensors_and_reserved_columns_are_refused(tmp_path):
    with run_log(tmp_path) as log:
        with pytest.raises(AssertionError, match="Python number"):
            log.trained(1, {"loss": torch.tensor(1.0)})
        with pytest.raises(AssertionError, match="reserved"):
            log.evaluated(1, "eval/test", {"tokens": 3})
        with pytest.raises(AssertionError, match="train"):
            log.evaluated(1, "train", {"loss": 3.0})
    assert read_rows(tmp_path) == []


def test_a_run_that_goes_on_has_no_summary_of_its_earlier_end(tmp_path):
    with run_log(tmp_path) as log:
        log.trained(4, {"loss": 2.0})
    with run_log(tmp_path, start_step=4) as log:
        log.trained(6, {"loss": 1.0})
        assert load_run(tmp_path).summary["steps"] == 6, "as if it were killed here"


def test_resume_drops_later_rows_and_continues_counts(tmp_path, wait):
    with run_log(tmp_path) as log:
        for step in range(1, 7):
            log.tick(step, tokens=100)
            wait(2.0)
            log.trained(step, {"loss": 10.0 - step})
            if step == 4:
                state = log.state()
    assert state["tokens"] == 400
    for options in ({}, {"state": {"tokens": 420, "seconds": 1000.0}}):
        with run_log(tmp_path, start_step=4, **options) as log:
            wait(4.0)
            log.trained(5, {"loss": 20.0}, tokens=100)
        rows = read_rows(tmp_path)
        assert [(r["step"], r["loss"]) for r in rows] == [(1, 9), (2, 8), (3, 7), (4, 6), (5, 20)]
        start = 420 if options else 400
        assert rows[-1]["tokens"] == start + 100
        assert rows[-1]["seconds"] == (1004 if options else 8 + 4)
        assert rows[-1]["tokens_per_second"] == 100 / 4  # of this process
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["steps"] == 5 and summary["best"]["train"]["loss"] == {"value": 6.0, "step": 4}


def test_starting_again_without_a_checkpoint_starts_empty(tmp_path):
    with run_log(tmp_path) as log:
        log.trained(3, {"loss": 1.0}, tokens=5)
    with run_log(tmp_path, start_step=0) as log:
        log.trained(1, {"loss": 2.0}, tokens=5)
    assert [(r["step"], r["tokens"]) for r in read_rows(tmp_path)] == [(1, 5)]


def test_flops_add_up_and_are_set_against_the_peak_of_all_ranks(tmp_path, wait):
    with run_log(tmp_path, total=4, world_size=2, peak=1e6, budget=4000.0) as log:
        for step in (1, 2):
            with log.paused():
                wait(0.1)
            wait(0.05)
            log.trained(step, {"loss": 1.0}, tokens=10, flops=1000)
        log.evaluated(2, "eval/test", {"mrr": 1.0})
        state = log.state()
        assert state["flops"] == 2000
        log.trained(3, {"loss": 1.0}, tokens=10, flops=1000)
    rows = read_rows(tmp_path)
    assert [row["flops"] for row in rows] == [1000, 2000, 2000, 3000]
    assert rows[1]["mfu"] == pytest.approx(1000 / 0.05 / 2 / 1e6, rel=1e-9)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["flops"] == 3000 and "flops" not in summary["final"]["train"]
    assert "flops_budget" not in summary  # it was interrupted: no wonder
    with run_log(tmp_path, total=4, start_step=2, state=state, budget=4000.0) as log:
        log.trained(4, {"loss": 1.0}, tokens=10, flops=1900)
    assert [row["flops"] for row in read_rows(tmp_path)] == [1000, 2000, 2000, 3900]
    assert "mfu" not in read_rows(tmp_path)[-1]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["flops"], summary["flops_budget"]) == (3900, 4000.0)
    assert summary["flops_error"] == pytest.approx(-0.025)
    with run_log(tmp_path, total=4, start_step=4, budget=3850.0) as log:  # without a state: from the rows
        assert log.flops == 3900
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["flops_budget"] == 3850.0 and "flops_error" not in summary


def test_what_was_not_counted_is_in_no_row(tmp_path):
    with run_log(tmp_path, peak=1e6) as log:
        log.trained(1, {"loss": 1.0}, tokens=10)
    assert not {"flops", "mfu"} & read_rows(tmp_path)[0].keys()
    assert "flops" not in json.loads((tmp_path / "summary.json").read_text())


def test_other_ranks_write_nothing_and_count_the_same(tmp_path):
    with run_log(tmp_path, rank=1, world_size=2) as log:
        log.tick(1, tokens=5)
        log.trained(1, {"loss": 1.0}, tokens=5)
        log.evaluated(1, "eval/test", {"mrr": 1.0})
        with log.paused():
            pass
        assert log.state()["tokens"] == 10
        assert log.close() == {}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]  # made by prepare_run_dir


def test_an_exception_still_leaves_a_summary(tmp_path):
    with pytest.raises(RuntimeError, match="boom"), run_log(tmp_path) as log:
        log.trained(2, {"loss": 1.0})
        raise RuntimeError("boom")
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 2


def test_speed_excludes_what_is_paused(tmp_path, wait):
    with run_log(tmp_path) as log:
        wait(0.02)
        with log.paused():
            wait(0.3)
        log.trained(1, {"loss": 1.0}, tokens=1000)
    (row,) = read_rows(tmp_path)
    assert row["seconds"] == pytest.approx(0.02, rel=1e-9)
    assert row["tokens_per_second"] == pytest.approx(1000 / 0.02, rel=1e-9)


def test_stopwatch_pauses_nest_and_restart_only_if_running(wait):
    watch = Stopwatch(5.0)
    with watch.paused():
        wait(1)
    assert watch.seconds == 5.0  # never started
    watch.start()
    with watch.paused(), watch.paused():
        wait(2)
        assert watch.seconds == 5.0
    wait(3)
    assert watch.seconds == 8.0
    with pytest.raises(ValueError), watch.paused():
        wait(4)
        raise ValueError
    wait(5)
    assert watch.seconds == 13.0


@contextmanager
def file_limit(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rows_wait_while_there_is_no_room(tmp_path, caplog):
    with run_log(tmp_path) as log:
        log.trained(1, {"loss": 1.0})
        before = (tmp_path / "metrics.jsonl").stat().st_size
        with file_limit(before + 10):  # in the middle of a row
            log.trained(2, {"loss": 2.0})
            log.trained(3, {"loss": 3.0})
            assert (tmp_path / "metrics.jsonl").stat().st_size == before + 10
            assert [r["step"] for r in read_rows(tmp_path)] == [1]
        log.trained(4, {"loss": 4.0})
        assert [(r["step"], r["loss"]) for r in read_rows(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    (message,) = caplog.messages
    assert "its rows wait in memory" in message and str(tmp_path / "metrics.jsonl") in message


def test_rows_that_never_found_room_are_an_error(tmp_path):
    log = run_log(tmp_path).__enter__()
    log.trained(1, {"loss": 1.0})
    with file_limit(10), pytest.raises(OSError, match="metrics.jsonl"):
        log.trained(2, {"loss": 1.0})
        log.close()


def test_a_summary_without_room_is_a_warning(tmp_path, caplog):
    """A run that has saved its last checkpoint has not failed."""
    with run_log(tmp_path) as log:
        log.trained(1, {"loss": 1.0})
        (tmp_path / "summary.json.partial").mkdir()
    assert "summary.json: not written: Is a directory" in caplog.messages[-1]


def test_a_line_of_an_evaluation_has_few_metrics(tmp_path, caplog):
    """Those that can improve come first; all are in the row."""
    caplog.set_level("INFO", "jepa_scale")
    values = {"chance": 0.1, "gate": 1.0, "ppl": 9.0, "loss": 2.0, "mrr": 0.5, "exact_match": 0.25, "generated": None}
    prepare_run_dir(tmp_path, resume=True)
    with RunLog(tmp_path, LogConfig(), ranks(), "demo", 10, CONFIG) as log:
        log.evaluated(4, "eval/test", values)
        log.evaluated(4, "eval/few", {"gate": 1.0})
    assert caplog.messages == [
        "demo  step 4  eval/test loss 2.000  ppl 9.000  exact_match 0.2500  mrr 0.5000  and 2 more",
        "demo  step 4  eval/few gate 1.000",
    ]
    assert len(read_rows(tmp_path)[0]) == 3 + 6
