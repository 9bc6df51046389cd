"""The running statistics of a block in training, and moving averages of the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_parity
from torch import nn
from train_case import big, images, smooth

import resnet_fused
from resnet_fused.backends import native_conv


def _frozen(norm: nn.BatchNorm2d) -> None:
    norm.eval()
    norm.train = lambda mode=True: norm  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "change",
    [
        lambda norm: None,
        lambda norm: setattr(norm, "momentum", None),
        lambda norm: setattr(norm, "momentum", 0.9),
        lambda norm: setattr(norm, "track_running_stats", False),
        lambda norm: setattr(norm, "num_batches_tracked", None),
        _frozen,
    ],
    ids=["as it is", "cumulative", "another momentum", "untracked", "uncounted", "frozen"],
)
def test_running_statistics(change: Callable[[nn.BatchNorm2d], None]) -> None:
    """After three steps, of which one batch is of another size, and an evaluation in between."""
    plain = big("basic")
    change(plain[1].bn1)
    models_ = [resnet_fused.fuse(plain), plain, copy.deepcopy(plain).double()]
    states = []
    for model in models_:
        generator = torch.Generator().manual_seed(3)
        for count in (4, 2, 4):
            x = torch.randn(count, 64, 20, 18, generator=generator)
            x = x.to(memory_format=torch.channels_last).to(next(model.parameters()).dtype)
            model.train()
            model(x).square().mean().backward()
            model.eval()
            version = model[0].bn2.running_mean._version
            model(x)
            assert model[0].bn2.running_mean._version == version
        states.append(dict(model.named_buffers()))
    assert int(states[0]["0.bn1.num_batches_tracked"]) == 3
    for name in states[0]:
        assert_parity(*(state[name] for state in states), what=name)


def test_running_statistics_are_a_visible_change() -> None:
    """In-place changes by compiled operators reach the version counters."""
    model = resnet_fused.fuse(big("basic"))
    buffers = dict(model.named_buffers())
    before = {name: b._version for name, b in buffers.items()}
    model(images("basic")).sum().backward()
    assert all(b._version > before[name] for name, b in buffers.items())


def test_moving_average_of_a_model_in_training() -> None:
    averages = []
    for make in (resnet_fused.fuse, copy.deepcopy, lambda m: copy.deepcopy(m).double()):
        model = make(smooth(big("bottleneck")))
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        x = images("bottleneck").to(next(model.parameters()).dtype)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            average.update_parameters(model)
        averages.append(average.module.state_dict())
        x.requires_grad_()
        average.train()(x).sum().backward()  # a copy trains as well
        assert x.grad is not None and x.grad.isfinite().all()
    for name in averages[0]:
        assert_parity(*(state[name] for state in averages), what=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factors": [1.0]}, "equally many, got 2, 2 and 1"),
        ({"batch": [torch.zeros(3), torch.zeros(4)]}, "batch must be like running"),
        ({"running": [torch.ones(3), torch.ones(6)[::2]]}, "running must be dense"),
        ({"batch": [torch.zeros(3), torch.zeros(3).double()]}, "batch must be like running"),
        ({"counters": [torch.tensor([0, 0])]}, "counters must be int64 scalars"),
        ({"running": [torch.zeros(3).half()] * 2}, "float32 or float64, got float16"),
        ({"counters": [torch.tensor(1.0)]}, "counters must be int64"),
    ],
)
def test_bad_arguments_of_running_statistics(change: dict[str, Any], message: str) -> None:
    if native_conv.unusable(torch.float32):
        pytest.skip(str(native_conv.unusable(torch.float32)))
    arguments: dict[str, Any] = {
        "running": [torch.ones(3), torch.ones(3)], "counters": [torch.tensor(0)],
        "batch": [torch.zeros(3), torch.zeros(3)], "factors": [1.0, 1.0], "momentum": 0.1,
    }  # fmt: skip
    arguments |= change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.resnet_fused._update_running_statistics(*arguments.values())
    assert all(bool((t == 1).all()) for t in arguments["running"] if "running" not in change)
