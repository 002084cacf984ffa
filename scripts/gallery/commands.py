"""Commands of the gallery, shown before they run, so that what a script does can be typed again."""

import shlex
import sys

from jepa_scale.cli.main import main


def show(*words: object) -> None:
    """Print ``jepa-scale WORDS`` and run it in this process; the script ends with its exit code if that is not 0."""
    given = [str(word) for word in words]
    print(f"\n$ jepa-scale {shlex.join(given)}", flush=True)
    if code := main(given):
        sys.exit(code)
