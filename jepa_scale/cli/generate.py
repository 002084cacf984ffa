"""The sub-command ``jepa-scale generate``."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from jepa_scale.cli.encode import add_model_arguments
from jepa_scale.cli.flags import Parser, logging_flags
from jepa_scale.utils.errors import InputError

if TYPE_CHECKING:
    from jepa_scale.models.generation.speculative import Generation

log = logging.getLogger(__name__)

_OF_PROMPTS = {"max_new_tokens": 128, "draft": 0, "temperature": 0.0, "seed": 0}
"""Options that go with prompts alone, and what they are if not given."""


def parser() -> argparse.ArgumentParser:
    generate = Parser(
        example='jepa-scale generate runs/nl_rx_synth "lines with a number" --max-new-tokens 40',
        prog="jepa-scale generate",
        description="Generate with a run's model: the answer to a user's message if it was trained on conversations, the object of "
        "a subject and a relation if it was trained on facts, else how a text goes on.",
        parents=[logging_flags()],
    )
    generate.add_argument("run", type=Path, help="run directory")
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="default: the lines of standard input")
    generate.add_argument(
        "--subject", action="append", metavar="NAME", help="of a fact: a name as the data write it; repeatable"
    )
    generate.add_argument("--relation", metavar="NAME", help="of the fact, as the data write it: teacher, <r_0_inv> …")
    generate.add_argument("--max-new-tokens", type=int, metavar="N", help="at most (default: 128)")
    generate.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="prompts or questions at a time (default: 32)"
    )
    generate.add_argument(
        "--draft",
        type=int,
        metavar="N",
        help="let the objective's head draft N tokens at a time (next_latent, mtp): the same text in fewer passes; one prompt at a "
        "time (default: 0)",
    )
    generate.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="sample, with the logits divided by T; one prompt at a time (default: 0, the likeliest token)",
    )
    generate.add_argument("--seed", type=int, metavar="N", help="seed of the samples (default: 0)")
    generate.add_argument(
        "--json",
        action="store_true",
        help="a line of JSON a prompt: prompt, generated, and with --draft drafted, accepted, forwards; or a question: subject, "
        "relation, name, and whether that is a known name",
    )
    add_model_arguments(generate)
    generate.set_defaults(command=generate_texts)
    return generate


def generate_texts(args: argparse.Namespace) -> int:
    if args.subject is not None or args.relation is not None:
        return answer_questions(args)
    for name, default in _OF_PROMPTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    for name in ("max_new_tokens", "batch_size"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    for name in ("draft", "temperature", "seed"):
        if not 0 <= getattr(args, name) < float("inf"):
            raise InputError(f"--{name} {getattr(args, name)}: must be 0 or more")
    from jepa_scale.telemetry import quiet_libraries
    from jepa_scale.telemetry.records import config_of

    config_of(args.run.expanduser())
    quiet_libraries()
    from jepa_scale.data.texts import read_texts
    from jepa_scale.inference import load

    prompts = args.prompts or [found.text for found in read_texts("-")]
    run = load(args.run, args.checkpoint, args.device)
    options = (args.max_new_tokens, args.batch_size, args.draft, args.temperature, args.seed)
    found = run.generations(prompts, *options)
    for prompt, (text, generation) in zip(prompts, found, strict=True):
        line = {"prompt": prompt, "generated": text}
        if args.draft:
            line |= {name: getattr(generation, name) for name in ("drafted", "accepted", "forwards")}
        print(json.dumps(line, ensure_ascii=False) if args.json else text)
    if args.draft:
        log.info(_about_drafts([generation for _, generation in found]))
    return 0


def answer_questions(args: argparse.Namespace) -> int:
    if args.subject is None or args.relation is None:
        raise InputError("--subject, --relation: a question about a fact has both; add the other one")
    if args.prompts:
        raise InputError("--subject: asks about a fact; remove the prompts")
    for name in _OF_PROMPTS:
        if getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')}: has no meaning for --subject; remove it")
    if args.batch_size < 1:
        raise InputError(f"--batch-size {args.batch_size}: must be at least 1")
    from jepa_scale.telemetry import quiet_libraries
    from jepa_scale.telemetry.records import config_of

    config_of(args.run.expanduser())
    quiet_libraries()
    from jepa_scale.inference import load

    for found in load(args.run, args.checkpoint, args.device).answers(args.subject, args.relation, args.batch_size):
        print(json.dumps(asdict(found), ensure_ascii=False) if args.json else found.name)
    return 0


def _about_drafts(found: Sequence[Generation]) -> str:
    drafted, accepted, forwards = (sum(getattr(g, name) for g in found) for name in ("drafted", "accepted", "forwards"))
    share = f"{accepted / drafted:.0%}" if drafted else "none"
    return (
        f"{accepted:,} of {drafted:,} drafted tokens were kept ({share}): {1 + accepted / max(1, forwards):.2f} tokens for each pass "
        "of the decoder"
    )
