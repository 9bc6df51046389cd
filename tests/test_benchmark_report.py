"""What the benchmark writes: tables, plots, files of results, and the machine that they are of."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from resnet_fused import benchmark
from resnet_fused.benchmark import BenchmarkError, Case, Result


def some_results() -> list[Result]:
    case = Case(model="resnet20", batch_size=4, image_size=32)
    speeds = {"eager": 2.0, "fused": 1.0}
    results = [
        Result.of(
            case,
            name,
            median_ms=ms,
            p20_ms=ms * 0.9,
            p80_ms=ms * 1.1,
            images_per_second=4e3 / ms,
            speedup_vs_eager=2 / ms,
            relative_error=1e-6,
        )
        for name, ms in speeds.items()
    ]
    return [*results, Result.of(case, "compile", relative_error=math.inf, error="[no] compiler")]


def test_table_shows_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.print_results(some_results(), sys.stdout)
    text = capsys.readouterr().out
    assert "2.00x" in text and "[no] compiler" in text and "1.0e-06" in text


def test_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    benchmark.write_plot(some_results(), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]
    with pytest.raises(BenchmarkError, match=r"must end in .png, .pdf or .svg"):
        benchmark.write_plot(some_results(), tmp_path / "plot.doc")


def test_json_has_no_infinity() -> None:
    text = benchmark.json_text({"results": [r.to_dict() for r in some_results()]})
    assert json.loads(text)["results"][2]["relative_error"] is None


def test_a_failed_write_leaves_the_old_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    benchmark.write_atomically(path, b"old")

    def fail(source: str, target: str) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        benchmark.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_unwritable_paths(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="it is a folder"):
        benchmark.check_writable(tmp_path)
    with pytest.raises(BenchmarkError, match="there is no folder"):
        benchmark.check_writable(tmp_path / "missing" / "x.json")
    benchmark.check_writable(tmp_path / "x.json")
    assert not list(tmp_path.iterdir())


def test_environment_is_json() -> None:
    data = benchmark.environment()
    assert {"torch", "python", "cpu", "isa", "threads", "commit", "resnet_fused", "date"} <= set(
        data
    )
    benchmark.json_text({**data, "backends": benchmark.backends()})
