"""The operators on whole numbers, which they have to get exactly right: cases by hypothesis.

Integers up to 2 and scales that are powers of two: every product and sum has an exact
representation, so that any order of additions gives the same bits, and float64 says which.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from resnet_fused import functional, precision

EXACTLY = settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
ACTS = st.sampled_from(["none", "relu", "relu6"])
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
LAYOUTS = st.sampled_from(["contiguous", "channels_last", "transposed", "expanded", "sliced"])


def whole(shape: tuple[int, ...], seed: int, largest: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).double()


def powers(channels: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (channels,), generator=generator) * 2.0 - 1
    return signs * 2.0 ** torch.randint(-1, 2, (channels,), generator=generator).double()


def placed(x: Tensor, layout: str) -> Tensor:
    """The values of `x` in another layout; in "expanded" those of its first image everywhere."""
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "sliced":
        return torch.cat([x, x], 1)[:, : x.shape[1]]
    return x


Operands = tuple[Tensor, Tensor | None, int]


@st.composite
def operands(draw: st.DrawFn, least_batch: int) -> Operands:
    """Data of any rank and layout, a residual or none, and a seed for vectors."""
    shape = (
        draw(st.integers(least_batch, 4)),
        draw(st.integers(1, 40)),
        *draw(st.lists(st.integers(1, 7), max_size=3)),
    )
    layout, seed = draw(LAYOUTS), draw(st.integers(0, 2**32 - 1))
    residual = placed(whole(shape, seed + 2), layout) if draw(st.booleans()) else None
    return placed(whole(shape, seed, 8), layout), residual, seed


def activated(y: Tensor, act: str) -> Tensor:
    return {"none": y, "relu": y.clamp(min=0), "relu6": y.clamp(0, 6)}[act]


def per_channel(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(-1, *(1,) * (x.dim() - 2))


@EXACTLY
@given(
    st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)), st.integers(1, 3), st.integers(0, 2),
    st.integers(1, 2), st.sampled_from([1, 1, 2, 3]), st.integers(1, 12), ACTS, st.booleans(),
    st.booleans(), DTYPES, LAYOUTS, st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_conv_bn_act(
    shape: tuple[int, ...], kernel: tuple[int, int], stride: int, padding: int, dilation: int,
    groups: int, outputs: int, act: str, scaled: bool, added: bool, dtype: torch.dtype,
    layout: str, seed: int,
) -> None:  # fmt: skip
    n, c, h, w = shape
    x = placed(whole((n, c * groups, h, w), seed), layout)
    weight = whole((outputs * groups, c, *kernel), seed + 1, 1)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    reach = [dilation * (k - 1) + 1 - 2 * padding for k in kernel]
    if h < reach[0] or w < reach[1]:
        return
    if any(padding > dilation * (k - 1) for k in kernel):
        return  # as in draw.py: plain PyTorch may crash
    z = torch.nn.functional.conv2d(x, weight, None, **options)
    vectors = [powers(z.shape[1], seed), whole((z.shape[1],), seed + 2)] if scaled else [None] * 2
    residual = placed(whole(tuple(z.shape), seed + 3), layout) if added else None
    y = z if vectors[0] is None else z * per_channel(vectors[0], z) + per_channel(vectors[1], z)
    exact = activated(y if residual is None else y + residual, act)
    tensors = [None if t is None else t.to(dtype) for t in (x, weight, *vectors, residual)]
    with precision("strict"), torch.no_grad():
        actual = functional.conv_bn_act(*tensors, **options, act=act)  # type: ignore[arg-type]
    assert torch.equal(actual, exact.to(dtype))


@EXACTLY
@given(operands(least_batch=0), ACTS, DTYPES)
def test_scale_shift_act(drawn: Operands, act: str, dtype: torch.dtype) -> None:
    x, residual, seed = drawn
    channels = x.shape[1]
    scale, shift = powers(channels, seed), whole((channels,), seed + 1)
    y = x * per_channel(scale, x) + per_channel(shift, x)
    exact = activated(y if residual is None else y + residual, act)
    tensors: Any = [None if t is None else t.to(dtype) for t in (x, scale, shift, residual)]
    assert torch.equal(functional.scale_shift_act(*tensors, act=act), exact.to(dtype))


@EXACTLY
@given(operands(least_batch=1), ACTS, DTYPES)
def test_bn_act_with_fixed_statistics(drawn: Operands, act: str, dtype: torch.dtype) -> None:
    x, residual, seed = drawn
    channels = x.shape[1]
    mean, weight, bias = whole((channels,), seed), powers(channels, seed), whole((channels,), 1)
    var = (powers(channels, seed + 1) > 0) * 3 + 0.75  # with eps 1 or 4
    scale = weight / (var + 0.25).sqrt()
    y = (x - per_channel(mean, x)) * per_channel(scale, x) + per_channel(bias, x)
    exact = activated(y if residual is None else y + residual, act)
    given_: Any = [t.to(dtype) for t in (x, mean, var, weight, bias)]
    actual = functional.bn_act(
        *given_, None if residual is None else residual.to(dtype), eps=0.25, act=act
    )
    assert torch.equal(actual[0], exact.to(dtype))
    assert torch.equal(actual[1].double(), mean) and torch.equal(actual[2].double(), var)
