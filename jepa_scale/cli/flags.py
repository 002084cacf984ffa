"""The flags that every command has."""

from __future__ import annotations

import argparse
import logging
from typing import Any, NoReturn


class _Formatter(argparse.HelpFormatter):
    """Wraps everything but the examples at the end."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example") else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """A parser whose ``--help`` ends with an example, and whose error about a flag of another program names the key that is meant.

    Args:
        example: a command as it is typed.
    """

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _Formatter)
        super().__init__(*args, **kwargs)
        if example:
            self.epilog = f"example:\n  {example}"

    def error(self, message: str) -> NoReturn:
        from jepa_scale.config.foreign import flag_meant
        from jepa_scale.config.parsing import common_sections

        before, found, words = message.partition("unrecognized arguments: ")
        for word in words.split() if found and not before else ():
            if word.startswith("--") and (hint := flag_meant(word, common_sections())):
                self.exit(2, f"{self.prog}: {word}: unknown flag; {hint}\n")
        super().error(message)


def logging_flags() -> Parser:
    """Return a parent parser with the flags ``-v`` and ``-q``, which set ``log_level``."""
    parent = Parser(add_help=False)
    flags = parent.add_mutually_exclusive_group()
    for letter, name, level, text in (
        ("-v", "--verbose", logging.DEBUG, "log more on stderr: details, and the messages of all ranks"),
        ("-q", "--quiet", logging.WARNING, "log warnings and errors alone, and show no progress"),
    ):
        flags.add_argument(
            letter, name, dest="log_level", action="store_const", const=level, default=logging.INFO, help=text
        )
    return parent
