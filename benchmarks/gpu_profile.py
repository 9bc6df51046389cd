"""What the kernels of an operator take: ``gpu.py --profile conv_bn_act``, or a layer's name.

For each kernel its time, registers, spilled registers, shared memory and the occupancy that they
admit; above them the operator's own time, beside its floor. The kernels come from PyTorch's
profiler, those of libraries too. Where it sees none (it needs CUPTI, which some machines refuse)
they are what Triton compiled, without a time each. What was spilled only Triton knows.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gpu_layers
import gpu_operators
import torch
from gpu_operators import Subject
from roofline import Ceilings, Layer

from resnet_fused import benchmark
from resnet_fused.benchmark import BenchmarkError

_CALLS = 10
# By NVIDIA's occupancy calculator, for compute capability 8.0 to 9.0.
_REGISTER_UNIT = 8  # a thread's registers are rounded up to
_REGISTERS = 65536  # of a multiprocessor
_RESERVED_SHARED = 1024  # bytes a block
_MOST_BLOCKS = 32
_WARP = 32
_NAME_WIDTH = 60  # of a kernel; those of libraries go on for lines


@dataclass(frozen=True)
class Kernel:
    """One kernel of an operator's call; None is what nobody could tell."""

    name: str
    microseconds: float | None  # of all its launches in one call
    threads: int | None = None
    registers: int | None = None
    shared_bytes: int | None = None


def profile(
    name: str, layers: Sequence[Layer], ceilings: Ceilings, device: torch.device, dtype: str
) -> None:
    """Print the kernels of an operator at every shape, or of one layer's convolution.

    Raises:
        BenchmarkError: `name` is neither.
    """
    found = subjects(name, layers)
    rows = []
    for subject in found:
        with torch.no_grad():
            rows += _rows(subject, ceilings, device, dtype)
    header = (
        "layer", "us", "floor us", "of floor", "TFLOP/s", "GB/s", "regs", "spills", "shared KiB",
        "occupancy", "kernel",
    )  # fmt: skip
    benchmark.print_table(f"{name}, {dtype}", header, rows, sys.stdout)
    if _compiled_kernels() is None:
        print("spills are unknown: resnet_fused.backends.triton.launch is not there")


def subjects(name: str, layers: Sequence[Layer]) -> list[Subject]:
    """An operator at each distinct shape, or one convolution of the network.

    Raises:
        BenchmarkError: `name` is neither.
    """
    if name in gpu_operators.OPERATORS:
        return gpu_operators.subjects(name, layers)
    for layer in layers:
        if layer.name == name:
            return [Subject("conv_bn_act", layer)]
    raise BenchmarkError(
        f"unknown name {name!r}; there are {', '.join(gpu_operators.OPERATORS)} and resnet50's "
        "convolutions, such as layer1.0.conv1"
    )


def _rows(
    subject: Subject, ceilings: Ceilings, device: torch.device, dtype: str
) -> list[list[str]]:
    """A row for the whole operator, and one for each of its kernels."""
    before = [id(compiled) for _, compiled in _compiled_kernels() or []]
    sets = gpu_layers.argument_sets(subject, device, dtype)
    calls = [partial(gpu_operators.run, subject, arguments) for arguments in sets]
    seconds = gpu_layers.time_calls(calls, device) / 1e3
    floor = subject.floor_s(ceilings)
    whole = [
        subject.name,
        f"{1e6 * seconds:.1f}",
        f"{1e6 * floor:.1f}",
        f"{floor / seconds:.0%}",
        f"{subject.flops / seconds / 1e12:.0f}",
        f"{subject.bytes / seconds / 1e9:.0f}",
        *[""] * 4,
        subject.shape,
    ]
    kernels = traced_kernels(calls, device) or _known_to_triton(before)
    properties = torch.cuda.get_device_properties(device)
    return [whole, *(_kernel_row(kernel, properties) for kernel in kernels)]


def _kernel_row(kernel: Kernel, properties: Any) -> list[str]:
    spills = {
        compiled.n_spills
        for name, compiled in _compiled_kernels() or []
        if name == kernel.name and compiled.n_regs == kernel.registers
    }
    known = kernel.threads and kernel.registers and kernel.shared_bytes is not None
    filled = occupancy(kernel, properties) if known else None
    shared = None if kernel.shared_bytes is None else kernel.shared_bytes / 1024
    return [
        "",
        _text(kernel.microseconds, ".1f"),
        *[""] * 4,
        _text(kernel.registers, "d"),
        _text(max(spills, default=None), "d"),
        _text(shared, ".1f"),
        _text(filled, ".0%"),
        kernel.name[:_NAME_WIDTH],
    ]


def traced_kernels(calls: Sequence[Callable[[], object]], device: torch.device) -> list[Kernel]:
    """The kernels of one call, the longest first; empty where the profiler sees none."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for i in range(_CALLS):
            calls[i % len(calls)]()
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return kernels_of(json.loads(path.read_text()), _CALLS)


def kernels_of(trace: dict[str, Any], calls: int) -> list[Kernel]:
    """The kernels in a trace of so many calls, each with its time in one of them."""
    events = [e for e in trace["traceEvents"] if e.get("cat") == "kernel"]
    found: dict[str, Kernel] = {}
    taken: dict[str, float] = {}
    for event in events:
        details, name = event.get("args", {}), event["name"]
        taken[name] = taken.get(name, 0.0) + event["dur"] / calls
        block = details.get("block")
        found[name] = Kernel(
            name,
            taken[name],
            block and block[0] * block[1] * block[2],
            details.get("registers per thread"),
            details.get("shared memory"),
        )
    return sorted(found.values(), key=lambda k: -taken[k.name])


def occupancy(kernel: Kernel, properties: Any) -> float:
    """The fraction of a multiprocessor's threads that a kernel's blocks fill, if there are enough.

    Args:
        kernel: with its threads, registers and shared memory known.
        properties: as ``torch.cuda.get_device_properties`` gives them.
    """
    assert kernel.threads and kernel.registers and kernel.shared_bytes is not None
    warp, most = properties.warp_size, properties.max_threads_per_multi_processor
    threads = -(-kernel.threads // warp) * warp
    registers = -(-kernel.registers // _REGISTER_UNIT) * _REGISTER_UNIT * threads
    shared = kernel.shared_bytes + _RESERVED_SHARED
    blocks = min(
        most // threads,
        _REGISTERS // registers,
        properties.shared_memory_per_multiprocessor // shared,
        _MOST_BLOCKS,
    )
    return blocks * threads / most


def _compiled_kernels() -> list[tuple[str, Any]] | None:
    """What Triton has compiled in this process; None without the library's Triton backend."""
    try:
        from resnet_fused.backends.triton.launch import compiled_kernels
    except ImportError:
        return None
    return compiled_kernels()


def _known_to_triton(before: Sequence[int]) -> list[Kernel]:
    """What Triton has compiled beside the kernels with these identities."""
    return [
        Kernel(name, None, _WARP * c.metadata.num_warps, c.n_regs, c.metadata.shared)
        for name, c in _compiled_kernels() or []
        if id(c) not in before
    ]


def _text(value: float | None, spec: str) -> str:
    return "-" if value is None else f"{value:{spec}}"
