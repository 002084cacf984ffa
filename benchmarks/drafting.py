"""Drafting on Python's documentation: how many drafted tokens are kept, what training for it costs, and what it saves.

    python benchmarks/drafting.py --seeds 5 --json benchmarks/results/drafting.json

Every run is a process of its own with the decoder, the data and the steps of `configs/tiny_corpus_lm.yaml`; runs that are complete in
--dir are not repeated. A control trains its heads on states without gradient, so its decoder is the baseline's.

For each case and seed: ``bits_per_character`` of the validation split, its difference to the baseline's of the same seed, and for cases
with heads ``accepted``, the drafted tokens that are kept in a pass of the decoder, of --draft, when the beginnings of validation texts
are continued greedily. ``speed``: tokens a second with drafts, divided by those without drafts, of the same run, cache and prompts,
in turns; one thread.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402

import jepa_scale  # noqa: E402
from benchmarks.rows import as_table, row, write  # noqa: E402
from benchmarks.study import train_all  # noqa: E402
from jepa_scale.inference import LoadedRun  # noqa: E402
from jepa_scale.models.generation.speculative import generate  # noqa: E402
from jepa_scale.telemetry import load_run  # noqa: E402

NEXT = "tiny_corpus_next_latent"
CASES: dict[str, tuple[str, list[str]]] = {
    "lm": ("tiny_corpus_lm", []),
    "next_latent_control": (NEXT, ["objective.detach=true"]),
    "next_latent_0.03": (NEXT, ["objective.jepa_weight=0.03", "objective.kl_weight=0.03"]),
    "next_latent_0.1": (NEXT, ["objective.jepa_weight=0.1", "objective.kl_weight=0.1"]),
    "next_latent_0.3": (NEXT, ["objective.jepa_weight=0.3", "objective.kl_weight=0.3"]),
    "next_latent_1": (NEXT, []),
    "mtp_control": ("tiny_corpus_mtp", ["objective.heads=5", "objective.detach=true"]),
    "mtp_1": ("tiny_corpus_mtp", ["objective.heads=5"]),
}
"""Name → config and overrides; the number is the weight of the terms."""


def characters_per_label(run: LoadedRun) -> float:
    """Return the mean number of characters of a token that is predicted, over the validation split."""
    labels = characters = 0
    for i in range(len(run.data.splits["valid"])):
        tokens, targets = run.data.splits["valid"][i].lm_sequence()
        labels += int((targets >= 0).sum())
        characters += len(run.tokenizer.decode(tokens.tolist(), skip_special_tokens=True))
    return characters / labels


def prompts_of(run: LoadedRun, count: int, length: int) -> list[list[int]]:
    """Return the beginnings of ``count`` validation texts that are long enough, evenly spread."""
    texts = [run.data.splits["valid"][i] for i in range(len(run.data.splits["valid"]))]
    long = [text.tokens[:length].tolist() for text in texts if len(text.tokens) > 2 * length]
    return long[:: max(1, len(long) // count)][:count]


def draft(run: LoadedRun, prompts: list[list[int]], drafts: int, new_tokens: int) -> dict[str, float]:
    """Generate with and without drafts in turns, and compare.

    Raises:
        SystemExit: the texts differ.
    """
    backbone, objective = run.module.backbone, run.module.objective
    seconds, tokens, kept, passes = {0: 0.0, drafts: 0.0}, 0, 0, 0
    for number, prompt in enumerate(prompts):
        texts = {}
        for count in (0, drafts) if number % 2 else (drafts, 0):
            start = time.perf_counter()
            found = generate(backbone, prompt, (), new_tokens, objective.drafter(backbone), count)
            seconds[count] += time.perf_counter() - start
            texts[count] = found.tokens
            if count:
                kept, passes = kept + found.accepted, passes + found.forwards
        if texts[0] != texts[drafts]:
            raise SystemExit(f"prompt {number}: the text with drafts is not that without")
        tokens += len(texts[0])
    return {"accepted": kept / passes, "speed": seconds[0] / seconds[drafts]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--draft", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dir", type=Path, default=Path("runs/benchmark_drafting"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cases = ["lm", *(case for case in args.cases if case != "lm")]
    todo = {}
    for seed in range(args.seeds):
        for case in cases:
            config, overrides = CASES[case]
            short = [
                f"run.seed={seed}",
                f"engine.threads={args.threads}",
                f"train.steps={args.steps}",
                "train.eval_every=0",
            ]
            arguments = ["--config", f"configs/{config}.yaml", "data.workers=0", *overrides, *short]
            todo[case, seed] = (args.dir / f"{case}_seed{seed}", arguments)
    runs = train_all(todo, args.jobs)

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    bits: dict[tuple[str, int], float] = {}
    for case in cases:
        values: dict[str, list[float]] = {}
        for seed in range(args.seeds):
            record, run = load_run(runs[case, seed]), jepa_scale.load(runs[case, seed])
            loss = record.summary["final"]["eval/valid"]["lm_loss"]
            bits[case, seed] = loss / math.log(2) / characters_per_label(run)
            found = {"bits_per_character": bits[case, seed]}
            if case != "lm":
                found["bits_to_lm"] = bits[case, seed] - bits["lm", seed]
                found |= draft(run, prompts_of(run, args.prompts, 24), args.draft, args.new_tokens)
            for name, value in found.items():
                values.setdefault(name, []).append(value)
        rows += [row(f"{case}/{name}", of, "", statistics.fmean(of)) for name, of in values.items()]
    print(as_table(rows))
    if args.json:
        names = ("seeds", "steps", "draft", "prompts", "new_tokens")
        settings = {"cases": {case: CASES[case] for case in cases}} | {name: getattr(args, name) for name in names}
        write(args.json, {**load_run(runs["lm", 0]).summary["environment"], "settings": settings}, rows)


if __name__ == "__main__":
    main()
