"""Nothing is lost: fused training is unfused training, optimizer and checkpoints included, and an
exception anywhere inside fuse() leaves the model as it was.
"""

from __future__ import annotations

import builtins
import copy
import io
import linecache
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from weakref import WeakValueDictionary

import block_zoo
import pytest
import torch
from block_zoo import SequentialBlock, unit
from tolerance import assert_mean_parity
from torch import Tensor, nn
from train_case import smooth

import resnet_fused
from resnet_fused import fuse, unfuse
from resnet_fused.graph import rewrite
from resnet_fused.models.blocks import BasicBlock, Bottleneck, conv1x1

# --- training, fused and unfused in turn --------------------


def convolutional(*blocks: nn.Module) -> nn.Module:
    """Without biases before a batch norm: of those nothing but rounding is ever updated."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), *blocks)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = None
    return smooth(block_zoo.randomise(model))  # no kink, where rounding decides


def projection(outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(conv1x1(8, outputs, stride=stride), nn.BatchNorm2d(outputs))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: convolutional(
        BasicBlock(8, 8), BasicBlock(8, 12, stride=2, downsample=projection(12, 2))
    ),
    "bottleneck": lambda: convolutional(
        Bottleneck(8, 4, downsample=projection(16, 1)), Bottleneck(16, 4)
    ),
    "sequential": lambda: convolutional(unit(8, 8, 3), SequentialBlock(8, 8, 1)),
    "pre-activation": lambda: convolutional(
        block_zoo.PreActivation(8, 8), block_zoo.PreActivation(8, 12, 2)
    ),
}

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda parameters: torch.optim.SGD(
        parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-3
    ),
    # Where a gradient is nearly 0 Adam's step is the sign of its rounding, with a smaller eps.
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3, eps=1e-2),
}

STEPS = 2  # of each half of a training


def saved_and_loaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def described(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad


def trained(
    network: str, optimizer: str, halves: tuple[bool, bool], dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    """State of model and optimizer after two halves of a training, each fused or not, with a
    checkpoint between them.
    """
    checkpoint: Any = None
    for half, fused in enumerate(halves):
        torch.manual_seed(seed)
        plain = NETWORKS[network]().to(dtype).train()
        plain[0].weight.requires_grad_(seed % 2 == 0)
        model = fuse(plain) if fused else plain
        updates = OPTIMIZERS[optimizer](model.parameters())
        if checkpoint is not None:
            model.load_state_dict(checkpoint["model"], strict=True)
            updates.load_state_dict(checkpoint["optimizer"])
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(100 * seed + 10 * half + step)
            x = torch.randn(4, 3, 9, 7, generator=generator).to(dtype)
            updates.zero_grad()
            model(x).pow(2).mean().backward()
            updates.step()
        model = unfuse(model, inplace=True)
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        checkpoint = saved_and_loaded(
            {"model": model.state_dict(), "optimizer": updates.state_dict()}
        )
    found = {f"model {k}": v for k, v in checkpoint["model"].items()}
    for number, values in checkpoint["optimizer"]["state"].items():
        found |= {f"optimizer {number} {k}": v for k, v in values.items()}
    kinds = [described(t) for t in (*model.parameters(), *model.buffers())]
    return {"tensors": found, "kinds": kinds, "groups": checkpoint["optimizer"]["param_groups"]}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_fused_training_is_unfused_training(network: str, optimizer: str) -> None:
    """In each order of fused and unfused halves the same names, and values within the budget."""
    seeds = range(8)

    def runs(halves: tuple[bool, bool], dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
        return [trained(network, optimizer, halves, dtype, seed) for seed in seeds]

    eager, exact = runs((False, False)), runs((False, False), torch.float64)
    for halves in ((True, True), (True, False), (False, True)):
        ours = runs(halves)
        for mine, theirs in zip(ours, eager, strict=True):
            assert list(mine["tensors"]) == list(theirs["tensors"])
            assert mine["kinds"] == theirs["kinds"]
            assert mine["groups"] == theirs["groups"]
        # What is frozen with some seeds has an optimizer's state with the others only.
        for name in ours[0]["tensors"].keys() & ours[1]["tensors"].keys():
            draws = [
                [run["tensors"][name] for run in draw]
                for draw in zip(ours, eager, exact, strict=True)
            ]
            assert_mean_parity(draws, what=f"{name}, fused {halves}")


# --- an exception anywhere inside fuse() --------------------

GRAPH = str(Path(resnet_fused.__file__).parent / "graph")


class Injected(Exception):
    pass


def snapshot(model: nn.Module) -> list[Any]:
    """All that makes up each module: its class, attributes, tables, and its tensors' state."""
    found: list[Any] = []
    for name, module in model.named_modules():
        own = {
            key: (id(value), [(k, id(v)) for k, v in value.items()])
            if isinstance(value, dict)
            else id(value)
            for key, value in vars(module).items()
        }
        tensors = [
            (id(t), t.data_ptr(), t._version, t.requires_grad, t.grad)
            for t in (*module._parameters.values(), *module._buffers.values())
            if t is not None
        ]
        found.append((name, type(module), own, tensors))
    return found


def of_the_process() -> list[Any]:
    """What fuse() changes for a while, elsewhere than in the model."""
    return [
        builtins.isinstance, nn.Module.__call__, nn.Module.__getattr__, torch.is_grad_enabled(),
        torch.get_rng_state().tolist(), random.getstate(),
    ]  # fmt: skip


def victim() -> nn.Module:
    """Modules of three kinds that get plans, one below the other, hooks and a tied parameter."""
    torch.manual_seed(4)
    inner = nn.Sequential(BasicBlock(8, 8), SequentialBlock(8, 8, 1))
    model = nn.Sequential(
        unit(3, 8, 3), inner, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(8, 2)
    )
    inner[0].register_forward_hook(block_zoo.remember)
    inner[1].conv1[0].bias = inner[1].conv2[0].bias
    return model.eval()


Point = tuple[CodeType, int, int]  # where, which line of it (0: its start), the how many-th time


class Watch:
    """Sees every call of the graph's functions and every line of the one that changes models."""

    def __init__(self, stop_at: Point | None = None) -> None:
        self.stop_at = stop_at
        self.seen: dict[tuple[CodeType, int], int] = {}
        self.hit = False

    def _at(self, code: CodeType, line: int) -> None:
        place = code, line
        self.seen[place] = self.seen.get(place, 0) + 1
        if self.stop_at == (*place, self.seen[place]):
            self.hit = True
            raise Injected(f"{code.co_name}, line {line}")

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(GRAPH) or frame.f_code.co_name == "<genexpr>":
            return None  # what a generator raises when it is closed is lost
        self._at(frame.f_code, 0)
        changes = file.endswith("rewrite.py") and frame.f_code.co_name != "remove"
        return self._line if changes else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self._at(frame.f_code, frame.f_lineno)
        return self._line

    def run(self, model: nn.Module) -> bool:
        """Fuse it in place; whether that raised.

        Without the fused classes that earlier runs made: those are dropped whenever garbage is
        collected, and each run must pass the same lines.
        """
        before = sys.gettrace()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rewrite, "_classes", WeakValueDictionary())
            sys.settrace(self._call)
            try:
                fuse(model, inplace=True)
            except Injected:
                return True
            finally:
                sys.settrace(before)
        return False


def points() -> Iterator[Point]:
    """Each function at one of its calls, each line of those that change models twice.

    Not where a with-block ends, which a trace sees as its line once more, nor at a bare ``try:``:
    there nothing but a trace can raise, and CPython's tables of handlers have a hole.
    """
    watch, source = Watch(), random.Random(6)
    watch.run(victim())
    for (code, line), times in watch.seen.items():
        text = linecache.getline(code.co_filename, line).strip() if line else ""
        if text == "try:":
            continue
        last = 1 if text.startswith("with ") else times
        for time in sorted({1, last}) if line else [source.randint(1, times)]:
            yield code, line, time


def test_an_exception_anywhere_leaves_the_model_as_it_was() -> None:
    model = victim()
    before, process = snapshot(model), of_the_process()
    raised = 0
    every = list(points())
    assert len({code for code, _, _ in every}) > 90
    for point in every:
        watch = Watch(point)
        where = f"{point[0].co_filename} {point[0].co_name} {point[1:]}"
        if watch.run(model):
            raised += 1
        else:  # what a trace meets means that this module cannot be fused
            unfuse(model, inplace=True)
        assert watch.hit, where
        assert snapshot(model) == before, where
        assert of_the_process() == process, where
    assert raised > 100
    x = torch.randn(2, 3, 9, 7)
    with torch.no_grad():
        torch.testing.assert_close(fuse(model, inplace=True)(x), unfuse(copy.deepcopy(model))(x))
