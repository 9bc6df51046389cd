"""Triton's two convolutions of training by themselves, over the operators' own list of shapes.

Forward normalises what it loads and gathers statistics; the input's gradient gathers the sums of
the batch norm before it. Compared with the same steps in plain PyTorch, in the same dtype and in
float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_functional import CONVS, conv_arguments, noise, options_of
from test_ops import pair
from tolerance import assert_all_parity, assert_parity
from torch import Tensor
from triton_case import DOT_DTYPES, gpus_place, needs_kernels, on_device

from resnet_fused.backends import reference
from resnet_fused.backends.triton import batch_statistics, bn_act, conv_bn_act
from resnet_fused.backends.triton.configs import Config

pytestmark = [needs_kernels, pytest.mark.usefixtures("poisoned", gpus_place.__name__)]

SMALL = Config(32, 32, 32, 4, 3)
FULL = [case for case in CONVS if case != "empty"]
STRIDE_1 = [
    case
    for case in FULL
    if pair(CONVS[case][6]) == [1, 1] and CONVS[case][9] == 1 and case != "padded"
]
OTHER_ACT = ["padded", "grouped", "deep"]
"""Cases with a second activation; a kernel for every shape and each takes long to compile."""


def with_act(cases: list[str]) -> Any:
    """The cases with relu, and some with silu."""
    pairs = [(case, act) for act in ("relu", "silu") for case in cases]
    pairs = [(case, act) for case, act in pairs if act == "relu" or case in OTHER_ACT]
    return pytest.mark.parametrize(("case", "act"), pairs)


class Case:
    """A convolution behind a batch norm, in one dtype or in float64."""

    def __init__(self, case: str, dtype: torch.dtype, act: str) -> None:
        x, weight, _, shift, _ = on_device(conv_arguments(case, dtype, "nhwc", False))
        channels = x.shape[1]
        vectors = on_device([noise(channels, seed=s) for s in (5, 6, 7, 8)])
        vectors[1] = vectors[1].abs() + 0.5
        self.x, self.weight, self.bias, self.vectors = x, weight, shift.to(dtype), vectors
        self.geometry = [pair(v) for v in (options_of(case)[k] for k in _PAIRS)]
        self.groups, self.options = options_of(case)["groups"], (1e-5, act, 0.1)
        z = F.conv2d(x, weight, None, *self.geometry, self.groups)
        self.grad, self.residual = on_device([noise(*t.shape, dtype=dtype, seed=9) for t in (z, x)])

    def forward(self, *tensors: Tensor) -> Tensor:
        """The plain steps, of x, weight, bias and the batch norm's vectors in whatever dtype."""
        x, weight, bias, *vectors = tensors
        a = reference.normalize_act(x, None, *vectors, *self.options)
        return F.conv2d(a, weight, bias, *self.geometry, self.groups)

    def backward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The plain steps, of gradient, weight, residual, x and the vectors."""
        grad, weight, residual, x, *vectors = tensors
        stride, padding, dilation = self.geometry
        found = torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, [0, 0], 1,
            [True, False, False],
        )[0]  # fmt: skip
        grad_a = found + residual
        _, *sums = reference.bn_act_backward_sums(
            grad_a, x, None, None, *vectors, *self.options, False
        )
        return grad_a, *sums

    @property
    def norm(self) -> Any:
        return conv_bn_act.Norm(*self.vectors, *self.options)


_PAIRS = ("stride", "padding", "dilation")


def doubled(tensors: Any) -> list[Tensor]:
    return [t.double() for t in tensors]


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
@with_act(FULL)
def test_forward(case: str, dtype: torch.dtype, act: str) -> None:
    c = Case(case, dtype, act)
    tensors = (c.x, c.weight, c.bias, *c.vectors)
    ours = conv_bn_act.train_conv(
        c.x, c.norm, c.weight, c.bias, *c.geometry, c.groups, SMALL, "ieee"
    )
    z = ours[0]
    assert_parity(z, c.forward(*tensors), c.forward(*doubled(tensors)), what="z")
    # Statistics are of z as it is stored, whose rounding is no error of theirs.
    plain, exact = reference.batch_statistics(z), reference.batch_statistics(z.double())
    assert_parity(ours[1], plain[0], exact[0], what="mean", scale=z.abs().max().item())
    assert_parity(ours[2], plain[1], exact[1], what="variance")


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
@with_act(STRIDE_1)
def test_gradient_of_the_input(case: str, dtype: torch.dtype, act: str) -> None:
    c = Case(case, dtype, act)
    tensors = (c.grad, c.weight, c.residual, c.x, *c.vectors)
    ours = conv_bn_act.train_conv_backward_input(
        c.grad, c.weight, c.geometry[1], c.geometry[2], c.residual, c.x, c.norm, SMALL, "ieee"
    )
    plain, exact = c.backward(*tensors), c.backward(*doubled(tensors))
    assert_all_parity(ours[:1], plain[:1], exact[:1], what="gradient")
    size = exact[0].abs().max().item() * (c.x.numel() / c.x.shape[1]) ** 0.5  # of what cancels
    for name, a, p, e in zip(("weight", "bias"), ours[1:], plain[1:], exact[1:], strict=True):
        assert_parity(a, p, e, what=name, scale=size)


def test_thousands_of_tiles_are_combined_in_two_levels() -> None:
    rows, chunk = 1500 * 4 - 1, 4
    x = noise(rows, 20).double() + 3
    chunks = x.split(chunk)
    mean = torch.stack([c.mean(0) for c in chunks])
    square = torch.stack([(c - c.mean(0)).square().sum(0) for c in chunks])
    parts = [t.float() for t in on_device([mean, square])]
    wanted = on_device([x.mean(0), x.var(0, correction=0)])
    ours = batch_statistics.combine(*parts, rows, chunk)
    sums = bn_act.combine_sums(*parts)
    for a, b in zip((*ours, *sums), (*wanted, *(p.double().sum(0) for p in parts)), strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-5)


def test_an_empty_batch_is_left_to_the_library() -> None:
    """No statistics of nothing: the module takes eager PyTorch's way (modules/train.py)."""
    x, weight = on_device([torch.empty(0, 4, 3, 3), torch.ones(5, 4, 1, 1)])
    y = conv_bn_act.conv_bn_act(
        x, weight, None, None, None, [1, 1], [0, 0], [1, 1], 1, "none", 0.0,
        SMALL, "ieee",
    )  # fmt: skip
    assert y.shape == (0, 5, 3, 3)
