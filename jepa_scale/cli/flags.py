"""The flags that every command has."""

from __future__ import annotations

import argparse
import logging


def logging_flags() -> argparse.ArgumentParser:
    """Return a parent parser with the flags ``-v`` and ``-q``, which set ``log_level``."""
    parent = argparse.ArgumentParser(add_help=False)
    flags = parent.add_mutually_exclusive_group()
    for letter, name, level, text in (
        ("-v", "--verbose", logging.DEBUG, "log more on stderr: details, and the messages of all ranks"),
        ("-q", "--quiet", logging.WARNING, "log warnings and errors alone, and show no progress"),
    ):
        flags.add_argument(
            letter, name, dest="log_level", action="store_const", const=level, default=logging.INFO, help=text
        )
    return parent
