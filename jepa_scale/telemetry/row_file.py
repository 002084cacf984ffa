"""The open file ``metrics.jsonl``."""

from __future__ import annotations

import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)


class RowFile:
    """A file to which lines are appended; each is handed to the operating system before the call returns.

    Lines that cannot be written, for example on a full disk, wait in memory and are written with the next line that can
    be. So a run goes on without room for its rows, as it does without room for a checkpoint. Each such failure is
    logged once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._waiting = b""
        self._told = False

    def write(self, line: str) -> None:
        self._waiting += line.encode() + b"\n"
        try:
            self._flush()
            self._told = False
        except OSError as error:
            if not self._told:
                logger.warning(f"{self.path}: {error.strerror}; its rows wait in memory, training goes on")
            self._told = True

    def close(self) -> None:
        """Raises:
        OSError: rows still could not be written; names the file.
        """
        try:
            self._flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        finally:
            os.close(self._descriptor)

    def _flush(self) -> None:
        while self._waiting:
            written = os.write(self._descriptor, self._waiting)  # perhaps a part of a line
            self._waiting = self._waiting[written:]
