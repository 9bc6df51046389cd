"""Which kernel runs a convolution on a GPU: the default, measured choices, and what is admitted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from resnet_fused.backends import cuda_conv, gpu_kernels, native_cuda
from resnet_fused.backends.triton import support
from resnet_fused.backends.triton.configs import BY_NAME, CONFIGS, SHARED_BYTES, candidates
from resnet_fused.conv_choice import LIBRARY, ConvProblem
from resnet_fused.ops import gpu_choice
from resnet_fused.ops.gpu_choice import Kind

HALF = torch.float16
X = torch.empty(8, 64, 56, 56, dtype=HALF, device="meta", memory_format=torch.channels_last)
WEIGHT = torch.empty(64, 64, 3, 3, dtype=HALF, device="meta")
GEOMETRY = ([1, 1], [1, 1], [1, 1], 1)
PROBLEM = gpu_choice.conv_problem(X.shape, WEIGHT.shape, *GEOMETRY)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A pretended GPU, and the choices that were measured on it."""
    measured: dict[str, str] = {}
    monkeypatch.setattr(support, "architecture", lambda device: 90)
    monkeypatch.setattr(gpu_choice, "_measured", lambda device: measured)
    gpu_choice._chosen.cache_clear()
    yield measured
    gpu_choice._chosen.cache_clear()


def choose(kind: Kind = "inference") -> str:
    return gpu_choice.choose(kind, X, WEIGHT, *GEOMETRY)


def test_the_library_is_the_default(hopper: dict[str, str]) -> None:
    assert choose() == LIBRARY
    hopper["another problem"] = "triton_64x64x64"
    assert choose() == LIBRARY


KINDS: tuple[Kind, ...] = ("inference", "train_output", "train_behind_norm", "train_input")


def test_the_gradient_of_a_tensor_has_compiled_kernels_only(
    monkeypatch: pytest.MonkeyPatch, hopper: dict[str, str]
) -> None:
    monkeypatch.setattr(native_cuda, "available", True)
    monkeypatch.setattr(native_cuda, "code_for", lambda capability: capability)
    kind: Kind = "train_tensor_input"
    names = gpu_choice.admitted(kind, PROBLEM, HALF, 90)
    assert "wgmma_256x64" in names and not set(names) & set(BY_NAME)
    hopper[gpu_choice.key(kind, PROBLEM, HALF)] = "wgmma_256x64"
    assert choose(kind) == "wgmma_256x64"
    with gpu_choice.only_triton():
        assert choose(kind) == LIBRARY


def test_the_gradient_of_a_tensor_is_no_stem(
    monkeypatch: pytest.MonkeyPatch, hopper: dict[str, str]
) -> None:
    """Though the turned convolution reads three channels: a stem's weight is packed as it is."""
    monkeypatch.setattr(native_cuda, "available", True)
    monkeypatch.setattr(native_cuda, "code_for", lambda capability: capability)
    last = replace(PROBLEM, out_channels=3)
    assert cuda_conv.STEM.name not in gpu_choice.admitted("train_tensor_input", last, HALF, 90)
    weight = torch.empty(3, PROBLEM.channels, 3, 3, dtype=HALF)
    geometry: Any = GEOMETRY
    assert gpu_choice.choose("train_tensor_input", X, weight, *geometry) == LIBRARY


@pytest.mark.parametrize("kind", KINDS)
def test_a_measured_choice_is_taken(kind: Kind, hopper: dict[str, str]) -> None:
    hopper[gpu_choice.key(kind, PROBLEM, HALF)] = "triton_64x64x64"
    assert choose(kind) == "triton_64x64x64"
    assert all(choose(other) == LIBRARY for other in KINDS if other != kind)


def test_tiles_are_for_channels_last_only(hopper: dict[str, str]) -> None:
    """What they return is channels_last, as eager PyTorch's output would not be."""
    hopper[gpu_choice.key("inference", PROBLEM, HALF)] = "triton_64x64x64"
    contiguous = X.contiguous()
    assert gpu_choice.choose("inference", contiguous, WEIGHT, *GEOMETRY) == LIBRARY


def test_what_is_asked_is_collected(hopper: dict[str, str]) -> None:
    hopper[gpu_choice.key("inference", PROBLEM, HALF)] = "triton_64x64x64"
    with gpu_choice.asked() as found:
        assert choose() == LIBRARY == choose("train_input")
    assert found == {("inference", PROBLEM), ("train_input", PROBLEM)}
    assert choose() == "triton_64x64x64"


@pytest.mark.parametrize(
    "name", ["", "rm -rf", "triton_1x1x1", "triton_tma_128x64x64", "winograd4"]
)
def test_a_poisoned_choice_is_ignored(name: str, hopper: dict[str, str]) -> None:
    """TMA is for 1x1 convolutions only; the others are no names here."""
    hopper[gpu_choice.key("inference", PROBLEM, HALF)] = name
    assert choose() == LIBRARY


def test_what_cannot_be_is_not_admitted() -> None:
    def names(kind: Kind, dtype: torch.dtype = HALF, arch: int = 90, **changes: object) -> set[str]:
        values = {f: getattr(PROBLEM, f) for f in PROBLEM.__dataclass_fields__} | changes
        return set(gpu_choice.admitted(kind, ConvProblem(**values), dtype, arch))  # type: ignore[arg-type]

    library = {LIBRARY}
    assert len(names("train_input")) > 3 and len(names("train_output")) > 3
    assert names("train_input", stride=(2, 2)) == library
    assert names("train_input", groups=2) == library
    assert names("train_input", padding=(3, 3)) == library
    assert names("train_output", torch.float32) == library
    assert names("inference", batch=2**20, size=(56, 56)) == library
    one = {"kernel": (1, 1), "padding": (0, 0)}
    assert {n for n in names("inference", **one) if "tma" in n}
    assert not {n for n in names("inference", arch=80, **one) if "tma" in n}
    assert not {n for n in names("inference", channels=63, **one) if "tma" in n}
    wide = {**one, "channels": 256, "out_channels": 256}
    assert {n for n in names("inference", **wide) if "tma" in n}
    assert not {n for n in names("inference", groups=2, **wide) if "tma" in n}
    narrow = names("inference", out_channels=16) & set(BY_NAME)
    assert narrow and all(BY_NAME[n].block_n <= 32 for n in narrow)


def test_tiles_fit_every_chip() -> None:
    for arch, limit in SHARED_BYTES.items():
        for itemsize in (2, 4):
            found = candidates(PROBLEM, itemsize, arch, "tf32")
            assert found and all(c.shared_bytes(itemsize) <= limit for c in found)


def test_compiled_convolutions_fit_every_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_cuda, "available", True)
    monkeypatch.setattr(native_cuda, "code_for", lambda capability: capability)
    one = replace(PROBLEM, kernel=(1, 1), padding=(0, 0), out_channels=256)

    def names(arch: int, problem: ConvProblem = one, dtype: torch.dtype = HALF) -> set[str]:
        return set(gpu_choice.admitted("inference", problem, dtype, arch)) & set(cuda_conv.BY_NAME)

    assert {"mma_128x64", "mma_128x128", "wgmma_256x64", "pingpong_256x64"} <= names(90)
    assert names(80) == names(100) == {"mma_128x64", "mma_128x128"}
    assert names(89) == names(86) == {"mma_128x64"}  # 99 KiB a block
    wide = replace(PROBLEM, size=(4, 200))
    assert "mma_128x64" not in names(89, wide) and "mma_128x64" in names(90, wide)
    tall = replace(PROBLEM, kernel=(2, 1), padding=(0, 0))  # of two taps three stages are ahead
    assert "mma_128x64" not in names(89, tall) and "mma_128x64" in names(90, tall)
    monkeypatch.setattr(gpu_choice, "precision", lambda dtype: "ieee")
    assert not names(90, dtype=torch.float32)
    monkeypatch.setattr(gpu_choice, "precision", lambda dtype: "tf32")
    assert {"mma_128x64", "wgmma_256x64"} <= names(90, dtype=torch.float32)
    assert names(90, replace(one, channels=12), torch.float32) and not names(
        90, replace(one, channels=12)
    )


def test_compiled_convolutions_have_no_other_activations(
    monkeypatch: pytest.MonkeyPatch, hopper: dict[str, str]
) -> None:
    """In training; Triton's have all."""
    monkeypatch.setattr(native_cuda, "available", True)
    monkeypatch.setattr(native_cuda, "code_for", lambda capability: capability)
    monkeypatch.setattr(gpu_kernels, "unusable", lambda tensor: None)
    for kind in ("train_behind_norm", "train_input"):
        hopper[gpu_choice.key(cast(Kind, kind), PROBLEM, HALF)] = "wgmma_256x64"
    geometry: Any = GEOMETRY
    both = gpu_choice.choose_training(X, WEIGHT, geometry, act="relu6")
    assert both == ("wgmma_256x64", "wgmma_256x64", LIBRARY)
    assert gpu_choice.choose_training(X, WEIGHT, geometry, act="silu") == (LIBRARY,) * 3


def test_precision_follows_torchs_switches() -> None:
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = True
        assert gpu_choice.precision(torch.float32) == "tf32"
        key = gpu_choice.key("inference", PROBLEM, torch.float32)
        torch.backends.cudnn.allow_tf32 = False
        assert gpu_choice.precision(torch.float32) == "ieee"
        assert gpu_choice.key("inference", PROBLEM, torch.float32) != key
        assert gpu_choice.precision(torch.float16) == "ieee"
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_a_named_backend_is_never_the_library(hopper: dict[str, str]) -> None:
    with gpu_choice.only_triton():
        assert choose() in BY_NAME
        hopper[gpu_choice.key("inference", PROBLEM, HALF)] = "triton_64x64x64"
        gpu_choice._chosen.cache_clear()
        assert choose() == "triton_64x64x64"
        many = torch.empty(2**20, 64, 64, 64, dtype=HALF, device="meta")
        with pytest.raises(RuntimeError, match="triton"):
            gpu_choice.choose("inference", many, WEIGHT, *GEOMETRY)
    gpu_choice._chosen.cache_clear()
    hopper.clear()
    assert choose() == LIBRARY


def test_names_are_distinct() -> None:
    assert len({c.name for c in CONFIGS}) == len(CONFIGS)
    assert LIBRARY not in BY_NAME


def test_support_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cpu" in (support.unusable(torch.empty(1)) or "")
    monkeypatch.setattr(support, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(support, "_unsupported", lambda device: None)
    assert support.unusable(torch.empty(1)) is None
    assert "float64" in (support.unusable(torch.empty(1, dtype=torch.float64)) or "")
    monkeypatch.setattr(support, "missing", lambda: "the package triton is not installed")
    assert support.unusable(torch.empty(1)) == "the package triton is not installed"
