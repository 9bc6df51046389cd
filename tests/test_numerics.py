"""The numerics report: it leaves no kernel out, sees what is wrong, and can be kept."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_case import HAS_GPU, needs_cuda_kernels
from cuda_place import compiled_gpu  # noqa: F401
from torch import Tensor

from resnet_fused import conv_choice, numerics
from resnet_fused.backends import cuda_conv, native_conv, native_cuda
from resnet_fused.backends.native_conv import Program
from resnet_fused.cli import main
from resnet_fused.modules.max_pool import MaxPool
from resnet_fused.numerics import blocks, conv, gpu
from resnet_fused.numerics.block import BlockCase, Conv, Part
from resnet_fused.numerics.measure import Draw, Row, Variant, measure
from resnet_fused.parity import DEFAULT_ERROR, error_budget, root_mean_square_error

ROOT = Path(__file__).parent.parent

needs_kernels = pytest.mark.skipif(
    native_conv.unusable(torch.bfloat16) is not None,
    reason=str(native_conv.unusable(torch.bfloat16)),
)


def algorithms(operator: str) -> set[str]:
    """What the report has of an operator's own algorithms."""
    names = {v.name.removesuffix(", pairs") for v in numerics.every() if v.operator == operator}
    return {name for name in names if not name.startswith("library")} - {"onednn", "gemm"}


@needs_kernels
def test_every_algorithm_has_a_variant() -> None:
    """A new one in csrc or in conv_choice.py has to be measured, too."""
    header = (ROOT / "csrc/cpu/conv_algorithm.h").read_text()
    found = re.search(r"enum class Algorithm \{(.*?)\}", header, re.DOTALL)
    assert found
    compiled = {name.strip() for name in found[1].split(",")}
    assert algorithms("conv_bn_act") == set(conv_choice.NATIVE)
    assert algorithms("conv_bn_act") | algorithms("train_conv") == compiled
    weights = {v.name for v in numerics.every() if v.operator == "train_conv"}
    assert {"gemm", "winograd4"} <= weights


@pytest.mark.parametrize("dtype", numerics.DTYPES)
def test_every_operator_has_a_variant_in_each_dtype(dtype: str) -> None:
    operators = {v.operator for v in numerics.every(dtypes=[dtype])}
    assert {"conv_bn_act", "scale_shift_act", "bn_act", "bottleneck"} <= operators


@needs_kernels
def test_a_wrong_pixel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = conv.problem(2, 64, (14, 14), 64, 3)
    assert all(row.ok for row in measure(list(conv.evaluation("float32", [layer])), draws=1))
    run = Program.__call__

    def wrong(self: Program, *arguments: Tensor) -> Tensor:
        output = run(self, *arguments)
        output[0, :, 0, 0] *= 1.01
        return output

    monkeypatch.setattr(Program, "__call__", wrong)
    for row in measure(list(conv.evaluation("float32", [layer])), draws=1):
        assert row.ok == (row.variant.split(",")[0] in ("onednn", "library and one pass")), row


def test_status_and_table_of_a_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", "--all", "--only", "max_pool", "--threads", "1"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "3 results, none WRONG" in text and "max_pool" in text
    monkeypatch.setattr(MaxPool, "__call__", lambda self, x, pool: pool(x).roll(1, -1))
    assert main([*arguments, "--dtype", "fp32"]) == 1
    assert "1 results, 1 WRONG" in capsys.readouterr().out


def test_json_and_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "numerics.json"
    arguments = ["verify", "--all", "--only", "scale_shift", "--dtype", "bf16", "--threads", "1"]
    assert main([*arguments, "--markdown", "--json", str(path)]) == 0
    table = capsys.readouterr().out
    assert table.startswith("| operator | bfloat16 |\n|---|---|\n| scale_shift_act | ")
    data = json.loads(path.read_text())
    assert data["ok"] is True and data["environment"]["torch"] == torch.__version__
    assert data["command"].startswith("resnet-fused verify --all")
    rows = [Row.from_dict(row) for row in data["results"]]
    assert [row.to_dict() for row in rows] == data["results"]
    assert {row.variant for row in rows} == {"native, channels_last", "native, contiguous"} or all(
        row.variant.startswith("reference") for row in rows
    )


def test_an_error_without_bounds_is_null_in_json() -> None:
    row = Row("a", "output", "b", "float32", "parity", "1x1", math.inf, 1e-7, 3e-7)
    values = json.loads(json.dumps(row.to_dict(), allow_nan=False))
    assert values["error"] is None and values["ok"] is False
    assert Row.from_dict(values) == row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either a MODEL or --all"),
        (["resnet18", "--all"], "either a MODEL or --all"),
        (["--all", "--training"], "--training goes with a MODEL"),
        (["--all", "--batch-size", "7"], "--batch-size goes with a MODEL"),
        (["--all", "--image-size", "7"], "--image-size goes with a MODEL"),
        (["resnet18", "--only", "bn"], "--only goes with --all"),
        (["resnet18", "--markdown"], "--markdown goes with --all"),
        (["--all", "--only", "attention"], "no operator's name has 'attention' in it"),
        (["--all", "--dtype", "tf32"], "tf32 is a precision of GPUs"),
        (["--all", "--json", "missing/x.json"], "there is no folder missing"),
    ],
    ids=str,
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", *arguments]) == 2
    assert message in capsys.readouterr().err


@dataclass(frozen=True)
class Scripted:
    """A case whose draws are off by what is written down, eager PyTorch's by 1e-6."""

    errors: Callable[[int], float]
    cornered: bool = False
    eager_error: float = 1e-6
    shape: str = "1"

    def draw(self, number: int, in_force: Any) -> Draw:
        truth = torch.ones(1, dtype=torch.float64)
        ours, eager = (
            {"output": [(truth + e).double()]} for e in (self.errors(number), self.eager_error)
        )
        return Draw({"output": [ours["output"][0].float()]}, [eager], {"output": [truth]})


def judged(case: Scripted) -> Row:
    (row,) = measure([Variant("operator", "name", "float32", "parity", [case])])
    return row


def test_the_worst_draw_is_shown() -> None:
    row = judged(Scripted(lambda number: number * 1e-6))
    assert row.error == pytest.approx(2e-6, rel=0.1) and row.ok


def test_what_misses_once_is_held_by_the_mean_of_more_draws() -> None:
    assert judged(Scripted(lambda number: 4e-6 if number == 1 else 1e-6)).ok
    assert not judged(Scripted(lambda number: 1e-2 if number == 1 else 0.0)).ok
    assert not judged(Scripted(lambda number: 2.5e-6)).ok


def test_where_there_are_corners_by_the_median() -> None:
    assert judged(Scripted(lambda number: 1e-2 if number == 1 else 0.0, cornered=True)).ok
    assert not judged(Scripted(lambda number: 1e-2 if number % 2 else 1e-3, cornered=True)).ok


def test_nothing_is_right_beside_no_number() -> None:
    assert not judged(Scripted(lambda number: 1e-6, eager_error=math.nan)).ok


def test_budgets_and_measures() -> None:
    eps = torch.finfo(torch.float32).eps
    assert error_budget(1e-6, torch.float32) == pytest.approx(2e-6 + eps)
    assert error_budget(1e-7, torch.float32, "default") == DEFAULT_ERROR
    assert error_budget(1e-6, torch.float32, "strict") == pytest.approx(1.25e-6 + eps / 12**0.5)
    assert error_budget(1.0, torch.float32, "exact") == 0.0
    assert error_budget(0.0, torch.float64) == pytest.approx(64 * torch.finfo(torch.float64).eps)
    truth = torch.tensor([3.0, 4.0, math.inf])
    assert root_mean_square_error(truth + torch.tensor([0.3, 0.4, 0.0]), truth) == pytest.approx(
        0.1
    )
    assert root_mean_square_error(torch.zeros(3), truth) == math.inf


CASE = BlockCase(
    2, 8, 7, 5, (Part((Conv(8, bias=True), Conv(8, act="silu")), "identity"),),
    mode="train", fill="special",
)  # fmt: skip


def test_the_worst_of_the_fuzzer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built again and measured here; a bias in front of a batch norm has no gradient."""
    path = tmp_path / "worst_cases.json"
    cases = [CASE, replace(CASE, mode="eval", fill="random", policy="strict")]
    text = [{"case": c.to_dict(), "mode": c.mode, "dtype": c.dtype, "ratio": 0.9} for c in cases]
    path.write_text(json.dumps(text))
    monkeypatch.setattr(blocks, "WORST", path)
    assert not list(blocks.fuzzed("bfloat16"))
    rows = measure(list(blocks.fuzzed("float32")))
    assert {(row.variant, row.result) for row in rows} == {
        ("train", "output"), ("train", "grad_input"), ("train", "grad_parameters"),
        ("train", "running statistics"), ("eval", "output"), ("eval", "running statistics"),
    }  # fmt: skip
    assert all(row.ok for row in rows)
    path.unlink()
    assert not list(blocks.fuzzed("float32"))


@needs_cuda_kernels
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_convolutions_on_a_gpu(
    dtype: str,
    compiled_gpu: dict[str, int],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The compiled kernels, in their emulator where there is no GPU."""
    layer = conv.problem(1, 16, (6, 5), 16, 3)
    if not HAS_GPU:
        monkeypatch.setattr(native_cuda, "available", True)
        monkeypatch.setattr(native_cuda, "code_for", lambda arch: arch)
    device = "cuda" if HAS_GPU else "cpu"
    variants = list(gpu.convolutions(dtype, device, [layer]))
    kinds = {v.operator for v in variants if v.name in cuda_conv.BY_NAME}
    assert kinds == {
        "conv_bn_act", "train_output", "train_behind_norm", "train_input", "train_tensor_input",
    }  # fmt: skip
    for operator in sorted(kinds):
        ours = [v for v in variants if v.operator == operator and v.name in cuda_conv.BY_NAME]
        for row in measure(ours[:1], draws=1):
            assert row.ok, row
