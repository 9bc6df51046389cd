"""Batch normalisation with fixed statistics is one multiplication and one addition per channel."""

from __future__ import annotations

import torch
from torch import Tensor


def scale_and_shift(
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    conv_bias: Tensor | None = None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    r"""The two vectors with :math:`\mathrm{BN}(z + b) = z \cdot scale + shift`.

    .. math::
        scale = \frac{weight}{\sqrt{var + eps}}, \qquad shift = bias + (b - mean) \cdot scale

    Args:
        mean, var: statistics, shape (C,).
        weight, bias: BN's affine parameters, shape (C,), or None for 1 and 0.
        eps: added to the variance.
        conv_bias: the bias `b` of the convolution before, shape (C,), or None.
        dtype: of the result. The arithmetic is float64, so the fold itself costs no accuracy.

    Raises:
        TypeError: a vector is not a tensor of real numbers, or `dtype` has no fractions.
        ValueError: the vectors differ in length.

    Paper: Jacob et al., *Quantization and Training of Neural Networks* (2018), section 3.2.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating one, got {dtype}")
    for name, vector in (
        ("mean", mean),
        ("var", var),
        ("weight", weight),
        ("bias", bias),
        ("conv_bias", conv_bias),
    ):
        if vector is None and name not in ("mean", "var"):
            continue
        if not (
            isinstance(vector, Tensor)
            and vector.is_floating_point()
            and vector.layout == torch.strided
        ):
            kind = vector.dtype if isinstance(vector, Tensor) else type(vector).__name__
            raise TypeError(f"{name}: expected a dense tensor of real numbers, got {kind}")
        if vector.shape != mean.shape:
            raise ValueError(
                f"{name}: expected mean's shape {tuple(mean.shape)}, got {tuple(vector.shape)}"
            )
    scale = (var.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    offset = -mean.double() if conv_bias is None else conv_bias.double() - mean.double()
    shift = offset * scale
    if bias is not None:
        shift = shift + bias.double()
    return scale.to(dtype), shift.to(dtype)
