"""The max-pool behind a stem's activation in training, forward and backward."""

from __future__ import annotations

import pytest
import torch

from resnet_fused.backends import native_conv, reference

pytestmark = pytest.mark.skipif(
    native_conv.unusable(torch.float32) is not None, reason=str(native_conv.unusable(torch.float32))
)
ops = torch.ops.resnet_fused
NAN = float("nan")
EPS = 1e-3


@pytest.mark.parametrize(
    "window",
    [(3, 3, 2, 2, 1, 1, 1, 1), (2, 2, 2, 2, 0, 0, 1, 1), (3, 2, 1, 3, 1, 1, 2, 1)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_max_pool_of_an_activation(window: tuple[int, ...], dtype: torch.dtype) -> None:
    """Ties go to the first, NaN wins, as in eager PyTorch; the gradient goes where it came from."""
    z = torch.randn(3, 70, 13, 11).to(dtype).to(memory_format=torch.channels_last)
    z[0, 3, 4, 5] = NAN
    mean, var = (torch.randn(70) * 0.1, torch.rand(70) + 0.5)
    vectors = [mean, var, torch.rand(70) + 0.5, torch.randn(70)]
    a = ops.normalize_act(z, None, *vectors, EPS, "relu", 0.0)
    pairs = [list(window[i : i + 2]) for i in (0, 2, 4, 6)]
    expected, indices = torch.ops.aten.max_pool2d_with_indices(a, *pairs)
    output, positions = ops._train_pool(z, vectors, EPS, "relu", 0.0, list(window))
    assert positions.dtype == torch.uint8
    assert torch.equal(output.nan_to_num(7.0), expected.nan_to_num(7.0))
    grad = torch.randn(output.shape).to(dtype).to(memory_format=torch.channels_last)
    spread = ops._max_unpool(grad, positions, z, list(window))
    wanted = torch.ops.aten.max_pool2d_with_indices_backward(
        grad.float(), a.float(), *pairs, False, indices
    )
    torch.testing.assert_close(
        spread.float(), wanted, rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=1e-6
    )
    z[0, 3, 4, 5] = 0.5
    output, positions = ops._train_pool(z, vectors, EPS, "relu", 0.0, list(window))
    a = ops.normalize_act(z, None, *vectors, EPS, "relu", 0.0).double()
    _, indices = torch.ops.aten.max_pool2d_with_indices(a, *pairs)
    spread = torch.ops.aten.max_pool2d_with_indices_backward(
        grad.double(), a, *pairs, False, indices
    )
    sums = ops._train_pool_sums(grad, positions, z, vectors, EPS, "relu", 0.0, list(window))
    _, *expected_sums = reference.bn_act_backward_sums(
        spread, z.double(), None, None, *[v.double() for v in vectors],
        EPS, "relu", 0.0, False,
    )  # fmt: skip
    for actual, exact in zip(sums, expected_sums, strict=True):
        assert float((actual.double() - exact).norm() / exact.norm()) < 1e-5


def test_a_pooled_gradient_in_many_passes() -> None:
    """A convolution's gradients of a batch that is taken a few images at a time."""
    window = [3, 3, 2, 2, 1, 1, 1, 1]
    x, z = (
        torch.randn(7, channels, 60, 58).to(memory_format=torch.channels_last)
        for channels in (96, 64)
    )
    weight = torch.randn(64, 96, 3, 3)
    vectors = [torch.zeros(64), torch.ones(64), torch.ones(64), torch.zeros(64)]
    output, positions = ops._train_pool(z, vectors, EPS, "none", 0.0, window)
    grad = torch.randn(output.shape).to(memory_format=torch.channels_last)

    def gradients(grad: torch.Tensor, positions: torch.Tensor | None) -> list[torch.Tensor]:
        return ops._train_conv_backward(
            grad, z, [], 0.0, "none", 0.0, 0, positions, [] if positions is None else window,
            x, [], 0.0, "none", 0.0, weight, [1] * 6, None, "direct", "gemm",
        )  # fmt: skip

    spread = ops._max_unpool(grad, positions, z, window)
    for actual, expected in zip(gradients(grad, positions), gradients(spread, None), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("window", [(256, 1), (16, 16), (1, 1 << 40)], ids=str)
def test_a_window_has_no_more_pixels_than_a_byte_counts(window: tuple[int, int]) -> None:
    z = torch.zeros(1, 16, 300, 300).to(memory_format=torch.channels_last)
    pool = [*window, 1, 1, 0, 0, 1, 1]
    places = torch.zeros(1, 16, 1, 1, dtype=torch.uint8)
    vectors = [torch.zeros(16), torch.ones(16), torch.ones(16), torch.zeros(16)]
    for call in (
        lambda: ops._max_unpool(torch.zeros(1, 16, 1, 1), places, z, pool),
        lambda: ops._train_pool(z, vectors, EPS, "relu", 0.0, pool),
        lambda: ops._train_pool_sums(
            torch.zeros(1, 16, 1, 1), places, z, vectors, EPS, "relu", 0.0, pool
        ),
    ):
        with pytest.raises(RuntimeError, match=r"window|kernel_size"):
            call()
