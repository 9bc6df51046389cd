"""What a model is run on: images and labels."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .case import BenchmarkError
from .measure import require_memory

# The mean and standard deviation of ImageNet's RGB values, which torchvision's models expect.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


def random_images(batch_size: int, image_size: int, *, seed: int = 0) -> Tensor:
    """Normal noise, float32 ``[batch_size, 3, image_size, image_size]`` on the CPU.

    Raises:
        BenchmarkError: if a size is negative.
        MemoryError: if the machine has not enough memory for it.
    """
    if min(batch_size, image_size) < 0:
        raise BenchmarkError(f"sizes must not be negative, got {batch_size} and {image_size}")
    require_memory(batch_size * 3 * image_size**2 * 4)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, 3, image_size, image_size, generator=generator)


def photographs(batch_size: int, image_size: int) -> Tensor:
    """Crops of scikit-learn's two sample photographs, normalised as for ImageNet.

    Returns:
        float32 ``[batch_size, 3, image_size, image_size]``; each crop at another place.

    Raises:
        BenchmarkError: if scikit-learn is not installed, or a size is less than 1.
    """
    if min(batch_size, image_size) < 1:
        raise BenchmarkError(f"sizes must be at least 1, got {batch_size} and {image_size}")
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise BenchmarkError(
            "the photographs come with scikit-learn; install it with: pip install scikit-learn"
        ) from error
    generator = torch.Generator().manual_seed(0)
    crops = []
    sources = [torch.from_numpy(np.array(image)) for image in load_sample_images().images]
    for i in range(batch_size):
        source = sources[i % len(sources)]  # [height, width, 3], uint8
        side = min(source.shape[0], source.shape[1], int(image_size * 1.5))
        top = _below(source.shape[0] - side + 1, generator)
        left = _below(source.shape[1] - side + 1, generator)
        crop = source[top : top + side, left : left + side].permute(2, 0, 1)[None].float() / 255
        crops.append(F.interpolate(crop, size=image_size, mode="bilinear", antialias=True))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    return (torch.cat(crops) - mean) / std


def random_labels(logits: Tensor, *, seed: int = 0) -> Tensor:
    """A class for each row of `logits`, int64 ``[N]`` on its device."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, logits.shape[1], (logits.shape[0],), generator=generator)
    return labels.to(logits.device)


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(0, max(limit, 1), (1,), generator=generator))
