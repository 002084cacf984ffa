"""Exceptions for wrong input of the user; all other exceptions are bugs or faults of the machine."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad configuration, data or environment, found before any work starts.

    The message is one line that names the key, file, row or rank, the fault and the remedy.
    The command line prints it without a traceback and exits with code 2.
    """


class DataError(InputError):
    """A damaged or missing sample, found when it is read: perhaps by one rank alone, in the middle of a run."""


def one_line(error: BaseException) -> str:
    """Return an error's text on one line, or the name of its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def suggestion(name: str, known: Iterable[str], otherwise: str) -> str:
    """Return ``did you mean 'x'?`` with the known name most similar to a wrong one; ``otherwise`` if none is similar."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else otherwise
