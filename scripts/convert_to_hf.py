"""A run → Hugging Face format: ``python scripts/convert_to_hf.py RUN --out DIR …``, as ``jepa-scale convert RUN --to hf``."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jepa_scale import convert_cli  # noqa: E402
from jepa_scale.errors import InputError  # noqa: E402

if __name__ == "__main__":
    args = convert_cli.parse([*sys.argv[1:], "--to", "hf"])
    try:
        sys.exit(args.command(args))
    except InputError as error:
        print(f"jepa-scale: {error}", file=sys.stderr)
        sys.exit(2)
