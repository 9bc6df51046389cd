"""Measured choices of algorithms, kept between processes in a JSON file of the user's own.

The file lies in ``RESNET_FUSED_CACHE_DIR``, or in the platform's cache directory. What is read is
never trusted: a directory or file that belongs to somebody else, that others may write, that is a
symbolic link, too large or not of the expected form is ignored with one warning. Nothing is ever
executed or unpickled, and the worst a poisoned file could do is to name a slower algorithm.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: the last writer wins there
    fcntl = None  # type: ignore[assignment]

_FORMAT = 1
_FILE = "conv_algorithms.json"
_MOST_BYTES = 4 << 20
_MOST_TEXT = 200  # characters of a key or a name

Choices = dict[str, str]
_complained: set[str] = set()


def path() -> Path:
    """Where the file is, or would be.

    Raises:
        OSError: no directory is known (no RESNET_FUSED_CACHE_DIR, and no home directory or no
            platformdirs, which would know the platform's).
    """
    named = os.environ.get("RESNET_FUSED_CACHE_DIR")
    if not named:
        try:
            import platformdirs
        except ImportError as error:
            raise FileNotFoundError(
                "no cache directory: set RESNET_FUSED_CACHE_DIR, or install platformdirs"
            ) from error
        named = platformdirs.user_cache_dir("resnet_fused")
    directory = Path(named)
    if not directory.is_absolute():
        raise OSError(f"the cache directory must be an absolute path, got {str(directory)!r}")
    return directory / _FILE


def read(machine: str) -> Choices:
    """The choices that were measured on a machine, by problem; empty if there are none.

    Anything wrong with the file means that there are none, and is warned of once.
    """
    try:
        return dict(_read_all(path()).get(machine, {}))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _complain(f"resnet_fused ignores its measured choices: {error}")
        return {}


def update(machine: str, choices: Mapping[str, str]) -> Path:
    """Add choices to a machine's, all at once or not at all; returns the file's path.

    Safe beside other processes that do the same: nobody's choices are lost.

    Raises:
        OSError: the file cannot be written, or its directory is not private.
    """
    file = path()
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _demand_private(os.lstat(file.parent), file.parent, stat.S_ISDIR)
    with _locked(file.parent):
        try:
            known = _read_all(file)
        except FileNotFoundError:
            known = {}
        except (ValueError, RecursionError) as error:
            _complain(f"resnet_fused replaces its measured choices: {error}")
            known = {}
        known[machine] = {**known.get(machine, {}), **choices}
        text = json.dumps({"format": _FORMAT, "machines": known}, indent=1, sort_keys=True)
        if len(text) > _MOST_BYTES:  # too much of old machines: keep this one's
            known = {machine: known[machine]}
            text = json.dumps({"format": _FORMAT, "machines": known}, indent=1, sort_keys=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=_FILE, suffix=".new")
        try:
            with os.fdopen(handle, "w") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    return file


def _read_all(file: Path) -> dict[str, Choices]:
    _demand_private(os.lstat(file.parent), file.parent, stat.S_ISDIR)
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    handle = os.open(file, flags)
    try:
        status = os.fstat(handle)
        _demand_private(status, file, stat.S_ISREG)
        if status.st_size > _MOST_BYTES:
            raise ValueError(f"{file} is larger than {_MOST_BYTES} bytes")
        with os.fdopen(handle, "rb", closefd=False) as stream:
            data = json.loads(stream.read(_MOST_BYTES).decode())
    finally:
        os.close(handle)
    return _checked(data, file)


def _demand_private(status: os.stat_result, place: Path, is_kind: Any) -> None:
    if not is_kind(status.st_mode):
        raise OSError(f"{place} is not a plain file or directory")
    if hasattr(os, "geteuid"):
        if status.st_uid != os.geteuid():
            raise PermissionError(f"{place} belongs to another user")
        if status.st_mode & 0o022:
            raise PermissionError(f"{place} may be written by others")


def _checked(data: Any, file: Path) -> dict[str, Choices]:
    def demand(condition: bool) -> None:
        if not condition:
            raise ValueError(f"{file} is not of the form that this version writes")

    demand(isinstance(data, dict) and data.get("format") == _FORMAT)
    machines = data.get("machines")
    demand(isinstance(machines, dict))
    for machine, choices in machines.items():
        demand(len(machine) <= _MOST_TEXT and isinstance(choices, dict))
        for problem, algorithm in choices.items():
            demand(len(problem) <= _MOST_TEXT)
            demand(isinstance(algorithm, str) and len(algorithm) <= _MOST_TEXT)
    return machines


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _complain(message: str) -> None:
    if message not in _complained:
        _complained.add(message)
        warnings.warn(message, stacklevel=3)
