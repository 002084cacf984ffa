"""Suppression of other libraries' log messages, so that the output is that of the run."""

from __future__ import annotations

import logging
import os
import re
import warnings

_LOGGERS = (
    "DeepSpeed",
    "absl",
    "accelerate",
    "bitsandbytes",
    "comet_ml",
    "datasets",
    "filelock",
    "fsspec",
    "httpx",
    "huggingface_hub",
    "lm_eval",
    "matplotlib",
    "numexpr",
    "tensorboard",
    "torch.distributed",
    "torch.utils.flop_counter",
    "transformers",
    "urllib3",
    "wandb",
)
_MODULES = (  # not all of torch: the user needs torch.cuda's warning about an old driver
    "torch.autograd",
    "torch.distributed",
    "torch.optim",
    "torch.utils",
    "absl",
    "datasets",
    "deepspeed",
    "huggingface_hub",
    "lm_eval",
    "matplotlib",
    "tensorboard",
    "transformers",
    "wandb",
    "webdataset",
)
_ENVIRONMENT = {  # the libraries read these when they are imported
    "DATASETS_VERBOSITY": "error",
    "GLOG_minloglevel": "2",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "WANDB_SILENT": "true",
}


class _ErrorsOnly(logging.Filter):
    """Logging filter that passes only errors.

    A level would not be enough, because DeepSpeed and transformers set their loggers' levels when they are imported.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR


def quiet_libraries() -> None:
    """Suppress all log messages below errors, and deprecation and user warnings, of the libraries that a run uses.

    The user of a config file cannot act on these messages. The function imports none of the libraries, and keeps
    environment variables that are already set.

    Call it before the libraries are imported; a second call changes nothing.
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
