"""What the examples share: real images with labels that need no download, the paper's recipe, and
what each experiment asks and writes.

scikit-learn brings 1,797 handwritten digits of 8x8 pixels (Alpaydin and Kaynak, *Optical
Recognition of Handwritten Digits*, UCI 1998). Four fifths are for training, one for the test.

What a step trains on depends on its number and the seed alone. So a run can be broken off and taken
up again anywhere, and any number of processes can share a batch, with the same images.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import benchmark, cli

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEST_SHARE = 0.2
_ROTATION = math.radians(10)
_SHIFT = 0.2  # of half the image
_SCALE = 0.1


class Digits(NamedTuple):
    """Images ``[N, 3, size, size]``, channels_last, mean 0 and variance 1, and labels ``[N]``."""

    images: Tensor
    labels: Tensor


def load(size: int) -> tuple[Digits, Digits]:
    """The digits for training and for the test, resized; always the same split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    labels = torch.from_numpy(data.target).long()
    grey = torch.from_numpy(data.images).float().unsqueeze(1)
    grey = F.interpolate(grey, (size, size), mode="bilinear", align_corners=False)
    train, test = train_test_split(
        torch.arange(len(labels)), test_size=_TEST_SHARE, stratify=labels, random_state=0
    )
    grey = (grey - grey[train].mean()) / grey[train].std()
    images = grey.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])


def steps_per_epoch(digits: Digits, batch_size: int) -> int:
    """How many whole batches an epoch has."""
    return len(digits.labels) // batch_size


def batch(digits: Digits, step: int, *, batch_size: int, seed: int) -> Digits:
    """The images of one step: each epoch in an order of its own, every image distorted anew."""
    epoch, place = divmod(step, steps_per_epoch(digits, batch_size))
    order = torch.randperm(len(digits.labels), generator=_generator(seed, epoch, 0))
    chosen = order[place * batch_size : (place + 1) * batch_size]
    images = _distort(digits.images[chosen], _generator(seed, step, 1))
    return Digits(images, digits.labels[chosen])


def optimizer(
    model: nn.Module, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Section 4.2 of the paper: SGD, a tenth of the rate after half and after 3/4 of the steps."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    milestones = [steps // 2, steps * 3 // 4]
    return sgd, torch.optim.lr_scheduler.MultiStepLR(sgd, milestones, gamma=0.1)


def test_error(model: nn.Module, digits: Digits) -> float:
    """The share of wrong answers, in evaluation."""
    training = model.training
    model.eval()
    with torch.inference_mode():
        wrong = model(digits.images).argmax(1) != digits.labels
    model.train(training)
    return wrong.float().mean().item()


def experiment_parser(
    program: str, description: str | None, run: Callable[..., int], *, size: int
) -> cli.Parser:
    """The arguments that every experiment has; `run` gets them all."""
    parser = cli.Parser(prog=f"{program}.py", description=description)
    parser.set_defaults(run=run)
    parser.add_argument("--size", type=cli.positive, default=size, help="of an image, in pixels")
    parser.add_argument("--batch-size", type=cli.positive, default=64, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write every number as JSON")
    parser.add_argument("--plot", default=f"{program}.png", metavar="FILE")
    return parser


def save(figure: Figure, path: Path) -> None:
    """Write a plot, entirely or not at all."""
    data = io.BytesIO()
    figure.savefig(data, dpi=110, format=path.suffix.removeprefix("."))
    benchmark.write_atomically(path, data.getvalue())


def _generator(*key: int) -> torch.Generator:
    seed = 0
    for part in key:
        seed = seed * 1_000_003 + part
    return torch.Generator().manual_seed(seed % 2**63)


def _distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by up to 10 degrees, shifted by a tenth of its size, scaled by a tenth."""
    numbers = torch.rand(4, len(images), generator=generator) * 2 - 1
    angle, scale = numbers[0] * _ROTATION, 1 + numbers[1] * _SCALE
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    across, down = numbers[2:] * _SHIFT
    rows = [torch.stack([cosine, -sine, across], 1), torch.stack([sine, cosine, down], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved.contiguous(memory_format=torch.channels_last)
