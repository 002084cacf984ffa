"""``python -m jepa_scale``: the command line."""

import sys

from jepa_scale.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
