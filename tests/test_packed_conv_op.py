"""The operators over packed weights: blocks in one call, hostile arguments, in a model."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conv_case import Case
from tolerance import assert_within_policy
from torch import Tensor

import resnet_fused
from resnet_fused import packing
from resnet_fused.backends import native, native_conv
from resnet_fused.backends.native_conv import (
    NativeConv,
    Program,
    Wired,
    pack,
)

pytestmark = pytest.mark.skipif(not native.available, reason=str(native.reason))


# ---- blocks --------------------------------------------------------------------------------------


def block(batch: int, channels: int, size: int) -> tuple[Tensor, list[Case], list[Wired]]:
    """A bottleneck with a projection: 1x1, 3x3, 1x1 + shortcut."""
    x = torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last)
    middle, wide = channels // 2, channels * 2
    shape = (batch, channels, size, size)
    inner = (batch, middle, size, size)
    cases = [
        Case("direct", shape, middle, kernel=1, padding=0, residual=False),
        Case("winograd4", inner, middle, residual=False),
        Case("direct", shape, wide, kernel=1, padding=0, act="none", residual=False),
        Case("direct", inner, wide, kernel=1, padding=0),
    ]
    wiring = [
        Wired(0, -1, "relu", 0.0),
        Wired(2, -1, "relu", 0.0),
        Wired(0, -1, "none", 0.0),
        Wired(3, 4, "relu", 0.0),
    ]
    return x, cases, wiring


@pytest.mark.parametrize("outside", [False, True], ids=["", "outside"])
@pytest.mark.parametrize(("batch", "channels", "size"), [(1, 24, 9), (0, 24, 9), (5, 64, 80)])
def test_block_in_one_call_is_the_same_as_its_steps(
    batch: int, channels: int, size: int, outside: bool
) -> None:
    """Also where a batch is cut into several passes (batch 5: two, two and one image), and where
    the residual comes from `outside`.
    """
    x, cases, wiring = block(batch, channels, size)
    convs, values = [], [x, None]
    if outside:
        given = torch.randn(cases[-1].output_shape).to(memory_format=torch.channels_last)
        values[1], wiring[-1] = given, Wired(3, 1, "relu", 0.0)
    for case, wired in zip(cases, wiring, strict=True):
        _, weight, scale, shift = case.tensors()
        single = case.program(weight, scale, shift)
        geometry = (*[case.stride] * 2, *[case.padding] * 2, 1, 1, 1)
        packed = pack(weight, scale, 1, 1, case.algorithm)
        convs.append(NativeConv(case.algorithm, packed, weight, scale, shift, geometry, ()))
        residual = None if wired.residual < 0 else values[wired.residual]
        values.append(single(values[wired.input], residual))  # type: ignore[arg-type]
    together = Program(list(zip(convs, wiring, strict=True)))(x, values[1])
    assert torch.equal(together, values[-1])  # type: ignore[arg-type]


# ---- hostile arguments ---------------------------------------------------------------------------


def valid() -> dict[str, object]:
    x, weight = torch.randn(1, 16, 8, 8), torch.randn(32, 16, 3, 3)
    return {
        "input": x,
        "residual": None,
        "packed": [pack(weight, None, 1, 1, "direct")],
        "weights": [weight],
        "scales": [torch.ones(32)],
        "shifts": [torch.zeros(32)],
        "steps": [0, -1, 1, 1, 1, 1, 1, 1, 1],
        "algorithms": ["direct"],
        "acts": ["relu"],
        "negative_slopes": [0.0],
        "blocks": [1],
    }


def steps(**changes: int) -> list[int]:
    names = ["input", "residual", "stride", "s", "padding", "p", "dilation", "d", "groups"]
    numbers = dict(zip(names, [0, -1, 1, 1, 1, 1, 1, 1, 1], strict=True))
    return list((numbers | changes).values())


HOSTILE: dict[str, tuple[str, object]] = {
    "input has one dimension": ("input", torch.zeros(16)),
    "input is float64": ("input", torch.zeros(1, 16, 8, 8, dtype=torch.float64)),
    "input is bfloat16": ("input", torch.zeros(1, 16, 8, 8, dtype=torch.bfloat16)),
    "input has other channels": ("input", torch.zeros(1, 15, 8, 8)),
    "input is smaller than the kernel": ("input", torch.zeros(1, 16, 8, 0)),
    "packed is too short": ("packed", [torch.zeros(3)]),
    "packed is float64": ("packed", [torch.zeros(32 * 144, dtype=torch.float64)]),
    "no packed": ("packed", []),
    "weight has three dimensions": ("weights", [torch.zeros(32, 16, 3)]),
    "weight is empty": ("weights", [torch.zeros(0, 16, 3, 3)]),
    "weight is float64": ("weights", [torch.zeros(32, 16, 3, 3, dtype=torch.float64)]),
    "scale is too short": ("scales", [torch.ones(31)]),
    "shift has gaps": ("shifts", [torch.zeros(64)[::2]]),
    "shift is float64": ("shifts", [torch.zeros(32, dtype=torch.float64)]),
    "steps too short": ("steps", [0, -1, 1]),
    "input comes later": ("steps", steps(input=2)),
    "input is the residual": ("steps", steps(input=1)),
    "input is negative": ("steps", steps(input=-5)),
    "residual is missing": ("steps", steps(residual=1)),
    "residual comes later": ("steps", steps(residual=7)),
    "residual has another shape": ("steps", steps(residual=0)),
    "stride 0": ("steps", steps(stride=0)),
    "negative padding": ("steps", steps(padding=-1)),
    "dilation 0": ("steps", steps(dilation=0)),
    "groups 0": ("steps", steps(groups=0)),
    "groups do not divide": ("steps", steps(groups=3)),
    "unknown algorithm": ("algorithms", ["fft"]),
    "packed for another algorithm": ("algorithms", ["winograd4"]),
    "unknown activation": ("acts", ["tanh"]),
    "two slopes": ("negative_slopes", [0.0, 0.0]),
    "no blocks": ("blocks", []),
    "block of none": ("blocks", [0, 1]),
    "negative block": ("blocks", [2, -1]),
    "blocks of more": ("blocks", [2]),
}


@pytest.mark.skipif(
    native_conv.unusable(torch.bfloat16) is not None, reason="bfloat16 is oneDNN's alone here"
)
@pytest.mark.parametrize("act", ["none", "silu"])
def test_bfloat16_is_rounded_once(act: str) -> None:
    """257 is no number of bfloat16, but 257 - 256 is."""
    weight = torch.zeros(64, 64, 1, 1, dtype=torch.bfloat16)
    weight[:, :3, 0, 0] = torch.tensor([128.0, 128.0, 1.0], dtype=torch.bfloat16)
    folded = packing.Folded(weight, None, None, [1, 1], [0, 0], [1, 1], 1, torch.bfloat16)
    x = torch.ones(2, 64, 14, 14, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    problem = folded.problem(x.shape)
    assert problem is not None
    prepared = folded.prepare(problem, "direct")
    y = packing.run(prepared, x, torch.full_like(x, -256.0), act, 0.0)
    one = torch.ones_like(y)
    assert torch.equal(y, one if act == "none" else F.silu(one))


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_arguments(what: str) -> None:
    name, value = HOSTILE[what]
    arguments = valid()
    torch.ops.resnet_fused._packed_convs(*arguments.values())
    with pytest.raises(RuntimeError, match="_packed_convs"):
        torch.ops.resnet_fused._packed_convs(*(arguments | {name: value}).values())


@pytest.mark.parametrize(
    ("weight", "stride", "groups", "algorithm"),
    [
        (torch.zeros(4, 4, 3, 3), 1, 1, "direct"),
        (torch.zeros(4, 4, 3, dtype=torch.float64), 1, 1, "direct"),
        (torch.zeros(4, 4, 3, 3, dtype=torch.float64), 1, 0, "direct"),
        (torch.zeros(4, 4, 3, 3, dtype=torch.float64), 1, 3, "direct"),
        (torch.zeros(4, 4, 5, 5, dtype=torch.float64), 1, 1, "winograd4"),
        (torch.zeros(4, 4, 3, 3, dtype=torch.float64), 3, 1, "winograd4"),
        (torch.zeros(4, 4, 3, 3, dtype=torch.float64), 3, 1, "winograd2"),
        (torch.zeros(4, 4, 3, 3, dtype=torch.float64), 1, 1, "winograd6"),
        (torch.zeros(16, 4, 1, 1, dtype=torch.float64), 1, 4, "grouped"),
        (torch.zeros(32, 4, 3, 3, dtype=torch.float64), 1, 4, "grouped"),
        (torch.zeros(24, 4, 3, 3, dtype=torch.float64), 1, 6, "grouped"),
        (torch.zeros(48, 3, 3, 3, dtype=torch.float64), 1, 16, "grouped"),
        (torch.zeros(64, 32, 3, 3, dtype=torch.float64), 1, 1, "strassen"),
        (torch.zeros(64, 32, 1, 1, dtype=torch.float64), 1, 2, "strassen"),
        (torch.zeros(64, 16, 1, 1, dtype=torch.float64), 1, 1, "strassen"),
        (torch.zeros(32, 32, 1, 1, dtype=torch.float64), 1, 1, "strassen"),
    ],
)
def test_hostile_packing(weight: Tensor, stride: int, groups: int, algorithm: str) -> None:
    with pytest.raises(RuntimeError, match="_pack_conv"):
        torch.ops.resnet_fused._pack_conv(weight, stride, groups, algorithm, False)
    with pytest.raises(RuntimeError, match="_pack_conv"):
        torch.ops.resnet_fused._pack_conv(weight, stride, groups, algorithm, True)


def test_weights_that_the_call_transforms_are_not_paired() -> None:
    weight = torch.zeros(4, 4, 3, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"_pack_conv.*float32"):
        torch.ops.resnet_fused._pack_conv(weight, 1, 1, "winograd4_late", True)
    for algorithm in ("winograd2_late", "winograd3_late"):
        for pairs in (True, False):
            with pytest.raises(RuntimeError, match=r"_pack_conv.*not packed"):
                torch.ops.resnet_fused._pack_conv(weight, 1, 1, algorithm, pairs)


# ---- in a model ----------------------------------------------------------------------------------


def test_strict_logits_are_within_a_quarter_of_eagers_error() -> None:
    plain = resnet_fused.models.resnet18().eval().to(memory_format=torch.channels_last)
    fused = resnet_fused.fuse(plain)
    x = torch.randn(4, 3, 96, 96).to(memory_format=torch.channels_last)
    with torch.no_grad():
        reference = resnet_fused.unfuse(fused).double()(x.double())
        for policy in ("strict", "default"):
            with resnet_fused.precision(policy):
                assert_within_policy(fused(x), plain(x), reference, policy)


def test_packed_weights_are_at_most_four_times_the_originals() -> None:
    limits = {
        "direct": 1.0, "winograd2": 16 / 9, "winograd3": 25 / 9, "winograd4": 4.0,
        "winograd4_late": 1.0,
    }  # fmt: skip
    for algorithm, limit in limits.items():
        weight = torch.randn(64, 96, 3, 3)
        packed = pack(weight, None, 1, 1, algorithm)
        assert packed.numel() == math.ceil(limit * weight.numel())
