"""Run any number of random networks; keep those that fail.

    python tests/fuzz/fuzz.py --cases 5000 --seed 1
    python tests/fuzz/fuzz.py --seed 1 --only 487

Cases run in processes of their own, so that a crash is a failure like another. A failing case is
made smaller and kept in ``regressions/``, where every test run finds it. The exit status is 1 if
there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402
from draw import draw  # noqa: E402
from judge import Verdict, judge  # noqa: E402
from shrink import shrink  # noqa: E402

from resnet_fused.numerics.block import BlockCase  # noqa: E402

REGRESSIONS = HERE / "regressions"
CHUNK = 200
SECONDS = 300
"""For one case, however busy the machine: more is a hang."""
SHRINK_SECONDS = 120
"""For making a failing case smaller; what is the smallest by then is kept."""


def main(arguments: list[str]) -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_AsWritten)
    parser.add_argument("--cases", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this one, in this process")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument("--worst", type=Path, metavar="FILE", help="write the worst cases here")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.only is not None:
        case = draw(options.seed, options.only)
        print(json.dumps(case.to_dict()))
        print(judge(case))
        return 0
    numbers = range(options.first, options.first + options.cases)
    if options.worker:
        _work(options.seed, numbers)
        return 0
    return _Run(options.seed, numbers, options.jobs).report(options.worst)


class _AsWritten(argparse.RawDescriptionHelpFormatter):
    pass


def _work(seed: int, numbers: range) -> None:
    """Judge cases one after another, a line of JSON before and after each."""
    torch.set_num_threads(1)
    for number in numbers:
        print(json.dumps({"begun": number}), flush=True)
        try:
            done: dict[str, Any] = asdict(judge(draw(seed, number)))
        except Exception as error:
            done = {"failure": f"{type(error).__name__}: {error}"}
        print(json.dumps({"done": number, **done}), flush=True)


class _Run:
    """A range of a seed's cases, in several processes."""

    def __init__(self, seed: int, numbers: range, jobs: int) -> None:
        self.seed, self.total, self.begun = seed, len(numbers), time.monotonic()
        self.verdicts: dict[int, Verdict] = {}
        self.failures: dict[int, str] = {}
        self._chunks = iter([numbers[i : i + CHUNK] for i in range(0, len(numbers), CHUNK)])
        self._lock = threading.Lock()
        threads = [threading.Thread(target=self._run_chunks) for _ in range(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _run_chunks(self) -> None:
        while True:
            with self._lock:
                chunk = next(self._chunks, None)
            if chunk is None:
                return
            while chunk:
                chunk = self._run_some(chunk)
            with self._lock:
                print(
                    f"{len(self.verdicts) + len(self.failures)} of {self.total} cases, "
                    f"{len(self.failures)} failed, {time.monotonic() - self.begun:.0f} s",
                    flush=True,
                )

    def _run_some(self, numbers: range) -> range:
        """Run cases until all are done or one ends the process; returns those that are left."""
        command = [sys.executable, __file__, "--worker", "--seed", str(self.seed)]
        command += ["--first", str(numbers[0]), "--cases", str(len(numbers))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        at = numbers[0]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            for line in _lines(process):
                if "begun" in line:
                    at = line["begun"]
                    continue
                number = line.pop("done")
                if "failure" in line:
                    self._failed(number, line["failure"])
                else:
                    self.verdicts[number] = Verdict(**line)
                at = number + 1
        if at >= numbers.stop:
            return range(0)
        self._failed(at, f"the process ended with status {process.returncode}")
        return range(at + 1, numbers.stop)

    def _failed(self, number: int, why: str) -> None:
        self.failures[number] = why
        print(f"FAILED: {reproducer(self.seed, number)}\n  {why}", flush=True)

    def report(self, worst: Path | None) -> int:
        """Print what came of it, keep what failed; returns the exit status."""
        counts: Counter[str] = Counter()
        for verdict in self.verdicts.values():
            for kind in ("exact", "refused", "by_draws", "library_wrong"):
                counts[kind] += getattr(verdict, kind)
        print(
            f"{self.total} cases of seed {self.seed} in {time.monotonic() - self.begun:.0f} s: "
            f"{len(self.failures)} failed; {counts['exact']} held bit for bit, "
            f"{counts['by_draws']} by further draws, {counts['refused']} refused as by eager, "
            f"{counts['library_wrong']} run without oneDNN, whose convolution is wrong there"
        )
        most: dict[tuple[str, str], tuple[float, int]] = {}
        for number, verdict in self.verdicts.items():
            case = draw(self.seed, number)
            kind = (case.dtype, case.mode)
            most[kind] = max(most.get(kind, (0.0, 0)), (verdict.ratio, number))
        rows = [
            {"dtype": dtype, "mode": mode, "ratio": ratio, "case": draw(self.seed, n).to_dict()}
            for (dtype, mode), (ratio, n) in sorted(most.items())
        ]
        for row, (_, number) in zip(rows, (most[k] for k in sorted(most)), strict=True):
            print(f"  {row['dtype']:9} {row['mode']:9} {row['ratio']:.2f} of the budget: {number}")
        if worst is not None:
            worst.write_text(json.dumps(rows, indent=1) + "\n")
        sys.stdout.flush()
        for number, why in self.failures.items():
            keep(draw(self.seed, number), f"seed {self.seed}, case {number}", why)
        return 1 if self.failures else 0


def _lines(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """What a worker prints; it is ended where a case takes too long."""
    assert process.stdout is not None and process.stderr is not None
    threading.Thread(target=process.stderr.read, daemon=True).start()
    while True:
        watchdog = threading.Timer(SECONDS, process.kill)
        watchdog.start()
        line = process.stdout.readline()
        watchdog.cancel()
        if not line:
            return
        yield json.loads(line)


def reproducer(seed: int, number: int) -> str:
    """The command that runs a case again."""
    return f".venv/bin/python tests/fuzz/fuzz.py --seed {seed} --only {number}"


def keep(case: BlockCase, name: str, why: str) -> None:
    """Make a failing case smaller, and have every later test run try it."""
    if why.startswith("AssertionError"):
        last = time.monotonic() + SHRINK_SECONDS
        case = shrink(case, lambda simpler: time.monotonic() < last and _fails_alike(simpler, why))
    file = REGRESSIONS / f"{name.replace(', case ', '-').replace('seed ', '')}.json"
    text = json.dumps({"found": name, "failure": why, "case": case.to_dict()}, indent=1)
    file.write_text(text + "\n")
    print(f"kept in {file}", flush=True)


KINDS = ("NaN or Inf", "relative error", "strides", "is exact", "the bits", "raises", "changed")


def _fails_alike(case: BlockCase, why: str) -> bool:
    try:
        judge(case)
    except AssertionError as error:
        return all((kind in why) == (kind in str(error)) for kind in KINDS)
    except Exception:  # no sound case
        return False
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
