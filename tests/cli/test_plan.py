"""``jepa-scale plan``."""

import json

import pytest

from jepa_scale.cli.main import main

ARGUMENTS = ["plan", "--config", "configs/tiny_corpus.yaml", "--world-size", "1", "--gpu", "a100"]


def test_prints_and_writes(capsys, tmp_path):
    file = tmp_path / "plan.json"
    assert main([*ARGUMENTS, "--json", str(file), "--set", "engine.precision=bf16"]) == 0
    text = capsys.readouterr().out
    for part in ("FSDP2 bf16 on 1 ranks", "activations", "fits into", "largest micro-batch that fits", "MFU", "a day"):
        assert part in text
    plan = json.loads(file.read_text())
    assert sum(plan["memory"]["at_peak"].values()) == plan["memory"]["peak"]
    assert plan["fits"] and plan["time"]["seconds"] > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gpu", "h300"], "--gpu: unknown GPU 'h300'"),
        (["--efficiency", "2"], "--efficiency 2.0: must be above 0 and at most 1"),
        (["--tokens", "0"], "--tokens 0.0: must be at least 1"),
        (["--set", "engine.precison=bf16"], "engine.precison: unknown key; did you mean 'precision'?"),
        (["--json", "/no/such/folder/plan.json"], "--json /no/such/folder/plan.json: cannot be written"),
        (["--tp", "3"], "--world-size 1: is no multiple of tp × replicas = 3 × 1"),
    ],
)
def test_bad_input_is_one_line(more, message, capsys):
    assert main([*ARGUMENTS, "--no-search", *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"jepa-scale: {message}")
