"""Silence for other libraries' chatter, so that a run's own lines are what the user reads."""

from __future__ import annotations

import logging
import os
import re
import warnings

_LOGGERS = (
    "DeepSpeed",
    "absl",
    "accelerate",
    "datasets",
    "filelock",
    "fsspec",
    "httpx",
    "huggingface_hub",
    "matplotlib",
    "numexpr",
    "tensorboard",
    "torch.distributed",
    "torch.utils.flop_counter",
    "transformers",
    "urllib3",
    "wandb",
)
_MODULES = (  # not all of torch: torch.cuda warns of a driver that is too old, which is the user's to know
    "torch.autograd",
    "torch.distributed",
    "torch.optim",
    "torch.utils",
    "absl",
    "datasets",
    "deepspeed",
    "huggingface_hub",
    "matplotlib",
    "tensorboard",
    "transformers",
    "wandb",
    "webdataset",
)
_ENVIRONMENT = {  # read by the libraries when they are imported
    "DATASETS_VERBOSITY": "error",
    "GLOG_minloglevel": "2",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "WANDB_SILENT": "true",
}


class _ErrorsOnly(logging.Filter):
    """A filter, not a level: DeepSpeed and transformers set their loggers' levels again when they are
    imported."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR


def quiet_libraries() -> None:
    """Let through only the errors of the libraries underneath, and not their deprecation or user warnings:
    the user of a config file can act on neither. Imports none of them. What is already set in the environment
    stays as it is.

    Call it before these libraries are imported; calling it again changes nothing.
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.ERROR)  # children inherit a level, not a filter
        if not any(isinstance(f, _ErrorsOnly) for f in logger.filters):
            logger.addFilter(_ErrorsOnly())
    for module in _MODULES:
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=rf"{re.escape(module)}(\.|$)")
