"""A process that lives long: nothing grows over thousands of calls, steps and fused models.

What is looked at after each round: resident memory, Python's own blocks, objects that the garbage
collector follows, open files, threads, and what the library keeps in tables of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import linecache
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from block_zoo import PreActivation, randomise
from torch import Tensor, nn

from resnet_fused import fuse, unfuse
from resnet_fused.backends import native, native_conv
from resnet_fused.backends.native_conv import NativeConv, Program, Wired, pack
from resnet_fused.graph import rewrite
from resnet_fused.models.blocks import BasicBlock, Bottleneck, conv1x1
from resnet_fused.ops import train_conv

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")

LIBC = ctypes.CDLL(None)
ROUNDS = 5
WARM_UP = 2  # rounds: caches fill up, allocators take what they need


def resident() -> int:
    """Bytes of the process in memory, without what the allocators could give back."""
    if native.available:
        torch.ops.resnet_fused._pool_release()
    LIBC.malloc_trim(0)
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class State:
    """What a process holds."""

    resident: int
    blocks: int
    objects: int
    files: int
    threads: int
    sources: int
    classes: int

    @staticmethod
    def now() -> State:
        """After everything that can be given back has been."""
        for _ in range(2):  # what dies in one collection may hold what dies in the next
            gc.collect()
        return State(
            resident(), sys.getallocatedblocks(), len(gc.get_objects()),
            len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")),
            len(linecache.cache), len(rewrite._classes),
        )  # fmt: skip


MOST = State(
    # Free memory between pieces that live: glibc cannot give back a page in part. That comes to a
    # tenth; 4 KB a training step, 1 KB an inference call would be more.
    resident=1 << 20,
    # Numbers that happen to be alive: what is kept knows its tensors' versions, which are objects
    # from 257 on. One for each call would be 1400, for each training step four 860.
    blocks=800, objects=60,
    files=0, threads=0, sources=0, classes=0,
)  # fmt: skip
"""What may be there more after the last round than after the warm-up."""


def growth(work: Callable[[], None]) -> dict[str, int]:
    """What grows by more than it may, over some rounds of `work`."""
    states = []
    for _ in range(WARM_UP + ROUNDS):
        work()
        states.append(State.now())
    before, after = states[WARM_UP - 1], states[-1]
    change = {f.name: getattr(after, f.name) - getattr(before, f.name) for f in fields(State)}
    return {name: value for name, value in change.items() if value > getattr(MOST, name)}


def network() -> nn.Module:
    """A stem with its pool, blocks of three kinds, and a head."""
    torch.manual_seed(1)
    down = nn.Sequential(conv1x1(16, 32, stride=2), nn.BatchNorm2d(32))
    model = nn.Sequential(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)
        ),
        BasicBlock(16, 16),
        BasicBlock(16, 32, stride=2, downsample=down),
        PreActivation(32, 32),
        Bottleneck(32, 8),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(32, 10)),
    )
    return randomise(model)


class Inputs:
    """Images of changing sizes, batches, dtypes and layouts, the same sequence for a seed."""

    def __init__(self, seed: int = 0) -> None:
        self.source = random.Random(seed)

    def __call__(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """More shapes than a convolution remembers."""
        size = self.source.choice([8, 9, 12, 15, 16]), self.source.choice([8, 11, 16])
        x = torch.randn(self.source.randint(1, 4), 3, *size).to(dtype)
        if self.source.random() < 0.7:
            return x.to(memory_format=torch.channels_last)
        return x


def infer(models: dict[torch.dtype, nn.Module], count: int) -> None:
    """Calls of fused models, which sometimes train, or are given other weights, between them."""
    source, inputs = random.Random(1), Inputs()
    for i in range(count):
        dtype, model = source.choice(list(models.items()))
        with source.choice([torch.no_grad, torch.inference_mode])():
            model(inputs(dtype))
        if i % 40 == 13:
            model.train()(inputs(dtype).repeat(2, 1, 1, 1))
            model.eval()
        if i % 40 == 29:
            state = model.state_dict()
            model.load_state_dict({k: v.clone() for k, v in state.items()}, assign=i % 80 == 29)


def test_inference() -> None:
    plain = network().eval()
    models = {
        dtype: fuse(plain).to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert not growth(lambda: infer(models, 2000 // (WARM_UP + ROUNDS) + 1))


def test_training() -> None:
    models = [
        fuse(network().train().to(memory_format=torch.channels_last), memory=memory)  # type: ignore[call-overload]
        for memory in ("default", "low")
    ]
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in models]

    def train() -> None:
        inputs, source = Inputs(), random.Random(2)
        for i in range(300 // (WARM_UP + ROUNDS) + 1):
            model, optimizer = models[i % 2], optimizers[i % 2]
            optimizer.zero_grad(set_to_none=source.random() < 0.5)
            with torch.autocast("cpu", torch.bfloat16, enabled=source.random() < 0.3):
                loss = model(inputs().repeat(2, 1, 1, 1)).float().square().sum()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if i % 10 == 3:
                with torch.no_grad():
                    model.eval()(inputs())
                model.train()
            if i % 10 == 7:  # a step that is given up in the middle
                with contextlib.suppress(RuntimeError):
                    model(inputs()[:, :2])
                model(inputs().repeat(2, 1, 1, 1))

    assert not growth(train)


def test_models_that_come_and_go() -> None:
    """200 of them, fused, used, copied, some taken apart again; each with a class of its own."""

    def come_and_go() -> None:
        inputs = Inputs()
        for i in range(200 // (WARM_UP + ROUNDS) + 1):
            kind: Any = type(f"Block{i}", (BasicBlock,), {})
            model = fuse(nn.Sequential(nn.Conv2d(3, 16, 1), kind(16, 16)), inplace=i % 2 == 0)
            model.train(i % 3 == 0)(inputs().repeat(2, 1, 1, 1)).sum().backward()
            with torch.no_grad():
                model.eval()(inputs())
            if i % 3 == 1:
                unfuse(model, inplace=True)
            if i % 3 == 2:
                unfuse(fuse(unfuse(model)))

    assert not growth(come_and_go)


def test_what_is_kept_is_bounded() -> None:
    """Tables by shape, however many shapes there are."""
    model = fuse(network().eval().to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    with torch.no_grad():
        for height in range(8, 48):
            model(torch.randn(2, 3, height, 9).to(memory_format=torch.channels_last))
    folds = [o for o in gc.get_objects() if type(o).__name__ == "Folded" and hasattr(o, "prepared")]
    assert folds
    assert all(len(f.prepared) <= 8 and len(f.packed) <= 7 for f in folds)
    assert train_conv.choose_for.cache_info().maxsize == 4096


# --- one operator at a time --------------------


def operators() -> dict[str, Callable[[], object]]:
    """Those that a network calls, with everything that PyTorch may forget to free among their
    arguments: strings, lists, optional tensors.
    """
    ops = torch.ops.resnet_fused
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    w = torch.randn(16, 16, 3, 3)
    v = [torch.rand(16) + 0.5 for _ in range(4)]
    act: tuple[Any, ...] = (1e-5, "leaky_relu", 0.1)
    window, ones = [2, 2, 2, 2, 0, 0, 1, 1], [1] * 6
    program = Program(
        [(NativeConv("direct", pack(w, v[0], 1, 1, "direct"), w, *v[:2], (*ones, 1), ()),
          Wired(0, 1, "relu", 0.0))]
    )  # fmt: skip
    block = [[w, *v[:2]], [0, -1, *ones, 6], [1e-5, 0.0], ["relu", "direct", "direct", "gemm"]]
    z, mean, var, output = ops._train_block(x, *block)
    pooled, places = ops._train_pool(x, v, *act, window)
    return {
        "scale_shift_act": lambda: ops.scale_shift_act(x, *v[:2], x, *act[1:]),
        "normalize_act": lambda: ops.normalize_act(x, None, *v, *act),
        "bn_act": lambda: ops.bn_act(x, None, *v[:2], *act),
        "bn_act_backward": lambda: ops.bn_act_backward(x, x, None, None, *v, *act, False),
        "_packed_convs": lambda: program(x, x),
        "_train_conv": lambda: ops._train_conv(x, v, *act, w, None, ones, "winograd4"),
        "_train_conv_backward": lambda: ops._train_conv_backward(
            x, x, v + v[:2], *act, 128, None, [], x, v, *act, w, ones, x, "direct", "gemm"
        ),
        "_train_block": lambda: ops._train_block(x, *block),
        "_train_block_backward": lambda: ops._train_block_backward(
            output, [z], [mean, var], [x], [0], [1, 1], *block
        ),
        "_train_pool": lambda: ops._train_pool(x, v, *act, window),
        "_train_pool_sums": lambda: ops._train_pool_sums(pooled, places, x, v, *act, window),
        "_max_pool2d": lambda: ops._max_pool2d(x, [2, 2], [2, 2], [0, 0], [1, 1]),
        "isa": native.isa,
    }


@pytest.mark.skipif(
    native_conv.unusable(torch.float32) is not None, reason=str(native_conv.unusable(torch.float32))
)
def test_no_operator_keeps_a_byte() -> None:
    """The least that any of them could forget is a string of 32 bytes."""
    calls = 1500
    growths = {}
    for name, call in operators().items():
        found = []
        for _ in range(2):
            for _ in range(calls):
                call()
            found.append(resident())
        growths[name] = (found[1] - found[0]) / calls
    assert max(growths.values()) < 16, growths


# --- guards of this file --------------------


_numbers = itertools.count()
LEAKS: dict[str, tuple[Callable[[list[Any]], object], str]] = {
    "50 KB a call": (lambda kept: kept.append(torch.zeros(12_500).numpy().data), "resident"),
    "one number a call": (lambda kept: kept.append(float(len(kept))), "blocks"),
    "one list a call": (lambda kept: kept.append([]), "objects"),
    "a file a call": (lambda kept: kept.append(os.fdopen(os.dup(0), closefd=True)), "files"),
    "a source a call": (
        lambda kept: linecache.cache.update({f"<{next(_numbers)}>": (0, None, [], "")}),
        "sources",
    ),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_is_noticed(leak: str) -> None:
    add, where = LEAKS[leak]
    model = fuse(network().eval().to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    everything: list[Any] = []

    def work() -> None:
        kept: list[Any] = []
        everything.append(kept)
        for i in range(200):
            if i % 8 == 0:
                infer({torch.float32: model}, 1)
            add(kept)

    try:
        assert where in growth(work)
    finally:
        for name in [n for n in linecache.cache if n.startswith("<") and n[1:-1].isdigit()]:
            del linecache.cache[name]


def test_without_a_leak_nothing_is_noticed() -> None:
    model = fuse(network().eval().to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    assert not growth(lambda: infer({torch.float32: model}, 30))
