"""Random numbers for the cases: images, trained batch norms, gradients away from corners."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resnet_fused.conv_choice import ConvProblem

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

CORNERS = {"relu": (0.0,), "relu6": (0.0, 6.0), "leaky_relu": (0.0,), "hardswish": (-3.0, 3.0)}
"""Where an activation's derivative jumps."""
_CORNER_ROUNDINGS = 16  # of what an activation reads, that a computation may be off by


@dataclass(frozen=True)
class Place:
    """What tensors are made for: a dtype, a layout and a device."""

    dtype: torch.dtype
    layout: torch.memory_format = torch.channels_last
    device: str = "cpu"

    def images(self, *shape: int) -> Tensor:
        """Noise around a mean of its own in each channel; of four dimensions in the layout."""
        noise = torch.randn(shape)
        noise += torch.randn(shape[1]).view(-1, *[1] * (len(shape) - 2)) / 2
        tensor = noise.to(self.device, self.dtype)
        return tensor.contiguous(memory_format=self.layout) if len(shape) == 4 else tensor

    def vector(self, channels: int, low: float, high: float) -> Tensor:
        """One float32 number for each channel (float64 beside such data)."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.empty(channels).uniform_(low, high).to(self.device, wide)

    def weight(self, problem: ConvProblem) -> Tensor:
        """A convolution's weight, whose output is of its input's size; in float32."""
        channels = problem.channels // problem.groups
        shape = (problem.out_channels, channels, *problem.kernel)
        return (torch.randn(shape) / (channels * problem.kernel[0] * problem.kernel[1]) ** 0.5).to(
            self.device, memory_format=torch.channels_last
        )


def trained(module: nn.Module) -> nn.Module:
    """The module, its batch norms as after training: no fold is the identity."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor, low, high in (
                (part.weight, 0.5, 1.5), (part.bias, -0.3, 0.3),
                (part.running_mean, -0.3, 0.3), (part.running_var, 0.5, 1.5),
            ):  # fmt: skip
                assert tensor is not None
                nn.init.uniform_(tensor, low, high)
    return module


def without_corners(grad: Tensor, argument: Tensor, act: str) -> Tensor:
    """The gradient of an activation's output, 0 where rounding decides the derivative.

    Args:
        argument: of the activation, in float64.
    """
    margin = _CORNER_ROUNDINGS * torch.finfo(grad.dtype).eps * argument.abs().max()
    near = torch.zeros_like(argument, dtype=torch.bool)
    for corner in CORNERS.get(act, ()):
        near |= (argument - corner).abs() < margin
    return grad.masked_fill(near, 0.0)


def shape_text(problem: ConvProblem) -> str:
    """A convolution's sizes, what is usual left out: "2x64x14x14 → 64, 3x3, stride 2"."""
    kernel, stride, padding = problem.kernel, problem.stride, problem.padding
    words = [f"{_by(problem.batch, problem.channels, *problem.size)} → {problem.out_channels}"]
    words.append(_by(*kernel))
    if stride != (1, 1):
        words.append(f"stride {stride[0]}")
    if padding != (kernel[0] // 2, kernel[1] // 2):
        words.append(f"padding {padding[0]}")
    if problem.dilation != (1, 1):
        words.append(f"dilation {problem.dilation[0]}")
    if problem.groups > 1:
        words.append(f"groups {problem.groups}")
    return ", ".join(words)


def size_text(shape: Sequence[int]) -> str:
    """A tensor's shape: "2x64x14x14"."""
    return _by(*shape)


def _by(*numbers: int) -> str:
    return "x".join(map(str, numbers))
