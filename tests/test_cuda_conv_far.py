"""The convolutions of csrc/cuda past 2**31 elements, and what is too large for them.

Of many images only the last have content. The emulator runs their blocks alone, so that memory
which nobody touches never becomes real; a GPU computes everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from cuda_case import DEVICE, HAS_GPU, needs_cuda_kernels, operators
from cuda_conv_case import packed
from test_functional import noise
from tolerance import assert_parity
from torch import Tensor

from resnet_fused.backends import cuda_conv, reference
from resnet_fused.backends.cuda_conv import Algorithm

pytestmark = needs_cuda_kernels
in_emulator = pytest.mark.skipif(HAS_GPU, reason="runs single blocks in the emulator")

IMAGES = 4  # that have content: the last ones, which lie in one tile


class Case(NamedTuple):
    """Many small images, padded by half the kernel."""

    batch: int
    channels: int
    outputs: int
    size: int
    kernel: int
    stride: int = 1

    def places(self) -> int:
        """Of csrc/cuda/conv_geometry.h: neighbours share rows and columns of padding."""
        return self.batch * (self.size + self.kernel // 2) ** 2

    def check(
        self,
        algorithm: str,
        outputs: slice = slice(None),
        run_blocks: Callable[..., None] = lambda *blocks: None,
        blocks: tuple[int, int, int] = (0, 0, -1),
    ) -> None:
        """The last images, of these output channels, against the formula.

        Args:
            run_blocks: the fixture, and what of it is for the convolution alone.
        """
        x = noise(IMAGES, self.channels, self.size, self.size, dtype=torch.float16)
        fan = self.channels * self.kernel**2
        weight = noise(self.outputs, self.channels, *[self.kernel] * 2, dtype=x.dtype, seed=1)
        weight = weight / fan**0.5
        scale, shift = noise(self.outputs, seed=2).abs() + 0.5, noise(self.outputs, seed=3)
        side = -(-self.size // self.stride)
        residual = noise(IMAGES, self.outputs, side, side, dtype=x.dtype, seed=4)
        geometry = [[self.stride] * 2, [self.kernel // 2] * 2, [1, 1]]
        flat = [self.kernel, self.kernel, *(number for pair in geometry for number in pair)]
        numbers, *vectors = (
            t.to(DEVICE) for t in (packed(weight.to(DEVICE), 1, algorithm), scale, shift)
        )
        run_blocks(*blocks)
        ours = operators()._cuda_conv(
            last_of(self.batch, x), numbers, *vectors, last_of(self.batch, residual), self.outputs,
            flat, 1, "relu", 0.0, algorithm,
        )  # fmt: skip
        tensors = (x, weight, scale, shift, residual)
        plain, exact = (
            reference.conv_bn_act(*each, *geometry, 1, "relu", 0.0)[:, outputs]
            for each in (tensors, [t.double() for t in tensors])
        )
        assert_parity(ours[-IMAGES:, outputs].cpu(), plain, exact, what=algorithm)


def last_of(batch: int, images: Tensor) -> Tensor:
    """A batch that ends with these images, and has nothing before them."""
    whole = torch.empty(
        (batch, *images.shape[1:]), dtype=images.dtype, memory_format=torch.channels_last,
        device=DEVICE,
    )  # fmt: skip
    whole[-len(images) :] = images.to(DEVICE)
    return whole


# Input, residual and output are past 2**31, but for few channels beside many; places are nearly as
# many as there may be, of few pixels.
CASES = {
    "1x1": Case((1 << 20) + IMAGES, 128, 128, 4, 1),
    "3x3": Case((1 << 21) + IMAGES, 64, 64, 4, 3),
    "3x3 wide": Case((1 << 20) + IMAGES, 64, 128, 4, 3),
    "7x7 places": Case((1 << 27) - (1 << 16) - IMAGES, 8, 8, 1, 7),
}
STEMS = {
    "7x7 input": Case(745_000, 3, 8, 31, 7, 2),
    "3x3 output": Case((1 << 17) + IMAGES, 3, 64, 16, 3),
    "3x3 stride2 output": Case((1 << 17) + IMAGES, 3, 64, 31, 3, 2),
}
TILED = [a for a in cuda_conv.ALGORITHMS if a is not cuda_conv.STEM]


def takes(algorithm: Algorithm, shape: str) -> bool:
    """Not all weights of 7x7 fit a block, and tiles want enough outputs."""
    if shape == "7x7 places":
        return algorithm.kernel != "pingpong" and algorithm.columns == 64
    return shape == "1x1" or (algorithm.columns == 64) == (shape == "3x3")


@pytest.fixture
def run_blocks() -> Iterator[Callable[[int, int, int], None]]:
    """On a chip of so many multiprocessors, only blocks from the first to before the last run."""

    def choose(multiprocessors: int, first: int, last: int) -> None:
        operators()._set_multiprocessors(multiprocessors)
        operators()._only_blocks(first, last)

    yield choose
    operators()._set_multiprocessors(0)
    operators()._only_blocks(0, -1)


@in_emulator
@pytest.mark.parametrize(
    ("algorithm", "shape"),
    [pytest.param(a, s, id=f"{a.name} {s}") for a in TILED for s in CASES if takes(a, s)],
)
def test_tiles_at_the_end(
    algorithm: Algorithm, shape: str, run_blocks: Callable[[int, int, int], None]
) -> None:
    case = CASES[shape]
    columns = -(-case.outputs // algorithm.columns)
    tiles = math.ceil(case.places() / algorithm.rows) * columns
    # A block's only tile, and the second one of blocks that take several.
    for turn in (1,) if algorithm.kernel == "mma" else (1, 2):
        blocks = -(-tiles // turn)
        last = tiles - (turn - 1) * blocks
        run_blocks(0, 0, -1)
        end = slice((columns - 1) * algorithm.columns, None)
        case.check(algorithm.name, end, run_blocks, (blocks, last - 1, last))


@in_emulator
@pytest.mark.parametrize("shape", STEMS)
def test_stem_at_the_end(shape: str, run_blocks: Callable[[int, int, int], None]) -> None:
    case = STEMS[shape]  # each image a block
    run_blocks(0, case.batch - IMAGES, case.batch)
    case.check(cuda_conv.STEM.name)


@in_emulator
def test_stem_of_a_row_past_int32(run_blocks: Callable[[int, int, int], None]) -> None:
    """The first block, which has all the row to its right."""
    width, seen = (1 << 31) // 3 + 8, 16
    x = torch.empty(1, 3, 1, width, dtype=torch.float16, memory_format=torch.channels_last)
    begin = x[..., : 2 * seen + 2].normal_()
    weight = noise(8, 3, 3, 3, dtype=torch.float16, seed=1)
    numbers = packed(weight.to(DEVICE), 1, "stem_16x16")
    run_blocks(0, 0, 1)
    y = operators()._cuda_conv(
        x, numbers, None, None, None, 8, [3, 3, 2, 2, 1, 1, 1, 1], 1, "none", 0.0, "stem_16x16"
    )
    rest = (None, None, None, [2, 2], [1, 1], [1, 1], 1, "none", 0.0)
    plain, exact = (
        reference.conv_bn_act(a, w, *rest)[..., :seen]
        for a, w in ((begin, weight), (begin.double(), weight.double()))
    )
    assert_parity(y[..., :seen], plain, exact)


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")
def test_all_of_it_on_a_gpu() -> None:
    """One after another, as each takes up to 13 GiB."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    hopper = torch.cuda.get_device_capability()[0] == 9
    for algorithm in TILED:
        for shape in CASES:
            if takes(algorithm, shape) and (hopper or algorithm.kernel == "mma"):
                CASES[shape].check(algorithm.name)
    for case in STEMS.values():
        case.check(cuda_conv.STEM.name)
    torch.cuda.empty_cache()


# --- what is refused --------------------------------------------------------------------------


def refuse(x: Tensor, geometry: list[int], message: str, algorithm: str = "mma_128x64") -> None:
    channels = x.shape[1]
    numbers = packed(x.new_zeros(channels, channels, *geometry[:2]), 1, algorithm)
    with pytest.raises(RuntimeError, match=message):
        operators()._cuda_conv(
            x, numbers, None, None, None, channels, geometry, 1, "none", 0.0, algorithm
        )


def test_too_many_pixels() -> None:
    """One channel, so that they are 4 GiB; of outputs the padding alone makes as many."""
    one = [1, 1, 1, 1, 0, 0, 1, 1]
    image = torch.empty(1, 1, 1 << 11, (1 << 20) - (1 << 9), dtype=torch.float16, device=DEVICE)
    refuse(image, one, "too many pixels")
    refuse(image[:, :, 1:], one, "no room for this convolution|channels must be multiples of 8")
    pixel = torch.zeros(1, 1, 1, 1, dtype=torch.float16, device=DEVICE)
    refuse(pixel, [1, 1, 1, 1, 23170, 23170, 1, 1], "too many pixels")


def test_too_many_places() -> None:
    """Of half as many pixels as there may be."""
    images = torch.empty(1 << 29, 1, 1, 1, dtype=torch.float16, device=DEVICE)
    refuse(images, [3, 3, 1, 1, 1, 1, 1, 1], "no room for this convolution")


@pytest.mark.parametrize("algorithm", ["mma_128x64", "wgmma_128x64", "pingpong_128x64"])
def test_taps_too_far_apart(algorithm: str) -> None:
    """So far that their bytes, or their distance itself, come to small numbers in 32 bits."""
    for width, geometry in (
        ((1 << 24) - 1, [3, 3, 1, 1, 1, 1, 1, 1]), (65503, [7, 1, 1, 1, 32767, 0, 10922, 1])
    ):  # fmt: skip
        image = torch.empty(
            (1, 8, 1, width), dtype=torch.float16, memory_format=torch.channels_last, device=DEVICE
        )
        refuse(image, geometry, "no room for this convolution", algorithm)
