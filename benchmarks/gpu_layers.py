"""Tables of one operator at all shapes of a network: time, rates, and the fraction of the floor.

Timed as a CUDA graph of several calls, on different tensors where the L2 cache would hold one
call's, so that neither Python nor the cache shows. An operator that is wrong gets no speed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import gpu_operators
import torch
from gpu_operators import Subject
from roofline import Ceilings, Layer

from resnet_fused import benchmark
from resnet_fused.benchmark import measure
from resnet_fused.benchmark.case import one_line

_REPEATS = 10
_L2_TIMES = 3  # what the tensors gone through are of the L2 cache
_MOST_COPIES = 64

Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One operator at one shape; without a time if it failed or is wrong."""

    operator: str
    layer: str
    count: int
    shape: str
    flops: int
    bytes: int
    floor_ms: float
    milliseconds: float | None = None
    library_conv_ms: float | None = None
    relative_error: float | None = None
    error_budget: float | None = None
    error: str | None = None

    @property
    def of_floor(self) -> float | None:
        """The floor's fraction of the time: 1 is as fast as the memory or the multipliers allow."""
        return None if self.milliseconds is None else self.floor_ms / self.milliseconds

    def to_dict(self) -> dict[str, Any]:
        """The fields, and the fraction of the floor."""
        return {**asdict(self), "of_floor": self.of_floor}


def measure_operator(
    operator: str, layers: Sequence[Layer], ceilings: Ceilings, device: torch.device, dtype: str
) -> list[Row]:
    """Time an operator at each distinct shape; what fails is recorded in its row."""
    return [
        _measure(subject, ceilings, device, dtype)
        for subject in gpu_operators.subjects(operator, layers)
    ]


def _measure(subject: Subject, ceilings: Ceilings, device: torch.device, dtype: str) -> Row:
    values: dict[str, Any] = {
        "operator": subject.operator,
        "layer": subject.layer.name,
        "count": subject.count,
        "shape": subject.shape,
        "flops": subject.flops,
        "bytes": subject.bytes,
        "floor_ms": 1e3 * subject.floor_s(ceilings),
    }
    try:
        with torch.no_grad():
            sets = argument_sets(subject, device, dtype)
            error, budget = gpu_operators.errors(subject, sets[0], dtype)
            values |= {"relative_error": error, "error_budget": budget}
            if not error <= budget:  # refuses NaN too
                return Row(**values, error=f"wrong: error {error:.1e}, budget {budget:.1e}")
            calls = [partial(gpu_operators.run, subject, arguments) for arguments in sets]
            values["milliseconds"] = time_calls(calls, device)
            if subject.operator == "conv_bn_act":
                alone = [partial(gpu_operators.convolution, arguments) for arguments in sets]
                values["library_conv_ms"] = time_calls(alone, device)
    except Exception as failure:  # a kernel that does not compile must not end the table
        return Row(**values, error=one_line(failure))
    return Row(**values)


def argument_sets(subject: Subject, device: torch.device, dtype: str) -> list[list[Any]]:
    """As many sets of arguments as it takes to leave the L2 cache behind."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    copies = min(_MOST_COPIES, math.ceil(_L2_TIMES * cache / subject.bytes))
    return [gpu_operators.arguments(subject, device, dtype, seed=i) for i in range(copies)]


def time_calls(calls: Sequence[Call], device: torch.device) -> float:
    """Median milliseconds of one of `calls`, which are made in turns."""

    def all_of_them() -> None:
        for call in calls:
            call()

    all_of_them()  # compiles, and lets the libraries choose
    torch.cuda.synchronize(device)
    replay = measure.recorded(all_of_them, device)
    timings = measure.interleave({"calls": replay}, repeats=_REPEATS, device=device)
    return timings["calls"].median_ms / len(calls)


def print_rows(rows: Sequence[Row], title: str) -> None:
    """The table of operators, with two columns more if there are convolutions among them."""
    header = ["operator", "ms", "GB/s", "of floor", "shape"]
    multiplies = any(row.flops for row in rows)
    if multiplies:
        header[2:2] = ["conv alone ms", "TFLOP/s"]
    table = []
    for row in rows:
        seconds = None if row.milliseconds is None else row.milliseconds / 1e3
        cells = [
            f"{row.operator} {_name(row)}",
            _text(row.milliseconds, ".3f"),
            _text(seconds and row.bytes / seconds / 1e9, ".0f"),
            _text(row.of_floor, ".0%"),
            row.error or row.shape,
        ]
        if multiplies:
            rate = _text(seconds and row.flops / seconds / 1e12, ".0f")
            cells[2:2] = [_text(row.library_conv_ms, ".3f"), rate]
        table.append(cells)
    benchmark.print_table(title, header, table, sys.stdout)


def _name(row: Row) -> str:
    return row.layer if row.count == 1 else f"{row.layer} +{row.count - 1}"


def _text(value: float | None, spec: str) -> str:
    return "-" if value is None else f"{value:{spec}}"
