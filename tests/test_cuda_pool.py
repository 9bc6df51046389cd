"""The compiled CUDA kernels of max-pooling: eager PyTorch's values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_case import DEVICE, HAS_GPU, needs_cuda_kernels, operators
from test_functional import DTYPES, noise
from tolerance import assert_all_parity
from torch import Tensor

from resnet_fused.backends import reference

pytestmark = [needs_cuda_kernels, pytest.mark.usefixtures("poisoned")]

# kernel_size, stride, padding, dilation
WINDOWS = {
    "stem": (3, 3, 2, 2, 1, 1, 1, 1),
    "vgg": (2, 2, 2, 2, 0, 0, 1, 1),
    "dilated": (3, 3, 1, 1, 1, 1, 2, 2),
    "unequal": (3, 2, 1, 3, 1, 1, 2, 1),
    "wide": (5, 5, 3, 3, 2, 2, 1, 1),
    "apart": (2, 2, 3, 3, 0, 0, 1, 1),
    "overlapping": (3, 3, 1, 1, 1, 1, 1, 1),
}
SHAPES = [(2, 64, 11, 13), (1, 3, 7, 7), (2, 130, 9, 5), (3, 17, 5, 5), (2, 8, 30, 31)]
EPS, NAN = 1e-3, float("nan")

EVERY_WINDOW = pytest.mark.parametrize("window", WINDOWS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def pairs(window: str) -> list[list[int]]:
    numbers = WINDOWS[window]
    return [list(numbers[i : i + 2]) for i in (0, 2, 4, 6)]


def image(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """With ties, and all that is not finite."""
    x = (noise(*shape) * 4).round().to(dtype) / 4
    x[0, 0, 0, 0] = x[0, 0, 3, 2] = NAN  # first of a window, and behind others
    x[-1, -1, -1, -1] = -float("inf")
    x[0, 1] = -float("inf")
    return x.to(DEVICE, memory_format=torch.channels_last)


def eager(x: Tensor, window: str) -> tuple[Tensor, Tensor]:
    """Output and indices; float16 has no pool on a CPU."""
    wide = x if x.is_cuda or x.dtype != torch.float16 else x.float()
    y, indices = torch.ops.aten.max_pool2d_with_indices(wide, *pairs(window))
    return y.to(x.dtype), indices


def decided(y: Tensor) -> Tensor:
    """Where eager PyTorch says which pixel it was: on a GPU not where none is larger than -inf."""
    return (y != -float("inf")) | (not HAS_GPU)


def places_of(indices: Tensor, width: int, window: str) -> Tensor:
    """A pixel's place in its window, from its place in the image."""
    (_, kw), (sh, sw), (ph, pw), (dh, dw) = pairs(window)
    out_h, out_w = (torch.arange(n, device=indices.device) for n in indices.shape[2:])
    row = (indices // width - (out_h * sh - ph)[:, None]) // dh
    column = (indices % width - (out_w * sw - pw)) // dw
    return row * kw + column


@EVERY_WINDOW
@EVERY_DTYPE
def test_values_and_places(dtype: torch.dtype, window: str) -> None:
    for shape in SHAPES:
        x = image(shape, dtype)
        expected, indices = eager(x, window)
        y = operators()._max_pool2d(x, *pairs(window))
        again, places = operators()._train_pool(x, [], 0.0, "none", 0.0, list(WINDOWS[window]))
        for actual in (y, again):
            assert torch.equal(actual.isnan(), expected.isnan())
            assert torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0))
            assert actual.is_contiguous(memory_format=torch.channels_last)
        known = decided(expected)
        wanted = places_of(indices, shape[3], window)
        assert torch.equal(places.long()[known], wanted[known])


@EVERY_WINDOW
@EVERY_DTYPE
def test_gradient(dtype: torch.dtype, window: str) -> None:
    for shape in SHAPES:
        x = image(shape, dtype)
        y, indices = eager(x, window)
        _, places = operators()._train_pool(x, [], 0.0, "none", 0.0, list(WINDOWS[window]))
        grad = torch.empty_like(y).copy_(noise(*y.shape, seed=5)) * decided(y)

        def backward(x: Tensor, grad: Tensor, indices: Tensor = indices) -> Tensor:
            half = dtype != torch.float64 and not x.is_cuda
            wide = [t.float() if half and t.dtype != torch.float64 else t for t in (grad, x)]
            found = torch.ops.aten.max_pool2d_with_indices_backward(
                *wide, *pairs(window), False, indices
            )
            return found.to(x.dtype)

        actual = operators()._max_unpool(grad, places, x, list(WINDOWS[window]))
        assert actual.is_contiguous(memory_format=torch.channels_last)
        assert_all_parity([actual], [backward(x, grad)], [backward(x.double(), grad.double())])
        anywhere = grad.contiguous()  # also in another layout
        same = operators()._max_unpool(anywhere, places, x, list(WINDOWS[window]))
        assert torch.equal(actual, same)


@EVERY_WINDOW
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_pool_of_an_activation(dtype: torch.dtype, act: str, window: str) -> None:
    """Batch norm and activation on the way, as if they had been stored, and their gradients."""
    wide = torch.promote_types(dtype, torch.float32)
    for shape in ((2, 64, 11, 13), (3, 17, 7, 5)):
        z = noise(*shape).to(dtype).to(DEVICE, memory_format=torch.channels_last)
        vectors = [noise(shape[1], dtype=wide, seed=s).to(DEVICE) * 0.5 for s in (1, 2, 3, 4)]
        vectors[1] = vectors[1].abs() + 0.5
        options = (EPS, act, 0.1, list(WINDOWS[window]))
        a = operators().normalize_act(z, None, *vectors, *options[:3])
        y, places = operators()._train_pool(z, vectors, *options)
        plain, same = operators()._train_pool(a, [], 0.0, "none", 0.0, options[-1])
        assert torch.equal(y, plain) and torch.equal(places, same)

        grad = torch.empty_like(y).copy_(noise(*y.shape, seed=5))
        sums = operators()._train_pool_sums(grad, places, z, vectors, *options)
        spread = operators()._max_unpool(grad.to(wide), places, z.to(wide), options[-1])

        def plain_sums(z: Tensor, spread: Tensor, *vectors: Any, act: str = act) -> Any:
            none = (None, None)
            found = reference.bn_act_backward_sums(spread, z, *none, *vectors, EPS, act, 0.1, False)
            return found[1:]

        def plain_input(z: Tensor, spread: Tensor, *vectors: Any, act: str = act) -> Tensor:
            sums = [2.0 * vectors[2], 3.0 * vectors[3]]
            return reference.bn_act_backward_input(spread, z, *vectors, *sums, EPS, act, 0.1, 77)

        given = [2.0 * vectors[2], 3.0 * vectors[3]]
        dz = operators()._train_pool_input(
            grad, places, z, vectors, *given, *options, 77
        )  # fmt: skip
        wide64 = [t.double() for t in (z, spread, *vectors)]
        eager = plain_input(z, spread.to(dtype), *vectors)
        assert_all_parity([dz], [eager], [plain_input(*wide64)])
        assert dz.is_contiguous(memory_format=torch.channels_last)

        exact = plain_sums(z.double(), spread.double(), *(v.double() for v in vectors))
        assert_all_parity(sums, plain_sums(z.to(wide), spread, *vectors), exact)


def test_vectors_that_are_not_there() -> None:
    z = noise(2, 8, 9, 9).to(DEVICE, memory_format=torch.channels_last)
    mean, var = noise(8, seed=1).to(DEVICE), noise(8, seed=2).abs().to(DEVICE)
    none, one = mean.new_empty(0), torch.ones(8, device=DEVICE)
    options = (EPS, "relu", 0.0, list(WINDOWS["stem"]))
    y, places = operators()._train_pool(z, [mean, var, none, none], *options)
    same = operators()._train_pool(z, [mean, var, one, 0 * one], *options)
    assert torch.equal(y, same[0]) and torch.equal(places, same[1])
    with pytest.raises(RuntimeError, match="vectors"):
        operators()._train_pool(z, [mean, var], *options)
    with pytest.raises(RuntimeError, match="vectors"):
        operators()._train_pool(z, [], *options)
    with pytest.raises(RuntimeError, match="vectors"):
        operators()._train_pool_sums(y, places, z, [], *options)
    with pytest.raises(RuntimeError, match="var must have shape"):
        operators()._train_pool(z, [mean, var[:7], none, none], *options)


def test_empty() -> None:
    for shape in ((0, 8, 6, 6), (2, 0, 6, 6)):
        x = torch.empty(shape, device=DEVICE)
        y = operators()._max_pool2d(x, *pairs("stem"))
        assert y.shape == (*shape[:2], 3, 3)
        _, places = operators()._train_pool(x, [], 0.0, "none", 0.0, list(WINDOWS["stem"]))
        grad = operators()._max_unpool(y, places, x, list(WINDOWS["stem"]))
        assert grad.shape == shape


@pytest.mark.parametrize("name", ["kernel_size", "stride", "padding", "dilation"])
def test_hostile_arguments(name: str) -> None:
    arguments = {"kernel_size": [2, 2], "stride": [2, 2], "padding": [0, 0], "dilation": [1, 1]}
    arguments[name] = [-1, 2]
    with pytest.raises(RuntimeError, match=name):
        operators()._max_pool2d(torch.zeros(1, 3, 8, 8, device=DEVICE), *arguments.values())


@pytest.mark.parametrize("window", [(256, 1), (16, 16), (1, 1 << 40)], ids=str)
def test_a_window_has_no_more_pixels_than_a_byte_counts(window: tuple[int, int]) -> None:
    x = torch.zeros(1, 16, 300, 300, device=DEVICE)
    pool = [*window, 1, 1, 0, 0, 1, 1]
    places = torch.zeros(1, 16, 1, 1, dtype=torch.uint8, device=DEVICE)
    for call in (
        lambda: operators()._max_unpool(x[:, :, :1, :1], places, x, pool),
        lambda: operators()._train_pool(x, [], 0.0, "none", 0.0, pool),
    ):
        with pytest.raises(RuntimeError, match=r"window|kernel_size"):
            call()


def test_pooled_tensors_that_do_not_fit() -> None:
    x = torch.zeros(2, 8, 6, 6, device=DEVICE)
    window = list(WINDOWS["stem"])
    y, places = operators()._train_pool(x, [], 0.0, "none", 0.0, window)
    unpool = operators()._max_unpool
    for grad, positions, image in (
        (y[:, :, :2], places, x), (y, places[:1], x), (y[:, :4], places[:, :4], x),
        (y.double(), places, x), (y, places.int(), x), (y, places, x[:1]),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="grad"):
            unpool(grad, positions, image, window)


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")
def test_more_than_int32_elements_on_a_gpu() -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    x = torch.randn(2**31 // 4096 + 1, 64, 8, 8, dtype=torch.float16, device=DEVICE)
    x = x.to(memory_format=torch.channels_last)
    y, places = operators()._train_pool(x, [], 0.0, "none", 0.0, list(WINDOWS["stem"]))
    expected = eager(x[-1:], "stem")[0]
    assert torch.equal(y[-1:], expected)
    grad = operators()._max_unpool(y, places, x, list(WINDOWS["stem"]))
    assert torch.equal(grad[-1:] != 0, operators()._max_unpool(
        y[-1:], places[-1:], x[-1:], list(WINDOWS["stem"])
    ) != 0)  # fmt: skip
