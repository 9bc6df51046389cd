"""A small residual network described by data alone, so that it can be drawn, kept and built again.

The fuzzer draws these; ``verify --all`` builds the worst of them on the machine at hand.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused.policy import precision

DTYPES = ("float32", "float64", "bfloat16", "float16", "autocast")
MODES = ("eval", "eval_grad", "train")
LAYOUTS = ("contiguous", "channels_last", "sliced", "strided", "expanded", "transposed", "offset")
FILLS = ("random", "integer", "special")
NORMS = ("affine", "plain", "untracked", "cumulative", "frozen", "none")
SHORTCUTS = ("none", "identity", "projection")
ADDITIONS = ("+", "+=", "reversed", "torch.add")
FORMS = ("module", "inplace", "function")

_MODULES: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,  # that no kernel knows
}
ACTS = ("none", *_MODULES)

Pair = tuple[int, int]


@dataclass(frozen=True)
class Conv:
    """A convolution, its batch norm and its activation.

    Attributes:
        norm: "affine"; "plain", without weight and bias; "untracked", without running statistics;
            "cumulative", momentum None; "frozen", evaluating while the model trains; "none".
        form: how the activation is written.
    """

    outputs: int
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    groups: int = 1
    padding_mode: str = "zeros"
    bias: bool = False
    norm: str = "affine"
    act: str = "relu"
    form: str = "module"

    def size(self, height: int, width: int) -> Pair:
        """Of its output, in pixels."""
        rows, columns = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                (height, width), self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )
        return rows, columns


@dataclass(frozen=True)
class Part:
    """Convolutions one after another and, unless "none", a shortcut around them.

    Attributes:
        pre: batch norm and activation stand before their convolution instead of behind it.
        tap: the convolution whose activated output has a second reader: its mean over pixels is
            appended to the result's channels. Or None.
        pool: a max-pool behind everything, as a stem has.
    """

    convs: tuple[Conv, ...]
    shortcut: str = "none"
    projection: Conv | None = None
    addition: str = "+"
    pre: bool = False
    tap: int | None = None
    pool: bool = False

    @property
    def outputs(self) -> int:
        """Channels of the result."""
        return self.convs[-1].outputs + (0 if self.tap is None else self.convs[self.tap].outputs)


@dataclass(frozen=True)
class BlockCase:
    """A network of parts, its input, and how both are run.

    Attributes:
        dtype: of model and input; "autocast" is a float32 model under bfloat16 autocast.
        mode: "eval" without gradients, "eval_grad" with them, or "train".
        fill: "random"; "integer", small whole numbers and scales that are powers of two, with which
            most algorithms are exact; "special", random with NaN and infinities in it.
        weights_channels_last: the memory format of the model.
    """

    batch: int
    channels: int
    height: int
    width: int
    parts: tuple[Part, ...]
    dtype: str = "float32"
    mode: str = "eval"
    layout: str = "channels_last"
    weights_channels_last: bool = True
    fill: str = "random"
    policy: str = "default"
    memory: str = "default"
    threads: int = 1
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> BlockCase:
        """The case that :meth:`to_dict` wrote.

        Raises:
            TypeError, KeyError: the data is of another form.
        """
        parts = tuple(
            Part(
                **{
                    **part,
                    "convs": tuple(_conv(c) for c in part["convs"]),
                    "projection": part["projection"] and _conv(part["projection"]),
                }
            )
            for part in data["parts"]
        )
        return BlockCase(**{**data, "parts": parts})

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the model and its input."""
        return torch.float32 if self.dtype == "autocast" else getattr(torch, self.dtype)

    def build(self) -> tuple[nn.Module, Tensor]:
        """The model in its mode and dtype, and the tensor that :meth:`input` views.

        Equal at every call: all values follow from `seed`.
        """
        generator = torch.Generator().manual_seed(self.seed)
        channels, modules = self.channels, []
        for part in self.parts:
            modules.append(PartModule(part, channels))
            channels = part.outputs
        model = modules[0] if len(modules) == 1 else nn.Sequential(*modules)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(self._values(parameter.shape, generator))
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    self._fill_weight(module.weight, generator)
                if isinstance(module, nn.BatchNorm2d):
                    self._fill_norm(module, generator)
        if self.weights_channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        base = self._values(self._base_shape(), generator)
        if self.fill == "special" and base.numel():
            places = torch.randint(base.numel(), (min(3, base.numel()),), generator=generator)
            for place, value in zip(places.tolist(), (math.nan, math.inf, -math.inf), strict=False):
                base.view(-1)[place] = value
        model.train(self.mode == "train")
        for module in model.modules():
            if getattr(module, "frozen", False):
                module.eval()
        return model.to(self.torch_dtype), base.to(self.torch_dtype)

    def input(self, base: Tensor) -> Tensor:
        """What the model is given: `base` seen in this case's layout."""
        c, h, w = self.channels, self.height, self.width
        if self.layout == "channels_last":
            return base.contiguous(memory_format=torch.channels_last)
        if self.layout == "sliced":
            return base.contiguous(memory_format=torch.channels_last)[:, 1 : 1 + c, 1 : 1 + h, :w]
        if self.layout == "strided":
            return base[:, :, ::2, ::2]
        if self.layout == "expanded":
            return base.expand(self.batch, c, h, w)
        if self.layout == "transposed":
            return base.transpose(2, 3)
        if self.layout == "offset":
            return base[1:].view(self.batch, c, h, w)
        return base

    def _base_shape(self) -> tuple[int, ...]:
        n, c, h, w = self.batch, self.channels, self.height, self.width
        return {
            "sliced": (n, c + 2, h + 2, w + 1),
            "strided": (n, c, 2 * h, 2 * w - 1),
            "expanded": (1, c, h, w),
            "transposed": (n, c, w, h),
            "offset": (n * c * h * w + 1,),
        }.get(self.layout, (n, c, h, w))

    def _values(self, shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> Tensor:
        if self.fill == "integer":
            return torch.randint(-2, 3, shape, generator=generator).float()
        return torch.randn(shape, generator=generator)

    def _fill_weight(self, weight: Tensor, generator: torch.Generator) -> None:
        inputs = math.prod(weight.shape[1:])
        if self.fill != "integer":
            weight.mul_(inputs**-0.5)
            return
        # About six of a sum's terms: it stays small enough for bfloat16 to hold it.
        share = min(0.5, 6 / inputs)
        weight.copy_(weight.sign() * (torch.rand(weight.shape, generator=generator) < share))

    def _fill_norm(self, norm: nn.BatchNorm2d, generator: torch.Generator) -> None:
        exact, tracked = self.fill == "integer", norm.running_mean is not None
        if exact:
            norm.eps = 0.25  # so that variance and eps are 1 or 4
        if norm.affine and not exact:
            norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) + 0.5)
            norm.weight[::5] *= -1
            norm.bias.mul_(0.5)
        if tracked:
            assert norm.running_mean is not None and norm.running_var is not None
            shape = norm.running_mean.shape
            norm.running_mean.copy_(self._values(shape, generator) * (1.0 if exact else 0.3))
            uniform = torch.rand(shape, generator=generator)
            norm.running_var.copy_((uniform > 0.5) * 3 + 0.75 if exact else uniform + 0.5)


def _conv(data: dict[str, Any]) -> Conv:
    pairs = ("kernel", "stride", "padding", "dilation")
    options: dict[str, Any] = {k: tuple(v) if k in pairs else v for k, v in data.items()}
    return Conv(**options)


@dataclass
class Outcome:
    """What running a case gave: tensors by name, or the exception."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    error: Exception | None = None


def run(case: BlockCase, model: nn.Module, base: Tensor, *, exact: bool = False) -> Outcome:
    """Run a case's model, which changes.

    Args:
        model, base: of :meth:`BlockCase.build`, also fused, in float64 or in another memory format.
        exact: in float64, as the reference: without autocast.

    Returns:
        The output, and the input as it is then; with gradients those of the input and of every
        parameter, of a weighed sum of the output; in training the buffers afterwards.
    """
    generator = torch.Generator().manual_seed(case.seed + 1)
    leaf = base.detach().clone().requires_grad_(case.mode != "eval")
    autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if case.dtype == "autocast" and not exact:
        autocast = torch.autocast("cpu", torch.bfloat16)
    try:
        with autocast, torch.set_grad_enabled(case.mode != "eval"), settings(case):
            # times 1: what the model may write to is no leaf
            given = case.input(leaf * 1 if case.mode != "eval" else leaf)
            output = model(given)
            found = {"output": output.detach(), "input": given.detach()}
            if case.mode != "eval":
                weights = case._values(output.shape, generator).to(output.dtype)
                (output * weights).sum().backward()
                assert leaf.grad is not None
                found["gradient of input"] = leaf.grad
                for name, parameter in model.named_parameters():
                    if parameter.grad is not None:
                        found[f"gradient of {name}"] = parameter.grad
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return Outcome(error=error)
    found |= {f"buffer {n}": b.detach().clone() for n, b in model.named_buffers()}
    return Outcome(found)


@contextlib.contextmanager
def settings(case: BlockCase) -> Iterator[None]:
    """The case's number of threads and precision policy, for a block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        with precision(case.policy):
            yield
    finally:
        torch.set_num_threads(threads)


def double(model: nn.Module) -> nn.Module:
    """A float64 copy."""
    return copy.deepcopy(model).double()


class PartModule(nn.Module):
    """A :class:`Part` as plain PyTorch, written as people write residual blocks."""

    def __init__(self, part: Part, channels: int) -> None:
        super().__init__()
        self.part = part
        inputs = channels
        for i, conv in enumerate(part.convs):
            self._add(str(i), conv, inputs, inputs if part.pre else conv.outputs)
            inputs = conv.outputs
        if part.projection is not None:
            self._add("_down", part.projection, channels, part.projection.outputs)

    def _add(self, suffix: str, conv: Conv, inputs: int, normalised: int) -> None:
        convolution = nn.Conv2d(
            inputs, conv.outputs, conv.kernel, conv.stride, conv.padding, conv.dilation,
            conv.groups, conv.bias, conv.padding_mode,  # type: ignore[arg-type]
        )  # fmt: skip
        self.add_module(f"conv{suffix}", convolution)
        if conv.norm != "none":
            norm = nn.BatchNorm2d(
                normalised,
                momentum=None if conv.norm == "cumulative" else 0.1,
                affine=conv.norm != "plain",
                track_running_stats=conv.norm != "untracked",
            )
            norm.frozen = conv.norm == "frozen"  # type: ignore[assignment]
            self.add_module(f"bn{suffix}", norm)
        if conv.act != "none" and conv.form != "function":
            options = {"inplace": conv.form == "inplace"}
            made = _MODULES[conv.act](**options if conv.act not in ("gelu", "tanh") else {})
            self.add_module(f"act{suffix}", made)

    def forward(self, x: Tensor) -> Tensor:
        part, y, tapped = self.part, x, None
        for i, conv in enumerate(part.convs):
            last = i == len(part.convs) - 1
            if part.pre:
                y = self._act(i, conv, self._norm(i, y))
                y = getattr(self, f"conv{i}")(y)
            else:
                y = self._norm(i, getattr(self, f"conv{i}")(y))
                if not (last and part.shortcut != "none"):
                    y = self._act(i, conv, y)
            if part.tap == i:
                tapped = y.mean((2, 3), keepdim=True)
        if part.shortcut != "none":
            identity = x
            if part.projection is not None:
                suffix = "_down"
                identity = self._norm(suffix, getattr(self, f"conv{suffix}")(x))
            y = self._added(y, identity)
            if not part.pre:
                y = self._act(len(part.convs) - 1, part.convs[-1], y)
        if tapped is not None:
            y = torch.cat([y, tapped.expand(-1, -1, *y.shape[2:])], 1)
        return F.max_pool2d(y, 3, 2, 1) if part.pool else y

    def _norm(self, suffix: int | str, y: Tensor) -> Tensor:
        name = f"bn{suffix}"
        return getattr(self, name)(y) if name in self._modules else y

    def _act(self, suffix: int | str, conv: Conv, y: Tensor) -> Tensor:
        if conv.act == "none":
            return y
        if conv.form != "function":
            return getattr(self, f"act{suffix}")(y)
        return getattr(F, conv.act)(y)

    def _added(self, y: Tensor, identity: Tensor) -> Tensor:
        if self.part.addition == "+=":
            y += identity
            return y
        if self.part.addition == "reversed":
            return identity + y
        return torch.add(y, identity) if self.part.addition == "torch.add" else y + identity
