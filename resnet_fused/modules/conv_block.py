"""The convolutions of a residual block as one step of a model's forward.

In inference on a CPU they run in one call, without Python between them, a few images at a time so
that what lies between two convolutions stays in cache. Otherwise they run one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.backends.native_conv import NativeConv, Program, Wired, unusable
from resnet_fused.modules.batch_norm import uses_batch_statistics
from resnet_fused.modules.conv_bn_act import ConvBNAct, any_requires_grad
from resnet_fused.modules.deferred import Deferred
from resnet_fused.ops.schema import is_channels_last

INPUT = 0  # the value that a block reads; convolution i writes value 2 + i (native_conv.Wired)
OUTSIDE = 2


@dataclass(slots=True)
class ConvBlock:
    """Several :class:`ConvBNAct` whose values nobody else reads.

    Equivalent to calling the steps one after the other. `wiring` says which values each reads.
    """

    steps: tuple[ConvBNAct, ...]
    wiring: tuple[Wired, ...]
    _program: tuple[list[NativeConv], Program] | None = field(default=None, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.steps, self.wiring)  # a copy packs its own weights

    def __call__(
        self, input: Tensor | Deferred, *modules: nn.Conv2d | nn.BatchNorm2d | None
    ) -> Tensor | Deferred:
        """`modules` are the convolution and the batch norm (or None) of each step in turn."""
        program = self._ready(input, modules)
        if program is not None:
            assert isinstance(input, Tensor)
            return program(input, None)
        values: list[Any] = [input, None]
        for i, (step, wired) in enumerate(zip(self.steps, self.wiring, strict=True)):
            conv, bn = modules[2 * i : 2 * i + 2]
            residual = None if wired.residual < 0 else values[wired.residual]
            values.append(step(values[wired.input], conv, bn, residual))  # type: ignore[arg-type]
        return values[-1]

    def _ready(self, input: Tensor | Deferred, modules: tuple[Any, ...]) -> Program | None:
        """The block as one call, or None where its steps have to choose for themselves."""
        if (
            isinstance(input, Deferred)
            or torch.compiler.is_compiling()
            or not input.is_cpu
            or input.layout != torch.strided
            or unusable(input.dtype) is not None
            or torch.is_autocast_enabled("cpu")
            or not (is_channels_last(input) or is_channels_last(modules[0].weight))
        ):
            return None
        shapes: list[tuple[int, ...]] = [input.shape, ()]
        convs: list[NativeConv] = []
        for i, (step, wired) in enumerate(zip(self.steps, self.wiring, strict=True)):
            conv, bn = modules[2 * i : 2 * i + 2]
            if bn is not None and uses_batch_statistics(bn):
                return None
            if torch.is_grad_enabled() and any_requires_grad(input, conv, bn, None):
                return None
            if conv._parameters["weight"].dtype != input.dtype:
                return None
            prepared = step.packed.folded(conv, bn, input.dtype).for_shape(shapes[wired.input])
            if not isinstance(prepared, NativeConv):
                return None
            if wired.residual >= 0 and shapes[wired.residual] != prepared.output_shape:
                return None
            convs.append(prepared)
            shapes.append(prepared.output_shape)
        if self._program is None or self._program[0] != convs:
            self._program = convs, Program(convs, self.wiring)
        return self._program[1]


def wire(step: ConvBNAct, input: int, residual: int) -> Wired:
    """A step's place in a block."""
    return Wired(input, residual, step.after.act, step.after.negative_slope)
