"""A small network that reaches every kernel of the CPU, and everything that a run of it gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from block_zoo import PreActivation, randomise
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused import conv_choice
from resnet_fused.models.blocks import BasicBlock, Bottleneck, conv1x1
from resnet_fused.ops import train_conv

ALGORITHMS = (
    "direct", "winograd2", "winograd2_late", "winograd3", "winograd3_late", "winograd4",
    "winograd4_late", "grouped", "strassen",
)  # fmt: skip


def take_turns(problem: conv_choice.ConvProblem, algorithm: str) -> float:
    """A cost in whose terms each algorithm is the best somewhere in :func:`network`."""
    if algorithm == "onednn":
        return float("inf")
    turn = 7 * (problem.channels + problem.out_channels) // 8 - 1
    return 1e15 * ((ALGORITHMS.index(algorithm) - turn) % len(ALGORITHMS))


@pytest.fixture
def every_algorithm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All of the library's own convolutions take part."""
    monkeypatch.setattr(conv_choice, "cost", take_turns)
    train_conv.choose_for.cache_clear()
    yield
    train_conv.choose_for.cache_clear()


def network(*, strassen: bool) -> nn.Module:
    """A stem with its pool, blocks of every kind, and a head; always the same weights.

    Args:
        strassen: with the 1024 channels that it takes.
    """
    torch.manual_seed(1)
    last = 1 if strassen else 2
    blocks: list[nn.Module] = [
        nn.Sequential(
            nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        ),
        BasicBlock(16, 24, downsample=_projection(16, 24)),
        BasicBlock(24, 32, stride=2, downsample=_projection(24, 32, 2)),
        PreActivation(32, 40),
        BasicBlock(40, 48, stride=last, downsample=_projection(40, 48, last)),
        Bottleneck(48, 16, groups=4, base_width=32, downsample=_projection(48, 64)),
    ]  # fmt: skip
    if strassen:
        blocks += [
            Bottleneck(64, 256, downsample=_projection(64, 1024)),
            Bottleneck(1024, 64, downsample=_projection(1024, 256)),
        ]
    channels = 256 if strassen else 64
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(channels, 10))
    model = randomise(nn.Sequential(*blocks, head))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _projection(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(conv1x1(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs))


def pictures(seed: int = 0, size: tuple[int, int] = (45, 37)) -> Tensor:
    """Three images whose sizes are odd at every stage."""
    x = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(seed))
    return x.to(memory_format=torch.channels_last)


class Step:
    """Runs one step of a model again and again, each time from the same state.

    Args:
        model: in evaluation or in training, which is then what is run.
        dtype: of the data; in training autocast's.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.buffers = [b.clone() for b in model.buffers()]

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """All that it gives, by name."""
        with torch.no_grad():
            for buffer, value in zip(self.model.buffers(), self.buffers, strict=True):
                buffer.copy_(value)
        if not self.model.training:
            with torch.no_grad():
                return {"y": self.model(x.to(self.dtype))}
        x = x.clone().requires_grad_()
        self.model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype != torch.float32):
            y = self.model(x)
        loss = y.float().square().sum()
        loss.backward()
        assert x.grad is not None
        found = {"loss": loss.detach(), "y": y.detach(), "x": x.grad}
        found |= {
            f"grad {n}": p.grad for n, p in self.model.named_parameters() if p.grad is not None
        }
        return found | {n: b.clone() for n, b in self.model.named_buffers()}


class Names(TorchDispatchMode):
    """The library's operators that are called, and the algorithms that they are told."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()
        self.algorithms: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "resnet_fused":
            self.operators.add(func._schema.name.partition("::")[2])
            for arg in args:
                texts = arg if isinstance(arg, list) else [arg]
                self.algorithms.update(t for t in texts if isinstance(t, str) and t in ALGORITHMS)
        return func(*args, **(kwargs or {}))
