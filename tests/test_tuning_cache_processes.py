"""The file of measured choices among processes that write, read, change it, fork and are killed at
the same time.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cache_case import CHOICES, FILE, MACHINE, directory

from resnet_fused import tuning_cache

__all__ = ["directory"]  # a fixture

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")
OTHERS = {"fp32 9x9": "onednn"}


def grow(directory: Path) -> None:
    with open(directory / FILE, "a") as file:
        file.write("x" * (5 << 20))


def swap(directory: Path) -> None:
    """Another file in its place, with another's choices."""
    (directory / "new").write_text('{"format": 1, "machines": {}}')
    (directory / "new").replace(directory / FILE)


def vanish(directory: Path) -> None:
    (directory / FILE).unlink()


@pytest.mark.parametrize(
    ("change", "expected"),
    [(grow, {}), (swap, CHOICES), (vanish, CHOICES)],
    ids=["grow", "swap", "vanish"],
)
def test_a_file_that_changes_between_check_and_read(
    change: Callable[[Path], None],
    expected: dict[str, str],
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was checked is what is read, and never more of it than was allowed."""
    tuning_cache.update(MACHINE, CHOICES)
    check = tuning_cache._demand_private

    def checked(status: os.stat_result, place: Path, is_kind: Any) -> None:
        check(status, place, is_kind)
        if place.name == FILE:
            change(directory)

    monkeypatch.setattr(tuning_cache, "_demand_private", checked)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert tuning_cache.read(MACHINE) == expected


def test_a_hard_link_keeps_what_it_had(directory: Path) -> None:
    """A write replaces the name; it never goes through to a file that has others."""
    tuning_cache.update(MACHINE, CHOICES)
    (directory.parent / "link").hardlink_to(directory / FILE)
    before = (directory / FILE).read_bytes()
    tuning_cache.update(MACHINE, OTHERS)
    assert (directory.parent / "link").read_bytes() == before
    assert tuning_cache.read(MACHINE) == CHOICES | OTHERS


def write_often(number: int) -> None:
    for i in range(12):
        tuning_cache.update(MACHINE, {f"{number} {i}": "direct"})


def read_always(pipe: Any) -> None:
    """Each read holds all that the one before did, and of every writer a beginning."""
    warnings.simplefilter("error")
    before: dict[str, str] = {}
    count = 0
    while not pipe.poll():
        found = tuning_cache.read(MACHINE)
        assert before.keys() <= found.keys()
        for number in range(8):
            own = [key for key in found if key.startswith(f"{number} ")]
            assert set(own) == {f"{number} {i}" for i in range(len(own))}
        before, count = found, count + 1
    pipe.send(count)


def test_eight_processes_write_while_others_read(directory: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(n,)) for n in range(8)]
    pipes = [context.Pipe() for _ in range(2)]
    readers = [context.Process(target=read_always, args=(theirs,)) for _, theirs in pipes]
    for process in (*readers, *writers):
        process.start()
    for process in writers:
        process.join(120)
        assert process.exitcode == 0
    for (mine, _), process in zip(pipes, readers, strict=True):
        mine.send("stop")
        assert mine.poll(60) and mine.recv() > 1
        process.join(60)
        assert process.exitcode == 0
    assert len(tuning_cache.read(MACHINE)) == 96


def write_for_ever(pipe: Any) -> None:
    i = 0
    while True:
        tuning_cache.update("the victim", {str(i): "direct"})
        pipe.send(i)
        i += 1


def stop_before_the_end(pipe: Any) -> None:
    """In a write of its own, whose temporary file is complete."""

    def wait(source: Any, target: Any) -> None:
        pipe.send(str(source))
        time.sleep(600)

    os.replace = wait  # type: ignore[assignment]
    tuning_cache.update(MACHINE, OTHERS)


def test_a_writer_killed_in_the_middle_takes_nothing_with_it(directory: Path) -> None:
    tuning_cache.update(MACHINE, CHOICES)
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    victim = context.Process(target=stop_before_the_end, args=(theirs,))
    victim.start()
    assert mine.poll(60)
    left = Path(mine.recv())
    os.kill(victim.pid or 0, signal.SIGKILL)
    victim.join(60)
    assert left.parent == directory and left.exists()
    assert tuning_cache.read(MACHINE) == CHOICES
    tuning_cache.update(MACHINE, {"more": "direct"})
    assert tuning_cache.read(MACHINE) == CHOICES | {"more": "direct"}
    assert [p.name for p in directory.iterdir()] == [FILE]


def test_writers_killed_anywhere(directory: Path) -> None:
    tuning_cache.update(MACHINE, CHOICES)
    context = multiprocessing.get_context("fork")
    source = random.Random(3)
    for _ in range(20):
        mine, theirs = context.Pipe()
        victim = context.Process(target=write_for_ever, args=(theirs,))
        victim.start()
        assert mine.poll(60)
        time.sleep(source.random() / 100)
        os.kill(victim.pid or 0, signal.SIGKILL)
        victim.join(60)
        kept = -1
        while mine.poll():
            kept = mine.recv()
        found = tuning_cache.read("the victim")
        assert {str(i) for i in range(kept + 1)} <= found.keys()
        assert tuning_cache.read(MACHINE) == CHOICES
        assert len(list(directory.iterdir())) <= 2
    tuning_cache.update(MACHINE, OTHERS)
    assert [p.name for p in directory.iterdir()] == [FILE]


def test_a_fork_in_the_middle_of_a_write_keeps_no_lock(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child has the locked descriptor, too, and never closes it."""
    replace, children = os.replace, []

    def fork_and_replace(source: Any, target: Any) -> None:
        child = os.fork()
        if child == 0:
            time.sleep(600)
            os._exit(0)
        children.append(child)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fork_and_replace)
        tuning_cache.update(MACHINE, CHOICES)
    context = multiprocessing.get_context("fork")
    try:
        other = context.Process(target=tuning_cache.update, args=(MACHINE, OTHERS))
        other.start()
        other.join(60)
        assert other.exitcode == 0, "the next writer waits for the child"
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert tuning_cache.read(MACHINE) == CHOICES | OTHERS
