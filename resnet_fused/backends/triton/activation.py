"""Activations and their derivatives inside Triton kernels, for tiles of float32.

The same formulas as csrc/common/activation.h, for the same reasons: NaN goes where PyTorch's eager
kernels send it. So relu is ``x < 0 ? 0 : x`` and never a maximum, whose PTX form drops NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, slope, ACT: tl.constexpr):
    """act(x); `slope` is leaky_relu's (Inductor passes Python's numbers in 64 bits)."""
    if ACT == "relu":
        return tl.where(x < 0, 0.0, x)
    elif ACT == "relu6":
        low = tl.where(x < 0, 0.0, x)
        return tl.where(low > 6, 6.0, low)
    elif ACT == "leaky_relu":
        return tl.where(x > 0, x, x * tl.cast(slope, tl.float32))
    elif ACT == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACT == "hardswish":
        low = tl.where(x + 3 < 0, 0.0, x + 3)
        return x * tl.where(low > 6, 6.0, low) / 6
    elif ACT == "gelu":
        return x * _normal_cdf(x)
    else:
        return x


@triton.jit
def activate_backward(grad, x, slope, ACT: tl.constexpr):
    """grad · act'(x); for relu, relu6 and leaky_relu x may be act(x) instead."""
    if ACT == "relu":
        return tl.where(x <= 0, 0.0, grad)
    elif ACT == "relu6":
        return tl.where((x > 0) & (x < 6), grad, 0.0)
    elif ACT == "leaky_relu":
        return tl.where(x > 0, grad, grad * tl.cast(slope, tl.float32))
    elif ACT == "silu":
        gate = 1.0 / (1.0 + tl.exp(-x))
        return grad * gate * (1.0 + x * (1.0 - gate))
    elif ACT == "hardswish":
        inside = tl.where(x < 3, grad * (x / 3 + 0.5), grad)
        return tl.where(x <= -3, 0.0, inside)
    elif ACT == "gelu":
        density = tl.exp(-0.5 * x * x) * 0.3989422804014327  # 1 / sqrt(2 pi)
        return grad * (_normal_cdf(x) + x * density)
    else:
        return grad


@triton.jit
def _normal_cdf(x):
    return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
