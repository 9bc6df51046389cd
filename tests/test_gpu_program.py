"""What ``make gpu`` runs, as far as it can be tried without a GPU: order, resuming, failures."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_cases  # noqa: E402
import gpu_layers  # noqa: E402
import gpu_operators  # noqa: E402
import gpu_summary  # noqa: E402
import roofline  # noqa: E402
from gpu_cases import Planned, Record  # noqa: E402

from resnet_fused.benchmark import BenchmarkError, Result  # noqa: E402
from resnet_fused.ops import gpu_choice  # noqa: E402

H200 = roofline.Ceilings(790e12, 4.3e12)

# --- the matrix


def test_the_most_valuable_comes_first() -> None:
    names = [p.name for p in gpu_cases.planned_cases()]
    assert names[:5] == [
        "resnet50 inference bf16 b256 untuned", "resnet50 training bf16 b256 untuned",
        "resnet50 inference bf16 b256", "resnet50 inference bf16 b1", "resnet50 training bf16 b256",
    ]  # fmt: skip
    assert [name.split()[0] for name in names[5:9]] == list(gpu_cases.MODELS[1:])
    plain = [name for name in names[2:] if not name.endswith("max-autotune")]
    assert names[2:][: len(plain)] == plain  # autotuned parts are last
    assert names[2:][len(plain)] == "resnet50 inference bf16 b256 max-autotune"
    assert len(set(names)) == len(names) == 2 + 2 * len(plain) == 2 + 2 * (5 * 3 * 5 + 5 * 2)
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


def test_autotuning_is_quiet_in_its_case_only() -> None:
    from torch._inductor import config

    before = config.autotune_num_choices_displayed, config.max_autotune_report_choices_stats
    with gpu_cases.quiet_autotuning():
        assert config.autotune_num_choices_displayed == 0
        assert not config.max_autotune_report_choices_stats
    after = config.autotune_num_choices_displayed, config.max_autotune_report_choices_stats
    assert after == before


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


def test_what_is_untuned_sees_no_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", "/own")
    before = gpu_choice.generation
    with gpu_cases.without_choices():
        folder = os.environ["RESNET_FUSED_CACHE_DIR"]
        assert folder != "/own" and not list(Path(folder).iterdir())
        assert gpu_choice.generation > before
    assert os.environ["RESNET_FUSED_CACHE_DIR"] == "/own" and not Path(folder).exists()


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
        asked["tuned"] += [p.name for p in self.not_tuned(planned)]
        self.record.put("tuned_cases", [p.name for p in planned])
        return [{"chosen": "triton"}]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(roofline, "measured", lambda device, dtype: H200)
    monkeypatch.setattr(gpu_cases, "measure_case", measured)
    monkeypatch.setattr(gpu_layers, "measure_operator", table)
    monkeypatch.setattr(gpu.Run, "tune", tune)
    monkeypatch.setattr(gpu.Run, "use_choices", lambda self: [])
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
    assert pretended["cases"] == names and sorted(pretended["tuned"]) == sorted(names[1:4])
    assert pretended["tables"] == list(gpu_operators.OPERATORS)
    text = capsys.readouterr().out
    summary = text[text.index("fastest of ours over the fastest peer") :]
    assert summary.count("\n") <= 60
    assert "1.33x  resnet50 inference bf16 b256: fused" in summary  # the fourth over the third
    assert "failed or wrong: nothing" in summary and "of the floor" in summary
    (path,) = (tmp_path / "new").glob("h200-*.json")
    assert set(json.loads(path.read_text())) == {
        "cases", "environment", "command", "ceilings", "tuned", "tuned_cases", "convolutions",
        "passes",
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
    assert "no time for 172 cases" in capsys.readouterr().out
    options = ("--out", str(tmp_path), "--no-tune", "--cases", "resnet50 inference bf16 b256")
    assert program(monkeypatch, *options) == 0
    assert pretended["tuned"] == [] and len(pretended["cases"]) == 3


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
    assert "failed or wrong: 5" in text
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
        if len(pretended["cases"]) == 3:
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
    assert command[-1] == pretended["cases"][2] == "resnet50 inference bf16 b256"

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    pretended["cases"].clear()
    assert program(monkeypatch, *command[2:], "--cases", "resnet50 inference bf16") == 0
    assert (
        pretended["cases"]
        == [p.name for p in gpu_cases.planned_cases("resnet50 inference bf16")][2:]
    )
