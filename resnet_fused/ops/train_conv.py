"""A convolution in training with the batch norms before and behind it, forward and backward.

Nothing here records gradients: ``train_block.py`` calls it. Each part, forward, the input's
gradient and the weight's, runs in the library's own kernels (``csrc/cpu/train_conv.cpp``: a few
images at a time, so that neither the activation before nor the gradient behind exists as a whole)
or in PyTorch's convolution, whichever is expected to be faster.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused import conv_choice, policy
from resnet_fused.backends import gpu_kernels, native_conv, onednn
from resnet_fused.backends.triton import support
from resnet_fused.conv_choice import LIBRARY, TrainingAlgorithms
from resnet_fused.ops import gpu_choice, gpu_train
from resnet_fused.ops.schema import is_channels_last

_ops = torch.ops.resnet_fused

_ALL_LIBRARY = TrainingAlgorithms(LIBRARY, LIBRARY, LIBRARY)


class Conv(NamedTuple):
    """A convolution's options and parameters.

    Under autocast these are the model's own, in float32 beside data of another dtype.
    """

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    algorithms: TrainingAlgorithms | None = None  # for channels_last data, if known already

    def parameters(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in a dtype."""
        weight, bias = self.weight, self.bias
        return (
            weight if weight.dtype == dtype else weight.to(dtype),
            bias if bias is None or bias.dtype == dtype else bias.to(dtype),
        )

    @property
    def geometry(self) -> tuple[int, ...]:
        """Stride, padding and dilation as the kernels take them."""
        return self.stride + self.padding + self.dilation


class Normalised(NamedTuple):
    """act(bn(z)) with known statistics, not computed yet."""

    z: Tensor
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    act: str
    negative_slope: float

    def tensor(self, residual: Tensor | None = None) -> Tensor:
        """act(bn(z) [+ residual])."""
        return _ops.normalize_act(
            self.z, residual, self.mean, self.var, self.weight, self.bias,
            self.eps, self.act, self.negative_slope,
        )  # fmt: skip

    def vectors(self) -> list[Tensor]:
        """Mean, variance, weight and bias; an empty tensor for one that is not there."""
        if self.weight is not None and self.bias is not None:
            return [self.mean, self.var, self.weight, self.bias]
        none = self.mean.new_empty(0)
        weight, bias = (none if t is None else t for t in (self.weight, self.bias))
        return [self.mean, self.var, weight, bias]

    def sums(
        self, grad: Tensor, residual: Tensor | None, output: Tensor | None, adds: bool
    ) -> Sums:
        """The gradients of weight and bias from the output's, and the residual's."""
        grad_residual, grad_weight, grad_bias = _ops.bn_act_backward_sums(
            grad, self.z, residual, output, self.mean, self.var, self.weight, self.bias,
            self.eps, self.act, self.negative_slope, adds,
        )  # fmt: skip
        return Sums(grad_weight, grad_bias, grad_residual if adds else None)


class ConvNorm(NamedTuple):
    """The options of a convolution, the batch norm behind it and the activation."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    eps: float
    act: str
    negative_slope: float

    def conv(
        self, weight: Tensor, bias: Tensor | None, algorithms: TrainingAlgorithms | None = None
    ) -> Conv:
        """The convolution with its parameters."""
        return Conv(weight, bias, *self[:4], algorithms)

    def normalised(
        self, z: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Normalised:
        """What follows the convolution's output z."""
        return Normalised(z, mean, var, weight, bias, self.eps, self.act, self.negative_slope)


class Sums(NamedTuple):
    """What the first pass of a batch norm's backward gives."""

    grad_weight: Tensor
    grad_bias: Tensor
    grad_residual: Tensor | None = None

    def grad_of_conv_bias(self, bias: Tensor | None) -> Tensor | None:
        """The gradient of the convolution's bias in front, which the batch norm takes away.

        Zero, but NaN where a value or gradient of the channel is not finite, as eager PyTorch's.
        """
        return None if bias is None else ((self.grad_weight + self.grad_bias) * 0).to(bias.dtype)


class Pooled(NamedTuple):
    """A max-pool of act(bn(z)): where in its window each output was found, and the window."""

    positions: Tensor
    window: list[int]  # kernel_size, stride, padding and dilation, two numbers each


class Gradient(NamedTuple):
    """The gradient of a convolution's output z, from that of act(bn(z)), not computed yet."""

    grad: Tensor
    behind: Normalised
    sums: Sums  # over all processes
    values: int  # of a channel, in them
    pooled: Pooled | None = None  # what `grad` is the gradient of, instead of act(bn(z))

    def tensor(self) -> Tensor:
        """The gradient of z."""
        n = self.behind
        if self.pooled is not None and gpu_kernels.compiled(n.z):
            return _ops._train_pool_input(
                self.grad, self.pooled.positions, n.z, n.vectors(), self.sums.grad_weight,
                self.sums.grad_bias, n.eps, n.act, n.negative_slope, self.pooled.window,
                self.values,
            )  # fmt: skip
        grad = (
            self.grad
            if self.pooled is None
            else _ops._max_unpool(self.grad, self.pooled.positions, n.z, self.pooled.window)
        )
        return _ops.bn_act_backward_input(
            grad, n.z, n.mean, n.var, n.weight, n.bias, self.sums.grad_weight,
            self.sums.grad_bias, n.eps, n.act, n.negative_slope, self.values,
        )  # fmt: skip


Source = Tensor | Normalised


def data_of(source: Source) -> Tensor:
    """The tensor that exists: the source itself, or what is still to be normalised."""
    return source.z if isinstance(source, Normalised) else source


def tensor_of(source: Source) -> Tensor:
    """The source, computed."""
    return source.tensor() if isinstance(source, Normalised) else source


def choose(source: Source, conv: Conv) -> TrainingAlgorithms:
    """What runs the three parts of a convolution in training."""
    x = data_of(source)
    if support.on_gpu(x) and is_channels_last(x):
        act = source.act if isinstance(source, Normalised) else None
        return gpu_choice.choose_training(x, conv.weight, conv[2:6], act=act)
    if not x.is_cpu or not is_channels_last(x):
        return _ALL_LIBRARY
    if conv.algorithms is not None:
        return conv.algorithms
    return choose_for(
        tuple(x.shape), tuple(conv.weight.shape), conv[2:6], x.dtype, policy.current()
    )


@functools.lru_cache(maxsize=4096)
def choose_for(
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    options: tuple[Any, ...],
    dtype: torch.dtype,
    precision: str,
) -> TrainingAlgorithms:
    """The same for CPU data that are channels_last.

    Args:
        size: of the data.
        kernel: the weight's shape.
        options: stride, padding, dilation and groups.
        precision: the policy.
    """
    stride, padding, dilation, groups = options
    weight = torch.empty(kernel, device="meta")
    if native_conv.unusable(dtype) is not None or onednn.is_small(dtype, size, weight, groups):
        return _ALL_LIBRARY
    problem = conv_choice.ConvProblem(
        size[0], size[1], (size[2], size[3]), kernel[0], (kernel[2], kernel[3]),
        stride, padding, dilation, groups, dtype == torch.bfloat16,
    )  # fmt: skip
    return conv_choice.choose_training(problem, precision)


def forward(source: Source, conv: Conv) -> tuple[Tensor, Tensor, Tensor]:
    """z = conv(source), and the mean and biased variance of its channels."""
    data = data_of(source)
    algorithm = choose(source, conv).output
    if algorithm == LIBRARY:
        z = torch.conv2d(
            tensor_of(source), *conv.parameters(data.dtype),
            conv.stride, conv.padding, conv.dilation, conv.groups,
        )  # fmt: skip
        return z, *_ops.batch_statistics(z)
    if support.on_gpu(data):
        norm = source[1:] if isinstance(source, Normalised) else None
        return gpu_train.forward(data, norm, *conv.parameters(data.dtype), conv[2:6], algorithm)
    parameters = conv.parameters(torch.float32)
    return _ops._train_conv(data, *_before(source), *parameters, conv.geometry, algorithm)


def backward(
    gradient: Gradient | Tensor,
    source: Source,
    conv: Conv,
    *,
    residual: Tensor | None,
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Sums | None]:
    """The gradients of the source (plus `residual`) and of the weight, from that of the output.

    Third comes what :meth:`Normalised.sums` would give for a source that is one and that gradient;
    None where it was not computed on the way.
    """
    data = data_of(source)
    chosen = choose(source, conv)
    grad_input = grad_weight = sums = None
    if support.on_gpu(data):
        gradient = _computed(gradient)
        if needs_input and chosen.input != LIBRARY:
            weight = conv.parameters(data.dtype)[0]
            rest: Any = weight, residual, conv[2:6], chosen.input
            if isinstance(source, Normalised):
                grad_input, *both = gpu_train.backward_input(gradient, source.z, source[1:], *rest)
                sums = Sums(*both)
            else:
                grad_input = gpu_train.backward_tensor_input(gradient, *rest)
    own_input = needs_input and not support.on_gpu(data) and chosen.input != LIBRARY
    own_weight = needs_weight and chosen.weight != LIBRARY
    library = (
        needs_input and not own_input and grad_input is None, needs_weight and not own_weight
    )  # fmt: skip
    if any(library):
        gradient = _computed(gradient)
    if own_input or own_weight:
        grad_input, grad_weight, *both = _ops._train_conv_backward(
            *_behind(gradient), data, *_before(source),
            conv.parameters(torch.float32)[0], conv.geometry, residual if own_input else None,
            chosen.input if own_input else "none", chosen.weight if own_weight else "none",
        )  # fmt: skip
        if own_input and isinstance(source, Normalised):
            sums = Sums(*both)
        if own_weight and grad_weight.numel() == 0:  # NaN and infinities as PyTorch has them
            library = (library[0], True)
    if any(library):
        a = tensor_of(source)
        by_library: Any = onednn.convolution_backward(
            _computed(gradient), a, conv.weight.to(a.dtype),
            conv.stride, conv.padding, conv.dilation, conv.groups, library,
        )  # fmt: skip
        if library[0]:
            grad_input = by_library[0] if residual is None else by_library[0] + residual
        if library[1]:
            grad_weight = by_library[1]
    return (
        grad_input if needs_input else None,
        grad_weight if needs_weight else None,
        sums,
    )


def _before(source: Source) -> tuple[list[Tensor], float, str, float]:
    if not isinstance(source, Normalised):
        return [], 0.0, "none", 0.0
    return source.vectors(), source.eps, source.act, source.negative_slope


def _computed(gradient: Gradient | Tensor) -> Tensor:
    return gradient.tensor() if isinstance(gradient, Gradient) else gradient


def _behind(gradient: Gradient | Tensor) -> tuple[object, ...]:
    if isinstance(gradient, Tensor):
        return gradient, None, [], 0.0, "none", 0.0, 0, None, []
    n, sums = gradient.behind, gradient.sums
    vectors = [*n.vectors(), sums.grad_weight, sums.grad_bias]
    return (
        gradient.grad, n.z, vectors, n.eps, n.act, n.negative_slope, gradient.values,
        *(gradient.pooled or (None, [])),
    )  # fmt: skip
