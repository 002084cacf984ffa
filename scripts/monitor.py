"""Follow one or several runs, from a checkout: ``python scripts/monitor.py RUN …`` is ``jepa-scale watch RUN …``."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jepa_scale.cli.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["watch", *sys.argv[1:]]))
