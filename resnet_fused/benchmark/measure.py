"""Time and memory of several callables, fairly: in turns, after a pause and an untimed call.

The threads of OpenMP and of ONNX Runtime go on spinning for a while after a call and halve the
speed of whatever runs next. So before each timed call comes a pause, in which the last one's
threads fall asleep, and one untimed call, which wakes this one's and brings its weights back. A GPU
needs no pause; there short calls are timed several at once, because it idles until the first one's
launch arrives.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

Call = Callable[[], object]

PAUSE_S = 0.1  # libgomp and ONNX Runtime spin for less than this

_SHORT_MS = 2.0  # a call on a GPU that takes less is timed several at once,
_SAMPLE_MS = 10.0  # so many that the sample takes this


@dataclass(frozen=True)
class Timing:
    """Median and 20 % / 80 % quantiles, in milliseconds, of so many samples."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int


def summarise(samples_ms: list[float]) -> Timing:
    """The quantiles of `samples_ms`, linearly interpolated.

    Raises:
        ValueError: if there are none.
    """
    if not samples_ms:
        raise ValueError("samples_ms must hold at least one time, got none")
    quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    values = torch.quantile(torch.tensor(samples_ms, dtype=torch.float64), quantiles)
    median, p20, p80 = values.tolist()
    return Timing(median, p20, p80, samples=len(samples_ms))


def interleave(
    calls: Mapping[str, Call],
    *,
    repeats: int,
    device: torch.device,
    pause_s: float | None = None,
    limit_s: float = math.inf,
    on_sample: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing]:
    """Time `calls` in turns (A B C A B C ...), `repeats` times each.

    Args:
        pause_s: before each sample; None is :data:`PAUSE_S` on the CPU and nothing on a GPU.
        limit_s: no further round begins after so many seconds, though never fewer than three (or
            `repeats`) rounds are made.
        on_sample: told the name after each timed call, for a progress bar.

    Raises:
        ValueError: if `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    on_gpu = device.type == "cuda"
    if pause_s is None:
        pause_s = 0.0 if on_gpu else PAUSE_S
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.monotonic() + limit_s
    for done in range(repeats):
        if done >= 3 and time.monotonic() > end:
            break
        for name, call in calls.items():
            time.sleep(pause_s)
            first = time_once(call, device=device)
            count = calls_a_sample(first) if on_gpu else 1
            samples[name].append(time_once(call, device=device, count=count))
            on_sample(name)
    return {name: summarise(times) for name, times in samples.items()}


def recorded(call: Call, device: torch.device) -> Call:
    """`call` as a CUDA graph, which no Python slows down; itself where it cannot be one.

    It must have run before, so that nothing is compiled or chosen while it is recorded. Its tensors
    live as long as what is returned: a graph reads them and keeps none.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph):
            call()
    except RuntimeError:  # it waits for the GPU
        torch.cuda.synchronize(device)
        return call

    def replay(kept: Call = call) -> None:
        graph.replay()

    return replay


def calls_a_sample(call_ms: float) -> int:
    """How many calls that take so long on a GPU make one sample."""
    return 1 if call_ms >= _SHORT_MS else math.ceil(_SAMPLE_MS / max(call_ms, 1e-3))


def time_once(call: Call, *, device: torch.device, count: int = 1) -> float:
    """Milliseconds of one call, as the mean of `count` in a row.

    By the wall clock on the CPU, by events on the stream on a GPU.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            for _ in range(count):
                call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / count
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) * 1e3 / count


@contextlib.contextmanager
def tensor_float_32(allowed: bool) -> Iterator[None]:
    """In here a GPU may, or may not, round what float32 convolutions and products multiply.

    PyTorch's own default is the one for convolutions and the other for products.
    """
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = allowed
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def peak_memory(call: Call, *, device: torch.device) -> int | None:
    """Bytes that one call of `call` holds, at most, above what was held before it.

    On a GPU the caching allocator counts them. On Linux they are the growth of the resident set,
    after free memory was given back to the system, so memory that a library keeps between calls
    does not show. None elsewhere.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not _reset_peak():
        return None
    before = _status_bytes("VmRSS")
    call()
    return max(_status_bytes("VmHWM") - before, 0)


def saved_bytes(model: nn.Module, forward: Call) -> int:
    """Bytes that autograd keeps between forward and backward, parameters and buffers not counted.

    Each storage is counted once, however many tensors look into it. The result of `forward` is
    dropped.
    """
    own = {
        tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())
    }
    held: dict[int, torch.UntypedStorage] = {}  # keeps each alive, so that no address comes back

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(storage.nbytes() for storage in held.values())
    del result
    return total


def require_memory(needed: int) -> None:
    """Refuse what main memory cannot hold: Linux would grant it and then kill the process.

    Raises:
        MemoryError: if fewer than `needed` bytes are available (where Linux tells).
    """
    try:
        available = _field_bytes(Path("/proc/meminfo").read_text(), "MemAvailable")
    except (OSError, ValueError):
        return
    if needed > available:
        gib = 1024**3
        raise MemoryError(
            f"this needs {needed / gib:.1f} GiB of memory, {available / gib:.1f} GiB are free"
        )


def _reset_peak() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to VmRSS
    except (OSError, AttributeError):
        return False
    return True


def _status_bytes(field: str) -> int:
    return _field_bytes(Path("/proc/self/status").read_text(), field)


def _field_bytes(text: str, field: str) -> int:
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024  # the kernel writes kB
    raise ValueError(f"no field {field}")
