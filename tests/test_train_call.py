"""A residual block in training as one call each way: the same bits as step by step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from train_case import big, images, results, smooth

import resnet_fused
from resnet_fused.backends import native_conv
from resnet_fused.ops.train_block import TrainBlock


@pytest.mark.parametrize("frozen", [(), ("conv1.weight", "bn2.bias")], ids=["", "frozen"])
@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("kind", ["basic", "bottleneck", "silu", "bias", "bfloat16"])
def test_one_call_gives_the_bits_of_its_steps(
    kind: str, memory: str, frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if native_conv.unusable(torch.bfloat16 if kind == "bfloat16" else torch.float32):
        pytest.skip("no kernels")
    layers = "bottleneck" if kind == "bottleneck" else "basic"
    plain, x = big(layers), images(layers)
    if kind == "silu":
        plain = smooth(plain)
    if kind == "bias":
        for module in plain.modules():
            if isinstance(module, nn.Conv2d):
                module.bias = nn.Parameter(torch.randn(module.out_channels))
        plain[0].bn1.weight = plain[1].bn2.bias = None
    for name in frozen:
        plain[0].get_parameter(name).requires_grad_(False)
    found = []
    runs_at_once = TrainBlock.runs_at_once
    for at_once in (True, False):
        seen: list[bool] = []

        def spy(*arguments: Any, at_once: bool = at_once, seen: list[bool] = seen) -> bool:
            seen.append(at_once and runs_at_once(*arguments))
            return seen[-1]

        monkeypatch.setattr(TrainBlock, "runs_at_once", spy)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bfloat16"):
            model = resnet_fused.fuse(copy.deepcopy(plain), memory=memory)
            found.append(results(model, x, torch.sin))
        assert seen
        assert all(seen) == at_once
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numbers": [1, -1, 1, 1, 1, 1, 1, 1, 6]}, "reads the input or what is before"),
        ({"numbers": [2, -1, 1, 1, 1, 1, 1, 1, 6]}, "reads the input or what is before"),
        ({"numbers": [0, 2, 1, 1, 1, 1, 1, 1, 6]}, "reads the input or what is before"),
        ({"numbers": [0, -1, 1, 1, 1, 1, 1, 1, 7]}, "parameters are missing"),
        ({"numbers": [0, -1, 1, 1, 1, 1, 1, 1, 2]}, "1 parameters too many"),
        ({"numbers": [0]}, "9, 2 and 4 for each convolution"),
        ({"names": []}, "9, 2 and 4 for each convolution"),
        ({"names": ["relu", "strassen", "direct", "gemm"]}, "training takes direct"),
        ({"input": torch.zeros(1, 15, 8, 8)}, "input must have 16 channels"),
    ],
    ids=str,
)
def test_bad_arguments_of_one_call(change: dict[str, Any], message: str) -> None:
    if native_conv.unusable(torch.float32):
        pytest.skip("no kernels")
    arguments: dict[str, Any] = {
        "input": torch.zeros(1, 16, 8, 8),
        "parameters": [torch.zeros(16, 16, 3, 3), torch.ones(16), torch.zeros(16)],
        "numbers": [0, -1, 1, 1, 1, 1, 1, 1, 6], "scalars": [1e-5, 0.0],
        "names": ["relu", "direct", "direct", "gemm"],
    }  # fmt: skip
    ops = torch.ops.resnet_fused
    z, mean, var, output = ops._train_block(**arguments)
    backward = {
        "grad_output": output, "outputs": [z], "statistics": [mean, var], "kept": [output],
        "kept_values": [0], "needs": [1, 1],
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        ops._train_block(**{**arguments, **change})
    if "input" in change or "strassen" in change.get("names", ()):
        return  # backward reads neither the input nor what forward ran with
    del arguments["input"], z, mean, var
    assert len(ops._train_block_backward(**backward, **arguments)) == 4
    with pytest.raises(RuntimeError, match=message):
        ops._train_block_backward(**backward, **{**arguments, **change})
    for bad, expected in (
        ({"needs": [1]}, "must fit the convolutions"),
        ({"kept_values": [3]}, "there is no value 3"),
        ({"kept": [], "kept_values": []}, "value 0 is missing"),
        ({"outputs": [output, output]}, "outputs must be 1 or one less"),
    ):
        with pytest.raises(RuntimeError, match=expected):
            ops._train_block_backward(**{**backward, **bad}, **arguments)
