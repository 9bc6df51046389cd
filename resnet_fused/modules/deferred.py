"""An activation that is not computed yet, so that the step which reads it need not keep it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused.modules.batch_norm import affine, update_running_statistics
from resnet_fused.ops.recompute import BatchNormAct, BatchNormActConv, BatchNormActMaxPool


class Deferred(NamedTuple):
    """act(bn(z)) with batch statistics; exactly one of the methods is called, once."""

    z: Tensor
    bn: nn.BatchNorm2d
    act: str
    negative_slope: float

    def conv(self, weight: Tensor, bias: Tensor | None, options: tuple[object, ...]) -> Tensor:
        """conv2d(act(bn(z)), weight, bias, *options); keeps z for backward, not the activation."""
        vectors = affine(self.bn, self.z)
        return self._finish(
            BatchNormActConv.apply(self.z, *vectors, weight, bias, self._norm(), options)
        )

    def max_pool(self, options: tuple[object, ...]) -> Tensor:
        """max_pool2d(act(bn(z)), *options); keeps z and the indices for backward."""
        return self._finish(
            BatchNormActMaxPool.apply(self.z, *affine(self.bn, self.z), self._norm(), options)
        )

    def tensor(self) -> Tensor:
        """act(bn(z)) after all."""
        return self._finish(
            torch.ops.resnet_fused.bn_act(self.z, None, *affine(self.bn, self.z), *self._norm())
        )

    def _norm(self) -> BatchNormAct:
        return BatchNormAct(self.bn.eps, self.act, self.negative_slope)

    def _finish(self, result: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        output, mean, var = result
        update_running_statistics(self.bn, mean, var, self.z.numel() // self.z.shape[1])
        return output
