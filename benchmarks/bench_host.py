"""What a step costs before the GPU has anything to do: fused, and as eager PyTorch runs it.

    python benchmarks/bench_host.py --json benchmarks/results/host_cost.json

Small batches wait for Python and the dispatcher, not for the GPU. Here tiny CPU tensors take the
way of CUDA ones, and Triton's launches do all but the call of the driver; PyTorch's own operators
run as the CPU kernels, which for so few numbers cost less than a launch does. In turns, medians.
"small training" is what runs below the sizes of support.py, "training" what runs above.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import resnet_fused
from resnet_fused import benchmark, cli
from resnet_fused.backends.triton import support
from resnet_fused.benchmark.measure import interleave
from resnet_fused.models.blocks import Bottleneck
from resnet_fused.modules.conv_chain import ConvChain
from resnet_fused.ops import gpu, gpu_choice

CALLS = 300
CPU = torch.device("cpu")


class Driver:
    """Stands in for CUDA's."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Compiled:
    """A kernel whose launch does nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *args: Any) -> None:
        return None

    def run(self, *args: Any) -> None:
        return None


def _compile(self: Any, key: Any, signature: Any, device: int, *args: Any) -> _Compiled:
    kernel = _Compiled()
    self.device_caches[device][0][key] = kernel
    return kernel


def take_the_gpus_place() -> torch.library.Library:
    """From here on CPU tensors go where CUDA tensors would."""
    triton.runtime.driver._active = Driver()  # type: ignore[attr-defined]
    JITFunction._do_compile = _compile  # type: ignore[method-assign]
    support.on_gpu = lambda tensor: True
    support._unsupported = lambda device: None  # type: ignore[assignment]
    support.architecture = lambda device: 90  # type: ignore[assignment]
    ConvChain._may_run_at_once = lambda self, input, modules: False  # type: ignore[method-assign]
    gpu_choice._measured = lambda device: {}  # type: ignore[assignment]
    library = torch.library.Library("resnet_fused", "IMPL")
    for name, implementation in gpu.implementations().items():
        library.impl(name, implementation, "CPU", allow_override=True)
    return library


class Step(nn.Module):
    """conv → BN (→ + input) → relu."""

    def __init__(self, *, adds: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 1, bias=False)
        self.bn = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.adds = adds

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return self.relu(y + x if self.adds else y)


class PreAct(nn.Module):
    """BN → relu, in front of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.bn(x))
        return y


def main() -> int:
    """Time every step fused and not, print the table, write JSON."""
    parser = argparse.ArgumentParser(prog="bench_host.py", description="Cost before a launch.")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    library = take_the_gpus_place()
    found = []
    for name, plain in (
        ("conv-bn-relu", Step(adds=False)),
        ("conv-bn-add-relu", Step(adds=True)),
        ("bn-relu", PreAct()),
        ("bottleneck block", Bottleneck(64, 16)),
        ("ResNet-20", resnet_fused.models.resnet20()),
    ):
        for mode, least in (("evaluation", 0), ("training", 0), ("small training", 1 << 30)):
            support.LEAST_BLOCK_BYTES = support.LEAST_STEP_BYTES = least
            eager, fused = microseconds(plain, training=mode != "evaluation")
            found.append({"step": name, "mode": mode, "eager_us": eager, "fused_us": fused})
    rows = [[*map(str, row[:2]), *(f"{v:.1f}" for v in row[2:])] for row in map(_values, found)]
    header = ("step", "mode", "eager µs", "fused µs")
    benchmark.print_table("one call, nothing launched", header, rows, sys.stdout)
    about = {"environment": benchmark.environment(), "command": "bench_host.py"}
    cli.write_json(args.json, {**about, "steps": found})
    library._destroy()
    return 0


def _values(row: dict[str, Any]) -> list[Any]:
    return list(row.values())


def microseconds(plain: nn.Module, *, training: bool) -> tuple[float, float]:
    """Of one call of a model as it is, and fused."""
    network = not isinstance(plain, (Step, PreAct, Bottleneck))
    x = torch.randn(2, *((3, 4, 4) if network else (64, 2, 2))).to(
        memory_format=torch.channels_last
    )
    plain.to(memory_format=torch.channels_last).train(training)  # type: ignore[call-overload]
    calls = {
        "eager": many(plain, x, training=training),
        "fused": many(resnet_fused.fuse(plain), x, training=training),
    }
    timings = interleave(calls, repeats=15, device=CPU, pause_s=0)
    eager, fused = (timings[name].median_ms * 1e3 / CALLS for name in calls)
    return eager, fused


def many(model: nn.Module, x: Tensor, *, training: bool) -> Callable[[], None]:
    """So many calls in a row, in training with backward."""

    def run() -> None:
        with torch.set_grad_enabled(training):
            for _ in range(CALLS):
                y = model(x)
                if training:
                    y.backward(y)

    return run


if __name__ == "__main__":
    sys.exit(main())
