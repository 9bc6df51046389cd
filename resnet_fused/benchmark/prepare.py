"""What is done to a model before it is measured: memory check, BN statistics, dtype, device.

And to a batch on a GPU, of which float64 would be slow or would not fit: :func:`distinct_images`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .case import BenchmarkError, Case, one_line, out_of_memory
from .inputs import random_images
from .measure import require_memory

_MOST_DISTINCT, _LEAST_DISTINCT = 64, 8


def prepare_model(model: nn.Module, images: Tensor, case: Case) -> nn.Module:
    """A copy of `model` in the dtype, on the device and in the mode of `case`.

    One that was never trained gets random BN statistics (:func:`randomise_batch_norm`). Dropout
    is switched off, else no two steps could be compared.

    Args:
        model: its parameters on the CPU.
        images: float32 ``[N, 3, H, W]`` on the CPU, as it will be run on.

    Raises:
        BenchmarkError: the model does not run on such images.
        MemoryError: the machine has not the memory for a float64 step.
    """
    model = copy.deepcopy(model).float()
    try:
        needed = memory_estimate(model, images[:1], mode=case.mode, batch_size=case.batch_size)
        if case.device == "cpu":
            require_memory(needed)
        if is_untrained(model):
            enough = case.batch_size >= 4
            randomise_batch_norm(model, images[:8] if enough else random_images(4, case.image_size))
    except (RuntimeError, ValueError, TypeError) as error:
        if out_of_memory(error):
            raise
        raise BenchmarkError(
            f"{case.model} does not run on images {list(images.shape)}: {one_line(error)}"
        ) from error
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    training = case.mode == "training"
    return model.train(training).to(device=case.device, dtype=case.data_dtype)


def distinct_images(batch_size: int, device: torch.device) -> int:
    """How many different images a training step is judged on; the batch repeats them.

    On a GPU the largest divisor of the batch up to 64, where there is one of at least 8: the batch
    has exactly the statistics, loss and gradients of these images alone, in exact arithmetic, so
    float64 need not compute more. On the CPU all of the batch.
    """
    if device.type != "cuda":
        return batch_size
    divisor = next(d for d in range(min(batch_size, _MOST_DISTINCT), 0, -1) if batch_size % d == 0)
    return divisor if divisor >= _LEAST_DISTINCT else batch_size


def repeat_images(values: Tensor, count: int) -> Tensor:
    """`count` rows made of the rows of `values`, which divide them, in copies.

    Each copy begins one row later than the last, so that a kernel which takes an image for the one
    in its place in another copy is found out.
    """
    copies = count // values.shape[0]
    if copies == 1:
        return values
    return torch.cat([values.roll(copy, dims=0) for copy in range(copies)])


def is_untrained(model: nn.Module) -> bool:
    """Whether every BN still has the running statistics it was made with (mean 0, variance 1)."""
    return all(
        bool((norm.running_mean == 0).all()) and bool((norm.running_var == 1).all())
        for norm in _norms(model)
        if norm.running_mean is not None and norm.running_var is not None
    )


@torch.no_grad()
def randomise_batch_norm(model: nn.Module, images: Tensor, *, seed: int = 0) -> None:
    """Give every BN the look of a trained one, in place, with activations that stay O(1).

    weight ~ U(0.5, 1.5), bias ~ N(0, 0.2); the running statistics are what BN really sees on
    `images` with these weights, the mean then moved by N(0, 0.1) standard deviations and the
    variance scaled by U(0.8, 1.25). So a wrong fold shows, and a deep network neither explodes
    nor dies as it would with statistics made up at random.

    Args:
        images: ``[N, 3, H, W]``, N >= 2, of the dtype and device of `model`.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = list(_norms(model))

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.empty(like.shape).uniform_(low, high, generator=generator).to(like)

    def normal(like: Tensor, std: float) -> Tensor:
        return (torch.randn(like.shape, generator=generator) * std).to(like)

    for norm in norms:
        if norm.weight is not None and norm.bias is not None:
            norm.weight.copy_(uniform(norm.weight, 0.5, 1.5))
            norm.bias.copy_(normal(norm.bias, 0.2))
    with _collecting_statistics(model, norms):
        model(images)
    for norm in norms:
        mean, var = norm.running_mean, norm.running_var
        if mean is None or var is None:
            continue
        # A channel that hardly varies on a few small images would blow up on others.
        var.clamp_(min=0.1 * float(var.mean()))
        mean.add_(normal(mean, 0.1) * var.sqrt())
        var.mul_(uniform(var, 0.8, 1.25))


@contextmanager
def _collecting_statistics(model: nn.Module, norms: list[nn.BatchNorm2d]) -> Iterator[None]:
    """In here one forward leaves its own statistics in `norms`; all else is in eval mode."""
    was_training = {module: module.training for module in model.modules()}
    momentum = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training
        for norm, value in zip(norms, momentum, strict=True):
            norm.momentum = value


def _norms(model: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (module for module in model.modules() if isinstance(module, nn.BatchNorm2d))


@torch.no_grad()
def memory_estimate(model: nn.Module, image: Tensor, *, mode: str, batch_size: int) -> int:
    """Bytes that a float64 step on `batch_size` images will need, from running one image.

    Inference: three times the largest output of a layer. Training: all outputs of layers,
    and as many gradients.

    Args:
        image: ``[1, 3, H, W]`` of the dtype and device of `model`.
    """
    elements: list[int] = []

    def count(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor):
            elements.append(output.numel())

    was_training = {module: module.training for module in model.modules()}
    leaves = [module for module in model.modules() if not any(module.children())]
    handles = [module.register_forward_hook(count) for module in leaves]
    try:
        model.eval()
        model(image)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in was_training.items():
            module.training = training
    per_image = 2 * sum(elements) if mode == "training" else 3 * max(elements, default=0)
    return 8 * batch_size * per_image
