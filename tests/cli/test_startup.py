"""Whatever can be said of a config alone is said before anything is imported that takes seconds: in fresh processes, every
command that needs no tensor, and every refusal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jepa_scale.checkpoint.manifest import Manifest
from jepa_scale.config.loading import load_config
from jepa_scale.experiment import OBJECTIVES, objective_class, objective_options, validate
from jepa_scale.utils.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[2]
SLOW = ("torch", "transformers", "deepspeed", "datasets", "matplotlib", "webdataset", "pyarrow", "peft", "tokenizers")
OPTIONAL = (
    "wandb", "mlflow", "trackio", "comet_ml", "tensorboard", "lm_eval", "mteb", "sentence_transformers", "sklearn", "scipy", "pandas",
    "bitsandbytes", "flash_attn", "fsspec", "braceexpand",
)  # fmt: skip
SECTIONS = ("run", "engine", "model", "data", "objective", "optim", "train", "checkpoint", "eval", "log")
EXPERIMENTS = sorted(path.name for path in (REPOSITORY / "configs").glob("*.yaml"))
FACTS, TEXT = "configs/reversal.yaml", "configs/wikitext2.yaml"

# Runs the command lines on its standard input in one process, which has imported nothing else, and tells of each its exit
# code, what it wrote to stderr, and what it tried to import of SLOW. Nobody gets these: a command that goes on without is told of.
SEVERAL = """
import contextlib, importlib.abc, io, json, runpy, sys
slow, cases = json.load(sys.stdin)
tried = []

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in slow:
            tried.append(name)
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
from jepa_scale.cli.main import main

told = []
for arguments in cases:
    tried.clear()
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            if arguments[0].endswith(".py"):
                sys.argv = arguments
                runpy.run_path(arguments[0], run_name="__main__")
                code = 0
            else:
                code = main(arguments)
        except SystemExit as end:
            code = end.code
        except ImportError:
            code = None
    told.append([code or 0, err.getvalue(), list(tried)])
json.dump(told, sys.stdout)
"""


def environment(**more: str) -> dict[str, str]:
    """Without a launcher's variables."""
    ranks = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "CROSS_SIZE", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"}
    return {**{k: v for k, v in os.environ.items() if k not in ranks}, **more}


def several(cases: list[list[str]], slow: tuple[str, ...] = SLOW) -> list[tuple[int, str, list[str]]]:
    """Exit code, stderr, and slow modules that were asked for, of each command line."""
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL], input=json.dumps([slow, cases]), capture_output=True, text=True,
        cwd=REPOSITORY, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [tuple(case) for case in json.loads(done.stdout)]


def alone(arguments: list[str], **more: str) -> tuple[int, str, set[str]]:
    """A process of its own, seen from outside: exit code, what it said on stderr, and the packages that it imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, cwd=REPOSITORY,
        env=environment(**more),
    )  # fmt: skip
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert "jepa_scale.config.schema" in imported
    said = "\n".join(line for line in lines if not line.startswith("import time:"))
    return done.returncode, said, {name.partition(".")[0] for name in imported}


BAD = [
    *((f"{section}.no_such_key=1", f"{section}.no_such_key: unknown key") for section in SECTIONS),
    ("no_such_section.x=1", "no_such_section: unknown key"),
    ("train.stepz=3", "train.stepz: unknown key; did you mean 'steps'?"),
    ("train.steps=many", "train.steps: "),
    ("optim.lr=-1", "optim.lr: "),
    ("engine=fast", "engine: "),
    ("model.hidden_size=wide", "model.hidden_size: "),
    ("objective.name=conzept", "objective.name: unknown objective 'conzept'; did you mean 'concept'?"),
    ("objective.name=null", "objective.name: required key is missing"),
    ("objective.name=no_such_module:Mine", "objective.name: 'no_such_module:Mine' cannot be imported"),
    ("data.source=reversl", "data.source: unknown source 'reversl'; did you mean 'reversal'?"),
    ("data.source=[text]", "data.source: unknown source"),
    ("data.source=null", "data.source: required key is missing"),
    ("eval.max_facts=all", "eval.max_facts: "),
    ("model=configs/models/none.yaml", "model: no file 'configs/models/none.yaml'"),
    ("run.name=[", "override 'run.name=[': '[' is not a YAML value"),
    ("train.steps", "override 'train.steps': must have the form section.key=value"),
    ("train.steps=[", "override 'train.steps=[': '[' is not a YAML value"),
]
"""An override that makes a config bad, and what is said of it."""
COMMANDS = {
    "config": ["config", FACTS],
    "train": ["train", "--config", FACTS],
    "train.py": ["jepa_scale/train.py", "--config", FACTS],
    "plan": ["plan", "--config", FACTS, "--world-size", "2", "--set"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_config_is_refused_before_torch_is_imported(command):
    bad = BAD if command == "config" else BAD[::5]  # who checks is the same for all
    told = several([[*COMMANDS[command], override] for override, _ in bad])
    for (override, expected), (code, said, slow) in zip(bad, told, strict=True):
        assert said.startswith(f"jepa-scale: {expected}") and said.count("\n") == 1, (override, said)
        assert (code, slow) == (2, []), override


def test_a_typo_in_any_shipped_config_is_refused_before_torch_is_imported():
    """In the section with the objective's keys, and in one of the others by turns: a config is read in some hundredths of a
    second, and what each section is checked by is the same in most of them."""
    cases = []
    for number, name in enumerate(EXPERIMENTS):
        for section in {"objective", SECTIONS[number % len(SECTIONS)]}:
            cases.append((f"configs/{name}", f"{section}.no_such_key"))
    told = several([["config", config, f"{key}=1"] for config, key in cases])
    for (config, key), (code, said, slow) in zip(cases, told, strict=True):
        assert said.startswith(f"jepa-scale: {key}: unknown key"), (config, said)
        assert (code, slow) == (2, []), config


def test_the_parts_of_a_mixture_are_checked_too():
    parts = "data.parts=[{source: text, path: here, weight: 2}, {source: chat, path: there, name: b, max_lenth: 3}]"
    ((code, said, slow),) = several([["config", TEXT, "data={source: mixture}", parts]])
    assert said == "jepa-scale: data.parts.1.max_lenth: unknown key; did you mean 'max_length'?\n"
    assert (code, slow) == (2, [])


def run_folder(folder: Path) -> Path:
    """What a run leaves behind, as far as those look at it who read no tensor."""
    (folder / "config.yaml").write_text((REPOSITORY / FACTS).read_text())
    row = {"step": 4, "split": "train", "tokens": 10, "loss": 1.5, "seconds": 2.0, "tokens_per_second": 5.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    for step in (2, 4):
        place = folder / "checkpoints" / f"step_{step:08d}"
        place.mkdir(parents=True)
        Manifest(step, "fsdp", "FSDP2 fp32", 1, step).write(place)
    return folder


def test_what_needs_no_tensor_goes_without_torch(tmp_path):
    run = str(run_folder(tmp_path))
    good = [
        ["config", FACTS],
        ["config", TEXT, "train.steps=3"],
        ["config", "--list"],
        ["config", "--schema"],
        ["config", "--reference"],
        ["checkpoint", "ls", run],
        ["checkpoint", "verify", run],
        ["checkpoint", "prune", run],
        ["watch", run, "--once", "--stall", "1e9"],
        ["--help"],
        ["train", "--help"],
        *([command, "--help"] for command in ("data", "checkpoint", "convert", "encode", "generate", "plan", "watch")),
        *(["data", command, "--help"] for command in ("prepare", "verify", "sections", "reversal")),
    ]
    for arguments, (code, said, slow) in zip(good, several(good), strict=True):
        assert (code, said, slow) == (0, "", []), arguments
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000004"]  # prune has done it


def test_a_report_draws_without_torch(tmp_path):
    run = str(run_folder(tmp_path))
    ((code, said, slow),) = several([["report", run]], slow=tuple(name for name in SLOW if name != "matplotlib"))
    assert (code, said, slow) == (0, "", []) and (tmp_path / "report.html").is_file()


def test_wrong_arguments_are_refused_before_torch_is_imported(tmp_path):
    run, nothing = str(run_folder(tmp_path)), str(tmp_path / "checkpoints")
    out = str(tmp_path / "out.npy")
    bad = [
        (["eval", nothing], "not a run directory"),
        (["eval", run, "eval.max_factz=3"], "eval.max_factz: unknown key"),
        (["report", nothing], "not a run directory"),
        (["watch", nothing, "--once"], "not a run directory"),
        (["checkpoint", "ls", str(tmp_path / "none")], "holds no checkpoints"),
        (["encode", nothing, "texts.txt", "--out", out], "not a run directory"),
        (["encode", run, "texts.txt", "--out", "states.pt"], "--out states.pt: must end with .npy"),
        (["generate", nothing, "hello"], "not a run directory"),
        (["generate", run, "hello", "--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
        (["convert", nothing, "--to", "hf", "--out", out], "not a run directory"),
        (["convert", run, "--to", "hf", "--out", out, "--shard-size", "big"], "--shard-size big: "),
        (["convert", run, "--from", "hf", "--out", out, "--config", FACTS, "model.x=1"], "model.x: unknown key"),
        (["plan", "--config", FACTS, "--world-size", "2", "--gpu", "h10"], "--gpu: unknown GPU 'h10'"),
        (["data", "prepare", run, "--out", out, "--max-items", "-1"], "max_items: "),
        (["data", "sections", run, "--out", out, "--min-words", "50", "--max-words", "40"], "max_words: 40"),
        (["train", "--config", "configs/none.yaml"], "--config: no file 'configs/none.yaml'"),
    ]
    for (arguments, expected), (code, said, slow) in zip(bad, several([a for a, _ in bad]), strict=True):
        assert expected in said and said.count("\n") == 1, (arguments, said)
        assert (code, slow) == (2, []), arguments


LAUNCHERS = {
    "torchrun": {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    "deepspeed": {"CROSS_SIZE": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_refuses_before_torch_is_imported(launcher, rank):
    """As each launcher starts a rank, and seen from outside. The first one speaks, for all have found the same."""
    flag = ["--local_rank=0"] if launcher == "deepspeed" else []
    arguments = ["jepa_scale/train.py", *flag, "--config", FACTS, "train.stepz=3"]
    code, said, imported = alone(arguments, RANK=str(rank), **LAUNCHERS[launcher])
    assert said == ("" if rank else "jepa-scale: train.stepz: unknown key; did you mean 'steps'?")
    assert code == 2 and not imported & set(SLOW)


def test_a_best_checkpoint_that_there_cannot_be_is_refused():
    override = "checkpoint.keep_best=eval/test/mrr"
    for code, said, slow in several([["config", FACTS, override], ["train", "--config", FACTS, override]]):
        assert said.startswith("jepa-scale: checkpoint.keep_best: eval/test/mrr has one checkpoint to choose from")
        assert (code, slow) == (2, [])


def test_a_rank_that_is_left_over_in_a_shell_silences_nothing():
    arguments = ["-m", "jepa_scale", "train", "--config", FACTS]
    code, said, _ = alone([*arguments, "train.stepz=3"], RANK="1")
    assert (code, said) == (2, "jepa-scale: train.stepz: unknown key; did you mean 'steps'?")
    code, said, imported = alone(arguments, RANK="0", WORLD_SIZE="2")
    assert code == 2 and said.startswith("jepa-scale: environment: RANK=0, WORLD_SIZE=2: there are other ranks")
    assert not imported & set(SLOW)


@pytest.mark.parametrize(
    "command", [["jepa_scale", "config"], ["jepa_scale", "train", "--config"], ["jepa_scale.cli", "config"]]
)
def test_a_command_refuses_before_torch_is_imported(command):
    """Seen from outside."""
    code, said, imported = alone(["-m", *command, FACTS, "train.stepz=3"])
    assert (code, said) == (2, "jepa-scale: train.stepz: unknown key; did you mean 'steps'?")
    assert not imported & set(SLOW)


def test_a_good_config_still_needs_torch():
    """What the tests above look at would be seen."""
    ((_, _, slow),) = several([["train", "--config", FACTS, "data.path=nowhere"]])
    assert slow == ["torch"]


def test_a_run_under_fsdp_imports_no_package_that_only_others_use():
    """Beyond what PyTorch and transformers import by themselves, which differs with what is installed."""
    code = """
import json, sys
import torch.distributed.checkpoint, torch.distributed.fsdp, transformers.modeling_utils
before = set(sys.modules)
import jepa_scale.train, jepa_scale.engines.fsdp.engine
json.dump(sorted(set(sys.modules) - before), sys.stdout)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, env=environment()
    )
    assert done.returncode == 0, done.stderr
    added = json.loads(done.stdout)
    assert "jepa_scale.training.run" in added and "pydantic" in added
    unused = {*SLOW, *OPTIONAL} - {"torch", "transformers", "tokenizers"}  # transformers' auto classes import the last
    assert [name for name in added if name.partition(".")[0] in unused] == []
    own = ("jepa_scale.engines.deepspeed", "jepa_scale.report.page", "jepa_scale.convert", "torch.utils.tensorboard")
    assert not [name for name in added if name.startswith(own)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_registry_and_the_class_agree_on_the_options(name):
    assert objective_class(name).Options is objective_options(name)


def test_an_objective_of_ones_own_is_checked_by_its_class(tmp_path, monkeypatch):
    """Its module may import what it likes."""
    (tmp_path / "mine_at_startup.py").write_text(
        "from jepa_scale.objectives.lm import LanguageModeling\nfrom jepa_scale.config.schema import Section\n\n\n"
        "class MyOptions(Section):\n    width: int = 3\n\n\nclass Mine(LanguageModeling):\n    Options = MyOptions\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = load_config(REPOSITORY / FACTS, ["objective={name: mine_at_startup:Mine}"])
    misspelt = config.model_copy(update={"objective": {**config.objective, "widht": 4}})
    with pytest.raises(InputError, match=r"^objective\.widht: unknown key; did you mean 'width'\?$"):
        validate(misspelt)
    experiment = validate(config)
    assert experiment.resolved()["objective"] == {"name": "mine_at_startup:Mine", "width": 3}
    assert experiment.objective.cls.__name__ == "Mine"
