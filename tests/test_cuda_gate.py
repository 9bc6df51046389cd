"""Every CUDA kernel compiles for every chip, without a GPU, and its code is as it must be."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

import gate_cuda as gate  # noqa: E402

import setup_cuda  # noqa: E402

reason = setup_cuda.missing() or (None if gate.cuobjdump() else "no cuobjdump")
needs_nvcc = pytest.mark.skipif(reason is not None, reason=str(reason))

WRONG = """
#include <cstdint>
namespace resnet_fused::cuda {
__global__ void __launch_bounds__(64) local_kernel(const float* x, float* y, int n) {
  float v[40];
  for (int i = 0; i < 40; ++i) v[i] = x[i];
  v[n] = 3;
  for (int i = 0; i < 40; ++i) y[i] = v[i * n % 40];
}
__device__ void many_numbers(const float* x, float* y, int n) {
  float v[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) v[i] = x[i * n];
  for (int k = 0; k < n; ++k) {
#pragma unroll
    for (int i = 0; i < 96; ++i) v[i] += v[95 - i];
  }
#pragma unroll
  for (int i = 0; i < 96; ++i) y[i * n] = v[i];
}
__global__ void __launch_bounds__(1024) spilling_kernel(const float* x, float* y, int n) {
  many_numbers(x, y, n);
}
__global__ void conv_mma_kernel(const float* x, float* y, int n) {
  many_numbers(x, y, n);
}
template <class T, int n>
__global__ void __launch_bounds__(256) normalize_kernel(const T* x, T* y, int m) {
  for (int i = 0; i < n; ++i) y[i * m] = x[i * m];
}
__global__ void __launch_bounds__(32) bytes_kernel(const uint8_t* x, uint8_t* y) {
  y[threadIdx.x] = x[threadIdx.x];
}
__global__ void __launch_bounds__(32) pool_kernel(const uint8_t* x, uint8_t* y) {
  y[threadIdx.x] = x[threadIdx.x];
}
template __global__ void normalize_kernel<float, 4>(const float*, float*, int);
template __global__ void normalize_kernel<float, 2>(const float*, float*, int);
}  // namespace resnet_fused::cuda
"""


@needs_nvcc
@pytest.mark.timeout(1500)
def test_gate(tmp_path: Path) -> None:
    file = tmp_path / "gate.csv"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/gate_cuda.py", "--csv", file],
        capture_output=True, text=True, timeout=1400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    rows = list(csv.DictReader(file.read_text().splitlines()))
    nvcc = setup_cuda.find_nvcc()
    assert nvcc is not None
    archs = {arch.removesuffix("+PTX") for arch in setup_cuda.architectures(nvcc)}
    assert {row["arch"] for row in rows} == archs
    assert {row["file"] for row in rows} <= {p.name for p in (ROOT / "csrc/cuda").glob("*.cu")}
    for promise in gate.PROMISES:  # every rule is about something
        assert any(gate.re.search(promise.name, row["kernel"]) for row in rows), promise
    assert {row["arch"] for row in rows if row["matrix_instruction"]} == archs


@needs_nvcc
def test_gate_finds_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rule broken once, in machine code that nvcc made."""
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    (folder / "wrong.cu").write_text(WRONG)
    monkeypatch.setattr(setup_cuda, "ROOT", tmp_path)
    nvcc = setup_cuda.find_nvcc()
    assert nvcc is not None
    (made,) = setup_cuda.compile_objects(nvcc, ("80",))
    rows = {row.kernel: row for row in gate.read(made, "80")}
    wrong = {name: "; ".join(row.wrong) for name, row in rows.items()}
    assert "bytes in local memory" in wrong["local_kernel"] and rows["local_kernel"].threads == 64
    assert "bytes spilled" in wrong["spilling_kernel"]
    assert "registers x 1024 threads, as it has no launch bounds" in wrong["conv_mma_kernel"]
    assert "no HMMA; no asynchronous copy of 16 bytes" in wrong["conv_mma_kernel"]
    assert wrong["normalize_kernel<float, 4>"] == "no load of 16 bytes; no store of 16 bytes"
    assert wrong["normalize_kernel<float, 2>"] == "" == wrong["pool_kernel"]
    assert wrong["bytes_kernel"] == "accesses of single bytes"


def test_what_ptxas_warns_of_is_wrong() -> None:
    said = """
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized \
due to insufficient register resources for the wgmma pipeline in the function '_Z1kv'
ptxas info    : Compiling entry function '_Z1kv' for 'sm_90a'
ptxas info    : Function properties for _Z1kv
    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
ptxas info    : Compiling entry function '_Z1kv' for 'sm_80'
ptxas info    : Function properties for _Z1kv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
    spilled, complaints = gate.ptxas_report(said, "90a")["_Z1kv"]
    assert spilled == 12 and "serialized" in complaints[0]
    assert gate.ptxas_report(said, "80")["_Z1kv"][0] == 0
