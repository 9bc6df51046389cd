"""The file of measured choices: nothing in it is trusted, nothing in it is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from resnet_fused import fuse, models, packing, tuning_cache
from resnet_fused.backends import native

MACHINE = "a processor, avx512, torch 2"
CHOICES = {"fp32 1x64": "winograd4", "fp32 2x64": "direct"}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A private cache directory of this test's own."""
    place = tmp_path / "cache"
    place.mkdir(mode=0o700)
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(place))
    monkeypatch.setattr(tuning_cache, "_complained", set())
    packing.forget_measured()
    yield place
    packing.forget_measured()


def test_what_is_written_is_read(directory: Path) -> None:
    file = tuning_cache.update(MACHINE, CHOICES)
    assert file == tuning_cache.path() == directory / "conv_algorithms.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert tuning_cache.read(MACHINE) == CHOICES
    assert tuning_cache.read("another machine") == {}
    tuning_cache.update("another machine", {"fp32 1x64": "onednn"})
    tuning_cache.update(MACHINE, {"fp32 1x64": "direct"})
    assert tuning_cache.read(MACHINE) == CHOICES | {"fp32 1x64": "direct"}
    assert tuning_cache.read("another machine") == {"fp32 1x64": "onednn"}
    assert [p.name for p in directory.iterdir()] == ["conv_algorithms.json"]


def test_no_file_is_no_choices_and_no_warning(directory: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning_cache.read(MACHINE) == {}


def test_the_directory_is_made_private(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deeper = directory / "not" / "there yet"
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(deeper))
    tuning_cache.update(MACHINE, CHOICES)
    assert deeper.stat().st_mode & 0o777 == 0o700
    assert tuning_cache.read(MACHINE) == CHOICES


def good() -> dict[str, object]:
    return {"format": 1, "machines": {MACHINE: dict(CHOICES)}}


def write(directory: Path, data: object) -> Path:
    file = directory / "conv_algorithms.json"
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    file.chmod(0o600)
    return file


def as_link(directory: Path) -> None:
    target = directory.parent / "elsewhere.json"
    target.write_text(json.dumps(good()))
    (directory / "conv_algorithms.json").symlink_to(target)


def as_fifo(directory: Path) -> None:
    os.mkfifo(directory / "conv_algorithms.json", 0o600)


POISONS: dict[str, Callable[[Path], object]] = {
    "truncated": lambda d: write(d, json.dumps(good())[:-9]),
    "empty": lambda d: write(d, ""),
    "huge": lambda d: write(d, json.dumps(good()) + " " * (5 << 20)),
    "deeply nested": lambda d: write(d, "[" * 100_000),
    "not UTF-8": lambda d: (d / "conv_algorithms.json").write_bytes(b'{"format": "\xff"}'),
    "binary": lambda d: (d / "conv_algorithms.json").write_bytes(bytes(range(256))),
    "a list": lambda d: write(d, [1, 2]),
    "another format": lambda d: write(d, good() | {"format": 2}),
    "machines is a list": lambda d: write(d, {"format": 1, "machines": []}),
    "choices is a string": lambda d: write(d, {"format": 1, "machines": {MACHINE: "direct"}}),
    "an algorithm is a number": lambda d: write(d, {"format": 1, "machines": {MACHINE: {"a": 1}}}),
    "an algorithm is a list": lambda d: write(d, {"format": 1, "machines": {MACHINE: {"a": []}}}),
    "a very long key": lambda d: write(d, {"format": 1, "machines": {MACHINE: {"a" * 999: "b"}}}),
    "a symbolic link": as_link,
    "a named pipe": as_fifo,
    "a directory": lambda d: (d / "conv_algorithms.json").mkdir(),
    "a file that others may write": lambda d: write(d, good()).chmod(0o666),
    "a directory that others may write": lambda d: (write(d, good()), d.chmod(0o777)),
}


@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_file_is_ignored_with_one_warning(poison: str, directory: Path) -> None:
    POISONS[poison](directory)
    with pytest.warns(UserWarning, match="resnet_fused ignores its measured choices") as caught:
        assert tuning_cache.read(MACHINE) == {}
        assert tuning_cache.read(MACHINE) == {}
    assert len(caught) == 1


def test_a_foreign_owner_is_ignored(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning_cache.update(MACHINE, CHOICES)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert tuning_cache.read(MACHINE) == {}
    with pytest.raises(PermissionError, match="belongs to another user"):
        tuning_cache.update(MACHINE, CHOICES)


def test_a_relative_directory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_cache, "_complained", set())
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", "here")
    with pytest.raises(OSError, match="absolute"):
        tuning_cache.path()
    with pytest.warns(UserWarning, match="absolute"):
        assert tuning_cache.read(MACHINE) == {}


def test_an_interrupted_write_leaves_the_old_file(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning_cache.update(MACHINE, CHOICES)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tuning_cache.update(MACHINE, {"fp32 1x64": "onednn"})
    assert tuning_cache.read(MACHINE) == CHOICES
    assert len(list(directory.iterdir())) == 1


def add(number: int) -> None:
    for i in range(5):
        tuning_cache.update(MACHINE, {f"{number} {i}": "direct"})


def test_eight_processes_write_at_once(directory: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=add, args=(n,)) for n in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert len(tuning_cache.read(MACHINE)) == 40


@pytest.mark.skipif(not native.available, reason=str(native.reason))
@pytest.mark.parametrize("algorithm", ["onednn", "winograd2", "winograd9"])
def test_a_measured_choice_is_taken_if_it_can_run(directory: Path, algorithm: str) -> None:
    conv = models.resnet18().layer1[0].conv1.to(memory_format=torch.channels_last)  # type: ignore[call-overload, union-attr]
    folded = packing.fold_of(conv, None, torch.float32)
    if folded is None or "winograd4" not in packing.algorithms(
        folded.problem((2, 64, 28, 28))  # type: ignore[arg-type]
    ):
        pytest.skip("this machine runs its convolutions by oneDNN alone")
    problem = folded.problem((2, 64, 28, 28))
    assert problem is not None
    assert packing.choose(problem) == "winograd4"
    tuning_cache.update(packing.machine(), {problem.key(torch.get_num_threads()): algorithm})
    packing.forget_measured()
    expected = "winograd4" if algorithm == "winograd9" else algorithm
    assert packing.choose(problem) == expected


@pytest.mark.skipif(not native.available, reason=str(native.reason))
def test_any_measured_choice_gives_the_same_network(directory: Path) -> None:
    """What the cache says can cost time, never correctness."""
    plain = models.resnet18().eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = plain(x)
        for algorithm in ("onednn", "direct", "winograd2", "winograd4"):
            keys = (key for key in _problems(plain, x))
            tuning_cache.update(packing.machine(), dict.fromkeys(keys, algorithm))
            packing.forget_measured()
            torch.testing.assert_close(fuse(plain)(x), expected, rtol=1e-4, atol=1e-4)


def _problems(model: torch.nn.Module, x: torch.Tensor) -> list[str]:
    from resnet_fused.graph.observe import conv_inputs

    modules, keys = dict(model.named_modules()), []
    for name, seen in conv_inputs(model, [x]).items():
        folded = packing.fold_of(modules[name], None, seen.dtype)  # type: ignore[arg-type]
        problem = None if folded is None else folded.problem(seen.shape)
        if problem is not None:
            keys.append(problem.key(torch.get_num_threads()))
    return keys
