"""``python -m jepa_scale.cli``: the command line by its name in version 0.1; ``python -m jepa_scale`` is shorter."""

import sys

from jepa_scale.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
