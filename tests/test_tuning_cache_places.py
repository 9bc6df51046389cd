"""The file of measured choices where the system refuses: permissions, full and read-only file
systems, limits, no home.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pwd
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_case import CHOICES, FILE, MACHINE, directory

from resnet_fused import cli, fuse, packing, tuning_cache
from resnet_fused.models.blocks import BasicBlock

__all__ = ["directory"]  # a fixture

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of Linux's permissions and limits")
OTHERS = {"fp32 9x9": "onednn"}


# --- what the system refuses --------------------


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """In here modes hold for root's thread as well (capabilities 1 to 3, capabilities(7))."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    effective = data[0]
    data[0] &= ~0b1110
    assert libc.capset(header, data) == 0
    try:
        yield
    finally:
        data[0] = effective
        assert libc.capset(header, data) == 0


@contextlib.contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


@contextlib.contextmanager
def mode(path: Path, bits: int) -> Iterator[None]:
    before = path.stat().st_mode
    path.chmod(bits)
    try:
        with without_privileges():
            yield
    finally:
        path.chmod(before)


@contextlib.contextmanager
def no_more_descriptors() -> Iterator[None]:
    taken: list[int] = []
    with limited(resource.RLIMIT_NOFILE, 200):
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        try:
            yield
        finally:
            for handle in taken:
                os.close(handle)


# What is refused, and whether choices can still be read there.
REFUSALS: dict[str, tuple[Callable[[Path], Any], int, bool]] = {
    "a file of mode 0": (lambda d: mode(d / FILE, 0), errno.EACCES, False),
    "a directory of mode 0": (lambda d: mode(d, 0), errno.EACCES, False),
    "a directory in one of mode 0": (lambda d: mode(d.parent, 0), errno.EACCES, False),
    "a read-only directory": (lambda d: mode(d, 0o500), errno.EACCES, True),
    "no more descriptors": (lambda d: no_more_descriptors(), errno.EMFILE, False),
    "no more bytes": (lambda d: limited(resource.RLIMIT_FSIZE, 20), errno.EFBIG, True),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_is_one_warning_or_a_clear_error(refusal: str, directory: Path) -> None:
    refuse, number, readable = REFUSALS[refusal]
    tuning_cache.update(MACHINE, CHOICES)
    before = (directory / FILE).read_bytes()
    with refuse(directory), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert tuning_cache.read(MACHINE) == (CHOICES if readable else {})
        with pytest.raises(OSError) as raised:
            tuning_cache.update(MACHINE, OTHERS)
    assert raised.value.errno == number
    assert [str(w.message).partition(":")[0] for w in caught] == (
        [] if readable else ["resnet_fused ignores its measured choices"]
    )
    assert [(p.name, p.read_bytes()) for p in directory.iterdir()] == [(FILE, before)]
    tuning_cache.update(MACHINE, OTHERS)
    assert tuning_cache.read(MACHINE) == CHOICES | OTHERS


ALONE = """
import importlib.util, os, sys, warnings
spec = importlib.util.spec_from_file_location("tuning_cache", sys.argv[1])
tuning_cache = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tuning_cache)
warnings.simplefilter("error")
before = tuning_cache.read("a machine")
try:
    tuning_cache.update("a machine", {"another": "choice"})
except OSError as error:
    print(before, tuning_cache.read("a machine") == before, os.listdir(tuning_cache.path().parent))
    sys.exit(error.errno)
"""
# A file system of the test's own, with choices on it, then full or read-only.
MOUNT = (
    'mount -t tmpfs -o size=64k,mode=700 none "$1" && cp "$2" "$1"/ && {} && exec "$3" -c "$4" "$5"'
)
FILE_SYSTEMS = {
    "full": ('cat /dev/zero > "$1"/rest 2> /dev/null || test -s "$1"/rest', errno.ENOSPC),
    "read-only": ('mount -o remount,ro "$1"', errno.EROFS),
}


@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_a_file_system_that_takes_nothing(kind: str, directory: Path) -> None:
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*namespace, "true"], capture_output=True).returncode
    ):
        pytest.skip("this user may not mount a file system of its own")
    command, number = FILE_SYSTEMS[kind]
    tuning_cache.update("a machine", CHOICES)
    place = directory.parent / "mounted"
    place.mkdir(mode=0o700)
    done = subprocess.run(
        [*namespace, "sh", "-c", MOUNT.replace("{}", command), "sh", str(place),
         str(directory / FILE), sys.executable, ALONE, str(tuning_cache.__file__)],
        env={**os.environ, "RESNET_FUSED_CACHE_DIR": str(place)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == number, done.stderr
    listed = sorted([FILE, "rest"] if kind == "full" else [FILE])
    assert done.stdout.startswith(f"{CHOICES} True ")
    assert sorted(eval(done.stdout.removeprefix(f"{CHOICES} True "))) == listed


# --- where it is --------------------


def run_a_model() -> None:
    block = BasicBlock(16, 16).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    packing.forget_measured()
    with torch.no_grad():
        torch.testing.assert_close(fuse(block)(x), block(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("home", [None, "", "relative"])
@pytest.mark.parametrize("named", [None, ""])
def test_a_user_without_a_home(
    named: str | None, home: str | None, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a container's numeric user has none: models run, and tuning says what to set."""

    def nobody(uid: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name, value in {"HOME": home, "RESNET_FUSED_CACHE_DIR": named}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="resnet_fused")
        warnings.filterwarnings("ignore", message=".* must be an absolute path")
        run_a_model()
    with pytest.raises(OSError, match=r"RESNET_FUSED_CACHE_DIR|absolute"):
        tuning_cache.update(MACHINE, CHOICES)
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory / "xdg"))
    assert tuning_cache.update(MACHINE, CHOICES) == directory / "xdg" / "resnet_fused" / FILE
    assert (directory / "xdg").stat().st_mode & 0o777 == 0o700
    assert tuning_cache.read(MACHINE) == CHOICES


def test_home_of_a_user_who_has_one(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(directory))
    assert tuning_cache.path() == directory / ".cache" / "resnet_fused" / FILE
    monkeypatch.delenv("HOME")
    entry = pwd.getpwuid(os.getuid())
    assert tuning_cache.path() == Path(entry.pw_dir) / ".cache" / "resnet_fused" / FILE


BAD_NAMES = {
    "relative": lambda d: "here",
    "a very long name": lambda d: f"{d}/{'a' * 300}",
    "a very long path": lambda d: f"{d}/{'a' * 200}" + f"/{'a' * 200}" * 30,
    "very many directories": lambda d: f"{d}" + "/a" * 3000,
}


@pytest.mark.parametrize("kind", BAD_NAMES)
def test_a_directory_that_cannot_be(
    kind: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", BAD_NAMES[kind](directory))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_a_model()
    assert len([w for w in caught if "ignores its measured" in str(w.message)]) <= 1
    with pytest.raises(OSError, match=r"absolute|too long"):
        tuning_cache.update(MACHINE, CHOICES)
    assert not list(directory.iterdir())


def test_a_deep_directory_and_one_whose_name_is_no_text(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (str(directory) + "/a" * 1500, os.fsdecode(bytes(directory) + b"/\xff\xfe")):
        monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", name)
        try:
            assert tuning_cache.update(MACHINE, CHOICES) == Path(name) / FILE
            assert tuning_cache.read(MACHINE) == CHOICES
        finally:  # pytest's own way of removing it recurses
            subprocess.run(["rm", "-rf", str(directory)], check=True)


# --- the command line --------------------

TUNE = ["tune", "resnet20", "--image-size", "8", "--batch-size", "2", "--threads", "1", "--repeats"]


@pytest.mark.parametrize("kind", ["relative", "a file", "others may write", "no more bytes"])
def test_tuning_fails_at_once_and_in_one_line(
    kind: str, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal: Any = contextlib.nullcontext()
    if kind == "relative":
        monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", "here")
    elif kind == "a file":
        directory.rmdir()
        directory.touch()
    elif kind == "others may write":
        directory.chmod(0o777)
    else:
        refusal = limited(resource.RLIMIT_FSIZE, 20)
    with refusal:
        status = cli.main([*TUNE, "1000000"])
    written = capsys.readouterr()
    assert status == 2
    assert written.err.startswith("resnet-fused: error: ")
    assert written.err.count("\n") == 1


def test_tuning_into_a_directory_whose_name_is_no_text(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", os.fsdecode(bytes(directory) + b"/\xff"))
    assert cli.main([*TUNE, "1"]) == 0, capsys.readouterr().err
    assert r"\udcff" in capsys.readouterr().out
