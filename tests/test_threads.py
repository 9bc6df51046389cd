"""Threads that share a fused model, and processes that get one.

What is promised: calls beside one another give what they give alone, bit for bit. Beside
load_state_dict, which copies one tensor after the other, a call may see some of both states, as
eager PyTorch's does; whoever keeps the two apart gets one state or the other, and nothing of the
old one is left once loading has ended. The precision policy is the whole process's: a call runs
under one that was in force while it ran, and no later call under another than its own.

`make sanitize-threads` runs these under ThreadSanitizer.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import random
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from thread_case import (
    assert_same_bits,
    cold,
    fused_network,
    infer,
    network,
    picture,
    step,
    together,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import resnet_fused
from resnet_fused import explain, fuse, packing, unfuse
from resnet_fused.backends import native_conv

THREADS = 8
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def two_threads_a_call() -> Iterator[None]:
    """So that every call has an OpenMP worker, and threads change often."""
    torch.set_num_threads(2)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def fused_count(model: nn.Module) -> int:
    return sum(e.status == "fused" for e in explain(model).entries)


def states(dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Two different ones."""
    return [copy.deepcopy(network(seed).to(dtype).state_dict()) for seed in (1, 2)]


def alone(fused: nn.Module, state: dict[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """What a fresh copy with a state gives."""
    model = cold(fused)
    model.load_state_dict(state)
    return [infer(model, x) for x in inputs]


# --- one model, many threads --------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_calls_at_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All find nothing packed: one of them packs, and all get what one alone would."""
    if (why := native_conv.unusable(dtype)) is not None:
        pytest.skip(f"nothing is packed: {why}")
    fused = fused_network(dtype)
    inputs = [picture(i, dtype) for i in range(THREADS)]
    wanted = [infer(cold(fused), x) for x in inputs]
    folds: list[int] = []
    fold = packing._fold
    monkeypatch.setattr(packing, "_fold", lambda *a: folds.append(id(a[0])) or fold(*a))
    model = cold(fused)
    for _ in range(20):
        folds.clear()
        outputs = together(THREADS, lambda i: infer(model, inputs[i]))
        assert all(torch.equal(y, w) for y, w in zip(outputs, wanted, strict=True))
        assert len(folds) == len(set(folds)) > 0, "a convolution was folded twice, or none was"
        for tensor in model.state_dict().values():
            tensor.mul_(1)  # to the same values, which nothing can know that is kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_calls_beside_load_state_dict(dtype: torch.dtype) -> None:
    fused, pair = fused_network(dtype), states(dtype)
    inputs = [picture(i, dtype) for i in range(THREADS)]
    ended = threading.Event()

    def work(i: int) -> bool:
        if i < THREADS:
            calls = 0
            while not ended.is_set() or calls < 2:
                assert infer(fused, inputs[i]).isfinite().all()
                calls += 1
        else:
            try:
                for n in range(8):
                    fused.load_state_dict(pair[n % 2])
            finally:
                ended.set()
        return True

    together(THREADS + 1, work)
    wanted = alone(fused, pair[1], inputs)
    assert all(torch.equal(infer(fused, x), w) for x, w in zip(inputs, wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_calls_kept_apart_from_load_state_dict(dtype: torch.dtype) -> None:
    """Exactly one state's results, every time."""
    fused, pair, rounds = fused_network(dtype), states(dtype), 4
    inputs = [picture(i, dtype) for i in range(THREADS)]
    wanted = [alone(fused, state, inputs) for state in pair]
    turn = threading.Barrier(THREADS + 1)

    def work(i: int) -> list[Tensor]:
        outputs = []
        for n in range(rounds):
            if i == THREADS:
                fused.load_state_dict(pair[n % 2])
            turn.wait(300)
            if i < THREADS:
                outputs.append(infer(fused, inputs[i]))
            turn.wait(300)
        return outputs

    for i, outputs in enumerate(together(THREADS + 1, work)[:THREADS]):
        for n, y in enumerate(outputs):
            assert torch.equal(y, wanted[n % 2][i])


def test_training_of_copies_at_once() -> None:
    models = [copy.deepcopy(fuse(network())) for _ in range(THREADS)]
    state = copy.deepcopy(models[0].state_dict())
    wanted = [step(model, picture(i)) for i, model in enumerate(models)]
    for model in models:
        model.load_state_dict(state)
    for i, found in enumerate(together(THREADS, lambda i: step(models[i], picture(i)))):
        assert_same_bits(found, wanted[i], f"thread {i}")


def test_changing_the_number_of_threads_beside_calls() -> None:
    fused = fused_network()
    inputs = [picture(i) for i in range(THREADS)]
    wanted = [infer(fused, x) for x in inputs]

    def work(i: int) -> bool:
        for n in range(4):
            torch.set_num_threads(1 + (i + n) % 4)
            assert torch.equal(infer(fused, inputs[i]), wanted[i])
        return True

    together(THREADS, work)


# --- the precision policy --------------------


@pytest.mark.skipif(bool(native_conv.unusable(torch.float32)), reason="has one algorithm only")
def test_a_policy_that_changes_beside_calls() -> None:
    """A step runs under the policy of its start, and what it packs is kept for that."""
    block, x = fused_network().layers[0], torch.randn(2, 32, 24, 24)
    x = x.to(memory_format=torch.channels_last)
    wanted = {}
    for policy in ("default", "strict"):
        with resnet_fused.precision(policy):
            wanted[policy] = infer(cold(block), x)
    assert not torch.equal(wanted["default"], wanted["strict"]), "the test would show nothing"
    for _ in range(5):
        model, ended = cold(block), threading.Event()

        def work(i: int, model: nn.Module = model, ended: threading.Event = ended) -> None:
            if i < THREADS:
                for _ in range(3):
                    assert infer(model, x).isfinite().all()
                ended.set()
            while not ended.is_set():
                with resnet_fused.precision("strict"):
                    pass

        together(THREADS + 1, work)
        for policy, expected in wanted.items():
            with resnet_fused.precision(policy):
                assert torch.equal(infer(model, x), expected), f"another policy's, for {policy}"


def test_a_policy_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a thread may do at the worst moment: after the look, before the choice."""
    block = fused_network().layers[0]
    x = torch.randn(2, 32, 24, 24).to(memory_format=torch.channels_last)
    wanted = infer(cold(block), x)
    prepare = packing.Folded._prepare

    def late(self: packing.Folded, *args: Any) -> Any:
        with resnet_fused.precision("strict"):
            return prepare(self, *args)

    monkeypatch.setattr(packing.Folded, "_prepare", late)
    assert torch.equal(infer(cold(block), x), wanted)


# --- fusing beside everything else --------------------


def draw(i: int) -> object:
    """Random numbers from one of the process's generators."""
    return (torch.rand(3), random.random(), numpy.random.rand())[i % 3]


@pytest.mark.parametrize("way", ["fuse", "deepcopy", "pickle", "unfuse"])
def test_fusing_beside_calls_and_random_numbers(way: str) -> None:
    """torch.fx changes nn.Module while it traces, and a forward that draws is not fused."""
    plain = network().eval()
    fused, x = fuse(plain), picture()
    count, wanted, eager = fused_count(fused), infer(fused, x), infer(plain, x)
    stored, ended = pickle.dumps(fused), threading.Event()

    def make() -> nn.Module:
        if way == "fuse":
            return fuse(plain)
        if way == "unfuse":
            return fuse(unfuse(fused))
        return copy.deepcopy(fused) if way == "deepcopy" else pickle.loads(stored)

    def work(i: int) -> bool:
        if i < 2:
            try:
                for _ in range(2):
                    model = make()
                    assert fused_count(model) == count
                    assert torch.equal(infer(model, x), wanted)
            finally:
                ended.set()
        while not ended.is_set():
            assert torch.equal(infer(plain, x), eager)
            assert torch.equal(infer(fused, x), wanted)
            draw(i)
        return True

    together(5, work)


def test_one_model_fused_in_place_by_many() -> None:
    plain, x = network().eval(), picture()
    count, wanted = fused_count(fuse(plain)), infer(fuse(plain), x)
    classes = [type(m) for m in plain.modules()]
    for _ in range(3):
        model = copy.deepcopy(plain)
        together(THREADS, lambda i, model=model: fuse(model, inplace=True))
        assert fused_count(model) == count
        assert torch.equal(infer(model, x), wanted)
        together(THREADS, lambda i, model=model: unfuse(model, inplace=True))
        assert [type(m) for m in model.modules()] == classes


def test_a_forward_that_draws_is_refused_beside_threads_that_draw() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) if random.random() < 2 else x

    state = random.getstate()
    assert fused_count(fuse(Draws())) == 0
    assert random.getstate() == state
    together(3, lambda i: [fused_count(fuse(Draws())), [draw(1) for _ in range(500)]])


# --- other processes --------------------


def answer(model: nn.Module, x: Tensor, pipe: Any) -> None:
    torch.set_num_threads(1)  # as DataLoader's workers do: OpenMP's threads stay with the parent
    pipe.send(infer(model, x).numpy())  # known already, or packed by the parent
    pipe.send(infer(cold(model), x).numpy())  # packed here
    pipe.send({n: v.numpy() for n, v in step(fuse(unfuse(model)), x).items()})


def answers(method: str, model: nn.Module, x: Tensor, seconds: float) -> list[Any]:
    """The three answers of a child process that is started now."""
    context = multiprocessing.get_context(method)
    mine, theirs = context.Pipe()
    child = context.Process(target=answer, args=(model, x, theirs), daemon=True)  # type: ignore[attr-defined]
    child.start()
    theirs.close()
    try:
        found = []
        for _ in range(3):
            assert mine.poll(seconds), "the child hangs"
            found.append(mine.recv())
        return found
    finally:
        child.kill()
        child.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_of_a_busy_parent() -> None:
    """The parent has used OpenMP and the pool, and other threads of it pack and call just then."""
    model, large = fused_network(), picture().repeat(4, 1, 2, 2)
    x = picture()
    infer(model, large)
    step(fuse(unfuse(model)), large)
    torch.set_num_threads(1)
    wanted, trained = infer(model, x), step(fuse(unfuse(model)), x)
    torch.set_num_threads(2)
    ended = threading.Event()

    def work(i: int) -> bool:
        if i == 0:
            try:
                for _ in range(3):
                    kept, packed, stepped = answers("fork", model, x, 60)
                    assert numpy.array_equal(kept, wanted)
                    assert numpy.array_equal(packed, wanted)
                    assert all(numpy.array_equal(stepped[n], v) for n, v in trained.items())
            finally:
                ended.set()
        while not ended.is_set():
            infer(model if i == 1 else cold(model), large)
        return True

    together(3, work)


def test_a_spawned_child_gets_the_model_by_pickle() -> None:
    model, x = fused_network(), picture()
    infer(model, x)
    torch.set_num_threads(1)
    kept, packed, stepped = answers("spawn", model, x, 120)
    wanted = infer(model, x)
    assert numpy.array_equal(kept, wanted)
    assert numpy.array_equal(packed, wanted)
    trained = step(fuse(unfuse(model)), x)
    assert all(numpy.array_equal(stepped[n], v) for n, v in trained.items())


class Features(Dataset[Tensor]):
    """Images' features, made by the workers."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return infer(self.model, picture(index)[:1])[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_workers_of_a_data_loader() -> None:
    model = fused_network()
    torch.set_num_threads(1)
    wanted = torch.stack([Features(model)[i] for i in range(8)])
    loader = DataLoader(
        Features(model), batch_size=2, num_workers=2, timeout=120, multiprocessing_context="fork"
    )
    assert torch.equal(torch.cat(list(loader)), wanted)
