"""The benchmark: what it measures, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from resnet_fused import benchmark
from resnet_fused.benchmark import BenchmarkError, Case, LoadError, Result, measure, peers, run
from resnet_fused.benchmark.inputs import photographs, random_images
from resnet_fused.benchmark.load import load_model
from resnet_fused.benchmark.prepare import is_untrained, prepare_model, randomise_batch_norm

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    """A case sets the threads of the whole process; with one, a busy machine matters less."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


RESULT_FIELDS = {
    "model",
    "mode",
    "device",
    "dtype",
    "batch_size",
    "image_size",
    "threads",
    "variant",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "images_per_second",
    "speedup_vs_eager",
    "relative_error",
    "peak_memory_bytes",
}


def small_case(**values: object) -> Case:
    settings: dict[str, object] = {"model": "resnet20", "batch_size": 4, "image_size": 32}
    return Case(**{**settings, **values})  # type: ignore[arg-type]


def run_small(case: Case, variants: tuple[str, ...] = ("eager", "fused")) -> dict[str, Result]:
    torch.manual_seed(0)
    images = random_images(case.batch_size, case.image_size)
    results = run.run_case(case, load_model(case.model), images, variants=variants, repeats=2)
    return {result.variant: result for result in results}


# --- measure


def test_interleave_takes_turns_with_an_untimed_call_before_each() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ABC"}
    samples: list[str] = []
    timings = measure.interleave(
        calls, repeats=2, device=CPU, pause_s=0.0, on_sample=samples.append
    )
    assert order == list("AABBCC" * 2)
    assert samples == list("ABC" * 2)
    assert set(timings) == set("ABC")


def test_the_limit_ends_timing_after_three_rounds() -> None:
    calls = {"A": lambda: time.sleep(0.01)}
    timings = measure.interleave(calls, repeats=50, device=CPU, pause_s=0.0, limit_s=0.0)
    assert timings["A"].samples == 3


def test_quantiles() -> None:
    timing = measure.summarise([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert (timing.p20_ms, timing.median_ms, timing.p80_ms) == pytest.approx((2.0, 3.5, 5.0))
    with pytest.raises(ValueError, match="at least one time"):
        measure.summarise([])
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        measure.interleave({}, repeats=0, device=CPU)


def test_saved_bytes_counts_each_storage_once_and_no_parameters() -> None:
    x = torch.randn(8, 16, requires_grad=True)
    linear = nn.Linear(16, 16, bias=False)
    activation = 8 * 16 * 4
    # Linear keeps its input (and its weight, which is not counted); multiplying keeps y twice.
    assert measure.saved_bytes(linear, lambda: linear(x)) == activation

    def square() -> torch.Tensor:
        y = linear(x)
        return y * y

    assert measure.saved_bytes(linear, square) == 2 * activation


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_peak_memory_sees_what_is_freed_again() -> None:
    size = 64 * 2**20
    peak = measure.peak_memory(lambda: torch.ones(size // 4), device=CPU)
    if peak is None:
        pytest.skip("the kernel does not let the peak be reset")
    assert 0.9 * size < peak < 1.5 * size
    small = measure.peak_memory(lambda: torch.ones(1), device=CPU)
    assert small is not None and small < 0.2 * size


def test_too_much_memory_is_refused_before_it_is_taken() -> None:
    with pytest.raises(MemoryError, match="GiB"):
        random_images(10**8, 224)


# --- inputs and BN statistics


def test_photographs_are_normalised_crops() -> None:
    pytest.importorskip("sklearn")
    images = photographs(5, 64)
    assert images.shape == (5, 3, 64, 64) and images.dtype == torch.float32
    assert images.abs().max() < 3 and images.std() > 0.3
    assert not torch.equal(images[0], images[2])
    assert torch.equal(images, photographs(5, 64))


@pytest.mark.parametrize("name", ["resnet20", "resnet50"])
def test_random_batch_norm_is_not_trivial_and_keeps_activations_small(name: str) -> None:
    torch.manual_seed(0)
    model = load_model(name).eval()
    assert is_untrained(model)
    randomise_batch_norm(model, random_images(4, 64), seed=1)
    assert not is_untrained(model)
    assert not any(module.training for module in model.modules())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.momentum == 0.1
            assert module.running_mean is not None and module.running_var is not None
            for values in (module.running_mean, module.running_var, module.weight, module.bias):
                assert values.isfinite().all() and values.std() > 1e-3
    largest: list[float] = []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda m, i, o: largest.append(float(o.std())))
    with torch.no_grad():
        model(random_images(4, 64, seed=9))
    assert max(largest) < 20 and min(largest) > 0.05


def test_trained_statistics_stay() -> None:
    model = load_model("resnet20").train()
    model(random_images(4, 32))
    before = copy.deepcopy(model.state_dict())
    case = small_case()
    prepared = prepare_model(model, random_images(4, 32), case)
    for key, value in prepared.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert model.training and not prepared.training


# --- the whole of it


def test_inference_result() -> None:
    results = run_small(small_case(), ("eager", "eager_channels_last", "fused"))
    assert list(results) == ["eager", "eager_channels_last", "fused"]
    for result in results.values():
        assert result.error is None
        values = result.to_dict()
        assert values.keys() >= RESULT_FIELDS
        assert 0 < values["p20_ms"] <= values["median_ms"] <= values["p80_ms"]
        assert values["images_per_second"] == pytest.approx(4e3 / values["median_ms"])
        assert 0 < values["relative_error"] <= values["error_budget"] < 1e-4
    assert results["eager"].speedup_vs_eager == 1.0


def test_training_result() -> None:
    results = run_small(small_case(mode="training"), ("eager", "onnxruntime", "fused"))
    for name in ("eager", "fused"):
        assert results[name].error is None
        assert results[name].saved_bytes is not None and results[name].saved_bytes > 0
    refused = results["onnxruntime"]
    assert refused.error is not None and "cannot train" in refused.error
    assert refused.median_ms is None


def test_bf16_result() -> None:
    results = run_small(small_case(dtype="bf16"))
    assert all(result.error is None for result in results.values())
    assert 1e-4 < (results["eager"].relative_error or 0) < 0.2


def test_the_callers_model_is_left_alone() -> None:
    model = load_model("resnet20").train()
    before = copy.deepcopy(model.state_dict())
    case = small_case()
    run.run_case(case, model, random_images(4, 32), variants=("eager", "fused"), repeats=1)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def spoil(y: torch.Tensor, what: str) -> torch.Tensor:
    if what == "raise":
        raise RuntimeError("broken\nsecond line")
    if what == "memory":
        raise MemoryError
    if what == "gradient":  # the right value, the gradient three times too large
        return 3 * y - 2 * y.detach()
    return y * {"output": 1.001, "nan": math.nan, "near": 1 + 1e-6}[what]


@pytest.mark.parametrize(
    ("what", "mode", "message"),
    [
        ("output", "inference", "wrong output"),
        ("nan", "inference", "wrong output: error inf"),
        ("near", "inference", "wrong output"),
        ("output", "training", "wrong output"),
        ("gradient", "training", "wrong gradient"),
        ("raise", "inference", "RuntimeError: broken"),
        ("memory", "inference", "out of memory"),
    ],
)
def test_a_wrong_variant_gets_no_speed(
    monkeypatch: pytest.MonkeyPatch, what: str, mode: str, message: str
) -> None:
    def wrong_fuse(model: nn.Module, *, inplace: bool, memory: str) -> nn.Module:
        right = model.forward
        model.forward = lambda x: spoil(right(x), what)
        return model

    monkeypatch.setattr(peers.resnet_fused, "fuse", wrong_fuse)
    results = run_small(small_case(mode=mode))
    fused = results["fused"]
    assert fused.error is not None and message in fused.error and "\n" not in fused.error
    for value in (fused.median_ms, fused.images_per_second, fused.speedup_vs_eager):
        assert value is None
    assert results["eager"].error is None and results["eager"].median_ms is not None
    json.dumps(fused.to_dict(), allow_nan=False)


def test_a_miss_is_held_to_the_mean_of_more_images(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def unlucky_fuse(model: nn.Module, *, inplace: bool, memory: str) -> nn.Module:
        right = model.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return right(x) * (1 + 1e-6 if calls <= 2 else 1)  # the first call and the first trial

        model.forward = forward
        return model

    monkeypatch.setattr(peers.resnet_fused, "fuse", unlucky_fuse)
    fused = run_small(small_case())["fused"]
    assert fused.error is None and fused.median_ms is not None
    assert 0 < (fused.relative_error or 0) <= (fused.error_budget or 0)


def test_variants_share_no_weights() -> None:
    case = small_case()
    images = random_images(4, 32)
    model = prepare_model(load_model("resnet20"), images, case)
    made = [peers.make_variant(name, model, images, case) for name in ("eager", "fused")]
    pointers = [
        {p.data_ptr() for p in variant.model.parameters()}
        for variant in made
        if isinstance(variant, peers.TorchVariant)
    ]
    assert len(pointers) == 2 and not pointers[0] & pointers[1]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_exported_peers_agree(name: str) -> None:
    case = small_case()
    reason = peers.why_not(name, case)
    if reason is not None:
        pytest.skip(reason)
    results = run_small(case, ("eager", name, "fused"))
    assert results[name].error is None, results[name].error
    assert results[name].median_ms is not None


# --- arguments


def test_peers_are_parsed() -> None:
    case = small_case()
    assert peers.parse_peers("none", case) == ("eager", "fused")
    everything = peers.parse_peers("all", case)
    assert everything == tuple(v for v in peers.VARIANTS if v not in peers.ON_GPU_ONLY)
    parsed = peers.parse_peers("compile, channels_last", case)
    assert parsed == ("eager", "eager_channels_last", "compile", "fused")
    with pytest.raises(BenchmarkError, match="unknown peer 'tensorrt'"):
        peers.parse_peers("tensorrt", case)
    with pytest.raises(BenchmarkError, match="onnxruntime has no bf16"):
        peers.parse_peers("onnxruntime", small_case(dtype="bf16"))


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BenchmarkError, match=r"openvino needs .*resnet_fused\[bench\]"):
        peers.parse_peers("openvino", small_case())
    with pytest.raises(LoadError, match=r"timm cannot be imported.*resnet_fused\[bench\]"):
        load_model("timm:resnet50")
    with pytest.raises(BenchmarkError, match=r"matplotlib.*resnet_fused\[cli\]"):
        benchmark.check_plot(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "guess"}, "mode must be one of"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"image_size": -1}, "image_size must be at least 1, got -1"),
        ({"device": "abacus"}, "unknown device 'abacus'"),
        ({"device": "meta"}, "device must be cpu or cuda"),
    ],
)
def test_bad_cases(values: dict[str, object], message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        small_case(**values)


def test_models_from_files(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("CLASSES = 3\n")
    path = tmp_path / "nets.py"
    path.write_text(
        "import neighbour, torch\n"
        "from dataclasses import dataclass\n"
        "number = 3\n"
        "def good():\n    return torch.nn.Linear(2, neighbour.CLASSES)\n"
        "def bad():\n    raise ValueError('no\\nway')\n"
        "def none():\n    pass\n"
    )
    assert load_model(f"{path}:good").out_features == 3
    for factory, message in {
        "bad": "raised ValueError: no$",
        "none": "must return a torch.nn.Module, got NoneType",
        "lost": "has no 'lost'",
        "number": "'number' in .* is not a function",
        "": "needs the name of a function",
    }.items():
        with pytest.raises(LoadError, match=message):
            load_model(f"{path}:{factory}")
    with pytest.raises(LoadError, match="there is no file"):
        load_model(f"{tmp_path}/lost.py:good")
    with pytest.raises(LoadError, match="FACTORY"):
        load_model(str(path))
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_models_from_packages(name: str) -> None:
    try:
        model = load_model(name)
    except LoadError as error:
        pytest.skip(str(error))
    assert sum(p.numel() for p in model.parameters()) == 11_689_512
    with pytest.raises(LoadError, match=r"has no model 'resnet19'.*did you mean resnet1"):
        load_model(name.replace("18", "19"))
