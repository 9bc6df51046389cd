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
        ValueError: the vectors differ in length.

    Paper: Jacob et al., *Quantization and Training of Neural Networks* (2018), section 3.2.
    """
    for name, vector in (
        ("var", var),
        ("weight", weight),
        ("bias", bias),
        ("conv_bias", conv_bias),
    ):
        if vector is not None and vector.shape != mean.shape:
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
