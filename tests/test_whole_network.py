"""A network whose blocks run as one chain is the network it was, whatever happens to its parts.

The chain is taken only if every module is as fuse() found it; each change below has to be seen.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import MethodType

import block_zoo
import pytest
import torch
from tolerance import assert_parity, double_model
from torch import Tensor, nn

from resnet_fused import fuse, unfuse
from resnet_fused.backends import native, native_conv
from resnet_fused.models import resnet18

needs_kernels = pytest.mark.skipif(
    native_conv.unusable(torch.float32) is not None,
    reason="the library's own convolution kernels are not chosen here",
)


class Network(nn.Module):
    """ResNet-18 without its last two stages: a stem, then four blocks in two Sequentials."""

    def __init__(self) -> None:
        super().__init__()
        full = resnet18(num_classes=3)
        self.conv1, self.bn1, self.relu = full.conv1, full.bn1, full.relu
        self.maxpool, self.layer1, self.layer2 = full.maxpool, full.layer1, full.layer2

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x))))))


def network() -> nn.Module:
    torch.manual_seed(3)
    return block_zoo.randomise(Network()).eval().to(memory_format=torch.channels_last)


def picture(batch: int = 2, size: int = 96) -> Tensor:
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(8))
    return x.contiguous(memory_format=torch.channels_last)


def infer(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def assert_same(fused: nn.Module, plain: nn.Module, x: Tensor) -> None:
    reference = infer(double_model(plain), x.double())
    assert_parity(infer(fused, x), infer(plain, x), reference, what="the whole network")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many convolutions each call of the library's kernels ran."""
    counted: list[int] = []
    run = native_conv.Program.__call__

    def count(self: native_conv.Program, input: Tensor, residual: Tensor | None = None) -> Tensor:
        counted.append(len(self._arguments[0]))
        return run(self, input, residual)

    monkeypatch.setattr(native_conv.Program, "__call__", count)
    return counted


@needs_kernels
def test_all_blocks_run_in_one_call(calls: list[int]) -> None:
    plain, x = network(), picture()
    fused = fuse(plain)
    assert_same(fused, plain, x)
    assert calls[-1] == 4 + 5  # four blocks, one with a projection
    assert len(calls) <= 2  # and the stem


def hook_on_block(model: nn.Module) -> None:
    model.layer1[0].register_forward_hook(lambda module, args, output: output * 2)


def hook_on_conv(model: nn.Module) -> None:
    model.layer2[1].conv1.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def hook_on_sequence(model: nn.Module) -> None:
    model.layer2.register_forward_hook(lambda module, args, output: output - 1)


def train_one_norm(model: nn.Module) -> None:
    model.layer2[0].bn2.train()


def train_one_block(model: nn.Module) -> None:
    model.layer1[1].train()


def drop_a_block(model: nn.Module) -> None:
    model.layer1 = model.layer1[:1]


def drop_in_place(model: nn.Module) -> None:
    del model.layer1[1]


def add_a_block(model: nn.Module) -> None:
    model.layer1.append(nn.Hardtanh())


def swap_blocks(model: nn.Module) -> None:
    model.layer1[0], model.layer1[1] = model.layer1[1], model.layer1[0]


def same_block_twice(model: nn.Module) -> None:
    model.layer1[1] = model.layer1[0]


def replace_conv(model: nn.Module) -> None:
    torch.manual_seed(5)
    model.layer1[0].conv2 = nn.Conv2d(64, 64, 1)


def replace_conv_of_projection(model: nn.Module) -> None:
    torch.manual_seed(5)
    model.layer2[0].downsample[0] = nn.Conv2d(64, 128, 1, stride=2)


def replace_activation(model: nn.Module) -> None:
    model.layer1[0].relu = nn.Tanh()


def replace_forward(model: nn.Module) -> None:
    model.layer1[0].forward = lambda x: x


def replace_forward_of_conv(model: nn.Module) -> None:
    conv = model.layer1[1].conv1
    conv.forward = MethodType(lambda self, x: nn.Conv2d.forward(self, x) * 2, conv)


def change_weight(model: nn.Module) -> None:
    with torch.no_grad():
        model.layer2[0].conv1.weight.mul_(-1.5)


def assign_weight(model: nn.Module) -> None:
    conv = model.layer2[0].conv1
    conv.weight = nn.Parameter(conv.weight.detach() * 0.5)


def change_statistics(model: nn.Module) -> None:
    model.layer1[1].bn1.running_var.fill_(4.0)


def change_eps(model: nn.Module) -> None:
    model.layer1[1].bn1.eps = 0.4


def change_stride(model: nn.Module) -> None:
    model.layer1[0].conv1.dilation = model.layer1[0].conv1.padding = (2, 2)


def unfuse_a_block(model: nn.Module) -> None:
    unfuse(model.layer1[0], inplace=True)


CHANGES = [
    hook_on_block,
    hook_on_conv,
    hook_on_sequence,
    train_one_norm,
    train_one_block,
    drop_a_block,
    drop_in_place,
    add_a_block,
    swap_blocks,
    same_block_twice,
    replace_conv,
    replace_conv_of_projection,
    replace_activation,
    replace_forward,
    replace_forward_of_conv,
    change_weight,
    assign_weight,
    change_statistics,
    change_eps,
    change_stride,
    unfuse_a_block,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("where", ["the model", "a copy"])
def test_a_change_to_a_part_is_seen(change: Callable[[nn.Module], None], where: str) -> None:
    plain, x = network(), picture()
    fused = fuse(plain)
    infer(fused, x)
    if where == "a copy":
        fused = copy.deepcopy(fused)
        infer(fused, x)
    change(plain)
    change(fused)
    # Batch statistics change at each call, so each model runs once more only.
    assert_same(fused, plain, x)


@needs_kernels
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_runs_at_once_on_its_own_weights(
    duplicate: Callable[[nn.Module], nn.Module], calls: list[int]
) -> None:
    plain, x = network(), picture()
    fused = fuse(plain)
    before = infer(fused, x)
    other = duplicate(fused)
    change_weight(other)
    change_weight(plain)
    assert_same(other, plain, x)
    assert calls[-1] == 9
    assert torch.equal(infer(fused, x), before)


@pytest.mark.parametrize("part", ["layer1", "layer2"])
def test_a_part_by_itself(part: str) -> None:
    plain = network()
    fused = fuse(plain)
    x = torch.randn(2, 64, 24, 24).contiguous(memory_format=torch.channels_last)
    assert_same(fused.get_submodule(part), plain.get_submodule(part), x)


def test_a_slice_of_a_fused_sequence() -> None:
    plain = nn.Sequential(*network().children()).eval()
    fused = fuse(plain)
    x = picture()
    assert_same(fused, plain, x)
    assert_same(fused[:5], plain[:5], x)
    assert_same(fused[5:], plain[5:], infer(plain[:5], x))


def test_inputs_of_changing_shape_dtype_and_layout() -> None:
    plain = network()
    fused = fuse(plain)
    for x in (picture(1), picture(3), picture(1, 64), picture(2).contiguous(), picture(0)):
        assert_same(fused, plain, x)
    for model in (plain, fused):
        model.bfloat16()
    x = picture().bfloat16()
    reference = infer(double_model(plain), x.double())
    assert_parity(infer(fused, x), infer(plain, x), reference, what="bfloat16")


@pytest.mark.parametrize("begins", ["a stem", "a block"])
def test_autocast_is_obeyed(begins: str) -> None:
    """Also by what reads float32 itself, and has kept a program for that."""
    plain, x = network(), picture()
    if begins == "a block":
        plain, x = plain.layer1, infer(plain.maxpool, infer(plain.conv1, x))
    fused, reference = fuse(plain), infer(double_model(plain), x.double())
    infer(fused, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, eager = infer(fused, x), infer(plain, x)
    assert ours.dtype == eager.dtype
    assert_parity(ours, eager, reference, what="under autocast")


def test_gradients_when_they_are_asked_for() -> None:
    plain, x = network(), picture()
    fused = fuse(plain)
    infer(fused, x)
    exact = double_model(plain)
    for model, data in ((plain, x), (fused, x), (exact, x.double())):
        model(data).sum().backward()
    for name, parameter in fused.named_parameters():
        eager, truth = plain.get_parameter(name).grad, exact.get_parameter(name).grad
        assert parameter.grad is not None and eager is not None and truth is not None
        assert_parity(parameter.grad, eager, truth, what=name)


@pytest.mark.skipif(not native.available, reason="the compiled library is missing")
def test_blocks_that_wrap_others() -> None:
    """A block inside a block inside a Sequential; a dropout between; one block called twice."""

    class Outer(nn.Module):
        def __init__(self, inner: nn.Module, twice: nn.Module) -> None:
            super().__init__()
            self.inner, self.twice, self.drop = inner, twice, nn.Dropout(0.5)
            self.conv, self.bn = nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64)

        def forward(self, x: Tensor) -> Tensor:
            x = self.drop(self.inner(x))
            return self.bn(self.conv(self.twice(self.twice(x)))) + x

    model = network()
    plain = block_zoo.randomise(Outer(model.layer1, model.layer1[0])).eval()
    fused = fuse(plain)
    x = torch.randn(2, 64, 20, 20).contiguous(memory_format=torch.channels_last)
    assert_same(fused, plain, x)
    for model in (plain, fused):
        model.drop.p = 1.0  # drops everything, whatever the dice say
        model.drop.train()
    assert_same(fused, plain, x)


def test_a_block_that_behaves_otherwise_in_training() -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64)

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(self.conv(x))
            return x * 2 if self.training else x

    layers = nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64), Doubling(), Doubling()
    plain = block_zoo.randomise(nn.Sequential(*layers)).eval()
    fused = fuse(plain)
    x = torch.randn(2, 64, 20, 20).contiguous(memory_format=torch.channels_last)
    infer(fused, x)
    for model in (plain, fused):
        model[3].training = True  # and its batch norm still evaluates
    assert_same(fused, plain, x)


@needs_kernels
def test_a_block_fused_anew_runs_as_it_was_asked_to(calls: list[int]) -> None:
    plain, x = network(), picture()
    fused = fuse(plain)
    infer(fused, x)
    block = unfuse(fused.layer1[0], inplace=True)
    fuse(block, filter_fn=lambda name, module: name != "conv1", inplace=True)
    calls.clear()
    assert_same(fused, plain, x)
    assert calls and 9 not in calls
