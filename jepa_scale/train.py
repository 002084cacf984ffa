"""Train one run from a config: the script that launchers start.

deepspeed jepa_scale/train.py --config configs/reversal.yaml [section.key=value …] [--resume auto|PATH]
torchrun --nproc-per-node 2 jepa_scale/train.py --config …
python jepa_scale/train.py --config …

As a module: deepspeed --module jepa_scale.train, torchrun -m jepa_scale.train, python -m jepa_scale.train.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    if (here := Path(__file__).resolve().parent) == Path(sys.path[0]).resolve():
        # run as a file, not by -m: this folder is first on the path and would shadow packages of the same names
        sys.path[0] = str(here.parent)
    from jepa_scale.cli.train import refused

    if code := refused(sys.argv[1:]):
        sys.exit(code)

from jepa_scale.cli.train import parser, refusal
from jepa_scale.distributed import comm
from jepa_scale.training.run import NotSaved, run_training
from jepa_scale.training.stopping import Aborted
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.logging import configure

logger = logging.getLogger("jepa_scale.train")  # also where this file is run as __main__


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_intermixed_args(argv)
    configure(args.log_level)
    return guarded(run_training, args)


def guarded(command: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run a command of several ranks and return the exit code: 0 done, 2 bad input (one line, no traceback), 1 any
    other error."""
    try:
        command(args)
        return 0
    except InputError as error:
        return refusal(error)
    except (Aborted, NotSaved) as ended:
        if os.environ.get("RANK", "0") == "0":
            logger.error(ended)
        return 1
    except Exception:
        logger.exception("ended by an unexpected error")
        return 1
    finally:
        comm.teardown()


if __name__ == "__main__":
    sys.exit(main())
