"""Every command in the README and in docs/ is run, small; where it cannot be run here, what it names is checked.

A command that belongs to no class fails the test.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jepa_scale.bench.task import built_in
from jepa_scale.cli import bench
from jepa_scale.cli.main import main, parsed
from jepa_scale.config.foreign import JEPA_LLM, LIT_JEPA
from jepa_scale.config.loading import load_config
from jepa_scale.experiment import validate
from tests.config.test_foreign import FULL as FOREIGN_CONFIGS
from tests.distributed.processes import HANG
from tests.docs.commands import PAGES, REPOSITORY, VARIABLE, Command, alternatives, commands_of

COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))

FOREIGN = {
    r"finetune\.py|evaluate\.py": "LLM-JEPA's own",
    r"python -m src\.train|(python )?scripts/train_jepa\.py|test_training_local\.py|(train|test)_jepa_osc\.sh": "of the system that the page comes from",
}
NOT_RUN = {
    r"^scripts/(quickstart|test)\.sh": "installs, and runs everything: the scripts themselves are tested by CI",
    r"^scripts/install_integration\.sh": "installs packages of the system",
    r"^(source \.venv/bin/activate|cd jepa_scale)$": "the shell's",
    r"^git clone ": "needs the network",
    r"^kubectl ": "needs a cluster; the file is checked by tests/test_k8s.py",
    r"^python benchmarks/": "takes minutes to hours",
    r"^python scripts/gallery/": "run by tests/test_gallery.py",
    r"^jepa-scale bench (?!--list)": "takes minutes to hours; run, small, by tests/bench/test_bench.py",
}
"""Their files must be there, and what Python runs must have the flags that are shown."""
BIG = {
    "reversal_full": "80,000 people",
    "reversal_full_no_memory": "80,000 people",
    "reversal_two_view_full": "80,000 people",
    "jepa_8b": "8 billion parameters",
    "jepa_8b_fsdp_tp": "8 billion parameters",
    "jepa_1b": "1.2 billion parameters",
    "finetune_example": "needs the weights of a pretrained model",
    "grid_production": "needs a file of frames",
    "span_base": "needs a folder of token arrays",
    "wikitext2": "a decoder for GPUs",
    "tiny_shakespeare": "needs a download",
}
"""Configs that are validated with the command's overrides, and not trained."""
SMALL = ["train.steps=2", "train.epochs=0", "train.flops=0", "train.same_flops_as=null", "train.eval_every=0"]
SMALL += [
    "train.log_every=1",
    "log.report=false",
    "log.progress=false",
    "data.workers=0",
    "engine.threads=1",
    "train.abort=[]",
]
SMALL_DATA = {"reversal": ["eval.max_facts=4", "eval.rank_facts=4", "train.batch_size=16"]}
LAUNCHED = {
    "scripts/launch_torchrun.sh": "several nodes; run by tests/integration",
    "scripts/launch_deepspeed.sh": "hosts with ssh; run by tests/integration",
    "scripts/launch_slurm.sbatch": "SLURM; run by tests/integration",
    "scripts/quick_test.sh": "run by tests/integration/test_quick_test.py",
}
PLACEHOLDERS = {
    "C": "configs/tiny_corpus.yaml",
    "CONFIG": "configs/tiny_corpus.yaml",
    "…": "configs/tiny_corpus.yaml",
    "configs/x.yaml": "configs/tiny_corpus.yaml",
    "RUN": "runs/tiny_corpus",
    "runs/x": "runs/tiny_corpus",
    "runs/y": "runs/tiny_corpus_lm",
    "DIR": "exported/",
    "OUT": "runs/again2",
}
RUNS = ("tiny_corpus", "tiny_corpus_lm", "reversal", "reversal_lm", "span_tiny", "nl_rx_synth")
"""Runs that commands speak of; each is trained for two steps by its own config."""


def reason(command: Command, table: dict[str, str]) -> str | None:
    bare = command.text
    while VARIABLE.match(bare):
        bare = VARIABLE.sub("", bare)
    return next((why for pattern, why in table.items() if re.search(pattern, bare)), None)


def resolved(words: list[str]) -> list[str]:
    before = ["", *words]
    return [
        "full" if last == "--activation-checkpointing" else PLACEHOLDERS.get(word, word)
        for last, word in zip(before, words, strict=False)
    ]


def after(words: list[str], program: str) -> list[str] | None:
    return words[words.index(program) + 1 :] if program in words else None


def training(words: list[str]) -> list[str] | None:
    """What the trainer is given, by whatever launcher; None = the command trains nothing."""
    for program in ("jepa_scale/train.py", *LAUNCHED):
        given = after(words, program)
        if given is not None:
            return given[given.index("--config") :] if "--config" in given else None
    return words[2:] if words[:2] == ["jepa-scale", "train"] else None


def split_training(given: list[str]) -> tuple[str, list[str]]:
    """Config and overrides."""
    rest, overrides, config = list(given), [], ""
    while rest:
        word = rest.pop(0)
        if word == "--config":
            config = rest.pop(0)
        elif word == "--resume":
            rest.pop(0)
        else:
            assert "=" in word, f"{word!r} is neither a flag nor an override"
            overrides.append(word)
    return config, overrides


def expanded() -> list[tuple[Command, list[str]]]:
    """Our commands, one for each alternative, with what stands for something replaced."""
    found = []
    for command in COMMANDS:
        if reason(command, FOREIGN) or reason(command, NOT_RUN):
            continue
        words = [word for word in command.words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
        found += [(command, resolved(choice)) for choice in alternatives(words)]
    return found


def test_every_command_has_a_class():
    assert len(COMMANDS) > 60
    for command, words in expanded():
        train = training(words)
        known = train is not None or words[0] == "jepa-scale" or words[:2] == ["python", "scripts/monitor.py"]
        mentioned = not command.fenced and len(words) == 1 and (REPOSITORY / words[0]).exists()
        bare = not command.fenced and words[0] in ("torchrun", "deepspeed")
        assert known or mentioned or bare, f"{command.page}: no class for {command.text!r}"


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if reason(c, NOT_RUN)], ids=lambda c: f"{c.page}: {c.text}"[:80]
)
def test_what_is_not_run_is_there(command):
    for word in command.words:
        if re.match(r"^(scripts|benchmarks|configs)/", word):
            assert (REPOSITORY / word).exists(), f"{command.page}: {word}"
    script = next((word for word in command.words if word.startswith("benchmarks/") and word.endswith(".py")), None)
    for flag in (word for word in command.words if script and word.startswith("--")):
        shared = [REPOSITORY / script, *(REPOSITORY / "benchmarks").glob("*.py")]
        assert any(f'"{flag}"' in path.read_text() for path in shared), f"{command.page}: {script} has no {flag}"


def test_the_bench_has_the_flags_and_tasks_that_are_shown():
    given = [c.words[c.words.index("bench") + 1 :] for c in COMMANDS if "jepa-scale bench " in c.text]
    assert len(given) > 3
    for words in given:
        args = bench.parser().parse_args(words)
        assert {task for task in args.tasks if task != "my_task.yaml"} <= set(built_in())


@pytest.mark.parametrize(
    ("command", "words"),
    [(c, w) for c, w in expanded() if training(w) is not None],
    ids=lambda value: f"{value.page}: {value.text}"[:80] if isinstance(value, Command) else "",
)
def test_what_trains_is_valid(command, words, monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.syspath_prepend(str(REPOSITORY / "docs/examples"))
    config, overrides = split_training(training(words) or [])
    (tmp_path / "summary.json").write_text('{"flops": 1e12}')
    overrides = [re.sub(r"same_flops_as=.*", f"same_flops_as={tmp_path}", override) for override in overrides]
    validate(load_config(config, overrides))
    before = words[: next((i for i, word in enumerate(words) if word in ("jepa_scale/train.py", *LAUNCHED)), 0)]
    if before[:1] == ["torchrun"]:
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args([*before[1:], "jepa_scale/train.py"])
    elif before[:1] == ["deepspeed"]:
        from deepspeed.launcher.runner import parse_args

        parse_args([*before[1:], "jepa_scale/train.py"])


def prose(words: int, seed: int, line: int = 60) -> str:
    """Made-up sentences; no twelve words come twice."""
    return "\n".join(
        " ".join(f"w{(seed * 7919 + i * i * 31 + i) % 997}" for i in range(j, j + line)) + "."
        for j in range(0, words, line)
    )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the commands name: the repository's folders, and tiny data."""
    folder = tmp_path_factory.mktemp("commands")
    for name in ("configs", "docs", "jepa_scale", "scripts"):
        (folder / name).symlink_to(REPOSITORY / name)
    for place in ("corpus", "my_texts"):
        (folder / place).mkdir()
        for i, name in enumerate(("sea", "farm", "court")):
            (folder / place / f"{name}.txt").write_text(prose(3000, i + 1))
    for program, name in ((JEPA_LLM, "my-run.yaml"), (LIT_JEPA, "litjepa.yaml")):
        (folder / name).write_text(yaml.safe_dump(FOREIGN_CONFIGS[program]))
    (folder / "wikitext2").mkdir()
    for number, split in enumerate(("train", "valid", "test")):
        articles = (f" = Title {i} = \n\n{prose(1200, i + 1)}\n\n" for i in range(4 * number, 4 * number + 4))
        (folder / "wikitext2" / f"{split}.txt").write_text("".join(articles))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"a text of {i} words"}) + "\n" for i in range(5)))
    rows = [
        {"messages": [{"role": "user", "content": f"lines with {i}"}, {"role": "assistant", "content": f"x{i}"}]}
        for i in range(40)
    ]
    (folder / "nl_rx_synth").mkdir()
    for split in ("train", "test"):
        (folder / "nl_rx_synth" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "arc/training").mkdir(parents=True)
    pair = {"input": [[0, 1], [1, 0]], "output": [[1, 0], [0, 1]]}
    for i in range(3):
        task = {"train": [pair, {"input": [[0, i], [i, 2]], "output": [[i, 0], [2, i]]}], "test": [pair]}
        (folder / f"arc/training/{i}.json").write_text(json.dumps(task))
    return folder


def small(config: str) -> list[str]:
    name = Path(config).stem
    return [*SMALL, *(SMALL_DATA["reversal"] if name.startswith("reversal") else [])]


def phase_of(words: list[str]) -> int:
    """Data first, then training, then what looks at runs."""
    if training(words) is not None:
        return 1
    return 0 if words[1] == "data" else 2


def prepared_by_hand(words: list[str]) -> str | None:
    """Why one of our commands is not run, though it is no training."""
    if "--tokenizer" in words:
        return "needs a tokenizer with a chat template"
    if "--mteb" in words:
        return "needs data of the Hugging Face hub; run on local files by tests/evaluation/test_mteb_tasks.py"
    if any(word.startswith("eval.lm_eval=") for word in words):
        return "needs data of the Hugging Face hub; run on local files by tests/evaluation/test_lm_eval_tasks.py"
    if "ADAPTER" in words:
        return "needs an adapter; run by tests/convert/test_from_adapter.py"
    if any("finetune_example" in word or "runs/synth" in word for word in words):
        return "needs a pretrained model"
    if "--help" in words or words[1:] == ["train"] or len(words) < 3 or (words[1] == "data" and len(words) < 4):
        return "a mention"
    return None


def jobs() -> list[list[str]]:
    """Arguments of ``jepa-scale``, in the order in which they can be run; the first are the runs that others speak of."""
    first = [["train", "--config", f"configs/{name}.yaml", *small(name)] for name in RUNS]
    done = {tuple(job) for job in first}
    found: list[tuple[int, list[str]]] = []
    for command, words in expanded():
        given = training(words)
        if given is not None:
            config, overrides = split_training(given)
            if Path(config).stem in BIG or "…" in command.text:
                continue
            overrides = [re.sub(r"^log\.profile=.*", "log.profile=[1,2]", override) for override in overrides]
            job = ["train", "--config", config, *overrides, *small(config)]
            again = "--resume" in given and "step_" not in command.text
            if tuple(["train", "--config", config, *small(config)]) in done and not again:
                if not overrides:
                    continue
                job += [] if any(o.startswith("run.name=") for o in overrides) else [f"run.name=named{len(found)}"]
            job = [*job, *(["--resume", "auto"] if again else [])]
        elif words[0] != "jepa-scale" or prepared_by_hand(words):
            continue
        else:
            job = words[1:]
            if job[0] == "plan":
                job = [*job, "--no-search"]
            if job[:2] == ["data", "sections"]:
                job += ["--per-class", "2"]
            if job[:2] == ["data", "reversal"]:
                job += ["--entities-a", "50", "--comb", "5"]
            if job[0] == "generate" and "--subject" not in job:
                job += ["--max-new-tokens", "3"]
            if job[0] == "eval":
                job = [*[w.replace("=FILE", "=sections.jsonl") for w in job if w != "eval.max_facts=0"]]
                job += ["eval.max_facts=4"] if "reversal" in job[1] else []
        if tuple(job) not in done:
            done.add(tuple(job))
            found.append((phase_of(words), job))
    return [*first, *(job for _, job in sorted(found, key=lambda pair: pair[0]))]


def test_no_two_commands_train_into_one_folder():
    names = []
    for job in jobs():
        if job[0] == "train" and "--resume" not in job:
            named = [word.removeprefix("run.name=") for word in job if word.startswith("run.name=")]
            names.append(named[-1] if named else Path(job[2]).stem)
    assert len(names) > 10
    assert not [name for name in set(names) if names.count(name) > 1]


@pytest.mark.parametrize("job", [j for j in jobs() if j[0] != "train"], ids=lambda job: " ".join(job)[:80])
def test_every_command_has_the_arguments_that_it_needs(job):
    """Said here in a moment, what running them would say after minutes."""
    parsed(job)


@pytest.mark.matrix
def test_commands_run(workplace):
    """All in one process, one rank, two steps a run."""
    todo: list[list[str]] = []
    exported = ""
    for job in jobs():
        if job[0] == "convert" and "--to" in job:  # the pages convert into the same folder in several ways
            job = [*job[: job.index("--out") + 1], f"exported{len(todo)}/", *job[job.index("--out") + 2 :]]
            exported = job[job.index("--out") + 1] if "hf" in job else exported
        if job[0] == "convert" and "--from" in job:
            job = ["convert", exported, *job[2:]]
            job[job.index("--out") + 1] = f"runs/again{len(todo)}"
        if job[:2] in (["data", "prepare"], ["data", "reversal"]) and job in todo:
            continue
        if "--adapter" not in job:
            todo.append(job)
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "docs/examples"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "JEPA_SCALE_DATA": str(workplace), "OMP_NUM_THREADS": "1"}
    environment |= {"JEPA_SCALE_CACHE": str(workplace / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    result = workplace / "results.jsonl"
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tests/docs/run_commands.py"), str(result)],
        cwd=workplace,
        env=environment,
        input=json.dumps(todo),
        text=True,
        capture_output=True,
        timeout=HANG,
    )
    results = [json.loads(line) for line in result.read_text().splitlines()]
    failed = [f"jepa-scale {' '.join(r['argv'])}\n  → {r['code']}: {r['said'][-600:]}" for r in results if r["code"]]
    assert not failed, "\n".join(failed)
    assert len(results) == len(todo), done.stderr[-3000:]
    runs = [str(workplace / "runs/tiny_corpus"), str(workplace / "runs/tiny_corpus_lm")]
    assert main(["watch", *runs, "--once"]) == 0
