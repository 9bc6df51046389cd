"""What ``make gpu`` runs, as far as it can be tried without a GPU: counting, order, resuming, and
what is done about failures.

One file for one program: its cases share the made-up results and GPU.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_cases  # noqa: E402
import gpu_layers  # noqa: E402
import gpu_operators  # noqa: E402
import gpu_profile  # noqa: E402
import gpu_summary  # noqa: E402
import roofline  # noqa: E402
from gpu_cases import Planned, Record  # noqa: E402

from resnet_fused import benchmark  # noqa: E402
from resnet_fused.benchmark import (  # noqa: E402
    BenchmarkError,
    Case,
    Result,
    measure,
    peers,
    prepare,
    run,
)
from resnet_fused.benchmark.inputs import random_images  # noqa: E402

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
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


# --- the matrix


def test_the_most_valuable_comes_first() -> None:
    names = [p.name for p in gpu_cases.planned_cases()]
    assert names[:3] == [
        "resnet50 inference bf16 b256", "resnet50 inference bf16 b1", "resnet50 training bf16 b256"
    ]  # fmt: skip
    plain = [name for name in names if not name.endswith("max-autotune")]
    assert len(set(names)) == len(names) == 2 * len(plain) == 2 * (5 * 3 * 5 + 5 * 2)
    assert all(p.name.startswith("resnet50") for p in gpu_cases.planned_cases("resnet50 "))


def test_each_case_has_its_peers() -> None:
    by_name = {p.name: p.variants for p in gpu_cases.planned_cases()}
    assert by_name["resnet18 inference fp16 b32"] == (
        "eager", "eager_channels_last", "eager_graph", "compile", "fused", "fused_graph"
    )  # fmt: skip
    assert "fused_graph" not in by_name["resnet18 inference fp16 b128"]
    assert by_name["resnet101 training bf16 b64"] == (
        "eager", "eager_channels_last", "compile", "fused", "fused_low"
    )  # fmt: skip
    assert by_name["resnet50 inference bf16 b1 max-autotune"] == (
        "eager", "compile_max_autotune", "fused", "fused_graph"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gpu_name", "commit", "name"),
    [
        ("NVIDIA H200", "65c87ff" + 33 * "0", "h200-2026-11-25-65c87ff.json"),
        ("NVIDIA H100 80GB HBM3", "1" * 40 + "-dirty",
         "h100-80gb-hbm3-2026-11-25-1111111-dirty.json"),
        ("NVIDIA GeForce RTX 4090", None, "geforce-rtx-4090-2026-11-25-unknown.json"),
    ],
)  # fmt: skip
def test_file_names(gpu_name: str, commit: str | None, name: str) -> None:
    assert gpu_cases.file_name(gpu_name, "2026-11-25T10:00:00+00:00", commit) == name


def result(planned: Planned, variant: str, ms: float | None, **values: Any) -> Result:
    rate = None if ms is None else 1e3 * planned.batch_size / ms
    return Result(
        model=planned.model, mode=planned.mode, device="cuda", dtype=planned.dtype,
        batch_size=planned.batch_size, image_size=224, threads=1, variant=variant, median_ms=ms,
        p20_ms=ms, p80_ms=ms, images_per_second=rate, **values,
    )  # fmt: skip


def results(planned: Planned) -> list[Result]:
    """Made up: the later in the list, the faster."""
    return [result(planned, v, 10.0 / (i + 1)) for i, v in enumerate(planned.variants)]


def test_a_second_run_goes_on(tmp_path: Path) -> None:
    planned = gpu_cases.planned_cases()[:4]
    path = tmp_path / "results.json"
    ran: list[str] = []

    def measured(case: Planned) -> list[Result]:
        written = json.loads(path.read_text())["cases"] if path.exists() else {}
        assert list(written) == ran  # each is in the file before the next begins
        ran.append(case.name)
        if case == planned[1] and len(ran) < 5:
            raise MemoryError("too large\nsecond line")
        return results(case)

    record = Record(path)
    assert gpu_cases.run_cases(planned, record, deadline=1e12, run=measured) == []
    assert ran == [case.name for case in planned]
    failed = record.data["cases"][planned[1].name]
    assert failed["error"] == "MemoryError: too large" and failed["results"] == []

    again = Record(path)
    assert [again.done(case.name) for case in planned] == [True, False, True, True]
    rerun: list[str] = []
    gpu_cases.run_cases(
        planned, again, deadline=1e12, run=lambda case: rerun.append(case.name) or results(case)
    )
    assert rerun == [planned[1].name]
    assert all(Record(path).done(case.name) for case in planned)


def test_no_case_starts_after_the_budget(tmp_path: Path) -> None:
    planned = gpu_cases.planned_cases()[:5]
    now = 0.0

    def measured(case: Planned) -> list[Result]:
        nonlocal now
        now += 40
        return results(case)

    record = Record(tmp_path / "results.json")
    left = gpu_cases.run_cases(planned, record, deadline=100.0, run=measured, clock=lambda: now)
    assert left == planned[3:] and now == 120
    assert [entry["seconds"] for entry in record.data["cases"].values()] == [40, 40, 40]


def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    for text in ("{}", "[]", "no"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(BenchmarkError, match=r"x\.json is not"):
            Record(tmp_path / "x.json")


def test_the_file_is_json_whatever_comes_out(tmp_path: Path) -> None:
    record = Record(tmp_path / "x.json")
    record.put("tuned", [{"milliseconds": {"a": float("inf"), "b": 1.0}}])
    assert Record(record.path).data["tuned"] == [{"milliseconds": {"a": None, "b": 1.0}}]


# --- the program


def program(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu.py", *arguments])
    return gpu.main()


def test_without_a_gpu_there_is_nothing_to_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program(monkeypatch) == program(monkeypatch, "--profile", "bn_act") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("nothing to run" in line for line in lines)


def test_a_dry_run_lists_the_cases(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program(monkeypatch, "--dry-run", "--cases", "resnet18 inference bf16") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "resnet18 inference bf16 b256: eager, eager_channels_last, compile, fused"
    assert len(lines) == 10


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """A GPU that does nothing, and what it was asked for."""
    asked: dict[str, list[str]] = {"cases": [], "tuned": [], "tables": []}

    def measured(case: Planned) -> list[Result]:
        asked["cases"].append(case.name)
        return results(case)

    def table(operator: str, layers: list[roofline.Layer], *_: Any) -> list[gpu_layers.Row]:
        asked["tables"].append(operator)
        subject = gpu_operators.subjects(operator, layers)[1]
        return [
            gpu_layers.Row(
                operator=operator, layer=subject.layer.name, count=2, shape=subject.shape,
                flops=subject.flops, bytes=subject.bytes, floor_ms=0.1, milliseconds=0.2,
            )
        ]  # fmt: skip

    def tune(self: gpu.Run, planned: list[Planned]) -> list[dict[str, Any]]:
        asked["tuned"] += [p.name for p in planned]
        return [{"chosen": "triton"}]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(roofline, "measured", lambda device, dtype: H200)
    monkeypatch.setattr(gpu_cases, "measure_case", measured)
    monkeypatch.setattr(gpu_layers, "measure_operator", table)
    monkeypatch.setattr(gpu.Run, "tune", tune)
    return asked


def test_a_whole_run(
    monkeypatch: pytest.MonkeyPatch,
    pretended: dict[str, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--out", str(tmp_path / "new"), "--cases", "resnet50 inference bf16")
    assert program(monkeypatch, *options) == 0
    names = [case.name for case in gpu_cases.planned_cases("resnet50 inference bf16")]
    assert pretended["cases"] == names and pretended["tuned"] == names[:3]
    assert pretended["tables"] == list(gpu_operators.OPERATORS)
    text = capsys.readouterr().out
    summary = text[text.index("fastest of ours over the fastest peer") :]
    assert summary.count("\n") <= 60
    assert "1.33x  resnet50 inference bf16 b256: fused" in summary  # the fourth over the third
    assert "failed or wrong: nothing" in summary and "of the floor" in summary
    (path,) = (tmp_path / "new").glob("h200-*.json")
    assert set(json.loads(path.read_text())) == {
        "cases", "environment", "command", "ceilings", "tuned", "convolutions", "passes"
    }  # fmt: skip

    for part in pretended.values():
        part.clear()
    assert program(monkeypatch, *options) == 0
    assert not any(pretended.values())


def test_without_time_or_tuning(
    monkeypatch: pytest.MonkeyPatch,
    pretended: dict[str, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert program(monkeypatch, "--out", str(tmp_path), "--budget", "0") == 0
    assert not any(pretended.values())
    assert "no time for 170 cases" in capsys.readouterr().out
    options = ("--out", str(tmp_path), "--no-tune", "--cases", "resnet50 inference bf16 b256")
    assert program(monkeypatch, *options) == 0
    assert pretended["tuned"] == [] and len(pretended["cases"]) == 2


def test_failures_are_told_and_do_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch,
    pretended: dict[str, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measured(case: Planned) -> list[Result]:
        if case.autotuned:
            raise RuntimeError("no such kernel")
        wrong = result(case, "fused", None, error="wrong output: error 1.0e+00, budget 1.0e-02")
        return [result(case, "eager", 2.0), result(case, "compile", 1.0), wrong]

    def broken(*arguments: Any) -> None:
        raise ValueError("no table")

    monkeypatch.setattr(gpu_cases, "measure_case", measured)
    monkeypatch.setattr(gpu_layers, "measure_operator", broken)
    options = ("--out", str(tmp_path), "--cases", "resnet50 inference bf16 b256")
    assert program(monkeypatch, *options) == 1
    text = capsys.readouterr().out
    assert "failed or wrong: 4" in text
    for line in (
        "convolutions: ValueError: no table",
        "passes: ValueError: no table",
        "resnet50 inference bf16 b256 fused: wrong output",
        "resnet50 inference bf16 b256 max-autotune: RuntimeError: no such kernel",
    ):
        assert line in text


def test_many_failures_leave_a_short_summary() -> None:
    cases = gpu_cases.planned_cases()
    entries = {
        p.name: {"results": [r.to_dict() for r in results(p)], "error": "broken"} for p in cases
    }
    row = {
        "operator": "bn_act", "layer": "conv1", "count": 1, "milliseconds": 1.0, "floor_ms": 0.5,
        "of_floor": 0.5, "shape": "", "error": "also broken",
    }  # fmt: skip
    data = {
        "cases": entries, "convolutions": 30 * [row], "passes": 30 * [row],
        "environment": {"gpus": [{"name": "GPU"}], "torch": "2.11", "commit": None},
    }  # fmt: skip
    assert len(gpu_summary.summary(data, 3)) <= 58  # blank line and files come to it


def test_plots_are_left_out_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch,
    pretended: dict[str, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    options = ("--out", str(tmp_path), "--cases", "resnet50 inference bf16 b256")
    assert program(monkeypatch, *options) == 0
    assert "no plots: matplotlib is not installed" in capsys.readouterr().out
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_plots(
    monkeypatch: pytest.MonkeyPatch, pretended: dict[str, list[str]], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    options = ("--out", str(tmp_path), "--cases", "resnet50 inference bf16 b256")
    assert program(monkeypatch, *options) == 0
    plots = sorted(tmp_path.glob("*.png"))
    assert [path.stem.rpartition("-")[2] for path in plots] == ["layers", "speedups"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots)


def test_a_lost_gpu_starts_another_process(
    monkeypatch: pytest.MonkeyPatch, pretended: dict[str, list[str]], tmp_path: Path
) -> None:
    class Replaced(Exception):
        pass

    commands: list[list[str]] = []

    def lost() -> None:
        if len(pretended["cases"]) == 2:
            raise RuntimeError("an illegal memory access was encountered")

    def execv(path: str, command: list[str]) -> None:
        commands.append(command)
        raise Replaced

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr("os.execv", execv)
    with pytest.raises(Replaced):
        program(monkeypatch, "--out", str(tmp_path))
    command = commands[0]
    assert command[:2] == [sys.executable, "benchmarks/gpu.py"]
    assert command[-1] == pretended["cases"][1] == "resnet50 inference bf16 b1"

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    pretended["cases"].clear()
    assert program(monkeypatch, *command[2:], "--cases", "resnet50 inference bf16") == 0
    assert (
        pretended["cases"]
        == [p.name for p in gpu_cases.planned_cases("resnet50 inference bf16")][2:]
    )


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


# --- the library's benchmark on a GPU


def case(**values: Any) -> Case:
    return Case(**{"model": "resnet20", "batch_size": 4, "image_size": 32, **values})


def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the CPU for a GPU, wherever the benchmark asks."""
    monkeypatch.setattr(Case, "on_gpu", property(lambda self: True))


def test_peers_of_a_gpu_are_refused_elsewhere() -> None:
    for name in ("eager_graph", "compile_max_autotune", "fused_graph"):
        assert peers.why_not(name, case()) == f"{name} runs on a GPU only, not on cpu"
        assert name not in peers.parse_peers("all", case())


def test_peers_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch)
    assert peers.parse_peers("all", case()) == peers.VARIANTS
    training = case(mode="training")
    assert "inference only" in (peers.why_not("eager_graph", training) or "")
    assert "inference only" in (peers.why_not("fused_graph", training) or "")
    assert peers.why_not("compile_max_autotune", training) is None
    assert all(peers.why_not(name, case()) is None for name in peers.ON_GPU_ONLY)


def test_graphs_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch)
    captured: list[nn.Module] = []

    def capture(model: nn.Module, images: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        assert images.is_contiguous(memory_format=torch.channels_last) and not model.training
        captured.append(model)
        return model

    monkeypatch.setattr(peers.resnet_fused, "capture", capture)
    images = random_images(4, 32)
    model = prepare.prepare_model(benchmark.load_model("resnet20"), images, case())
    made = [peers.make_variant(name, model, images, case()) for name in ("eager_graph",
            "fused_graph")]  # fmt: skip
    assert [hasattr(m.layer1[0], "_fused_plan") for m in captured] == [False, True]
    assert not any(variant.memory_shows for variant in made)
    assert made[0].outputs(images)["output"].shape == (4, 10)


def test_tf32_is_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BenchmarkError, match="tf32 is a precision of GPUs"):
        case(dtype="tf32")
    on_gpu(monkeypatch)
    for mode in ("inference", "training"):
        tf32 = case(dtype="tf32", mode=mode)
        assert tf32.data_dtype == torch.float32 and tf32.autocast_dtype is None


@pytest.mark.parametrize("dtype", ["fp32", "tf32"])
def test_tf32_is_allowed_while_its_case_runs(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    on_gpu(monkeypatch)
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    seen = []

    def measured(*arguments: Any) -> list[Result]:
        seen.append((products.allow_tf32, convolutions.allow_tf32))
        raise KeyError

    monkeypatch.setattr(run, "_measure", measured)
    with pytest.raises(KeyError):
        run.run_case(
            case(dtype=dtype), nn.Identity(), torch.empty(0), variants=("eager",), repeats=1
        )
    assert seen == [2 * (dtype == "tf32",)]
    assert (products.allow_tf32, convolutions.allow_tf32) == before


def test_short_calls_are_timed_several_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    slept: list[float] = []

    def once(call: Callable[[], float], *, device: torch.device, count: int = 1) -> float:
        counts.append(count)
        return call()

    monkeypatch.setattr(measure, "time_once", once)
    monkeypatch.setattr(measure.time, "sleep", slept.append)
    calls = {"short": lambda: 0.3, "long": lambda: 3.0}
    measure.interleave(calls, repeats=1, device=CUDA)
    assert counts == [1, 34, 1, 1] and set(slept) == {0.0}
    measure.interleave(calls, repeats=1, device=CPU)
    assert counts[4:] == [1, 1, 1, 1] and slept[2:] == 2 * [measure.PAUSE_S]


def test_a_sample_of_several_calls_is_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((0.0, 0.5))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(now))
    calls: list[None] = []
    assert measure.time_once(lambda: calls.append(None), device=CPU, count=5) == 100.0
    assert len(calls) == 5


@pytest.mark.parametrize(
    ("batch", "distinct"), [(256, 64), (64, 64), (1, 1), (96, 48), (67, 67), (65, 13)]
)
def test_distinct_images(batch: int, distinct: int) -> None:
    assert prepare.distinct_images(batch, CUDA) == distinct
    assert prepare.distinct_images(distinct, CUDA) == distinct  # float64 gets the same labels
    assert prepare.distinct_images(batch, CPU) == batch


def test_repeated_images_are_in_no_place_twice() -> None:
    rows = prepare.repeat_images(torch.arange(4), 12)
    assert rows.tolist() == [0, 1, 2, 3, 3, 0, 1, 2, 2, 3, 0, 1]
    values = torch.arange(4)
    assert prepare.repeat_images(values, 4) is values


def test_training_on_repeated_images_is_judged_by_the_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics, loss and gradients are those of the distinct images: else nothing would pass."""
    counts: list[int] = []

    def distinct(batch_size: int, device: torch.device) -> int:
        return min(batch_size, 4)

    def truth(base: nn.Module, images: torch.Tensor, *, training: bool) -> dict[str, torch.Tensor]:
        counts.append(len(images))
        return real(base, images, training=training)

    real = run._truth
    monkeypatch.setattr(run, "distinct_images", distinct)
    monkeypatch.setattr(peers, "distinct_images", distinct)
    monkeypatch.setattr(run, "_truth", truth)
    found = run.run_case(
        case(mode="training", batch_size=12), benchmark.load_model("resnet20"),
        random_images(12, 32), variants=("eager", "fused"), repeats=1,
    )  # fmt: skip
    assert [r.error for r in found] == [None, None] and set(counts) == {4}
    assert all((r.relative_error or 1) < 1e-4 for r in found)


@pytest.mark.parametrize("image", [None, 0, 15])
def test_a_few_images_are_judged_in_inference(
    monkeypatch: pytest.MonkeyPatch, image: int | None
) -> None:
    on_gpu(monkeypatch)

    def spoiling_fuse(model: nn.Module, *, inplace: bool, memory: str) -> nn.Module:
        right = model.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            y = right(x).clone()
            if image is not None:
                y[image] *= 2
            return y

        model.forward = forward
        return model

    monkeypatch.setattr(peers.resnet_fused, "fuse", spoiling_fuse)
    found = run.run_case(
        case(batch_size=16), benchmark.load_model("resnet20"), random_images(16, 32),
        variants=("eager", "fused"), repeats=1,
    )  # fmt: skip
    assert (found[1].error is None) == (image is None)


def test_a_peer_that_fails_when_it_is_judged_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing_fuse(model: nn.Module, *, inplace: bool, memory: str) -> nn.Module:
        right, calls = model.forward, []

        def forward(x: torch.Tensor) -> torch.Tensor:
            calls.append(x)
            if len(calls) > 1:
                raise RuntimeError("graph was overwritten")
            return right(x)

        model.forward = forward
        return model

    monkeypatch.setattr(peers.resnet_fused, "fuse", failing_fuse)
    eager, fused = run.run_case(
        case(), benchmark.load_model("resnet20"), random_images(4, 32),
        variants=("eager", "fused"), repeats=1,
    )  # fmt: skip
    assert eager.error is None and eager.median_ms is not None
    assert fused.error == "RuntimeError: graph was overwritten" and fused.median_ms is None
