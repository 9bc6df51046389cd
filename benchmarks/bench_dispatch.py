"""What reaching a Python kernel costs: registered straight for a dispatch key, or as a triton_op.

    python benchmarks/bench_dispatch.py --json benchmarks/results/dispatch.json

The kernel does nothing, so that only the way to it is timed; CPU tensors, in turns, medians.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from resnet_fused import benchmark, cli
from resnet_fused.benchmark.measure import interleave

CALLS = 2000
CPU = torch.device("cpu")
NAMESPACE = "resnet_fused_dispatch"

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define("direct(Tensor input, Tensor scale) -> Tensor")


def main() -> int:
    """Time both, print the table, write JSON."""
    parser = argparse.ArgumentParser(prog="bench_dispatch.py", description="Cost of a call.")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    args = parser.parse_args()
    x, vector = torch.zeros(1, 4, 1, 1), torch.zeros(4)
    ways = ways_to_a_kernel()
    calls = {name: many(call, x, vector) for name, call in ways.items()}
    timings = interleave(calls, repeats=15, device=CPU, pause_s=0)
    microseconds = {name: timing.median_ms * 1e3 / CALLS for name, timing in timings.items()}
    rows = [[name, f"{value:.1f}"] for name, value in microseconds.items()]
    benchmark.print_table("one call", ("way", "µs"), rows, sys.stdout)
    about = {"environment": benchmark.environment(), "command": "bench_dispatch.py"}
    cli.write_json(args.json, {**about, "microseconds": microseconds})
    return 0


def ways_to_a_kernel() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The same function called as it is, and behind each kind of operator."""

    def kernel(input: Tensor, scale: Tensor) -> Tensor:
        return input.clone()

    _library.impl("direct", kernel, "CPU")
    make = torch.library.triton_op(f"{NAMESPACE}::as_triton_op", mutates_args=())
    direct = torch.ops.resnet_fused_dispatch.direct
    return {"no operator": kernel, "registered": direct, "triton_op": make(kernel)}


def many(call: Callable[[Tensor, Tensor], Tensor], x: Tensor, v: Tensor) -> Callable[[], None]:
    """So many calls in a row, without gradients."""

    def run() -> None:
        with torch.inference_mode():
            for _ in range(CALLS):
                call(x, v)

    return run


if __name__ == "__main__":
    sys.exit(main())
