"""A copy of the checkout in which faults are planted, one at a time."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mutation.fault import Fault

CAUGHT = ("caught", "crashed", "hung")
"""Outcomes that count as caught: a test failed, the process died, or it did not end."""

_TEST_SECONDS = 240  # of a single test; without a fault the slowest takes 15
_FAILED, _NOTHING_WRONG = 1, 0  # pytest's exit statuses; the others say that it could not test


@dataclass(frozen=True)
class Outcome:
    """What became of a run of tests."""

    kind: str  # of CAUGHT, or "survived", "not built", "not tested"
    seconds: float
    by: str  # the first test that failed, or what else happened


class Scratch:
    """The files of a checkout at another place, with build outputs of their own."""

    def __init__(self, place: Path, environment: Mapping[str, str], build: Sequence[str]) -> None:
        self.place = place
        # Bytecode is found stale by size and seconds, which a fault may leave as they were.
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(place),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        self.build_arguments = build
        self._planted: tuple[Path, str] | None = None

    def copy(self, root: Path, files: Iterable[str]) -> None:
        """Make the files what they are in `root`. What is the same keeps its time of change."""
        (self.place / "build").mkdir(parents=True, exist_ok=True)
        wanted = set(files)
        kept = ("build",)
        for path in [p for p in self.place.rglob("*") if p.is_file()]:
            name = path.relative_to(self.place).as_posix()
            if name not in wanted and not name.startswith(kept) and path.suffix != ".so":
                path.unlink()
        for name in sorted(wanted):
            source, target = root / name, self.place / name
            data = source.read_bytes()
            if not target.exists() or target.read_bytes() != data:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
                shutil.copymode(source, target)

    def plant(self, fault: Fault) -> None:
        """Put the fault in, and the one before out."""
        self.restore()
        path = self.place / fault.file
        text = path.read_text()
        planted = fault.plant(text)
        self._planted = path, text
        path.write_text(planted)

    def restore(self) -> None:
        """Put the file back that was changed last."""
        if self._planted is not None:
            path, text = self._planted
            path.write_text(text)
            self._planted = None

    def build(self) -> str | None:
        """Build what has changed; None, or what went wrong."""
        if not self.build_arguments:
            return None
        command = [sys.executable, *self.build_arguments]
        done = subprocess.run(
            command, cwd=self.place, env=self.environment, capture_output=True, text=True
        )
        return None if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]

    def test(self, tests: Sequence[str], seconds: float) -> Outcome:
        """Run the tests until the first one fails, for so long at most."""
        command = [
            sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=line",
            "-p", "no:cacheprovider", "--basetemp=build/pytest", f"--timeout={_TEST_SECONDS}",
            *tests,
        ]  # fmt: skip
        started = time.monotonic()
        status, output = run(command, self.place, self.environment, seconds)
        took = time.monotonic() - started
        if status is None:
            return Outcome("hung", took, f"no end after {seconds:.0f} s")
        if status < 0:
            return Outcome("crashed", took, signal.Signals(-status).name)
        if status == _NOTHING_WRONG:
            return Outcome("survived", took, "")
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", output, re.MULTILINE)
        if status != _FAILED or failed is None:
            return Outcome("not tested", took, output[-2000:])
        return Outcome("caught", took, failed.group(1))


def run(
    command: Sequence[str], place: Path, environment: Mapping[str, str], seconds: float
) -> tuple[int | None, str]:
    """Exit status, None if it took too long, and what it wrote."""
    process = subprocess.Popen(
        command, cwd=place, env=environment, start_new_session=True, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        end(process)
        return None, ""
    except BaseException:
        end(process)
        raise
    return process.returncode, output


def end(process: subprocess.Popen[str]) -> None:
    """The process and those that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
