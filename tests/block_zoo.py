"""Plain PyTorch models to fuse, each written in a way that people write residual blocks, and what
must happen to it.

`ZOO[name]` builds a small model and says which runs have to be fused, which modules must not be
part of a fused run, and for which a skip has to be explained. `NETWORKS` holds whole networks. A
file of data: it is long because it is a catalogue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations


@dataclass(frozen=True)
class ZooEntry:
    """One test model.

    `fused`: first module of a run → its pattern, a regular expression. `never`: modules that may be
    in no fused run. `skipped`: first module of a skipped candidate → a regular expression that its
    reason has to match.
    """

    factory: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...] = ((2, 8, 9, 7),)
    kwargs: dict[str, Any] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)
    never: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    trainable: bool = True
    observe: Callable[[nn.Module], Any] = lambda model: ()


def randomise(model: nn.Module, seed: int = 7) -> nn.Module:
    """Give every batch normalisation statistics and weights that are not the identity, some scales
    negative.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.affine:
                    uniform(module.weight, 0.5, 1.5)
                    module.weight[::5] *= -1
                    uniform(module.bias, -0.5, 0.5)
                if module.running_mean is not None:
                    uniform(module.running_mean, -0.3, 0.3)
                    uniform(module.running_var, 0.5, 1.5)
    return model


def build(name: str) -> nn.Module:
    """The model `name` of ZOO or NETWORKS, the same weights at every call."""
    entry = ZOO.get(name) or NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return randomise(entry.factory())


def example(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Inputs for the model `name`, the same at every call."""
    entry = ZOO.get(name) or NETWORKS[name]
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in entry.inputs)


def conv3(inputs: int, outputs: int | None = None, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs or inputs, 3, **{"padding": 1, "bias": False, **options})


class Chain(nn.Module):
    """conv1, bn1 and a ready-made activation module, one after the other."""

    def __init__(self, conv: nn.Module, bn: nn.Module, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv, bn
        self.act = act if act is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn1(self.conv1(x)))


class FrozenNorm(Chain):
    """Fine-tuning with fixed statistics: train() leaves the normalisation in evaluation mode."""

    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(mode)
        self.bn1.eval()
        return self


class Written(nn.Module):
    """Two convs and two normalisations; the forward is the function given, so a spelling costs one
    line.
    """

    def __init__(
        self, how: Callable[[Any, Tensor], Tensor], channels: int = 8, bias: bool = False
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(channels, bias=bias), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv3(channels, bias=bias), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.act = nn.ReLU()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


# --- spellings of one basic block --------------------


def inner(m: Any, x: Tensor) -> Tensor:
    return m.bn2(m.conv2(m.relu(m.bn1(m.conv1(x)))))


def add_in_place(m: Any, x: Tensor) -> Tensor:
    shortcut = x
    y = inner(m, x)
    y += shortcut
    return m.relu(y)


def add_method_in_place(m: Any, x: Tensor) -> Tensor:
    return m.act(inner(m, x).add_(x))


def add_torch(m: Any, x: Tensor) -> Tensor:
    return F.relu(torch.add(inner(m, x), x))


def add_left(m: Any, x: Tensor) -> Tensor:
    return torch.relu(x + inner(m, x))


def add_right(m: Any, x: Tensor) -> Tensor:
    return torch.relu_(inner(m, x) + x)


def add_method(m: Any, x: Tensor) -> Tensor:
    return inner(m, x).add(x).relu()


def functional_relu_in_place(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.bn1(m.conv1(x)), inplace=True)
    return F.relu(m.bn2(m.conv2(y)) + x, inplace=True)


def method_relu_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.bn1(m.conv1(x)).relu_()
    return (m.bn2(m.conv2(y)) + x).relu_()


def scaled_add(m: Any, x: Tensor) -> Tensor:
    # alpha makes this another sum than y + x
    return F.relu(torch.add(inner(m, x), x, alpha=0.5))


def add_number(m: Any, x: Tensor) -> Tensor:
    return F.relu(inner(m, x) + 1.0)


def add_broadcast(m: Any, x: Tensor) -> Tensor:
    return F.relu(inner(m, x) + x.mean((2, 3), keepdim=True))


def add_itself(m: Any, x: Tensor) -> Tensor:
    y = inner(m, x)
    return F.relu(y + y)


def add_two_runs(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.bn1(m.conv1(x)) + m.bn2(m.conv2(x)))


def linear_sum(m: Any, x: Tensor) -> Tensor:
    return inner(m, x) + x


def sum_read_twice(m: Any, x: Tensor) -> Tensor:
    y = inner(m, x) + x
    return F.relu(y) * y


def relu_before_add(m: Any, x: Tensor) -> Tensor:
    return F.relu(inner(m, x)) + x


def conv_read_twice(m: Any, x: Tensor) -> Tensor:
    z = m.conv1(x)
    return m.act(m.bn1(z)) + z + m.bn2(m.conv2(x))


def inner_value_read_outside(m: Any, x: Tensor) -> Tensor:
    # two runs that follow one another, and a product that reads both
    y = m.act(m.bn1(m.conv1(x)))
    return m.act(m.bn2(m.conv2(y))) * y


def leaky_function(m: Any, x: Tensor) -> Tensor:
    return F.leaky_relu(inner(m, x) + x, 0.3)


def sum_of_two_dtypes(m: Any, x: Tensor) -> Tensor:
    # eager PyTorch promotes the shortcut
    return m.act(inner(m, x) + x.bfloat16())


def bn_read_twice(m: Any, x: Tensor) -> Tensor:
    z = m.bn1(m.conv1(x))
    return F.relu(z) - z + m.bn2(m.conv2(x))


def in_place_relu_seen_by_other(m: Any, x: Tensor) -> Tensor:
    # the addition reads what the in-place ReLU wrote
    z = m.bn1(m.conv1(x))
    m.relu(z)
    return z + m.bn2(m.conv2(x))


def in_place_on_the_input(m: Any, x: Tensor) -> Tensor:
    # whoever called the block sees its tensor changed
    x += m.conv1(m.bn1(x))
    return m.relu(m.bn2(m.conv2(x)))


def in_place_relu_on_the_input(m: Any, x: Tensor) -> Tensor:
    # the shortcut is the input after the in-place ReLU, as in early pre-activation code
    y = m.bn1(m.conv1(m.relu(x)))
    return m.bn2(m.conv2(m.act(y))) + x


def shortcut_changed_after(m: Any, x: Tensor) -> Tensor:
    # the sum must read the shortcut before it is doubled
    shortcut = m.bn1(m.conv1(x))
    y = F.relu(m.bn2(m.conv2(x)) + shortcut)
    shortcut.mul_(2.0)
    return y - shortcut


def shortcut_changed_in_between(m: Any, x: Tensor) -> Tensor:
    # after the sum has read it, before the activation ends the run
    shortcut = x * 1.0
    y = m.bn2(m.conv2(x)) + shortcut
    shortcut.mul_(2.0)
    return m.act(y) - shortcut


def shortcut_changed_before(m: Any, x: Tensor) -> Tensor:
    shortcut = x * 1.0
    y = m.bn2(m.conv2(x))
    shortcut.mul_(2.0)
    return F.relu(y + shortcut)


def conv_input_changed_after(m: Any, x: Tensor) -> Tensor:
    # the conv reads h before it is changed, its normalisation runs after
    h = x * 1.0
    z = m.conv1(h)
    h.mul_(3.0)
    return F.relu(m.bn1(z)) + m.bn2(m.conv2(h))


def data_dependent(m: Any, x: Tensor) -> Tensor:
    y = m.act(m.bn1(m.conv1(x)))
    if y.sum() > 0:
        return m.act(m.bn2(m.conv2(y)) + x)
    return m.bn2(m.conv2(y))


def asks_for_training(m: Any, x: Tensor) -> Any:
    y = m.act(m.bn1(m.conv1(x)))
    if m.training:
        return m.act(m.bn2(m.conv2(y)) + x), y
    return m.act(m.bn2(m.conv2(y)) - x)


def stores_an_attribute(m: Any, x: Tensor) -> Tensor:
    m.last = m.act(m.bn1(m.conv1(x)))
    return m.act(m.bn2(m.conv2(m.last)) + x)


def counts_its_calls(m: Any, x: Tensor) -> Tensor:
    m.calls = getattr(m, "calls", 0) + 1
    return m.act(inner(m, x) * m.calls)


def dropout_between(m: Any, x: Tensor) -> Tensor:
    y = F.dropout(m.act(m.bn1(m.conv1(x))), 0.5, m.training)
    return m.act(m.bn2(m.conv2(y)) + x)


def drop_path(m: Any, x: Tensor) -> Tensor:
    y = inner(m, x)
    if m.training:
        keep = torch.rand(x.shape[0], 1, 1, 1) < 0.6
        y = y * keep / 0.6
    return m.act(y + x)


def scaled_by_a_draw(m: Any, x: Tensor) -> Tensor:
    # another number at every call, which a trace would take for a constant
    return m.act(inner(m, x) * (1.0 + torch.rand(1).item()) + x)


def conv_used_twice(m: Any, x: Tensor) -> Tensor:
    y = m.act(m.bn1(m.conv1(x)))
    y = m.act(m.bn1(m.conv1(y)))
    return m.act(m.bn2(m.conv2(y)) + x)


def bn_used_twice(m: Any, x: Tensor) -> Tensor:
    return m.act(m.bn1(m.conv1(x)) + m.bn1(m.conv2(x)))


def unused_conv(m: Any, x: Tensor) -> Tensor:
    return m.act(m.bn1(m.conv1(x)))


def weight_read_elsewhere(m: Any, x: Tensor) -> Tensor:
    return m.act(m.bn1(m.conv1(x))) * m.conv1.weight.mean() + m.bn2(m.conv2(x))


def under_no_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.act(m.bn1(m.conv1(x)))
    return m.act(m.bn2(m.conv2(y)) + x)


def detached(m: Any, x: Tensor) -> Tensor:
    y = m.act(m.bn1(m.conv1(x))).detach()
    return m.act(m.bn2(m.conv2(y)) + x)


def cast_between(m: Any, x: Tensor) -> Tensor:
    y = m.conv1(x).double().to(x.dtype)
    return m.act(m.bn1(y)) + m.act(m.bn2(m.conv2(x)))


def reversed_order(m: Any, x: Tensor) -> Tensor:
    # bn2 belongs to conv1's output: the numbers in names mean nothing
    return m.act(m.bn2(m.conv1(m.act(m.bn1(m.conv2(x))))))


class OptionalArguments(nn.Module):
    """`x`, a shortcut that may be left out, and a switch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(8), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()

    def forward(
        self, x: Tensor, shortcut: Tensor | None = None, *, activate: bool = True
    ) -> Tensor:
        y = self.bn1(self.conv1(x))
        if shortcut is not None:
            y = y + shortcut
        return self.relu(y) if activate else y


class Caller(nn.Module):
    """Calls one block in three ways: none of them may be frozen into it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = OptionalArguments()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.block(x, shortcut=x) + self.block(x, x, activate=False)


class TwoStreams(nn.Module):
    """Two inputs, a tuple of a tensor and a dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(8), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv3(6, 8, stride=2), nn.BatchNorm2d(8)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        a = F.relu(self.bn1(self.conv1(x)))
        b = self.bn2(self.conv2(y))
        return F.relu(b + a), {"a": a, "b": b}


# --- whole blocks --------------------


class BiasedBlock(nn.Module):
    """The basic block with biased convolutions and one in-place ReLU for both uses."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        kept = x
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += kept
        return self.relu(y)


def unit(
    inputs: int, outputs: int, kernel: int, stride: int = 1, act: bool = True
) -> nn.Sequential:
    """A biased conv, its normalisation and maybe a ReLU as the children of a Sequential."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel_size=kernel, stride=stride, padding=kernel // 2),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if act else nn.Sequential(*layers)


class SequentialBlock(nn.Module):
    """Units that are Sequentials, the sum added in place into the last one's output; 2 of them, or
    3 for a bottleneck.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        downsample: nn.Module | None = None,
        bottleneck: bool = False,
    ) -> None:
        super().__init__()
        if bottleneck:
            self.conv1 = unit(inputs, outputs, 1)
            self.conv2 = unit(outputs, outputs, 3, stride)
            self.conv3 = unit(outputs, outputs * 4, 1, act=False)
        else:
            self.conv1 = unit(inputs, outputs, 3, stride)
            self.conv2 = unit(outputs, outputs, 3, act=False)
        self.bottleneck = bottleneck
        self.relu = nn.ReLU()
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        original = x
        x = self.conv2(self.conv1(x))
        if self.bottleneck:
            x = self.conv3(x)
        if self.downsample:
            original = self.downsample(original)
        x += original
        return self.relu(x)


class SequentialResNet(nn.Module):
    """A ResNet of SequentialBlocks. `swapped` passes a stage's stride and number of blocks the
    wrong way round.
    """

    def __init__(
        self,
        layers: list[int],
        *,
        bottleneck: bool = False,
        swapped: bool = False,
        width: int = 64,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.bottleneck, self.channels = bottleneck, width
        self.conv1 = unit(3, width, 7, 2)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for i, blocks in enumerate(layers):
            stride = 1 if i == 0 else 2
            pair = (stride, blocks) if swapped else (blocks, stride)
            setattr(self, f"layer{i}", self.stage(width * 2**i, *pair))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.channels, classes)

    def stage(self, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        widened = outputs * (4 if self.bottleneck else 1)
        downsample = None
        if stride != 1 or self.channels != widened:
            downsample = nn.Sequential(
                nn.Conv2d(self.channels, widened, kernel_size=1, stride=stride),
                nn.BatchNorm2d(widened),
            )
        made = [SequentialBlock(self.channels, outputs, stride, downsample, self.bottleneck)]
        self.channels = widened
        made += [
            SequentialBlock(widened, outputs, 1, None, self.bottleneck) for _ in range(blocks - 1)
        ]
        return nn.Sequential(*made)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.conv1(x))
        x = self.layer3(self.layer2(self.layer1(self.layer0(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class ProjectionWithoutNorm(nn.Module):
    """The teaching book's block: the shortcut is None or a bare 1x1 conv, the sum is in place."""

    def __init__(self, inputs: int, outputs: int, project: bool, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.conv3 = nn.Conv2d(inputs, outputs, 1, stride) if project else None
        self.bn1 = nn.BatchNorm2d(outputs)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.conv3 is not None:
            x = self.conv3(x)
        y += x
        return F.relu(y)


class PoolingShortcut(nn.Module):
    """ResNet-D: average pooling, then a 1x1 conv with its normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(8, 12, stride=2), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = conv3(12), nn.BatchNorm2d(12)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(
            nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
            nn.Conv2d(8, 12, 1),
            nn.BatchNorm2d(12),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(inner(self, x) + self.downsample(x))


class ZeroPaddedShortcut(nn.Module):
    """Option A: the shortcut takes every second pixel and gets channels of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(8, 12, stride=2), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = conv3(12), nn.BatchNorm2d(12)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(inner(self, x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))


class PreActivation(nn.Module):
    """BN-ReLU-conv twice; the shortcut may start after the first ReLU."""

    def __init__(self, inputs: int = 8, outputs: int = 8, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3(inputs, outputs, stride=stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv3(outputs)
        self.project = (
            nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        shortcut = x if self.project is None else self.project(y)
        y = self.conv1(y)
        y = self.conv2(F.relu(self.bn2(y)))
        return y + shortcut


class SqueezeExcite(nn.Module):
    """A gate between the last normalisation and the sum: the first run still fuses, the last one
    without sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(24), nn.BatchNorm2d(24)
        self.conv2, self.bn2 = conv3(24), nn.BatchNorm2d(24)
        self.relu = nn.ReLU(inplace=True)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(24, 20, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(20, 24, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = inner(self, x)
        return self.relu(y * self.gate(y) + x)


class DenseLayers(nn.Module):
    """DenseNet-like: pre-activation layers that read the concatenation of everything before."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(8), conv3(8, 4)
        self.bn2, self.conv2 = nn.BatchNorm2d(12), conv3(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.conv1(F.relu(self.bn1(x)))], 1)
        return torch.cat([x, self.conv2(F.relu(self.bn2(x)))], 1)


class Vgg(nn.Module):
    """Plain runs in one Sequential, flattened by `.view`, which needs a contiguous tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
        )
        self.pool = nn.AdaptiveAvgPool2d(3)
        self.classifier = nn.Linear(16 * 9, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.features(x)).contiguous()
        return self.classifier(x.view(x.size(0), -1))


class ViewAfterRun(nn.Module):
    """`.view` straight on a run's output: works for a contiguous input only, fused or not."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv3(8), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x.contiguous())
        return x.view(x.size(0), -1)


class StemReadTwice(nn.Module):
    """A stem whose activation is read beside its pool as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = conv3(3, 8), nn.BatchNorm2d(8), nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.pool(y) + y[:, :, ::2, ::2]


class Fork(nn.Module):
    """Two blocks that read the same value, one behind the other in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = conv3(8), nn.BatchNorm2d(8), nn.ReLU()
        self.a, self.b = BiasedBlock(8), BiasedBlock(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        left = self.a(y)
        return left - self.b(y)


class SharedRelu(nn.Module):
    """One ReLU instance for two blocks."""

    def __init__(self) -> None:
        super().__init__()
        relu = nn.ReLU(inplace=True)
        self.a, self.b = BiasedBlock(8), BiasedBlock(8)
        self.a.relu = self.b.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class SharedConv(nn.Module):
    """One conv module under two names, with a normalisation of its own at each place."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(conv3(8), nn.BatchNorm2d(8), nn.ReLU())
        self.b = nn.Sequential(self.a[0], nn.BatchNorm2d(8), nn.ReLU())
        self.c = nn.Sequential(conv3(8), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


class SharedBlock(nn.Module):
    """One whole block called twice: its statistics are updated twice a step."""

    def __init__(self) -> None:
        super().__init__()
        self.block = BiasedBlock(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


class ConvOfTwoBlocks(nn.Module):
    """One convolution in two blocks, each of which calls it once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = BiasedBlock(8), BiasedBlock(8)
        self.b.conv1 = self.a.conv1

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class TiedWeights(nn.Module):
    """Two convs, one weight Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(conv3(8), nn.BatchNorm2d(8), nn.ReLU())
        self.b = nn.Sequential(conv3(8), nn.BatchNorm2d(8), nn.ReLU())
        self.b[0].weight = self.a[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class HalvingConv(nn.Conv2d):
    """A conv with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 0.5


class PlainSubclass(nn.Conv2d):
    """A conv with another name and nothing else of its own."""


class HalvingNorm(nn.BatchNorm2d):
    """A normalisation with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 0.5


class SteepRelu(nn.ReLU):
    """An activation with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


class Nested(nn.Module):
    """A conv whose normalisation and activation live in other modules, which nothing but the root
    sees together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleDict({"conv": conv3(8)})
        self.right = nn.ModuleList([nn.BatchNorm2d(8), nn.ReLU()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.left["conv"](x)
        for module in self.right:
            x = module(x)
        return x


class UntouchedKinds(nn.Module):
    """Transposed and one-dimensional convolutions, with 2-d and 1-d normalisations after them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.line = nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.line(self.up(x).flatten(2))


class Mixed(nn.Module):
    """A block that cannot be traced between two that can."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = BiasedBlock(8), Written(data_dependent), BiasedBlock(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


def remember(module: nn.Module, args: Any, output: Tensor) -> None:
    """A forward hook that leaves what it saw on the module."""
    module.seen = output.detach().clone()


def with_hook(model: nn.Module, name: str) -> nn.Module:
    model.get_submodule(name).register_forward_hook(remember)
    return model


def seen(name: str) -> Callable[[nn.Module], Tensor]:
    return lambda model: model.get_submodule(name).seen


def hooked_before(name: str) -> nn.Module:
    """A block whose module `name` gets doubled inputs from a forward-pre hook."""
    model = BiasedBlock(8)
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))
    return model


def instance_forward() -> nn.Module:
    """A conv whose forward is replaced on the instance, as some quantisation tools do."""
    model = BiasedBlock(8)

    def doubled(self: nn.Conv2d, input: Tensor) -> Tensor:
        return 2.0 * F.conv2d(input, self.weight, self.bias, padding=1)

    model.conv1.forward = MethodType(doubled, model.conv1)  # type: ignore[method-assign]
    return model


def parametrized() -> nn.Module:
    model = BiasedBlock(8)
    parametrizations.weight_norm(model.conv1)
    return model


def spectral() -> nn.Module:
    model = BiasedBlock(8)
    nn.utils.spectral_norm(model.conv1)  # the old kind: a hook, and `weight` is no Parameter
    return model


def written(how: Callable[[Any, Tensor], Any], **entry: Any) -> ZooEntry:
    """A ZooEntry for a spelling of the basic block; both runs fuse with the sum in the second
    unless told.
    """
    return ZooEntry(
        lambda: Written(how),
        **{"fused": {"conv1": "conv-bn-relu", "conv2": "conv-bn-add-relu"}, **entry},
    )


def chain(
    make: Callable[[], nn.Module], pattern: str | None = "conv-bn-relu", **entry: Any
) -> ZooEntry:
    """A ZooEntry for one run whose first module is conv1; `pattern` None: must not be fused."""
    if pattern is None:
        return ZooEntry(make, **{"never": ("conv1",), **entry})
    return ZooEntry(make, **{"fused": {"conv1": pattern}, **entry})


BASIC = {"conv1": "conv-bn-relu", "conv2": "conv-bn-add-relu"}


def under(prefix: str, patterns: dict[str, str]) -> dict[str, str]:
    return {f"{prefix}.{name}": pattern for name, pattern in patterns.items()}


ACTS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(),
    "relu6": lambda: nn.ReLU6(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.2, inplace=True),
    "silu": lambda: nn.SiLU(),
    "hardswish": lambda: nn.Hardswish(),
    "gelu": lambda: nn.GELU(),
}

ZOO: dict[str, ZooEntry] = {
    # spellings
    "biased_block": ZooEntry(lambda: BiasedBlock(8), fused=BASIC),
    "add_in_place": written(add_in_place),
    "add_method_in_place": written(add_method_in_place),
    "add_torch": written(add_torch),
    "add_left": written(add_left),
    "add_right": written(add_right),
    "add_method": written(add_method),
    "functional_relu_in_place": written(functional_relu_in_place),
    "method_relu_in_place": written(method_relu_in_place),
    "linear_sum": written(linear_sum, fused={"conv1": "conv-bn-relu", "conv2": "conv-bn-add"}),
    "relu_before_add": written(
        relu_before_add, fused={"conv1": "conv-bn-relu", "conv2": "conv-bn-relu"}
    ),
    "scaled_add": written(scaled_add, fused={"conv1": "conv-bn-relu", "conv2": "conv-bn"}),
    "add_number": written(add_number, fused={"conv1": "conv-bn-relu", "conv2": "conv-bn"}),
    "add_broadcast": written(add_broadcast, fused={"conv1": "conv-bn-relu"}),
    "add_itself": written(add_itself, fused={"conv1": "conv-bn-relu", "conv2": "conv-bn"}),
    "add_two_runs": written(add_two_runs, fused={}),
    "leaky_function": written(
        leaky_function, fused={"conv1": "conv-bn-relu", "conv2": "conv-bn-add-leaky_relu"}
    ),
    "sum_of_two_dtypes": written(sum_of_two_dtypes),
    "inner_value_read_outside": written(
        inner_value_read_outside, fused={"conv1": "conv-bn-relu", "conv2": "conv-bn-relu"}
    ),
    "sum_read_twice": written(sum_read_twice, fused={"conv1": "conv-bn-relu"}),
    "reversed_order": written(
        reversed_order, fused={"conv1": "conv-bn-relu", "conv2": "conv-bn-relu"}
    ),
    "unused_conv": written(unused_conv, fused={"conv1": "conv-bn-relu"}, never=("conv2",)),
    # dangerous spellings
    "conv_read_twice": written(
        conv_read_twice, fused={}, never=("conv1",), skipped={"conv1": "read"}
    ),
    "bn_read_twice": written(bn_read_twice, fused={}),
    "in_place_relu_seen_by_other": written(in_place_relu_seen_by_other, fused={}),
    "in_place_on_the_input": written(in_place_on_the_input, fused={}, trainable=False),
    "in_place_relu_on_the_input": written(in_place_relu_on_the_input, fused={}),
    "shortcut_changed_after": written(shortcut_changed_after, fused={}),
    "shortcut_changed_in_between": written(shortcut_changed_in_between, fused={}),
    "shortcut_changed_before": written(shortcut_changed_before, fused={}),
    "conv_input_changed_after": written(conv_input_changed_after, fused={}, trainable=False),
    "conv_used_twice": written(
        conv_used_twice, fused={}, never=("conv1", "bn1"), skipped={"conv1": "."}
    ),
    "bn_used_twice": written(bn_used_twice, fused={}, never=("bn1",)),
    "weight_read_elsewhere": written(weight_read_elsewhere, fused={}),
    "under_no_grad": written(under_no_grad, fused={}),
    "detached": written(detached, fused={"conv1": "conv-bn-relu"}),
    "cast_between": written(cast_between, fused={}, never=("conv1",)),
    # control flow and side effects
    "asks_for_training": written(asks_for_training, fused={}),
    "stores_an_attribute": written(stores_an_attribute, fused={}, observe=lambda m: m.last),
    "counts_its_calls": written(
        counts_its_calls, fused={}, observe=lambda m: torch.tensor(m.calls)
    ),
    "dropout_between": written(dropout_between, fused={}),
    "drop_path": written(drop_path, fused={}),
    "scaled_by_a_draw": written(
        scaled_by_a_draw, fused={}, never=("conv1", "conv2"), skipped={"conv1": "random"}
    ),
    "data_dependent": written(
        data_dependent, fused={}, never=("conv1", "conv2"), skipped={"conv1": "."}
    ),
    "mixed": ZooEntry(
        Mixed,
        fused=under("a", BASIC) | under("c", BASIC),
        never=("b.conv1", "b.conv2"),
        skipped={"b.conv1": "."},
    ),
    "optional_arguments": ZooEntry(Caller),
    "keyword_arguments": ZooEntry(OptionalArguments, kwargs={"activate": False}),
    "two_streams": ZooEntry(
        TwoStreams, inputs=((2, 8, 5, 4), (2, 6, 9, 7)), fused={"conv1": "conv-bn-relu"}
    ),
    # activations and normalisations
    **{
        f"act_{name}": chain(
            lambda make=make: Chain(conv3(8), nn.BatchNorm2d(8), make()), f"conv-bn-{name}"
        )
        for name, make in ACTS.items()
    },
    "act_tanh": chain(lambda: Chain(conv3(8), nn.BatchNorm2d(8), nn.Tanh()), "conv-bn"),
    "act_gelu_tanh": chain(lambda: Chain(conv3(8), nn.BatchNorm2d(8), nn.GELU("tanh")), "conv-bn"),
    "act_hardtanh": chain(lambda: Chain(conv3(8), nn.BatchNorm2d(8), nn.Hardtanh()), "conv-bn"),
    "act_hardtanh_6": chain(
        lambda: Chain(conv3(8), nn.BatchNorm2d(8), nn.Hardtanh(0.0, 6.0)), "conv-bn-relu6"
    ),
    "act_leaky_negative": chain(
        lambda: Chain(conv3(8), nn.BatchNorm2d(8), nn.LeakyReLU(-0.1)), "conv-bn"
    ),
    "no_act": chain(lambda: Chain(conv3(8), nn.BatchNorm2d(8)), "conv-bn"),
    "no_affine": chain(lambda: Chain(conv3(8), nn.BatchNorm2d(8, affine=False), nn.ReLU())),
    "no_statistics": ZooEntry(
        lambda: Chain(conv3(8), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU())
    ),
    "cumulative": chain(lambda: Chain(conv3(8), nn.BatchNorm2d(8, momentum=None), nn.ReLU())),
    "momentum_0.9": chain(
        lambda: Chain(conv3(8), nn.BatchNorm2d(8, momentum=0.9, eps=0.1), nn.ReLU())
    ),
    "frozen_statistics": chain(lambda: FrozenNorm(conv3(8), nn.BatchNorm2d(8), nn.ReLU())),
    # convolutions
    "stride_2": chain(lambda: Chain(conv3(8, 5, stride=2), nn.BatchNorm2d(5), nn.ReLU())),
    "stem_7x7": chain(
        lambda: Chain(nn.Conv2d(3, 12, 7, 2, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        inputs=((2, 3, 19, 17),),
    ),
    "unequal": chain(
        lambda: Chain(nn.Conv2d(8, 6, (3, 1), (1, 2), (1, 0), (2, 1)), nn.BatchNorm2d(6), nn.ReLU())
    ),
    "pointwise": chain(lambda: Chain(nn.Conv2d(8, 20, 1), nn.BatchNorm2d(20), nn.ReLU())),
    "grouped": chain(lambda: Chain(conv3(8, groups=2), nn.BatchNorm2d(8), nn.ReLU())),
    "depthwise": chain(
        lambda: Chain(conv3(8, 16, groups=8), nn.BatchNorm2d(16), nn.ReLU6()), "conv-bn-relu6"
    ),
    "dilated": chain(lambda: Chain(conv3(8, dilation=2, padding=2), nn.BatchNorm2d(8), nn.ReLU())),
    "padding_same": ZooEntry(lambda: Chain(conv3(8, padding="same"), nn.BatchNorm2d(8), nn.ReLU())),
    "padding_same_even": ZooEntry(
        lambda: Chain(nn.Conv2d(8, 8, 4, padding="same"), nn.BatchNorm2d(8), nn.ReLU())
    ),
    "padding_valid": ZooEntry(
        lambda: Chain(conv3(8, padding="valid"), nn.BatchNorm2d(8), nn.ReLU())
    ),
    "padding_reflect": chain(
        lambda: Chain(conv3(8, padding_mode="reflect"), nn.BatchNorm2d(8), nn.ReLU()),
        None,
        skipped={"conv1": "padding"},
    ),
    "other_kinds": ZooEntry(UntouchedKinds, never=("up.0", "line.0", "line.1")),
    # blocks
    "sequential_block": ZooEntry(
        lambda: SequentialBlock(8, 8, 1),
        fused={"conv1.0": "conv-bn-relu", "conv2.0": "conv-bn-add-relu"},
    ),
    "sequential_bottleneck": ZooEntry(
        lambda: SequentialBlock(8, 4, 2, unit(8, 16, 1, 2, act=False), bottleneck=True),
        fused={
            "conv1.0": "conv-bn-relu",
            "conv2.0": "conv-bn-relu",
            "conv3.0": "conv-bn(-add-relu)?",
            "downsample.0": "conv-bn(-add-relu)?",
        },
    ),
    "projection_without_norm": ZooEntry(lambda: ProjectionWithoutNorm(8, 12, True, 2), fused=BASIC),
    "no_projection": ZooEntry(lambda: ProjectionWithoutNorm(8, 8, False), fused=BASIC),
    # two runs meet in the sum: either may take it
    "pooling_shortcut": ZooEntry(
        PoolingShortcut,
        fused={
            "conv1": "conv-bn-relu",
            "conv2": "conv-bn(-add-relu)?",
            "downsample.1": "conv-bn(-add-relu)?",
        },
    ),
    "zero_padded_shortcut": ZooEntry(ZeroPaddedShortcut, fused=BASIC),
    "pre_activation": ZooEntry(PreActivation, fused={"bn1": "bn-relu"}),
    "pre_activation_projection": ZooEntry(lambda: PreActivation(8, 12, 2)),
    "squeeze_excite": ZooEntry(
        SqueezeExcite, inputs=((3, 24, 9, 7),), fused={"conv1": "conv-bn-relu", "conv2": "conv-bn"}
    ),
    "dense_layers": ZooEntry(DenseLayers, fused={"bn1": "bn-relu", "bn2": "bn-relu"}),
    "vgg": ZooEntry(
        Vgg,
        inputs=((2, 3, 12, 12),),
        fused={"features.0": "conv-bn-relu", "features.4": "conv-bn-relu"},
    ),
    "view_after_run": ZooEntry(ViewAfterRun, fused={"features.0": "conv-bn-relu"}),
    "nested": ZooEntry(Nested),
    "stem_read_twice": ZooEntry(
        StemReadTwice, inputs=((2, 3, 12, 10),), fused={"conv1": "conv-bn-relu"}
    ),
    "fork": ZooEntry(Fork, fused={"conv1": "conv-bn-relu"} | under("a", BASIC) | under("b", BASIC)),
    # sharing, subclasses, hooks, parametrizations
    "shared_relu": ZooEntry(SharedRelu, fused=under("a", BASIC) | under("b", BASIC)),
    "shared_block": ZooEntry(SharedBlock),
    "shared_conv": ZooEntry(
        SharedConv,
        fused={"c.0": "conv-bn-relu"},
        never=("a.0", "b.0"),
        skipped={"a.0": "shared|several|used|tied"},
    ),
    "conv_of_two_blocks": ZooEntry(
        ConvOfTwoBlocks,
        fused={"a.conv2": "conv-bn-add-relu", "b.conv2": "conv-bn-add-relu"},
        never=("a.conv1", "b.conv1"),
        skipped={"a.conv1": "several"},
    ),
    "tied_weights": ZooEntry(
        TiedWeights, never=("a.0", "b.0"), skipped={"a.0": "shares|shared|tied"}
    ),
    "conv_subclass": chain(
        lambda: Chain(HalvingConv(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        None,
        skipped={"conv1": "subclass|forward"},
    ),
    "plain_subclass": ZooEntry(lambda: Chain(PlainSubclass(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())),
    "norm_subclass": ZooEntry(lambda: Chain(conv3(8), HalvingNorm(8), nn.ReLU()), never=("bn1",)),
    "act_subclass": chain(lambda: Chain(conv3(8), nn.BatchNorm2d(8), SteepRelu()), "conv-bn"),
    "hook_on_conv": ZooEntry(
        lambda: with_hook(BiasedBlock(8), "conv1"),
        fused={"conv2": "conv-bn-add-relu"},
        never=("conv1",),
        skipped={"conv1": "hook"},
        observe=seen("conv1"),
    ),
    "hook_on_bn": ZooEntry(
        lambda: with_hook(BiasedBlock(8), "bn1"),
        fused={"conv2": "conv-bn-add-relu"},
        never=("bn1",),
        observe=seen("bn1"),
    ),
    "hook_on_relu": ZooEntry(lambda: with_hook(BiasedBlock(8), "relu"), observe=seen("relu")),
    "hook_on_sequential": ZooEntry(
        lambda: with_hook(SequentialBlock(8, 8, 1), "conv2"),
        fused={"conv1.0": "conv-bn-relu", "conv2.0": "conv-bn"},
        observe=seen("conv2"),
    ),
    "hook_on_block": ZooEntry(
        lambda: with_hook(SharedRelu(), "a"), fused=under("b", BASIC), observe=seen("a")
    ),
    "pre_hook_on_conv": ZooEntry(
        lambda: hooked_before("conv2"),
        fused={"conv1": "conv-bn-relu"},
        never=("conv2",),
        skipped={"conv2": "hook"},
    ),
    "instance_forward": ZooEntry(
        instance_forward, fused={"conv2": "conv-bn-add-relu"}, never=("conv1",)
    ),
    "parametrized": ZooEntry(
        parametrized,
        fused={"conv2": "conv-bn-add-relu"},
        never=("conv1",),
        skipped={"conv1": "parametri"},
    ),
    "spectral_norm": ZooEntry(spectral, fused={"conv2": "conv-bn-add-relu"}, never=("conv1",)),
}


def network(layers: list[int], size: int = 64, **options: Any) -> ZooEntry:
    return ZooEntry(lambda: SequentialResNet(layers, **options), inputs=((2, 3, size, size),))


# The deep ones are narrow, so that the suite stays quick; depth and structure are what they are
# for.
NETWORKS: dict[str, ZooEntry] = {
    "resnet14": network([1, 1, 1, 1], bottleneck=True, width=16),
    "resnet18": network([2, 2, 2, 2]),
    "resnet34": network([3, 4, 6, 3], width=16),
    "resnet50": network([3, 4, 6, 3], bottleneck=True, width=32),
    "resnet101": network([3, 4, 23, 3], bottleneck=True, width=8),
    "resnet152": network([3, 8, 36, 3], bottleneck=True, width=8),
    "resnet50_swapped": network([3, 4, 6, 3], bottleneck=True, swapped=True, width=32),
    "resnet101_swapped": network([3, 4, 23, 3], bottleneck=True, swapped=True, width=16),
    "resnet152_swapped": network([3, 8, 36, 3], bottleneck=True, swapped=True, width=16),
}
