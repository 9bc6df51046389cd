"""A smaller case that fails as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from resnet_fused.numerics.block import BlockCase, Conv, Part


def shrink(case: BlockCase, fails: Callable[[BlockCase], bool], most: int = 400) -> BlockCase:
    """Take the first simpler case that fails, again and again, until none does.

    Args:
        fails: whether a case, which may be no sound one, fails.
        most: of calls of `fails`.
    """
    calls, again = 0, True
    while again:
        again = False
        for simpler in _simpler(case):
            calls += 1
            if calls > most:
                return case
            if fails(simpler):
                case, again = simpler, True
                break
    return case


def _simpler(case: BlockCase) -> Iterator[BlockCase]:
    """Cases that are simpler in one respect, those that lose most first."""
    plainest = BlockCase(1, 1, 1, 1, ())
    for i in range(len(case.parts) if len(case.parts) > 1 else 0):
        yield replace(case, parts=case.parts[:i] + case.parts[i + 1 :])
    for i, part in enumerate(case.parts):
        for smaller in _simpler_part(part):
            yield replace(case, parts=(*case.parts[:i], smaller, *case.parts[i + 1 :]))
    for name in ("batch", "height", "width", "channels"):
        yield from (replace(case, **{name: n}) for n in _smaller(getattr(case, name)))
    options = ("layout", "dtype", "mode", "fill", "policy", "memory", "threads")
    for name in (*options, "weights_channels_last"):
        value = getattr(plainest, name)
        if getattr(case, name) != value:
            yield replace(case, **{name: value})


def _simpler_part(part: Part) -> Iterator[Part]:
    for i in range(len(part.convs) if len(part.convs) > 1 else 0):
        yield replace(part, convs=part.convs[:i] + part.convs[i + 1 :], tap=None)
    if part.shortcut != "none":
        yield replace(part, shortcut="none", projection=None)
    plainest = Part(())
    for name in ("tap", "pool", "pre", "addition"):
        if getattr(part, name) != getattr(plainest, name):
            yield replace(part, **{name: getattr(plainest, name)})
    for i, conv in enumerate(part.convs):
        for smaller in _simpler_conv(conv):
            yield replace(part, convs=(*part.convs[:i], smaller, *part.convs[i + 1 :]))
    if part.projection is not None:
        for smaller in _simpler_conv(part.projection):
            yield replace(part, projection=smaller)


def _simpler_conv(conv: Conv) -> Iterator[Conv]:
    if conv.kernel != (1, 1):
        yield replace(conv, kernel=(1, 1), padding=(0, 0), dilation=(1, 1))
    plainest = Conv(1, act="none", norm="none")
    for name in ("groups", "stride", "dilation", "padding_mode", "bias", "form", "act", "norm"):
        if getattr(conv, name) != getattr(plainest, name):
            yield replace(conv, **{name: getattr(plainest, name)})
    yield from (replace(conv, outputs=n) for n in _smaller(conv.outputs))


def _smaller(number: int) -> list[int]:
    return [n for n in dict.fromkeys((1, number // 2, number - 1)) if 0 < n < number]
