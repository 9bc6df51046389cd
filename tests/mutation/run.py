"""Plants every fault of the catalogue, one at a time, and says which ones the tests catch.

    PYTHONPATH=.:tests python -m mutation.run [NAME ...] [--area cpu] [--list] [--missing]

Each area works in a copy of the checkout under build/mutation, which is built once and then what a
fault has changed. First all tests run on the copy as it is: they must pass. A fault's are a few of
them, and may take as long as all did, and a minute, before they count as never ending.

Exit status 0 if at least 95 % are caught and README.md explains each of the others.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from mutation.catalogue import AREAS, Area
from mutation.fault import Fault
from mutation.scratch import CAUGHT, Outcome, Scratch

from resnet_fused import benchmark, cli

ROOT = Path(__file__).resolve().parents[2]
LEAST_SCORE = 0.95
_CLEAN_SECONDS = 900


class NotClean(Exception):
    """Without a fault a copy cannot be built, or its tests fail."""


@dataclass(frozen=True)
class Result:
    """What became of a fault."""

    name: str
    area: str
    file: str
    why: str
    outcome: str
    by: str
    seconds: float  # building and testing
    commit: str | None  # that it was found at

    @property
    def is_caught(self) -> bool:
        return self.outcome in CAUGHT


def files_of(root: Path) -> list[str]:
    """What git tracks or would, and the compiled libraries."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    libraries = (p.relative_to(root).as_posix() for p in root.glob("resnet_fused/_C_cpu*"))
    return [name for name in (*listed, *libraries) if name and (root / name).is_file()]


def run_area(
    name: str, area: Area, faults: Sequence[Fault], record: Callable[[Result], None]
) -> list[Result]:
    """Plant the faults, print a line for each and have it recorded.

    Raises:
        NotClean: without a fault something is wrong already.
    """
    scratch = Scratch(ROOT / "build" / "mutation" / name, dict(area.environment), area.build)
    # Its own library stays, as it is compiled in another way.
    files = [f for f in files_of(ROOT) if name != "cpu" or not f.endswith(".so")]
    scratch.copy(ROOT, files)
    if problem := scratch.build():
        raise NotClean(f"{name} cannot be built:\n{problem}")
    every = tuple(dict.fromkeys(test for fault in faults for test in fault.tests))
    clean = scratch.test(every, _CLEAN_SECONDS)
    if clean.kind != "survived":
        raise NotClean(f"{name}: without a fault {clean.kind}: {clean.by}")
    print(f"{name}: clean, {clean.seconds:.0f} s", flush=True)
    results, commit = [], benchmark.environment()["commit"]
    # Files in a row, so that restoring one and planting the next is one build.
    for fault in sorted(faults, key=lambda f: f.file):
        started = time.monotonic()
        scratch.plant(fault)
        if problem := scratch.build():
            outcome = Outcome("not built", 0, problem)
        else:
            outcome = scratch.test(fault.tests, 60 + clean.seconds)
        took = round(time.monotonic() - started, 1)
        found = Result(
            fault.name, name, fault.file, fault.why, outcome.kind, outcome.by, took, commit
        )  # fmt: skip
        results.append(found)
        print(f"{found.outcome:10} {name:6} {fault.name} ({took:.0f} s) {found.by}", flush=True)
        record(found)
    scratch.restore()
    return results


def explained(text: str) -> set[str]:
    """The survivors that a README explains, one a row of its table."""
    return set(re.findall(r"^\| `([\w-]+)` ", text, re.MULTILINE))


def summary(results: Sequence[Result]) -> dict[str, dict[str, int]]:
    """Faults and how many were caught, by area and in total."""
    groups = {area: [r for r in results if r.area == area] for area in AREAS}
    groups["total"] = list(results)
    return {
        area: {"faults": len(found), "caught": sum(r.is_caught for r in found)}
        for area, found in groups.items()
        if found
    }


def passes(results: Sequence[Result], excused: Iterable[str]) -> bool:
    """Whether enough are caught, and every other one has survived and is excused."""
    left = [r for r in results if not r.is_caught]
    enough = len(results) - len(left) >= LEAST_SCORE * len(results)
    return enough and all(r.outcome == "survived" and r.name in set(excused) for r in left)


def select(names: Sequence[str], area: str | None) -> dict[str, list[Fault]]:
    """The faults that were asked for, by area."""
    chosen = {
        kind: [f for f in it.faults if not names or f.name in names]
        for kind, it in AREAS.items()
        if area in (None, kind)
    }
    return {kind: faults for kind, faults in chosen.items() if faults}


def run_here(chosen: dict[str, list[Fault]], features: Sequence[str]) -> dict[str, list[Fault]]:
    """Without the faults that no test can notice on this processor; says which these are."""
    for fault in (f for faults in chosen.values() for f in faults):
        if fault.needs and fault.needs not in features:
            print(f"left out: {fault.name} needs {fault.needs}", flush=True)
    left = {
        area: [f for f in faults if not f.needs or f.needs in features]
        for area, faults in chosen.items()
    }
    return {area: faults for area, faults in left.items() if faults}


def main(argv: Sequence[str] | None = None) -> int:
    """Plant, print the score, write JSON."""
    parser = argparse.ArgumentParser(description="Plant faults and see whether tests catch them.")
    parser.add_argument("names", nargs="*", help="of faults; all without")
    parser.add_argument("--area", choices=AREAS)
    parser.add_argument("--list", action="store_true", help="print the faults and end")
    parser.add_argument("--jobs", type=int, default=2, help="areas at a time")
    parser.add_argument(
        "--json", metavar="FILE", help="write the results as JSON; other faults' stay"
    )
    parser.add_argument("--missing", action="store_true", help="only what the JSON has not")
    args = parser.parse_args(argv)
    chosen = select(args.names, args.area)
    known = {f.name for faults in chosen.values() for f in faults}
    if unknown := set(args.names) - known:
        parser.error(f"no such faults: {', '.join(sorted(unknown))}")
    if args.missing and args.json is not None:
        done = {result.name for result in read(Path(args.json))}
        left = {area: [f for f in faults if f.name not in done] for area, faults in chosen.items()}
        chosen = {area: faults for area, faults in left.items() if faults}
    if args.list:
        for area, faults in chosen.items():
            for fault in faults:
                print(f"{area:6} {fault.name}: {fault.why} ({fault.file})")
        return 0
    chosen = run_here(chosen, benchmark.environment()["cpu_features"])
    writing = threading.Lock()

    def record(result: Result) -> None:
        if args.json is not None:
            with writing:
                write(Path(args.json), [result])

    with ThreadPoolExecutor(args.jobs) as pool:
        running = [
            pool.submit(run_area, area, AREAS[area], faults, record)
            for area, faults in chosen.items()
        ]
        try:
            results = [result for future in running for result in future.result()]
        except NotClean as error:
            pool.shutdown(cancel_futures=True)
            print(error, file=sys.stderr)
            return 1
    for area, count in summary(results).items():
        share = count["caught"] / count["faults"]
        print(f"{area:6} {count['caught']} of {count['faults']} caught, {share:.1%}")
    readme = Path(__file__).with_name("README.md").read_text()
    return 0 if passes(results, explained(readme)) else 1


def read(path: Path) -> list[Result]:
    """The results in a file, none if there is no file."""
    if not path.exists():
        return []
    return [Result(**row) for row in json.loads(path.read_text())["faults"]]


def write(path: Path, results: Sequence[Result]) -> None:
    """Put results in a file, in the place of older ones of the same faults; the others stay."""
    known = {r.name: r for r in (*read(path), *results)}
    names = [fault.name for area in AREAS.values() for fault in area.faults]
    merged = [known[name] for name in names if name in known]
    about = {"environment": benchmark.environment(), "command": "make mutate"}
    table = {"score": summary(merged), "faults": [asdict(result) for result in merged]}
    cli.write_json(str(path), {**about, **table})


if __name__ == "__main__":
    sys.exit(main())
