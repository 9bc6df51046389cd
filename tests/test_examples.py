"""The examples, run as a reader would run them; a distributed run that loses a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def example(name: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=folder, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def test_degradation(tmp_path: Path) -> None:
    done = example(
        "degradation.py", "--epochs=1", "--size=8", "--batch-size=700", "--json=errors.json",
        folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "errors.json").read_text())
    assert [len(runs) for runs in result["runs"].values()] == [2, 2, 2]
    for sentence in result["summary"]:
        assert sentence in done.stdout
    assert (tmp_path / "degradation.png").read_bytes().startswith(b"\x89PNG")


def test_fused_and_eager_train_alike(tmp_path: Path) -> None:
    """The losses of 200 steps: no further from eager's than another seed is."""
    done = example(
        "train_digits.py", "--size=8", "--batch-size=32", "--seeds=3", "--steps=200",
        "--json=losses.json", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "losses.json").read_text())
    assert len(result["runs"]) == 6
    assert all(len(run["loss"]) == 200 for run in result["runs"])
    assert result["loss"]["fused_from_eager"] <= result["loss"]["between_seeds"]
    by_variant = {
        variant: [run["loss"][-1] for run in result["runs"] if run["variant"] == variant]
        for variant in ("eager", "fused")
    }
    assert max(by_variant["fused"]) < 0.3 * result["runs"][0]["loss"][0], by_variant
    assert result["saved_ratio"] < 0.8
    assert (tmp_path / "train_digits.png").exists()


def test_few_seeds_are_refused(tmp_path: Path) -> None:
    done = example("train_digits.py", "--seeds=1", folder=tmp_path)
    assert done.returncode == 2
    assert "--seeds must be at least 2" in done.stderr
    assert not list(tmp_path.iterdir())


pytest_gloo = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not torch.distributed.is_gloo_available(),
    reason="finds processes in /proc, and gloo",
)


def launch(folder: Path, checkpoint: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2",
            "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(EXAMPLES / "train_ddp.py"),
            "--size=8", "--batch-size=32", f"--checkpoint={checkpoint}", *arguments,
        ],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    yield from process.stdout


def worker_of(launcher: int, rank: int) -> int:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        if f"RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"no process of rank {rank} among {children}")


def state(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


@pytest_gloo
def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    arguments = ("--steps=24", "--every=4")
    undisturbed = launch(tmp_path, "whole.pt", *arguments)
    text = "".join(lines(undisturbed))
    assert undisturbed.wait(120) == 0, text
    assert "from step 0 to 24" in text

    disturbed, seen, killed = launch(tmp_path, "parts.pt", *arguments), [], False
    for line in lines(disturbed):
        seen.append(line)
        if not killed and line.startswith("step 8"):
            os.kill(worker_of(disturbed.pid, 1), signal.SIGKILL)
            killed = True
    assert disturbed.wait(120) == 0, "".join(seen)
    starts = [line for line in seen if "processes, from step" in line]
    assert len(starts) == 2 and "from step 0 " not in starts[1], seen

    whole, parts = state(tmp_path / "whole.pt"), state(tmp_path / "parts.pt")
    assert whole["done"] == parts["done"] == 24
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, parts["model"][name]), name
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]  # half-written files

    again = launch(tmp_path, "parts.pt", "--steps=28", "--every=4")
    text = "".join(lines(again))
    assert again.wait(120) != 0
    assert "is another run's" in text


@pytest_gloo
def test_a_share_must_be_whole(tmp_path: Path) -> None:
    process = launch(tmp_path, "run.pt", "--batch-size=33")
    text = "".join(lines(process))
    assert process.wait(120) != 0
    assert "--batch-size must be a multiple of the 2 processes, got 33" in text
    assert not (tmp_path / "run.pt").exists()


def test_without_torchrun(tmp_path: Path) -> None:
    done = example("train_ddp.py", folder=tmp_path)
    assert done.returncode == 2
    assert "start it with torchrun" in done.stderr
