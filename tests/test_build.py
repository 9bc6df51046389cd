"""The compiled library: it is there, its instruction sets agree, its memory is bounded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from resnet_fused.backends import native
from resnet_fused.ops import schema

ops = getattr(torch.ops, schema.NAMESPACE)
needs_native = pytest.mark.skipif(not native.available, reason=str(native.reason))
MEBIBYTE = 1 << 20

STATISTICS_OF_FIXED_DATA = """
import torch
from resnet_fused.backends import native
x = torch.linspace(-3, 3, 4 * 20 * 9 * 9).view(4, 20, 9, 9)
total = 0.0
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    y, mean, var = torch.ops.resnet_fused.bn_act(x.to(dtype), None, None, None, 1e-5, "silu", 0.0)
    total += y.double().square().sum().item() + mean.sum().item() + var.sum().item()
print(native.isa(), total)
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@needs_native
def test_library_is_loaded_with_its_kernels():
    assert native.reason is None
    assert native.isa() in ("avx512_bf16", "avx512", "avx2", "baseline")
    for name in ("bn_act", "bn_act_backward", "scale_shift_act"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{schema.NAMESPACE}::{name}", "CPU")


@needs_native
def test_instruction_sets_can_be_forced_and_agree():
    order = ("baseline", "avx2", "avx512", "avx512_bf16")
    results = {}
    for isa in order[: order.index(native.isa()) + 1]:
        done = run_python(STATISTICS_OF_FIXED_DATA, RESNET_FUSED_CPU_ISA=isa)
        assert done.returncode == 0, done.stderr
        name, total = done.stdout.split()
        assert name == isa
        results[isa] = float(total)
    assert max(results.values()) - min(results.values()) < 1e-5 * results["baseline"]


@needs_native
def test_unknown_instruction_set_is_an_error():
    done = run_python(STATISTICS_OF_FIXED_DATA, RESNET_FUSED_CPU_ISA="mmx")
    assert done.returncode != 0
    assert (
        "RESNET_FUSED_CPU_ISA must be avx512_bf16, avx512, avx2 or baseline, got 'mmx'"
        in done.stderr
    )


def test_package_works_without_the_library_and_does_not_warn():
    done = run_python(
        "import torch, resnet_fused\n"
        "from resnet_fused.backends import native\n"
        "assert not native.available and 'RESNET_FUSED_NO_NATIVE' in native.reason\n"
        "x = torch.randn(2, 3, 4, 4)\n"
        "torch.ops.resnet_fused.bn_act(x, None, None, None, 1e-5, 'relu', 0.0)\n",
        RESNET_FUSED_NO_NATIVE="1",
    )
    assert done.returncode == 0, done.stderr
    assert "resnet_fused runs without" not in done.stderr


def test_missing_library_warns_once_and_says_what_to_do():
    done = run_python(
        "import pathlib\n"
        "glob = pathlib.Path.glob\n"
        "pathlib.Path.glob = lambda p, pattern, **k: "
        "iter(()) if pattern.startswith('_C_cpu') else glob(p, pattern, **k)\n"
        "import resnet_fused\n"
        "from resnet_fused.backends import native\n"
        "assert not native.available and native.reason.startswith('not built')\n",
        RESNET_FUSED_NO_NATIVE="",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("resnet_fused runs without its compiled CPU kernels") == 1
    assert "pip install --no-build-isolation" in done.stderr


@pytest.fixture
def empty_pool():
    ops._pool_release()
    yield
    ops._pool_release()


@needs_native
def test_pool_keeps_a_dead_output_and_uses_it_again(empty_pool):
    first = ops._pool_zeros([2, 64, 64, 64], torch.float32)
    address = first.data_ptr()
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert not first.any()
    first.fill_(7)
    del first
    assert ops._pool_idle_bytes() == 2 * MEBIBYTE
    second = ops._pool_zeros([2, 64, 64, 64], torch.float32)
    assert second.data_ptr() == address
    assert not second.any()
    assert ops._pool_idle_bytes() == 0
    third = ops._pool_zeros([2, 64, 64, 64], torch.float32)
    assert third.data_ptr() != address, "the second is in use"


@needs_native
def test_pool_leaves_small_outputs_to_torch_and_large_blocks_to_large_requests(empty_pool):
    small = ops._pool_zeros([1, 1, 8, 8], torch.float32)
    del small
    assert ops._pool_idle_bytes() == 0
    big = ops._pool_zeros([1, 64, 256, 256], torch.float32)
    del big
    idle = ops._pool_idle_bytes()
    assert idle == 16 * MEBIBYTE
    small = ops._pool_zeros([1, 64, 128, 128], torch.float32)
    assert ops._pool_idle_bytes() == idle
    del small
    ops._pool_release()
    assert ops._pool_idle_bytes() == 0


@needs_native
@pytest.mark.parametrize(("limit", "expected"), [(4 * MEBIBYTE, 4 * MEBIBYTE), (0, 0)])
def test_pool_is_bounded(limit: int, expected: int):
    done = run_python(
        "import torch, resnet_fused\n"
        "ops = torch.ops.resnet_fused\n"
        "live = [ops._pool_zeros([1, 64, 64, 128], torch.float32) for _ in range(5)]\n"
        "del live\n"
        "print(ops._pool_idle_bytes())\n",
        RESNET_FUSED_POOL_BYTES=str(limit),
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == expected


@needs_native
def test_pool_gives_a_clear_error_when_memory_runs_out():
    with pytest.raises(RuntimeError, match="cannot allocate"):
        ops._pool_zeros([1 << 12, 1 << 12, 1 << 12, 1 << 12], torch.float32)


@needs_native
def test_pool_works_in_a_forked_child():
    code = (
        "import os, torch, resnet_fused\n"
        "torch.set_num_threads(1)\n"
        "ops = torch.ops.resnet_fused\n"
        "del_me = ops._pool_zeros([2, 64, 64, 64], torch.float32)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    del_me = ops._pool_clone(del_me + 1)\n"
        "    os._exit(0 if del_me.eq(1).all() else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_pool_clone_keeps_values_and_strides_and_max_abs_sees_everything(dtype: torch.dtype):
    x = torch.randn(4, 32, 64, 65).to(dtype)
    for tensor in (x, x.contiguous(memory_format=torch.channels_last), x.permute(2, 0, 3, 1)):
        copy = ops._pool_clone(tensor)
        assert torch.equal(copy, tensor)
        assert copy.stride() == tensor.stride()
        assert copy.data_ptr() != tensor.data_ptr()
    sliced = x[:, 3:7, ::2]
    assert torch.equal(ops._pool_clone(sliced), sliced)
    assert ops._max_abs(sliced) == sliced.abs().max().item()
    assert ops._max_abs(x) == x.abs().max().item()
    x[1, 2, 3, 4] = -float("inf")
    assert ops._max_abs(x) == float("inf")
    x[3, 2, 1, 0] = float("nan")
    assert ops._max_abs(x) != ops._max_abs(x)
    assert ops._max_abs(x[:0]) == 0.0
