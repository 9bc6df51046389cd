"""What runs CUDA kernels on the CPU (``cuda_on_cpu/``): its instructions are right, and planted
faults are found.

Three builds of it run the same kernels: ``plain``; ``watch``, which sees every access to memory;
``asan``, under AddressSanitizer.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_on_cpu import build

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))

ORDERS = ["forward", "reverse", "random:1", "random:2", "random:3"]
FAULTS = build.HERE / "faults"
ALL = {"plain", "watch", "asan"}

# By kernel: each fault, and by which of the builds it is found.
PLANTED: dict[str, dict[str, set[str]]] = {
    "statistics": {
        "shuffle_mask": ALL,
        "shuffle_in_branch": ALL,
        "divergent_barrier": ALL,
        "two_barriers": ALL,
        "barrier_threads": ALL,
        "barrier_without_a_warp": ALL,
        "no_barrier": ALL,
        "no_barrier_between_passes": ALL,
        "unguarded_load": {"asan"},
        "unguarded_store": {"asan"},
        "one_row_too_many": {"plain", "asan"},
        "misaligned_load": ALL,
        "index_of_registers": ALL,
        "short_shared": ALL,
    },
    "sparse_statistics": {"int_offset": ALL},
    "conv_mma": {
        "halo_off_by_one": ALL,
        "halo_too_small": ALL,
        "edge_of_the_image": ALL,
        "misaligned_copy": ALL,
        "misaligned_source": ALL,
        "no_zeros": ALL,
        "no_commit": ALL,
        "fragment_index": ALL,
        "no_sync_warp": ALL,
        "unguarded_tile": {"asan"},
        "misaligned_store": ALL,
        "one_stage_only": ALL,
        "one_group_too_few": ALL,
        "no_last_wait": ALL,
        "no_barrier_after_wait": ALL,
        "no_barrier_before_load": ALL,
        "stage_too_small": ALL,
    },
    "conv_wgmma": {
        "count_of_full": ALL,
        "count_of_empty": ALL,
        "no_init_done": ALL,
        "no_barrier_after_init": ALL,
        "stores_without_fence": {"watch"},
        "copy_over_stores": {"watch"},
        "fence_before_wait": ALL,
        "no_wait_for_weights": ALL,
        "no_fence_async": ALL,
        "too_few_bytes": ALL,
        "too_many_bytes": ALL,
        "misaligned_bulk": ALL,
        "bulk_size": ALL,
        "bulk_past_the_slot": ALL,
        "double_arrival": ALL,
        "no_wait_for_empty": ALL,
        "wrong_parity": ALL,
        "no_wait_for_full": ALL,
        "no_wgmma_fence": ALL,
        "tap_shift": ALL,
        "row_stride": ALL,
        "plane_stride": ALL,
        "three_warps_only": ALL,
        "no_wgmma_commit": ALL,
        "early_release": ALL,
        "no_wgmma_wait": ALL,
    },
    "pack_weights": {
        "column_order": ALL,
        "first_group_only": ALL,
        "unguarded_channels": ALL,
        "unguarded_outputs": {"asan"},
        "taps_left_out": ALL,
    },
}


@pytest.fixture(scope="module")
def ops() -> Any:
    build.load_runtime("plain")
    torch.ops.load_library(
        str(build.library("plain", "wrapper_kernels", [build.HERE / "wrapper_kernels.cu"]))
    )
    return torch.ops.cuda_on_cpu_test


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, ops: Any) -> Iterator[str]:
    control = getattr(torch.ops, build.NAMESPACE)
    control._set_order(request.param)
    yield request.param
    control._set_order("forward")


def test_every_name_of_the_hardware_is_here():
    names = r"^\s*(?:DEVICE_INLINE|inline|struct|using|const char\*)[^(){}=;]*?(\w+)\s*[(={;]"
    hardware = (build.KERNELS / "hardware.cuh").read_text()
    here = (build.HERE / "hardware_on_cpu.h").read_text()
    missing = {
        name
        for name in re.findall(names, hardware, re.MULTILINE)
        if not re.search(rf"\b{name}\b", here)
    }
    assert not missing


def test_threads_and_blocks_know_their_places(ops: Any, order: str):
    grid, block = (2, 3, 4), (5, 6, 7)
    out = torch.full((4, 3, 2, 7, 6, 5, 4, 3), -1, dtype=torch.int32)
    ops.indices(out, grid, block)
    for d, size in enumerate(block):
        places = torch.arange(size, dtype=torch.int32).view(
            [-1 if i == 2 - d else 1 for i in range(3)]
        )
        assert (out[..., 0, d] == places).all()
    for d, size in enumerate(grid):
        shape = [-1 if i == 2 - d else 1 for i in range(3)] + [1, 1, 1]
        assert (out[..., 1, d] == torch.arange(size, dtype=torch.int32).view(shape)).all()
    assert (out[..., 2, :] == torch.tensor(block, dtype=torch.int32)).all()
    assert (out[..., 3, :] == torch.tensor(grid, dtype=torch.int32)).all()


@pytest.mark.parametrize(
    ("grid", "block"),
    [((0, 1, 1), (1, 1, 1)), ((1, 1, 1), (32, 32, 2)), ((1, 65536, 1), (1, 1, 1))],
)
def test_launches_that_cuda_refuses(ops: Any, grid: tuple[int, ...], block: tuple[int, ...]):
    with pytest.raises(RuntimeError, match="invalid configuration argument"):
        ops.indices(torch.empty(1, dtype=torch.int32), grid, block)


def test_only_chosen_blocks_run_in_memory_that_is_not_there(ops: Any):
    control = getattr(torch.ops, build.NAMESPACE)
    pitch = 1 << 20
    out = torch.empty(5000 * pitch, dtype=torch.uint8)  # 5 GB, of which two pages are touched
    blocks = [4990, 4999]
    out[torch.tensor(blocks) * pitch] = 0
    control._only_blocks(4999, 5000)
    try:
        ops.mark(out, pitch)
    finally:
        control._only_blocks(0, -1)
    assert [int(out[i * pitch]) for i in blocks] == [0, 1]


def test_an_order_that_is_none(ops: Any):
    with pytest.raises(
        RuntimeError, match="order must be forward, reverse or random:SEED, got 'x'"
    ):
        getattr(torch.ops, build.NAMESPACE)._set_order("x")


def test_shuffles(ops: Any, order: str):
    x = torch.randn(96)
    rotated, swapped = torch.empty(96), torch.empty(96, dtype=torch.float64)
    ops.shuffles(x, rotated, swapped)
    assert torch.equal(rotated, x.view(3, 32).roll(-1, 1).flatten())
    assert torch.equal(swapped, x.view(3, 32)[:, torch.arange(32) ^ 5].flatten().double())


def test_a_shuffle_from_a_lane_that_is_not_there(ops: Any):
    x = torch.randn(20)
    with pytest.raises(RuntimeError, match=r"shuffle from lane \d+, .* \(wrapper_kernels.cu:\d+\)"):
        ops.shuffles(x, torch.empty(20), torch.empty(20, dtype=torch.float64))


def test_barriers_of_blocks_warps_and_some_threads(ops: Any, order: str):
    x = torch.randperm(256, dtype=torch.int32)
    out = torch.empty_like(x)
    ops.reversals(x, out)
    expected = x.flip(0).view(8, 32).flip(1).reshape(4, 64).flip(1).flatten()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_conversions(ops: Any, dtype: torch.dtype):
    x = torch.cat([torch.randn(500) * 100, torch.tensor([0.0, -0.0, 1e-7, -65504.0, 3e38, 1e-40])])
    x = torch.cat([x, torch.tensor([float("inf"), -float("inf")])])
    singles, pairs = torch.empty(508, dtype=dtype), torch.empty(254, dtype=torch.int32)
    back = torch.empty(508)
    ops.numbers(x, singles, pairs, back)
    assert torch.equal(singles, x.to(dtype))
    assert torch.equal(pairs.view(dtype), x.to(dtype))
    assert torch.equal(back, x.to(dtype).float())


def test_clamping_a_float32(ops: Any):
    x = torch.tensor([-3.0, -1.0, -0.5, -0.0, 2.0, 2.5, float("inf"), float("nan")])
    out = torch.empty_like(x)
    ops.clamp(x, out)
    assert torch.equal(out[:-1], x[:-1].clamp(-1, 2)) and out[-1].isnan()


def test_rounding_to_tf32(ops: Any):
    """To the nearest of the numbers with 10 bits of mantissa, the larger one if two are."""
    least, ulp = 2.0**-149, 2.0**-10
    ties = torch.tensor([1 + ulp / 2, 1 + 1.5 * ulp, 4096 * least, 4095 * least, 3.4028234e38])
    x = torch.cat([torch.randn(500) * 100, ties, torch.tensor([0.0, float("inf"), float("nan")])])
    x = torch.cat([x, -x[:-1]])
    out = torch.empty_like(x)
    ops.round(x, out)
    away = torch.tensor([1 + ulp, 1 + 2 * ulp, 8192 * least, 0.0, float("inf"), 0.0, float("inf")])
    assert torch.equal(out[500:507], away) and torch.equal(out[1008:], -away)
    assert torch.equal(out.signbit(), x.signbit()) and out[507].isnan()
    steps = ulp * torch.exp2(x[:500].frexp().exponent.double() - 1)
    assert torch.equal(out[:500].abs().double(), (x[:500].abs() / steps + 0.5).floor() * steps)
    assert torch.equal(out[508:1008], -out[:500])


def test_copies_in_groups(ops: Any, order: str):
    x = torch.randn(11, 64, 4)
    out = torch.empty_like(x)
    ops.copies(x, out, 64)
    x[2::3] = 0
    assert torch.equal(out, x)


@pytest.mark.parametrize("polls", [False, True])
def test_a_ring_of_bulk_copies(ops: Any, order: str, polls: bool):
    x = torch.randint(256, (20 * 1024,), dtype=torch.uint8)
    out = torch.empty_like(x)
    ops.ring(x, out, polls)
    assert torch.equal(out, x)


def test_polling_in_vain_ends(ops: Any, order: str):
    with pytest.raises(RuntimeError, match=r"deadlock: 64 threads.*wrapper_kernels.cu:\d+"):
        ops.poll_in_vain()


def test_registers_of_a_block(ops: Any, order: str):
    """168 a thread at the start, as 65536 leave for 384 in eights."""
    ops.registers(False)
    with pytest.raises(RuntimeError, match=r"deadlock: .* wait for registers of others"):
        ops.registers(True)
    ops.registers(False)


def test_ldmatrix(ops: Any, order: str):
    x = torch.randint(-(1 << 15), 1 << 15, (4, 8, 8), dtype=torch.int16)
    plain, transposed = (torch.empty(32, 4, dtype=torch.int32) for _ in range(2))
    ops.ldmatrix(x, plain, transposed)
    for out, matrices in ((plain, x), (transposed, x.mT)):
        # lane 4 r + q holds numbers 2 q and 2 q + 1 of row r
        assert torch.equal(
            out.view(torch.int16).view(8, 4, 4, 2).permute(2, 0, 1, 3).reshape(4, 8, 8), matrices
        )


def operands(rows: int, columns: int, depth: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Two factors, of float32 with low bits that TF32 does not read; their product."""
    a, b = (torch.randint(-8, 9, (n, depth)).to(dtype) for n in (rows, columns))
    product = a.float() @ b.float().T
    if dtype == torch.float32:
        for factor in (a, b):
            bits = factor.view(torch.int32)
            bits += torch.randint(1 << 13, bits.shape, dtype=torch.int32) * (factor != 0)
    return a, b, product


FACTORS = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", FACTORS, ids=str)
def test_mma(ops: Any, order: str, dtype: torch.dtype):
    a, b, product = operands(16, 8, 32 // dtype.itemsize, dtype)
    before = torch.randint(-8, 9, (16, 8)).float()
    d = before.clone()
    ops.multiply(a, b, d)
    assert torch.equal(d, before + product)


@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("dtype", FACTORS, ids=str)
def test_wgmma(ops: Any, order: str, columns: int, dtype: torch.dtype):
    a, b, product = operands(64, columns, 160 // dtype.itemsize, dtype)
    d = torch.empty(64, columns)
    ops.multiply(a, b, d)
    assert torch.equal(d, product)


@pytest.fixture(scope="module", params=sorted(ALL))
def program(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """A build, and the program that runs a kernel with a fault in it."""
    return request.param, build.executable(request.param, "try_fault", [FAULTS / "try_fault.cu"])


def outcome(program: Path, *words: str) -> str:
    done = subprocess.run(
        [program, *words],
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if report := re.search("ERROR: AddressSanitizer.*", done.stderr):
        return report.group(0)
    assert done.returncode == 0, f"{words}: a run after this one failed"
    return done.stdout.strip()


@pytest.mark.parametrize("kernel", PLANTED)
def test_nothing_is_found_in_kernels_without_a_fault(program: tuple[str, Path], kernel: str):
    mode, path = program
    for order in ORDERS if mode == "plain" else ORDERS[:3]:
        assert outcome(path, kernel, "none", order) == "right"


@pytest.mark.parametrize("kernel", PLANTED)
def test_every_planted_fault_is_found(program: tuple[str, Path], kernel: str):
    mode, path = program
    missed = []
    for fault, modes in PLANTED[kernel].items():
        # A watcher needs no luck with the order; the others may need a few.
        orders = ORDERS[:1] if mode == "watch" else ORDERS
        if mode in modes and all(outcome(path, kernel, fault, o) == "right" for o in orders):
            missed.append(fault)
    assert not missed


def test_every_planted_fault_is_listed():
    text = "".join(path.read_text() for path in FAULTS.glob("*.cuh"))
    named = {fault for faults in PLANTED.values() for fault in faults}
    assert set(re.findall(r'planted\("(\w+)"\)', text)) == named


@pytest.mark.parametrize(
    ("mode", "kernel", "fault", "message"),
    [
        ("plain", "conv_mma", "misaligned_copy", r"thread \(0, 0, 0\): .*\(conv_mma.cuh:\d+\)"),
        ("plain", "conv_wgmma", "count_of_empty", r"deadlock: .*lacks 1 of 5 arrivals"),
        (
            "watch",
            "conv_mma",
            "no_sync_warp",
            r"writes byte \d+ .*thread 0 reads \(conv_mma.cuh:\d+",
        ),
        (
            "watch",
            "conv_wgmma",
            "stores_without_fence",
            r"with no fence_async and barrier after it",
        ),
    ],
)
def test_messages_name_the_place(mode: str, kernel: str, fault: str, message: str):
    path = build.executable(mode, "try_fault", [FAULTS / "try_fault.cu"])
    assert re.search(message, outcome(path, kernel, fault, "forward"))
