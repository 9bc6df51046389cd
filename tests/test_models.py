"""The model definitions: torchvision's numbers, the paper's sizes, clear errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resnet_fused.benchmark.load import LoadError, import_torchvision
from resnet_fused.models import MODELS, CifarResNet, ResNet, resnet20, resnet50
from resnet_fused.models.blocks import BasicBlock, ZeroPadShortcut

IMAGENET = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def spec(model: nn.Module) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(key, value.shape, value.dtype) for key, value in model.state_dict().items()]


@pytest.fixture(scope="module")
def torchvision_models():
    try:
        return import_torchvision().models
    except LoadError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", IMAGENET)
def test_state_dict_is_torchvisions(torchvision_models, name: str) -> None:
    """Keys, shapes, dtypes and order; on the meta device, so that no weights are made."""
    with torch.device("meta"):
        ours, theirs = MODELS[name](), torchvision_models.get_model(name, weights=None)
    assert spec(ours) == spec(theirs)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
@pytest.mark.parametrize("training", [False, True])
def test_logits_are_torchvisions(torchvision_models, name: str, training: bool) -> None:
    """The same operations in the same order: equal to the last bit."""
    torch.manual_seed(0)
    theirs = torchvision_models.get_model(name, weights=None).train(training)
    ours = MODELS[name]().train(training)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
def test_cifar_sizes_are_the_papers(depth: int, millions: float) -> None:
    """Table 6 of the paper, in its precision."""
    digits = 2 if millions < 1 else 1
    assert round(count(MODELS[f"resnet{depth}"](shortcut="A")) / 1e6, digits) == millions


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
def test_cifar_shortcuts(shortcut: str) -> None:
    model = resnet20(shortcut=shortcut)
    projections = [n for n, m in model.named_modules() if n.endswith("downsample.0")]
    padding = [m for m in model.modules() if isinstance(m, ZeroPadShortcut)]
    assert (len(projections), len(padding)) == {"A": (0, 2), "B": (2, 0), "C": (9, 0)}[shortcut]
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_zero_padding_keeps_pixels_and_appends_zeros() -> None:
    x = torch.randn(2, 3, 5, 5)
    y = ZeroPadShortcut(3, 7, stride=2)(x)
    assert y.shape == (2, 7, 3, 3)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2])
    assert not y[:, 3:].any()


@pytest.mark.parametrize(("plain", "residual"), [("plain18", "resnet18"), ("plain34", "resnet34")])
def test_plain_has_the_residual_networks_convolutions(plain: str, residual: str) -> None:
    with torch.device("meta"):
        without, with_shortcuts = spec(MODELS[plain]()), spec(MODELS[residual]())
    assert without == [row for row in with_shortcuts if "downsample" not in row[0]]


@pytest.mark.parametrize("name", ["plain20", "plain18", "resnet20", "resnet18"])
def test_backward_reaches_every_parameter(name: str) -> None:
    model = MODELS[name](num_classes=5)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_builder_builds(name: str) -> None:
    with torch.device("meta"):
        model = MODELS[name](num_classes=7)
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 7)


def test_fused_models_equal_plain_ones() -> None:
    plain = resnet20().eval()
    fused = resnet20(fused=True).eval()
    assert spec(fused) == spec(plain)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: resnet20(shortcut="D"), "shortcut must be 'A', 'B' or 'C', got 'D'"),
        (lambda: resnet20(shortcut=None), "shortcut must be 'A', 'B' or 'C', got None"),
        (lambda: resnet50(num_classes=0), "num_classes must be a positive integer, got 0"),
        (lambda: CifarResNet(21), "depth must be 6 n \\+ 2"),
        (lambda: CifarResNet(2), "depth must be 6 n \\+ 2"),
        (lambda: ResNet(BasicBlock, [2, 2, 2]), "layers must have four numbers"),
        (lambda: ResNet(BasicBlock, [2, 2, 0, 2]), "layers must be a positive integer"),
        (lambda: ResNet(BasicBlock, [2, 2, 2, 2], groups=2), "BasicBlock has groups=1"),
        (lambda: ZeroPadShortcut(8, 4, stride=1), "out_channels must be at least in_channels"),
    ],
)
def test_bad_arguments(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
