"""A good call of every operator: what the tests of hostile arguments spoil one by one.

Arguments have the schema's names and order. Tensors are small, and multiples of nothing where a
kernel takes that. Behind a colon stands the variant of an operator whose kernels differ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from test_functional import noise
from torch import Tensor

from resnet_fused.backends import cuda_conv, reference
from resnet_fused.backends.native_conv import multiplies_bf16, pack

Arguments = dict[str, Any]
LAST = torch.channels_last
WINDOW = {"kernel_size": [3, 3], "stride": [2, 2], "padding": [1, 1], "dilation": [1, 1]}
NORM = {"eps": 1e-3, "act": "relu", "negative_slope": 0.1}


def image(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return noise(*shape, seed=seed, dtype=dtype).contiguous(memory_format=LAST)


def vectors(channels: int, seed: int = 7) -> list[Tensor]:
    """A batch norm's mean, var, weight and bias."""
    mean, var, weight, bias = (noise(channels, seed=seed + i) for i in range(4))
    return [mean * 0.1, var.abs() + 0.5, weight.abs() + 0.5, bias]


# ---- batch norm ----------------------------------------------------------------------------------

X = functools.partial(image, 3, 5, 4, 6)


def bn_vectors(*names: str) -> Arguments:
    return {n: v for n, v in zip(("mean", "var", "weight", "bias"), vectors(5), strict=True)
            if n in names}  # fmt: skip


def scale_shift_act() -> Arguments:
    scale, shift = vectors(5)[2:]
    return {"input": X(), "scale": scale, "shift": shift, "residual": X(seed=1),
            "act": "leaky_relu", "negative_slope": 0.1}  # fmt: skip


def bn_act() -> Arguments:
    return {"input": X(), "residual": X(seed=1)} | bn_vectors("weight", "bias") | NORM


def normalize_act() -> Arguments:
    return (
        {"input": X(), "residual": X(seed=1)} | bn_vectors("mean", "var", "weight", "bias") | NORM
    )


def bn_act_backward() -> Arguments:
    given = {"grad_output": X(seed=2), "input": X(), "residual": X(seed=1), "output": X(seed=1)}
    return given | bn_vectors("mean", "var", "weight", "bias") | NORM | {"has_residual": True}


def bn_act_backward_input() -> Arguments:
    sums = {"grad_weight": noise(5, seed=4), "grad_bias": noise(5, seed=5)}
    given = {"grad_output": X(seed=2), "input": X()} | bn_vectors("mean", "var", "weight", "bias")
    return given | sums | NORM | {"count": 72}


def update_running_statistics() -> Arguments:
    return {
        "running": vectors(5)[:2],
        "counters": [torch.tensor(3), torch.tensor(4)],
        "batch": vectors(5, seed=11)[:2],
        "factors": [1.0, 1.1],
        "momentum": 0.1,
    }


# ---- pools ---------------------------------------------------------------------------------------


def max_pool2d() -> Arguments:
    return {"input": image(2, 19, 7, 9)} | {k: list(v) for k, v in WINDOW.items()}


def train_pool() -> Arguments:
    window = [n for pair in WINDOW.values() for n in pair]
    return {"input": image(2, 19, 7, 9), "vectors": vectors(19)} | NORM | {"window": window}


def pooled(places: Tensor | None = None) -> Arguments:
    if places is None:
        generator = torch.Generator().manual_seed(3)
        places = torch.randint(0, 9, (2, 19, 4, 5), dtype=torch.uint8, generator=generator)
    positions = places.contiguous(memory_format=LAST)
    return {"grad": image(2, 19, 4, 5, seed=2), "positions": positions, "input": image(2, 19, 7, 9)}


def train_pool_sums() -> Arguments:
    return pooled() | {k: v for k, v in train_pool().items() if k != "input"}


def train_pool_input() -> Arguments:
    sums = {"grad_weight": noise(19, seed=4), "grad_bias": noise(19, seed=5)}
    rest = {k: v for k, v in train_pool().items() if k not in ("input", "vectors")}
    return pooled() | {"vectors": vectors(19)} | sums | rest | {"count": 126}


def max_unpool() -> Arguments:
    return pooled() | {"window": train_pool()["window"]}


# ---- convolutions --------------------------------------------------------------------------------

GEOMETRY = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}


def conv_bn_act() -> Arguments:
    scale, shift = vectors(6)[2:]
    return {
        "input": image(2, 4, 6, 5), "weight": image(6, 4, 3, 3, seed=1), "scale": scale,
        "shift": shift, "residual": image(2, 6, 6, 5, seed=2),
        **{k: list(v) for k, v in GEOMETRY.items()},
        "groups": 1, "act": "relu", "negative_slope": 0.1,
    }  # fmt: skip


def sizes_for(algorithm: str) -> tuple[int, int, int, int]:
    """Outputs, channels of a group, kernel and groups that it takes."""
    return {"grouped": (16, 4, 3, 4), "strassen": (64, 32, 1, 1)}.get(algorithm, (33, 18, 3, 1))


def pack_conv(algorithm: str, pairs: bool = False) -> Arguments:
    outputs, channels, kernel, groups = sizes_for(algorithm)
    weight = noise(outputs, channels, kernel, kernel, seed=1, dtype=torch.float64)
    return {"weight": weight, "stride": 1, "groups": groups, "algorithm": algorithm, "pairs": pairs}


def packed_convs(algorithm: str, pairs: bool = False) -> Arguments:
    """Two blocks: a convolution of the outside residual and one that adds the input; and one."""
    outputs, channels, kernel, groups = sizes_for(algorithm)
    dtype = torch.bfloat16 if pairs else torch.float32
    wide, p = channels * groups, kernel // 2
    weight = noise(outputs, channels, kernel, kernel, seed=1).to(dtype)
    back = noise(wide, outputs, 1, 1, seed=3).to(dtype)
    packed = [
        pack(weight, None, 1, groups, algorithm, pairs=pairs),
        pack(back, None, 1, 1, "direct", pairs=pairs),
        pack(weight, None, 1, groups, algorithm, pairs=pairs),
    ]
    geometry = [1, 1, p, p, 1, 1, groups]
    return {
        "input": image(2, wide, 6, 5, dtype=dtype),
        "residual": image(2, outputs, 6, 5, seed=2, dtype=dtype),
        "packed": packed,
        "weights": [weight, back, weight.clone()],
        "scales": [torch.ones(outputs), torch.ones(wide), torch.ones(outputs)],
        "shifts": [noise(outputs), noise(wide), noise(outputs)],
        "steps": [0, 1, *geometry, 2, 0, 1, 1, 0, 0, 1, 1, 1, 0, -1, *geometry],
        "algorithms": [algorithm, "direct", algorithm],
        "acts": ["relu", "leaky_relu", "none"],
        "negative_slopes": [0.0, 0.1, 0.0],
        "blocks": [2, 1],
    }


def train_conv(algorithm: str = "direct", dtype: torch.dtype = torch.float32) -> Arguments:
    return {
        "input": image(2, 18, 6, 5, dtype=dtype), "before": vectors(18), **NORM,
        "weight": image(33, 18, 3, 3, seed=1) / 12, "bias": noise(33), "geometry": [1] * 6,
        "algorithm": algorithm,
    }  # fmt: skip


def train_conv_backward(weight_algorithm: str = "gemm", pool: bool = False) -> Arguments:
    given = {
        "grad": image(2, 34, 6, 5, seed=2), "output": image(2, 34, 6, 5, seed=3),
        "after": [*vectors(34), noise(34, seed=5), noise(34, seed=6)],
        "after_eps": 1e-3, "after_act": "relu", "after_slope": 0.1, "count": 60,
        "positions": None, "window": [],
        "input": image(2, 18, 6, 5), "before": vectors(18), "before_eps": 1e-3,
        "before_act": "leaky_relu", "before_slope": 0.1, "weight": image(34, 18, 3, 3, seed=1) / 12,
        "geometry": [1] * 6, "residual": image(2, 18, 6, 5, seed=4),
        "input_algorithm": "direct" if weight_algorithm == "gemm" else "winograd4_late",
        "weight_algorithm": weight_algorithm,
    }  # fmt: skip
    if not pool:
        return given
    generator = torch.Generator().manual_seed(3)
    places = torch.randint(0, 9, (2, 34, 3, 3), dtype=torch.uint8, generator=generator)
    return given | {
        "grad": image(2, 34, 3, 3, seed=2),
        "positions": places.contiguous(memory_format=LAST),
        "window": [n for pair in WINDOW.values() for n in pair],
    }


def train_block() -> Arguments:
    """A basic block: two convolutions, and the input added to the second one's output."""
    weights = [image(18, 18, 3, 3, seed=s) / 12 for s in (1, 2)]
    both = [vectors(18, seed=s)[2:] for s in (20, 30)]
    return {
        "input": image(2, 18, 6, 5),
        "parameters": [weights[0], *both[0], weights[1], *both[1]],
        "numbers": [0, -1, *[1] * 6, 6, 2, 0, *[1] * 6, 14],
        "scalars": [1e-3, 0.0, 1e-3, 0.1],
        "names": [
            "relu", "direct", "direct", "gemm", "leaky_relu", "direct", "direct", "winograd4",
        ],
    }  # fmt: skip


def train_block_backward(drops_last: bool = False) -> Arguments:
    given = train_block()
    z0, z1, *statistics, output = torch.ops.resnet_fused._train_block(**given)
    input = given.pop("input")
    return {
        "grad_output": image(2, 18, 6, 5, seed=9), "outputs": [z0] if drops_last else [z0, z1],
        "statistics": statistics, "kept": [input, output], "kept_values": [0, 3],
        "needs": [1, 1, 1], **given,
    }  # fmt: skip


CPU: dict[str, Callable[[], Arguments]] = {
    "conv_bn_act": conv_bn_act,
    "scale_shift_act": scale_shift_act,
    "_scale_shift_act_": scale_shift_act,
    "bn_act": bn_act,
    "bn_act_backward": bn_act_backward,
    "bn_act_backward_sums": bn_act_backward,
    "bn_act_backward_input": bn_act_backward_input,
    "batch_statistics": lambda: {"input": X()},
    "normalize_act": normalize_act,
    "_update_running_statistics": update_running_statistics,
    "_check_conv": lambda: {
        k: v for k, v in conv_bn_act().items() if k not in ("act", "negative_slope")
    },
    "_max_abs": lambda: {"input": X()},
    "_average_pixels": lambda: {"input": X()},
    "_pool_clone": lambda: {"input": X()},
    "_pool_zeros": lambda: {"size": [2, 3, 4, 5], "dtype": torch.float32},
    "_pool_release": dict,
    "_pool_idle_bytes": dict,
    "_cpu_isa": dict,
    "_max_pool2d": max_pool2d,
    "_train_pool": train_pool,
    "_train_pool_sums": train_pool_sums,
    "_max_unpool": max_unpool,
    "_train_conv": train_conv,
    "_train_conv: winograd": lambda: train_conv("winograd4"),
    "_train_conv_backward": train_conv_backward,
    "_train_conv_backward: winograd": lambda: train_conv_backward("winograd4"),
    "_train_conv_backward: pool": lambda: train_conv_backward(pool=True),
    "_train_block": train_block,
    "_train_block_backward": train_block_backward,
    "_train_block_backward: again": lambda: train_block_backward(drops_last=True),
}
for _algorithm in ("direct", "winograd2", "winograd4", "winograd4_late", "grouped", "strassen"):
    CPU[f"_pack_conv: {_algorithm}"] = functools.partial(pack_conv, _algorithm)
    CPU[f"_packed_convs: {_algorithm}"] = functools.partial(packed_convs, _algorithm)
if multiplies_bf16():
    CPU["_train_conv: bfloat16"] = lambda: train_conv("winograd2_late", torch.bfloat16)
    for _algorithm in ("direct", "winograd2"):
        CPU[f"_pack_conv: {_algorithm} pairs"] = functools.partial(pack_conv, _algorithm, True)
        CPU[f"_packed_convs: {_algorithm} pairs"] = functools.partial(
            packed_convs, _algorithm, True
        )


# ---- the CUDA library's --------------------------------------------------------------------------


def cuda_conv_call(operators: Any, algorithm: str) -> Arguments:
    stem = algorithm == "stem_16x16"
    x = image(1, 3 if stem else 16, 6, 5, dtype=torch.bfloat16)
    weight = (noise(8, x.shape[1], 3, 3, seed=1) / 12).bfloat16()
    packed = cuda_conv.pack_stem(weight) if stem else operators._cuda_pack(weight, 1, 64, False)
    scale, shift = vectors(8)[2:]
    return {
        "input": x, "weights": packed, "scale": scale, "shift": shift,
        "residual": image(1, 8, 6, 5, seed=2, dtype=torch.bfloat16), "out_channels": 8,
        "geometry": [3, 3, 1, 1, 1, 1, 1, 1], "groups": 1, "act": "relu", "negative_slope": 0.1,
        "algorithm": algorithm,
    }  # fmt: skip


def cuda_pack() -> Arguments:
    return {"weight": noise(40, 10, 3, 3), "groups": 1, "columns": 64, "turned": False}


def cuda_train_conv(algorithm: str) -> Arguments:
    return {
        "input": image(2, 16, 6, 5, dtype=torch.bfloat16), "vectors": vectors(16), **NORM,
        "weight": (noise(8, 16, 3, 3, seed=1) / 12).bfloat16(), "bias": noise(8),
        "geometry": [1] * 6, "groups": 1, "algorithm": algorithm,
    }  # fmt: skip


def cuda_train_conv_input(algorithm: str) -> Arguments:
    return {
        "grad": image(2, 8, 6, 5, seed=2, dtype=torch.bfloat16),
        "z": image(2, 16, 6, 5, seed=3, dtype=torch.bfloat16), "vectors": vectors(16), **NORM,
        "weight": (noise(8, 16, 3, 3, seed=1) / 12).bfloat16(),
        "residual": image(2, 16, 6, 5, seed=4, dtype=torch.bfloat16),
        "geometry": [1] * 6, "algorithm": algorithm,
    }  # fmt: skip


def cuda(operators: Any) -> dict[str, Callable[[], Arguments]]:
    """Of the CUDA library, whose operators pack some of the arguments."""
    shared = (
        "scale_shift_act", "bn_act", "bn_act_backward", "bn_act_backward_sums",
        "bn_act_backward_input", "batch_statistics", "normalize_act",
        "_update_running_statistics", "_max_pool2d", "_train_pool", "_train_pool_sums",
        "_max_unpool",
    )  # fmt: skip
    calls: dict[str, Callable[[], Arguments]] = {name: CPU[name] for name in shared}
    calls |= {"_finish_conv_": scale_shift_act, "_train_pool_input": train_pool_input}
    calls["_cuda_pack"] = cuda_pack
    for name in ("mma_128x64", "wgmma_128x64", "stem_16x16"):
        calls[f"_cuda_conv: {name}"] = functools.partial(cuda_conv_call, operators, name)
    for name in ("mma_128x64", "wgmma_128x64"):
        calls[f"_cuda_train_conv: {name}"] = functools.partial(cuda_train_conv, name)
        calls[f"_cuda_train_conv_input: {name}"] = functools.partial(cuda_train_conv_input, name)
    return calls


# ---- the same by plain PyTorch -------------------------------------------------------------------


def _plain_train_conv(
    input: Tensor, before: list[Tensor], eps: float, act: str, negative_slope: float,
    weight: Tensor, bias: Tensor | None, geometry: list[int], algorithm: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    a = input
    if before:
        mean, var, *affine = before
        w, b = (v if v.numel() else None for v in affine)
        a = reference.normalize_act(a, None, mean, var, w, b, eps, act, negative_slope)
    pairs = (geometry[0:2], geometry[2:4], geometry[4:6])
    z = F.conv2d(a, weight.to(a.dtype), None if bias is None else bias.to(a.dtype), *pairs)
    return z, *reference.batch_statistics(z)


def _plain_max_pool2d(input: Tensor, *options: Any) -> Tensor:
    """A channel at a time, of which there may be none: F.max_pool2d refuses that."""
    y = F.max_pool2d(input.flatten(0, 1)[:, None], *options)
    return y.view(*input.shape[:2], *y.shape[2:])


PLAIN: dict[str, Callable[..., Any]] = {
    "conv_bn_act": reference.conv_bn_act,
    "scale_shift_act": reference.scale_shift_act,
    "_scale_shift_act_": reference.scale_shift_act,
    "_finish_conv_": lambda input, scale, shift, *rest: reference.scale_shift_act(
        input, *reference.scale_and_shift_or_identity(input, scale, shift), *rest
    ),
    "bn_act": reference.bn_act,
    "bn_act_backward": reference.bn_act_backward,
    "bn_act_backward_sums": reference.bn_act_backward_sums,
    "bn_act_backward_input": reference.bn_act_backward_input,
    "batch_statistics": reference.batch_statistics,
    "normalize_act": reference.normalize_act,
    "_max_pool2d": _plain_max_pool2d,
    "_average_pixels": lambda input: input.mean((2, 3), keepdim=True),
    "_max_abs": lambda input: input.abs().max().item() if input.numel() else 0.0,
    "_pool_clone": lambda input: input.clone(),
    "_pool_zeros": lambda size, dtype: torch.zeros(
        [size] * 4 if isinstance(size, int) else size, dtype=dtype
    ),
    "_train_conv": _plain_train_conv,
}
"""Of those operators that have a short formula: takes the operator's arguments in order."""
