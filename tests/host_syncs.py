"""Counts what would make the host wait for a GPU, on a CPU: by the operators and methods that synchronize a CUDA stream."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {"_local_scalar_dense", "equal", "is_nonzero"}
"""Operators that give the host a number: item(), bool(), float() … of a tensor are the first."""
SIZED_BY_VALUES = {"nonzero", "argwhere", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive"}
SIZED_BY_VALUES |= {"unique_dim_consecutive", "bincount", "repeat_interleave"}
"""Operators whose result's size the device has to tell."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
"""With a mask they look for its nonzero elements."""
TO_HOST = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__}
FROM_HOST = {torch.tensor, torch.as_tensor}
"""With ``device=`` they copy, and wait for the copy."""

OWNERS = ("/jepa_scale/", "/deepspeed/")
HOST_SIDE = ("/jepa_scale/data/", "/jepa_scale/packing.py")
"""Makes batches, of tensors that are the host's on every machine."""
CPU_BRANCH = ("preemption.py", "agreed")
"""Reads a tensor at once if it is a CPU's, and only then; the test on a GPU runs the other branch."""


class HostSyncs:
    """``with HostSyncs() as found:`` counts, in ``found.counts``, by the innermost function of ours or of DeepSpeed's."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        """Operator and ``package/…/file.py:function`` → how often."""
        self._stack = ExitStack()

    def __enter__(self) -> HostSyncs:
        self._stack.enter_context(_Methods(self))
        self._stack.enter_context(_Operators(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def of(self, package: str) -> dict[tuple[str, str], int]:
        return {key: n for key, n in self.counts.items() if key[1].startswith(f"{package}/")}

    def note(self, what: str) -> None:
        frame: Any = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            file = code.co_filename
            if any(part in file for part in HOST_SIDE):
                return
            owner = next((part for part in OWNERS if part in file and "/tests/" not in file), None)
            if owner is not None:
                if (file.rpartition("/")[2], code.co_name) != CPU_BRANCH:
                    self.counts[what, f"{owner[1:-1]}/{file.rpartition(owner)[2]}:{code.co_name}"] += 1
                return
            frame = frame.f_back


class _Operators(TorchDispatchMode):
    def __init__(self, found: HostSyncs) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        waits = name in WAITING or name in SIZED_BY_VALUES
        if name == "repeat_interleave":
            waits = kwargs.get("output_size") is None
        if name in INDEXING:
            waits = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if waits:
            self._found.note(name)
        return func(*args, **kwargs)


class _Methods(TorchFunctionMode):
    def __init__(self, found: HostSyncs) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        copies = func in FROM_HOST and kwargs.get("device") is not None and not isinstance(args[0], torch.Tensor)
        sent = func is torch.Tensor.to and any(
            str(x) == "cpu" for x in (*args[1:], kwargs.get("device")) if type(x) is str
        )
        if func in TO_HOST or copies or sent:
            self._found.note(func.__name__)
        return func(*args, **kwargs)
