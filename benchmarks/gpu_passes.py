"""The compiled CUDA kernels one by one at ResNet-50's shapes: time, rate, and what a call costs.

    python benchmarks/gpu_passes.py [--batch-size 256] [--json FILE]

Half operators (statistics, normalisation, the two passes of backward), which gpu.py's tables time
together, and the pool behind the stem beside eager PyTorch's. Timed with events over tensors that
no cache holds; the rate counts what has to cross memory. A call's cost is the host's, for a tiny
tensor.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import resnet_fused  # noqa: F401  (registers the operators)
from resnet_fused import benchmark

SHAPES = [
    (64, 112), (256, 56), (64, 56), (512, 28), (128, 28), (1024, 14), (256, 14), (2048, 7), (512, 7)
]  # fmt: skip
WINDOW = [3, 3, 2, 2, 1, 1, 1, 1]
PAIRS = [WINDOW[i : i + 2] for i in (0, 2, 4, 6)]
_LEAST_COPIES = 4
_LEAST_BYTES = 200 << 20  # of them; an H200's L2 cache has 50 MiB
_ROUNDS = 12

Call = Callable[[int], Any]


def images(batch: int, channels: int, size: int) -> list[Tensor]:
    shape = (batch, channels, size, size)
    each = 2 * batch * channels * size * size
    copies = max(_LEAST_COPIES, _LEAST_BYTES // each) if batch > 1 else _LEAST_COPIES
    made = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    return [t.to(memory_format=torch.channels_last) for t in made]


def passes(x: list[Tensor]) -> Iterator[tuple[str, int, Call]]:
    """Name, tensors that are moved, and the call with one of the copies."""
    ops, none = torch.ops.resnet_fused, (None, None)
    mean, var = ops.batch_statistics(x[0])
    vectors, rest = (mean, var, torch.ones_like(mean), torch.zeros_like(mean)), (1e-5, "relu", 0.0)
    g, y = x[1:] + x[:1], x[2:] + x[:2]
    yield "batch_statistics", 1, lambda i: ops.batch_statistics(x[i])
    yield "normalize_act", 2, lambda i: ops.normalize_act(x[i], None, *vectors, *rest)
    yield "normalize_act, add", 3, lambda i: ops.normalize_act(x[i], g[i], *vectors, *rest)
    yield (
        "backward_sums",
        2,
        lambda i: ops.bn_act_backward_sums(g[i], x[i], *none, *vectors, *rest, False),
    )
    yield (
        "backward_sums, add",
        4,
        lambda i: ops.bn_act_backward_sums(g[i], x[i], None, y[i], *vectors, *rest, True),
    )
    yield (
        "backward_input",
        3,
        lambda i: ops.bn_act_backward_input(g[i], x[i], *vectors, mean, var, *rest, 1000),
    )
    yield "copy", 2, lambda i: x[i].clone()


def pools(x: list[Tensor]) -> Iterator[tuple[str, float, Call]]:
    ops, aten = torch.ops.resnet_fused, torch.ops.aten
    mean, var = ops.batch_statistics(x[0])
    rest = ([mean, var, torch.ones_like(mean), torch.zeros_like(mean)], 1e-5, "relu", 0.0, WINDOW)
    y, places = ops._train_pool(x[0], *rest)
    grads = [torch.randn_like(y) for _ in x]
    indices = aten.max_pool2d_with_indices(x[0], *PAIRS)[1]
    yield "max_pool", 1.25, lambda i: ops._max_pool2d(x[i], *PAIRS)
    yield "max_pool, eager", 1.25, lambda i: aten.max_pool2d(x[i], *PAIRS)
    yield "train_pool", 1.375, lambda i: ops._train_pool(x[i], *rest)
    yield "train_pool_sums", 1.375, lambda i: ops._train_pool_sums(grads[i], places, x[i], *rest)
    yield "max_unpool", 1.375, lambda i: ops._max_unpool(grads[i], places, x[i], WINDOW)
    yield (
        "max_unpool, eager",
        1.375,
        lambda i: aten.max_pool2d_with_indices_backward(grads[i], x[i], *PAIRS, False, indices),
    )


def milliseconds(call: Call, copies: int) -> float:
    """The median of several rounds over the copies."""
    for i in range(copies):
        call(i)
    times = []
    for _ in range(_ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        begin.record()
        for i in range(copies):
            call(i)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / copies)
    return sorted(times)[_ROUNDS // 2]


def host_microseconds(call: Call, calls: int = 300) -> float:
    """Until the call returns, without waiting for the GPU."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call(0)
    spent = time.perf_counter() - begin
    torch.cuda.synchronize()
    return spent / calls * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    tiny = images(1, 64, 7)
    for name, _, call in [*passes(tiny), *pools(tiny)]:
        call(0)
        rows.append({"pass": name, "host_us": round(host_microseconds(call), 1)})
        print(f"{name:22} {rows[-1]['host_us']:7.1f} us a call")
    for channels, size in SHAPES:
        x = images(args.batch_size, channels, size)
        subjects: list[tuple[str, float, Call]] = list(passes(x))
        if size == SHAPES[0][1]:
            subjects += pools(x)
        for name, tensors, call in subjects:
            ms = milliseconds(call, len(x))
            rate = tensors * x[0].nbytes / ms / 1e9
            row = {"pass": name, "shape": [channels, size], "ms": round(ms, 4)}
            rows.append({**row, "tb_per_s": round(rate, 3)})
            print(f"{name:22} {channels:5} {size:4} {ms:8.4f} ms {rate:6.2f} TB/s", flush=True)
        del x, subjects, call
    if args.json:
        args.json.write_text(json.dumps({"environment": benchmark.environment(), "rows": rows}))


if __name__ == "__main__":
    main()
