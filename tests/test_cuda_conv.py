"""The convolutions of csrc/cuda by themselves, over shapes that end in the middle of tiles.

On a GPU the operator of the library, without one the same kernels compiled for the CPU
(cuda_on_cpu/), in which a thread is a fiber. Compared with PyTorch's convolution and the formula
behind it, in the same dtype and in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from activations import ACTS
from cuda_case import DEVICE, needs_cuda_kernels, operators
from cuda_conv_case import SHAPES, kernels, operands, packed, problem, tf32
from test_functional import noise
from tolerance import assert_parity
from torch import Tensor

from resnet_fused.backends import cuda_conv, reference

pytestmark = [needs_cuda_kernels, pytest.mark.usefixtures("poisoned")]

DTYPES = [torch.float16, torch.bfloat16]


class Call:
    """A convolution with everything that can follow it."""

    def __init__(self, shape: str, dtype: torch.dtype) -> None:
        p = self.problem = problem(shape)
        self.x, self.weight = operands(p, dtype)
        self.scale = (noise(p.out_channels, seed=2).abs() + 0.5).to(DEVICE)
        self.shift = noise(p.out_channels, seed=3).to(DEVICE)
        self.geometry = [list(v) for v in (p.stride, p.padding, p.dilation)]
        size = F.conv2d(self.x, self.weight, None, *self.geometry, p.groups).shape
        other = noise(*size, dtype=dtype, seed=4)
        self.residual = other.contiguous(memory_format=torch.channels_last).to(DEVICE)

    def ours(self, algorithm: str, scale: Any, shift: Any, residual: Any, *act: Any) -> Tensor:
        p = self.problem
        numbers = packed(self.weight, p.groups, algorithm)
        flat = [*p.kernel, *p.stride, *p.padding, *p.dilation]
        found: Tensor = operators()._cuda_conv(
            self.x, numbers, scale, shift, residual, p.out_channels, flat, p.groups, *act, algorithm
        )
        return found

    def check(self, algorithm: str, scale: Any, shift: Any, residual: Any, *act: Any) -> None:
        ours = self.ours(algorithm, scale, shift, residual, *act)
        tensors = (self.x, self.weight, scale, shift, residual)
        rest = (*self.geometry, self.problem.groups, *act)
        doubled = [None if t is None else t.double() for t in tensors]
        if self.x.dtype == torch.float32:
            tensors = (tf32(self.x), tf32(self.weight), scale, shift, residual)
        plain = reference.conv_bn_act(*tensors, *rest)
        exact = reference.conv_bn_act(*doubled, *rest)
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert_parity(ours, plain, exact, what=algorithm)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(shape, dtype, id=f"{shape}-{dtype}")
        for shape in SHAPES
        for dtype in (*DTYPES, torch.float32)
        if not (dtype == torch.float32 and "stem" in shape)
    ],
)
def test_every_kernel(shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call(shape, dtype)
    names = kernels(shape, monkeypatch, dtype=dtype)
    assert names
    for name in names:
        call.check(name, call.scale, call.shift, call.residual, "relu", 0.0)
        call.check(name, None, call.shift, None, "none", 0.0)


def test_float32_is_rounded_to_the_nearest_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both factors; cut off, as the chip does by itself, all would be too small."""
    call = Call("1x1", torch.float32)
    one = torch.eye(264, 136, device=DEVICE)[..., None, None]
    for name in kernels("1x1", monkeypatch, dtype=torch.float32):
        call.weight = one
        y = call.ours(name, None, None, None, "none", 0.0)
        assert torch.equal(y[:, :136], tf32(call.x)) and not y[:, 136:].any()
        call.weight = call.scale[:, None, None, None] * one
        y = call.ours(name, None, None, None, "none", 0.0)
        assert torch.equal(y[:, :136], tf32(call.x) * tf32(call.scale)[:136, None, None])


@pytest.mark.parametrize("act", cuda_conv.ACTIVATIONS)
def test_activations(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert act in ACTS
    for dtype in (torch.float16, torch.float32):
        call = Call("3x3", dtype)
        for name in kernels("3x3", monkeypatch, dtype=dtype):
            call.check(name, call.scale, None, call.residual, act, 0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*(("3x3", dtype) for dtype in (*DTYPES, torch.float32)), ("7x7 stem", torch.float16)],
)
def test_not_finite(
    shape: str, dtype: torch.dtype, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the windows that contain it are; a pixel of an even column is right behind others."""
    call = Call(shape, dtype)
    call.x[0, 1, 4, 5] = call.x[-1, 0, 3, 4] = value
    call.weight = call.weight.abs() + 0.01
    for name in kernels(shape, monkeypatch, dtype=dtype):
        call.check(name, call.scale, call.shift, None, "relu", 0.0)


def test_an_input_in_the_middle_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its address is no multiple of 16 bytes."""
    call = Call("3x3", torch.float16)
    numbers = call.x.permute(0, 2, 3, 1).reshape(-1)
    longer = torch.cat([numbers[:1], numbers])[1:]
    n, c, h, w = call.x.shape
    call.x = longer.view(n, h, w, c).permute(0, 3, 1, 2)
    assert call.x.data_ptr() % 16
    for name in kernels("3x3", monkeypatch):
        call.check(name, None, None, None, "none", 0.0)


def test_vectors_and_weights_at_any_address(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call("3x3", torch.bfloat16)
    longer = [torch.cat([t[:1], t])[1:] for t in (call.scale, call.shift)]
    strided = [torch.stack([t, t], 1)[:, 1] for t in (call.scale, call.shift)]
    assert longer[0].data_ptr() % 8
    for name in kernels("3x3", monkeypatch):
        wanted = call.ours(name, call.scale, call.shift, None, "none", 0.0)
        for vectors in (longer, strided):
            assert torch.equal(call.ours(name, *vectors, None, "none", 0.0), wanted)
    numbers = packed(call.weight, 1, "mma_128x64").reshape(-1)
    moved = torch.cat([numbers[:1], numbers])[1:]
    y = operators()._cuda_conv(
        call.x, moved, None, None, None, 64, [3, 3, 1, 1, 1, 1, 1, 1], 1, "none", 0.0, "mma_128x64"
    )
    assert torch.equal(y, call.ours("mma_128x64", None, None, None, "none", 0.0))


def test_the_same_bits_always(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call("tiles", torch.bfloat16)
    for name in kernels("tiles", monkeypatch):
        arguments = (name, call.scale, call.shift, call.residual, "relu", 0.0)
        first = call.ours(*arguments)
        assert all(torch.equal(call.ours(*arguments), first) for _ in range(3))


def test_bad_arguments() -> None:
    call = Call("3x3", torch.float16)
    good = [call.scale, call.shift, call.residual, "relu", 0.0]
    name = "mma_128x64"
    for place, value, message in (
        (0, call.scale[:3], "scale must have shape"),
        (1, call.shift.double(), "shift must be float32"),
        (2, call.residual[:1], "residual must have the shape"),
        (3, "silu", "act must be none, relu"),
    ):
        bad = [*good]
        bad[place] = value
        with pytest.raises(RuntimeError, match=message):
            call.ours(name, *bad)
    with pytest.raises(RuntimeError, match="algorithm is unknown"):
        operators()._cuda_conv(
            call.x, call.weight, None, None, None, 64, [3, 3, 1, 1, 1, 1, 1, 1], 1, "none", 0.0, "x"
        )
    with pytest.raises(RuntimeError, match="weights must be packed"):
        operators()._cuda_conv(
            call.x, call.weight[:32].contiguous(), None, None, None, 64,
            [3, 3, 1, 1, 1, 1, 1, 1], 1, "none", 0.0, name,
        )  # fmt: skip
    call.x = call.x.contiguous()
    with pytest.raises(RuntimeError, match="input must be channels_last"):
        call.ours(name, *good)
