"""What does not fit is refused by every public function beside functional's (test_bad_input.py).

The error is of the right kind and names the argument; the model, the policy and the file of
measured choices are as before.
"""

from __future__ import annotations

import copy
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused import benchmark, fold, models, parity, policy, tuning_cache
from resnet_fused.benchmark import BenchmarkError, Case, LoadError

pytestmark = pytest.mark.filterwarnings("ignore")  # a quantized tensor is made to be refused

Refused = tuple[Callable[[], Any], type[Exception] | tuple[type[Exception], ...], str]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


NETWORK, X, ONES = network().eval(), torch.ones(2, 3, 8, 8), torch.ones(4)
QUANTIZED = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)


def not_modules(function: Callable[..., Any], name: str) -> dict[str, Refused]:
    wrong = {
        "none": None, "class": nn.ReLU, "list": [NETWORK], "tensor": X, "function": torch.relu,
        "name": "resnet18",
    }  # fmt: skip
    return {
        f"{name} {kind}": (lambda value=value: function(value), TypeError, "model: expected")
        for kind, value in wrong.items()
    }


fuse, unfuse, explain = resnet_fused.fuse, resnet_fused.unfuse, resnet_fused.explain
verify, capture = resnet_fused.verify, resnet_fused.capture

API: dict[str, Refused] = {
    **not_modules(fuse, "fuse"),
    **not_modules(unfuse, "unfuse"),
    **not_modules(explain, "explain"),
    **not_modules(verify, "verify"),
    **not_modules(capture, "capture"),
    "fuse memory": (lambda: fuse(NETWORK, memory="high"), ValueError, "memory: expected"),
    "fuse memory none": (lambda: fuse(NETWORK, memory=None), ValueError, "memory: expected"),
    "fuse memory list": (lambda: fuse(NETWORK, memory=["low"]), ValueError, "memory: expected"),
    "fuse memory NUL": (lambda: fuse(NETWORK, memory="low\0"), ValueError, "memory: expected"),
    "fuse filter": (lambda: fuse(NETWORK, filter_fn="conv"), TypeError, "filter_fn: expected"),
    "fuse filter of nothing": (
        lambda: fuse(NETWORK, inplace=True, filter_fn=lambda: True), TypeError, "argument",
    ),
    "fuse by position": (lambda: fuse(NETWORK, True), TypeError, "positional"),
    "fuse unknown": (lambda: fuse(NETWORK, eager=True), TypeError, "eager"),
    "unfuse by position": (lambda: unfuse(NETWORK, True), TypeError, "positional"),
    "explain number": (lambda: explain(NETWORK, 3), TypeError, r"inputs\[0\]: expected"),
    "explain list": (lambda: explain(NETWORK, X, [X]), TypeError, r"inputs\[1\]: expected"),
    "explain none": (lambda: explain(NETWORK, None), TypeError, r"inputs\[0\]: expected"),
    "explain shape": (lambda: explain(NETWORK, ONES), RuntimeError, "input"),
    "explain two": (lambda: explain(NETWORK, X, X), TypeError, "argument"),
    "explain meta": (lambda: explain(NETWORK, X.to("meta")), RuntimeError, "meta"),
    "verify number": (lambda: verify(NETWORK, 3), TypeError, r"inputs\[0\]: expected"),
    "verify nothing": (lambda: verify(NETWORK), TypeError, "argument"),
    "verify int64": (lambda: verify(NETWORK, X.long()), RuntimeError, "type"),
    "verify sparse": (lambda: verify(NETWORK, X.to_sparse()), RuntimeError, "."),
    "verify meta": (lambda: verify(NETWORK, X.to("meta")), RuntimeError, "meta"),
    "verify shape": (lambda: verify(NETWORK, X[:, :2]), RuntimeError, "channels"),
    "capture number": (lambda: capture(NETWORK, 3), TypeError, r"example\[0\]: expected"),
    "capture nothing": (lambda: capture(NETWORK), ValueError, "example: expected"),
    "capture on a CPU": (lambda: capture(NETWORK, X), ValueError, r"example\[0\]: .*CUDA"),
    "capture mismatch": (
        lambda: capture(NETWORK, X, on_mismatch="retry"), ValueError, "on_mismatch: expected",
    ),
    **{
        f"precision {p!r}": (lambda p=p: resnet_fused.precision(p), ValueError, "policy: expected")
        for p in (None, "", "Strict", "strict\0", ["strict"], {}, 1, math.nan, "x" * 100_000)
    },
    "precision nothing": (lambda: resnet_fused.precision(), TypeError, "policy"),
}  # fmt: skip

ResNet, Basic, Bottleneck = models.ResNet, models.BasicBlock, models.Bottleneck
FOUR = [1, 1, 1, 1]
MODELS: dict[str, Refused] = {
    "no layers": (lambda: ResNet(Basic, None), ValueError, "layers"),
    "layers of text": (lambda: ResNet(Basic, "1111"), ValueError, "layers"),
    "a number of layers": (lambda: ResNet(Basic, 4), ValueError, "layers"),
    "negative layers": (lambda: ResNet(Basic, [1, 1, 1, -1]), ValueError, "layers"),
    "no block": (lambda: ResNet(None, FOUR), TypeError, "block must be"),
    "another module": (lambda: ResNet(nn.ReLU, FOUR), TypeError, "block must be"),
    "a block itself": (lambda: ResNet(Basic(8, 8), FOUR), TypeError, "block must be"),
    **{
        f"groups {n!r}": (
            lambda n=n: ResNet(Bottleneck, FOUR, groups=n), ValueError, "groups must be",
        )
        for n in (0, -1, "1", 1.0, True, None, math.nan)
    },
    **{
        f"width {n!r}": (
            lambda n=n: ResNet(Bottleneck, FOUR, width_per_group=n), ValueError, "width must be",
        )
        for n in (0, -64, "64", None, math.inf)
    },
    **{
        f"classes {n!r}": (lambda n=n: models.resnet20(num_classes=n), ValueError, "num_classes")
        for n in (0, -1, "10", None, 1.5, True)
    },
    "2^50 classes": (lambda: models.resnet20(num_classes=2**50), RuntimeError, "memory"),
    "depth of text": (lambda: models.CifarResNet("20"), ValueError, "depth"),
    "shortcut list": (lambda: models.resnet20(shortcut=["A"]), ValueError, "shortcut"),
    "unknown option": (lambda: models.resnet18(depth=18), TypeError, "depth"),
    "by position": (lambda: models.resnet18(10), TypeError, "positional"),
    **{
        f"{block.__name__} {name} {n!r}": (
            lambda block=block, name=name, n=n: block(
                **{"in_channels": 16, "planes": 16, **{name: n}}
            ),
            ValueError,
            f"{name} must be a positive integer",
        )
        for block in (Basic, Bottleneck, models.PlainBlock)
        for name in ("in_channels", "planes", "stride")
        for n in (0, -1, None, "16", 1.5)
    },
    "downsample": (lambda: Basic(16, 16, downsample="conv"), TypeError, "downsample must be"),
    "padding to fewer": (lambda: models.ZeroPadShortcut(8, 4, stride=1), ValueError, "at least"),
    "padding of none": (lambda: models.ZeroPadShortcut(0, 4, stride=1), ValueError, "in_channels"),
    "padding stride": (lambda: models.ZeroPadShortcut(4, 4, stride=0), ValueError, "stride"),
}  # fmt: skip


def folded(**change: Any) -> Callable[[], Any]:
    good: dict[str, Any] = {
        "mean": ONES, "var": ONES, "weight": ONES, "bias": ONES, "eps": 1e-5, "conv_bias": ONES,
        "dtype": torch.float32,
    }  # fmt: skip
    return lambda: fold.scale_and_shift(**(good | change))


LEAVES: dict[str, Refused] = {
    **{
        f"fold {name} {kind}": (folded(**{name: value}), error, f"{name}: expected")
        for name in ("mean", "var", "weight", "bias", "conv_bias")
        for kind, value, error in (
            ("list", [1.0] * 4, TypeError),
            ("complex", ONES.cfloat(), TypeError),
            ("int64", ONES.long(), TypeError),
            ("sparse", ONES.to_sparse(), TypeError),
            ("quantized", QUANTIZED, TypeError),
        )
    },
    **{
        f"fold short {name}": (folded(**{name: ONES[:3]}), ValueError, f"{name}: expected mean's")
        for name in ("var", "weight", "bias", "conv_bias")
    },
    "fold no mean": (folded(mean=None), TypeError, "mean: expected"),
    "fold no var": (folded(var=None), TypeError, "var: expected"),
    "fold text": (folded(eps="small"), TypeError, "."),
    "fold to int32": (folded(dtype=torch.int32), TypeError, "dtype: expected"),
    "fold to nothing": (folded(dtype=None), TypeError, "dtype: expected"),
    "fold a meta tensor": (folded(var=ONES.to("meta")), RuntimeError, "meta"),
    **{
        f"error of {kind}": (
            lambda a=a, b=b: parity.relative_error(a, b), TypeError, f"{name}: expected",
        )
        for kind, a, b, name in (
            ("none", None, ONES, "actual"),
            ("list", [1.0], ONES, "actual"),
            ("a number", ONES, 1.0, "reference"),
            ("complex", ONES, ONES.cfloat(), "reference"),
            ("quantized", QUANTIZED, ONES, "actual"),
        )
    },
    "error of others": (lambda: parity.relative_error(ONES, X), ValueError, "actual: expected"),
    "budget of int32": (lambda: parity.error_budget(1.0, torch.int32), TypeError, "floating"),
}  # fmt: skip

BENCHMARK: dict[str, Refused] = {
    **{
        f"case {name} {value!r}": (
            lambda name=name, value=value: Case(**{"model": "resnet20", name: value}),
            BenchmarkError,
            name,
        )
        for name in ("batch_size", "image_size", "threads")
        for value in (0, -1, 1.5, "16", None, True, math.nan)
    },
    "device": (lambda: benchmark.check_device("cuda:99999999999"), BenchmarkError, "device"),
    "negative device": (lambda: benchmark.check_device("cuda:-1"), BenchmarkError, "device"),
    "device NUL": (lambda: benchmark.check_device("cpu\0"), BenchmarkError, "device"),
    "negative batch": (lambda: benchmark.random_images(-1, 8), BenchmarkError, "negative"),
    "negative image": (lambda: benchmark.random_images(1, -8), BenchmarkError, "negative"),
    "2^40 images": (lambda: benchmark.random_images(2**40, 2**20), MemoryError, "GiB"),
    "no photographs": (lambda: benchmark.photographs(0, 8), BenchmarkError, "at least 1"),
    "no pixels": (lambda: benchmark.photographs(1, 0), BenchmarkError, "at least 1"),
    "no model": (lambda: benchmark.load_model(""), LoadError, "unknown model"),
    "model NUL": (lambda: benchmark.load_model("a\0b.py:net"), LoadError, "no file"),
    "folder": (lambda: benchmark.load_model("/tmp.py:net"), LoadError, "no file"),
    "long model": (lambda: benchmark.load_model("x" * 100_000), LoadError, "unknown model"),
    "NaN": (lambda: benchmark.json_text({"error": math.nan}), ValueError, "JSON"),
    "table": (
        lambda: benchmark.print_table("t", ("a",), [["b", "c"]], sys.stderr), ValueError, "zip",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", API)
def test_api(kind: str) -> None:
    call, error, message = API[kind]
    classes = [type(m) for m in NETWORK.modules()]
    state, before = copy.deepcopy(NETWORK.state_dict()), policy.current()
    with pytest.raises(error, match=message):
        call()
    assert [type(m) for m in NETWORK.modules()] == classes
    assert all(torch.equal(v, state[k]) for k, v in NETWORK.state_dict().items())
    assert policy.current() == before


@pytest.mark.parametrize("kind", [*MODELS, *LEAVES, *BENCHMARK])
def test_other_functions(kind: str) -> None:
    call, error, message = (MODELS | LEAVES | BENCHMARK)[kind]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("machine", "choices"),
    [
        ("m" * 300, {"a": "direct"}),
        ("other", {"a" * 300: "direct"}),
        ("other", {"a": "d" * 300}),
        ("other", {"a": 3}),
        ("other", {3: "direct"}),
        ("other", {"a": None}),
        ("other", None),
        ("other", ["a"]),
        (None, {"a": "direct"}),
        (b"other", {"a": "direct"}),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_choices_that_would_not_be_read_again_are_not_written(
    machine: Any, choices: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the whole file would be ignored, with what was measured before."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(directory))
    file = tuning_cache.update("machine", {"problem": "direct"})
    before = file.read_bytes()
    with pytest.raises(ValueError, match="choices: expected"):
        tuning_cache.update(machine, choices)
    assert file.read_bytes() == before and os.listdir(directory) == [file.name]
    assert tuning_cache.read("machine") == {"problem": "direct"}
