"""What is measured, and what came out: the records that the rest of this package passes on."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch

Mode = Literal["inference", "training"]

MODES = ("inference", "training")
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,  # multiplied as TensorFloat-32, on a GPU; fp32 is not
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class BenchmarkError(Exception):
    """Something the user asked for cannot be done; the message is one line that says why."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question: how fast is `model` at this batch, size, dtype and device?

    Raises:
        BenchmarkError: if a value is out of range, or the device is not there.
    """

    model: str
    mode: Mode = "inference"
    device: str = "cpu"
    dtype: str = "fp32"
    batch_size: int = 16
    image_size: int = 224
    threads: int = 1

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise BenchmarkError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.dtype not in DTYPES:
            raise BenchmarkError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for name in ("batch_size", "image_size", "threads"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise BenchmarkError(f"{name} must be a whole number, got {value!r}")
            if value < 1:
                raise BenchmarkError(f"{name} must be at least 1, got {value}")
        check_device(self.device)
        if self.dtype == "tf32" and not self.on_gpu:
            raise BenchmarkError("tf32 is a precision of GPUs; on the CPU use dtype fp32")

    @property
    def on_gpu(self) -> bool:
        """Whether it is measured on a CUDA device."""
        return torch.device(self.device).type == "cuda"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of what convolutions read and write."""
        return DTYPES[self.dtype]

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype that autocast gives a training step, whose parameters stay float32."""
        lower = self.mode == "training" and self.torch_dtype != torch.float32
        return self.torch_dtype if lower else None

    @property
    def data_dtype(self) -> torch.dtype:
        """The dtype of parameters and images."""
        return torch.float32 if self.mode == "training" else self.torch_dtype


@dataclass(frozen=True, kw_only=True)
class Result:
    """One variant of one case; without a speed if it did not run or is wrong: `error` says why.

    `peak_memory_bytes` is the most that one call held above what was held before it, None where
    that cannot be measured; `saved_bytes` (training) is what is kept between forward and
    backward.
    """

    model: str
    mode: str
    device: str
    dtype: str
    batch_size: int
    image_size: int
    threads: int
    variant: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    samples: int | None = None
    images_per_second: float | None = None
    speedup_vs_eager: float | None = None
    relative_error: float | None = None
    error_budget: float | None = None
    peak_memory_bytes: int | None = None
    saved_bytes: int | None = None
    first_call_ms: float | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them: an infinite or undefined number becomes null."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def of(cls, case: Case, variant: str, **values: Any) -> Result:
        """The result of `variant` in `case`."""
        shared = {field.name: getattr(case, field.name) for field in fields(case)}
        return cls(**shared, variant=variant, **values)


def check_device(name: str) -> torch.device:
    """The device called `name`, if this machine has it.

    Raises:
        BenchmarkError: if the name means nothing or the device is not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BenchmarkError(f"unknown device {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise BenchmarkError(f"device must be cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("device cuda: this torch sees no GPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BenchmarkError(f"device {name}: there are {torch.cuda.device_count()} GPUs")
    return device


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` is the way in which Python or torch says that memory has run out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator" in text or "out of memory" in text or "std::bad_alloc" in text
    )


def one_line(error: BaseException) -> str:
    """An exception in one line; one of ours speaks for itself, others show their type."""
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, BenchmarkError) else f"{type(error).__name__}: {text}"
