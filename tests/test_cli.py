"""The command line, as a user runs it: through a subprocess."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from resnet_fused.benchmark import out_of_memory
from resnet_fused.cli import Parser, run_program

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("resnet20", "--image-size", "32", "--batch-size", "2", "--threads", "1")


# Without the compiled library a warning comes first, which is another test's business.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "resnet_fused", *args]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*args),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def ok(*args: str) -> str:
    done = run(*args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_info() -> None:
    assert "torch" in ok("info")
    data = json.loads(ok("info", "--json", "-"))
    assert data["threads"] >= 1
    assert data["backends"]["reference"]["usable"] is True
    for backend in data["backends"].values():
        assert backend["usable"] or (backend["reason"] and backend["cost"])


def test_explain(tmp_path: Path) -> None:
    path = tmp_path / "explanation.json"
    text = ok("explain", "resnet20", "--json", str(path))
    assert "layer1.0" in text
    data = json.loads(path.read_text())
    assert data["model"] == "resnet20"
    assert {entry["status"] for entry in data["entries"]} <= {"fused", "skipped", "fusible"}


def test_tune_and_explain_name_algorithms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENT, "RESNET_FUSED_CACHE_DIR", str(tmp_path / "cache"))
    small = ("resnet20", "--batch-size", "2", "--image-size", "32", "--threads", "1")
    data = json.loads(ok("tune", *small, "--repeats", "1", "--json", "-"))
    assert data["tuned"]
    for tuned in data["tuned"]:
        assert tuned["chosen"] in tuned["milliseconds"]
        assert "onednn" in tuned["milliseconds"]
    assert list((tmp_path / "cache").iterdir())
    entries = json.loads(ok("explain", *small, "--json", "-"))["entries"]
    chosen = {layer: t["chosen"] for t in data["tuned"] for layer in t["layers"]}
    for entry in entries:
        if entry["modules"][0] in chosen:
            assert entry["backend"].startswith(f"eval: {chosen[entry['modules'][0]]};")
    assert "cuda" in run("tune", *small, "--device", "cuda").stderr  # there is none, or not for it


@pytest.mark.parametrize("extra", [(), ("--training",), ("--dtype", "bf16")])
def test_verify(extra: tuple[str, ...]) -> None:
    data = json.loads(ok("verify", *SMALL, *extra, "--json", "-"))
    assert data["ok"] is True
    assert data["relative_error"] <= data["budget"]


def test_bench_writes_json_and_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, plot = tmp_path / "results.json", tmp_path / "plot.png"
    text = ok(
        "bench", *SMALL, "--peers", "channels_last", "--repeats", "2",
        "--json", str(path), "--plot", str(plot),
    )  # fmt: skip
    assert "eager_channels_last" in text and "fused" in text
    data = json.loads(path.read_text())
    assert [r["variant"] for r in data["results"]] == ["eager", "eager_channels_last", "fused"]
    assert all(r["error"] is None and r["median_ms"] > 0 for r in data["results"])
    assert data["environment"]["torch"] and data["command"].startswith(
        "resnet-fused bench resnet20"
    )
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_bench_json_on_stdout_is_json_alone() -> None:
    text = ok(
        "bench", *SMALL, "--mode", "training", "--peers", "none", "--repeats", "1", "--json", "-"
    )
    results = json.loads(text)["results"]
    assert [r["variant"] for r in results] == ["eager", "fused"]
    assert all(r["saved_bytes"] > 0 for r in results)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "COMMAND"),
        (("dance",), "invalid choice"),
        (("explain",), "MODEL"),
        (("explain", "resnet51"), "unknown model 'resnet51' (did you mean"),
        (("verify", "nowhere.py:net"), "there is no file nowhere.py"),
        (("bench", "resnet20", "--batch-size", "0"), "at least 1, got '0'"),
        (("bench", "resnet20", "--repeats", "many"), "at least 1, got 'many'"),
        (("bench", "resnet20", "--dtype", "int3"), "--dtype"),
        (("bench", "resnet20", "--device", "abacus"), "unknown device 'abacus'"),
        (("bench", "resnet20", "--peers", "tensorrt"), "unknown peer 'tensorrt'"),
        (("bench", "resnet20", "--json", "missing/x.json"), "there is no folder missing"),
        (("bench", "resnet20", "--plot", "missing/x.png"), "there is no folder missing"),
        (("bench", "resnet20", "--batch-size", "1000000000"), "out of memory"),
        (("bench", "resnet18", "--mode", "training", "--peers", "openvino"), "cannot train"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    args: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """In this process, as starting Python fourteen times takes long."""
    from resnet_fused.cli import main

    status = main(args)
    out, err = capfd.readouterr()
    assert status == 2
    assert err.startswith("resnet-fused: error: ") and err.count("\n") == 1
    assert message in err
    assert out == ""


def test_bad_input_in_a_process(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text("def net():\n    raise RuntimeError('oh\\nno')\n")
    done = run("verify", f"{path}:net")
    assert done.returncode == 2
    assert done.stderr == f"resnet-fused: error: {path}:net raised RuntimeError: oh\n"


def test_a_model_that_does_not_fit_the_images(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text("import torch\ndef net():\n    return torch.nn.Conv2d(5, 1, 1)\n")
    done = run("bench", f"{path}:net", "--image-size", "8", "--peers", "none")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "does not run on images [16, 3, 8, 8]" in done.stderr


def test_ctrl_c() -> None:
    process = subprocess.Popen(
        command("bench", *SMALL, "--peers", "none", "--repeats", "100000"),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has it ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "timing" in line:
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == "" and err == "resnet-fused: interrupted\n"


def program(error: BaseException) -> Parser:
    def fail(args: object) -> int:
        raise error

    parser = Parser(prog="test")
    parser.set_defaults(run=fail, json=None)
    return parser


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA out of memory. Tried to allocate"),
    ],
)
def test_out_of_memory_is_bad_input(
    error: BaseException, capfd: pytest.CaptureFixture[str]
) -> None:
    assert out_of_memory(error)
    assert run_program(program(error), []) == 2
    assert "out of memory; try a smaller --batch-size" in capfd.readouterr().err


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="a bug of ours"):
        run_program(program(RuntimeError("a bug of ours")), [])


def test_demo(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    plot, path = tmp_path / "demo.png", tmp_path / "demo.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/demo.py", "--peers", "none", "--batch-size", "1",
         "--image-size", "64", "--repeats", "1", "--threads", "1", "--plot", str(plot), "--json",
         str(path)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "RANDOM weights" in done.stdout
    assert plot.stat().st_size > 0 and len(json.loads(path.read_text())["results"]) == 2
