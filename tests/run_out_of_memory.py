"""Runs an operation again and again while each of its allocations fails in turn.

A program of its own, since the allocations are made to fail by a preloaded library
(failing_allocations.cpp); test_out_of_memory.py runs it, a case at a time.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from conv_case import Case
from thread_case import fused_network, infer, picture, step
from torch import Tensor

from resnet_fused import fuse, unfuse
from resnet_fused.backends.native import isa

Results = dict[str, Tensor]
_ops = torch.ops.resnet_fused

CONVOLUTIONS = {
    "direct": Case("direct", (2, 36, 64, 64), 36),
    "winograd2": Case("winograd2", (2, 36, 64, 64), 36),
    "winograd3": Case("winograd3", (2, 36, 64, 64), 36, stride=2),
    "winograd4": Case("winograd4", (2, 36, 64, 64), 36),
    "winograd4_late": Case("winograd4_late", (2, 36, 64, 64), 36),
    "strassen": Case("strassen", (2, 64, 48, 48), 64, kernel=1, padding=0),
    "grouped": Case("grouped", (2, 32, 64, 64), 32, groups=4),
}


def convolution(name: str) -> Callable[[], Results]:
    """Packing and one call."""
    case = CONVOLUTIONS[name]
    x, weight, scale, shift = case.tensors()
    residual = torch.randn(case.output_shape).to(memory_format=torch.channels_last)
    return lambda: {"y": case.program(weight, scale, shift)(x, residual)}


def evaluation(dtype: torch.dtype) -> Callable[[], Results]:
    """A first call, which packs everything."""
    model, x = fused_network(dtype), picture(0, dtype)

    def run() -> Results:
        for tensor in model.state_dict().values():
            tensor.mul_(1)  # to the same values, which nothing can know that is kept
        return {"y": infer(model, x)}

    return run


def large_evaluation() -> Callable[[], Results]:
    """A call whose outputs come from the pool."""
    model, x = fused_network(), picture().repeat(2, 1, 3, 3)
    return lambda: {"y": infer(model, x)}


def training(memory: str, dtype: torch.dtype) -> Callable[[], Results]:
    """A step forward and back, from the same state every time."""
    model = fuse(unfuse(fused_network(dtype)), memory=memory)
    state, x = copy.deepcopy(model.state_dict()), picture(0, dtype)

    def run() -> Results:
        model.load_state_dict(state)
        return step(model, x)

    return run


def passes() -> Callable[[], Results]:
    """The operators beside convolutions, on outputs that come from the pool."""
    x = torch.randn(2, 64, 64, 64).to(memory_format=torch.channels_last)
    v = torch.rand(64) + 0.5

    def run() -> Results:
        return {
            "zeros": _ops._pool_zeros([2, 64, 64, 64], torch.float32),
            "clone": _ops._pool_clone(x[:, ::2]),
            "average": _ops._average_pixels(x),
            "pool": _ops._max_pool2d(x, [3, 3], [2, 2], [1, 1], [1, 1]),
            "affine": _ops.scale_shift_act(x, v, v, None, "relu", 0.0),
            "bn": _ops.bn_act(x, None, v, v, 1e-5, "relu", 0.0)[0],
        }

    return run


CASES: dict[str, Callable[[], Callable[[], Results]]] = {
    **{name: (lambda name=name: convolution(name)) for name in CONVOLUTIONS},  # type: ignore[misc]
    "evaluation": lambda: evaluation(torch.float32),
    "bfloat16 evaluation": lambda: evaluation(torch.bfloat16),
    "large evaluation": large_evaluation,
    "training": lambda: training("default", torch.float32),
    "training with low memory": lambda: training("low", torch.float32),
    "bfloat16 training": lambda: training("default", torch.bfloat16),
    "passes": passes,
}


KEEP_ALL = {*CONVOLUTIONS, "passes", "evaluation", "bfloat16 evaluation"}


def watch(allocations: ctypes.CDLL) -> None:
    """Tell the preloaded library whose allocations are meant."""
    for which, name in enumerate(("/_C_cpu", "/libc10.so")):
        places = [
            [int(number, 16) for number in line.split()[0].split("-")]
            for line in Path("/proc/self/maps").read_text().splitlines()
            if name in line
        ]
        begin, end = min(p[0] for p in places), max(p[1] for p in places)
        allocations.watch_code(which, ctypes.c_size_t(begin), ctypes.c_size_t(end))


def mapped(allocations: ctypes.CDLL) -> int:
    """What the library has mapped beside its idle memory, which it gives back here."""
    _ops._pool_release()
    return int(allocations.mapped_bytes())


def exhaust(
    run: Callable[[], Results], allocations: ctypes.CDLL, most: int, *, keeps_all: bool
) -> tuple[int, int]:
    """Let up to `most` allocations of an operation fail: each by itself, and with all after it.

    That nothing is lost is held where tensors come from torch alone. Where an operator's arguments
    are the library's own outputs, torch itself may lose them: unboxing takes them over one after
    the other, and forgets the rest when that fails (torch/csrc/stable/library.h).

    Returns:
        The allocations of one run, and how often it raised.
    """
    wanted, base = run(), mapped(allocations)
    allocations.arm(0, False)
    run()
    count, raised = allocations.disarm(), 0
    base = max(base, mapped(allocations))
    for number in range(1, count + 1, -(-count // most)):
        for goes_on in (False, True):
            allocations.arm(number, goes_on)
            try:
                results: Results | None = run()
            except (RuntimeError, MemoryError):
                results = None
            finally:
                allocations.disarm()
            if results is None:
                raised += 1
                results = run()
            assert results.keys() == wanted.keys()
            for name, value in wanted.items():
                assert torch.equal(results[name], value), f"allocation {number}: other {name}"
            del results
        left = mapped(allocations)
        if left > base:  # in cycles
            gc.collect()
            left = mapped(allocations)
        assert left <= base or not keeps_all, f"allocation {number}: {left - base} bytes are lost"
    return count, raised


def main(names: list[str]) -> None:
    """Run cases by name; a line for each."""
    allocations = ctypes.CDLL(os.environ["LD_PRELOAD"])
    allocations.mapped_bytes.restype = allocations.disarm.restype = ctypes.c_int64
    allocations.arm.argtypes = (ctypes.c_int64, ctypes.c_bool)
    isa()
    watch(allocations)
    torch.set_num_threads(2)
    most = int(os.environ.get("MOST_FAILURES", "100000"))
    for name in names:
        torch.manual_seed(0)
        count, raised = exhaust(CASES[name](), allocations, most, keeps_all=name in KEEP_ALL)
        print(f"{name}: {count} allocations, raised {raised}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))
