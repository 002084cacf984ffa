"""The sub-command ``jepa-scale encode``."""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path

from jepa_scale.cli.flags import Parser, logging_flags
from jepa_scale.utils.errors import InputError


def parser() -> argparse.ArgumentParser:
    encode = Parser(
        example="jepa-scale encode runs/span_tiny texts.txt --out rows.npy --normalize",
        prog="jepa-scale encode",
        description="Encode texts with a run's model: a row of float32 a text, as .npy.",
        parents=[logging_flags()],
    )
    encode.add_argument("run", type=Path, help="run directory")
    encode.add_argument(
        "input", help=".txt (a text a line), .jsonl (rows with a text), or - (standard input, a text a line)"
    )
    encode.add_argument("--out", type=Path, required=True, metavar="FILE.npy", help="file to write")
    encode.add_argument(
        "--pooling", choices=["mean", "last"], help="of a text's states (default: as the run's objective reads them)"
    )
    encode.add_argument("--normalize", action="store_true", help="make the rows unit vectors")
    encode.add_argument("--truncate", action="store_true", help="cut texts that are too long for the model")
    encode.add_argument("--batch-tokens", type=int, default=8192, metavar="N", help="in one forward (default: 8192)")
    add_model_arguments(encode)
    encode.add_argument("--no-progress", action="store_true", help="no progress bar")
    encode.set_defaults(command=encode_file)
    return encode


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of :func:`jepa_scale.load`."""
    parser.add_argument(
        "--checkpoint", default="auto", metavar="PATH", help="which one (default: the newest whole one)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (default: the GPU where there is one)")


def encode_file(args: argparse.Namespace) -> int:
    out: Path = args.out
    if out.suffix != ".npy":
        raise InputError(f"--out {out}: must end with .npy")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}; make it first")
    begin = time.monotonic()
    from jepa_scale.telemetry import quiet_libraries
    from jepa_scale.telemetry.records import config_of

    config_of(args.run.expanduser())
    quiet_libraries()
    import numpy as np

    from jepa_scale.data.texts import read_texts, tokenize
    from jepa_scale.inference import load
    from jepa_scale.utils.io import write_atomic

    found = read_texts(args.input)
    run = load(args.run, args.checkpoint, args.device)
    hint = "" if args.truncate else "shorten it, or have it cut with --truncate"
    texts = tokenize(
        run.tokenizer, [f.text for f in found], run.vocab_size, run.max_tokens, lambda n: found[n].where, hint
    )
    rows = run.encode(
        texts.tokens, args.pooling, args.batch_tokens, normalize=args.normalize, progress=not args.no_progress
    )
    data = io.BytesIO()
    np.save(data, rows)
    try:
        write_atomic(out, data.getvalue())
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from None
    pooling = args.pooling or run.module.objective.pooling
    print(
        f"{run.checkpoint} → {out}: {len(rows):,} texts, {rows.shape[1]:,} dimensions, pooling {pooling}, "
        f"on {run.device}, {time.monotonic() - begin:,.1f} s"
    )
    return 0
