"""Weights of convolutions, packed by csrc/cuda/pack_weights.cu, bit for bit as PyTorch's operators
pack them.
"""

from __future__ import annotations

import pytest
import torch
from cuda_case import DEVICE, needs_cuda_kernels, operators
from test_functional import noise
from torch import Tensor

from resnet_fused.ops.schema import groups_together

pytestmark = [needs_cuda_kernels, pytest.mark.usefixtures("poisoned")]

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
COLUMNS = [32, 64, 96, 128, 256]

# outputs, channels of a group, height, width, groups
SHAPES = {
    "3x3": (64, 64, 3, 3, 1),
    "odd": (24, 40, 3, 3, 1),
    "tiles": (264, 8, 3, 3, 1),
    "deep": (136, 200, 1, 1, 1),
    "7x5": (40, 24, 7, 5, 1),
    "1x5": (16, 72, 1, 5, 1),
    "5x1": (16, 72, 5, 1, 1),
    "uneven": (67, 21, 3, 2, 1),
    "one number": (1, 1, 1, 1, 1),
    "narrow groups": (128, 4, 3, 3, 32),
    "wide narrow groups": (96, 16, 3, 3, 8),
    "uneven groups": (30, 3, 3, 3, 10),
    "two groups": (256, 24, 3, 3, 2),
    "groups over three tiles": (192, 16, 1, 1, 2),
}


def plain(weight: Tensor, groups: int, columns: int, turned: bool = False) -> Tensor:
    """The formula, by PyTorch's operators."""
    if turned:
        weight = weight.transpose(0, 1).flip(2, 3)
    piece = 16 // weight.element_size()
    outputs, channels, *kernel = weight.shape
    taps = kernel[0] * kernel[1]
    per_group = outputs // groups
    together = groups_together(groups, per_group, columns)
    assert together is not None
    tiles, chunks = -(-outputs // columns), -(-together * channels // (8 * piece))
    whole = weight.new_zeros(tiles * columns, chunks * 8 * piece, taps)
    for row, numbers in enumerate(weight.reshape(outputs, channels, taps)):
        first = row // per_group % together * channels
        whole[row, first : first + channels] = numbers
    if weight.dtype == torch.float32:
        bits = whole.view(torch.int32)
        bits[whole.isfinite()] += 0x1000
        bits &= ~0x1FFF
    # Of 32 columns number 8 i + 2 q + e is output 8 q + 2 i + e.
    whole = whole.view(-1, 4, 4, 2, chunks * 8 * piece, taps).transpose(1, 2)
    cut = whole.reshape(tiles, columns, chunks, 8, piece, taps)
    return cut.permute(0, 2, 5, 3, 1, 4).contiguous()


def check(weight: Tensor, groups: int, columns: int, turned: bool = False) -> None:
    ours = operators()._cuda_pack(weight, groups, columns, turned)
    wanted = plain(weight, groups, columns, turned)
    assert ours.shape == wanted.shape and ours.is_contiguous() and ours.dtype == wanted.dtype
    bits = torch.int16 if weight.element_size() == 2 else torch.int32
    assert torch.equal(ours.view(bits), wanted.view(bits))


def weight_of(shape: str, dtype: torch.dtype) -> Tensor:
    return noise(*SHAPES[shape][:4], dtype=dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape: str, dtype: torch.dtype) -> None:
    weight, groups = weight_of(shape, dtype), SHAPES[shape][4]
    taken = [c for c in COLUMNS if groups_together(groups, len(weight) // groups, c)]
    assert taken
    for columns in taken:
        for layout in (torch.contiguous_format, torch.channels_last):
            check(weight.contiguous(memory_format=layout), groups, columns)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["3x3", "odd", "deep", "7x5", "1x5", "5x1", "uneven"])
def test_turned(shape: str, dtype: torch.dtype) -> None:
    weight = weight_of(shape, dtype)
    turned = weight.transpose(0, 1).contiguous(memory_format=torch.channels_last).transpose(0, 1)
    for laid in (weight, weight.contiguous(memory_format=torch.channels_last), turned):
        check(laid, 1, 64, True)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype: torch.dtype, turned: bool) -> None:
    big = noise(80, 48, 5, 6, dtype=dtype).to(DEVICE)
    last = big.contiguous(memory_format=torch.channels_last)
    for weight in (
        big[::2, 8:, 1:4, ::2],
        last[3:70, :40],
        last[:, 1:41],  # 16 bytes of channels lie at no multiple of 16 bytes
        last[:, ::2],
        last[..., 1:4, 1:4],
        big.permute(1, 0, 3, 2),
        big.permute(2, 3, 1, 0),
        big[:1, :1].expand(40, 24, 5, 6),
    ):
        check(weight, 1, 64, turned)
    numbers = last.permute(0, 2, 3, 1).reshape(-1)
    moved = torch.cat([numbers[:1], numbers])[1:].view(80, 5, 6, 48).permute(0, 3, 1, 2)
    assert moved.data_ptr() % 16
    check(moved, 1, 128, turned)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_stride_that_is_no_multiple_of_16_bytes(dtype: torch.dtype) -> None:
    piece = 16 // dtype.itemsize
    for height, width in ((1, 1), (4, 1), (4, 4)):  # outputs; rows; columns of the kernel
        wide = noise(40, piece * 3 // 2, height, width, dtype=dtype).to(DEVICE)
        check(wide.contiguous(memory_format=torch.channels_last)[:, :piece], 1, 64)
    wide = noise(40, 2 * piece, 4, 4, dtype=dtype).to(DEVICE)
    check(wide.contiguous(memory_format=torch.channels_last)[:, : piece + 1], 1, 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_are_special(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    special = [float("nan"), float("inf"), -float("inf"), -0.0, info.max, -info.max]
    special += [least, -least, info.smallest_normal, info.smallest_normal - least]
    weight = weight_of("odd", dtype)
    weight.view(-1)[: len(special)] = torch.tensor(special, dtype=dtype)
    check(weight, 1, 64)


def test_float32_becomes_tf32() -> None:
    """To the nearest, of two the larger one; denormals too."""
    bits = torch.tensor([0x3F800FFF, 0x3F801000, 0x3F803000, 0x7F7FF000, 0xFFF, 0x1000, 0x1001])
    wanted = torch.tensor([0x3F800000, 0x3F802000, 0x3F804000, 0x7F800000, 0, 0x2000, 0x2000])
    weight = torch.zeros(32, 8, 1, 1, device=DEVICE)
    weight[0, :7, 0, 0] = bits.int().view(torch.float32)
    weight[1, :7, 0, 0] = -bits.int().view(torch.float32)
    ours = operators()._cuda_pack(weight, 1, 32, False)[0, 0, 0, :2, :2]
    found = ours.permute(1, 0, 2).reshape(2, 8)[:, :7].cpu()  # columns 0 and 1 are outputs 0 and 1
    expected = wanted.int().view(torch.float32)
    assert torch.equal(found, torch.stack([expected, -expected]))


def test_many_blocks_and_few() -> None:
    """Few leave their taps to others; each must still be written."""
    for shape in ((32, 8, 3, 3), (32, 8, 9, 9), (512, 136, 3, 3)):
        check(noise(*shape, dtype=torch.bfloat16).to(DEVICE), 1, 64)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_torch_compile_sees(shape: str) -> None:
    """The shape without the data."""
    weight, groups = weight_of(shape, torch.float32), SHAPES[shape][4]
    for turned in (False, True)[: 1 + (groups == 1)]:
        meta = torch.ops.resnet_fused._cuda_pack(weight.to("meta"), groups, 32, turned)
        ours = operators()._cuda_pack(weight, groups, 32, turned)
        assert meta.shape == ours.shape and meta.dtype == ours.dtype


def test_bad_arguments() -> None:
    pack = operators()._cuda_pack
    weight = noise(48, 16, 3, 3).to(DEVICE)
    for bad, message in (
        ((weight[0], 1, 64, False), "weight must have 4 dimensions .* got shape .16, 3, 3."),
        ((weight.double(), 1, 64, False), "weight must be float16, bfloat16 or float32, got float"),
        ((weight[:0], 1, 64, False), r"weight must not be empty, got shape \[0, 16, 3, 3\]"),
        ((weight[:, :0], 1, 64, False), "weight must not be empty"),
        ((weight, 1, 48, False), "columns must be a multiple of 32 from 32 to 256, got 48"),
        ((weight, 1, 0, False), "columns must be"),
        ((weight, 1, -32, False), "columns must be"),
        ((weight, 1, 288, False), "columns must be"),
        ((weight, 1, (1 << 32) + 64, False), "columns must be"),
        ((weight, 5, 64, False), "outputs must be a multiple of groups, got 48 and 5"),
        ((weight, 0, 64, False), "outputs must be a multiple of groups, got 48 and 0"),
        ((weight, 3, 64, True), "groups must be 1 where the weight is turned, got 3"),
        ((weight, 3, 32, False), "groups must fill tiles of 32 outputs, got 3 groups of 16"),
        ((weight[:1, :1, :1, :1].expand(1 << 24, 1, 1, 1), 1, 64, False), "weight is too large"),
        ((weight[:1, :1, :1, :1].expand(1, 1, 1 << 16, 1 << 15), 1, 64, False), "is too large"),
    ):
        with pytest.raises(RuntimeError, match=message):
            pack(*bad)
