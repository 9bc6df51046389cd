"""The same bits every time: over repeats, addresses, numbers of threads, what ran before, what else
is in the batch, and processes; and of the CUDA kernels in whatever order their threads run.
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cuda_case import HAS_GPU, needs_cuda_kernels, operators
from cuda_conv_case import kernels, packed
from cuda_norm_case import bn_functions, scale_shift_functions
from determinism_case import ALGORITHMS, Names, Step, every_algorithm, network, pictures
from test_cuda_conv import Call
from test_cuda_pool import WINDOWS
from test_cuda_running_statistics import MOMENTUM, arguments
from test_cuda_train_conv import Case
from test_functional import bn_arguments, noise
from torch import Tensor

from resnet_fused import fuse
from resnet_fused.backends import native_conv

__all__ = ["every_algorithm"]  # a fixture

REPEATS = 100
THREADS = (1, 2, 3, 4)
DTYPES = [
    pytest.param(
        dtype,
        id=str(dtype),
        marks=pytest.mark.skipif(
            native_conv.unusable(dtype) is not None, reason=str(native_conv.unusable(dtype))
        ),
    )
    for dtype in (torch.float32, torch.bfloat16)
]
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
EVERY_MODE = pytest.mark.parametrize("mode", ["evaluation", "training", "low memory"])


def step(mode: str, dtype: torch.dtype) -> Step:
    memory = "low" if mode == "low memory" else "default"
    model = fuse(network(strassen=mode == "evaluation"), memory=memory)
    if mode != "evaluation":
        return Step(model.train(), dtype)
    return Step(model.eval().to(dtype), dtype)


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def disturbed(run: Step, repeats: int) -> Iterator[None]:
    """Before each repeat other memory is taken; sometimes the pool is emptied, or others run."""
    source = random.Random(repeats)
    taken: list[Tensor] = []
    for i in range(repeats):
        taken.append(torch.full((source.randint(1, 300_000),), float("nan")))
        del taken[: -source.randint(1, 9)]
        if i % 7 == 3:
            torch.ops.resnet_fused._pool_release()
        if i % 20 == 11:
            run(pictures(seed=i, size=(source.randint(30, 50), 41)))
        yield


@pytest.mark.usefixtures("every_algorithm")
@EVERY_MODE
@EVERY_DTYPE
def test_repeats_on_any_number_of_threads(dtype: torch.dtype, mode: str) -> None:
    """The weights' gradients alone may be others on another number of threads."""
    if mode == "low memory" and dtype == torch.bfloat16:
        pytest.skip("float32 shows what it computes again")
    run, x = step(mode, dtype), pictures()
    results = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        results.append(run(x))
        for _ in disturbed(run, REPEATS):
            assert not differing(run(x), results[-1])
    parameters = dict(run.model.named_parameters())
    for result in results[1:]:
        for name in differing(result, results[0]):
            assert parameters[name.removeprefix("grad ")].dim() == 4, f"{name} follows the threads"


@pytest.mark.usefixtures("every_algorithm")
@EVERY_DTYPE
def test_what_is_tested_is_everything(dtype: torch.dtype) -> None:
    """Guard of this file: the network reaches all algorithms and operators of the CPU."""
    found = {}
    for mode in ("evaluation", "training"):
        with Names() as found[mode]:
            step(mode, dtype)(pictures())
    half = dtype == torch.bfloat16
    packs = set(ALGORITHMS) - {"winograd2_late", "winograd3_late"}
    late = {"winograd2", "winograd3", "winograd2_late", "winograd3_late"}
    assert found["evaluation"].algorithms == packs - (
        {"strassen", "winograd4_late"} if half else {"winograd3"}
    )
    assert found["training"].algorithms == {"direct", "winograd4", "winograd4_late"} | (
        late if half else set()
    )
    assert found["evaluation"].operators >= {
        "_packed_convs", "_max_pool2d", "_average_pixels", "scale_shift_act",
    }  # fmt: skip
    assert found["training"].operators >= {
        "_train_block", "_train_block_backward", "_train_conv", "_train_conv_backward",
        "_train_pool", "_train_pool_sums", "_update_running_statistics", "bn_act",
        "bn_act_backward", "bn_act_backward_sums", "bn_act_backward_input", "batch_statistics",
        "normalize_act",
    }  # fmt: skip


@pytest.mark.usefixtures("every_algorithm")
@pytest.mark.parametrize("threads", [1, 3])
@EVERY_DTYPE
def test_an_image_does_not_see_its_neighbours(dtype: torch.dtype, threads: int) -> None:
    """Nor where in a batch it stands, nor that others are not finite."""
    torch.set_num_threads(threads)
    run = step("evaluation", dtype)
    alone, others = pictures(), pictures(seed=1)
    expected = run(alone)["y"]
    for i in range(3):
        for place in range(3):
            for value in (1.0, 1e4, float("nan"), float("inf")):
                batch = others * value
                batch[place] = alone[i]
                assert torch.equal(run(batch)["y"][place], expected[i]), (i, place, value)


def digest() -> str:
    """Of all bits of an evaluation and a training step."""
    found = hashlib.sha256()
    for mode in ("evaluation", "training"):
        for name, value in sorted(step(mode, torch.float32)(pictures()).items()):
            found.update(name.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()


def test_another_process_has_the_same_bits() -> None:
    """With other addresses and hashes, and without the pool of memory."""
    torch.set_num_threads(2)
    done = subprocess.run(
        [sys.executable, "-c", "import torch; torch.set_num_threads(2)\n"
         "import test_determinism; print(test_determinism.digest())"],
        env={**os.environ, "RESNET_FUSED_POOL_BYTES": "0", "PYTHONHASHSEED": "7"},
        cwd=Path(__file__).parent, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.stdout.split()[-1:] == [digest()], done.stderr[-3000:]


# --- the CUDA kernels, whose threads the emulator runs in any order --------------------


def convolutions(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> Iterator[Tensor]:
    """In evaluation: every kernel, stems too."""
    for shape in ("odd", "grouped", "7x7 stem"):
        if dtype == torch.float32 and "stem" in shape:
            continue
        call = Call(shape, dtype)
        for name in kernels(shape, monkeypatch, dtype=dtype):
            yield packed(call.weight, call.problem.groups, name)
            yield call.ours(name, call.scale, call.shift, call.residual, "relu", 0.0)


def training_convolutions(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> Iterator[Tensor]:
    """Forward, with statistics, and the input's gradient, with a batch norm's sums."""
    case = Case("odd", dtype)
    for name in kernels("odd", monkeypatch, "train_behind_norm"):
        yield from case.forward(name)
    for name in kernels("odd", monkeypatch, "train_output"):
        yield from case.forward(name, norm=False)
    for name in kernels("odd", monkeypatch, "train_input"):
        yield from case.backward(name)


def passes(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> Iterator[Tensor]:
    """Batch norm forward and backward, whole and in halves, with scale and shift, in rows and
    planes, and running statistics.
    """
    for layout in ("nhwc", "nchw"):
        x, weight, bias, residual = args = bn_arguments((4, 8, 17, 13), dtype, layout, True)
        yield scale_shift_functions("silu")[0](*args)
        leaves = [a.requires_grad_() for a in args if a is not None]
        y, mean, var = bn_functions("relu")[0](*leaves)
        yield from (y.detach(), mean, var, *torch.autograd.grad(y, leaves, y.detach()))
        x, weight, bias, residual = (t.detach() for t in (x, weight, bias, residual))
        yield from operators().batch_statistics(x)
        rest = (mean, var, weight, bias, 1e-5, "relu", 0.0)
        yield operators().normalize_act(x, residual, *rest)
        _, *sums = operators().bn_act_backward_sums(x, x, None, None, *rest, False)
        yield from sums
        yield operators().bn_act_backward_input(x, x, *rest[:4], *sums, *rest[4:], 884)
    running, counters, batch, factors = arguments(torch.float32)
    operators()._update_running_statistics(running, counters, batch, factors, MOMENTUM)
    yield from running


def pools(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> Iterator[Tensor]:
    """A stem's, by itself and behind its batch norm, and the way back."""
    window = list(WINDOWS["stem"])
    z = noise(3, 24, 13, 11, dtype=dtype).to(memory_format=torch.channels_last)
    vectors = [noise(24, seed=s).abs() for s in (1, 2, 3, 4)]
    options = (0.1, "relu", 0.0, window)
    yield operators()._max_pool2d(z, *(window[i : i + 2] for i in (0, 2, 4, 6)))
    y, places = operators()._train_pool(z, vectors, *options)
    grad = noise(*y.shape, dtype=dtype, seed=5).to(memory_format=torch.channels_last)
    sums = operators()._train_pool_sums(grad, places, z, vectors, *options)
    yield from (y, places, *sums)
    yield operators()._train_pool_input(grad, places, z, vectors, *sums, *options, 429)
    yield operators()._max_unpool(grad, places, z, window)


@needs_cuda_kernels
@pytest.mark.skipif(HAS_GPU, reason="orders are the emulator's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [convolutions, training_convolutions, passes, pools])
def test_cuda_kernels_in_any_order_of_threads(
    family: Callable[..., Iterator[Tensor]], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family is training_convolutions and dtype == torch.float32:
        pytest.skip("training's convolutions have no kernel for float32")
    results: dict[str, list[Tensor]] = {}
    try:
        for order in ("forward", "reverse", "random:1", "random:2", "random:3"):
            operators()._set_order(order)
            results[order] = list(family(monkeypatch, dtype))
    finally:
        operators()._set_order(os.environ.get("RESNET_FUSED_CUDA_ORDER", "forward"))
    first = results["forward"]
    assert first
    for order, result in results.items():
        for i, (a, b) in enumerate(zip(result, first, strict=True)):
            assert torch.equal(a, b), f"number {i} of {family.__name__} depends on {order}"
