"""The sub-commands of ``jepa-scale data``."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from jepa_scale.cli.flags import Parser, logging_flags
from jepa_scale.cli.signals import stopped_by_signals
from jepa_scale.config.parsing import parse_section
from jepa_scale.data.files.cache import CACHE_BYTES
from jepa_scale.data.prepare.base import PrepareOptions
from jepa_scale.data.prepare.section_options import SectionOptions
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.format import text_table

if TYPE_CHECKING:
    from jepa_scale.data.shards.format import Index


def parser() -> argparse.ArgumentParser:
    data = Parser(
        example="jepa-scale data prepare corpus/ --out shards/corpus --vocab-size 8192",
        prog="jepa-scale data",
        description="Prepare, verify or make data.",
    )
    commands = data.add_subparsers(required=True, metavar="prepare|verify|sections|reversal")
    flags = logging_flags()

    prepare = commands.add_parser(
        "prepare",
        help="make shards of raw data",
        parents=[flags],
        example="jepa-scale data prepare corpus/ --out shards/corpus --vocab-size 8192",
    )
    prepare.add_argument("source", help="file, folder, glob or address of these, alias or Hugging Face dataset")
    prepare.add_argument("--out", type=Path, required=True, help="folder to write into: new, or stopped halfway")
    prepare.add_argument("--processes", type=int, metavar="N", help="worker processes (default: one a core)")
    prepare.add_argument(
        "--cache", type=Path, metavar="DIR", help="for tokenizers and downloads (default: $JEPA_SCALE_CACHE, ~/.cache)"
    )
    prepare.add_argument(
        "--cache-gb",
        type=float,
        default=CACHE_BYTES / 1e9,
        metavar="N",
        help="most GB of downloads (default: %(default)g)",
    )
    prepare.add_argument("--no-progress", action="store_true", help="no progress bar")
    add_options(prepare.add_argument_group("what the data become"))
    prepare.set_defaults(command=prepare_data)

    verify = commands.add_parser(
        "verify",
        help="check every byte of a folder of shards",
        parents=[flags],
        example="jepa-scale data verify shards/corpus",
    )
    verify.add_argument("folder", type=Path)
    verify.add_argument("--no-progress", action="store_true", help="no progress bar")
    verify.set_defaults(command=verify_data)

    sections = commands.add_parser(
        "sections",
        help="passages of a corpus labelled by section, for eval.probe",
        parents=[flags],
        example="jepa-scale data sections my_texts/ --out sections.jsonl",
    )
    sections.add_argument(
        "source", nargs="+", help="text files, a folder of them, or an alias (python_docs, wikitext2)"
    )
    sections.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="file to write")
    for name, field in SectionOptions.model_fields.items():
        text = f"{(field.description or '').rstrip('.')} (default: {field.default})"
        flag = f"--{name.replace('_', '-')}"
        sections.add_argument(flag, type=int, dest=f"option_{name}", default=field.default, metavar="N", help=text)
    sections.set_defaults(command=write_sections)

    reversal = commands.add_parser(
        "reversal",
        help="write GPT2WithJEPA's reversal files: train.json, valid.json, vocab.json",
        parents=[flags],
        example="jepa-scale data reversal --out facts/",
    )
    reversal.add_argument("--out", type=Path, required=True, help="folder to write into; must not hold such files")
    reversal.add_argument("--entities-a", type=int, default=50_000, help="|A|, entities with both directions")
    reversal.add_argument("--comb", type=int, default=10, help="entities that share a first, and a last, name")
    reversal.add_argument("--relations", type=int, default=6, help="relation pairs")
    reversal.add_argument("--seed", type=int, default=0)
    reversal.add_argument(
        "--valid-samples",
        type=int,
        metavar="N",
        help="facts of each split in valid.json, chosen at random; GPT2WithJEPA has 3,000 (default: all that are known in one "
        "direction or held out, and 10,000 of the others)",
    )
    reversal.set_defaults(command=write_reversal)
    return data


def add_options(group: argparse._ArgumentGroup) -> None:
    """Add a flag for every key of ``PrepareOptions``. A flag that is not given is absent from the namespace."""
    for name, field in PrepareOptions.model_fields.items():
        kind: Any = field.annotation
        if get_origin(kind) in (Union, UnionType):  # X | None: leaving the flag out means None
            (kind,) = (k for k in get_args(kind) if k is not type(None))
        if get_origin(kind) is Annotated:  # a text with rules, which the options check
            kind = get_args(kind)[0]
        shows_default = kind in (str, int, float) or get_origin(kind) is Literal
        default = field.default if shows_default and field.default is not None else ""
        text = (field.description or "").rstrip(".") + (f" (default: {default})" if default != "" else "")
        common: dict[str, Any] = {
            "dest": f"option_{name}",
            "default": argparse.SUPPRESS,
            "help": text.replace("%", "%%"),
        }
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif get_origin(kind) is Literal:
            group.add_argument(flag, choices=get_args(kind), **common)
        elif get_origin(kind) is dict:
            group.add_argument(flag, action="extend", nargs="+", metavar="KEY=NAME", **common)
        else:
            group.add_argument(flag, type=kind, metavar=name.rsplit("_", 1)[-1].upper(), **common)


def chosen_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the given options, as ``PrepareOptions`` takes them."""
    given = {k.removeprefix("option_"): v for k, v in vars(args).items() if k.startswith("option_")}
    for name, value in given.items():
        if isinstance(value, list):
            pairs = [item.partition("=") for item in value]
            for item, (key, equals, column) in zip(value, pairs, strict=True):
                if not (key and equals and column):
                    raise InputError(f"--{name.replace('_', '-')} {item}: must look like KEY=NAME, e.g. input=question")
            given[name] = {key: column for key, _, column in pairs}
    return given


def prepare_data(args: argparse.Namespace) -> int:
    options = parse_section(PrepareOptions, chosen_options(args), "")
    if args.processes is not None and args.processes < 1:
        raise InputError(f"--processes {args.processes}: must be at least 1")
    if not args.cache_gb > 0:
        raise InputError(f"--cache-gb {args.cache_gb:g}: must be above 0")
    from jepa_scale.data.prepare.job import prepare

    begin = time.monotonic()
    with stopped_by_signals():
        index = prepare(
            args.source,
            args.out,
            options,
            args.processes,
            not args.no_progress,
            cache=args.cache,
            cache_bytes=int(args.cache_gb * 1e9),
        )
    print(summary(args.out, index))
    print(f"{time.monotonic() - begin:,.1f} s")
    return 0


def verify_data(args: argparse.Namespace) -> int:
    from jepa_scale.data.prepare.verify import verify
    from jepa_scale.data.shards.format import Index

    damage = verify(args.folder, not args.no_progress)
    for line in damage:
        print(line)
    if damage:
        raise InputError(f"{args.folder}: is damaged; remove it and prepare the data again")
    print(summary(args.folder, Index.read(args.folder)))
    print("every byte is as it was written")
    return 0


def write_reversal(args: argparse.Namespace) -> int:
    from jepa_scale.data.reversal.facts import generate
    from jepa_scale.data.reversal.files import write

    if args.valid_samples is not None and args.valid_samples < 1:
        raise InputError(f"--valid-samples: must be at least 1, not {args.valid_samples}")
    data = generate(args.entities_a, args.comb, args.relations, args.seed)
    write(data, args.out, valid_samples=args.valid_samples)
    counts = ", ".join(f"{len(data.facts(split)):,} {split}" for split in ("train", "atomic", "test"))
    print(f"{args.out}: {counts} facts, vocabulary {data.vocab_size:,}")
    return 0


def write_sections(args: argparse.Namespace) -> int:
    options = parse_section(SectionOptions, chosen_options(args), "")
    if not args.out.parent.is_dir():
        raise InputError(f"--out {args.out}: there is no folder {args.out.parent}; make it first")
    from jepa_scale.data.prepare.sections import passages
    from jepa_scale.utils.io import write_atomic

    made = passages(args.source, options)
    try:
        write_atomic(args.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made.rows))
    except OSError as error:
        raise InputError(f"--out {args.out}: cannot be written: {error.strerror}") from None
    classes = len(made.rows) // options.per_class
    words = sum(len(row["text"].split()) for row in made.rows) / len(made.rows)
    print(
        f"{args.out}: {len(made.rows):,} passages of {classes} sections, {options.per_class} each, {words:.0f} words on average"
    )
    print(
        f"of {made.sections:,} sections {made.too_short:,} have fewer passages, and {made.unclear:,} names are of several articles"
    )
    return 0


def summary(folder: Path, index: Index) -> str:
    """Return a summary of a folder of shards, and of the records left out of it, for the terminal."""
    rows = []
    for split, shards in index.splits.items():
        sums = [sum(getattr(shard, key) for shard in shards) for key in ("samples", "tokens", "bytes")]
        rows.append([split, *(f"{number:,}" for number in (len(shards), *sums))])
    tokenizer = f", tokenizer {index.tokenizer_fingerprint[:12]}" if index.tokenizer_fingerprint else ""
    lines = [
        text_table(["split", "shards", "samples", "tokens", "bytes"], rows),
        f"{folder}: {index.kind}, vocabulary {index.vocab_size:,}{tokenizer}, fingerprint {index.fingerprint[:12]}",
    ]
    if index.skipped:
        total = sum(index.made_from.get("records", {}).values())
        lines.append(f"skipped {sum(index.skipped.values()):,} of {total:,} records:")
        for reason, count in index.skipped.items():
            named = index.made_from.get("skipped", {}).get(reason, [])
            more = " …" if count > len(named) else ""
            lines.append(f"  {count:,} {reason}: {'; '.join(named)}{more}")
    return "\n".join(lines)
