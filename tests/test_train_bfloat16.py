"""The kernels of a training step on bfloat16 data, whose weights are float32."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fused.backends import native, native_conv

pytestmark = pytest.mark.skipif(
    not native.available or not native_conv.multiplies_bf16(), reason="AVX512_BF16"
)
ops = torch.ops.resnet_fused


@pytest.mark.parametrize(
    ("algorithm", "channels", "kernel", "stride"),
    [("direct", 50, 1, 1), ("direct", 50, 3, 2), ("direct", 3, 7, 2), ("direct", 15, 2, 1),
     ("direct", 1, 3, 1), ("winograd2", 50, 3, 1), ("winograd3", 50, 3, 2),
     ("winograd2_late", 50, 3, 1), ("winograd2_late", 140, 3, 1), ("winograd3_late", 50, 3, 2),
     ("winograd3_late", 300, 3, 2), ("winograd4", 50, 3, 1), ("winograd4_late", 50, 3, 2)],
)  # fmt: skip
def test_bfloat16(algorithm: str, channels: int, kernel: int, stride: int) -> None:
    """Weights stay float32 in the model; what is multiplied may be rounded, sums are float32."""
    padding = kernel // 2
    x = torch.randn(3, channels, 14, 13).bfloat16().to(memory_format=torch.channels_last)
    weight = torch.randn(70, channels, kernel, kernel) / (channels * kernel**2) ** 0.5
    geometry = [stride, stride, padding, padding, 1, 1]
    none: tuple[Any, ...] = ([], 0.0, "none", 0.0)
    z, _, var = ops._train_conv(x, *none, weight, None, geometry, algorithm)
    truth = torch.conv2d(x.double(), weight.double(), None, stride, padding)
    grad = torch.randn(z.shape).bfloat16().to(memory_format=torch.channels_last)
    da, dw, *_ = ops._train_conv_backward(
        grad, None, [], 0.0, "none", 0.0, 0, None, [], x, *none, weight, geometry, None,
        algorithm if stride == 1 else "direct", "winograd4" if kernel == 3 else "gemm",
    )  # fmt: skip
    truths = torch.ops.aten.convolution_backward(
        grad.double(), x.double(), weight.double(), None, [stride] * 2, [padding] * 2, [1, 1],
        False, [0, 0], 1, [True, True, False],
    )  # fmt: skip

    def error(actual: Tensor, expected: Tensor) -> float:
        return float((actual.double() - expected).norm() / expected.norm())

    rounds = algorithm.startswith(("winograd2", "winograd3"))
    assert error(z, truth) < (6e-3 if rounds else 3e-3)  # eager PyTorch: 2.4e-3
    assert error(da, truths[0]) < (6e-3 if rounds and stride == 1 else 3e-3)
    assert error(dw, truths[1]) < 2e-6  # float32 throughout
    assert error(var, z.double().var((0, 2, 3), unbiased=False)) < 1e-6


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_weights_made_beside_the_products(
    seed: int, layout: torch.memory_format, poisoned: None
) -> None:
    """As exact as weights that are made before: any number of tiles, outputs and channels."""
    source = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(8):
        stride = source.choice([1, 2])
        images, channels, outputs = (
            source.randint(1, 6), 2 * source.randint(1, 140), source.choice([2, 32, 70, 96])
        )  # fmt: skip
        x = torch.randn(images, channels, source.randint(3, 17), source.randint(3, 17))
        x = x.bfloat16().to(memory_format=torch.channels_last)
        weight = torch.randn(outputs, channels, 3, 3) / (channels * 9) ** 0.5
        weight = weight.contiguous(memory_format=layout)
        truth = torch.conv2d(x.double(), weight.double(), None, stride, 1)
        name = "winograd2" if stride == 1 else "winograd3"
        ahead, beside = (
            ops._train_conv(x, [], 0.0, "none", 0.0, weight, None, [stride] * 2 + [1] * 4, a)[0]
            for a in (name, f"{name}_late")
        )
        scale = truth.abs().max()
        # Of many outputs some one rounds the other way.
        assert ((ahead.double() - beside.double()).abs().max() / scale) < 2**-7
        errors = [float((z.double() - truth).norm() / truth.norm()) for z in (ahead, beside)]
        assert errors[1] < 1.05 * errors[0]
