"""A case in eager PyTorch: the ways it may compute it, and whether it is wrong itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from resnet_fused.parity import relative_error

from .block import BlockCase, Conv, Outcome, run
from .draw import CORNERS
from .measure import without_onednn

FEW = 16
"""Numbers whose sum or variance may be nearly zero by luck."""


def convolutions(case: BlockCase) -> list[Conv]:
    """All of a network's."""
    return [c for p in case.parts for c in (*p.convs, *filter(None, (p.projection,)))]


def fewest_pixels(case: BlockCase) -> int:
    """Of an image that goes in, or comes out of a convolution or a pool."""
    sizes = [(case.height, case.width)]
    for part in case.parts:
        for conv in part.convs:
            sizes.append(conv.size(*sizes[-1]))
        if part.pool:
            height, width = sizes[-1]
            sizes.append(((height - 1) // 2 + 1, (width - 1) // 2 + 1))
    return min(math.prod(size) for size in sizes)


def has_tails(case: BlockCase) -> bool:
    """Whether one draw may be off by any factor, as often in eager PyTorch: a ReLU near its corner
    passes a gradient or does not, and the variance of a few values is nearly zero.
    """
    if case.mode == "train" and fewest_pixels(case) * case.batch < FEW:
        return True
    return case.mode != "eval" and any(conv.act in CORNERS for conv in convolutions(case))


def ways(case: BlockCase, plain: nn.Module, base: Tensor) -> list[Outcome]:
    """Plain PyTorch's results as the case says; if it does not raise, in other ways too.

    The other ways: in another memory format, and in float64, where eager is its own truth, with
    data that differ by a few roundings.
    """
    found = [run(case, copy.deepcopy(plain), base)]
    if found[0].error is not None:
        return found
    if case.layout in ("contiguous", "channels_last"):
        last = case.layout == "contiguous"
        layout = torch.channels_last if last else torch.contiguous_format
        model = copy.deepcopy(plain).to(memory_format=layout)  # type: ignore[call-overload]
        other = replace(case, layout="channels_last" if last else "contiguous")
        found.append(run(other, model, base))
    if case.dtype == "float64":
        model = copy.deepcopy(plain)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(_shaken(parameter))
        found.append(run(case, model, _shaken(base)))
    return found


def library_is_wrong(
    case: BlockCase,
    plain: nn.Module,
    base: Tensor,
    truth: Mapping[str, Tensor],
    seen: Mapping[str, Tensor] = MappingProxyType({}),
) -> bool:
    """Whether eager PyTorch by oneDNN in bfloat16 is no rounding of the truth, or no function.

    (torch 2.13: narrow images of AMX; images of one column, stride (1, 2) and groups of one.) Some
    read memory beyond their images, whose content differs from run to run: `seen` are results of
    an earlier one.
    """
    if case.dtype not in ("bfloat16", "autocast"):
        return False
    one, two = (run(case, copy.deepcopy(plain), base).tensors for _ in range(2))
    with without_onednn():
        other = run(case, copy.deepcopy(plain), base).tensors
    for name, exact in truth.items():
        if name not in one or not exact.is_floating_point():
            continue
        mine = [tensors[name] for tensors in (one, two, seen) if name in tensors]
        finite = other[name].isfinite()
        if any(not torch.equal(t.isfinite(), finite) for t in mine):
            return True
        if relative_error(one[name], two[name]) > 0:
            return True
        error, least = (relative_error(t, exact) for t in (one[name], other[name]))
        if error > 0.02 and error > 8 * least:
            return True
    return False


def _shaken(tensor: Tensor) -> Tensor:
    """The same but for a few roundings of each value, up or down."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor.dtype) * 2 - 1
    return tensor * (1 + signs * 4 * torch.finfo(tensor.dtype).eps)
