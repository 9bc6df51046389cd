"""The library's operators at a network's shapes: what they are called with, and if they are right.

A subject is one operator at one shape. Its data are random, of a network's magnitudes. What goes
into an activation stays away from zero, where a rounding would open it in one implementation and
close it in another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from roofline import Ceilings, Layer, shape_text
from torch import Tensor

import resnet_fused  # noqa: F401  (registers the operators)
from resnet_fused.benchmark import BenchmarkError
from resnet_fused.benchmark.case import DTYPES
from resnet_fused.parity import error_budget, relative_error

OPERATORS = ("conv_bn_act", "scale_shift_act", "bn_act", "bn_act_backward")
EPS = 1e-5

_ACTS = {"none": lambda x: x, "relu": F.relu}
_JUDGED = 4  # images whose outputs are compared


@dataclass(frozen=True)
class Subject:
    """An operator at the shape of `layer`, which `count` layers of the network have."""

    operator: str
    layer: Layer
    count: int = 1

    @property
    def name(self) -> str:
        """The first layer's, and how many there are like it."""
        more = f" +{self.count - 1}" if self.count > 1 else ""
        return f"{self.layer.name}{more}"

    @property
    def shape(self) -> str:
        if self.operator == "conv_bn_act":
            text = shape_text(self.layer.problem)
        else:
            height, width = self.layer.problem.out_size
            text = f"{self.layer.problem.out_channels}x{height}x{width}"
        parts = [text, *(["add"] if self.layer.residual else []), self.layer.act]
        return " ".join(part for part in parts if part != "none")

    @property
    def flops(self) -> int:
        """What is multiplied; the other operators wait for memory alone."""
        return self.layer.flops if self.operator == "conv_bn_act" else 0

    @property
    def bytes(self) -> int:
        """What the operator has to move, if nothing stays in a cache between its passes.

        In outputs: scale_shift_act 2; bn_act 3, as it reads its input twice; bn_act_backward 5, the
        gradient and the input twice each. A residual is one more forward; backward it is the
        output, read for the activation's mask, and its own gradient, written: 2 more.
        """
        if self.operator == "conv_bn_act":
            return self.layer.epilogue_bytes
        passes = {"scale_shift_act": 2, "bn_act": 3, "bn_act_backward": 5}[self.operator]
        more = 2 if self.operator == "bn_act_backward" else 1
        return (passes + more * self.layer.residual) * self.layer.output_bytes

    def floor_s(self, ceilings: Ceilings) -> float:
        """The least seconds that it can take."""
        return max(self.bytes / ceilings.bandwidth, self.flops / ceilings.flops)


def subjects(operator: str, layers: Sequence[Layer]) -> list[Subject]:
    """One subject for each distinct shape, in the network's order.

    Raises:
        BenchmarkError: there is no such operator.
    """
    if operator not in OPERATORS:
        raise BenchmarkError(
            f"unknown operator {operator!r}; there are {', '.join(OPERATORS)} and resnet50's layers"
        )
    found: dict[object, Subject] = {}
    for layer in layers:
        subject = Subject(operator, layer)
        shape = layer.problem if operator == "conv_bn_act" else subject.shape
        known = found.get((shape, subject.shape))
        count = known.count + 1 if known else 1
        found[shape, subject.shape] = replace(known or subject, count=count)
    return list(found.values())


def arguments(subject: Subject, device: torch.device, dtype: str, *, seed: int = 0) -> list[Any]:
    """What the operator is called with: fresh tensors, in its schema's order."""
    generator = torch.Generator(device).manual_seed(seed)
    layer, problem = subject.layer, subject.layer.problem

    def uniform(low: float, high: float) -> Tensor:
        values = torch.rand(problem.out_channels, device=device, generator=generator)
        return values * (high - low) + low

    def image(channels: int, size: tuple[int, int]) -> Tensor:
        shape = (problem.batch, channels, *size)
        values = torch.empty(
            shape, device=device, dtype=DTYPES[dtype], memory_format=torch.channels_last
        )
        return values.normal_(generator=generator)

    affine = uniform(0.5, 1.5), uniform(-0.1, 0.1)
    if subject.operator == "conv_bn_act":
        weight = torch.randn(
            problem.out_channels, problem.channels // problem.groups, *problem.kernel,
            device=device, generator=generator,
        )  # fmt: skip
        weight = (weight / layer.taps**0.5).to(DTYPES[dtype], memory_format=torch.channels_last)
        x = image(problem.channels, problem.size)
        residual = image(problem.out_channels, problem.out_size) if layer.residual else None
        options = (problem.stride, problem.padding, problem.dilation, problem.groups)
        return [x, weight, *affine, residual, *options, layer.act, 0.0]
    x = image(problem.out_channels, problem.out_size)
    x = x + x.sign() / 2
    residual = x / 2 if layer.residual else None
    if subject.operator == "scale_shift_act":
        return [x, *affine, residual, layer.act, 0.0]
    forward = [x, residual, *affine, EPS, layer.act, 0.0]
    if subject.operator == "bn_act":
        return forward
    output, mean, var = torch.ops.resnet_fused.bn_act(*forward)
    kept = output if layer.residual else None
    grad = image(problem.out_channels, problem.out_size)
    return [grad, x, None, kept, mean, var, *affine, EPS, layer.act, 0.0, layer.residual]


def run(subject: Subject, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
    """Call the operator."""
    results = getattr(torch.ops.resnet_fused, subject.operator)(*arguments)
    return results if isinstance(results, tuple) else (results,)


@torch.no_grad()
def errors(subject: Subject, arguments: Sequence[Any], dtype: str) -> tuple[float, float]:
    """The operator's error against float64, and what it may be: that which leaves the least room.

    The budget is that of the library's comparator (resnet_fused/parity.py); of the outputs with an
    image dimension the first few images are compared.
    """
    exact = _plain(subject, [_widened(a) for a in arguments])
    eager = _plain(subject, arguments)
    rows = []
    for ours, theirs, truth in zip(run(subject, arguments), eager, exact, strict=False):
        few = slice(len(truth) if truth.dim() == 1 else _JUDGED)
        budget = error_budget(relative_error(theirs[few], truth[few]), DTYPES[dtype])
        rows.append((relative_error(ours[few], truth[few]), budget))
    return max(rows, key=lambda row: row[0] / row[1])


def convolution(arguments: Sequence[Any]) -> Tensor:
    """PyTorch's convolution alone, of conv_bn_act's arguments."""
    x, weight, _, _, _, stride, padding, dilation, groups, *_ = arguments
    return torch.conv2d(x, weight, None, stride, padding, dilation, groups)


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def _plain(subject: Subject, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
    """What plain PyTorch computes, in the dtype of the arguments; of convolutions a few images."""
    if subject.operator == "conv_bn_act":
        x, weight, scale, shift, residual, *options, act, _ = arguments
        few = None if residual is None else residual[:_JUDGED]
        z = convolution([x[:_JUDGED], weight, scale, shift, few, *options])
        return (_affine(z, scale, shift, few, act),)
    if subject.operator == "scale_shift_act":
        x, scale, shift, residual, act, _ = arguments
        return (_affine(x, scale, shift, residual, act),)
    if subject.operator == "bn_act":
        x, residual, weight, bias, eps, act, _ = arguments
        return _batch_norm(x, residual, weight, bias, eps, act)
    grad, x, _, _, _, _, weight, bias, eps, act, _, has_residual = arguments
    wanted = [x, x / 2, weight, bias] if has_residual else [x, weight, bias]
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in wanted]
        residual = leaves[1] if has_residual else None
        y, *_ = _batch_norm(leaves[0], residual, leaves[-2], leaves[-1], eps, act)
        found = torch.autograd.grad(y, leaves, grad)
    without = (x.new_empty(0),)
    return (found[0], *(found[1:2] if has_residual else without), *found[-2:])


def _affine(z: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str) -> Tensor:
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
    # F.batch_norm refuses an eps of 0 since torch 2.11.
    y = torch.batch_norm(z, scale, shift, zeros, ones, False, 0.0, 0.0, True)
    return _ACTS[act](y if residual is None else y + residual)


def _batch_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    wide = x if x.dtype == torch.float64 else x.float()
    var, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
    return _ACTS[act](y if residual is None else y + residual), mean, var
