"""The sub-command ``jepa-scale generate``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jepa_scale.cli.encode import add_model_arguments
from jepa_scale.cli.flags import logging_flags
from jepa_scale.utils.errors import InputError


def parser() -> argparse.ArgumentParser:
    generate = argparse.ArgumentParser(
        prog="jepa-scale generate",
        description="Generate greedily with a run's model: the answer to a user's message if it was trained on conversations, else "
        "how a text goes on.",
        parents=[logging_flags()],
    )
    generate.add_argument("run", type=Path, help="run directory")
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="default: the lines of standard input")
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="at most (default: 128)")
    generate.add_argument("--batch-size", type=int, default=32, metavar="N", help="prompts at a time (default: 32)")
    generate.add_argument("--json", action="store_true", help="a line of JSON a prompt: prompt, generated")
    add_model_arguments(generate)
    generate.set_defaults(command=generate_texts)
    return generate


def generate_texts(args: argparse.Namespace) -> int:
    for name in ("max_new_tokens", "batch_size"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    from jepa_scale.telemetry import quiet_libraries
    from jepa_scale.telemetry.records import config_of

    config_of(args.run.expanduser())
    quiet_libraries()
    from jepa_scale.data.texts import read_texts
    from jepa_scale.inference import load

    prompts = args.prompts or [found.text for found in read_texts("-")]
    run = load(args.run, args.checkpoint, args.device)
    for prompt, text in zip(prompts, run.generate(prompts, args.max_new_tokens, args.batch_size), strict=True):
        print(json.dumps({"prompt": prompt, "generated": text}, ensure_ascii=False) if args.json else text)
    return 0
