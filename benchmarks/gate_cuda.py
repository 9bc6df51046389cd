"""Reads what nvcc made of every CUDA kernel, for every chip, without a GPU.

    python benchmarks/gate_cuda.py --csv benchmarks/results/cuda_gate.csv

The objects are those of the build (setup_cuda.py), made here where they are not up to date. Of each
kernel's machine code is demanded:

* no spills and nothing else in local memory;
* registers x threads within the chip, by the kernel's launch bounds;
* no access of a single byte where none is data;
* what its name promises (PROMISES): HMMA where it says mma, HGMMA and bulk copies where it says
  wgmma, and accesses of 16 bytes where its first arguments, a type and a number of elements, make
  16 bytes;
* nothing that ptxas warns of, as matrix instructions that it has to run one after another.

Exit status 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import setup_cuda
from resnet_fused import benchmark

REGISTERS = 65536  # of a multiprocessor, from 8.0 to 12.0
_UNBOUNDED = 1024  # threads of a block, where a kernel has no launch bounds

_BYTES = {"float": 4, "double": 8, "__half": 2, "__nv_bfloat16": 2}


@dataclass(frozen=True)
class Promise:
    """What the machine code of kernels with such a name must have; of some architectures."""

    name: str
    instruction: str
    what: str
    archs: frozenset[str] = frozenset()  # none: all

    def broken(self, kernel: str, arch: str, instructions: Iterable[str]) -> bool:
        """Whether a kernel that it is about lacks the instruction."""
        asked = re.search(self.name, kernel) and (not self.archs or arch in self.archs)
        return bool(asked) and not any(re.fullmatch(self.instruction, i) for i in instructions)


HOPPER = frozenset({"90a"})
PROMISES = (
    Promise(r"wgmma", r"HGMMA\S*", "HGMMA", HOPPER),
    Promise(r"wgmma", r"UBLKCP\S*", "bulk copy", HOPPER),
    Promise(r"(^|_)mma_|stem_conv", r"HMMA\S*", "HMMA"),
    Promise(r"(^|_)mma_", r"LDGSTS\S*\.128", "asynchronous copy of 16 bytes"),
)
SIXTEEN = ((r"LDG\S*\.128\S*", "load"), (r"STG\S*\.128\S*", "store"))
KEEPS_SUMS = r"statistics|sums"
"""Kernels that store no activations."""

SINGLE_BYTES = r"(LDS|STS|LDG|STG)\S*\.[SU]8\S*"
HAS_BYTES = r"pool"
"""Kernels whose data are bytes; elsewhere the compiler has lost sight of an alignment."""

_SASS = r"Function : \S+|\b(HMMA|HGMMA|LDL|STL|LDG|STG|LDS|STS|LDGSTS|UBLKCP)[.A-Z0-9x]*"


@dataclass
class Row:
    """What came out of a kernel for one chip; `wrong` is empty if it passed."""

    file: str
    kernel: str
    arch: str
    registers: int = 0
    threads: int = 0  # by launch bounds; 0 without
    stack_bytes: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0  # what is not dynamic
    matrix_instruction: str = ""
    wrong: list[str] = field(default_factory=list)


def main() -> int:
    """Compile what has changed and read everything; the exit status is 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="gate_cuda.py", description="Gates without a GPU.")
    parser.add_argument("--csv", metavar="FILE", help="write the table, one row a kernel and chip")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N")
    args = parser.parse_args()
    if args.csv is not None:
        benchmark.check_writable(Path(args.csv))
    lacking = setup_cuda.missing() or (None if cuobjdump() else "no cuobjdump")
    if lacking is not None:
        print(f"gate_cuda.py: {lacking}")
        return 1
    nvcc = setup_cuda.find_nvcc()
    assert nvcc is not None
    archs = setup_cuda.architectures(nvcc)
    objects = setup_cuda.compile_objects(nvcc, archs, args.jobs)
    parts = [(path, arch.removesuffix("+PTX")) for path in objects for arch in archs]
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = [row for found in pool.map(lambda part: read(*part), parts) for row in found]
    for row in rows:
        for wrong in row.wrong:
            print(f"{row.file}, sm_{row.arch}, {row.kernel}: {wrong}")
    failed = sum(bool(row.wrong) for row in rows)
    print(f"{len(rows)} kernels compiled, {failed} wrong")
    if args.csv is not None:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
        release = re.findall(r"V(\d[\d.]*)", version.stdout)[0]
        benchmark.write_atomically(Path(args.csv), table(rows, release).encode())
    return 1 if failed else 0


def table(rows: Sequence[Row], nvcc: str) -> str:
    """The rows as CSV."""
    text = io.StringIO()
    names = [f.name for f in fields(Row)]
    writer = csv.DictWriter(text, [*names, "nvcc"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**asdict(row), "wrong": "; ".join(row.wrong), "nvcc": nvcc})
    return text.getvalue()


def cuobjdump() -> str | None:
    """The toolkit's, or the one in Triton's package."""
    nvcc = setup_cuda.find_nvcc()
    beside = nvcc and shutil.which("cuobjdump", path=str(Path(nvcc).resolve().parent))
    if beside:
        return beside
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def read(path: Path, arch: str) -> list[Row]:
    """The kernels of an object, for one chip, judged."""
    limits = launch_bounds(dump("-elf", arch, path))
    said = ptxas_report(path.with_suffix(".log").read_text(), arch)
    used = resource_usage(dump("-res-usage", arch, path))
    code = instructions(dump("-sass", arch, path, only=_SASS))
    names = demangled(list(used))
    rows = []
    for mangled, (registers, stack, shared) in used.items():
        row = Row(path.stem + ".cu", names[mangled], arch, registers, stack_bytes=stack)
        row.threads, row.shared_bytes = limits.get(mangled, 0), shared
        row.spilled_bytes, complaints = said.get(mangled, (0, []))
        row.wrong += complaints
        judge(row, code.get(mangled, set()))
        rows.append(row)
    return sorted(rows, key=lambda row: row.kernel)


def judge(row: Row, code: set[str]) -> None:
    """Fill in what is wrong with a kernel of these instructions."""
    row.matrix_instruction = min((i for i in code if re.match("HG?MMA", i)), default="")
    if row.spilled_bytes:
        row.wrong.append(f"{row.spilled_bytes} bytes spilled")
    elif any(re.match("LDL|STL", i) for i in code):
        row.wrong.append(f"{row.stack_bytes} bytes in local memory")
    threads = row.threads or _UNBOUNDED
    if (row.registers + 7) // 8 * 8 * threads > REGISTERS:  # they are given out in eights
        bound = "" if row.threads else ", as it has no launch bounds"
        row.wrong.append(f"{row.registers} registers x {threads} threads{bound}")
    for promise in PROMISES:
        if promise.broken(row.kernel, row.arch, code):
            row.wrong.append(f"no {promise.what}")
    if not re.search(HAS_BYTES, row.kernel) and any(re.fullmatch(SINGLE_BYTES, i) for i in code):
        row.wrong.append("accesses of single bytes")
    if bytes_at_once(row.kernel) == 16:
        for instruction, what in SIXTEEN[: 1 if re.search(KEEPS_SUMS, row.kernel) else 2]:
            if not any(re.fullmatch(instruction, i) for i in code):
                row.wrong.append(f"no {what} of 16 bytes")


def bytes_at_once(kernel: str) -> int | None:
    """Of "kernel<type, elements, ...>" the bytes; None if it is not one."""
    found = re.match(rf"\w+<({'|'.join(_BYTES)}), (\d+)[,>]", kernel)
    return _BYTES[found[1]] * int(found[2]) if found else None


def dump(what: str, arch: str, path: Path, only: str | None = None) -> str:
    """What cuobjdump says; of it the matches of a pattern, as machine code is long."""
    tool = cuobjdump()
    assert tool is not None
    command = [tool, what, "-arch", f"sm_{arch}", str(path)]
    if only is None:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    with subprocess.Popen(command, stdout=subprocess.PIPE) as source:
        found = subprocess.run(
            ["grep", "-oE", only], stdin=source.stdout, capture_output=True, text=True
        )
    return found.stdout


def resource_usage(text: str) -> dict[str, tuple[int, int, int]]:
    """Registers, bytes of stack, and bytes of static shared memory of each kernel."""
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    return {m[0]: (int(m[1]), int(m[2]), int(m[3])) for m in re.findall(pattern, text)}


def launch_bounds(text: str) -> dict[str, int]:
    """Threads of a block at most, of each kernel that says so."""
    sections = re.split(r"^\.nv\.info\.(\S+)$", text, flags=re.MULTILINE)
    found = {}
    for name, body in zip(sections[1::2], sections[2::2], strict=True):
        value = re.search(r"EIATTR_MAX_THREADS\s.*?Value:\s+(\w+) (\w+) (\w+)", body, re.DOTALL)
        if value:
            x, y, z = (int(v, 16) for v in value.groups())
            found[name] = x * y * z
    return found


def ptxas_report(text: str, arch: str) -> dict[str, tuple[int, list[str]]]:
    """Of each kernel the bytes that were spilled, and what ptxas warned of."""
    found: dict[str, tuple[int, list[str]]] = {}
    pattern = r"Compiling entry function '(\S+)' for 'sm_(\w+)'"
    parts = re.split(pattern, text)
    for name, target, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        if target == arch:
            spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", body)
            found[name] = (sum(map(int, spills.groups())) if spills else 0, [])
    for line in text.splitlines():
        complaint = re.search(r"(warning|Performance Loss).*", line)
        for name in found:
            if complaint and f"'{name}'" in line:
                found[name][1].append(complaint[0].replace(f"'{name}'", "it"))
    return found


def instructions(text: str) -> dict[str, set[str]]:
    """The instructions that a rule asks about, of each kernel."""
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if line.startswith("Function : "):
            here = found.setdefault(line.removeprefix("Function : "), set())
        else:
            here.add(line)
    return found


def demangled(names: Sequence[str]) -> dict[str, str]:
    """As "kernel<type, 8>": without namespaces, return type and parameters."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    done = subprocess.run(
        [tool], input="\n".join(names), capture_output=True, text=True, check=True
    )
    short = {}
    for name, text in zip(names, done.stdout.splitlines(), strict=True):
        text = re.sub(r"\w+::|\(anonymous namespace\)::", "", text).removeprefix("void ")
        short[name] = re.sub(r"\(.*", "", re.sub(r"\((\w+)\)(\d+)", r"\1 \2", text))
    return short


if __name__ == "__main__":
    sys.exit(main())
