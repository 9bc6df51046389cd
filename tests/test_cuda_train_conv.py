"""The convolutions of training in csrc/cuda, with the batch norm before or behind them.

Forward normalises what it loads and gathers statistics; the input's gradient gathers the sums of
the batch norm before it. On a GPU the operators of the library, without one the same kernels on the
CPU (cuda_on_cpu/). Compared with the same steps in plain PyTorch, in the same dtype and in float64.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from cuda_case import DEVICE, HAS_GPU, needs_cuda_kernels, operators
from cuda_conv_case import kernels, operands, problem
from cuda_place import compiled_gpu
from test_functional import noise
from tolerance import assert_all_parity, assert_parity
from torch import Tensor

from resnet_fused.backends import cuda_conv, reference
from resnet_fused.ops import gpu_train
from resnet_fused.ops.gpu_choice import Kind

pytestmark = [needs_cuda_kernels, pytest.mark.usefixtures("poisoned")]

DTYPES = [torch.float16, torch.bfloat16]
FORWARD = [
    "3x3", "odd", "tiles", "deep", "stride2", "1x1", "1x1stride2", "pixel", "padded", "dilated",
    "unequal", "rectangular", "many channels", "grouped", "two groups",
]  # fmt: skip
GRADIENT = [
    "3x3", "odd", "tiles", "deep", "1x1", "pixel", "valid", "dilated", "rectangular",
    "many channels",
]  # fmt: skip


class Case:
    """A convolution behind a batch norm, in one dtype or in float64."""

    def __init__(self, shape: str, dtype: torch.dtype, act: str = "relu") -> None:
        p = self.problem = problem(shape)
        self.x, self.weight = operands(p, dtype)
        self.bias = noise(p.out_channels, seed=2).to(dtype).float().to(DEVICE)
        vectors = [noise(p.channels, seed=s).to(DEVICE) for s in (5, 6, 7, 8)]
        vectors[1] = vectors[1].abs() + 0.5
        self.vectors = vectors
        self.options: tuple[float, str, float] = (0.1, act, 0.1)
        self.pairs = [list(v) for v in (p.stride, p.padding, p.dilation)]
        self.geometry = [n for pair in self.pairs for n in pair]
        z = F.conv2d(self.x, self.weight, None, *self.pairs, p.groups)
        grad, residual = (noise(*t.shape, dtype=dtype, seed=9) for t in (z, self.x))
        self.grad = grad.contiguous(memory_format=torch.channels_last).to(DEVICE)
        self.residual = residual.contiguous(memory_format=torch.channels_last).to(DEVICE)

    def forward(self, name: str, *, norm: bool = True, bias: bool = True) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = operators()._cuda_train_conv(
            self.x, self.vectors if norm else [], *self.options, self.weight,
            self.bias if bias else None, self.geometry, self.problem.groups, name,
        )  # fmt: skip
        return found

    def plain_forward(self, dtype: torch.dtype, *, norm: bool = True, bias: bool = True) -> Tensor:
        x, weight, shift = (t.to(dtype) for t in (self.x, self.weight, self.bias))
        if norm:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            vectors = [v.to(wide) for v in self.vectors]
            x = reference.normalize_act(x, None, *vectors, *self.options)
        return F.conv2d(x, weight, shift if bias else None, *self.pairs, self.problem.groups)

    def backward(self, name: str, residual: bool = True) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = operators()._cuda_train_conv_input(
            self.grad, self.x, self.vectors, *self.options, self.weight,
            self.residual if residual else None, self.geometry, name,
        )  # fmt: skip
        return found

    def plain_backward(self, dtype: torch.dtype, residual: bool = True) -> tuple[Tensor, ...]:
        grad, weight, add, x = (
            t.to(dtype) for t in (self.grad, self.weight, self.residual, self.x)
        )
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        vectors = [v.to(wide) for v in self.vectors]
        found = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *self.pairs, False, [0, 0], 1, [True, False, False]
        )[0]
        grad_a = found + add if residual else found
        _, *sums = reference.bn_act_backward_sums(
            grad_a, x, None, None, *vectors, *self.options, False
        )
        return grad_a, *sums

    def check_forward(self, name: str, **which: bool) -> None:
        z, mean, var = self.forward(name, **which)
        assert z.is_contiguous(memory_format=torch.channels_last)
        plain = self.plain_forward(self.x.dtype, **which)
        assert_parity(z, plain, self.plain_forward(torch.float64, **which), what=f"{name}: z")
        # Statistics are of z as it is stored, whose rounding is no error of theirs.
        own, exact = reference.batch_statistics(z), reference.batch_statistics(z.double())
        assert_parity(mean, own[0], exact[0], what=f"{name}: mean", scale=z.abs().max().item())
        assert_parity(var, own[1], exact[1], what=f"{name}: variance")

    def check_backward(self, name: str, residual: bool = True) -> None:
        ours = self.backward(name, residual)
        plain = self.plain_backward(self.x.dtype, residual)
        exact = self.plain_backward(torch.float64, residual)
        assert ours[0].is_contiguous(memory_format=torch.channels_last)
        assert_all_parity(ours[:1], plain[:1], exact[:1], what=f"{name}: gradient")
        pixels = self.x.numel() / self.x.shape[1]
        size = exact[0].abs().max().item() * pixels**0.5  # of what cancels
        for what, a, p, e in zip(("weight", "bias"), ours[1:], plain[1:], exact[1:], strict=True):
            assert_parity(a, p, e, what=f"{name}: {what}", scale=size)


def names(shape: str, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found = kernels(shape, monkeypatch, kind)
    assert found
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FORWARD)
def test_forward(shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(shape, dtype)
    for name in names(shape, "train_behind_norm", monkeypatch):
        case.check_forward(name)
    for name in names(shape, "train_output", monkeypatch):
        case.check_forward(name, norm=False, bias=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GRADIENT)
def test_gradient_of_the_input(
    shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(shape, dtype)
    for name in names(shape, "train_input", monkeypatch):
        case.check_backward(name)
        case.check_backward(name, residual=False)


@pytest.mark.usefixtures(compiled_gpu.__name__)
@pytest.mark.parametrize("shape", ["tiles", "valid", "dilated", "rectangular"])
def test_gradient_of_a_tensor(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(shape, torch.bfloat16)
    plain, exact = (case.plain_backward(dtype)[:1] for dtype in (case.x.dtype, torch.float64))
    for name in names(shape, "train_tensor_input", monkeypatch):
        found = gpu_train.backward_tensor_input(
            case.grad, case.weight, case.residual, (*case.pairs, 1), name
        )
        assert_all_parity([found], plain, exact, what=name)


def test_tensors_of_any_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read behind the products, the parameters and the weight."""
    case = Case("3x3", torch.float16)
    for name in names("3x3", "train_input", monkeypatch):
        x, residual, weight = case.x, case.residual, case.weight
        wanted = (*case.forward(name), *case.backward(name))
        case.vectors = [torch.stack([v, v], 1)[:, 1] for v in case.vectors]
        case.bias = torch.cat([case.bias[:1], case.bias])[1:]
        case.weight = weight.contiguous(memory_format=torch.channels_last)
        found = case.forward(name)
        case.x, case.residual = x.contiguous(), torch.cat([residual, residual], 1)[:, 64:]
        for a, b in zip((*found, *case.backward(name)), wanted, strict=True):
            assert torch.equal(a, b)
        case.x, case.residual = x, residual


@pytest.mark.parametrize("act", cuda_conv.ACTIVATIONS)
def test_activations(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("3x3", torch.float16, act)
    for name in names("3x3", "train_behind_norm", monkeypatch):
        case.check_forward(name)
    for name in names("3x3", "train_input", monkeypatch):
        case.check_backward(name)


@pytest.mark.parametrize("shape", ["tiles", "gaps"])
def test_large_means_do_not_cancel(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of z, a thousand times its deviation. Of "gaps" some warps meet no pixel in their first tile,
    and know an origin from the first one in which they do.
    """
    case = Case(shape, torch.float16)
    case.bias += 100
    case.weight *= 0.1
    for name in names(shape, "train_behind_norm", monkeypatch):
        case.check_forward(name)


def test_outside_of_the_image_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not act(bn(0))."""
    case = Case("padded", torch.float16)
    case.vectors[3].fill_(50.0)
    for name in names("padded", "train_behind_norm", monkeypatch):
        case.check_forward(name)


def test_without_weight_and_bias_of_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("3x3", torch.bfloat16)
    none = torch.empty(0, device=DEVICE)
    for name in names("3x3", "train_input", monkeypatch):
        case.vectors[2:] = [torch.ones_like(case.vectors[0]), torch.zeros_like(case.vectors[0])]
        forward, backward = case.forward(name), case.backward(name)
        case.vectors[2:] = [none, none]
        for a, b in zip((*forward, *backward), (*case.forward(name), *case.backward(name)),
                        strict=True):  # fmt: skip
            assert torch.equal(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in PyTorch, but for a mean of infinities, which may be NaN."""
    case = Case("3x3", torch.float16)
    case.x[0, 1, 4, 5] = value
    case.weight = case.weight.abs() + 0.01
    for name in names("3x3", "train_output", monkeypatch):
        z, mean, var = case.forward(name, norm=False)
        plain = case.plain_forward(torch.float16, norm=False)
        assert_parity(z, plain, case.plain_forward(torch.float64, norm=False), what=name)
        assert not mean.isfinite().any() and var.isnan().all()


def test_the_same_bits_always(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("tiles", torch.bfloat16)
    for name in names("tiles", "train_input", monkeypatch):
        first = (*case.forward(name), *case.backward(name))
        for _ in range(2):
            again = (*case.forward(name), *case.backward(name))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.skipif(HAS_GPU, reason="an order of the emulator's threads")
def test_lanes_that_see_a_barrier_at_different_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who loads changes what it has loaded with all lanes of its warp, or with none."""
    case = Case("tiles", torch.float16)
    for name in names("tiles", "train_behind_norm", monkeypatch):
        for seed in (1, 2):
            operators()._set_order(f"random:{seed}")
            try:
                case.check_forward(name)
            finally:
                operators()._set_order(os.environ.get("RESNET_FUSED_CUDA_ORDER", "forward"))


def test_empty_batch() -> None:
    case = Case("empty", torch.float16)
    z, mean, var = case.forward("mma_128x64")
    assert z.shape == (0, 16, 6, 7) and not mean.any() and not var.any()
    grad, *sums = case.backward("mma_128x64")
    assert grad.shape == case.x.shape and not any(s.any() for s in sums)


def test_bad_arguments() -> None:
    case = Case("3x3", torch.float16)
    name, geometry = "mma_128x64", case.geometry
    forward = [case.x, case.vectors, *case.options, case.weight, case.bias, geometry, 1, name]
    for place, value, message in (
        (0, case.x.contiguous(), "input must be channels_last"),
        (0, case.x.float(), "weight must have 4 dimensions .* and input's dtype"),
        (1, case.vectors[:3], "vectors must be mean, var, weight and bias"),
        (1, [v[:5] for v in case.vectors], "mean must have shape"),
        (3, "silu", "act must be none, relu"),
        (5, case.weight[:, :8], "weight must have input's 64 channels"),
        (6, case.bias[:3], "bias must have shape"),
        (7, geometry[:4], "geometry must have 6 numbers"),
        (8, 5, "must be multiples of groups"),
        (9, "mma_128x128", "algorithm is unknown"),
    ):
        bad = [*forward]
        bad[place] = value
        with pytest.raises(RuntimeError, match=message):
            operators()._cuda_train_conv(*bad)
    backward = [
        case.grad, case.x, case.vectors, *case.options, case.weight, case.residual, geometry, name,
    ]  # fmt: skip
    for place, value, message in (
        (1, case.x[:1], "z must have the shape"),
        (2, [], "vectors must be mean, var, weight and bias"),
        (4, "gelu", "act must be none, relu"),
        (6, case.weight[:8], "weight must have grad's 64 output channels"),
        (7, case.residual.double(), "residual must have the dtype"),
        (8, [2, 2, 1, 1, 1, 1], "of stride 1"),
        (8, [1, 1, 3, 3, 1, 1], "padding must be less than the dilated kernel"),
        (9, "pingpong_128x128", "algorithm is unknown"),
    ):
        bad = [*backward]
        bad[place] = value
        with pytest.raises(RuntimeError, match=message):
            operators()._cuda_train_conv_input(*bad)
