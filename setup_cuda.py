"""Compiles csrc/cuda/*.cu: what setup.py, the Makefile and benchmarks/gate_cuda.py share.

    python setup_cuda.py    # resnet_fused/_C_cuda.abi3.so of this checkout

nvcc is called directly. torch's CUDAExtension wants a torch with CUDA; these files need only its
headers, which every torch has, so that they are compiled wherever nvcc is, for the GPUs that
RESNET_FUSED_CUDA_ARCHS names or all.

One object for each file lies in ``build/cuda``, with what it was made from and what ptxas said of
it beside it; only what has changed is compiled again, several files at a time.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent
TORCH = Path(torch.__file__).parent
TORCH_2_11 = "0x020b000000000000"

ARCHITECTURES = ("80", "89", "90a", "100+PTX")
"""Ampere, Ada, Hopper with wgmma, Blackwell; PTX that a driver compiles for what comes later."""

# compute-sanitizer and profilers name lines with NVCC_APPEND_FLAGS=-lineinfo; it doubles objects.
FLAGS = (
    "-std=c++17", "-O3", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_2_11}ull",
    "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v",
)  # fmt: skip


class CompileError(Exception):
    """The command, and what nvcc said."""


def find_nvcc() -> str | None:
    """nvcc by CUDACXX, CUDA_HOME, CUDA_PATH, PATH, or in /usr/local/cuda; None if there is none."""
    named = os.environ.get("CUDACXX")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    tries = [named, *(h and f"{h}/bin/nvcc" for h in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for t in tries if t and (found := shutil.which(t))), None)


def missing() -> str | None:
    """What the build lacks, or None."""
    if find_nvcc() is None:
        return "no CUDA compiler (nvcc not found; set CUDACXX or CUDA_HOME to name one)"
    host = os.environ.get("NVCC_CCBIN") or _named_compiler() or "g++"
    if shutil.which(host) is None:
        return f"no C++ compiler for nvcc to call ({host!r} not found; set CXX to name one)"
    return None


def architectures(nvcc: str) -> tuple[str, ...]:
    """What to compile for: RESNET_FUSED_CUDA_ARCHS, as "90a" or "80 100+PTX" or "native", this
    machine's first GPU; else all of ARCHITECTURES that nvcc knows.
    """
    wanted = re.split(r"[\s,;]+", os.environ.get("RESNET_FUSED_CUDA_ARCHS", "").strip())
    if wanted == ["native"]:
        wanted = ["{}{}".format(*torch.cuda.get_device_capability(0))]
    if wanted != [""]:
        # Without the letter there is no wgmma, and the kernels that use it would be empty.
        return tuple("90a" if arch == "90" else arch for arch in wanted)
    known = _output(nvcc, "--list-gpu-code").split()
    return tuple(a for a in ARCHITECTURES if f"sm_{_number(a).rstrip('a')}" in known)


def compile_objects(nvcc: str, archs: Sequence[str], jobs: int | None = None) -> list[Path]:
    """The objects of all files, compiled where they are not up to date.

    Raises:
        CompileError: nvcc failed.
    """
    folder = ROOT / "build" / "cuda" / "-".join(a.replace("+", "") for a in archs)
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"), key=lambda p: -p.stat().st_size)
    version = _output(nvcc, "--version") + os.environ.get("NVCC_APPEND_FLAGS", "")
    commands = {folder / f"{s.stem}.o": _command(nvcc, archs, s) for s in sources}
    stale = [o for o, command in commands.items() if not _is_fresh(o, command, version)]
    jobs = jobs or int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    threads = max(1, jobs // max(1, len(stale)))

    def compile_one(target: Path) -> None:
        print(f"nvcc {target.stem}.cu ({', '.join(archs)})", flush=True)
        command, part = commands[target], target.with_suffix(f".{os.getpid()}.part")
        deps = target.with_suffix(".d")
        options = ["-MD", "-MF", deps, "-MT", target.name, f"--threads={threads}", "-o", part]
        target.unlink(missing_ok=True)
        begin = time.time_ns()
        done = subprocess.run([*command, *options], capture_output=True, text=True)
        said = done.stdout + done.stderr
        target.with_suffix(".log").write_text(said)
        for line in said.splitlines():
            if "warning" in line or "Performance Loss" in line:
                print(line, flush=True)
        if done.returncode != 0:
            part.unlink(missing_ok=True)
            raise CompileError(f"{shlex.join(map(str, command))}\n{errors_of(said)}")
        target.with_suffix(".command").write_text(_key(command, version))
        os.utime(part, ns=(begin, begin))  # what is edited meanwhile counts as newer
        part.replace(target)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compile_one, stale))
    return sorted(commands)


def link(nvcc: str, objects: Sequence[Path], library: Path) -> None:
    """Put the objects into a shared library, which finds the rest of torch where it is loaded.

    CUDA's runtime is inside, with none of its names visible: torch may bring another version.
    """
    library.parent.mkdir(parents=True, exist_ok=True)
    part = library.with_name(f".{library.name}.{os.getpid()}.part")
    command = [
        nvcc, "-shared", "--cudart=static", *_host_compiler(), *objects, "-o", part,
        f"-L{TORCH / 'lib'}", "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10",
        "-Xlinker=--exclude-libs,ALL",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise CompileError(
            f"{shlex.join(map(str, command))}\n{errors_of(done.stdout + done.stderr)}"
        )
    part.replace(library)  # a process that has it loaded keeps the old one


def errors_of(said: str) -> str:
    """What nvcc said, without what ptxas tells of kernels that are right."""
    return "\n".join(line for line in said.splitlines() if not line.startswith("ptxas info"))


def _command(nvcc: str, archs: Sequence[str], source: Path) -> list[str]:
    includes = [f"-I{TORCH / path}" for path in ("include", "include/torch/csrc/api/include")]
    generate = []
    for arch in archs:
        number = _number(arch)
        code = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
        generate.append(f"-gencode=arch=compute_{number},code={code}")
    flags = [*FLAGS, *generate, *_host_compiler(), *includes]
    if "--compress-mode" in _help(nvcc):  # from CUDA 12.8 on; a third of the bytes
        flags.append("--compress-mode=size")
    return [nvcc, "-c", str(source), *flags]


@functools.cache
def _help(nvcc: str) -> str:
    return _output(nvcc, "--help")


def _host_compiler() -> list[str]:
    named = _named_compiler()
    return [f"-ccbin={named}"] if named and "NVCC_CCBIN" not in os.environ else []


def _named_compiler() -> str | None:
    """Of CXX, which may be "ccache g++ -m64", the compiler."""
    words = [w for w in os.environ.get("CXX", "").split() if not w.startswith("-")]
    return words[-1] if words else None


def _number(arch: str) -> str:
    return arch.removesuffix("+PTX")


def _is_fresh(target: Path, command: Sequence[str], version: str) -> bool:
    """Whether an object was made by this command, after the last change of every file it read."""
    try:
        if target.with_suffix(".command").read_text() != _key(command, version):
            return False
        made = target.stat().st_mtime_ns
        depends = target.with_suffix(".d").read_text().partition(":")[2].replace("\\\n", " ")
        return all(os.stat(path).st_mtime_ns <= made for path in shlex.split(depends))
    except OSError:
        return False


def _key(command: Sequence[str], version: str) -> str:
    return "\n".join([*map(str, command), version])


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def build(library: Path) -> None:
    """All of it.

    Raises:
        CompileError: nvcc failed.
    """
    nvcc = find_nvcc()
    assert nvcc is not None  # as missing() has told
    link(nvcc, compile_objects(nvcc, architectures(nvcc)), library)


def main() -> int:
    """Build the library in place; 1 if nvcc fails, 0 without a compiler, as nothing needs it."""
    reason = missing()
    if reason is not None:
        print(f"setup_cuda.py: nothing is built: {reason}")
        return 0
    begin, library = time.monotonic(), ROOT / "resnet_fused" / "_C_cuda.abi3.so"
    try:
        build(library)
    except CompileError as error:
        print(error)
        return 1
    print(f"setup_cuda.py: {library.name}, in {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
