"""The library's own convolution kernels against float64, on every instruction set."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import pytest
import torch
from conv_case import (
    ALGORITHMS,
    INF,
    ISAS,
    NAN,
    SIZES,
    Case,
    Size,
    corners,
    may_run_direct,
    rounds,
    run_with_isa,
    sweep,
)
from torch import Tensor

from resnet_fused.backends import native
from resnet_fused.conv_choice import ConvProblem, candidates
from resnet_fused.parity import DEFAULT_ERROR, STRICT_FACTOR

pytestmark = pytest.mark.skipif(not native.available, reason=str(native.reason))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_cases(dtype: torch.dtype, seed: int, poisoned: None) -> None:
    sweep(seed, 40, dtype)


@pytest.mark.parametrize("isa", ISAS[:-1])
def test_every_instruction_set(isa: str) -> None:
    run_with_isa(
        isa,
        "import torch, conv_case as t; t.sweep(99, 120); t.sweep(99, 40, torch.bfloat16)",
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_edge_of_the_image(
    algorithm: str, padding: int, stride: int, size: tuple[int, int]
) -> None:
    if min(size) + 2 * padding < 3:
        pytest.skip("no such convolution")
    Case(algorithm, (2, 20, *size), 40, stride=stride, padding=padding).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [3, 16, 33])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((1, 7), 1, (0, 3), 1),
        ((7, 1), 1, (3, 0), 1),
        ((3, 5), (2, 1), (1, 2), (1, 2)),
        ((2, 3), (1, 3), (0, 1), (3, 1)),
        (1, (2, 1), (1, 0), 1),
    ],
)
def test_unequal_height_and_width(
    kernel: Size, stride: Size, padding: Size, dilation: Size, channels: int, dtype: torch.dtype
) -> None:
    if not may_run_direct(dtype):
        pytest.skip("this processor has no AVX512_BF16")
    pairs = dtype == torch.bfloat16
    Case(
        "direct", (2, channels, 12, 15), 40, kernel, stride, padding, dilation, dtype=dtype,
        pairs=pairs,
    ).check()  # fmt: skip


def test_a_unit_of_work_ends_with_its_image() -> None:
    """Images of more pixels than a unit, whose rows are cut into units evenly."""
    for height in (23, 31, 40):
        Case("direct", (3, 16, height, 30), 32).check()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("channels", [1, 2, 15, 16, 17, 33, 64, 130])
def test_channel_counts(algorithm: str, channels: int) -> None:
    for outputs in (1, 31, 32, 33, 100):
        Case(algorithm, (1, channels, 6, 9), outputs, act="silu").check()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_empty_batch(algorithm: str) -> None:
    Case(algorithm, (0, 16, 8, 8), 32).check()


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
    pairs = dtype == torch.bfloat16 and rounds(algorithm, stride)
    if algorithm == "direct" and not may_run_direct(dtype):
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
    if rounds(algorithm, 1):
        kinds.append((torch.bfloat16, True))
    for kernel, padding in ((3, 1), (1, 0)):
        if kernel == 1 and algorithm != "direct":
            continue
        for (dtype, pairs), change in itertools.product(kinds, changes):
            Case(
                algorithm, (2, 24, 8, 8), 33, kernel=kernel, padding=padding,
                dtype=dtype, pairs=pairs,
            ).check(lambda x, f=change: f(x).to(x.dtype))  # fmt: skip


EVERY = (*ALGORITHMS, "grouped", "strassen")

# A sanitizer reports what it looks for at the first run; bits are not another's in one of many.
REPEATS = 2 if "san.so" in os.environ.get("LD_PRELOAD", "") else 20


def any_case(algorithm: str, shape: tuple[int, int, int, int], residual: bool) -> Case:
    """A convolution that an algorithm takes."""
    if algorithm == "grouped":
        return Case(algorithm, shape, shape[1], groups=shape[1] // 8, residual=residual)
    if algorithm == "strassen":
        return Case(algorithm, shape, 320, kernel=1, padding=0, residual=residual)
    return Case(algorithm, shape, 288, residual=residual)


@pytest.mark.parametrize("algorithm", EVERY)
@pytest.mark.parametrize("shape", [(3, 96, 13, 14), (1, 288, 7, 7)], ids=str)
def test_same_bits_for_any_thread_count(algorithm: str, shape: tuple[int, int, int, int]) -> None:
    case = any_case(algorithm, shape, residual=True)
    x, weight, scale, shift = case.tensors()
    residual = torch.randn(case.output_shape)
    program = case.program(weight, scale, shift)
    expected = program(x, residual)
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        for _ in range(REPEATS):
            assert torch.equal(program(x, residual), expected)


@pytest.mark.parametrize("algorithm", EVERY)
def test_workspace_does_not_grow_with_the_batch(algorithm: str) -> None:
    """What a call leaves in the pool beside its output is at most 4 MiB a thread."""
    torch.set_num_threads(2)
    kept = []
    for batch in (4, 32):
        case = any_case(algorithm, (batch, 128, 20, 20), residual=False)
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
    [
        ("winograd2", 1, 3),
        ("winograd3", 2, 3),
        ("winograd4", 1, 3),
        ("winograd4", 2, 3),
        ("winograd4_late", 1, 3),
        ("winograd4_late", 2, 3),
        ("direct", 1, 1),
    ],
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
        assert ours <= DEFAULT_ERROR
    if algorithm in candidates(shape, "strict"):
        assert ours <= STRICT_FACTOR * error(case.eager(x, weight, scale, shift, None))
