"""The functional operators against plain PyTorch in the same dtype and in float64, forward and
backward.

Every activation, dtype, layout and backend; channels and sizes that are a multiple of nothing;
fresh memory poisoned with NaN; NaN, infinities and −0.0 as eager has them; statistics that cancel;
the same bits at every number of threads. Long because the operators share shapes, dtypes and makers
of inputs, and are held to the same list.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from activations import ACTS
from tolerance import (
    assert_all_parity,
    assert_function_parity,
    assert_parity,
    assert_same_layout,
    to_double,
)
from torch import Tensor

from resnet_fused import functional
from resnet_fused.ops.select import native_unusable

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
_missing = native_unusable(torch.zeros(1))
BACKENDS = [
    pytest.param("native", marks=pytest.mark.skipif(_missing is not None, reason=str(_missing))),
    "reference",
]
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
EVERY_ACT = pytest.mark.parametrize("act", ACTS)
WITH_AND_WITHOUT_RESIDUAL = pytest.mark.parametrize(
    "with_residual", [False, True], ids=["plain", "residual"]
)

# batch, channels, height, width, outputs, kernel, stride, padding, dilation, groups
CONVS: dict[str, tuple[Any, ...]] = {
    "3x3": (2, 16, 8, 8, 16, 3, 1, 1, 1, 1),
    "odd": (3, 7, 9, 5, 13, 3, 1, 1, 1, 1),
    "stride2": (2, 6, 11, 10, 9, 3, 2, 1, 1, 1),
    "1x1": (2, 17, 7, 7, 33, 1, 1, 0, 1, 1),
    "1x1stride2": (1, 8, 7, 9, 5, 1, 2, 0, 1, 1),
    "stem": (1, 3, 20, 23, 16, 7, 2, 3, 1, 1),
    "pixel": (2, 5, 1, 1, 6, 3, 1, 1, 1, 1),
    "row": (2, 4, 1, 19, 8, (1, 3), (1, 2), (0, 1), 1, 1),
    "padded": (1, 4, 5, 5, 4, 3, 1, 4, 1, 1),
    "partly valid": (2, 24, 9, 8, 16, 3, 1, (0, 1), 1, 1),
    "dilated": (2, 6, 12, 11, 4, 3, 1, 2, 2, 1),
    "unequal": (2, 6, 9, 12, 4, (3, 5), (2, 1), (1, 2), (1, 2), 1),
    "grouped": (2, 12, 8, 7, 18, 3, 1, 1, 1, 3),
    "depthwise": (2, 11, 8, 7, 11, 3, 1, 1, 1, 11),
    "multiplier": (2, 5, 8, 7, 10, 3, 2, 1, 1, 5),
    "deep": (1, 130, 5, 6, 70, 3, 1, 1, 1, 1),
    "even": (2, 6, 8, 8, 6, 2, 2, 0, 1, 1),
    "empty": (0, 6, 8, 8, 4, 3, 1, 1, 1, 1),
}


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def channels(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (like.dim() - 2))


def plain_scale_shift(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, *, act: str = "none"
) -> Tensor:
    """What a model does: batch norm with fixed statistics, addition, activation, each rounded to
    the dtype.
    """
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
    # F.batch_norm refuses an eps of 0 since torch 2.11.
    y = torch.batch_norm(x, scale, shift, zeros, ones, False, 0.0, 0.0, True)
    return ACTS[act](y if residual is None else y + residual)


def plain_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    act: str,
    **options: Any,
) -> Tensor:
    return plain_scale_shift(F.conv2d(x, weight, None, **options), scale, shift, residual, act=act)


def plain_bn(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    act: str,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    y = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    dims = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(
        x.detach().to(torch.promote_types(x.dtype, torch.float32)), dims, correction=0
    )
    return ACTS[act](y if residual is None else y + residual), mean, var


def options_of(case: str) -> dict[str, Any]:
    return dict(zip(("stride", "padding", "dilation", "groups"), CONVS[case][6:], strict=True))


def conv_arguments(
    case: str, dtype: torch.dtype, layout: str, residual: bool
) -> list[Tensor | None]:
    n, c, h, w, k, kernel = CONVS[case][:6]
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    x = noise(n, c, h, w, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    weight = (
        noise(k, c // CONVS[case][9], *size, dtype=dtype, seed=1) / (c * size[0] * size[1]) ** 0.5
    )
    statistics = torch.promote_types(dtype, torch.float32)
    scale, shift = noise(k, dtype=statistics, seed=2), noise(k, dtype=statistics, seed=3)
    shape = F.conv2d(x, weight, None, **options_of(case)).shape
    other = (
        noise(*shape, dtype=dtype, seed=4).contiguous(memory_format=LAYOUTS[layout])
        if residual
        else None
    )
    return [x, weight, scale, shift, other]


def bn_arguments(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, residual: bool
) -> list[Tensor | None]:
    memory = LAYOUTS[layout] if len(shape) == 4 else torch.contiguous_format
    x = (noise(*shape, dtype=dtype) * 2.0 + 0.5).contiguous(memory_format=memory)
    statistics = torch.promote_types(dtype, torch.float32)
    weight, bias = (
        noise(shape[1], dtype=statistics, seed=2),
        noise(shape[1], dtype=statistics, seed=3),
    )
    other = (
        noise(*shape, dtype=dtype, seed=4).contiguous(memory_format=memory) if residual else None
    )
    return [x, weight, bias, other]


def slope(act: str) -> dict[str, Any]:
    return {"act": act, "negative_slope": 0.1}


def conv_function(
    case: str, act: str, backend: str
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    options = options_of(case)
    return (
        lambda *args: functional.conv_bn_act(*args, **options, **slope(act), backend=backend),
        lambda *args: plain_conv(*args, act=act, **options),
    )


def bn_function(
    act: str, backend: str, eps: float = 1e-5
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return (
        lambda x, weight, bias, residual: functional.bn_act(
            x,
            None,
            None,
            weight,
            bias,
            residual,
            training=True,
            eps=eps,
            **slope(act),
            backend=backend,
        ),
        lambda x, weight, bias, residual: plain_bn(x, weight, bias, residual, act=act, eps=eps),
    )


def gradients(
    function: Callable[..., Any], args: list[Tensor | None], *, contiguous: bool = False
) -> list[Tensor]:
    """Gradients of a random projection of the first output, for every tensor argument.

    The cotangent has the output's layout, as in a model, unless it is to be contiguous.
    """
    leaves = [a if a is None else a.detach().requires_grad_() for a in args]
    output = function(*leaves)
    output = output[0] if isinstance(output, tuple) else output
    cotangent = noise(*output.shape, dtype=torch.float64, seed=9).to(output.dtype)
    if not contiguous:
        cotangent = torch.empty_like(output).copy_(cotangent)
    wanted = [a for a in leaves if a is not None]
    return list(torch.autograd.grad(output, wanted, cotangent))


def assert_gradient_parity(
    pair: tuple[Callable[..., Any], Callable[..., Any]], args: list[Tensor | None]
) -> None:
    tested, plain = pair
    actual, eager = gradients(tested, args), gradients(plain, args)
    assert_all_parity(actual, eager, gradients(plain, to_double(args)), what="gradient")
    assert_same_layout(actual[0], eager[0], what="gradient of input")


# --- conv_bn_act --------------------


@EVERY_BACKEND
@WITH_AND_WITHOUT_RESIDUAL
@EVERY_LAYOUT
@EVERY_DTYPE
@EVERY_ACT
def test_conv_forward(
    act: str, dtype: torch.dtype, layout: str, with_residual: bool, backend: str
) -> None:
    args = conv_arguments("odd", dtype, layout, with_residual)
    assert_function_parity(*conv_function("odd", act, backend), *args, same_layout=True)


@EVERY_BACKEND
@EVERY_LAYOUT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CONVS)
def test_conv_shapes(case: str, dtype: torch.dtype, layout: str, backend: str) -> None:
    for residual in (False, True):
        args = conv_arguments(case, dtype, layout, residual)
        assert_function_parity(*conv_function(case, "relu", backend), *args, same_layout=True)


@EVERY_BACKEND
@WITH_AND_WITHOUT_RESIDUAL
@EVERY_ACT
@pytest.mark.parametrize("case", ["odd", "stride2", "grouped", "1x1"])
def test_conv_backward(case: str, act: str, with_residual: bool, backend: str) -> None:
    for dtype, layout in itertools.product([torch.float32, torch.float64], LAYOUTS):
        args = conv_arguments(case, dtype, layout, with_residual)
        assert_gradient_parity(conv_function(case, act, backend), args)


@EVERY_BACKEND
@pytest.mark.parametrize("missing", ["scale", "shift", "both"])
def test_conv_without_scale_or_shift(missing: str, backend: str) -> None:
    x, weight, scale, shift, _ = conv_arguments("odd", torch.float32, "nhwc", False)
    assert scale is not None and shift is not None
    given = {
        "scale": None if missing != "shift" else scale,
        "shift": None if missing != "scale" else shift,
    }
    whole = [
        scale if missing == "shift" else torch.ones_like(scale),
        shift if missing == "scale" else torch.zeros_like(shift),
    ]
    plain = conv_function("odd", "relu", backend)[1]
    assert_function_parity(
        lambda a, b, *_: functional.conv_bn_act(
            a, b, **given, padding=1, act="relu", backend=backend
        ),
        plain,
        x,
        weight,
        *whole,
    )


@EVERY_BACKEND
def test_padding_is_zero_not_shift(backend: str) -> None:
    """A pixel outside the image is 0, whatever the shift: a constant image's border shows it."""
    x, weight = torch.zeros(1, 2, 4, 4), torch.ones(3, 2, 3, 3)
    shift = torch.full((3,), 5.0)
    y = functional.conv_bn_act(x, weight, None, shift, padding=1, act="relu", backend=backend)
    assert torch.equal(y, torch.full((1, 3, 4, 4), 5.0))


@EVERY_BACKEND
def test_layout_follows_the_weight_too(backend: str) -> None:
    x, weight, scale, shift, residual = conv_arguments("3x3", torch.float32, "nchw", True)
    assert weight is not None
    args = (x, weight.contiguous(memory_format=torch.channels_last), scale, shift, residual)
    assert_function_parity(*conv_function("3x3", "relu", backend), *args, same_layout=True)


@EVERY_BACKEND
@pytest.mark.parametrize("kind", ["sliced", "expanded", "transposed", "offset", "mixed_layouts"])
def test_conv_of_views(kind: str, backend: str) -> None:
    base, (_, weight, scale, shift, _) = (
        noise(4, 16, 18, 18),
        conv_arguments("odd", torch.float32, "nchw", False),
    )
    x = {
        "sliced": base[::2, 1:15:2, ::2, 1::3],
        "expanded": base[:1, :7].expand(3, 7, 18, 18),
        "transposed": base[:, :7].transpose(2, 3),
        "offset": base[1:, 9:, 3:, 5:],
        "mixed_layouts": base[:, :7],
    }[kind]
    shape = F.conv2d(x, weight, padding=1).shape  # type: ignore[arg-type]
    residual = noise(*shape, seed=5)
    if kind == "expanded":
        residual = residual[:, :, :1].expand(shape)
    if kind == "mixed_layouts":
        residual = residual.contiguous(memory_format=torch.channels_last)
    tested, plain = conv_function("odd", "relu", backend)
    before = base.clone(), residual.clone()
    assert_function_parity(tested, plain, x, weight, scale, shift, residual)
    assert torch.equal(base, before[0]) and torch.equal(residual, before[1])


# --- scale_shift_act --------------------


@EVERY_BACKEND
@WITH_AND_WITHOUT_RESIDUAL
@EVERY_LAYOUT
@EVERY_DTYPE
@EVERY_ACT
def test_scale_shift(
    act: str, dtype: torch.dtype, layout: str, with_residual: bool, backend: str
) -> None:
    args = bn_arguments((3, 13, 5, 7), dtype, layout, with_residual)
    pair = (
        lambda *a: functional.scale_shift_act(*a, **slope(act), backend=backend),
        lambda *a: plain_scale_shift(*a, act=act),
    )
    assert_function_parity(*pair, *args, same_layout=True)
    if dtype in (torch.float32, torch.float64):
        assert_gradient_parity(pair, args)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_results_are_rounded_to_nearest(dtype: torch.dtype, backend: str) -> None:
    """To even where two are as near: what float32's sums are stored as, bit for bit."""
    eps = torch.finfo(dtype).eps
    x, shift = noise(4, 33, 9, 8, dtype=dtype), noise(33)
    x[:, 0] = 1 + eps * torch.arange(72).view(9, 8)
    shift[0] = eps / 2
    y = functional.scale_shift_act(x, torch.ones(33), shift, backend=backend)
    assert torch.equal(y, (x.float() + shift.view(-1, 1, 1)).to(dtype))


# --- bn_act --------------------

BN_SHAPES = {
    "usual": (4, 16, 8, 8),
    "odd": (3, 13, 5, 7),
    "one_image": (1, 7, 9, 9),
    "one_pixel": (5, 9, 1, 1),
    "one_channel": (4, 1, 6, 5),
    "wide": (2, 300, 3, 3),
    "long": (2, 3, 129, 65),
    "flat": (17, 9),
    "line": (4, 6, 11),
    "empty": (0, 5, 4, 4),
}


@EVERY_BACKEND
@WITH_AND_WITHOUT_RESIDUAL
@EVERY_LAYOUT
@EVERY_DTYPE
@EVERY_ACT
def test_bn_forward(
    act: str, dtype: torch.dtype, layout: str, with_residual: bool, backend: str
) -> None:
    args = bn_arguments(BN_SHAPES["odd"], dtype, layout, with_residual)
    assert_function_parity(*bn_function(act, backend), *args, same_layout=True)


@EVERY_BACKEND
@WITH_AND_WITHOUT_RESIDUAL
@EVERY_LAYOUT
@EVERY_ACT
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_bn_backward(
    act: str, dtype: torch.dtype, layout: str, with_residual: bool, backend: str
) -> None:
    assert_gradient_parity(
        bn_function(act, backend), bn_arguments((4, 13, 6, 7), dtype, layout, with_residual)
    )


@EVERY_BACKEND
@EVERY_LAYOUT
@pytest.mark.parametrize("shape", [s for s in BN_SHAPES if s != "empty"])
def test_bn_shapes(shape: str, layout: str, backend: str) -> None:
    for residual in (False, True):
        args = bn_arguments(BN_SHAPES[shape], torch.float32, layout, residual)
        assert_function_parity(*bn_function("relu", backend), *args, same_layout=True)
        assert_gradient_parity(bn_function("relu", backend), args)


@EVERY_BACKEND
@pytest.mark.parametrize("op", ["conv", "bn"])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_a_gradient_in_another_layout(act: str, op: str, backend: str) -> None:
    pair = conv_function("3x3", act, backend) if op == "conv" else bn_function(act, backend)
    if op == "conv":
        args = conv_arguments("3x3", torch.float32, "nhwc", True)
    else:
        args = bn_arguments((4, 13, 6, 7), torch.float32, "nhwc", True)
    actual, eager, reference = (
        gradients(function, values, contiguous=True)
        for function, values in ((pair[0], args), (pair[1], args), (pair[1], to_double(args)))
    )
    assert_all_parity(actual, eager, reference, what="gradient")


@EVERY_BACKEND
def test_bn_of_an_empty_batch(backend: str) -> None:
    x = torch.zeros(0, 5, 4, 4, requires_grad=True)
    y, _, _ = functional.bn_act(x, training=True, act="relu", backend=backend)
    y.sum().backward()
    assert y.shape == x.shape
    assert x.grad is not None and x.grad.shape == x.shape


@EVERY_BACKEND
@pytest.mark.parametrize("given", ["none", "weight", "bias"])
def test_bn_without_affine(given: str, backend: str) -> None:
    x, weight, bias, residual = bn_arguments((4, 13, 6, 7), torch.float32, "nhwc", True)
    args: list[Tensor | None] = [
        x,
        weight if given == "weight" else None,
        bias if given == "bias" else None,
        residual,
    ]
    if given == "bias":  # eager wants a weight beside a bias
        plain = lambda a, _, b, r: plain_bn(a, torch.ones_like(b), b, r, act="relu")  # noqa: E731
    else:
        plain = bn_function("relu", backend)[1]
    assert_function_parity(bn_function("relu", backend)[0], plain, *args)
    assert_gradient_parity((bn_function("relu", backend)[0], plain), args)


@EVERY_BACKEND
@EVERY_LAYOUT
@pytest.mark.parametrize(
    ("mean", "std"), [(1e4, 1.0), (1000.0, 0.1), (-1e4, 1.0), (0.0, 1e-4), (1e6, 100.0)]
)
def test_bn_statistics_do_not_cancel(mean: float, std: float, layout: str, backend: str) -> None:
    x, weight, bias, _ = bn_arguments((4, 9, 16, 17), torch.float32, layout, False)
    assert x is not None
    x = noise(4, 9, 16, 17).mul(std).add(mean).contiguous(memory_format=LAYOUTS[layout])
    tested, plain = bn_function("none", backend)
    actual, eager = tested(x, weight, bias, None), plain(x, weight, bias, None)
    reference = plain(*to_double([x, weight, bias, None]))
    # A mean near zero is what is left of values that cancel: their size is what its error is to.
    scales = (None, x.abs().max().item(), None)
    for name, a, e, r, scale in zip(
        ("output", "mean", "var"), actual, eager, reference, scales, strict=True
    ):
        assert_parity(a, e, r, what=name, scale=scale)
    assert (actual[2] > 0).all()


@EVERY_BACKEND
def test_bn_with_a_constant_channel(backend: str) -> None:
    """Variance 0 exactly: eps alone is under the root, however large the constant."""
    x = torch.stack([torch.full((6, 6), c) for c in (0.0, 3.0, 1e4, -1e6)]).expand(3, 4, 6, 6)
    y, mean, var = functional.bn_act(x, training=True, backend=backend)
    assert (
        torch.equal(var, torch.zeros(4))
        and torch.equal(mean, x[0, :, 0, 0])
        and torch.equal(y, torch.zeros_like(y))
    )


@EVERY_BACKEND
@EVERY_ACT
def test_bn_evaluation(act: str, backend: str) -> None:
    x, weight, bias, residual = bn_arguments((3, 13, 5, 7), torch.float32, "nhwc", True)
    mean, var = noise(13, seed=6), noise(13, seed=7).abs() + 0.2
    kept = mean.clone(), var.clone()

    def plain(
        a: Tensor, m: Tensor, v: Tensor, w: Tensor, b: Tensor, r: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return ACTS[act](F.batch_norm(a, m, v, w, b, False, 0.0, 1e-3) + r), m, v

    def tested(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return functional.bn_act(*args, eps=1e-3, **slope(act), backend=backend)

    _, returned_mean, returned_var = assert_function_parity(
        tested, plain, x, mean, var, weight, bias, residual
    )
    returned_mean.add_(1.0)
    returned_var.add_(1.0)
    assert torch.equal(mean, kept[0]) and torch.equal(var, kept[1])


@EVERY_BACKEND
def test_bn_training_leaves_running_statistics_alone(backend: str) -> None:
    mean, var = torch.full((5,), 2.0), torch.full((5,), 3.0)
    _, batch_mean, batch_var = functional.bn_act(
        noise(2, 5, 4, 4), mean, var, training=True, backend=backend
    )
    assert torch.equal(mean, torch.full((5,), 2.0)) and torch.equal(var, torch.full((5,), 3.0))
    assert not batch_mean.requires_grad and not batch_var.requires_grad
    assert_parity(
        batch_mean,
        *(noise(2, 5, 4, 4).to(d).mean((0, 2, 3)) for d in (torch.float32, torch.float64)),
    )


# --- odd values --------------------

ODD = [
    float("nan"),
    float("inf"),
    float("-inf"),
    -0.0,
    0.0,
    1e-45,
    -1e-45,
    3.4e38,
    -3.4e38,
    6.0,
    -3.0,
    3.0,
]


def signs(tensor: Tensor) -> Tensor:
    return torch.where(tensor == 0, torch.signbit(tensor).to(tensor.dtype), tensor.new_zeros(()))


@EVERY_BACKEND
@EVERY_LAYOUT
@pytest.mark.parametrize("act", ["none", "relu", "relu6", "leaky_relu"])
def test_odd_values_pass_as_in_eager(act: str, layout: str, backend: str) -> None:
    """scale 1 and shift −0.0 give the value itself: NaN, infinities and the sign of zero survive
    as in eager.
    """
    x = torch.tensor(ODD * 6).reshape(2, 3, 3, 4).contiguous(memory_format=LAYOUTS[layout])
    scale, shift = torch.ones(3), torch.full((3,), -0.0)
    actual = functional.scale_shift_act(x, scale, shift, **slope(act), backend=backend)
    eager = ACTS[act](x)
    assert_parity(actual, eager, ACTS[act](x.double()), what=act)
    assert torch.equal(signs(actual), signs(eager)), "the sign of a zero"


@EVERY_BACKEND
@EVERY_ACT
@pytest.mark.parametrize("where", ["input", "residual"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_odd_pixels_through_every_operator(
    value: float, where: str, act: str, backend: str
) -> None:
    for shape in ((3, 7, 9, 5), (3, 7, 9, 5)):
        conv = conv_arguments("odd", torch.float32, "nhwc", True)
        norm = bn_arguments(shape, torch.float32, "nhwc", True)
        for args in (conv, norm):
            tensor = args[0] if where == "input" else args[-1]
            assert tensor is not None
            tensor[1, 2, 3, 3] = value
        assert_function_parity(*conv_function("odd", act, backend), *conv)
        if (
            where == "residual"
        ):  # an odd input makes the batch's statistics NaN, which the models test
            assert_function_parity(*bn_function(act, backend), *norm)


@EVERY_BACKEND
@EVERY_LAYOUT
def test_gradient_where_the_output_is_nan(layout: str, backend: str) -> None:
    """ReLU's mask at NaN is eager's: the gradient passes."""
    x = noise(2, 5, 4, 6).contiguous(memory_format=LAYOUTS[layout])
    x[0, 1, 2, 3] = float("nan")
    actual, eager, reference = (
        gradients(f, [x.to(d), torch.ones(5, dtype=d), torch.zeros(5, dtype=d)])
        for f, d in (
            (lambda *a: functional.scale_shift_act(*a, act="relu", backend=backend), torch.float32),
            (lambda *a: plain_scale_shift(*a, act="relu"), torch.float32),
            (lambda *a: plain_scale_shift(*a, act="relu"), torch.float64),
        )
    )
    assert_all_parity(actual, eager, reference, what="gradient")


# --- determinism, autograd, transforms --------------------


@EVERY_BACKEND
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_at_every_number_of_threads(layout: str, backend: str) -> None:
    args = bn_arguments((5, 37, 23, 19), torch.float32, layout, True)
    conv = conv_arguments("grouped", torch.float32, layout, True)
    results = []
    for threads in (1, 2, 3, 4, 2):
        torch.set_num_threads(threads)
        result = [
            *bn_function("relu", backend)[0](*args),
            *gradients(bn_function("relu", backend)[0], args),
            functional.scale_shift_act(*args, act="silu", backend=backend),
        ]
        if layout != "nchw":  # where the convolution is plain PyTorch's, which does not promise it
            result.append(conv_function("grouped", "relu", backend)[0](*conv))
        results.append(result)
    if (
        backend == "reference"
    ):  # plain PyTorch's own sums depend on the threads: what repeats is what is asked
        assert all(torch.equal(a, b) for a, b in zip(results[1], results[4], strict=True))
        return
    for result in results[1:]:
        for i, (a, b) in enumerate(zip(result, results[0], strict=True)):
            assert torch.equal(a, b), f"result {i} differs"


@EVERY_BACKEND
@WITH_AND_WITHOUT_RESIDUAL
@pytest.mark.parametrize("act", ["none", "leaky_relu", "silu", "gelu", "hardswish", "relu6"])
def test_gradcheck(act: str, with_residual: bool, backend: str) -> None:
    x, weight, bias, residual = bn_arguments((3, 4, 3, 2), torch.float64, "nhwc", with_residual)
    leaves = [a.requires_grad_() for a in (x, weight, bias, residual) if a is not None]

    def normalise(a: Tensor, w: Tensor, b: Tensor, r: Tensor | None = None) -> Tensor:
        return bn_function(act, backend)[0](a, w, b, r)[0]

    torch.utils.deterministic.fill_uninitialized_memory = False
    assert torch.autograd.gradcheck(normalise, leaves)
    assert torch.autograd.gradcheck(
        lambda *a: functional.scale_shift_act(*a, **slope(act), backend=backend), leaves
    )
    kernel = noise(3, 4, 2, 2, dtype=torch.float64, seed=1).requires_grad_()
    vectors = [noise(3, dtype=torch.float64, seed=s).requires_grad_() for s in (2, 3)]
    other = (
        [noise(3, 3, 2, 1, dtype=torch.float64, seed=5).requires_grad_()] if with_residual else []
    )
    assert torch.autograd.gradcheck(
        lambda *a: functional.conv_bn_act(*a, **slope(act), backend=backend),
        [leaves[0], kernel, *vectors, *other],
    )


@EVERY_BACKEND
@pytest.mark.parametrize("op", ["conv", "scale_shift", "bn"])
def test_second_derivative_is_right_or_refused(op: str, backend: str) -> None:
    x, weight, bias, _ = bn_arguments((3, 4, 3, 2), torch.float64, "nchw", False)
    assert x is not None and weight is not None and bias is not None
    kernel = noise(4, 4, 2, 2, dtype=torch.float64, seed=1)
    function: Callable[..., Tensor] = {
        "conv": lambda a, k, s, t: functional.conv_bn_act(a, k, s, t, act="silu", backend=backend),
        "scale_shift": lambda a, s, t: functional.scale_shift_act(
            a, s, t, act="silu", backend=backend
        ),
        "bn": lambda a, s, t: functional.bn_act(
            a, None, None, s, t, training=True, act="silu", backend=backend
        )[0],
    }[op]
    leaves = [a.requires_grad_() for a in ([x, kernel] if op == "conv" else [x]) + [weight, bias]]
    try:
        first = torch.autograd.grad(function(*leaves).pow(2).sum(), leaves, create_graph=True)
        sum(g.pow(2).sum() for g in first).backward()  # type: ignore[union-attr]
    except RuntimeError as error:
        assert "second derivative" in str(error) or "double backward" in str(error)
        assert op == "bn", "only the training form may refuse"
        return
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("op", ["conv", "scale_shift", "bn"])
def test_vmap(op: str) -> None:
    x = noise(3, 2, 4, 5, 6)
    weight, scale, shift = noise(4, 4, 3, 3, seed=1), noise(4, seed=2), noise(4, seed=3)
    function: Callable[[Tensor], Tensor] = {
        "conv": lambda a: functional.conv_bn_act(a, weight, scale, shift, act="relu"),
        "scale_shift": lambda a: functional.scale_shift_act(a, scale, shift, act="relu"),
        "bn": lambda a: functional.bn_act(a, None, None, scale, shift, training=True, act="relu")[
            0
        ],
    }[op]
    assert torch.equal(torch.func.vmap(function)(x), torch.stack([function(a) for a in x]))


@pytest.mark.parametrize("op", ["conv", "scale_shift", "bn"])
def test_output_is_fresh_memory(op: str) -> None:
    """No output shares memory with an argument, not even where there is nothing to do."""
    x, one, zero = noise(2, 4, 5, 5), torch.ones(4), torch.zeros(4)
    output = {
        "conv": lambda: (functional.conv_bn_act(x, torch.eye(4).view(4, 4, 1, 1)),),
        "scale_shift": lambda: (functional.scale_shift_act(x, one, zero),),
        "bn": lambda: functional.bn_act(x, zero, one),
    }[op]()
    given = {t.untyped_storage().data_ptr() for t in (x, one, zero)}
    assert not given & {t.untyped_storage().data_ptr() for t in output}


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_without_gradients(mode: str) -> None:
    args = conv_arguments("3x3", torch.float32, "nhwc", True)
    leaves = [a.requires_grad_() for a in args if a is not None]
    with getattr(torch, mode)():
        y = conv_function("3x3", "relu", "auto")[0](*leaves)
        z, *_ = functional.bn_act(leaves[0], training=True)
    assert not y.requires_grad and not z.requires_grad
    assert y.is_inference() == (mode == "inference_mode")


def test_autocast_as_eager() -> None:
    args = conv_arguments("3x3", torch.float32, "nhwc", False)
    tested, plain = conv_function("3x3", "relu", "auto")
    reference = plain(*to_double(args))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_parity(tested(*args), plain(*args), reference, what="autocast")


def test_unknown_memory_is_poisoned() -> None:
    """Guard of this file: a forgotten element would show as NaN."""
    assert torch.empty(1000).isnan().all()
