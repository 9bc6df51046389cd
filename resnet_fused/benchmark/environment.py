"""What a measurement depends on besides the code: versions, processor, threads, GPUs, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

# The instruction sets that decide how fast convolutions are.
_FLAGS = [
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "sve",
    "bf16",
    "i8mm",
]
_PACKAGES = ("triton", "torchvision", "timm", "onnxruntime", "openvino", "rich", "matplotlib")


def environment() -> dict[str, Any]:
    """Everything above as a dictionary that JSON can hold; what is not known is None."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "resnet_fused": _version("resnet_fused"),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": _cpu_model(),
        "cpu_features": _cpu_features(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "isa": _native_isa(),
        "threads": torch.get_num_threads(),
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
    }


def backends() -> dict[str, dict[str, Any]]:
    """For each backend: `usable`, `reason` (None if usable) and `cost`, what is lost without it."""
    from resnet_fused.backends import native, native_cuda
    from resnet_fused.backends.triton import support

    no_gpu = None if torch.cuda.is_available() else "this torch sees no GPU"
    reasons = {
        "reference": None,
        "native": None if native.available else native.reason,
        "native_cuda": native_cuda.reason or no_gpu or native_cuda.unusable(0),
        "triton": no_gpu or support.unusable(torch.empty(0, device="cuda")),
    }
    costs = {
        "reference": None,
        "native": "fused modules run as plain PyTorch operators on the CPU: correct, not faster",
        "native_cuda": "none here" if no_gpu else "on the GPU Triton's kernels run, or none",
        "triton": "none here" if no_gpu else "fused modules run as eager PyTorch on the GPU",
    }
    return {
        name: {
            "usable": reason is None,
            "reason": reason,
            "cost": None if reason is None else costs[name],
        }
        for name, reason in reasons.items()
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this package lies in, with "-dirty" if files were changed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _cpu_model() -> str | None:
    return _cpuinfo().get("model name") or platform.processor() or None


def _cpu_features() -> list[str]:
    info = _cpuinfo()
    present = set(info.get("flags", info.get("Features", "")).split())
    return [flag for flag in _FLAGS if flag in present]


def _native_isa() -> str | None:
    """The instruction set that the compiled kernels chose; None without them."""
    from resnet_fused.backends import native

    return native.isa() if native.available else None


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
    }
