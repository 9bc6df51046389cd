"""Threads that start at once, and a small network with every kind of step."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from train_case import trained

from resnet_fused import fuse
from resnet_fused.models.blocks import BasicBlock, Bottleneck, conv1x1

T = TypeVar("T")


def together(count: int, work: Callable[[int], T], *, seconds: float = 600.0) -> list[T]:
    """What `count` threads give that start at once; the first exception of any of them is raised.

    Args:
        work: called with the thread's number.
        seconds: after which a thread hangs.
    """
    start = threading.Barrier(count)
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            start.wait(seconds)
            results[i] = work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    if errors:
        raise errors[0]
    assert not any(t.is_alive() for t in threads), "a thread hangs"
    return [results[i] for i in range(count)]


class Network(nn.Module):
    """A stem with its pool, two blocks of each kind, projections and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 7, 2, 3, bias=False)
        self.bn = nn.BatchNorm2d(32)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.layers = nn.Sequential(
            BasicBlock(32, 32),
            BasicBlock(32, 48, stride=2, downsample=projection(32, 48, 2)),
            Bottleneck(48, 16, downsample=projection(48, 64, 1)),
            Bottleneck(64, 16),
        )
        self.average = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.pool(self.act(self.bn(self.conv(x)))))
        return self.linear(torch.flatten(self.average(x), 1))


def projection(channels: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(conv1x1(channels, outputs, stride=stride), nn.BatchNorm2d(outputs))


def network(seed: int = 1) -> nn.Module:
    """One with statistics that look trained."""
    torch.manual_seed(seed)
    return trained(Network()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def cold(fused: nn.Module) -> nn.Module:
    """A copy, which has packed nothing yet, for evaluation."""
    return copy.deepcopy(fused).eval()


def picture(i: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Two to four images, so many that no convolution is left to eager PyTorch; of two sizes."""
    source = torch.Generator().manual_seed(i)
    x = torch.randn(2 + i % 3, 3, 48 + i % 2 * 9, 48, generator=source)
    return x.to(dtype).to(memory_format=torch.channels_last)


def infer(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """One step of training: the output, every gradient and what the state is then."""
    model.train().zero_grad()
    y = model(x)
    y.square().mean().backward()
    with torch.no_grad():
        for p in model.parameters():
            assert p.grad is not None
            p -= 0.01 * p.grad
    gradients = {f"grad of {n}": p.grad.clone() for n, p in model.named_parameters()}  # type: ignore[union-attr]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return {"output": y.detach(), **gradients, **state}


def assert_same_bits(actual: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    """Every tensor of two results, by name."""
    assert actual.keys() == wanted.keys()
    wrong = [n for n, v in wanted.items() if not torch.equal(actual[n], v)]
    assert not wrong, f"{what}: other bits in {', '.join(wrong[:5])}"


def fused_network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The network fused and in evaluation."""
    return fuse(network().eval().to(dtype))
