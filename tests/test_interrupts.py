"""Ctrl-C at every moment: the model stays usable, and the process as it was.

CPython runs a signal's handler where a function of Python's begins and where a function of C's has
ended: exactly there a profiler raises KeyboardInterrupt here, at one place of the code after the
other. The exception is kept meanwhile, with its frames, as notebooks do. Not where torch.no_grad()
ends: an interrupt there leaves gradients switched off, with eager PyTorch as with this library. Of
an operation's places some are taken; RESNET_FUSED_LONG=1 takes all. At last a few real signals.
"""

from __future__ import annotations

import builtins
import copy
import inspect
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from thread_case import assert_same_bits, infer, step
from torch import Tensor, nn
from train_case import small

from resnet_fused import benchmark, fuse, packing, policy, tuning_cache, unfuse
from resnet_fused.benchmark import algorithms

LONG = bool(os.environ.get("RESNET_FUSED_LONG"))
MOST = 100_000 if LONG else 20
WATCHED = ("resnet_fused", "torch/fx", "nn/modules/module.py", "/contextlib.py", "tempfile.py")

Site = tuple[str, int, str]


def profile(work: Callable[[], object], seen: Callable[[Site], None]) -> None:
    """Run with `seen` called at every moment at which a signal's handler may run."""

    def watch(frame: FrameType, event: str, _: object) -> None:
        resumes = event == "call" and frame.f_code.co_flags & inspect.CO_GENERATOR
        if event in ("call", "c_return") and not resumes:
            seen((frame.f_code.co_filename, frame.f_lineno, event))

    sys.setprofile(watch)
    try:
        work()
    finally:
        sys.setprofile(None)


def moments(work: Callable[[], object]) -> list[int]:
    """Which moments of an operation to interrupt: the first and the last one of each place."""
    first: dict[Site, int] = {}
    last: dict[Site, int] = {}
    count = 0

    def note(site: Site) -> None:
        nonlocal count
        count += 1
        if any(part in site[0] for part in WATCHED):
            first.setdefault(site, count)
            last[site] = count

    profile(work, note)
    found = sorted({*first.values(), *last.values()})
    return found[:: max(1, -(-len(found) // MOST))]


def interrupted(work: Callable[[], object], moment: int) -> KeyboardInterrupt | None:
    """The interrupt that ended an operation; None if something in it has taken it."""
    left = moment

    def count(site: Site) -> None:
        nonlocal left
        left -= 1
        if left <= 0 and not site[0].endswith("grad_mode.py"):
            raise KeyboardInterrupt

    try:
        profile(work, count)
    except KeyboardInterrupt as error:
        return error
    return None


def process_state() -> tuple[Any, ...]:
    """What an operation may change for the whole process or thread, while it runs."""
    tracing = sys.modules["torch.fx._symbolic_trace"]
    return (
        builtins.isinstance, nn.Module.__call__, nn.Module.__getattr__, len,
        sys.getswitchinterval(),
        tracing._is_fx_tracing_flag, tracing.CURRENT_PATCHER,
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), policy.current(),
        torch._C._len_torch_dispatch_stack(), torch.get_num_threads(), torch.get_default_dtype(),
    )  # fmt: skip


def interrupt_everywhere(
    work: Callable[[], object],
    check: Callable[[], None],
    prepare: Callable[[], None] = lambda: None,
) -> None:
    """Interrupt an operation at its moments, each time from what `prepare` makes; then check."""
    prepare()
    state, raised = process_state(), 0
    for moment in moments(work):
        prepare()
        error = interrupted(work, moment)
        assert process_state() == state, f"moment {moment}: {error!r}"
        raised += error is not None
        check()
        del error
    assert raised > 10, "the test shows nothing"


def network() -> nn.Module:
    model = nn.Sequential(small("basic", 1), small("basic", 2)).eval()
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def picture() -> Tensor:
    x = torch.randn(2, 16, 12, 12, generator=torch.Generator().manual_seed(5))
    return x.to(memory_format=torch.channels_last)


def looks(model: nn.Module) -> list[tuple[type, list[str]]]:
    """Classes and attributes of all modules."""
    return [(type(m), sorted(vars(m))) for m in model.modules()]


@pytest.mark.parametrize("operation", ["fuse", "unfuse"])
def test_in_place_all_or_nothing(operation: str) -> None:
    plain, x = network(), picture()
    fused = fuse(plain)
    model = copy.deepcopy(plain)
    wanted = {"plain": infer(plain, x), "fused": infer(fused, x)}
    appearances = {"plain": looks(plain), "fused": looks(fused)}
    there = fuse if operation == "fuse" else unfuse
    back = unfuse if operation == "fuse" else fuse
    end = "fused" if operation == "fuse" else "plain"

    def check() -> None:
        now = next((name for name, look in appearances.items() if looks(model) == look), None)
        assert now is not None, "some modules are changed and some are not"
        assert torch.equal(infer(model, x), wanted[now])
        there(model, inplace=True)
        assert looks(model) == appearances[end]
        assert torch.equal(infer(model, x), wanted[end])

    interrupt_everywhere(
        lambda: there(model, inplace=True), check, lambda: back(model, inplace=True) and None
    )


@pytest.mark.parametrize("way", ["fuse", "deepcopy"])
def test_copies(way: str) -> None:
    plain, x = network(), picture()
    fused = fuse(plain)
    wanted, eager = infer(fused, x), infer(plain, x)
    before = looks(plain), looks(fused)
    work = (lambda: fuse(plain)) if way == "fuse" else (lambda: copy.deepcopy(fused))

    def check() -> None:
        assert (looks(plain), looks(fused)) == before
        assert torch.equal(infer(plain, x), eager)
        assert torch.equal(infer(fused, x), wanted)
        assert torch.equal(infer(work(), x), wanted)

    interrupt_everywhere(work, check)


def outdate(model: nn.Module) -> None:
    """Write every tensor's own values into it: what is kept of them has to be made again."""
    for tensor in model.state_dict().values():
        tensor.mul_(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_first_call(dtype: torch.dtype) -> None:
    model, x = fuse(network().to(dtype)), picture().to(dtype)
    wanted = infer(model, x)

    def check() -> None:
        assert torch.equal(infer(model, x), wanted)

    for p in model.parameters():
        p.requires_grad_(False)  # so that no grad mode of the caller's is in the way
    interrupt_everywhere(lambda: model(x), check, lambda: outdate(model))


def test_loading() -> None:
    model, other, x = fuse(network()), fuse(network()), picture()
    states = [copy.deepcopy(model.state_dict())]
    states.append({k: v * 2 if v.is_floating_point() else v + 1 for k, v in states[0].items()})

    def prepare() -> None:
        model.load_state_dict(states[0])
        infer(model, x)

    def check() -> None:
        other.load_state_dict(model.state_dict())
        assert torch.equal(infer(model, x), infer(other, x)), "not of the weights it has"

    interrupt_everywhere(lambda: model.load_state_dict(states[1]), check, prepare)


@pytest.mark.parametrize("memory", ["default", "low"])
def test_training(memory: str) -> None:
    model, other, x = fuse(network(), memory=memory), fuse(network()), picture()
    state = copy.deepcopy(model.state_dict())
    wanted = step(model, x)

    def prepare() -> None:
        model.load_state_dict(state)
        infer(model.eval(), x)

    def check() -> None:
        other.load_state_dict(model.state_dict())
        assert torch.equal(infer(model.eval(), x), infer(other.eval(), x)), "stale"
        model.load_state_dict(state)
        assert_same_bits(step(model, x), wanted, "the step after")

    interrupt_everywhere(lambda: step(model, x), check, prepare)


# --- what is kept on disk --------------------


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path / "cache"))
    packing.forget_measured()
    return tmp_path / "cache"


def files(directory: Path) -> dict[str, Any]:
    return {p.name: json.loads(p.read_text()) for p in directory.iterdir()}


def test_writing_choices(directory: Path) -> None:
    tuning_cache.update("machine", {"a": "direct"})
    file = tuning_cache.path()
    before = file.read_text()

    def check() -> None:
        assert list(files(directory)) == [file.name]
        assert tuning_cache.read("machine") in ({"a": "direct"}, {"a": "direct", "b": "onednn"})
        tuning_cache.update("machine", {"c": "direct"})  # hangs if the lock is held

    interrupt_everywhere(
        lambda: tuning_cache.update("machine", {"b": "onednn"}),
        check,
        lambda: file.write_text(before) and None,
    )


def tune(model: nn.Module, x: Tensor) -> object:
    return benchmark.tune(model, x, repeats=1, progress=lambda *_: None)


def test_tuning(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms, "_MOST_COPIES", 2)
    model, x = fuse(network()), picture()
    wanted, before = infer(model, x), looks(model)

    def check() -> None:
        assert looks(model) == before
        assert torch.equal(infer(model, x), wanted)
        assert set(files(directory) if directory.exists() else ()) <= {tuning_cache.path().name}

    interrupt_everywhere(lambda: tune(model, x), check)
    tune(model, x)
    assert tuning_cache.read(packing.machine())


# --- real signals --------------------


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no such timer")
@pytest.mark.parametrize("operation", ["fuse", "call", "training"])
def test_signals(operation: str) -> None:
    assert threading.current_thread() is threading.main_thread()
    plain, x = network(), picture()
    model = fuse(plain)
    state = copy.deepcopy(model.state_dict())
    wanted, trained = infer(model, x), step(copy.deepcopy(model), x)
    before, raised = process_state(), 0

    def work() -> None:
        end = time.monotonic() + 2  # an interrupt is lost where Python runs a __del__
        while time.monotonic() < end:
            if operation == "fuse":
                fuse(plain)
            elif operation == "call":
                outdate(model)
                infer(model.eval(), x)
            else:
                step(model, x)

    def ring(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, ring)
    try:
        for i in range(30 if LONG else 8):
            signal.setitimer(signal.ITIMER_REAL, 0.013 + 0.0037 * i)
            try:
                work()
            except KeyboardInterrupt:
                raised += 1
            torch.set_grad_enabled(True)  # `infer` is the test's own
            assert process_state() == before
            model.load_state_dict(state)
            assert torch.equal(infer(model.eval(), x), wanted)
            assert_same_bits(step(model, x), trained, "the step after")
            model.load_state_dict(state)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert raised > 0
