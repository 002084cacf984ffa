"""Follow one or several runs: ``python scripts/monitor.py RUN … [--every SECONDS] [--stall MINUTES] [--once]``."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jepa_scale.monitor import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
