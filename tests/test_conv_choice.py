"""Which algorithm runs a convolution, and what the precision policy has to say in it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import resnet_fused
from resnet_fused import packing, policy
from resnet_fused.conv_choice import (
    LIBRARY,
    NATIVE,
    ConvProblem,
    candidates,
    choose,
    choose_training,
    cost,
)
from resnet_fused.functional import conv_bn_act, scale_shift_act


def problem(
    channels: int = 64,
    size: int = 56,
    outputs: int = 64,
    kernel: int = 3,
    stride: int = 1,
    batch: int = 16,
    groups: int = 1,
) -> ConvProblem:
    return ConvProblem(
        batch, channels, (size, size), outputs, (kernel, kernel), (stride, stride),
        (kernel // 2, kernel // 2), (1, 1), groups,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "default", "strict"),
    [
        (problem(), "winograd4", "winograd2"),
        (problem(512, 7, 512), "winograd4", "winograd2"),
        # Four tiles cannot pay for reading four times the weights from memory.
        (problem(512, 7, 512, batch=1), "winograd4_late", "winograd2"),
        (problem(256, 14, 256, batch=1), "winograd4", "winograd2"),
        (problem(128, 56, 128, stride=2), "winograd4", "onednn"),
        (problem(512, 14, 512, stride=2, batch=1), "winograd4_late", "onednn"),
        (problem(256, 56, 64, kernel=1), "direct", "onednn"),
        (problem(64, 56, 256, kernel=1), "direct", "direct"),
        (problem(512, 28, 128, kernel=1), "direct", "onednn"),
        (problem(1024, 14, 256, kernel=1), "strassen", "onednn"),
        (problem(1024, 14, 2048, kernel=1, stride=2), "strassen", "onednn"),
        (problem(1024, 14, 2048, kernel=1, stride=2, batch=1), "direct", "onednn"),
        (problem(1024, 5, 256, kernel=1, batch=64), "direct", "onednn"),  # 25 pixels fill no pair
        (problem(3, 224, 64, kernel=7, stride=2), "direct", "onednn"),
        (problem(64, 56, 64, groups=64), "onednn", "onednn"),
        (problem(128, 56, 128, groups=32), "grouped", "grouped"),
        (problem(512, 14, 512, groups=32), "grouped", "onednn"),
        (problem(256, 56, 256, stride=2, groups=32), "grouped", "grouped"),
        (problem(64, 56, 3, kernel=1), "onednn", "onednn"),
    ],
)
def test_what_is_chosen_for_layers_of_resnets(
    shape: ConvProblem, default: str, strict: str
) -> None:
    assert choose(shape, "default") == default
    assert choose(shape, "strict") == strict


def test_bfloat16_with_stride_2_is_multiplied_in_tiles_of_3() -> None:
    for channels, size in ((64, 56), (128, 28), (256, 28), (512, 14)):
        shape = replace(problem(channels, size, 2 * channels, stride=2), bf16=True)
        assert choose(shape, "default") == "winograd3"
        assert "winograd3" not in candidates(shape, "strict")
        assert "winograd3" not in candidates(replace(shape, bf16=False), "default")
        assert "winograd3" not in candidates(replace(shape, stride=(1, 1)), "default")


def test_bfloat16_weights_are_not_transformed_in_the_call() -> None:
    shape = replace(problem(512, 7, 512, batch=1), bf16=True)
    assert "winograd4_late" not in candidates(shape, "default")


def test_bfloat16_is_not_rounded_in_transforms_of_few_channels() -> None:
    for stride in (1, 2):
        rounded = {"winograd2", "winograd3"}
        few = replace(problem(15, 28, 64, stride=stride), bf16=True)
        assert not rounded & set(candidates(few, "default"))
        assert rounded & set(candidates(replace(few, channels=16), "default"))


def test_strict_training_has_no_long_sums() -> None:
    """Those of direct convolutions are added up in one part, PyTorch's in several."""
    narrow, wide = problem(512, 7, 128, kernel=1), problem(64, 14, 256, kernel=1)
    assert choose_training(narrow, "strict") == (LIBRARY, "direct", "gemm")
    assert choose_training(wide, "strict") == ("direct", LIBRARY, "gemm")
    assert choose_training(problem(64, stride=2), "strict") == (LIBRARY, LIBRARY, "gemm")
    assert choose_training(problem(3, 224, 64, kernel=7, stride=2), "strict").output == LIBRARY
    assert LIBRARY not in choose_training(narrow, "default") + choose_training(wide, "default")


def test_strict_leaves_to_blas_what_eager_leaves_to_it() -> None:
    """On one thread; oneDNN's long sums err 1.7 times as much."""
    products = problem(1024, 14, 256, kernel=1, batch=2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with resnet_fused.precision("strict"):
            assert packing.choose(products, "strict") == LIBRARY
            assert packing.choose(problem(64, 56, 256, kernel=1, batch=2), "strict") != "onednn"
            assert packing.choose(replace(products, stride=(2, 2)), "strict") == "onednn"
            assert packing.choose(replace(products, batch=16), "strict") == "onednn"
            x = torch.randn(2, 1024, 7, 7).to(memory_format=torch.channels_last)
            weight, vector = torch.randn(256, 1024, 1, 1), torch.rand(256)
            fused = conv_bn_act(x, weight, vector, vector, act="relu")
            by_blas = torch.conv2d(x, weight)
            assert torch.equal(fused, scale_shift_act(by_blas, vector, vector, act="relu"))
        assert "onednn" in packing.algorithms(products, "default")
        torch.set_num_threads(2)
        assert packing.choose(products, "strict") == "onednn"
    finally:
        torch.set_num_threads(threads)


def test_strict_admits_a_part_of_what_default_admits() -> None:
    for channels, kernel, stride in itertools.product((8, 16, 64), (1, 3, 5), (1, 2, 3)):
        shape = problem(channels, 20, channels, kernel, stride)
        assert set(candidates(shape, "strict")) <= set(candidates(shape, "default")) <= set(NATIVE)
        assert not {"winograd4", "winograd4_late"} & set(candidates(shape, "strict"))
        assert all(cost(shape, a) > 0 for a in (*candidates(shape, "default"), "onednn"))


def test_policy_holds_until_its_block_ends() -> None:
    assert policy.current() == "default"
    with resnet_fused.precision("strict"):
        assert policy.current() == "strict"
        with resnet_fused.precision("default"):
            assert policy.current() == "default"
        assert policy.current() == "strict"
    assert policy.current() == "default"
    with pytest.raises(KeyError), resnet_fused.precision("strict"):
        raise KeyError
    assert policy.current() == "default"


def test_policy_is_also_a_function() -> None:
    resnet_fused.precision("strict")
    assert policy.current() == "strict"
    resnet_fused.precision("default")
    assert policy.current() == "default"


@pytest.mark.parametrize("wrong", ["loose", "", "STRICT", None, 1])
def test_unknown_policy(wrong: object) -> None:
    with pytest.raises(ValueError, match="policy: expected one of strict, default"):
        resnet_fused.precision(wrong)  # type: ignore[arg-type]
    assert policy.current() == "default"
