"""torchvision's and timm's residual networks, as they come: everything fuses that should, and the
result is eager's.

Small images and batches: the number of runs and the agreement are what is looked at, not the speed.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from block_zoo import randomise
from tolerance import assert_parity, double_model
from torch import nn
from train_case import smooth

import resnet_fused
from resnet_fused.benchmark.load import LoadError, load_model

TORCHVISION = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "densenet121",
    "vgg11_bn",
]
TIMM = [
    "resnet50d",
    "seresnet50",
    "resnetblur50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "resnetv2_50",
]
MODELS = [f"torchvision:{n}" for n in TORCHVISION] + [f"timm:{n}" for n in TIMM]

# Models whose convolutions all have a normalisation behind them: each of them is the start of a
# fused run.
EVERY_CONV = {
    "resnet18": 20,
    "resnet34": 36,
    "resnet50": 53,
    "resnet101": 104,
    "resnet152": 155,
    "resnext50_32x4d": 53,
    "resnext101_32x8d": 104,
    "wide_resnet50_2": 53,
    "wide_resnet101_2": 104,
    "vgg11_bn": 8,
}
LARGE = ("101", "152")


def load(name: str) -> nn.Module:
    pytest.importorskip(name.split(":")[0] if name.startswith("timm") else "torch")
    torch.manual_seed(0)
    try:
        model = load_model(name)
    except LoadError as error:
        pytest.skip(str(error))
    return randomise(model).eval()


def image(name: str) -> torch.Tensor:
    side = 32 if any(part in name for part in LARGE) else 64
    return torch.randn(2, 3, side, side).contiguous(memory_format=torch.channels_last)


def entries(model: nn.Module) -> tuple[Any, ...]:
    return resnet_fused.explain(model).entries


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_fuses_and_agrees(name: str) -> None:
    plain, x = load(name), image(name)
    eager = plain(x)
    resnet_fused.fuse(plain, inplace=True)
    actual = plain(x)
    told = entries(plain)
    resnet_fused.unfuse(plain, inplace=True)
    reference = plain.double()(x.double())
    assert_parity(actual, eager, reference, what=name)
    fused = [e for e in told if e.status == "fused"]
    assert fused
    assert all(e.reason for e in told if e.status == "skipped")
    short = name.split(":")[1]
    if short in EVERY_CONV:
        assert len([e for e in fused if e.pattern.startswith("conv-bn")]) == EVERY_CONV[short]
        assert len(fused) == len(told)


@pytest.mark.parametrize(
    ("name", "patterns"),
    [
        # 16 blocks: the last run of each takes the sum; 4 projections have no activation
        ("torchvision:resnet50", {"conv-bn-relu": 33, "conv-bn-add-relu": 16, "conv-bn": 4}),
        ("torchvision:resnet18", {"conv-bn-relu": 9, "conv-bn-add-relu": 8, "conv-bn": 3}),
        ("torchvision:vgg11_bn", {"conv-bn-relu": 8}),
    ],
)
def test_patterns(name: str, patterns: dict[str, int]) -> None:
    fused = resnet_fused.fuse(load(name))
    assert Counter(e.pattern for e in entries(fused) if e.status == "fused") == patterns


@pytest.mark.parametrize(
    ("name", "at_least"),
    [
        ("timm:resnet50d", 53),
        ("timm:seresnet50", 53),
        ("timm:resnext50_32x4d", 50),
        ("timm:wide_resnet50_2", 50),
        ("timm:resnetblur50", 45),
        ("torchvision:densenet121", 100),
    ],
)
def test_most_runs_of_the_harder_ones(name: str, at_least: int) -> None:
    """Squeeze-excite, blur pooling, average-pooled shortcuts and concatenation leave the rest
    fusible.
    """
    fused = resnet_fused.fuse(load(name))
    assert sum(e.status == "fused" for e in entries(fused)) >= at_least


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet50d"])
def test_training_step(name: str) -> None:
    """Output of a training step and running statistics; gradients are held on the smaller models
    of the zoo.
    """
    plain = load(name).train()
    fused, reference = resnet_fused.fuse(plain), double_model(plain)
    x = torch.randn(4, 3, 64, 64)
    outputs = []
    for model, value in ((fused, x), (plain, x), (reference, x.double())):
        torch.manual_seed(0)
        outputs.append(model(value))
        outputs[-1].square().mean().backward()
    assert_parity(*outputs, what=name)
    buffers = zip(fused.named_buffers(), plain.buffers(), reference.buffers(), strict=True)
    for (key, ours), eager, exact in buffers:
        assert_parity(ours, eager, exact, what=key)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fused.parameters())


# One of each family: what runs in their training is the same whatever their depth.
FAMILIES = [
    "torchvision:resnet18", "torchvision:resnet50", "torchvision:resnext50_32x4d",
    "torchvision:wide_resnet50_2", "torchvision:densenet121", "torchvision:vgg11_bn",
    "timm:resnet50d", "timm:seresnet50", "timm:resnetblur50", "timm:resnetv2_50",
    "resnet20", "plain20",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_optimizer_step(name: str) -> None:
    """Parameters and running statistics after one step of SGD with momentum and weight decay."""
    plain = smooth(load(name)).train()
    x = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (4,))
    states = []
    for model in (resnet_fused.fuse(plain), copy.deepcopy(plain), double_model(plain)):
        dtype = next(model.parameters()).dtype
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        torch.manual_seed(0)
        F.cross_entropy(model(x.to(dtype)), labels).backward()
        optimizer.step()
        states.append(model.state_dict())
    for key in states[0]:
        assert_parity(*(state[key] for state in states), what=key)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:seresnet50"])
def test_checkpoint_keys(name: str) -> None:
    plain = load(name)
    fused = resnet_fused.fuse(plain)
    assert list(fused.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(fused.state_dict(), strict=True)


def test_ours_is_torchvisions() -> None:
    """The package's own resnet18 takes torchvision's weights and gives its output."""
    theirs = load("torchvision:resnet18")
    ours = load_model("resnet18").eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = image("resnet18")
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
