"""The library's own convolution kernels against float64, on every instruction set."""

from __future__ import annotations

import itertools
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tolerance import POLICY_ERROR, STRICT_FACTOR, assert_within_policy
from torch import Tensor

import resnet_fused
from resnet_fused.backends import native
from resnet_fused.backends.native_conv import (
    NativeConv,
    Program,
    Wired,
    multiplies_bf16,
    pack,
)
from resnet_fused.conv_choice import ConvProblem, candidates

pytestmark = pytest.mark.skipif(not native.available, reason=str(native.reason))

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
ALGORITHMS = ("direct", "winograd2", "winograd4")
INF, NAN = float("inf"), float("nan")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}


@dataclass(frozen=True)
class Case:
    """One convolution with everything a kernel may stumble over."""

    algorithm: str
    shape: tuple[int, int, int, int]
    outputs: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    residual: bool = True
    act: str = "relu"
    dtype: torch.dtype = torch.float32
    pairs: bool = False  # multiplies bfloat16

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Input, weight, scale and shift."""
        k = self.kernel
        return (
            torch.randn(self.shape).to(self.dtype).to(memory_format=torch.channels_last),
            torch.randn(self.outputs, self.shape[1] // self.groups, k, k).to(self.dtype),
            torch.rand(self.outputs) + 0.5,
            torch.randn(self.outputs),
        )

    def program(self, weight: Tensor, scale: Tensor, shift: Tensor) -> Program:
        """The kernel under test."""
        geometry = (
            *[self.stride] * 2, *[self.padding] * 2, *[self.dilation] * 2, self.groups,
        )  # fmt: skip
        packed = pack(weight, scale, self.stride, self.groups, self.algorithm, pairs=self.pairs)
        conv = NativeConv(self.algorithm, packed, weight, scale, shift, geometry, ())
        return Program([(conv, Wired(0, 1 if self.residual else -1, self.act, 0.1))])

    def eager(
        self, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None
    ) -> Tensor:
        """The same by plain PyTorch, in the dtype of its arguments."""
        options = (self.stride, self.padding, self.dilation, self.groups)
        y = torch.conv2d(x, weight, None, *options)
        y = (y * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(x.dtype)
        return ACTIVATIONS[self.act](y if residual is None else y + residual)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(N, K, H', W')."""
        reach = self.dilation * (self.kernel - 1) + 1
        size = [(n + 2 * self.padding - reach) // self.stride + 1 for n in self.shape[2:]]
        return self.shape[0], self.outputs, size[0], size[1]

    def check(self, change: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """Hold the kernel to the precision policy, for an input that `change` has seen."""
        x, weight, scale, shift = self.tensors()
        x = change(x)
        residual = torch.randn(self.output_shape).to(self.dtype) if self.residual else None
        actual = self.program(weight, scale, shift)(x, residual)
        eager = self.eager(x, weight, scale, shift, residual)
        exact = [None if t is None else t.double() for t in (x, weight, scale, shift, residual)]
        reference = self.eager(*exact)  # type: ignore[arg-type]
        sums = replace(self, act="none").eager(*exact)  # type: ignore[arg-type]
        finite = sums[sums.isfinite()]
        size = finite.abs().max().item() if finite.numel() else None
        assert actual.is_contiguous(memory_format=torch.channels_last) or actual.numel() == 0
        if actual.numel():
            assert_within_policy(actual, eager, reference, "default", what=str(self), scale=size)
        else:
            assert actual.shape == eager.shape


KINDS = [("direct", False), ("winograd2", False), ("winograd4", False)]
"""Algorithms, and whether they multiply bfloat16."""
BF16_KINDS = [("direct", True), ("winograd2", True), ("winograd4", False), ("winograd2", False)]


def bf16_kinds() -> list[tuple[str, bool]]:
    """Those that this processor can run on bfloat16 data."""
    return [kind for kind in BF16_KINDS if not kind[1] or multiplies_bf16()]


def random_case(source: random.Random, dtype: torch.dtype) -> Case:
    algorithm, pairs = source.choice(KINDS if dtype == torch.float32 else bf16_kinds())
    groups = source.choice([1, 1, 1, 2, 3])
    kernel, stride, dilation = 3, 1, 1
    if algorithm == "winograd4":
        stride = source.choice([1, 2])
    elif algorithm == "direct":
        kernel = source.choice([1, 1, 2, 3, 5, 7])
        stride, dilation = source.choice([1, 1, 2, 3]), source.choice([1, 1, 2])
    reach = dilation * (kernel - 1)
    padding = source.randint(0, min(2, reach))
    least = max(1, reach + 1 - 2 * padding)
    return Case(
        algorithm,
        (
            source.choice([1, 2, 3]),
            groups * source.randint(1, 130 // groups),
            source.randint(least, least + 16),
            source.randint(least, least + 16),
        ),
        groups * source.randint(1, 130 // groups),
        kernel, stride, padding, dilation, groups,
        source.random() < 0.5,
        source.choice(list(ACTIVATIONS)),
        dtype,
        pairs,
    )  # fmt: skip


def random_narrow_groups(source: random.Random, dtype: torch.dtype) -> Case:
    channels = 16 * source.randint(1, 8)
    shape = source.choice([1, 2, 3]), channels, source.randint(1, 20), source.randint(1, 20)
    return Case(
        "grouped", shape, channels, 3, source.choice([1, 2]), source.randint(1, 2), 1,
        channels // source.choice([1, 2, 4, 8, 16]), source.random() < 0.5,
        source.choice(list(ACTIVATIONS)), dtype,
    )  # fmt: skip


def random_strassen(source: random.Random, dtype: torch.dtype) -> Case:
    shape = (
        source.choice([1, 2, 3]), 32 * source.randint(1, 9), source.randint(1, 12),
        source.randint(1, 12),
    )  # fmt: skip
    return Case(
        "strassen", shape, 64 * source.randint(1, 3), 1, source.choice([1, 2]), 0, 1, 1,
        source.random() < 0.5, source.choice(list(ACTIVATIONS)),
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


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_cases(dtype: torch.dtype, seed: int, poisoned: None) -> None:
    sweep(seed, 40, dtype)


@pytest.mark.parametrize("isa", ISAS[:-1])
def test_every_instruction_set(isa: str) -> None:
    if ISAS.index(isa) >= ISAS.index(native.isa()):
        pytest.skip(f"this CPU has {native.isa()}, which the other tests run on")
    code = "t.sweep(99, 120); t.sweep(99, 40, torch.bfloat16)"
    done = subprocess.run(
        [sys.executable, "-c", f"import torch, test_packed_conv as t; {code}"],
        env={**os.environ, "RESNET_FUSED_CPU_ISA": isa},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


SIZES = [(1, 1), (1, 2), (2, 3), (5, 5), (4, 4), (7, 7), (9, 1), (13, 6), (14, 14)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_edge_of_the_image(
    algorithm: str, padding: int, stride: int, size: tuple[int, int]
) -> None:
    if min(size) + 2 * padding < 3 or (algorithm == "winograd2" and stride == 2):
        pytest.skip("no such convolution")
    Case(algorithm, (2, 20, *size), 40, stride=stride, padding=padding).check()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("channels", [1, 2, 15, 16, 17, 33, 64, 130])
def test_channel_counts(algorithm: str, channels: int) -> None:
    for outputs in (1, 31, 32, 33, 100):
        Case(algorithm, (1, channels, 6, 9), outputs, act="silu").check()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_empty_batch(algorithm: str) -> None:
    Case(algorithm, (0, 16, 8, 8), 32).check()


GROUPED = [(16, 1), (32, 2), (16, 4), (48, 8), (64, 16)]  # channels, and those of a group


@pytest.mark.parametrize(("channels", "group"), GROUPED)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_groups(
    dtype: torch.dtype, padding: int, stride: int, channels: int, group: int
) -> None:
    """Every edge, and no value that is not finite beyond its group."""
    for size in SIZES:
        if min(size) + 2 * padding < 3:
            continue
        for value in (0.0, NAN, INF):

            def place(data: Tensor, value: float = value) -> Tensor:
                data[-1, 3, -1, -1] = value
                return data

            case = Case(
                "grouped", (2, channels, *size), channels, stride=stride, padding=padding,
                groups=channels // group, residual=value == 0.0, dtype=dtype,
            )  # fmt: skip
            with torch.backends.mkldnn.flags(enabled=dtype == torch.float32):
                case.check(place)


@pytest.mark.parametrize("pixels", [1, 2, 13, 14, 27, 28, 29, 57, 100])
@pytest.mark.parametrize("stride", [1, 2])
def test_strassen_pairs_of_tiles(stride: int, pixels: int) -> None:
    """Every count of pixels, and no value that is not finite in another pixel's outputs."""
    for value in (0.0, NAN, INF, -INF, 1e38):
        for at in {0, pixels // 2, pixels - 1}:

            def place(data: Tensor, at: int = at, value: float = value) -> Tensor:
                data[0, 40, 0, at * stride] = value
                return data

            width = (pixels - 1) * stride + 1
            Case(
                "strassen", (1, 64, 1, width), 128, kernel=1, stride=stride, padding=0,
                residual=value == 0.0, act="none",
            ).check(place)  # fmt: skip


def test_strassen_of_many_channels() -> None:
    Case("strassen", (1, 2048, 7, 7), 512, kernel=1, padding=0).check()
    Case("strassen", (2, 1024, 14, 14), 2048, kernel=1, stride=2, padding=0).check()


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_narrow_groups_with_every_activation(act: str) -> None:
    Case("grouped", (1, 32, 9, 11), 32, groups=8, act=act).check()


def corners(height: int, width: int) -> list[tuple[int, int]]:
    return [(y, x) for y in (0, height // 2, height - 1) for x in (0, width // 2, width - 1)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e-42, 1e37], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_that_are_not_finite(
    algorithm: str, value: float, stride: int, dtype: torch.dtype
) -> None:
    """NaN and infinities reach the outputs that eager PyTorch gives them, and no others; 1e37
    overflows in a Winograd transform, and not in the sum.
    """
    if algorithm == "winograd2" and stride == 2:
        pytest.skip("no such convolution")
    pairs = dtype == torch.bfloat16 and algorithm != "winograd4"
    if pairs and not multiplies_bf16():
        pytest.skip("this processor has no AVX512_BF16")
    for y, x in corners(9, 10):

        def place(data: Tensor, y: int = y, x: int = x) -> Tensor:
            data[-1, 5, y, x] = value
            return data

        for act in ("relu", "none"):
            Case(
                algorithm, (2, 18, 9, 10), 35, stride=stride, act=act, residual=False,
                dtype=dtype, pairs=pairs,
            ).check(place)  # fmt: skip


@pytest.mark.skipif(not multiplies_bf16(), reason="this processor has no AVX512_BF16")
@pytest.mark.parametrize(("channels", "kernel"), [(1, 3), (3, 7), (3, 11), (5, 3), (15, 5)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_windows_of_few_channels(channels: int, kernel: int, layout: torch.memory_format) -> None:
    """Odd channels are paired along the kernel's row: what follows the row is not read.

    (oneDNN reads it: its NaN reach further than float64's. So eager PyTorch runs without it.)
    """
    for value in (0.0, NAN, INF):
        for y, x in corners(12, 23):

            def place(data: Tensor, y: int = y, x: int = x, value: float = value) -> Tensor:
                data[-1, 0, y, x] = value
                return data.contiguous(memory_format=layout)

            for stride in (1, 2, 3):
                case = Case(
                    "direct", (2, channels, 12, 23), 40, stride=stride, residual=False,
                    kernel=kernel, padding=kernel // 2, dtype=torch.bfloat16, pairs=True,
                )  # fmt: skip
                with torch.backends.mkldnn.flags(enabled=False):
                    case.check(place)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_layouts_of_the_input(algorithm: str) -> None:
    """Sliced, misaligned, contiguous, transposed and expanded inputs are read as they are."""

    def sliced(x: Tensor) -> Tensor:
        wide = torch.randn(x.shape[0], x.shape[1] + 3, x.shape[2] + 2, x.shape[3] + 1)
        return wide.to(memory_format=torch.channels_last)[:, 1:-2, 1:-1, 1:]

    def misaligned(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        flat = torch.randn(x.numel() + 1)[1:]
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)

    changes: list[Callable[[Tensor], Tensor]] = [
        sliced,
        misaligned,
        lambda x: x.contiguous(),
        lambda x: x.transpose(2, 3),
        lambda x: x[:1, :, :1].expand(2, -1, 8, -1),
    ]
    kinds = [(torch.float32, False)]
    if algorithm != "winograd4" and multiplies_bf16():
        kinds.append((torch.bfloat16, True))
    for kernel, padding in ((3, 1), (1, 0)):
        if kernel == 1 and algorithm != "direct":
            continue
        for (dtype, pairs), change in itertools.product(kinds, changes):
            Case(
                algorithm, (2, 24, 8, 8), 33, kernel=kernel, padding=padding,
                dtype=dtype, pairs=pairs,
            ).check(lambda x, f=change: f(x).to(x.dtype))  # fmt: skip


OTHERS = {  # algorithms that take other convolutions
    "grouped": lambda shape: Case("grouped", shape, shape[1], groups=shape[1] // 8),
    "strassen": lambda shape: Case("strassen", shape, 320, kernel=1, padding=0),
}


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, *OTHERS])
@pytest.mark.parametrize("shape", [(3, 96, 13, 14), (1, 288, 7, 7)], ids=str)
def test_same_bits_for_any_thread_count(algorithm: str, shape: tuple[int, ...]) -> None:
    make = OTHERS.get(algorithm, lambda shape: Case(algorithm, shape, 288))
    case = make(shape)  # type: ignore[no-untyped-call]
    x, weight, scale, shift = case.tensors()
    residual = torch.randn(case.output_shape)
    program = case.program(weight, scale, shift)
    expected = program(x, residual)
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        for _ in range(20):
            assert torch.equal(program(x, residual), expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_workspace_does_not_grow_with_the_batch(algorithm: str) -> None:
    """What a call leaves in the pool beside its output is at most 4 MiB a thread."""
    torch.set_num_threads(2)
    kept = []
    for batch in (4, 32):
        case = Case(algorithm, (batch, 128, 20, 20), 128, residual=False)
        x, weight, scale, shift = case.tensors()
        program = case.program(weight, scale, shift)
        torch.ops.resnet_fused._pool_release()
        output = program(x, None)
        kept.append(torch.ops.resnet_fused._pool_idle_bytes())
        del output
    assert kept[1] <= kept[0] + (1 << 20)
    assert max(kept) <= 2 * 4 << 20


@pytest.mark.parametrize("channels", [64, 256, 512, 1024, 2048])
@pytest.mark.parametrize(
    ("algorithm", "stride", "kernel"),
    [("winograd2", 1, 3), ("winograd4", 1, 3), ("winograd4", 2, 3), ("direct", 1, 1)],
)
def test_root_mean_square_error(algorithm: str, stride: int, kernel: int, channels: int) -> None:
    """What the precision policy is defined by: 3e-6, and where strict admits it 1.25 times eager's
    own error.
    """
    case = Case(
        algorithm, (2, channels, 14, 14), 64, kernel, stride, kernel // 2,
        act="none", residual=False,
    )  # fmt: skip
    x, weight, scale, shift = case.tensors()
    exact = case.eager(*(t.double() for t in (x, weight, scale, shift)), None)

    def error(y: Tensor) -> float:
        return ((y - exact).square().mean() / exact.square().mean()).sqrt().item()

    ours = error(case.program(weight, scale, shift)(x, None))
    shape = ConvProblem(
        2, channels, (14, 14), 64, (kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2, (1, 1), 1
    )
    if algorithm in candidates(shape, "default"):
        assert ours <= POLICY_ERROR
    if algorithm in candidates(shape, "strict"):
        assert ours <= STRICT_FACTOR * error(case.eager(x, weight, scale, shift, None))


# ---- blocks --------------------------------------------------------------------------------------


def block(batch: int, channels: int, size: int) -> tuple[Tensor, list[Case], list[Wired]]:
    """A bottleneck with a projection: 1x1, 3x3, 1x1 + shortcut."""
    x = torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last)
    middle, wide = channels // 2, channels * 2
    shape = (batch, channels, size, size)
    inner = (batch, middle, size, size)
    cases = [
        Case("direct", shape, middle, kernel=1, padding=0, residual=False),
        Case("winograd4", inner, middle, residual=False),
        Case("direct", shape, wide, kernel=1, padding=0, act="none", residual=False),
        Case("direct", inner, wide, kernel=1, padding=0),
    ]
    wiring = [
        Wired(0, -1, "relu", 0.0),
        Wired(2, -1, "relu", 0.0),
        Wired(0, -1, "none", 0.0),
        Wired(3, 4, "relu", 0.0),
    ]
    return x, cases, wiring


@pytest.mark.parametrize(("batch", "channels", "size"), [(1, 24, 9), (0, 24, 9), (5, 64, 80)])
def test_block_in_one_call_is_the_same_as_its_steps(batch: int, channels: int, size: int) -> None:
    """Also where a batch is cut into several passes (batch 5: two, two and one image)."""
    x, cases, wiring = block(batch, channels, size)
    convs, values = [], [x, None]
    for case, wired in zip(cases, wiring, strict=True):
        _, weight, scale, shift = case.tensors()
        single = case.program(weight, scale, shift)
        geometry = (*[case.stride] * 2, *[case.padding] * 2, 1, 1, 1)
        packed = pack(weight, scale, 1, 1, case.algorithm)
        convs.append(NativeConv(case.algorithm, packed, weight, scale, shift, geometry, ()))
        residual = None if wired.residual < 0 else values[wired.residual]
        values.append(single(values[wired.input], residual))  # type: ignore[arg-type]
    together = Program(list(zip(convs, wiring, strict=True)))(x)
    assert torch.equal(together, values[-1])  # type: ignore[arg-type]


# ---- hostile arguments ---------------------------------------------------------------------------


def valid() -> dict[str, object]:
    x, weight = torch.randn(1, 16, 8, 8), torch.randn(32, 16, 3, 3)
    return {
        "input": x,
        "residual": None,
        "packed": [pack(weight, None, 1, 1, "direct")],
        "weights": [weight],
        "scales": [torch.ones(32)],
        "shifts": [torch.zeros(32)],
        "steps": [0, -1, 1, 1, 1, 1, 1, 1, 1],
        "algorithms": ["direct"],
        "acts": ["relu"],
        "negative_slopes": [0.0],
        "blocks": [1],
    }


def steps(**changes: int) -> list[int]:
    names = ["input", "residual", "stride", "s", "padding", "p", "dilation", "d", "groups"]
    numbers = dict(zip(names, [0, -1, 1, 1, 1, 1, 1, 1, 1], strict=True))
    return list((numbers | changes).values())


HOSTILE: dict[str, tuple[str, object]] = {
    "input has one dimension": ("input", torch.zeros(16)),
    "input is float64": ("input", torch.zeros(1, 16, 8, 8, dtype=torch.float64)),
    "input is bfloat16": ("input", torch.zeros(1, 16, 8, 8, dtype=torch.bfloat16)),
    "input has other channels": ("input", torch.zeros(1, 15, 8, 8)),
    "input is smaller than the kernel": ("input", torch.zeros(1, 16, 8, 0)),
    "packed is too short": ("packed", [torch.zeros(3)]),
    "packed is float64": ("packed", [torch.zeros(32 * 144, dtype=torch.float64)]),
    "no packed": ("packed", []),
    "weight has three dimensions": ("weights", [torch.zeros(32, 16, 3)]),
    "weight is empty": ("weights", [torch.zeros(0, 16, 3, 3)]),
    "weight is float64": ("weights", [torch.zeros(32, 16, 3, 3, dtype=torch.float64)]),
    "scale is too short": ("scales", [torch.ones(31)]),
    "shift has gaps": ("shifts", [torch.zeros(64)[::2]]),
    "shift is float64": ("shifts", [torch.zeros(32, dtype=torch.float64)]),
    "steps too short": ("steps", [0, -1, 1]),
    "input comes later": ("steps", steps(input=2)),
    "input is the residual": ("steps", steps(input=1)),
    "input is negative": ("steps", steps(input=-5)),
    "residual is missing": ("steps", steps(residual=1)),
    "residual comes later": ("steps", steps(residual=7)),
    "residual has another shape": ("steps", steps(residual=0)),
    "stride 0": ("steps", steps(stride=0)),
    "negative padding": ("steps", steps(padding=-1)),
    "dilation 0": ("steps", steps(dilation=0)),
    "groups 0": ("steps", steps(groups=0)),
    "groups do not divide": ("steps", steps(groups=3)),
    "unknown algorithm": ("algorithms", ["fft"]),
    "packed for another algorithm": ("algorithms", ["winograd4"]),
    "unknown activation": ("acts", ["tanh"]),
    "two slopes": ("negative_slopes", [0.0, 0.0]),
    "no blocks": ("blocks", []),
    "block of none": ("blocks", [0, 1]),
    "negative block": ("blocks", [2, -1]),
    "blocks of more": ("blocks", [2]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_arguments(what: str) -> None:
    name, value = HOSTILE[what]
    arguments = valid()
    torch.ops.resnet_fused._packed_convs(*arguments.values())
    with pytest.raises(RuntimeError, match="_packed_convs"):
        torch.ops.resnet_fused._packed_convs(*(arguments | {name: value}).values())


@pytest.mark.parametrize(
    ("weight", "stride", "groups", "algorithm"),
    [
        (torch.zeros(4, 4, 3, 3), 1, 1, "direct"),
        (torch.zeros(4, 4, 3, dtype=torch.float64), 1, 1, "direct"),
        (torch.zeros(4, 4, 3, 3, dtype=torch.float64), 1, 0, "direct"),
        (torch.zeros(4, 4, 3, 3, dtype=torch.float64), 1, 3, "direct"),
        (torch.zeros(4, 4, 5, 5, dtype=torch.float64), 1, 1, "winograd4"),
        (torch.zeros(4, 4, 3, 3, dtype=torch.float64), 3, 1, "winograd4"),
        (torch.zeros(4, 4, 3, 3, dtype=torch.float64), 2, 1, "winograd2"),
        (torch.zeros(4, 4, 3, 3, dtype=torch.float64), 1, 1, "winograd6"),
        (torch.zeros(16, 4, 1, 1, dtype=torch.float64), 1, 4, "grouped"),
        (torch.zeros(32, 4, 3, 3, dtype=torch.float64), 1, 4, "grouped"),
        (torch.zeros(24, 4, 3, 3, dtype=torch.float64), 1, 6, "grouped"),
        (torch.zeros(48, 3, 3, 3, dtype=torch.float64), 1, 16, "grouped"),
        (torch.zeros(64, 32, 3, 3, dtype=torch.float64), 1, 1, "strassen"),
        (torch.zeros(64, 32, 1, 1, dtype=torch.float64), 1, 2, "strassen"),
        (torch.zeros(64, 16, 1, 1, dtype=torch.float64), 1, 1, "strassen"),
        (torch.zeros(32, 32, 1, 1, dtype=torch.float64), 1, 1, "strassen"),
    ],
)
def test_hostile_packing(weight: Tensor, stride: int, groups: int, algorithm: str) -> None:
    with pytest.raises(RuntimeError, match="_pack_conv"):
        torch.ops.resnet_fused._pack_conv(weight, stride, groups, algorithm, False)
    with pytest.raises(RuntimeError, match="_pack_conv"):
        torch.ops.resnet_fused._pack_conv(weight, stride, groups, algorithm, True)


# ---- in a model ----------------------------------------------------------------------------------


def test_strict_logits_are_within_a_quarter_of_eagers_error() -> None:
    plain = resnet_fused.models.resnet18().eval().to(memory_format=torch.channels_last)
    fused = resnet_fused.fuse(plain)
    x = torch.randn(4, 3, 96, 96).to(memory_format=torch.channels_last)
    with torch.no_grad():
        reference = resnet_fused.unfuse(fused).double()(x.double())
        for policy in ("strict", "default"):
            with resnet_fused.precision(policy):
                assert_within_policy(fused(x), plain(x), reference, policy)


def test_packed_weights_are_at_most_four_times_the_originals() -> None:
    for algorithm, limit in (("direct", 1.0), ("winograd2", 16 / 9), ("winograd4", 4.0)):
        weight = torch.randn(64, 96, 3, 3)
        packed = pack(weight, None, 1, 1, algorithm)
        assert packed.numel() == math.ceil(limit * weight.numel())
