"""NVIDIA's compute-sanitizer over a few tests of every CUDA kernel: `make gpu SANITIZE=1`.

    python benchmarks/sanitize_gpu.py [--tools memcheck,racecheck,synccheck] [--seconds 240]

compute-sanitizer comes with the CUDA toolkit; it is taken from beside nvcc, else from PATH. Each
tool runs the tests (TESTS) once more, in one process, and looks at this library's kernels alone:

* memcheck: accesses out of bounds and misaligned ones; wgmma's operands in shared memory too;
* racecheck: races in shared memory, those of cp.async, bulk copies and a missing fence.proxy.async
  among them. By its manual wgmma is a matter of memcheck and synccheck: a tile that is overwritten
  while wgmma reads it is not promised to be found, nor is any race in global memory;
* synccheck: barriers, mbarriers, and wgmma that not all warps of a warpgroup reach alike.

The options are those of compute-sanitizer 2023.3 and later. By its release notes racecheck follows
bulk copies since 2024.4 and fences before them since 2026.4, and up to 2026.3 releases took false
alarms about mbarriers and warpgroups away: what an old one reports of conv_wgmma may be one.

Exit status 1 if a tool found something, did not finish in time or could not run; 0 without a GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import setup_cuda
from resnet_fused.backends import native_cuda

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck")

# Of compute-sanitizer where it found errors and the tests none; pytest's go up to 5.
FOUND = 86
# mbarriers that a block may have. conv_wgmma.cuh's 40 are arrays, which the compiler's own count,
# the default, may miss.
BARRIERS = 64
# Of a kernel's mangled name.
OUR_KERNELS = "12resnet_fused4cuda"

# Small, as a tool makes them 10 to 100 times slower. They reach every kernel: by 16 bytes and by
# single numbers, in rows and in planes.
_CONV = "tests/test_cuda_conv.py::test_every_kernel"
_TRAIN = "tests/test_cuda_train_conv.py"
_OPS = "tests/test_cuda_ops.py"
_POOL = "tests/test_cuda_pool.py"
TESTS = (
    *(
        f"{_CONV}[{shape}-torch.float16]"
        for shape in ("3x3", "odd", "stride2", "1x1", "grouped", "7x7 stem", "3x3 stem")
    ),
    f"{_CONV}[3x3 stride2 stem-torch.bfloat16]",
    *(f"{_CONV}[{shape}-torch.float32]" for shape in ("3x3", "stride2")),
    *(f"{_TRAIN}::test_forward[{shape}-torch.bfloat16]" for shape in ("odd", "stride2", "1x1")),
    *(f"{_TRAIN}::test_gradient_of_the_input[{shape}-torch.float16]" for shape in ("odd", "1x1")),
    *(
        f"{_OPS}::test_norm_shapes[{shape}-torch.{dtype}-{layout}]"
        for shape, dtype in (("odd", "float32"), ("many channels", "float16"), ("row", "bfloat16"))
        for layout in ("nchw", "nhwc")
    ),
    f"{_OPS}::test_scale_shift_act[torch.bfloat16-silu-nhwc]",
    f"{_POOL}::test_gradient[torch.float16-stem]",
    f"{_POOL}::test_pool_of_an_activation[torch.bfloat16-relu-stem]",
    "tests/test_cuda_running_statistics.py::test_every_dtype[torch.float32]",
)


def find_sanitizer() -> str | None:
    """compute-sanitizer beside nvcc, or in PATH; None if there is none."""
    nvcc = setup_cuda.find_nvcc()
    beside = []
    if nvcc is not None:
        folders = (Path(nvcc).parent, Path(nvcc).resolve().parent)
        beside = [str(folder / "compute-sanitizer") for folder in folders]
    tries = [*beside, "compute-sanitizer"]
    return next((found for t in tries if (found := shutil.which(t))), None)


def command(sanitizer: str, tool: str, tests: Sequence[str]) -> list[str]:
    """The tool over the tests, in this Python."""
    options = [
        "--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "application-only",
        "--kernel-name", f"kns={OUR_KERNELS}", "--num-callers-host", "8",
    ]  # fmt: skip
    if tool == "memcheck":
        # Without a gap an access beyond one tensor is one to the next. Errors of calls are left to
        # torch and our launches, which raise them.
        options += ["--padding", "128", "--report-api-errors", "no"]
    else:
        options += ["--num-cuda-barriers", str(BARRIERS)]
    # The options of pytest in pyproject.toml need plug-ins that may be missing.
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-o", "addopts=-ra", "--durations=3"]
    return [sanitizer, *options, *pytest, *tests]


def environment(tool: str) -> dict[str, str]:
    """Under memcheck each tensor is an allocation of CUDA's, with bounds of its own."""
    own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    return {**os.environ, **own}


def run(sanitizer: str, tool: str, seconds: float, tests: Sequence[str] = TESTS) -> str | None:
    """What is wrong, or None."""
    process = subprocess.Popen(
        command(sanitizer, tool, tests), env=environment(tool), cwd=ROOT, start_new_session=True
    )
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        end(process)
        return f"took over {seconds:g} s"
    except BaseException:
        end(process)
        raise
    if status == FOUND:
        return "found errors"
    return None if status == 0 else f"failed, or its tests did (status {status})"


def end(process: subprocess.Popen[bytes], grace: float = 20.0) -> None:
    """All of it, tool and tests; first they may say how far they have come."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(timeout=grace)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> int:
    """Run the tools one after another; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", default=",".join(TOOLS), help="of compute-sanitizer")
    parser.add_argument("--seconds", type=float, default=240, help="for each tool")
    args = parser.parse_args()
    me = "benchmarks/sanitize_gpu.py:"
    tools = args.tools.split(",")
    if unknown := [tool for tool in tools if tool not in TOOLS]:
        parser.error(f"--tools must be of {', '.join(TOOLS)}, got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        print(me, "this torch sees no GPU; nothing to run")
        return 0
    if not native_cuda.available:
        print(me, f"there are no compiled kernels to look at: {native_cuda.reason}")
        return 1
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print(me, "compute-sanitizer is missing, neither beside nvcc nor in PATH (CUDA's toolkit")
        print("has it, as have conda's cuda-sanitizer-api and PyPI's nvidia-cuda-sanitizer-api)")
        return 1
    told = []
    for tool in tools:
        print(me, tool, flush=True)
        begin = time.monotonic()
        wrong = run(sanitizer, tool, args.seconds)
        told.append((tool, wrong, time.monotonic() - begin))
    for tool, wrong, took in told:
        print(me, f"{tool} {wrong or 'found nothing'}, in {took:.0f} s")
    return int(any(wrong for _, wrong, _ in told))


if __name__ == "__main__":
    sys.exit(main())
