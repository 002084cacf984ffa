"""A run → Hugging Face format: ``python scripts/convert_to_hf.py RUN --out DIR …``, as ``jepa-scale convert RUN --to hf``."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jepa_scale.cli.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["convert", "--to", "hf", *sys.argv[1:]]))
