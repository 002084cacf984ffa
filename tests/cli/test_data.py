import os
import subprocess
import sys
from pathlib import Path

import pytest

from jepa_scale.cli import data as data_cli
from jepa_scale.cli.main import main
from jepa_scale.config.parsing import parse_section
from jepa_scale.data.prepare.base import PrepareOptions
from jepa_scale.data.shards.format import Index

ROOT = Path(__file__).resolve().parents[2]


def options(*flags: str) -> PrepareOptions:
    args = data_cli.parser().parse_args(["prepare", "raw", "--out", "out", *flags])
    return parse_section(PrepareOptions, data_cli.chosen_options(args), "")


def test_every_option_is_a_flag() -> None:
    assert options() == PrepareOptions()
    flags = {
        "kind": ("--kind chat", "chat"),
        "tokenizer": ("--tokenizer gpt2", "gpt2"),
        "vocab_size": ("--vocab-size 300", 300),
        "documents": ("--documents heading", "heading"),
        "max_document_tokens": ("--max-document-tokens 99", 99),
        "valid_path": ("--valid-path v.txt", "v.txt"),
        "valid_fraction": ("--valid-fraction 0.1", 0.1),
        "split_seed": ("--split-seed 3", 3),
        "max_items": ("--max-items 5", 5),
        "max_eval_items": ("--max-eval-items 6", 6),
        "columns": (
            "--columns input=question output=a=b --columns text=t",
            {"input": "question", "output": "a=b", "text": "t"},
        ),
        "remove_thinking": ("--remove-thinking", True),
        "plain": ("--plain", True),
        "add_eos": ("--add-eos", True),
        "context_window": ("--context-window 4", 4),
        "target_offset": ("--target-offset 2", 2),
        "config_name": ("--config-name main", "main"),
        "train_split": ("--train-split all", "all"),
        "trust_remote_code": ("--no-trust-remote-code", False),
        "shard_samples": ("--shard-samples 10", 10),
        "on_error": ("--on-error skip", "skip"),
    }
    assert flags.keys() == PrepareOptions.model_fields.keys()
    for name, (flag, value) in flags.items():
        assert getattr(options(*flag.split()), name) == value


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--vocab-size", "3"], "jepa-scale: vocab_size: a trained tokenizer has at least 260 tokens, got 3"),
        (["--columns", "question"], "jepa-scale: --columns question: must look like KEY=NAME"),
        (["--processes", "0"], "jepa-scale: --processes 0: must be at least 1"),
        (["--on-error", "ignore"], "invalid choice: 'ignore'"),
        (["--vocab-size", "many"], "invalid int value: 'many'"),
        (["--vocabsize", "300"], "unrecognized arguments"),
    ],
)
def test_bad_flags_are_named(flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main(["data", "prepare", str(tmp_path), "--out", str(tmp_path / "out"), *flags])
    except SystemExit as left:
        code = left.code
    assert code == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_shows_meaning_and_default(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as left:
        main(["data", "prepare", "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "Vocabulary size of a trained BPE tokenizer, or number of token ids without one (default: 4096)" in " ".join(
        shown.split()
    )
    assert "--remove-thinking, --no-remove-thinking" in shown
    assert "(default: None)" not in shown and "(default: {})" not in shown


def test_a_folder_of_text_end_to_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With the readers and tokenizers of the house; where it does its work as a program, without a terminal."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    for number in range(5):
        (raw / f"{number}.txt").write_text(
            "".join(f"the {n} of {number} is said to be {n * number}. " for n in range(60))
        )
    (raw / "5.txt").write_text("")
    arguments = [str(raw), "--out", str(out), "--shard-samples", "3", "--vocab-size", "300"]
    arguments += ["--cache", str(tmp_path / "cache")]
    assert main(["data", "prepare", *arguments, "--processes", "1"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("jepa-scale: ") and error.count("\n") == 1
    assert "5.txt" in error and "on_error=skip" in error
    arguments += ["--on-error", "skip", "--processes", "2"]
    program = [sys.executable, "scripts/prepare_data.py", *arguments, "-q"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ)
    assert (done.returncode, done.stderr) == (0, "")
    index = Index.read(out)
    assert (index.kind, len(index.splits["train"]), sum(index.skipped.values())) == ("text", 2, 1)
    assert f"{out}: text, vocabulary {index.vocab_size:,}" in done.stdout
    assert "skipped 1 of 6 records:" in done.stdout and "5.txt" in done.stdout
    assert main(["data", "prepare", *arguments]) == 0
    said = capfd.readouterr()
    assert "INFO" in said.err and "nothing to do" in said.err and "nothing to do" not in said.out
    assert main(["data", "verify", str(out)]) == 0
