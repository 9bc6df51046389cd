"""Builds ``csrc/cuda`` for the CPU, and loads its operators.

>>> from cuda_on_cpu import build
>>> ops = build.load()  # torch.ops.resnet_fused_cuda_on_cpu
>>> ops.bn_act(input, None, None, None, 1e-5, "relu", 0.0)

Modes: ``plain``; ``watch``, which sees every access to memory, for races (``watch.cpp``); ``asan``,
with AddressSanitizer, for a process that was started with its library preloaded. ``make
sanitize-cuda`` runs all. ``RESNET_FUSED_CUDA_MODE`` names the one that is taken by default,
``RESNET_FUSED_CUDA_ORDER`` the order in which threads run: ``forward``, ``reverse`` or
``random:SEED``. Objects are kept under ``build/cuda_on_cpu/<mode>`` and made again when a file they
read has changed.

>>> ops._set_order("random:7")
>>> ops._only_blocks(1000, 1001)  # of every grid; (0, -1): all again
>>> ops._set_multiprocessors(1000)  # 0: three again

A kernel that does what it must not is a RuntimeError that names the thread and the line.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import fcntl
import functools
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KERNELS = ROOT / "csrc" / "cuda"
NAMESPACE = "resnet_fused_cuda_on_cpu"
TORCH_2_11 = "0x020b000000000000"

# Undefined behaviour becomes an error of the launch (undefined.cpp), in every mode.
UNDEFINED = "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"
COMMON = [
    "-std=c++17",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",  # as device code is compiled
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    f"-DTORCH_TARGET_VERSION={TORCH_2_11}",
]
# Of kernels, of the runtime, of linking. Compiling takes longer than running: no -O2.
MODES = {
    "plain": (["-O1", UNDEFINED], [], []),
    "asan": (
        ["-O1", UNDEFINED, "-fsanitize=address", "-fno-omit-frame-pointer"],
        ["-DRESNET_FUSED_ASAN"],
        ["-fsanitize=address"],
    ),
    "watch": (["-O1", UNDEFINED, "-fsanitize=thread"], ["-DRESNET_FUSED_WATCH"], []),
}


def compiler() -> str:
    return os.environ.get("CXX", "g++").split()[0]


def cuda_include() -> Path | None:
    """The toolkit's headers: those of nvcc, of CUDA_HOME or of Triton, which brings them along."""
    places = []
    if home := os.environ.get("CUDA_HOME"):
        places.append(Path(home) / "include")
    if nvcc := shutil.which("nvcc"):
        places.append(Path(nvcc).resolve().parents[1] / "include")
    places += sorted(Path("/usr/local").glob("cuda*/include"))
    with contextlib.suppress(ImportError):
        import triton

        places.append(Path(triton.__file__).parent / "backends" / "nvidia" / "include")
    return next((place for place in places if (place / "cuda_bf16.h").exists()), None)


def missing() -> str | None:
    """Why kernels cannot be built for the CPU here, or None."""
    if platform.machine() != "x86_64":
        return f"fibers are written for x86-64, this is {platform.machine()}"
    if shutil.which(compiler()) is None:
        return f"no C++ compiler ({compiler()!r} not found)"
    if cuda_include() is None:
        return "no CUDA headers (neither nvcc nor Triton brings cuda_bf16.h)"
    return None


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _newer_than(made: Path, sources: Iterable[Path]) -> bool:
    """Whether `made` is there and no source is newer; a source that has gone is newer."""
    if not made.exists():
        return False
    when = made.stat().st_mtime_ns
    return all(source.exists() and source.stat().st_mtime_ns <= when for source in sources)


def _dependencies(made: Path) -> list[Path] | None:
    """What the compiler noted that it read, or None."""
    note = made.with_suffix(".d")
    if not note.exists():
        return None
    return [Path(name) for name in note.read_text().replace("\\\n", " ").split()[1:]]


def _make(made: Path, command: list[str], sources: list[Path] | None) -> bool:
    """Runs the command, which writes `made`, unless it has been run on these sources."""
    note = made.with_suffix(made.suffix + ".command")
    text = " ".join(command)
    fresh = sources is not None and _newer_than(made, sources)
    if fresh and note.exists() and note.read_text() == text:
        return False
    made.unlink(missing_ok=True)
    started = time.time_ns()  # what is edited while the compiler runs counts as newer
    _run(command)
    os.utime(made, ns=(started, started))
    note.write_text(text)
    return True


def _object(source: Path, flags: list[str], directory: Path) -> Path:
    made = directory / f"{source.stem}{source.suffix.replace('.', '_')}.o"
    includes = [f"-I{HERE}"]
    for path in (*cpp_extension.include_paths(), cuda_include()):
        includes += ["-isystem", str(path)]
    command = [compiler(), "-x", "c++", *COMMON, *flags, *includes]
    command += ["-MMD", "-c", str(source), "-o", str(made)]
    _make(made, command, _dependencies(made))
    return made


def _objects(sources: Iterable[Path], flags: list[str], directory: Path) -> list[Path]:
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda source: _object(source, flags, directory), sources))


def _library(made: Path, objects: list[Path], link: list[str], *needs: Path) -> Path:
    command = [compiler(), "-shared", *link, "-o", str(made), *map(str, objects), *map(str, needs)]
    command += [f"-L{path}" for path in cpp_extension.library_paths()]
    command += ["-ltorch_cpu", "-ltorch", "-Wl,-rpath,$ORIGIN", "-Wl,-z,origin"]
    _make(made, command, [*objects, *needs])
    return made


@contextlib.contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """One process at a time, of all workers of a test run."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _directory(mode: str) -> Path:
    return ROOT / "build" / "cuda_on_cpu" / mode


def _runtime_objects(mode: str) -> list[Path]:
    _, flags, _ = MODES[mode]
    return _objects(sorted(HERE.glob("*.cpp")), ["-O3", *flags], _directory(mode))


def runtime(mode: str) -> Path:
    """The library that stands for the chip."""
    _, _, link = MODES[mode]
    directory = _directory(mode)
    with _only_one(directory):
        return _library(directory / "libcuda_on_cpu.so", _runtime_objects(mode), link)


def executable(mode: str, name: str, sources: Iterable[Path]) -> Path:
    """A program of kernels that needs no torch, so that it starts at once."""
    flags, _, link = MODES[mode]
    needs = runtime(mode)
    with _only_one(needs.parent):
        # The runtime first: its copy of what both compile is the one without a sanitizer.
        objects = [path for path in _runtime_objects(mode) if "operators" not in path.name]
        objects += _objects(sources, flags, needs.parent)
        made = needs.with_name(name)
        _make(made, [compiler(), *link, "-o", str(made), *map(str, objects), "-ldl"], objects)
    return made


def library(mode: str, name: str, sources: Iterable[Path]) -> Path:
    """A shared library of kernels."""
    needs = runtime(mode)
    flags, _, link = MODES[mode]
    with _only_one(needs.parent):
        objects = _objects(sources, flags, needs.parent)
        return _library(needs.with_name(f"lib{name}.so"), objects, link, needs)


def registered(source: Path) -> list[str]:
    """The operators that a file implements by RESNET_FUSED_OPERATORS."""
    blocks = re.findall(
        r"^RESNET_FUSED_OPERATORS\(m\) \{(.*?)^\}", source.read_text(), re.DOTALL | re.MULTILINE
    )
    return [name for block in blocks for name in re.findall(r'm\.impl\(\s*"(\w+)"', block)]


@functools.cache
def load(mode: str | None = None) -> Any:
    """``torch.ops.resnet_fused_cuda_on_cpu`` with every operator of ``csrc/cuda``."""
    import resnet_fused  # noqa: F401  defines the schemas

    mode = mode or os.environ.get("RESNET_FUSED_CUDA_MODE", "plain")
    sources = sorted(KERNELS.glob("*.cu"))
    path = library(mode, "kernels", sources)
    load_runtime(mode)
    fragment = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name in [name for source in sources for name in registered(source)]:
        schema = str(getattr(torch.ops.resnet_fused, name).default._schema)
        fragment.define(schema.removeprefix("resnet_fused::"))
    _kept.append(fragment)
    torch.ops.load_library(str(path))
    return getattr(torch.ops, NAMESPACE)


@functools.cache
def load_runtime(mode: str) -> Any:
    torch.ops.load_library(str(runtime(mode)))
    ops = getattr(torch.ops, NAMESPACE)
    ops._set_order(os.environ.get("RESNET_FUSED_CUDA_ORDER", "forward"))
    return ops


_kept: list[torch.library.Library] = []  # a library's operators go with it


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=MODES, default="plain")
    chosen = parser.parse_args().mode
    print(missing() or library(chosen, "kernels", sorted(KERNELS.glob("*.cu"))))
