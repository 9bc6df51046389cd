"""What goes over memory once: affine steps, batch norm in training, pools and the head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import functional
from resnet_fused.backends import native_conv, reference
from resnet_fused.modules.max_pool import MaxPool
from resnet_fused.modules.pool_linear import PoolLinear
from resnet_fused.ops.schema import ACTIVATIONS
from resnet_fused.ops.select import uses_reference

from .draw import DTYPES, LAYOUTS, Place, size_text, without_corners
from .measure import OperatorCase, Results, Variant

EPS, SLOPE = 1e-5, 0.1
SHAPES = ((2, 64, 14, 14), (4, 256, 7, 7), (2, 5, 1, 31))
ODD = (3, 33, 9, 7)


def backends(place: Place) -> list[str]:
    """Those that run the passes here, or plain PyTorch."""
    found = []
    for name in ("native", "triton"):
        try:
            uses_reference(name, torch.empty(1, device=place.device, dtype=place.dtype))
        except RuntimeError:
            continue
        found.append(name)
    return found or ["reference"]


def affine(dtype: str, device: str) -> Iterator[Variant]:
    """scale_shift_act and bn_act with all activations, forward and backward."""
    for layout, memory_format in LAYOUTS.items():
        place = Place(DTYPES[dtype], memory_format, device)
        for backend in backends(place):
            name = f"{backend}, {layout}"
            for operator, make, ours, plain in (
                ("scale_shift_act", _scaled, _scale_shift_act, _scale_shift_act_plain),
                ("bn_act", _normalised, _bn_act, _bn_act_plain),
            ):
                cases = [
                    OperatorCase(
                        f"{size_text(shape)}, {act}{' + residual' * adds}",
                        partial(make, place, shape, act, adds), partial(ours, backend), plain,
                    )
                    for shape, act, adds in _kinds()
                ]  # fmt: skip
                yield Variant(operator, name, dtype, "parity", cases)


def _kinds() -> Iterator[tuple[tuple[int, ...], str, bool]]:
    """Shapes with activations, and whether a residual is added."""
    for act in ACTIVATIONS:
        yield ODD, act, False
        yield ODD, act, True
    for shape in SHAPES:
        yield shape, "relu", True
        yield shape, "none", False


# --- act(x · scale + shift + residual) ----------------------------------------------------------


def _scaled(place: Place, shape: tuple[int, ...], act: str, adds: bool) -> Sequence[Any]:
    vectors = place.vector(shape[1], 0.5, 1.5), place.vector(shape[1], -1.0, 1.0)
    return place.images(*shape), *vectors, place.images(*shape) if adds else None, act


def _scale_shift_act(
    backend: str, x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str
) -> Results:
    y = functional.scale_shift_act(
        x, scale, shift, residual, act=act, negative_slope=SLOPE, backend=backend
    )
    return {"output": [y]}


def _scale_shift_act_plain(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str
) -> Results:
    """As eager PyTorch has it: a batch norm with fixed statistics, an addition, an activation."""
    zeros = torch.zeros_like(scale)
    y = F.batch_norm(x, zeros, torch.ones_like(scale), scale, shift, False, 0.0, 0.0)
    return {"output": [reference.activation(act, SLOPE)(y if residual is None else y + residual)]}


# --- batch norm in training ---------------------------------------------------------------------


def _normalised(place: Place, shape: tuple[int, ...], act: str, adds: bool) -> Sequence[Any]:
    x, residual = place.images(*shape), place.images(*shape) if adds else None
    vectors = place.vector(shape[1], 0.5, 1.5), place.vector(shape[1], -0.5, 0.5)
    wide, weight, bias = (t.double() for t in (x, *vectors))
    added = None if residual is None else residual.double()
    argument, _, _ = _bn_plain(wide, weight, bias, added, "none")
    grad = without_corners(place.images(*shape), argument, act)
    return x, *vectors, residual, grad, act


def _bn_plain(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and biased variance."""
    mean, var = torch.zeros_like(weight), torch.ones_like(weight)
    y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, EPS)
    count = x.numel() // x.shape[1]
    y = reference.activation(act, SLOPE)(y if residual is None else y + residual)
    return y, mean, var * ((count - 1) / count)


def _bn_act(backend: str, x: Tensor, *rest: Any) -> Results:
    def run(
        x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, act: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        return functional.bn_act(
            x, None, None, weight, bias, residual,
            training=True, eps=EPS, act=act, negative_slope=SLOPE, backend=backend,
        )  # fmt: skip

    return _with_gradients(run, x, *rest)


def _bn_act_plain(x: Tensor, *rest: Any) -> Results:
    return _with_gradients(_bn_plain, x, *rest)


def _with_gradients(
    run: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, grad: Tensor,
    act: str,
) -> Results:  # fmt: skip
    leaves = {"grad_input": x, "grad_weight": weight, "grad_bias": bias}
    if residual is not None:
        leaves["grad_residual"] = residual
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    y, mean, var = run(*list(leaves.values())[:3], leaves.get("grad_residual"), act)
    found = torch.autograd.grad(y, list(leaves.values()), grad)
    gradients = {name: [g] for name, g in zip(leaves, found, strict=True)}
    return {"output": [y.detach()], "mean": [mean], "var": [var], **gradients}


# --- pools and the head -------------------------------------------------------------------------

WINDOWS = ((3, 2, 1), (2, 2, 0), (3, 1, 1))  # kernel size, stride and padding
HEADS = ((2, 512, 7, 7, 1000), (5, 64, 8, 8, 10), (1, 2048, 7, 7, 100))


def pools(dtype: str, device: str) -> Iterator[Variant]:
    """Max pooling, which rounds nothing, and average pool with linear layer; not PyTorch's."""
    place = Place(DTYPES[dtype], device=device)
    name = f"{backends(place)[0]}, channels_last"
    cases = [
        OperatorCase(
            f"{size_text(shape)}, {kernel}x{kernel}, stride {stride}",
            partial(_pooled, place, shape, kernel, stride, padding), _max_pool, _max_pool_plain,
        )
        for shape in (SHAPES[0], ODD) for kernel, stride, padding in WINDOWS
    ]  # fmt: skip
    if device != "cpu" or dtype != "float16":
        yield Variant("max_pool", name, dtype, "exact", cases)
    if device == "cpu" and native_conv.unusable(place.dtype) is None:
        heads = [
            OperatorCase(
                f"{size_text(shape)} → {outputs}", partial(_head, place, tuple(shape), outputs),
                _pool_linear, _pool_linear_plain,
            )
            for *shape, outputs in HEADS
        ]  # fmt: skip
        yield Variant("pool and linear", "packed", dtype, "parity", heads)


def _pooled(
    place: Place, shape: tuple[int, ...], kernel: int, stride: int, padding: int
) -> Sequence[Any]:
    return place.images(*shape), nn.MaxPool2d(kernel, stride, padding)


def _max_pool(x: Tensor, pool: nn.MaxPool2d) -> Results:
    return {"output": [MaxPool()(x, pool)]}


def _max_pool_plain(x: Tensor, pool: nn.MaxPool2d) -> Results:
    return {"output": [pool(x)]}


def _head(place: Place, shape: tuple[int, ...], outputs: int) -> Sequence[Any]:
    linear = nn.Linear(shape[1], outputs).to(place.device, place.dtype).requires_grad_(False)
    return place.images(*shape), nn.AdaptiveAvgPool2d(1), linear


def _pool_linear(x: Tensor, pool: nn.AdaptiveAvgPool2d, linear: nn.Linear) -> Results:
    return {"output": [PoolLinear()(x, pool, linear)]}


def _pool_linear_plain(x: Tensor, pool: nn.AdaptiveAvgPool2d, linear: nn.Linear) -> Results:
    return {"output": [linear(torch.flatten(pool(x), 1))]}
