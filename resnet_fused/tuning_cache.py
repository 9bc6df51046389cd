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
import threading
import warnings
from collections.abc import Mapping
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

            named = platformdirs.user_cache_dir("resnet_fused")
        except ImportError as error:
            raise FileNotFoundError(
                "no cache directory: set RESNET_FUSED_CACHE_DIR, or install platformdirs"
            ) from error
        except RuntimeError as error:  # a user without HOME and without an entry in passwd
            raise FileNotFoundError(
                f"no cache directory: set RESNET_FUSED_CACHE_DIR ({error})"
            ) from error
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

    Safe beside other processes that do the same: nobody's choices are lost. Of more than a file
    may hold the oldest are dropped: other machines', then this one's.

    Raises:
        ValueError: `machine` or `choices` is nothing that :func:`read` would give back, or there
            are too many; the file stays as it is.
        OSError: the file cannot be written, or its directory is not private.
    """
    if not _are_choices(machine, choices):
        raise ValueError(
            f"choices: expected names of at most {_MOST_TEXT} characters, got {choices!r} "
            f"of {machine!r}"
        )
    file = path()
    _make(file.parent)
    # No with-block: an interrupt before its end would leave the lock to who keeps the exception.
    lock = None if fcntl is None else os.open(file.parent, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        directory = os.lstat(file.parent) if lock is None else os.fstat(lock)
        _demand_private(directory, file.parent, stat.S_ISDIR)
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _sweep(file.parent)
        _add(file, machine, choices)
    finally:
        if lock is not None:
            # Closing alone would leave it locked where another thread has forked meanwhile. And no
            # call of Python's, before which an interrupt might come.
            try:
                fcntl.flock(lock, fcntl.LOCK_UN)
            except OSError:
                pass
            finally:
                os.close(lock)
    return file


def _make(directory: Path) -> None:
    try:
        os.lstat(directory)  # too long a path is an error before any of it is made
    except FileNotFoundError:
        for place in reversed((directory, *directory.parents)):  # parents=True recurses
            place.mkdir(mode=0o700, exist_ok=True)


def _sweep(directory: Path) -> None:
    """Remove what writers that were killed have left; nobody else writes."""
    for left in directory.glob(f"{_FILE}*.new"):
        with contextlib.suppress(OSError):
            left.unlink()


def _add(file: Path, machine: str, choices: Mapping[str, str]) -> None:
    try:
        known = _read_all(file)
    except FileNotFoundError:
        known = {}
    except (ValueError, RecursionError) as error:
        _complain(f"resnet_fused replaces its measured choices: {error}")
        known = {}
    text = _text(known, machine, choices)
    # A name known before the file is there, so that no interrupt leaves it behind.
    temporary = file.with_name(f"{_FILE}.{os.getpid()}.{threading.get_ident()}.new")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "x", opener=_open_private) as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _text(known: dict[str, Choices], machine: str, choices: Mapping[str, str]) -> str:
    """The file's content: as much of what is known already as it may hold."""
    own = {**known.get(machine, {}), **choices}
    for machines in ({**known, machine: own}, {machine: own}, {machine: dict(choices)}):
        text = json.dumps({"format": _FORMAT, "machines": machines}, indent=1, sort_keys=True)
        if len(text) <= _MOST_BYTES:
            return text
    raise ValueError(f"choices: {len(choices)} of them take more than {_MOST_BYTES} bytes")


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


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
    machines: Any = data.get("machines") if isinstance(data, dict) else None
    sound = isinstance(machines, dict) and data.get("format") == _FORMAT
    if not sound or not all(_are_choices(*entry) for entry in machines.items()):
        raise ValueError(f"{file} is not of the form that this version writes")
    return machines


def _are_choices(machine: object, choices: object) -> bool:
    """Whether everything is a name that is read again."""
    if not isinstance(choices, Mapping):
        return False
    names = (machine, *choices.keys(), *choices.values())
    return all(isinstance(name, str) and len(name) <= _MOST_TEXT for name in names)


def _complain(message: str) -> None:
    if message not in _complained:
        _complained.add(message)
        warnings.warn(message, stacklevel=3)
