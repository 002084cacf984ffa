"""Import of what a user names as ``module:Class``: an objective, a callback, a metric, a function of the bench."""

from __future__ import annotations

import importlib
from typing import Any

from jepa_scale.utils.errors import InputError


def imported(path: str, key: str, form: str = "module:Class") -> Any:
    """Import the object that ``module:name`` names.

    Args:
        key: the key or flag that named it, for errors. form: how a name looks, for errors.

    Raises:
        InputError: there is no such module or name, or the module cannot import what it needs.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{key}: {path!r} cannot be imported ({error}); is the folder of {error.name!r} in PYTHONPATH?"
        ) from error
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{key}: {path!r} cannot be imported: {error}; give {form}") from error
