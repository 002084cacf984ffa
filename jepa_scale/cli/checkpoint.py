"""The sub-commands of ``jepa-scale checkpoint``."""

from __future__ import annotations

import argparse
from pathlib import Path

from jepa_scale.checkpoint.retention import NAME, CheckpointInfo, Policy, complete, discard, kept
from jepa_scale.cli.flags import Parser, logging_flags
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.format import text_table


def parser() -> argparse.ArgumentParser:
    top = Parser(
        example="jepa-scale checkpoint ls runs/reversal",
        prog="jepa-scale checkpoint",
        description="List, verify and remove the checkpoints of a run.",
    )
    commands = top.add_subparsers(required=True, metavar="ls|verify|prune")
    flags = logging_flags()

    ls = commands.add_parser(
        "ls",
        help="list checkpoints: step, engine, size, metrics",
        parents=[flags],
        example="jepa-scale checkpoint ls runs/reversal",
    )
    ls.set_defaults(command=list_checkpoints)

    check = commands.add_parser(
        "verify",
        help="compare every file with its checksum",
        parents=[flags],
        example="jepa-scale checkpoint verify runs/reversal",
    )
    check.set_defaults(command=verify_checkpoints)

    less = commands.add_parser(
        "prune",
        help="remove all but the newest whole ones, damaged ones, and what was left of broken saves",
        parents=[flags],
        example="jepa-scale checkpoint prune runs/reversal --keep-last 2 --dry-run",
    )
    less.add_argument("--keep-last", type=int, default=1, metavar="K", help="newest to keep (default: 1)")
    less.add_argument("--keep-every", type=int, default=0, metavar="N", help="keep multiples of this step, too")
    less.add_argument("--dry-run", action="store_true", help="print what would be removed, and remove nothing")
    less.add_argument("--abandoned", action="store_true", help="remove those that were set aside, too")
    less.set_defaults(command=prune_checkpoints)
    for command in (ls, check, less):
        command.add_argument("run", type=Path, help="run directory, or a folder of checkpoints")
    return top


def folder_of(run: Path) -> Path:
    """Return the folder of checkpoints of ``run``.

    Raises:
        InputError: there is none.
    """
    for folder in (run / "checkpoints", run):
        if folder.is_dir() and any(NAME.match(path.name) for path in folder.iterdir()):
            return folder
    raise InputError(f"{run}: holds no checkpoints")


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def broken(folder: Path, found: list[CheckpointInfo]) -> list[Path]:
    """Return the folders of incomplete checkpoints: of killed saves, or without a readable manifest."""
    whole = {f.path for f in found} | set(abandoned(folder))
    return sorted(p for p in folder.iterdir() if p.is_dir() and NAME.match(p.name) and p not in whole)


def abandoned(folder: Path) -> list[Path]:
    """Return the checkpoints that were set aside when the run went on from an older one."""
    return sorted(p for p in folder.iterdir() if NAME.match(p.name) and ".abandoned" in p.name)


def list_checkpoints(args: argparse.Namespace) -> int:
    folder = folder_of(args.run)
    found = complete(folder)
    rows = []
    for f in found:
        m = f.manifest
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in list(m.metrics.items())[:3])
        kind = "" if m.permanent else "ephemeral"
        rows.append([f.path.name, m.layout, str(m.world_size), f"{size(f.path) / 1e6:,.1f} MB", kind, metrics])
    print(text_table(["checkpoint", "engine", "ranks", "size", "", "metrics"], rows))
    for path in broken(folder, found):
        print(f"{path}: not complete")
    for path in abandoned(folder):
        print(f"{path}: abandoned, the run went on from an older one")
    return 0


def verify_checkpoints(args: argparse.Namespace) -> int:
    folder = folder_of(args.run)
    found = complete(folder)
    wrong = [f"{path}: not complete" for path in broken(folder, found)]
    for f in found:
        lines = f.manifest.damage(f.path)
        print(f"{f.path.name}: {'damaged' if lines else 'whole'}")
        wrong += lines
    if wrong:
        raise InputError("; ".join(wrong))
    return 0


def prune_checkpoints(args: argparse.Namespace) -> int:
    folder = folder_of(args.run)
    if args.keep_last < 1:
        raise InputError("--keep-last: must be at least 1")
    policy = Policy(last=args.keep_last, every=args.keep_every, ephemeral=1)
    found = complete(folder)
    stay, _ = kept(found, policy, hashes=True)
    if not stay:
        raise InputError(
            f"{folder}: holds no whole checkpoint, so nothing is removed; see jepa-scale checkpoint verify"
        )
    gone = [f.path for f in found if f.path not in stay] + broken(folder, found)
    gone += abandoned(folder) if args.abandoned else []
    freed = sum(map(size, gone))
    if not args.dry_run:
        for path in gone:
            discard(path)
    for path in gone:
        print(f"{path}{' would go' if args.dry_run else ': removed'}")
    print(f"{len(gone)} checkpoints, {freed / 1e6:,.1f} MB")
    return 0
