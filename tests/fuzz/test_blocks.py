"""A thousand random networks against eager PyTorch and float64, and those that failed once."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from draw import draw
from fuzz import REGRESSIONS, main, reproducer
from judge import judge
from shrink import shrink
from torch import Tensor, nn

from resnet_fused.numerics.block import LAYOUTS, MODES, BlockCase, Conv, Part, run

CASES, CHUNK = 1000, 20
SEED = int(os.environ.get("RESNET_FUSED_FUZZ_SEED", "0"))


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_random_networks(first: int) -> None:
    for number in range(first, first + CHUNK):
        try:
            judge(draw(SEED, number))
        except Exception as error:
            raise AssertionError(f"{error}\n{reproducer(SEED, number)}") from error


@pytest.mark.parametrize("file", sorted(REGRESSIONS.glob("*.json")), ids=lambda p: p.stem)
def test_what_failed_once(file: Path) -> None:
    judge(BlockCase.from_dict(json.loads(file.read_text())["case"]))


def test_cases_are_the_same_everywhere_and_survive_json() -> None:
    for number in range(50):
        case = draw(3, number)
        assert case == draw(3, number) != draw(4, number)
        assert BlockCase.from_dict(json.loads(json.dumps(case.to_dict()))) == case
        (one, x), (two, y) = case.build(), case.build()
        assert torch.equal(x.nan_to_num(), y.nan_to_num())
        values = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in values)


def test_every_kind_is_drawn() -> None:
    cases = [draw(SEED, number) for number in range(CASES)]
    assert {c.layout for c in cases} == set(LAYOUTS) and {c.mode for c in cases} == set(MODES)
    assert sum(c.fill == "integer" for c in cases) > 0.4 * CASES
    parts = [p for c in cases for p in c.parts]
    convs = [c for p in parts for c in p.convs]
    assert {p.shortcut for p in parts} == {"none", "identity", "projection"}
    assert any(c.batch == 0 for c in cases) and any(c.height == c.width == 1 for c in cases)
    for option, plain in (("groups", 1), ("dilation", (1, 1)), ("bias", False)):
        assert sum(getattr(c, option) != plain for c in convs) > 0.05 * len(convs)


CASE = BlockCase(
    3, 16, 9, 8, (Part((Conv(16), Conv(16, bias=True)), "identity"),), seed=5, fill="integer"
)


@pytest.mark.parametrize("fault", ["halo", "nan", "nan gradient", "raises", "state", "strides"])
def test_faults_are_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guard of this folder: what is planted behind fuse() is found."""
    import judge as judged

    def faulty(model: nn.Module, **options: object) -> nn.Module:
        fused = fuse(model, **options)  # type: ignore[arg-type]
        if fault == "state":
            with torch.no_grad():
                next(fused.parameters()).mul_(1.0001)
        if fault == "nan gradient":
            for parameter in fused.parameters():
                parameter.register_hook(torch.nan_to_num)
        forward = fused.forward

        def broken(x: Tensor) -> Tensor:
            y = forward(x)
            if fault == "halo":
                y[..., -1, :] += 0.125
            if fault == "nan":
                y = y.nan_to_num()
            if fault == "raises":
                raise ValueError
            return y.contiguous() if fault == "strides" else y

        fused.forward = broken  # type: ignore[method-assign]
        return fused

    fuse = judged.fuse
    case = replace(CASE, fill="special") if "nan" in fault else CASE
    if fault == "nan gradient":
        case = replace(case, dtype="bfloat16", mode="eval_grad")
    judge(case)
    monkeypatch.setattr(judged, "fuse", faulty)
    with pytest.raises(AssertionError):
        judge(case)


def test_a_failure_is_made_smaller() -> None:
    def fails(case: BlockCase) -> bool:
        return any(c.stride == (2, 2) for p in case.parts for c in p.convs) and case.batch > 2

    number = next(n for n in range(10_000) if fails(draw(1, n)) and len(draw(1, n).parts) == 3)
    small = shrink(draw(1, number), fails, most=10_000)
    assert fails(small) and small.batch == 3 and len(small.parts) == 1
    assert small.parts[0].convs == (Conv(1, (1, 1), (2, 2), (0, 0), act="none", norm="none"),)
    assert (small.channels, small.height, small.dtype, small.mode) == (1, 1, "float32", "eval")


def test_the_command(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    worst = tmp_path / "worst.json"
    assert main(["--cases", "6", "--seed", "2", "--jobs", "2", "--worst", str(worst)]) == 0
    assert "6 cases of seed 2" in capfd.readouterr().out
    for row in json.loads(worst.read_text()):
        assert run(BlockCase.from_dict(row["case"]), *BlockCase.from_dict(row["case"]).build())
    assert main(["--seed", "2", "--only", "3"]) == 0
