"""BN → (+ residual) → activation as one step, after a convolution or by itself (pre-activation)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from resnet_fused import fold
from resnet_fused.backends import gpu_kernels, reference
from resnet_fused.backends.triton import support
from resnet_fused.checks import DTYPES
from resnet_fused.kept import Kept
from resnet_fused.modules.batch_norm import (
    affine,
    check_input,
    process_group,
    update_running_statistics,
    uses_batch_statistics,
)
from resnet_fused.modules.deferred import Deferred
from resnet_fused.ops import gpu
from resnet_fused.ops.schema import statistics_dtype
from resnet_fused.ops.select import native_unusable
from resnet_fused.ops.synchronise import SyncBatchNormAct
from resnet_fused.packing import state_of


@dataclass(slots=True)
class BNAct:
    """BN → (+ residual) → activation, for any device, dtype and mode.

    Equivalent to ``act(bn(input) + residual)``. Holds no parameters: the model's own module is
    handed over at each call.
    """

    act: str
    negative_slope: float = 0.01
    inplace_add: bool = False  # written `out += residual`: the sum keeps out's dtype and shape
    defers: bool = False  # the only reader is a step that takes a Deferred
    folded: Kept[tuple[Tensor, Tensor]] = field(default_factory=Kept, compare=False)

    def __call__(
        self,
        input: Tensor,
        bn: nn.BatchNorm2d,
        residual: Tensor | None = None,
        *,
        overwrite: bool = False,
    ) -> Tensor | Deferred:
        """`overwrite` says that nobody else holds `input`, so that it may become the output."""
        if support.on_gpu(input):
            output = self._fixed_on_gpu(input, bn, residual)
            if output is not None:
                return output
        check_input(bn, input)
        group = process_group(bn)
        # A process without images takes part all the same: the others wait for its sums.
        fits = _plain(input, bn) and (input.numel() > 0 or group is not None)
        if not fits or not _addable(residual, input):
            return self.finish(bn(input), residual)
        options = (self.act, self.negative_slope)
        if not uses_batch_statistics(bn):
            vectors = self._vectors(bn, statistics_dtype(input.dtype))
            overwrites = overwrite and input.is_cpu and not torch.is_grad_enabled()
            if overwrites and native_unusable(input) is None:
                torch.ops.resnet_fused._scale_shift_act_(input, *vectors, residual, *options)
                if not input.is_inference():
                    torch.autograd.graph.increment_version(input)  # compiled operators don't
                return input
            return torch.ops.resnet_fused.scale_shift_act(input, *vectors, residual, *options)
        if group is not None and torch.compiler.is_compiling():
            return self.finish(bn(input), residual)
        if group is not None:
            output, mean, var, count = SyncBatchNormAct.apply(
                input, residual, *affine(bn, input), (bn.eps, *options), group
            )
            update_running_statistics(bn, mean, var, int(count))
            return output
        if (
            self.defers
            and residual is None
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        ):
            return Deferred(input, bn, *options)
        output, mean, var = torch.ops.resnet_fused.bn_act(
            input, residual, *affine(bn, input), bn.eps, *options
        )
        update_running_statistics(bn, mean, var, input.numel() // input.shape[1])
        return output

    def _fixed_on_gpu(
        self, input: Tensor, bn: nn.BatchNorm2d, residual: Tensor | None
    ) -> Tensor | None:
        """With fixed statistics and without a gradient, in as little Python as can be."""
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or uses_batch_statistics(bn)
            or gpu_kernels.unusable(input) is not None
            or input.layout != torch.strided
            or not _addable(residual, input)
        ):
            return None
        vectors = self._vectors(bn, torch.float32)
        if input.dim() != 4 or input.shape[1:2] != vectors[0].shape:
            return None
        if input.device != vectors[0].device:
            return None
        arguments = (input, *vectors, residual, self.act, self.negative_slope)
        if not gpu_kernels.compiled(input) and gpu.unseen(input):
            output: Tensor = gpu.kernels("scale_shift_act").scale_shift_act(*arguments)
            return output
        return torch.ops.resnet_fused.scale_shift_act(*arguments)

    def _vectors(self, bn: nn.BatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        sources = state_of(bn)
        mean, var, weight, bias, _ = sources
        assert mean is not None and var is not None

        def make() -> tuple[Tensor, Tensor]:
            return fold.scale_and_shift(mean, var, weight, bias, bn.eps, dtype=dtype)

        differentiable = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in sources
        )
        if differentiable or torch.compiler.is_compiling():
            return make()
        return self.folded.get((bn.eps, dtype), sources, make)

    def finish(self, output: Tensor, residual: Tensor | None) -> Tensor:
        """What follows batch norm as eager PyTorch does it, with its type promotion and errors."""
        if residual is not None:
            output = output.add_(residual) if self.inplace_add else output + residual
        return reference.activation(self.act, self.negative_slope)(output)


def _plain(input: Tensor, bn: nn.BatchNorm2d) -> bool:
    """Whether a kernel takes it, and is not slower than PyTorch's own modules."""
    if support.on_gpu(input) and not torch.compiler.is_compiling():
        if gpu_kernels.unusable(input) is not None:
            return False
        records = torch.is_grad_enabled() or uses_batch_statistics(bn)
        small = input.nbytes < support.LEAST_STEP_BYTES
        if records and small and process_group(bn) is None:
            return False
    return input.dtype in DTYPES and input.layout == torch.strided


def _addable(residual: Tensor | None, output: Tensor) -> bool:
    return residual is None or (
        isinstance(residual, Tensor)
        and residual.shape == output.shape
        and residual.dtype == output.dtype
        and residual.device == output.device
        and residual.layout == torch.strided
    )
