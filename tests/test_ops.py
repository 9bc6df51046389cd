"""The registered operators: schemas, fakes, autograd registration, autocast, and what they may not
do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from activations import ACTS
from test_functional import CONVS, LAYOUTS, bn_arguments, conv_arguments, noise, plain_bn
from tolerance import assert_all_parity, to_double
from torch import Tensor

import resnet_fused  # noqa: F401  (registers the operators)
from resnet_fused.ops.schema import ACTIVATIONS, NAMESPACE

OPS = ("conv_bn_act", "scale_shift_act", "bn_act", "bn_act_backward")
ops = torch.ops.resnet_fused

Sample = tuple[str, tuple[Any, ...]]


def pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def conv_sample(
    case: str, dtype: torch.dtype, layout: str, residual: bool, act: str = "relu"
) -> Sample:
    *_, stride, padding, dilation, groups = CONVS[case]
    args = conv_arguments(case, dtype, layout, residual)
    return "conv_bn_act", (*args, pair(stride), pair(padding), pair(dilation), groups, act, 0.1)


def scale_sample(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, residual: bool, act: str = "relu"
) -> Sample:
    return "scale_shift_act", (*bn_arguments(shape, dtype, layout, residual), act, 0.1)


def bn_sample(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, residual: bool, act: str = "relu"
) -> Sample:
    x, weight, bias, other = bn_arguments(shape, dtype, layout, residual)
    return "bn_act", (x, other, weight, bias, 1e-5, act, 0.1)


def backward_sample(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, residual: bool, act: str = "relu"
) -> Sample:
    _, (x, other, weight, bias, eps, _, slope) = bn_sample(shape, dtype, layout, residual, act)
    y, mean, var = ops.bn_act(x, other, weight, bias, eps, act, slope)
    piecewise = act in ("none", "relu", "relu6", "leaky_relu")
    kept = None if piecewise else other, y if residual and piecewise and act != "none" else None
    grad = (
        noise(*shape, dtype=torch.float64, seed=8)
        .to(dtype)
        .contiguous(memory_format=LAYOUTS[layout])
    )
    return "bn_act_backward", (grad, x, *kept, mean, var, weight, bias, eps, act, slope, residual)


SHAPE = (3, 5, 4, 6)
MAKERS: dict[str, Callable[..., Sample]] = {
    "conv_bn_act": lambda *a: conv_sample("odd", *a),
    "scale_shift_act": lambda *a: scale_sample(SHAPE, *a),
    "bn_act": lambda *a: bn_sample(SHAPE, *a),
    "bn_act_backward": lambda *a: backward_sample(SHAPE, *a),
}


def with_gradients(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.requires_grad_() if isinstance(a, Tensor) else a for a in args)


@pytest.mark.parametrize("op", OPS)
def test_schema_says_that_nothing_is_changed(op: str) -> None:
    schema = getattr(ops, op).default._schema
    assert not schema.is_mutable
    assert all(r.alias_info is None for r in schema.returns)
    assert torch.Tag.pt2_compliant_tag in getattr(ops, op).default.tags


def test_namespace_and_activations_are_pinned() -> None:
    assert NAMESPACE == "resnet_fused"
    assert set(ACTIVATIONS) == set(ACTS)
    assert {name for name in OPS if hasattr(ops, name)} == set(OPS)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, dtype: torch.dtype, layout: str, residual: bool) -> None:
    name, args = MAKERS[op](dtype, layout, residual)
    if op != "bn_act_backward":
        args = with_gradients(args)
    torch.library.opcheck(getattr(ops, name).default, args)


@pytest.mark.parametrize("act", ["none", "silu", "gelu", "hardswish", "relu6", "leaky_relu"])
@pytest.mark.parametrize("op", OPS)
def test_opcheck_of_every_activation(op: str, act: str) -> None:
    name, args = MAKERS[op](torch.float32, "nhwc", True, act)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(ops, name).default, args, test_utils=utils)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CONVS)
def test_conv_fake_gives_the_strides(case: str, layout: str) -> None:
    name, args = conv_sample(case, torch.float32, layout, True)
    torch.library.opcheck(
        getattr(ops, name).default, args, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("kind", ["sliced", "transposed", "expanded"])
@pytest.mark.parametrize("op", ["scale_shift_act", "bn_act"])
def test_fake_of_views(op: str, kind: str) -> None:
    base = noise(4, 8, 10, 10)
    x = {
        "sliced": base[::2, ::2, ::2],
        "transposed": base.transpose(2, 3),
        "expanded": base[:, :1].expand(4, 8, 10, 10),
    }
    one, zero = torch.ones(x[kind].shape[1]), torch.zeros(x[kind].shape[1])
    args = (
        (x[kind], one, zero, None, "relu", 0.0)
        if op == "scale_shift_act"
        else (x[kind], None, one, zero, 1e-5, "relu", 0.0)
    )
    torch.library.opcheck(
        getattr(ops, op).default, args, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("op", OPS)
def test_meta_tensors_give_shapes(op: str) -> None:
    name, args = MAKERS[op](torch.float32, "nhwc", True)
    real = getattr(ops, name)(*args)
    fake = getattr(ops, name)(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
    for r, f in zip(
        real if isinstance(real, tuple) else [real],
        fake if isinstance(fake, tuple) else [fake],
        strict=True,
    ):
        assert (f.shape, f.dtype, f.device.type) == (r.shape, r.dtype, "meta")


@pytest.mark.parametrize("op", OPS)
def test_arguments_are_untouched(op: str) -> None:
    name, args = MAKERS[op](torch.float32, "nchw", True)
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    getattr(ops, name)(*args)
    assert all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(args, before, strict=True)
    )


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_backward_operator_is_autograds(act: str, residual: bool) -> None:
    """bn_act_backward by itself against the gradients of plain PyTorch."""
    _, args = backward_sample((4, 5, 6, 7), torch.float32, "nhwc", residual, act)
    _, (x, other, weight, bias, *_) = bn_sample((4, 5, 6, 7), torch.float32, "nhwc", residual, act)

    def plain(values: list[Tensor]) -> list[Tensor]:
        leaves = [v.requires_grad_() for v in values]
        y = plain_bn(leaves[0], leaves[1], leaves[2], leaves[3] if residual else None, act=act)[0]
        return list(torch.autograd.grad(y, leaves, args[0].to(y.dtype)))

    inputs = [v for v in (x, weight, bias, other) if v is not None]
    grad_input, grad_residual, grad_weight, grad_bias = ops.bn_act_backward(*args)
    actual = [grad_input, grad_weight, grad_bias] + ([grad_residual] if residual else [])
    assert_all_parity(actual, plain(inputs), plain(to_double(inputs)), what=act)
    assert residual or grad_residual.numel() == 0


def test_training_keeps_little_for_backward() -> None:
    """ReLU without a sum: the conv output and per-channel vectors, not the activation as well."""
    x = noise(4, 8, 16, 16).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.bn_act(x * 1.0, None, torch.ones(8), torch.zeros(8), 1e-5, "relu", 0.0)
    large = [t for t in kept if t.numel() > 100]
    assert len(large) == 1, [tuple(t.shape) for t in kept]


@pytest.mark.parametrize("length", [0, 4, 6])
@pytest.mark.parametrize("argument", ["scale", "shift", "weight", "bias", "mean", "var"])
def test_wrong_lengths_reach_no_memory(argument: str, length: int) -> None:
    """The operators themselves, called past the functional layer, refuse vectors of another
    length.
    """
    x, good, bad = noise(2, 5, 4, 4), torch.ones(5), torch.ones(length)
    calls: dict[str, Callable[[], Any]] = {
        "scale": lambda: ops.scale_shift_act(x, bad, good, None, "relu", 0.0),
        "shift": lambda: ops.scale_shift_act(x, good, bad, None, "relu", 0.0),
        "weight": lambda: ops.bn_act(x, None, bad, good, 1e-5, "relu", 0.0),
        "bias": lambda: ops.bn_act(x, None, good, bad, 1e-5, "relu", 0.0),
        "mean": lambda: ops.bn_act_backward(
            x, x, None, None, bad, good, good, good, 1e-5, "relu", 0.0, False
        ),
        "var": lambda: ops.bn_act_backward(
            x, x, None, None, good, bad, good, good, 1e-5, "relu", 0.0, False
        ),
    }
    with pytest.raises((RuntimeError, ValueError)):
        calls[argument]()
