"""What each convolution of a model is given when the model runs on an example."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.ops.schema import is_channels_last


@dataclass(frozen=True)
class Observed:
    """A convolution's input, at its first call."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool  # the input or the weights


def conv_inputs(model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Observed]:
    """Run a copy of a model on an example, in evaluation, and note what its convolutions read.

    Returns:
        By the convolution's qualified name. A convolution that is not called is missing.
    """
    copied = copy.deepcopy(model).eval()
    seen: dict[str, Observed] = {}

    def watch(name: str) -> Any:
        def hook(conv: nn.Conv2d, args: tuple[Any, ...]) -> None:
            if name not in seen and args and isinstance(args[0], Tensor):
                fast = is_channels_last(args[0]) or is_channels_last(conv.weight)
                seen[name] = Observed(tuple(args[0].shape), args[0].dtype, fast)

        return hook

    # A block with a hooked convolution runs its own forward, so fused models are seen through too.
    for name, module in copied.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        copied(*inputs)
    return seen
