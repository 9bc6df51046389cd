"""The epilogue that overwrites its own input: the same bits as the one that does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resnet_fused.backends import native
from resnet_fused.modules.bn_act import BNAct

pytestmark = pytest.mark.skipif(not native.available, reason="the compiled library is missing")
OPS = torch.ops.resnet_fused


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("add", ["nothing", "residual", "itself"])
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
def test_same_bits(act: str, add: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    scale, shift = torch.randn(2, 19, dtype=vectors)
    x = torch.randn(2, 19, 7, 9).to(dtype).contiguous(memory_format=layout)
    x[0, 0, 0, 0] = float("nan")
    residual = {"nothing": None, "residual": torch.randn_like(x), "itself": x}[add]
    expected = OPS.scale_shift_act(x, scale, shift, residual, act, 0.0)
    OPS._scale_shift_act_(x, scale, shift, residual, act, 0.0)
    assert torch.equal(x.isnan(), expected.isnan())
    assert torch.equal(x.nan_to_num(0), expected.nan_to_num(0))


def test_the_version_counter_moves() -> None:
    """What was made from the old values is outdated, and what autograd kept of them is an error."""
    bn = nn.BatchNorm2d(4).eval()
    x = torch.randn(2, 4, 3, 3)
    version = x._version
    with torch.no_grad():
        y = BNAct("relu")(x, bn, overwrite=True)
    assert y is x
    assert x._version > version
    with torch.inference_mode():
        z = torch.randn(2, 4, 3, 3)
        assert BNAct("relu")(z, bn, overwrite=True) is z


def test_refuses_what_it_cannot_overwrite() -> None:
    x = torch.zeros(2, 6, 4, 8)[..., ::2]
    one = torch.ones(6)
    with pytest.raises(RuntimeError, match="input must be dense"):
        OPS._scale_shift_act_(x, one, one, None, "relu", 0.0)
    assert not x.any()
