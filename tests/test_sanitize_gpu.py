"""``make gpu SANITIZE=1`` without a GPU: a script stands for NVIDIA's compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import sanitize_gpu  # noqa: E402

from resnet_fused.backends import native_cuda  # noqa: E402

# Notes what it is called with; then does what the tool's name asks for.
FAKE = """#!/bin/sh
echo "${PYTORCH_NO_CUDA_MEMORY_CACHING:-0} $*" >> "$CALLS"
case "$* $BEHAVIOUR" in
  *"--tool "*memcheck*" memcheck:"*) eval "${BEHAVIOUR#*:}";;
  *"--tool "*racecheck*" racecheck:"*) eval "${BEHAVIOUR#*:}";;
esac
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU, a library and a compute-sanitizer in PATH; the file says how that was called."""
    fake = script(tmp_path / "bin" / "compute-sanitizer", FAKE)
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sanitize_gpu.setup_cuda, "find_nvcc", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native_cuda, "available", True)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("BEHAVIOUR", "")
    monkeypatch.setattr(sys, "argv", ["benchmarks/sanitize_gpu.py"])
    return tmp_path / "calls"


def test_without_a_gpu_there_is_nothing_to_run(
    monkeypatch: pytest.MonkeyPatch, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sanitize_gpu.main() == 0
    assert "sees no GPU; nothing to run" in capsys.readouterr().out
    assert not calls.exists()


def test_what_is_missing_is_told(
    monkeypatch: pytest.MonkeyPatch, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert sanitize_gpu.main() == 1
    assert "compute-sanitizer is missing, neither beside nvcc nor in PATH" in (
        capsys.readouterr().out
    )
    monkeypatch.setattr(native_cuda, "available", False)
    monkeypatch.setattr(native_cuda, "reason", "not built")
    assert sanitize_gpu.main() == 1
    assert "no compiled kernels to look at: not built" in capsys.readouterr().out


def test_the_one_beside_nvcc_is_taken(
    monkeypatch: pytest.MonkeyPatch, calls: Path, tmp_path: Path
) -> None:
    in_path = sanitize_gpu.find_sanitizer()
    assert in_path == str(tmp_path / "bin" / "compute-sanitizer")
    nvcc = script(tmp_path / "toolkit" / "bin" / "nvcc", "")
    link = tmp_path / "elsewhere" / "nvcc"
    link.parent.mkdir()
    link.symlink_to(nvcc)
    monkeypatch.setattr(sanitize_gpu.setup_cuda, "find_nvcc", lambda: str(link))
    assert sanitize_gpu.find_sanitizer() == in_path
    beside = script(nvcc.with_name("compute-sanitizer"), "")
    assert sanitize_gpu.find_sanitizer() == str(beside)


def test_every_tool_runs(calls: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert sanitize_gpu.main() == 0
    lines = calls.read_text().splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["1", "--tool", "memcheck"], ["0", "--tool", "racecheck"], ["0", "--tool", "synccheck"],
    ]  # fmt: skip
    for line in lines:
        assert f" --kernel-name kns={sanitize_gpu.OUR_KERNELS} " in line
        assert line.endswith(sanitize_gpu.TESTS[-1]) and f" {sys.executable} -m pytest " in line
        assert ("--padding" in line) == (line.startswith("1")) == ("--num-cuda" not in line)
    assert "synccheck found nothing" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("does", "message"),
    [
        (f"exit {sanitize_gpu.FOUND}", "found errors"),
        ("exit 1", "failed, or its tests did (status 1)"),
        ("sleep 60", "took over 0.5 s"),
    ],
)
def test_a_failure_is_told_and_the_other_tools_run(
    does: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    calls: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BEHAVIOUR", f"racecheck:{does}")
    if "sleep" in does:
        sys.argv += ["--seconds", "0.5"]
    assert sanitize_gpu.main() == 1
    assert len(calls.read_text().splitlines()) == 3
    told = capfd.readouterr().out.splitlines()[-3:]
    assert "memcheck found nothing" in told[0] and "synccheck found nothing" in told[2]
    assert f"racecheck {message}, in " in told[1]


def test_some_tools(calls: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sys.argv += ["--tools", "synccheck"]
    assert sanitize_gpu.main() == 0
    assert len(calls.read_text().splitlines()) == 1
    sys.argv[-1] = "synccheck,leakcheck"
    with pytest.raises(SystemExit):
        sanitize_gpu.main()
    assert "must be of memcheck, racecheck, synccheck, got leakcheck" in capfd.readouterr().err


def test_what_hears_no_signal_is_killed() -> None:
    process = subprocess.Popen(
        ["sh", "-c", "trap '' INT; echo ready; sleep 60 & wait"],
        stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    sanitize_gpu.end(process, grace=0.2)
    assert process.returncode == -9
    assert process.stdout.read() == b""  # its child has gone as well


def test_all_tests_of_the_selection_are_there() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=",
         "-p", "no:cacheprovider", *sanitize_gpu.TESTS],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(sanitize_gpu.TESTS)} tests collected" in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make not found")
@pytest.mark.parametrize(
    ("sanitize", "last"),
    [
        ("1", "build done; tests passed; sanitizers failed; benchmark passed"),
        ("0", "build done; tests passed; benchmark passed"),
    ],
)
def test_the_last_line_of_make_gpu(sanitize: str, last: str, tmp_path: Path) -> None:
    """By a Python in which nothing fails but the sanitizers."""
    python = script(tmp_path / "python", '#!/bin/sh\ncase "$*" in *sanitize_gpu*) exit 1;; esac\n')
    done = subprocess.run(
        ["make", "-s", "gpu-run", f"SANITIZE={sanitize}", f"PYTHON={python}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == f"make gpu: {last}"
    assert (done.returncode != 0) == (sanitize == "1")
