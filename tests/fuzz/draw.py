"""Random cases: a seed and a number give one, the same everywhere."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from resnet_fused.numerics.block import (
    ACTS,
    ADDITIONS,
    DTYPES,
    FORMS,
    LAYOUTS,
    NORMS,
    BlockCase,
    Conv,
    Part,
)

MOST_WORK = 12_000_000
"""Multiplications of a case, so that thousands take minutes."""


SMOOTH = ("none", "silu", "silu", "gelu", "tanh")


def draw(seed: int, number: int) -> BlockCase:
    """Case `number` of a seed."""
    source = random.Random(f"{seed}:{number}")
    while True:
        case = _case(source)
        if case is not None:
            return replace(case, seed=number)


def _case(source: random.Random) -> BlockCase | None:
    pick = source.choice
    channels = _channels(source)
    height = pick([1, 2, 3, 5, 7, 8, 9, 12, 13, 14, 17, 20, 28])
    width = height if source.random() < 0.4 else source.randint(1, 23)
    batch = pick([0, 1, 1, 2, 2, 3, 3, 4, 5, 7] if source.random() < 0.15 else [1, 2, 3, 4])
    dtype = pick(DTYPES[:1] * 4 + DTYPES)
    mode = pick(["eval"] * 4 + ["eval_grad"] * 2 + ["train"] * 3)
    # In a narrow dtype a ReLU near its corner decides most gradients' errors.
    smooth = mode != "eval" and dtype not in ("float32", "float64") and source.random() < 0.85
    parts: list[Part] = []
    size, width_of, work = (height, width), channels, 0
    for last in [False] * pick([0, 0, 0, 1, 2]) + [True]:
        drawn = _part(source, width_of, size, last, smooth)
        if drawn is None:
            return None
        part, size, products = drawn
        parts.append(part)
        width_of, work = part.outputs, work + products * max(batch, 1)
    if work > MOST_WORK:
        return None
    # Batch statistics are no whole numbers.
    fills = ["random"] * 5 + ["special"] if mode == "train" else ["integer"] * 8 + ["random"] * 2
    fill = pick([*fills, "special"])
    if fill == "special":  # eager PyTorch's gelu is oneDNN's, which makes NaN of infinity
        parts = [_without(part, "act", ("gelu",), "relu") for part in parts]
    if fill == "special" and mode != "eval":
        # At NaN these gradients are others in eager PyTorch's vectors than behind the last vector.
        parts = [_without(part, "act", ("relu6", "hardswish"), "relu") for part in parts]
    if fill == "integer":
        # What rounding makes of a whole number lies on both sides of a corner.
        parts = [_without(part, "norm", ("untracked",), "affine") for part in parts]
        if mode == "eval_grad":
            parts = [_without(part, "act", ("leaky_relu", "hardswish"), "relu") for part in parts]
    if mode == "train":
        inputs = (channels, *(part.outputs for part in parts))
        parts = [_without_bare_scales(p, n) for p, n in zip(parts, inputs, strict=False)]
    wide = list(zip((channels, *(part.outputs for part in parts)), parts, strict=False))
    convs = [pair for inputs, part in wide for pair in _convs(inputs, part)]
    if any(_pads_whole_windows(c) for _, c in convs):
        return None  # oneDNN's convolution reads beyond the image there (torch 2.13: it may crash)
    strided = [n for n, c in convs if c.kernel == (1, 1) and c.stride != (1, 1)]
    if mode != "eval" and min(strided, default=16) < 16:
        return None  # as does its weight gradient of these, of channels fewer than a vector's
    # "default" promises an error beside the largest of an operator's results: tanh makes 1 of it.
    saturates = mode == "eval" and any(c.act == "tanh" for _, c in convs)
    return BlockCase(
        batch, channels, height, width, tuple(parts),
        dtype=dtype,
        mode=mode,
        layout=pick(["channels_last"] * 8 + ["contiguous"] * 2 + list(LAYOUTS)),
        weights_channels_last=source.random() < 0.8,
        fill=fill,
        policy="strict" if saturates else pick(["default", "default", "strict"]),
        memory=pick(["default", "default", "low"]),
        # oneDNN's weight gradient of these writes past its memory with 2 threads and more (torch
        # 2.13; heap corruption in plain PyTorch: 15 to 64 channels, 28 × 18 pixels, stride 2).
        threads=1 if strided and mode != "eval" else pick([1, 1, 2, 3]),
    )  # fmt: skip


def _without(part: Part, field: str, values: Sequence[str], other: str) -> Part:
    convs = (replace(c, **{field: other}) if getattr(c, field) in values else c for c in part.convs)
    return replace(part, convs=tuple(convs))


def _without_bare_scales(part: Part, inputs: int) -> Part:
    """Without a batch norm that takes away all that a convolution's weight can do.

    A 1×1 kernel over one channel is a factor; its gradient is what rounding leaves of zero.
    """
    convs = (
        replace(c, norm="frozen") if c.kernel == (1, 1) and (c.groups > 1 or n == 1) else c
        for n, c in _convs(inputs, replace(part, projection=None))
    )
    return replace(part, convs=tuple(convs))


def _convs(inputs: int, part: Part) -> list[tuple[int, Conv]]:
    """A part's convolutions, each after the channels that it reads."""
    widths = (inputs, *(c.outputs for c in part.convs))
    found = list(zip(widths, part.convs, strict=False))
    return [*found, (inputs, part.projection)] if part.projection is not None else found


def _pads_whole_windows(conv: Conv) -> bool:
    reach = (d * (k - 1) for d, k in zip(conv.dilation, conv.kernel, strict=True))
    return any(p > r for p, r in zip(conv.padding, reach, strict=True))


def _channels(source: random.Random) -> int:
    kind = source.random()
    if kind < 0.45:
        return 16 * source.randint(1, 5)
    return source.randint(1, 20) if kind < 0.8 else source.randint(21, 132)


def _part(
    source: random.Random, inputs: int, size: tuple[int, int], last: bool, smooth: bool
) -> tuple[Part, tuple[int, int], int] | None:
    """A part, the size of its result and its multiplications per image; None if none fits."""
    pick = source.choice
    acts = SMOOTH if smooth else ["relu"] * 6 + list(ACTS)
    shortcut = pick(["none", "shortcut", "shortcut"])
    convs: list[Conv] = []
    channels, area, work = inputs, size, 0
    count = pick([1, 1, 2, 2, 2, 3])
    for i in range(count):
        conv = _conv(source, channels, area, acts)
        if shortcut != "none" and i == count - 1 and source.random() < 0.6:
            conv = replace(conv, outputs=inputs, groups=1)
        area = conv.size(*area)
        if min(area) < 1:
            return None
        work += _products(conv, channels, area)
        channels = conv.outputs
        convs.append(conv)
    projection = None
    if shortcut != "none":
        if (channels, area) == (inputs, size) and source.random() < 0.85:
            shortcut = "identity"
        else:
            projection = _projection(source, channels, size, area)
            shortcut = "none" if projection is None else "projection"
            work += 0 if projection is None else _products(projection, inputs, area)
    tap = source.randrange(count) if last and source.random() < 0.06 else None
    pool = source.random() < 0.08
    part = Part(
        tuple(convs), shortcut, projection, pick(ADDITIONS), source.random() < 0.12, tap, pool
    )
    return part, tuple((n - 1) // 2 + 1 for n in area) if pool else area, work  # type: ignore[return-value]


def _products(conv: Conv, inputs: int, area: tuple[int, int]) -> int:
    per_output = inputs // conv.groups * conv.kernel[0] * conv.kernel[1]
    return conv.outputs * area[0] * area[1] * per_output


def _conv(source: random.Random, inputs: int, size: tuple[int, int], acts: Sequence[str]) -> Conv:
    pick = source.choice
    outputs = inputs if source.random() < 0.3 else _channels(source)
    kernel = pick([(3, 3)] * 8 + [(1, 1)] * 6 + [(2, 2), (5, 5), (7, 7), (1, 3), (3, 1), (4, 3)])
    stride = pick([(1, 1)] * 6 + [(2, 2)] * 3 + [(3, 3), (1, 2), (2, 1)])
    dilation = pick([(1, 1)] * 8 + [(2, 2), (3, 1)])
    same = tuple((k - 1) * d // 2 for k, d in zip(kernel, dilation, strict=True))
    padding = same if source.random() < 0.8 else (source.randint(0, 3), source.randint(0, 3))
    groups = 1
    if source.random() < 0.2:
        groups = pick([g for g in range(2, inputs + 1) if inputs % g == 0] or [1])
        outputs = groups * max(1, outputs // groups)
    padding_mode = "zeros"
    if source.random() < 0.03 and all(p < n for p, n in zip(padding, size, strict=True)):
        padding_mode = pick(["reflect", "replicate", "circular"])
    return Conv(
        outputs, kernel, stride, padding, dilation, groups, padding_mode,  # type: ignore[arg-type]
        bias=source.random() < 0.25,
        norm=pick(["affine"] * 12 + list(NORMS)),
        act=pick(acts),
        form=pick(FORMS),
    )  # fmt: skip


def _projection(
    source: random.Random, outputs: int, size: tuple[int, int], area: tuple[int, int]
) -> Conv | None:
    """A 1×1 convolution from one size to another, if there is one."""
    for stride in ((1, 1), (2, 2), (3, 3), (1, 2), (2, 1), (4, 4)):
        conv = Conv(
            outputs,
            (1, 1),
            stride,
            (0, 0),
            act="none",
            norm=source.choice(["affine"] * 5 + ["none"]),
        )
        if conv.size(*size) == area:
            return conv
    return None
