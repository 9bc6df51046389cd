"""What the public functions demand of their arguments, and how they say so."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from resnet_fused.ops.schema import ACTIVATIONS, statistics_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def tensor(name: str, value: object, *, optional: bool = False) -> None:
    """Demand a dense, strided tensor of a supported floating dtype."""
    if value is None and optional:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_quantized:
        kind = "quantized" if value.is_quantized else str(value.layout)
        raise TypeError(f"{name}: expected a dense strided tensor, got a {kind} one")
    if value.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{name}: expected a dtype out of {names}, got {value.dtype}")


def tensors(name: str, values: Sequence[object]) -> None:
    """Demand tensors of any kind."""
    for i, value in enumerate(values):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}[{i}]: expected a tensor, got {type(value).__name__}")


def module(name: str, value: object) -> None:
    """Demand an nn.Module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: expected an nn.Module, got {type(value).__name__}")


def rank(name: str, value: Tensor, *, at_least: int, at_most: int | None = None) -> None:
    """Demand a number of dimensions."""
    if value.dim() < at_least or (at_most is not None and value.dim() > at_most):
        wanted = (
            f"{at_least}" if at_most == at_least else f"{at_least} to {at_most}"
            if at_most else f"at least {at_least}"
        )  # fmt: skip
        raise ValueError(f"{name}: expected {wanted} dimensions, got shape {tuple(value.shape)}")


def same(name: str, value: Tensor | None, like: Tensor, *, of: str = "input") -> None:
    """Demand the dtype and the device of another argument."""
    if value is None:
        return
    if value.dtype != like.dtype:
        raise TypeError(f"{name}: expected {of}'s dtype {like.dtype}, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name}: expected {of}'s device {like.device}, got {value.device}")


def shape(name: str, value: Tensor | None, wanted: Sequence[int]) -> None:
    """Demand an exact shape."""
    if value is not None and tuple(value.shape) != tuple(wanted):
        raise ValueError(f"{name}: expected shape {tuple(wanted)}, got {tuple(value.shape)}")


def channel_vector(name: str, value: Tensor | None, channels: int, data: Tensor) -> Tensor | None:
    """Demand one number per channel; give it in the dtype that statistics have beside `data`."""
    if value is None:
        return None
    tensor(name, value)
    shape(name, value, (channels,))
    if value.device != data.device:
        raise ValueError(f"{name}: expected input's device {data.device}, got {value.device}")
    wanted = statistics_dtype(data.dtype)
    if value.dtype not in (wanted, data.dtype):
        raise TypeError(f"{name}: expected dtype {wanted} or {data.dtype}, got {value.dtype}")
    return value.to(wanted)


def activation(act: object, negative_slope: object) -> None:
    """Demand a known activation and a usable slope."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act: expected one of {', '.join(ACTIVATIONS)}, got {act!r}")
    # Not negative, because the backward pass reads the sign of the argument off the output.
    if not _is_number(negative_slope) or not 0 <= negative_slope < math.inf:  # type: ignore[operator]
        raise ValueError(f"negative_slope: expected a finite number >= 0, got {negative_slope!r}")


def epsilon(eps: object) -> None:
    """Demand a finite number that is not negative."""
    if not _is_number(eps) or not 0 <= eps < math.inf:  # type: ignore[operator]
        raise ValueError(f"eps: expected a finite number >= 0, got {eps!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat))


def pair(name: str, value: int | Sequence[int], *, least: int) -> list[int]:
    """Demand one integer or two, none below `least`; give two."""
    values = list(value) if isinstance(value, Sequence) else [value, value]
    if len(values) != 2 or not all(
        isinstance(v, (int, torch.SymInt)) and not isinstance(v, bool) for v in values
    ):
        raise ValueError(f"{name}: expected an integer or a pair of integers, got {value!r}")
    if any(v < least for v in values):
        raise ValueError(f"{name}: expected numbers >= {least}, got {value!r}")
    return values
