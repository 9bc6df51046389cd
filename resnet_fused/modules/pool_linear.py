"""The head of a network: global average pool → flatten → linear, as one step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from resnet_fused import conv_choice
from resnet_fused.backends.native_conv import NativeConv, Program, unusable
from resnet_fused.kept import Kept
from resnet_fused.ops.schema import is_channels_last
from resnet_fused.packing import Folded, program

_ONE, _NONE = [1, 1], [0, 0]


@dataclass(slots=True)
class PoolLinear:
    """Equivalent to ``linear(torch.flatten(pool(input), 1))``.

    In inference on a CPU the linear layer is a 1x1 convolution of a single pixel with packed
    weights; one batch of few images reads those at memory speed, three times as fast as addmm.
    """

    _folded: Kept[Folded] = field(default_factory=Kept, compare=False)
    _program: tuple[object, Program] | None = field(default=None, compare=False)

    def __reduce__(self) -> tuple[type[PoolLinear], tuple[()]]:
        return type(self), ()

    def __call__(self, input: Tensor, pool: nn.AdaptiveAvgPool2d, linear: nn.Linear) -> Tensor:
        if not self._may_run(input, linear):
            return linear(torch.flatten(pool(input), 1))
        pooled = torch.ops.resnet_fused._average_pixels(input)
        return torch.flatten(self._packed(pooled, linear)(pooled), 1)

    def _may_run(self, input: Tensor, linear: nn.Linear) -> bool:
        weight, bias = linear._parameters["weight"], linear._parameters["bias"]
        return (
            not torch.compiler.is_compiling()
            and input.is_cpu
            and input.layout == torch.strided
            and input.dim() == 4
            and input.numel() > 0
            and is_channels_last(input)
            and unusable(input.dtype) is None
            and not torch.is_autocast_enabled("cpu")
            and isinstance(weight, Tensor)
            and weight.layout == torch.strided
            and weight.is_cpu
            and weight.dtype == input.dtype
            and weight.shape[1] == input.shape[1]
            and not (
                torch.is_grad_enabled()
                and any(t is not None and t.requires_grad for t in (input, weight, bias))
            )
        )

    def _packed(self, pooled: Tensor, linear: nn.Linear) -> Program:
        weight, bias = linear._parameters["weight"], linear._parameters["bias"]
        assert weight is not None

        def fold() -> Folded:
            kernel = weight.detach()[:, :, None, None]
            return Folded(kernel, None, bias, _ONE, _NONE, _ONE, 1, pooled.dtype)

        folded = self._folded.get((pooled.dtype,), (weight, bias), fold)
        key = folded, pooled.shape
        known = self._program  # another thread may put its own there
        if known is None or known[0] != key:
            batch, channels = pooled.shape[:2]
            problem = conv_choice.ConvProblem(
                batch, channels, (1, 1), weight.shape[0], (1, 1), (1, 1), (0, 0), (1, 1), 1,
                pooled.dtype == torch.bfloat16,
            )  # fmt: skip
            conv = folded.prepare(problem, "direct")
            assert isinstance(conv, NativeConv)
            known = self._program = key, program(conv, False, "none", 0.0)
        return known[1]
