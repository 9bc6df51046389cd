"""Global average pool, flatten and linear as one step: what is taken for a head; its numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import block_zoo
import pytest
import torch
from tolerance import assert_parity, double_model
from torch import Tensor, nn

from resnet_fused import fuse, precision
from resnet_fused.backends import native, native_conv
from resnet_fused.modules.pool_linear import PoolLinear

needs_library = pytest.mark.skipif(not native.available, reason="the compiled library is missing")
FLATTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "function": lambda x: torch.flatten(x, 1),
    "keyword": lambda x: torch.flatten(x, start_dim=1),
    "both ends": lambda x: torch.flatten(x, 1, -1),
    "method": lambda x: x.flatten(1),
    "module": nn.Flatten(),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "from the batch on": lambda x: torch.flatten(x, 0),
    "another end": lambda x: torch.flatten(x, 1, 2),
    "of another kind": lambda x: x[:, :, 0, 0],
    "module of all": nn.Flatten(0),
    "read twice": lambda x: torch.flatten(x, 1) + x[:, :, 0, 0],
}


class Classifier(nn.Module):
    """A unit and a head."""

    def __init__(
        self, flatten: Callable[[Tensor], Tensor], *, size: object = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.body = block_zoo.unit(3, 24, 3)
        self.pool = nn.AdaptiveAvgPool2d(size)  # type: ignore[arg-type]
        self.flatten = flatten
        self.fc = nn.Linear(24, 10, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.pool(self.body(x))))


def classifier(**options: object) -> nn.Module:
    torch.manual_seed(2)
    model = Classifier(options.pop("flatten", FLATTEN["function"]), **options)  # type: ignore[arg-type]
    return block_zoo.randomise(model).eval().to(memory_format=torch.channels_last)


def picture(batch: int = 2) -> Tensor:
    x = torch.randn(batch, 3, 40, 36, generator=torch.Generator().manual_seed(8))
    return x.contiguous(memory_format=torch.channels_last)


def has_head(model: nn.Module) -> bool:
    return any(isinstance(v, PoolLinear) for v in vars(model).values())


def assert_same(fused: nn.Module, plain: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        reference = double_model(plain)(x.double())
        assert_parity(fused(x), plain(x), reference, what="the classifier")


@pytest.mark.parametrize("flatten", FLATTEN)
@pytest.mark.parametrize("size", [1, (1, 1)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_heads(flatten: str, size: object, bias: bool) -> None:
    plain = classifier(flatten=FLATTEN[flatten], size=size, bias=bias)
    fused = fuse(plain)
    assert has_head(fused)
    assert_same(fused, plain, picture())
    assert_same(copy.deepcopy(fused), plain, picture(1))


@pytest.mark.parametrize("flatten", OTHERS)
def test_what_is_no_head(flatten: str) -> None:
    plain = classifier(flatten=OTHERS[flatten])
    fused = fuse(plain)
    assert not has_head(fused)
    if "all" not in flatten and "batch" not in flatten and "end" not in flatten:
        assert_same(fused, plain, picture())


def test_a_pool_of_more_pixels_is_no_head() -> None:
    model = nn.Sequential(
        block_zoo.unit(3, 8, 3), nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(16, 5)
    ).eval()
    fused = fuse(model)
    assert not has_head(fused)
    assert_same(fused, model, picture())


def test_modules_with_hooks_are_called() -> None:
    plain = classifier()
    plain.pool.register_forward_hook(lambda module, args, output: output * 2)
    assert not has_head(fuse(plain))
    later = fuse(classifier())
    later.fc.register_forward_hook(lambda module, args, output: output * 3)
    with torch.no_grad():
        assert_parity(
            later(picture()) / 3,
            classifier()(picture()),
            double_model(classifier())(picture().double()),
            what="a hook on the linear layer",
        )


def replace_weight(model: nn.Module) -> None:
    model.fc.weight = nn.Parameter(model.fc.weight.detach() * 2)


def edit_bias(model: nn.Module) -> None:
    with torch.no_grad():
        model.fc.bias.add_(1.0)


def drop_bias(model: nn.Module) -> None:
    model.fc.bias = None


def replace_linear(model: nn.Module) -> None:
    torch.manual_seed(9)
    model.fc = nn.Linear(24, 7)


def replace_pool(model: nn.Module) -> None:
    model.pool = nn.AdaptiveMaxPool2d(1)


def other_size(model: nn.Module) -> None:
    model.pool.output_size = (1, 1)


@pytest.mark.parametrize(
    "change", [replace_weight, edit_bias, drop_bias, replace_linear, replace_pool, other_size]
)
def test_changes_are_seen(change: Callable[[nn.Module], None]) -> None:
    plain = classifier()
    fused = fuse(plain)
    assert_same(fused, plain, picture())
    change(plain)
    change(fused)
    assert_same(fused, plain, picture())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("policy", ["default", "strict"])
def test_dtypes_batches_and_policies(dtype: torch.dtype, batch: int, policy: str) -> None:
    plain = classifier().to(dtype)
    with precision(policy):
        assert_same(fuse(plain), plain, picture(batch).to(dtype))


def test_one_odd_pixel_spoils_its_image_only() -> None:
    plain, x = classifier(), picture()
    x[1, 2, 5, 5] = float("nan")
    with torch.no_grad():
        actual, expected = fuse(plain)(x), plain(x)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert not actual[0].isnan().any()


def test_gradients_are_eagers() -> None:
    plain, x = classifier(), picture()
    fused, exact = fuse(plain), double_model(plain)
    for model, data in ((plain, x), (fused, x), (exact, x.double())):
        model(data).square().sum().backward()
    assert_parity(fused.fc.weight.grad, plain.fc.weight.grad, exact.fc.weight.grad, what="weight")


def test_wrong_channels_are_eagers_error() -> None:
    model = classifier()
    model.fc = nn.Linear(25, 10)
    with pytest.raises(RuntimeError, match="shapes"), torch.no_grad():
        fuse(model)(picture())


@needs_library
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 63, 7, 7), (3, 130, 5, 9), (1, 64, 112, 112)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_average(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = (torch.randn(shape) + 1).to(dtype).contiguous(memory_format=layout)
    actual = torch.ops.resnet_fused._average_pixels(x)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    eager = nn.functional.adaptive_avg_pool2d(x, 1)
    assert_parity(actual, eager, x.double().mean((2, 3), keepdim=True), what=str(shape))


@needs_library
@pytest.mark.parametrize(
    "bad",
    [torch.zeros(3), torch.zeros(1, 0, 2, 2), torch.zeros(1, 2, 2, 2, dtype=torch.float64)],
    ids=["dimensions", "empty", "float64"],
)
def test_hostile_arguments(bad: Tensor) -> None:
    with pytest.raises(RuntimeError, match="_average_pixels: input"):
        torch.ops.resnet_fused._average_pixels(bad)


@pytest.mark.skipif(
    native_conv.unusable(torch.float32) is not None, reason="the kernels are not chosen here"
)
def test_it_runs_on_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> Tensor:
        raise AssertionError("addmm was called")

    fused, x = fuse(classifier()), picture()
    monkeypatch.setattr(nn.functional, "linear", refuse)
    with torch.inference_mode():
        fused(x)
    with torch.enable_grad(), pytest.raises(AssertionError):
        fused(x)
