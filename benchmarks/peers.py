"""Our training step against those of other trainers, on the same model, weights, samples and precision.

    python benchmarks/peers.py --threads 2 --json benchmarks/results/peers.json

Each comparison is two programs or more, fp32, that take turns, in another order each round; the first round does not count.
Ours has a process as ``scripts/launch_torchrun.sh`` starts it, with tcmalloc where it is installed, all
others (and ``ours_system``) one as Python starts it; with ``--one-process`` they share this one, and its ``malloc``, whichever it
was started with. A step is the whole of it as a user gets it: samples made into a batch, forward, backward, clipping, fused
AdamW, and whatever each logs at its default interval. Before anything is timed the loss and the gradient norm of two steps are
compared (``fsdp_loop``, which knows no borders of documents, computes another loss and is left out of that).

* ``chat``: conversations of NL-RX-SYNTH with labels on the answers (``--chat`` = a JSONL file of ``messages``; the
  LLM-JEPA repository has synth_train.jsonl), a Llama of 5 blocks of 256 with a vocabulary of 32,000;
* ``text``: Python's documentation, which every Python carries, in pieces of 256 tokens at most, every token predicted; the
  same Llama with 8,192;
* ``horizon``: the first horizon experiments at their tiny configuration (``configs/tiny_shakespeare.yaml``: 6 blocks of 256,
  vocabulary 1,024, 32 rows of 512), on Python's documentation, or on ``--horizon-data``.

The others: ``trainer_padded``, ``trainer_padded_512`` and ``trainer_packed``, transformers' ``Trainer`` with rows padded to the
longest of the batch, padded to 512, and with ``DataCollatorWithFlattening``; ``plain``, a loop with padded rows and a dense mask;
``fsdp_loop``, FSDP2 on full rows without borders; ``lit_jepa`` and ``lit_jepa_eager``, padded rows of the horizon objective with
fused and with spelled-out attention. ``ours_bf16`` is ours under ``engine.precision=bf16``, which is other work (its loss is held to
1 % of that in fp32) and what a user may choose; it is left out where the CPU has no instructions for it. Each new number of tokens
costs it time once, as oneDNN makes kernels for each shape: ``--warm`` shows what comes later. ``ratio/<comparison>/<other>``
is how many times as many real tokens a second ours does, the median over the rounds; ``ratio_bf16/…`` the same of ``ours_bf16``. The
step of LLM-JEPA has a benchmark of its own, ``benchmarks/two_view.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402

from benchmarks.peer_programs.apart import Apart, tcmalloc  # noqa: E402
from benchmarks.peer_programs.lit_jepa import PaddedHorizon  # noqa: E402
from benchmarks.peer_programs.ours import Found, Ours, Program, Samples  # noqa: E402
from benchmarks.peer_programs.plain import FsdpLoop, PlainLoop  # noqa: E402
from benchmarks.peer_programs.trainer import HuggingFaceTrainer  # noqa: E402
from benchmarks.rows import row, write  # noqa: E402
from jepa_scale.config.loading import load_config  # noqa: E402
from jepa_scale.distributed import comm  # noqa: E402
from jepa_scale.engines.precision import has_bf16  # noqa: E402
from jepa_scale.experiment import Experiment, validate  # noqa: E402
from jepa_scale.telemetry import quiet_libraries  # noqa: E402
from jepa_scale.telemetry.environment import describe_environment  # noqa: E402
from jepa_scale.utils import allocator  # noqa: E402
from jepa_scale.utils.format import text_table  # noqa: E402

TOLERANCE = 1e-4
BF16_TOLERANCE = 1e-2
"""Of the loss alone."""
LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 784,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
PAD = 512
SLOW = ("trainer_padded_512",)
"""One step a round: many seconds each."""

Makers = dict[str, Callable[[Samples, Path], Program]]
TRAINERS: Makers = {
    "trainer_packed": lambda samples, scratch: HuggingFaceTrainer(samples, "flatten", scratch),
    "trainer_padded": lambda samples, scratch: HuggingFaceTrainer(samples, 0, scratch),
}
OTHERS: dict[str, Makers] = {
    "chat": {
        **TRAINERS,
        "trainer_padded_512": lambda samples, scratch: HuggingFaceTrainer(samples, PAD, scratch),
        "plain": lambda samples, scratch: PlainLoop(samples),
    },
    "text": {
        **TRAINERS,
        "plain": lambda samples, scratch: PlainLoop(samples),
        "fsdp_loop": lambda samples, scratch: FsdpLoop(samples, samples.run.data.train.max_size - 1),
    },
    "horizon": {
        "lit_jepa": lambda samples, scratch: PaddedHorizon(samples, samples.run.data.train.max_size - 1, False),
        "lit_jepa_eager": lambda samples, scratch: PaddedHorizon(samples, samples.run.data.train.max_size - 1, True),
    },
}


def experiment_of(
    name: str, threads: int, batch_size: int, chat: str, horizon_data: str, llama: dict[str, Any], *overrides: str
) -> Experiment:
    """Our side of a comparison."""
    common = [f"engine.threads={threads}", "data.workers=0"]
    if name == "horizon":
        sizes = ["train.batch_tokens=0", "train.micro_tokens=0", f"train.batch_size={batch_size}"]
        given = [*common, *sizes, f"data.path={horizon_data}", *overrides]
        return validate(load_config("configs/tiny_shakespeare.yaml", given))
    model = {"family": "huggingface", "config": llama, "vocab_size": 32_000 if name == "chat" else None}
    if name == "chat":
        file = "configs/nl_rx_synth_lm.yaml"
        given = [f"data.path={chat}", f"data.max_length={PAD}", f"train.batch_size={batch_size}", "train.epochs=0"]
    else:
        sizes = ["train.batch_tokens=0", "train.micro_tokens=0", f"train.batch_size={batch_size}"]
        file, given = "configs/tiny_corpus_lm.yaml", [*sizes, "data.vocab_size=8192", "data.max_length=256"]
    return validate(load_config(file, [*common, f"model={json.dumps(model)}", *given, *overrides]))


class Side:
    """Programs of one comparison that share a process: ours, or all others.

    Args:
        who: ``ours``, ``others``, ``all`` of these, or ``ours_system``, ours in a process that is not started with tcmalloc.
    """

    def __init__(self, name: str, who: str, args: argparse.Namespace, scratch: Path) -> None:
        quiet_libraries()
        torch.set_num_threads(args.threads)
        torch.set_float32_matmul_precision("highest")
        ranks = comm.setup()
        batch_size = {"chat": args.chat_batch, "text": args.text_batch, "horizon": args.horizon_batch}[name]
        experiment = experiment_of(name, args.threads, batch_size, args.chat, args.horizon_data, LLAMA)
        ours = Ours(experiment, ranks, scratch)
        self.open, self.samples = [ours], ours.samples
        self.programs: dict[str, Program] = {}
        if who == "ours_system":
            self.programs[who] = ours
        elif who != "others":
            self.programs["ours"] = ours
            if has_bf16(ranks.device):
                in_bf16 = replace(experiment, engine=experiment.engine.model_copy(update={"precision": "bf16"}))
                self.open.append(Ours(in_bf16, ranks, scratch))
                self.programs["ours_bf16"] = self.open[-1]
        if who in ("others", "all"):
            self.programs |= {other: make(ours.samples, scratch) for other, make in OTHERS[name].items()}

    def names(self) -> list[str]:
        return list(self.programs)

    def malloc(self) -> str:
        return allocator.in_use()

    def look(self, name: str, step: int) -> Found:
        return self.programs[name].look(step)

    def steps(self, name: str, count: int) -> list[float]:
        return self.programs[name].steps(count)

    def tokens(self, name: str, step: int) -> int:
        program = self.programs[name]
        return program.rows * program.width if isinstance(program, FsdpLoop) else self.samples.tokens(step)

    def close(self) -> None:
        for ours in self.open:
            ours.close()
        comm.teardown()


def check(sides: dict[str, Side | Apart], steps: int = 2) -> None:
    """All compute the same: else nothing is timed.

    Raises:
        SystemExit: naming the program, the step and both values.
    """
    for step in range(steps):
        found = {name: side.look(name, step) for name, side in sides.items() if name != "fsdp_loop"}
        half, ours = found.pop("ours_bf16", None), found["ours"]
        if half and not abs(half.loss - ours.loss) <= BF16_TOLERANCE * abs(ours.loss):
            sys.exit(f"ours_bf16, step {step}: loss {half.loss:.6f}, in fp32 {ours.loss:.6f}")
        for name, theirs in found.items():
            for what, ours, other in zip(theirs._fields, found["ours"], theirs, strict=True):
                if not abs(other - ours) <= TOLERANCE * max(1.0, abs(ours)):
                    sys.exit(f"{name}, step {step}: {what} {other:.6f}, ours {ours:.6f}; not the same work")


def measure(sides: dict[str, Side | Apart], rounds: int, steps: int, warm: int) -> dict[str, list[float]]:
    """Real tokens a second of each program, one value a round: the tokens of a round over its seconds."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    done = {name: warm if name.startswith("ours") else 0 for name in sides}
    for name, count in done.items():
        if count:
            sides[name].steps(name, count)
    names = list(sides)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            count = 1 if name in SLOW else steps
            seconds = sum(sides[name].steps(name, count))
            real = sum(sides[name].tokens(name, step) for step in range(done[name], done[name] + count))
            done[name] += count
            if turn:
                rates[name].append(real / seconds)
    return rates


def compare(name: str, args: argparse.Namespace, scratch: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows, and which malloc either side had."""
    opened: dict[str, Side | Apart]
    if args.one_process:
        opened = {"all": Side(name, "all", args, scratch)}
    else:
        preloaded = tcmalloc()
        opened = {"ours": Apart(preloaded, Side, name, "ours", args, scratch / name / "ours")}
        for who in ("others", "ours_system") if preloaded else ("others",):
            opened[who] = Apart({}, Side, name, who, args, scratch / name / who)
    sides = {program: side for side in opened.values() for program in side.names()}
    check(sides)
    rates = measure(sides, args.rounds, args.steps, args.warm)
    real = [float(sides["ours"].tokens("ours", step)) for step in range(5)]
    mallocs = {who: side.malloc() for who, side in opened.items()}
    for side in opened.values():
        side.close()
    rows = [row(f"throughput/{name}/{of}", values, "tokens/s") for of, values in rates.items()]
    for of, label in (("ours", "ratio"), ("ours_bf16", "ratio_bf16")):
        for other in (o for o in rates if of in rates and o != of and (of == "ours" or o != "ours")):
            ratios = [a / b for a, b in zip(rates[of], rates[other], strict=True)]
            rows.append(row(f"{label}/{name}/{other}", ratios, ""))
    rows.append(row(f"tokens/{name}", real, "tokens/step"))
    print(
        text_table(
            [name, "median", "min", "max", ""],
            [[r["name"], *(f"{r[k]:,.2f}" for k in ("value", "min", "max")), r["unit"]] for r in rows],
        ),
        flush=True,
    )
    return rows, mallocs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=OTHERS, default=list(OTHERS), help="comparisons")
    parser.add_argument("--chat", default="nl_rx_synth", help="conversations: the alias, or a JSONL file of messages")
    parser.add_argument("--horizon-data", default="python_docs", help="text: an alias, a file or a folder")
    parser.add_argument("--chat-batch", type=int, default=16, help="samples in a step")
    parser.add_argument("--text-batch", type=int, default=8)
    parser.add_argument("--horizon-batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="steps of a program in a round")
    parser.add_argument("--warm", type=int, default=0, help="steps of ours before the rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one-process", action="store_true", help="all with the malloc of this process")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.only:
            found, mallocs = compare(name, args, Path(scratch))
            rows += found
            if args.json:  # after each, as all of them take minutes
                settings = {key: str(value) for key, value in vars(args).items() if key != "json"} | {
                    "malloc": str(mallocs)
                }
                settings |= {key: Path(settings[key]).name for key in ("chat", "horizon_data")}  # not where they lie
                machine = describe_environment(comm.setup(), "fsdp", "fp32")
                comm.teardown()
                del machine["malloc"]  # of this process
                write(args.json, {**machine, "settings": settings}, rows)


if __name__ == "__main__":
    main()
