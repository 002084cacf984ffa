"""The text of ``jepa-scale config --from PROGRAM FILE``: a config of ours for one of another program."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from jepa_scale.config.loading import apply_override, find_file, load_config, read_yaml, to_yaml
from jepa_scale.config.translate import TRANSLATORS, translate
from jepa_scale.experiment import check_trainable, validate

logger = logging.getLogger(__name__)


def translated(flag: str, path: str, overrides: Sequence[str] = ()) -> str:
    """Return our config with its overrides as YAML, with comments on what is not carried over. It has been validated.

    Args:
        flag: the program, as in :data:`jepa_scale.config.translate.TRANSLATORS`. path: its config.

    Raises:
        InputError: a key cannot be translated, or the config that comes of it cannot be trained.
    """
    file = find_file(path, "config")
    values, notes = translate(flag, read_yaml(file), str(file))
    for override in overrides:
        apply_override(values, override)
    text = to_yaml(values)
    with TemporaryDirectory() as folder:  # a config is read from a file, whose name is its run's
        made = Path(folder) / f"{file.stem}.yaml"
        made.write_text(text, encoding="utf-8")
        check_trainable(validate(load_config(made)))
    program = TRANSLATORS[flag][0]
    comments = [f"From {file.name}, a config of {program.name}; {program.page} explains what differs.", *notes]
    if dropped := sum(note.startswith("not carried over") for note in notes):
        logger.warning(f"{file}: {dropped} of its keys have no key here; the comments at the top say why")
    wrapped = [textwrap.fill(note, 118, initial_indent="# ", subsequent_indent="#   ") for note in comments]
    return "\n".join([*wrapped, "", text])
