"""The command line: bad input is one clear line and exit code 2; a run leaves what it promises; resume goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jepa_scale import train
from jepa_scale.checkpoint import complete
from jepa_scale.cli import main as cli
from jepa_scale.data.reversal.facts import generate
from jepa_scale.data.reversal.files import write
from jepa_scale.engines import loss_scale, precision
from jepa_scale.utils import devices
from tests.data.corpus import write_text
from tests.distributed.processes import ProcessPool, shared_process_pool

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def config(tmp_path):
    values = {
        "run": {"dir": str(tmp_path / "runs"), "name": "small"},
        "engine": {"threads": 1},
        "model": {"family": "native", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        "data": {"source": "reversal", "entities_a": 50, "comb": 5, "relations": 2},
        "objective": {"name": "concept", "bridge_width": 16},
        "optim": {"warmup_steps": 2},
        "train": {"steps": 4, "batch_size": 16, "log_every": 2},
        "eval": {"max_facts": 8, "rank_facts": 4},
        "log": {"progress": False},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def process_pool() -> ProcessPool:
    return shared_process_pool()


def run(config, *arguments):
    return train.main(["--config", str(config), *arguments])


def test_a_run_leaves_what_it_promises(config, tmp_path, capsys):
    assert run(config) == 0
    folder = tmp_path / "runs" / "small"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["name"] == "small" and summary["steps"] == 4
    assert summary["tokens"] > 0 and summary["tokens_per_second"] > 0
    for split in ("train", "atomic", "test"):
        assert {"exact_match", "mrr", "joint_nll"} <= summary["final"][f"eval/{split}"].keys()
    assert {"loss", "jepa_loss", "lm_loss", "grad_norm"} <= summary["final"]["train"].keys()
    assert summary["environment"]
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["objective"]["predictor"] == "rotation"  # defaults, written out
    assert resolved["data"]["seed"] == 0 and resolved["model"]["rope_theta"] == 10_000
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines if row["split"] == "train"] == [2, 4]
    assert all({"step", "split", "tokens"} <= row.keys() for row in lines)
    assert (folder / "checkpoints" / "step_00000004" / "manifest.json").is_file()
    assert "<html" in (folder / "report.html").read_text()
    assert len(list((folder / "plots").glob("*.png"))) > 3
    said = capsys.readouterr()
    assert "report.html" in said.out
    shown = [line.split("INFO ")[1] for line in said.err.splitlines() if "INFO " in line]
    words = ("model  ", "objective  ", "data  ", "engine  ", "steps  ", "writes to  ")
    assert [line.partition("  ")[0] + "  " for line in shown[-len(words) :]] == list(words)


@pytest.mark.parametrize("there", [True, False])
def test_auto_precision_is_written_as_what_it_came_to(config, tmp_path, monkeypatch, there):
    monkeypatch.setattr(precision, "has_bf16", lambda device: there)
    assert run(config, "engine.precision=auto", "train.steps=1", "log.report=false") == 0
    resolved = yaml.safe_load((tmp_path / "runs" / "small" / "config.yaml").read_text())
    summary = json.loads((tmp_path / "runs" / "small" / "summary.json").read_text())
    assert resolved["engine"]["precision"] == summary["environment"]["precision"] == ("bf16" if there else "fp32")


def test_fp16_goes_on_bitwise_with_its_scale(config, tmp_path, monkeypatch):
    """The scale grows after every second step, so a checkpoint after the third is in the middle of that."""
    monkeypatch.setenv(devices.FP16_ON_CPU, "1")
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 2)
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**6)
    fp16 = ("engine.precision=fp16", "log.report=false", "train.log_every=1", "optim.schedule=constant")
    assert run(config, *fp16, "run.name=whole", "train.steps=5") == 0
    assert run(config, *fp16, "train.steps=3") == 0
    assert run(config, *fp16, "train.steps=5", "--resume", "auto") == 0
    rows = {
        name: [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "small")
    }
    whole, resumed = (
        [(row["loss"], row["grad_norm"], row["loss_scale"]) for row in of_run if row["split"] == "train"]
        for of_run in rows.values()
    )
    assert whole == resumed
    assert [scale for _, _, scale in whole] == [2.0**6, 2.0**7, 2.0**7, 2.0**8, 2.0**8]


def test_fp16_is_refused_where_nothing_computes_it(config, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(devices.FP16_ON_CPU, raising=False)
    monkeypatch.setattr(devices, "GPU_FILES", ())
    monkeypatch.setattr(devices, "CPU_FILE", tmp_path / "cpuinfo")
    for flags, code in (("flags : avx512f avx512_bf16", 2), ("flags : amx_fp16", 0)):
        (tmp_path / "cpuinfo").write_text(flags)
        assert cli.main(["config", str(config), "engine.precision=fp16"]) == code
    assert "engine.precision: fp16 needs a GPU" in (error := capsys.readouterr().err) and "bf16" in error
    monkeypatch.setattr(precision, "has_fp16", lambda device: False)
    assert run(config, "engine.precision=fp16") == 2
    assert "engine.precision: fp16 needs a GPU" in capsys.readouterr().err


def test_the_resolved_config_trains_the_same_run(config, tmp_path):
    assert run(config, "log.report=false") == 0
    resolved = tmp_path / "runs" / "small" / "config.yaml"
    assert run(resolved, "run.name=again") == 0
    rows = [(tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()[-1] for name in ("small", "again")]
    assert rows[0] == rows[1]


def damaged_files(folder):
    write(generate(50, 5, 2), folder)
    lines = (folder / "train.json").read_text().splitlines(keepends=True)
    lines[6] = lines[6][:20] + "\n"
    (folder / "train.json").write_text("".join(lines))
    return folder


def no_such_stage(folder):
    path = folder / "zero7.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 7}}))
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.weight_dekay=1"], "optim.weight_dekay: unknown key; did you mean 'weight_decay'?"),
        (["train.steps=lots"], "train.steps:"),
        (["objective.predictr=mlp"], "objective.predictr: unknown key; did you mean 'predictor'?"),
        (["objective.name=concpt"], "objective.name: unknown objective 'concpt'"),
        (["objective.tap_layer=5"], "objective.tap_layer: 5 is outside the decoder's 2 blocks"),
        (["data.comb=7"], "data.comb: 7 does not divide"),
        (["data.entities_a=51"], "data.entities_a:"),
        (["data.sauce=x"], "data.sauce: unknown key; did you mean 'source'?"),
        (["model.vocab_size=5"], "model.vocab_size: 5 is smaller than the data's"),
        (["model.hidden_sise=8"], "model.hidden_sise: unknown key; did you mean 'hidden_size'?"),
        (["train.batch_size=15", "train.accumulation=2"], "train.batch_size: 15"),
        (["eval.max_fact=1"], "eval.max_fact: unknown key; did you mean 'max_facts'?"),
        (["model=nowhere.yaml"], "model: no file 'nowhere.yaml'"),
        (["engine.name=deepspeed", "engine.deepspeed=configs/ds/zero9.json"], "engine.deepspeed: no file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(config, tmp_path, capfd, arguments, message):
    assert run(config, *arguments) == 2
    error = capfd.readouterr().err
    assert error.startswith("jepa-scale: ") and message in error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "runs" / "small" / "metrics.jsonl").exists()


def test_missing_config_file(tmp_path, capfd):
    assert run(tmp_path / "absent.yaml") == 2
    assert "--config: no file" in capfd.readouterr().err


def test_a_damaged_line_is_named_with_its_file(config, tmp_path, capfd):
    folder = damaged_files(tmp_path / "facts")
    values = yaml.safe_load(config.read_text())
    values["data"] = {"source": "reversal", "path": str(folder)}
    config.write_text(yaml.safe_dump(values))
    assert run(config) == 2
    error = capfd.readouterr().err
    assert "train.json" in error and "line" in error and error.count("\n") == 1


def test_a_zero_stage_that_does_not_exist(config, tmp_path, capfd):
    path = no_such_stage(tmp_path)
    assert run(config, "engine.name=deepspeed", f"engine.deepspeed={path}") == 2
    error = capfd.readouterr().err
    assert "zero7.json" in error and "stage" in error


def test_a_run_directory_in_use_is_left_alone(config, tmp_path, capfd):
    assert run(config, "log.report=false") == 0
    folder = tmp_path / "runs" / "small"
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}
    assert run(config, "run.seed=1") == 2
    error = capfd.readouterr().err
    assert "small" in error and "--resume auto" in error
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))} == before


def test_resume_auto_goes_on_to_more_steps_and_starts_where_there_is_nothing(config, tmp_path):
    assert run(config, "--resume", "auto", "log.report=false") == 0
    assert run(config, "--resume", "auto", "train.steps=6", "log.report=false") == 0
    folder = tmp_path / "runs" / "small"
    rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["split"] == "train"] == [2, 4, 6]
    before = json.loads((folder / "summary.json").read_text())["final"]
    assert run(config, "--resume", "auto", "train.steps=6", "log.report=false") == 0  # nothing is left to do
    assert json.loads((folder / "summary.json").read_text())["final"] == before


def test_resume_from_a_path_that_is_not_there(config, tmp_path, capfd):
    assert run(config, "--resume", str(tmp_path / "nowhere")) == 2
    assert "nowhere" in capfd.readouterr().err


def test_options_may_stand_between_overrides(config, tmp_path):
    assert run(config, "train.steps=2", "--resume", "auto", "log.report=false") == 0
    assert json.loads((tmp_path / "runs/small/summary.json").read_text())["steps"] == 2


def test_a_checkpoint_has_the_metrics_of_its_own_step(config, tmp_path):
    """Those of an earlier one would make `keep_best` keep the wrong weights."""
    saves = ["checkpoint.every=2", "checkpoint.keep_last=9", "train.steps=10", "train.eval_every=4"]
    assert run(config, *saves, "log.report=false") == 0
    lines = [json.loads(x) for x in (tmp_path / "runs/small/metrics.jsonl").read_text().splitlines()]
    nll = {row["step"]: row["joint_nll"] for row in lines if row["split"] == "eval/test"}
    found = complete(tmp_path / "runs" / "small" / "checkpoints")
    assert {f.step: f.manifest.metrics.get("eval/test/joint_nll") for f in found} == {2: None, 6: None, **nll}
    assert set(nll) == {4, 8, 10}


def test_a_loss_that_is_not_finite_stops_the_run(config, capfd):
    assert run(config, "optim.lr=1e30", "optim.warmup_steps=0", "train.log_every=1", "train.steps=20") == 1
    assert "lower optim.lr" in capfd.readouterr().err


def test_eval_config_report_and_data_commands(config, tmp_path, capsys):
    assert run(config, "log.report=false") == 0
    runs = tmp_path / "runs" / "small"
    assert cli.main(["eval", str(runs), "eval.max_facts=4"]) == 0
    assert "exact_match" in capsys.readouterr().out
    assert cli.main(["config", str(config), "optim.lr=0.5"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["optim"]["lr"] == 0.5
    assert cli.main(["report", str(runs)]) == 0
    assert "small" in capsys.readouterr().out
    facts = tmp_path / "facts"
    assert cli.main(["data", "reversal", "--out", str(facts), "--entities-a", "50", "--comb", "5"]) == 0
    assert (facts / "train.json").is_file()
    assert cli.main(["data", "reversal", "--out", str(facts), "--entities-a", "50", "--comb", "5"]) == 2
    assert cli.main(["report", str(tmp_path)]) == 2
    assert cli.main(["eval", str(tmp_path)]) == 2


def test_files_train_as_the_generated_facts_do(config, tmp_path):
    """The reader of GPT2WithJEPA's format and the generator are the same data."""
    write(generate(50, 5, 2), tmp_path / "facts")
    values = yaml.safe_load(config.read_text())
    values["data"] = {"source": "reversal", "path": str(tmp_path / "facts")}
    config.write_text(yaml.safe_dump(values))
    assert run(config, "log.report=false", "train.steps=2") == 0
    assert json.loads((tmp_path / "runs/small/summary.json").read_text())["final"]["train"]["loss"] > 0


@pytest.mark.parametrize(
    "command",
    [
        ["jepa_scale/train.py"],
        pytest.param(["-m", "jepa_scale.train"], marks=pytest.mark.matrix),
        pytest.param(["-m", "jepa_scale", "train"], marks=pytest.mark.matrix),
    ],
    ids=["file", "module", "cli"],
)
def test_as_a_process_of_its_own(config, tmp_path, command):
    """`python jepa_scale/train.py` puts the package's own folder on sys.path, where it must not shadow anything."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, *command, "--config", str(config), "log.report=false", "train.steps=2"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs/small/summary.json").read_text())["steps"] == 2


def launch(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run([*command], cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_a_used_run_directory_is_refused_by_every_rank(process_pool, config, tmp_path):
    arguments = ["--config", str(config), "log.report=false", "train.steps=2"]
    process_pool.run(arguments, 2)
    refused = process_pool.start(arguments, 2)
    assert refused.wait() == [2, 2], refused.output()
    assert refused.output().count("already holds a run") == 1


def test_eval_takes_the_engine_that_wrote_the_checkpoint(process_pool, config, tmp_path):
    """Trained by DeepSpeed, evaluated from a shell, where `auto` would mean FSDP2."""
    process_pool.run(["--config", str(config), "engine.name=deepspeed", "log.report=false", "train.steps=2"])
    runs = tmp_path / "runs" / "small"
    resolved = yaml.safe_load((runs / "config.yaml").read_text())
    resolved["engine"]["name"] = "auto"
    (runs / "config.yaml").write_text(yaml.safe_dump(resolved))
    done = process_pool.run(["eval", str(runs)], program="jepa_scale.cli.main")
    row = json.loads((runs / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"test     exact_match {row['exact_match']:.4f}  mrr {row['mrr']:.4f}" in done.output()


HORIZON = {"name": "horizon", "tap_layer": 1, "horizons": [1, 2], "horizon_probs": [2, 1], "teacher": "backbone"}


@pytest.mark.matrix
def test_compiled_blocks_give_the_same_losses(config, tmp_path):
    """In training and in an evaluation, whose batches have other sizes."""
    values = yaml.safe_load(config.read_text())
    values["model"]["num_hidden_layers"] = 1
    config.write_text(yaml.safe_dump({**values, "objective": {"name": "lm"}}))
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        assert run(config, f"run.name={name}", f"engine.compile={compiled}", "train.steps=4", "log.report=false") == 0
    plain, compiled = (
        [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "compiled")
    )
    assert len(plain) == len(compiled) > 4
    for a, b in zip(plain, compiled, strict=True):
        for key in {"loss", "grad_norm", "joint_nll"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["fsdp", "zero0", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("objective", ["lm", "two_view", "concept", "horizon"])
def test_bf16_on_a_gpu(config, tmp_path, engine, objective):
    """Whatever varlen backend is best there, each engine trains in bf16 and ends near the CPU's fp32 loss."""
    arguments = ["--config", str(config), "log.report=false", "train.steps=20", "engine.precision=bf16"]
    if objective != "concept":
        values = yaml.safe_load(config.read_text())
        options = HORIZON if objective == "horizon" else {"name": objective}
        config.write_text(yaml.safe_dump({**values, "objective": options}))
    if engine == "fsdp":
        arguments.append("engine.name=fsdp")
    else:
        arguments += ["engine.name=deepspeed", f"engine.deepspeed=configs/ds/{engine}.json"]
    done = launch(sys.executable, "jepa_scale/train.py", *arguments)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs/small/summary.json").read_text())
    assert summary["environment"]["device"] != "cpu"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"}
    alone = [sys.executable, "jepa_scale/train.py", "--config", str(config), "run.name=cpu", "train.steps=20"]
    subprocess.run([*alone, "log.report=false"], cwd=REPOSITORY, env=environment, check=True, capture_output=True)
    reference = json.loads((tmp_path / "runs/cpu/summary.json").read_text())
    got, expected = (s["final"]["train"]["loss"] for s in (summary, reference))
    assert abs(got - expected) < 0.1 * abs(expected)


@pytest.fixture
def text_config(tmp_path):
    write_text(tmp_path / "text", [40], valid=2)
    values = {
        "run": {"name": "run", "dir": str(tmp_path)},
        "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "data": {"source": "text", "path": str(tmp_path / "text"), "max_length": 24},
        "objective": {"name": "span", "predictor_layers": 1},
        "train": {"steps": 1, "batch_size": 8},
        "log": {"progress": False, "report": False},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    return config


def test_samples_longer_than_the_model_is_made_for_are_refused_at_the_start(text_config, capfd):
    arguments = ["objective={name: lm}", "model.max_position_embeddings=23"]
    assert run(text_config, *arguments) == 2
    error = capfd.readouterr().err
    assert "data.max_length: a sample has 24 tokens to predict from, and the model is made for 23" in error
    assert run(text_config, *arguments[:1], "model.max_position_embeddings=24") == 0


def test_a_batch_too_small_for_the_objective_is_refused_by_name(text_config, capfd):
    assert run(text_config) == 2
    assert "train.batch_size: about 8 samples in a step; objective 'span'" in capfd.readouterr().err
    assert run(text_config, "train.batch_size=0", "train.batch_tokens=400", "train.micro_tokens=400") == 2
    assert "train.batch_tokens: about" in capfd.readouterr().err


def test_a_save_that_was_killed_before_its_name_is_resumed_from(config, tmp_path):
    """Its manifest is written: the older checkpoint would be another line of training, of which it is the future."""
    assert run(config, "checkpoint.every=2", "log.report=false") == 0
    checkpoints = tmp_path / "runs/small/checkpoints"
    (checkpoints / "step_00000004").rename(checkpoints / "step_00000004.partial")
    assert run(config, "train.steps=6", "train.log_every=1", "--resume", "auto", "log.report=false") == 0
    lines = [json.loads(x) for x in (tmp_path / "runs/small/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines if row["split"] == "train"] == [2, 4, 5, 6]
    assert sorted(path.name for path in checkpoints.glob("step_*")) == ["step_00000004", "step_00000006"]
