"""Starting Triton kernels: on which device, and inside a trace."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Grid = Sequence[int]

_tracing = threading.local()
_launched: dict[str, Any] = {}


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """In here launches become nodes of the graph that torch.compile is tracing."""
    before = getattr(_tracing, "on", False)
    _tracing.on = True
    try:
        yield
    finally:
        _tracing.on = before


def launch(kernel: Any, grid: Grid, anchor: Tensor, *args: Any, **meta: Any) -> None:
    """Run `kernel` on the device of `anchor`, on that device's current stream.

    Nothing is launched for an empty grid.
    """
    if 0 in grid:
        return
    if getattr(_tracing, "on", False):
        torch.library.wrap_triton(kernel)[tuple(grid)](*args, **meta)
        return
    _launched[kernel.__name__] = kernel
    if anchor.is_cuda and anchor.get_device() != torch.cuda.current_device():
        with torch.cuda.device(anchor.device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)


def compiled_kernels() -> list[tuple[str, Any]]:
    """Every kernel that this process has compiled so far, by name; one may be there many times."""
    found = []
    for name, kernel in _launched.items():
        for cache, *_ in getattr(kernel, "device_caches", {}).values():
            found += [(name, compiled) for compiled in cache.values()]
    return found
