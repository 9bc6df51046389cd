"""Starting Triton kernels: on which device, and inside a trace."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

Grid = Sequence[int]
T = TypeVar("T")

_THREADS = 8  # that compile at once; beyond, they wait for Python's lock
_TRIES = 8

_mode = threading.local()
_launched: dict[str, Any] = {}


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """In here launches become nodes of the graph that torch.compile is tracing."""
    with _in_mode("trace"):
        yield


@contextlib.contextmanager
def compiling_ahead() -> Iterator[None]:
    """In here kernels are compiled, several at once, and not launched; at the end all are there.

    One that does not compile raises where it is launched.
    """
    with (
        _Compilers(min(_THREADS, os.cpu_count() or 1)) as threads,
        triton.AsyncCompileMode(threads, ignore_errors=True),
        _in_mode("compile"),
    ):
        yield


class _Compilers(ThreadPoolExecutor):
    """Threads that compile, and do so again where only their meeting in the parser was at fault.

    All threads of CPython 3.11's ``ast.parse`` count one depth of recursion, and raise SystemError
    if it is another one at their end (python/cpython#106905).
    """

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        def run() -> T:
            for _ in range(_TRIES - 1):
                with contextlib.suppress(SystemError):
                    return fn(*args, **kwargs)
            return fn(*args, **kwargs)

        return super().submit(run)


@contextlib.contextmanager
def _in_mode(name: str) -> Iterator[None]:
    before = getattr(_mode, "name", None)
    _mode.name = name
    try:
        yield
    finally:
        _mode.name = before


def launch(kernel: Any, grid: Grid, anchor: Tensor, *args: Any, **meta: Any) -> None:
    """Run `kernel` on the device of `anchor`, on that device's current stream.

    Nothing is launched for an empty grid.
    """
    if 0 in grid:
        return
    mode = getattr(_mode, "name", None)
    if mode == "trace":
        torch.library.wrap_triton(kernel)[tuple(grid)](*args, **meta)
        return
    _launched[kernel.__name__] = kernel
    run = kernel[grid] if mode is None else functools.partial(kernel.warmup, grid=grid)
    if anchor.is_cuda and anchor.get_device() != torch.cuda.current_device():
        with torch.cuda.device(anchor.device):
            run(*args, **meta)
    else:
        run(*args, **meta)


def compiled_kernels() -> list[tuple[str, Any]]:
    """Every kernel that this process has compiled so far, by name; one may be there many times."""
    found = []
    for name, kernel in _launched.items():
        for cache, *_ in getattr(kernel, "device_caches", {}).values():
            found += [(name, k) for k in cache.values() if isinstance(k, CompiledKernel)]
    return found
