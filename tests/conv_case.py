"""Convolutions for the library's own kernels: made, run, and held to the precision policy."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from activations import ACTS
from tolerance import Measured, assert_mean, measured_by_policy
from torch import Tensor

from resnet_fused.backends import native
from resnet_fused.backends.native_conv import (
    NativeConv,
    Program,
    Wired,
    multiplies_bf16,
    pack,
)

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
ALGORITHMS = ("direct", "winograd2", "winograd3", "winograd4", "winograd4_late")
INF, NAN = float("inf"), float("nan")
Size = int | tuple[int, int]


@dataclass(frozen=True)
class Case:
    """One convolution with everything a kernel may stumble over."""

    algorithm: str
    shape: tuple[int, int, int, int]
    outputs: int
    kernel: Size = 3
    stride: Size = 1
    padding: Size = 1
    dilation: Size = 1
    groups: int = 1
    residual: bool = True
    act: str = "relu"
    dtype: torch.dtype = torch.float32
    pairs: bool = False  # multiplies bfloat16

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Input, weight, scale and shift."""
        height, width = pair(self.kernel)
        return (
            torch.randn(self.shape).to(self.dtype).to(memory_format=torch.channels_last),
            torch.randn(self.outputs, self.shape[1] // self.groups, height, width).to(self.dtype),
            torch.rand(self.outputs) + 0.5,
            torch.randn(self.outputs),
        )

    def program(self, weight: Tensor, scale: Tensor, shift: Tensor) -> Program:
        """The kernel under test."""
        stride = pair(self.stride)
        geometry = (*stride, *pair(self.padding), *pair(self.dilation), self.groups)
        packed = pack(weight, scale, stride[0], self.groups, self.algorithm, pairs=self.pairs)
        conv = NativeConv(self.algorithm, packed, weight, scale, shift, geometry, ())
        return Program([(conv, Wired(0, 1 if self.residual else -1, self.act, 0.1))])

    def eager(
        self, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None
    ) -> Tensor:
        """The same by plain PyTorch, in the dtype of its arguments."""
        options = (self.stride, self.padding, self.dilation, self.groups)
        y = torch.conv2d(x, weight, None, *options)
        y = (y * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(x.dtype)
        return ACTS[self.act](y if residual is None else y + residual)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(N, K, H', W')."""
        ways = zip(
            self.shape[2:], *map(pair, (self.kernel, self.stride, self.padding, self.dilation)),
            strict=True,
        )  # fmt: skip
        height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in ways)
        return self.shape[0], self.outputs, height, width

    def check(self, change: Callable[[Tensor], Tensor] = lambda x: x, draws: int = 1) -> None:
        """Hold the kernel to the precision policy, for an input that `change` has seen."""
        rows = [row for _ in range(draws) if (row := self._measured(change)) is not None]
        if rows:
            assert_mean(rows, torch.empty(self.output_shape, dtype=self.dtype), what=str(self))

    def _measured(self, change: Callable[[Tensor], Tensor]) -> Measured | None:
        """One draw beside what the policy allows; None of a result without elements."""
        x, weight, scale, shift = self.tensors()
        x = change(x)
        residual = torch.randn(self.output_shape).to(self.dtype) if self.residual else None
        actual = self.program(weight, scale, shift)(x, residual)
        eager = self.eager(x, weight, scale, shift, residual)
        exact = [None if t is None else t.double() for t in (x, weight, scale, shift, residual)]
        reference = self.eager(*exact)  # type: ignore[arg-type]
        if (reference.isfinite() & ~eager.isfinite()).any() and self.dtype == torch.bfloat16:
            # oneDNN reads memory that it has not written, where images are narrow and the processor
            # has AMX (torch 2.13): PyTorch's other convolution stands in.
            with torch.backends.mkldnn.flags(enabled=False):
                eager = self.eager(x, weight, scale, shift, residual)
        sums = replace(self, act="none").eager(*exact)  # type: ignore[arg-type]
        finite = sums[sums.isfinite()]
        size = finite.abs().max().item() if finite.numel() else None
        assert actual.is_contiguous(memory_format=torch.channels_last) or actual.numel() == 0
        assert actual.shape == eager.shape
        if not actual.numel():
            return None
        return measured_by_policy(actual, eager, reference, "default", what=str(self), scale=size)


def pair(size: Size) -> tuple[int, int]:
    """Of height and width."""
    return size if isinstance(size, tuple) else (size, size)


def may_run_direct(dtype: torch.dtype) -> bool:
    """Whether this processor has direct convolution of a dtype."""
    return dtype == torch.float32 or multiplies_bf16()


def rounds(algorithm: str, stride: int) -> bool:
    """Whether an algorithm may round what it multiplies to bfloat16, on this processor."""
    exact_enough = algorithm in ("direct", "winograd2") or (algorithm, stride) == ("winograd3", 2)
    return exact_enough and multiplies_bf16()


def random_case(source: random.Random, dtype: torch.dtype) -> Case:
    possible = [a for a in ALGORITHMS if a != "direct" or may_run_direct(dtype)]
    algorithm = source.choice(possible)
    groups = source.choice([1, 1, 1, 2, 3])
    kernel, stride, dilation = 3, 1, 1
    if algorithm != "direct":
        stride = source.choice([1, 2])
    else:
        kernel = source.choice([1, 1, 2, 3, 5, 7])
        stride, dilation = source.choice([1, 1, 2, 3]), source.choice([1, 1, 2])
    channels = source.randint(1, 130 // groups)
    pairs = dtype == torch.bfloat16 and rounds(algorithm, stride)
    if algorithm != "direct":  # data may be bfloat16 where weights are not
        # Few channels are not rounded: resnet_fused/conv_choice.py.
        pairs = pairs and channels >= 16 and source.random() < 0.7
    reach = dilation * (kernel - 1)
    padding = source.randint(0, min(2, reach))
    least = max(1, reach + 1 - 2 * padding)
    return Case(
        algorithm,
        (
            source.choice([1, 2, 3]),
            groups * channels,
            source.randint(least, least + 16),
            source.randint(least, least + 16),
        ),
        groups * source.randint(1, 130 // groups),
        kernel, stride, padding, dilation, groups,
        source.random() < 0.5,
        source.choice(list(ACTS)),
        dtype,
        pairs,
    )  # fmt: skip


def random_narrow_groups(source: random.Random, dtype: torch.dtype) -> Case:
    channels = 16 * source.randint(1, 8)
    shape = source.choice([1, 2, 3]), channels, source.randint(1, 20), source.randint(1, 20)
    return Case(
        "grouped", shape, channels, 3, source.choice([1, 2]), source.randint(1, 2), 1,
        channels // source.choice([1, 2, 4, 8, 16]), source.random() < 0.5,
        source.choice(list(ACTS)), dtype,
    )  # fmt: skip


def random_strassen(source: random.Random, dtype: torch.dtype) -> Case:
    shape = (
        source.choice([1, 2, 3]), 32 * source.randint(1, 9), source.randint(1, 12),
        source.randint(1, 12),
    )  # fmt: skip
    return Case(
        "strassen", shape, 64 * source.randint(1, 3), 1, source.choice([1, 2]), 0, 1, 1,
        source.random() < 0.5, source.choice(list(ACTS)),
    )  # fmt: skip


def sweep(seed: int, count: int, dtype: torch.dtype = torch.float32) -> None:
    """Random cases; a failure names the case."""
    kinds = [random_case, random_narrow_groups]
    if dtype == torch.float32:
        kinds.append(random_strassen)
    for make in kinds:
        source = random.Random(seed)
        torch.manual_seed(seed)
        for _ in range(count):
            make(source, dtype).check()


SIZES = [(1, 1), (1, 2), (2, 3), (5, 5), (4, 4), (7, 7), (9, 1), (13, 6), (14, 14)]


def corners(height: int, width: int) -> list[tuple[int, int]]:
    return [(y, x) for y in (0, height // 2, height - 1) for x in (0, width // 2, width - 1)]


def run_with_isa(isa: str, code: str) -> None:
    """Run Python code in a process of its own, whose kernels use a lower instruction set."""
    if ISAS.index(isa) >= ISAS.index(native.isa()):
        pytest.skip(f"this CPU has {native.isa()}, which the other tests run on")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "RESNET_FUSED_CPU_ISA": isa},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
