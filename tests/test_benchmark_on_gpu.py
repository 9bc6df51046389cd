"""The library's own benchmark on a GPU, as far as it can be tried without one: peers, precision,
how short calls are timed, and what outputs are judged by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from resnet_fused import benchmark
from resnet_fused.benchmark import BenchmarkError, Case, Result, measure, peers, prepare, run
from resnet_fused.benchmark.inputs import random_images

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


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
