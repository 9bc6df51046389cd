"""Floors, operators and profiles of ``make gpu``: what is counted, what is demanded of a figure."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_layers  # noqa: E402
import gpu_operators  # noqa: E402
import gpu_profile  # noqa: E402
import roofline  # noqa: E402

from resnet_fused.benchmark import BenchmarkError  # noqa: E402

CPU = torch.device("cpu")
H200 = roofline.Ceilings(790e12, 4.3e12)

# --- floors


@pytest.fixture(scope="module")
def resnet50() -> list[roofline.Layer]:
    return roofline.network_layers("resnet50", batch_size=256)


@pytest.mark.parametrize(
    ("stage", "unfused", "epilogue", "arithmetic"),
    [
        ("layer1", 14.4, 5.0, 1.7),
        ("layer2", 10.9, 4.7, 2.6),
        ("layer3", 7.7, 4.2, 3.7),
        ("layer4", 2.2, 2.1, 2.1),
    ],
)
def test_floors_of_resnet50(
    resnet50: list[roofline.Layer], stage: str, unfused: float, epilogue: float, arithmetic: float
) -> None:
    """Microseconds an image on an H200, as they were counted by hand."""
    floors = roofline.Floors.of([x for x in resnet50 if x.stage == stage], H200)
    found = [1e6 * s / 256 for s in (floors.unfused, floors.epilogue, floors.arithmetic)]
    assert found == pytest.approx([unfused, epilogue, arithmetic], abs=0.055)  # of two digits


def test_layers_are_those_of_the_network(resnet50: list[roofline.Layer]) -> None:
    assert len(resnet50) == 53
    assert sum(layer.flops for layer in resnet50) / 256 == pytest.approx(8.18e9, rel=0.01)
    assert sum(layer.residual for layer in resnet50) == 16
    assert sum(layer.act == "none" for layer in resnet50) == 4  # the projections
    assert [layer.name for layer in resnet50 if layer.reads_image] == ["conv1"]


def test_passes_of_training(resnet50: list[roofline.Layer]) -> None:
    same = next(x for x in resnet50 if x.name == "layer1.1.conv2")
    assert same.input_bytes == same.output_bytes
    for total, passes in ((same.eager_training_bytes, 19), (same.fused_training_bytes, 9)):
        assert total == passes * same.output_bytes + 3 * same.weight_bytes


def test_groups_divide_the_work() -> None:
    layers = roofline.network_layers("resnext50_32x4d", batch_size=1, dtype="tf32")
    grouped = next(x for x in layers if x.problem.groups == 32)
    assert grouped.flops == 2 * 128 * 56 * 56 * 9 * 4 and grouped.itemsize == 4


def test_roofline_prints_layers_and_sums(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["roofline.py", "resnet18", "--batch-size", "2"])
    assert roofline.main() == 0
    text = capsys.readouterr().out
    assert "layer4.1.conv2" in text and "blocks" in text and "790 TFLOP/s" in text
    monkeypatch.setattr(sys, "argv", ["roofline.py", "resnet51"])
    assert roofline.main() == 2 and "unknown model" in capsys.readouterr().err


# --- operators


@pytest.fixture(scope="module")
def small() -> list[roofline.Layer]:
    return roofline.network_layers("resnet50", batch_size=6, image_size=64)


@pytest.mark.parametrize("operator", gpu_operators.OPERATORS)
def test_operators_agree_with_pytorch(operator: str, small: list[roofline.Layer]) -> None:
    subjects = gpu_operators.subjects(operator, small)
    assert sum(subject.count for subject in subjects) == len(small)
    for subject in subjects[:5]:  # with and without activation and residual
        arguments = gpu_operators.arguments(subject, CPU, "bf16")
        error, budget = gpu_operators.errors(subject, arguments, "bf16")
        assert 0 < error <= budget < 0.05, subject


def test_bytes_of_operators(resnet50: list[roofline.Layer]) -> None:
    last = next(layer for layer in resnet50 if layer.name == "layer1.0.conv3")
    passes = {"scale_shift_act": 3, "bn_act": 4, "bn_act_backward": 7}
    for operator, count in passes.items():
        assert gpu_operators.Subject(operator, last).bytes == count * last.output_bytes
    whole = gpu_operators.Subject("conv_bn_act", last)
    assert whole.floor_s(H200) == last.floor_s(H200) and whole.flops == last.flops


@pytest.mark.parametrize("what", ["right", "wrong", "raises"])
def test_a_wrong_operator_gets_no_speed(
    monkeypatch: pytest.MonkeyPatch, small: list[roofline.Layer], what: str
) -> None:
    real = gpu_operators.run

    def spoiled(subject: Any, arguments: Any) -> Any:
        if what == "raises":
            raise RuntimeError("no kernel")
        return tuple(y * (1.1 if what == "wrong" else 1.0) for y in real(subject, arguments))

    monkeypatch.setattr(gpu_operators, "run", spoiled)
    monkeypatch.setattr(
        gpu_layers,
        "argument_sets",
        lambda subject, device, dtype: [gpu_operators.arguments(subject, device, dtype)],
    )
    monkeypatch.setattr(gpu_layers, "time_calls", lambda calls, device: 2.0)
    rows = gpu_layers.measure_operator("conv_bn_act", small[:2], H200, CPU, "bf16")
    for row in rows:
        if what == "right":
            assert row.error is None and row.milliseconds == row.library_conv_ms == 2.0
            assert row.of_floor == row.floor_ms / 2.0
        else:
            assert row.error is not None and what[:5] in row.error + "raises"
            assert row.milliseconds is None and row.of_floor is None
    gpu_layers.print_rows(rows, "title")


# --- profile


def test_what_can_be_profiled(resnet50: list[roofline.Layer]) -> None:
    (layer,) = gpu_profile.subjects("layer1.0.conv1", resnet50)
    assert layer.operator == "conv_bn_act" and layer.layer.name == "layer1.0.conv1"
    assert len(gpu_profile.subjects("bn_act", resnet50)) == 16
    with pytest.raises(BenchmarkError, match="unknown name 'layer9'"):
        gpu_profile.subjects("layer9", resnet50)


def test_kernels_are_read_from_a_trace() -> None:
    def event(name: str, dur: float, **details: Any) -> dict[str, Any]:
        return {"cat": "kernel", "name": name, "dur": dur, "args": details}

    details = {"block": [128, 1, 1], "registers per thread": 96, "shared memory": 40000}
    trace = {
        "traceEvents": [
            {"cat": "cpu_op", "name": "conv", "dur": 1000},
            event("short", 1.0),
            event("long", 10.0, **details),
            event("long", 14.0, **details),
        ]
    }
    long, short = gpu_profile.kernels_of(trace, calls=2)
    assert long == gpu_profile.Kernel("long", 12.0, 128, 96, 40000)
    assert short == gpu_profile.Kernel("short", 0.5)
    assert gpu_profile.kernels_of({"traceEvents": []}, calls=1) == []


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "expected"),
    [
        (128, 32, 0, 1.0),
        (128, 255, 0, 2 * 128 / 2048),
        (256, 64, 0, 0.5),
        (128, 32, 100 << 10, 2 * 128 / 2048),
        (32, 16, 0, 0.5),  # no more than 32 blocks
    ],
)
def test_occupancy(threads: int, registers: int, shared: int, expected: float) -> None:
    """Of an H200's multiprocessor, by NVIDIA's occupancy calculator."""
    h200 = types.SimpleNamespace(
        warp_size=32, max_threads_per_multi_processor=2048,
        shared_memory_per_multiprocessor=228 << 10,
    )  # fmt: skip
    kernel = gpu_profile.Kernel("k", 1.0, threads, registers, shared)
    assert gpu_profile.occupancy(kernel, h200) == expected
