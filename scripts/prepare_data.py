"""Raw data → shards: ``python scripts/prepare_data.py SOURCE --out DIR …``, the same as ``jepa-scale data prepare``."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jepa_scale.cli.main import main  # noqa: E402

if __name__ == "__main__":  # worker processes import this file
    sys.exit(main(["data", "prepare", *sys.argv[1:]]))
