"""The file of measured choices: nothing in it is trusted, nothing in it is lost."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cache_case import CHOICES, FILE, MACHINE, directory, good, write

from resnet_fused import fuse, models, packing, tuning_cache
from resnet_fused.backends import native, native_conv

__all__ = ["directory"]  # a fixture


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


CONV = packing.Folded(
    torch.zeros(64, 64, 3, 3), None, None, [1, 1], [1, 1], [1, 1], 1, torch.float32
)


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


def contents(text: str | bytes) -> Callable[[Path], object]:
    return lambda directory: write(directory, text)


def of_machine(choices: str) -> Callable[[Path], object]:
    return contents(f'{{"format": 1, "machines": {{"{MACHINE}": {choices}}}}}')


CONTENTS: dict[str, Callable[[Path], object]] = {
    "truncated": contents(json.dumps(good())[:-9]),
    "empty": contents(""),
    "huge": contents(json.dumps(good()) + " " * (5 << 20)),
    "deeply nested": contents("[" * 100_000),
    "not UTF-8": contents(b'{"format": "\xff"}'),
    "UTF-16": contents(json.dumps(good()).encode("utf-16")),
    "a byte order mark": contents(json.dumps(good()).encode("utf-8-sig")),
    "binary": contents(bytes(range(256))),
    "a list": contents("[1, 2]"),
    "a number": contents("1e999"),
    "nothing": contents("null"),
    "an older format": contents(json.dumps(good() | {"format": 0})),
    "a newer format": contents(json.dumps(good() | {"format": 2})),
    "a format that is no number": contents('{"format": NaN, "machines": {}}'),
    "no machines": contents('{"format": 1}'),
    "machines is a list": contents('{"format": 1, "machines": []}'),
    "machines twice": contents(json.dumps(good())[:-1] + ', "machines": [1]}'),
    "choices is a string": of_machine('"direct"'),
    "an algorithm is a number": of_machine('{"a": 1}'),
    "an algorithm is infinite": of_machine('{"a": -Infinity}'),
    "an algorithm is more digits than Python reads": of_machine('{"a": %s}' % ("9" * 5000)),
    "an algorithm is a list": of_machine('{"a": []}'),
    "an algorithm twice": of_machine('{"a": "direct", "a": null}'),
    "a very long key": of_machine('{"%s": "b"}' % ("a" * 999)),
    "a very long algorithm": of_machine('{"a": "%s"}' % ("b" * 999)),
}
"""What may stand in a file that is in its place."""


def as_link(directory: Path) -> None:
    write(directory.parent, json.dumps(good())).rename(directory.parent / "elsewhere")
    (directory / FILE).symlink_to(directory.parent / "elsewhere")


def directory_as_link(directory: Path) -> None:
    write(directory, json.dumps(good()))
    directory.rename(directory.parent / "elsewhere")
    directory.symlink_to(directory.parent / "elsewhere")


def directory_as_file(directory: Path) -> None:
    directory.rmdir()
    directory.touch(0o600)


def below_a_file(directory: Path) -> None:
    directory_as_file(directory)
    os.environ["RESNET_FUSED_CACHE_DIR"] = str(directory / "below")


PLACES: dict[str, Callable[[Path], object]] = {
    "a symbolic link": as_link,
    "a named pipe": lambda d: os.mkfifo(d / FILE, 0o600),
    "a directory": lambda d: (d / FILE).mkdir(),
    "a file that others may write": lambda d: write(d, json.dumps(good())).chmod(0o666),
    "a directory that others may write": lambda d: (write(d, json.dumps(good())), d.chmod(0o777)),
    "a file that the group may write": lambda d: write(d, json.dumps(good())).chmod(0o620),
    "a directory that the group may write": lambda d: (
        write(d, json.dumps(good())),
        d.chmod(0o730),
    ),
    "a directory that is a link": directory_as_link,
    "a directory that is a file": directory_as_file,
    "a directory below a file": below_a_file,
}
"""A file or a directory that is not what it should be."""


def contents_of(place: Path) -> dict[str, tuple[int, bytes]]:
    """Modes and contents of all that is there."""
    return {
        str(path.relative_to(place)): (
            path.lstat().st_mode,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in place.rglob("*")
    }


@pytest.mark.parametrize("poison", CONTENTS | PLACES)
def test_a_poisoned_file_is_ignored_with_one_warning(
    poison: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = CONV.problem((2, 64, 28, 28))
    assert problem is not None
    expected = packing.choose(problem, "default")
    packing.forget_measured()
    monkeypatch.setattr(packing, "machine", lambda: MACHINE)
    (CONTENTS | PLACES)[poison](directory)
    with pytest.warns(UserWarning, match="resnet_fused ignores its measured choices") as caught:
        assert tuning_cache.read(MACHINE) == {}
        assert tuning_cache.read(MACHINE) == {}
        assert packing.choose(problem, "default") == expected
    assert len(caught) == 1


@pytest.mark.parametrize("poison", CONTENTS)
def test_poisoned_contents_are_replaced_with_one_warning(poison: str, directory: Path) -> None:
    CONTENTS[poison](directory)
    with pytest.warns(UserWarning, match="resnet_fused replaces its measured choices") as caught:
        tuning_cache.update(MACHINE, CHOICES)
    assert len(caught) == 1
    assert tuning_cache.read(MACHINE) == CHOICES


@pytest.mark.parametrize("poison", PLACES)
def test_a_poisoned_place_is_not_written_to(poison: str, directory: Path) -> None:
    PLACES[poison](directory)
    before = contents_of(directory.parent)
    with pytest.raises(OSError, match=r"\w"):
        tuning_cache.update(MACHINE, CHOICES)
    assert contents_of(directory.parent) == before


def test_other_machines_choices_are_nobody_elses(directory: Path) -> None:
    """Of another processor or GPU, or other versions."""
    tuning_cache.update(MACHINE, CHOICES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for machine in ("another processor", MACHINE.replace("torch 2", "torch 3"), ""):
            assert tuning_cache.read(machine) == {}


HOSTILE = [
    "\ud800",
    "\0",
    "../../etc",
    "__class__",
    "{0.__init__}",
    "%s%n",
    "\x1b[2J",
    "",
    "a" * 200,
]


def test_hostile_names_do_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as machines nor as problems or algorithms; what else there is stays."""
    choices = {name: name for name in HOSTILE}
    tuning_cache.update(MACHINE, CHOICES | choices)
    for name in HOSTILE:
        tuning_cache.update(name, choices)
    assert tuning_cache.read(MACHINE) == CHOICES | choices
    problem = CONV.problem((2, 64, 28, 28))
    assert problem is not None
    expected = packing.choose(problem, "default")
    monkeypatch.setattr(packing, "machine", lambda: MACHINE)
    for name in HOSTILE:
        tuning_cache.update(MACHINE, {problem.key(torch.get_num_threads()): name})
        packing.forget_measured()
        assert packing.choose(problem, "default") == expected


def test_what_would_not_be_read_is_not_written(directory: Path) -> None:
    tuning_cache.update(MACHINE, CHOICES)
    before = contents_of(directory)
    for machine, choices in (("m" * 201, {}), (MACHINE, {"a": "b" * 201}), (MACHINE, {"a": 1})):
        with pytest.raises(ValueError, match="names of at most 200 characters"):
            tuning_cache.update(machine, choices)
    with pytest.raises(ValueError, match="more than 4194304 bytes"):
        tuning_cache.update("another", {str(i).zfill(200): "" for i in range(30_000)})
    assert contents_of(directory) == before


def test_a_full_file_drops_what_is_oldest(directory: Path) -> None:
    def many(name: str) -> dict[str, str]:
        return {f"{name} {i}".ljust(200): "direct" for i in range(8_000)}

    tuning_cache.update("another", many("old"))
    tuning_cache.update(MACHINE, many("first"))
    assert tuning_cache.read("another") and tuning_cache.read(MACHINE)
    tuning_cache.update(MACHINE, many("second"))
    assert tuning_cache.read(MACHINE) == many("first") | many("second")
    assert not tuning_cache.read("another")
    tuning_cache.update(MACHINE, many("third"))
    tuning_cache.update(MACHINE, CHOICES)
    assert tuning_cache.read(MACHINE) == many("third") | CHOICES


def test_a_foreign_owner_is_ignored(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning_cache.update(MACHINE, CHOICES)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert tuning_cache.read(MACHINE) == {}
    with pytest.raises(PermissionError, match="belongs to another user"):
        tuning_cache.update(MACHINE, CHOICES)


def test_choices_hold_for_one_processor_instruction_set_and_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "available", True)
    names = set()
    for processor, isa, version in (
        ("a", "avx2", "2.0"), ("b", "avx2", "2.0"), ("a", "avx512", "2.0"), ("a", "avx2", "2.1"),
    ):  # fmt: skip
        monkeypatch.setattr(native_conv, "processor", lambda name=processor: name)
        monkeypatch.setattr(native, "isa", lambda name=isa: name)
        monkeypatch.setattr(torch, "__version__", version)
        names.add(packing.machine())
    assert len(names) == 4


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


@pytest.mark.skipif(not native.available, reason=str(native.reason))
@pytest.mark.parametrize("algorithm", ["onednn", "winograd2", "winograd9"])
def test_a_measured_choice_is_taken_if_it_can_run(directory: Path, algorithm: str) -> None:
    conv = models.resnet18().layer1[0].conv1.to(memory_format=torch.channels_last)  # type: ignore[call-overload, union-attr]
    folded = packing.fold_of(conv, None, torch.float32)
    if folded is None or "winograd4" not in packing.algorithms(
        folded.problem((2, 64, 28, 28)),  # type: ignore[arg-type]
        "default",
    ):
        pytest.skip("this machine runs its convolutions by oneDNN alone")
    problem = folded.problem((2, 64, 28, 28))
    assert problem is not None
    assert packing.choose(problem, "default") == "winograd4"
    tuning_cache.update(packing.machine(), {problem.key(torch.get_num_threads()): algorithm})
    packing.forget_measured()
    expected = "winograd4" if algorithm == "winograd9" else algorithm
    assert packing.choose(problem, "default") == expected


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
