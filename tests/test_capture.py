"""A captured model answers as the model itself does, whatever has become of the model since.

A CUDA graph needs a GPU; what decides when to replay and when to record again does not. On a CPU
it runs over a `Tape`, which does with operators what a CUDA graph does with kernels: replays them
on the memory that they read and wrote when they were recorded. The file is long because it lists
what may change and what may not fit, one by one, and has the same on a GPU at its end.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import block_zoo
import pytest
import torch
from tolerance import assert_parity, double_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import resnet_fused
from resnet_fused import Captured, capture, fuse, models
from resnet_fused.capture import _State

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class Tape:
    """A graph on a CPU. Like CUDA's it holds addresses only, runs no Python when it is replayed,
    writes its outputs in place, has computed nothing before the first replay, and refuses to read
    a value.
    """

    device_type = "cpu"

    def __init__(self, device: torch.device) -> None:
        self.steps: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.recorded = self.replayed = 0
        self.inside = 0
        self.fail_next: Exception | None = None

    @contextmanager
    def turn(self, buffers: list[Tensor]) -> Iterator[None]:
        self.inside += 1
        assert self.inside == 1, "two threads at once"
        try:
            yield
        finally:
            self.inside -= 1

    @contextmanager
    def aside(self) -> Iterator[None]:
        yield

    def record(self, run: Callable[[], Any]) -> Any:
        self.steps = []
        with _Recording(self.steps):
            outputs = run()
        self.recorded += 1
        for _, arguments, _, made in self.steps:
            read = {
                t.untyped_storage().data_ptr()
                for t in _tensors(arguments)
                if t.layout is torch.strided  # oneDNN's packed weights have no storage
            }
            for tensor in made:
                if tensor.untyped_storage().data_ptr() not in read and tensor.is_floating_point():
                    tensor.fill_(float("nan"))
        return outputs

    def replay(self) -> None:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        with torch.no_grad():
            for operator, arguments, options, outputs in self.steps:
                again = _tensors(operator(*arguments, **options))
                for output, value in zip(outputs, again, strict=True):
                    if output.data_ptr() != value.data_ptr():
                        output.copy_(value)
        self.replayed += 1


class _Recording(TorchDispatchMode):
    def __init__(self, steps: list[Any]) -> None:
        super().__init__()
        self.steps = steps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        # Detached, a tensor names this memory even when `.data` of the original is replaced.
        fixed = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        self.steps.append((func, *fixed, [t.detach() for t in _tensors(outputs)]))
        return outputs


def _tensors(values: Any) -> list[Tensor]:
    return [v for v in tree_leaves(values) if isinstance(v, Tensor)]


def taped(model: nn.Module, *example: Tensor, on_mismatch: str = "error") -> Captured:
    return Captured(model, example, on_mismatch, Tape)


def tape(captured: Captured) -> Tape:
    return captured._graph


def network() -> nn.Module:
    """Two convolutions with batch norms, one of them in a child, and a linear layer."""
    torch.manual_seed(4)
    body = nn.Sequential(block_zoo.unit(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(block_zoo.unit(3, 4, 3), body, nn.Linear(4, 5))
    return block_zoo.randomise(model).eval()


def picture(seed: int = 8) -> Tensor:
    return torch.randn(1, 3, 9, 7, generator=torch.Generator().manual_seed(seed))


def eager(model: nn.Module, *inputs: Tensor) -> Any:
    with torch.no_grad():
        return model(*inputs)


def assert_right(captured: Captured, *inputs: Tensor) -> None:
    assert torch.equal(captured(*inputs), eager(captured.model, *inputs))


# --- what comes out --------------------


def test_result_is_the_models() -> None:
    captured = taped(network(), picture())
    for seed in range(3):
        assert_right(captured, picture(seed))
    assert tape(captured).recorded == 1
    assert tape(captured).replayed == 3


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fused_resnet(layout: torch.memory_format) -> None:
    plain = block_zoo.randomise(models.resnet18(num_classes=10)).eval()
    plain = plain.to(memory_format=layout)
    captured = taped(fuse(plain), torch.randn(1, 3, 64, 64).contiguous(memory_format=layout))
    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn(1, 3, 64, 64).contiguous(memory_format=layout)
        reference = eager(double_model(plain), x.double())
        assert_parity(captured(x), eager(plain, x), reference)
        other = block_zoo.randomise(models.resnet18(num_classes=10), seed=seed + 20)
        plain.load_state_dict(other.state_dict())
        captured.model.load_state_dict(other.state_dict())
    assert tape(captured).recorded == 2


def test_results_do_not_alias() -> None:
    captured = taped(network(), picture())
    first = captured(picture(1))
    before = first.clone()
    second = captured(picture(2))
    assert torch.equal(first, before)
    assert not torch.equal(first, second)
    second.fill_(7)
    assert_right(captured, picture(2))


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class Nested(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        pair = Pair(x + y, x - y)
        return {"pair": pair, "list": [x, (y * 2, None, 3)], "order": OrderedDict(b=x * y, a=y)}


def test_nested_outputs() -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    captured = taped(Nested().eval(), torch.zeros(2, 3), torch.zeros(2, 3))
    result = captured(x, y)
    assert type(result["pair"]) is Pair
    assert list(result) == ["pair", "list", "order"]
    assert list(result["order"]) == ["b", "a"]
    assert result["list"][1][1:] == (None, 3)
    for ours, theirs in zip(_tensors(result), _tensors(Nested()(x, y)), strict=True):
        assert torch.equal(ours, theirs)
    result["list"][0].fill_(7)  # neither the caller's tensor nor the next call's buffer
    assert not (x == 7).any()
    assert torch.equal(captured(x, y)["list"][0], x)


def test_output_that_is_no_tensor_is_refused() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x, slice(1, 2)

    with pytest.raises(TypeError, match="model: expected tensors in its output, got slice"):
        taped(Odd().eval(), torch.ones(1))


def test_result_has_no_gradient() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Any:
            return x * self.weight, self.weight

    captured = taped(Own().eval(), torch.ones(2))
    assert not any(t.requires_grad for t in captured(torch.ones(2)))
    assert captured.model.weight.requires_grad


def test_input_changed_in_place_is_a_copy() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1)

    captured = taped(InPlace().eval(), torch.zeros(2))
    x = torch.zeros(2)
    for change in range(3):
        captured.model.change = change // 2  # the last one is recorded again
        assert torch.equal(captured(x), torch.ones(2))
    assert torch.equal(x, torch.zeros(2))


@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode(made_inside: bool) -> None:
    model = network()
    with torch.inference_mode(made_inside):
        captured = taped(model, picture())
        assert_right(captured, picture(1))
    with torch.inference_mode():
        assert_right(captured, picture(2))
        model[2].weight.add_(1)
        assert_right(captured, picture(2))
    assert_right(captured, picture(3))


@pytest.mark.parametrize("form", ["channels_last", "slice", "transposed", "integers"])
def test_buffers_have_the_examples_strides(form: str) -> None:
    class Strides(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x * 2, x.stride()

    x = {
        "channels_last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "slice": torch.randn(2, 3, 4, 8)[..., ::2],
        "transposed": torch.randn(2, 3, 4, 4).transpose(0, 3),
        "integers": torch.arange(24).reshape(1, 2, 3, 4),
    }[form]
    result, strides = taped(Strides().eval(), x)(x)
    assert torch.equal(result, x * 2)
    assert strides == x.stride()


def test_stride_of_one_element_does_not_matter() -> None:
    x = picture()
    captured = taped(network(), x)
    assert_right(captured, x.as_strided(x.shape, (1, *x.stride()[1:])))
    assert tape(captured).replayed == 1


# --- what does not fit --------------------

MISFITS: dict[str, tuple[Callable[[Tensor], tuple[Any, ...]], str]] = {
    "batch": (lambda x: (x.repeat(2, 1, 1, 1),), r"inputs\[0\]: expected shape \(1, 3, 9, 7\)"),
    "rank": (lambda x: (x[0],), r"inputs\[0\]: .*got shape \(3, 9, 7\)"),
    "dtype": (lambda x: (x.double(),), r"inputs\[0\]: .*float32 .*got .*float64"),
    "device": (lambda x: (x.to("meta"),), r"inputs\[0\]: .* on cpu, got .* on meta"),
    "strides": (
        lambda x: (x.contiguous(memory_format=torch.channels_last),),
        r"inputs\[0\]: .*strides \(1, 63, 7, 1\).*got .*strides \(1, 1, 21, 3\)",
    ),
    "sparse": (lambda x: (x.to_sparse(),), r"inputs\[0\]: .*got .*strides None"),
    "too many": (lambda x: (x, x), "inputs: expected 1 tensors, got 2"),
    "too few": (lambda x: (), "inputs: expected 1 tensors, got 0"),
    "no tensor": (lambda x: (x.tolist(),), r"inputs\[0\]: expected a tensor, got list"),
    "gradient": (
        lambda x: (x.requires_grad_(),),
        r"inputs\[0\]: expected no gradient, got requires_grad=True",
    ),
}


class Anything(nn.Module):
    """Takes whatever there is and says so."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def forward(self, *inputs: Any) -> Any:
        self.calls.append(inputs)
        return inputs[0] * 2 if len(inputs) == 1 else torch.zeros(1)


@pytest.mark.parametrize("name", MISFITS)
def test_misfit_raises(name: str) -> None:
    make, message = MISFITS[name]
    captured = taped(Anything().eval(), picture())
    with pytest.raises(ValueError, match=message):
        captured(*make(picture()))
    assert len(captured.model.calls) == 4, "three warm-ups and the recording"
    assert torch.equal(captured(picture(1)), picture(1) * 2)


@pytest.mark.parametrize("name", MISFITS)
def test_misfit_runs_the_model(name: str) -> None:
    make, _ = MISFITS[name]
    captured = taped(Anything().eval(), picture(), on_mismatch="eager")
    given = make(picture())
    result = captured(*given)
    assert captured.model.calls[-1] == given or captured.model.calls[-1][0] is given[0]
    assert len(captured.model.calls) == 5
    assert name != "gradient" or result.requires_grad
    assert torch.equal(captured(picture(1)), picture(1) * 2)
    assert tape(captured).recorded == 1


def test_gradient_that_nobody_asks_for_fits() -> None:
    captured = taped(network(), picture())
    x = picture(1).requires_grad_()
    with torch.no_grad():
        assert_right(captured, x)


def test_autocast_is_part_of_the_key() -> None:
    model = network()
    captured = taped(model, picture())
    autocast = torch.autocast("cpu", torch.bfloat16)
    with autocast, pytest.raises(ValueError, match=r"autocast: expected None, got torch.bfloat16"):
        captured(picture())
    with autocast:
        narrow = taped(model, picture(), on_mismatch="eager")
    with autocast:
        result = narrow(picture(1))
        assert result.dtype == torch.bfloat16
        with torch.no_grad():
            assert torch.equal(result, model(picture(1)))
    assert narrow(picture(1)).dtype == torch.float32
    assert tape(narrow).replayed == 1


def test_cached_casts_do_not_outlive_autocast() -> None:
    """Leaving autocast frees the weights it has cast; a graph that reads them reads other data."""
    model = network()
    with torch.autocast("cpu", torch.bfloat16):
        captured = taped(model, picture())
    read = {t.data_ptr() for _, arguments, *_ in tape(captured).steps for t in _tensors(arguments)}
    assert model[2].weight.data_ptr() in read, "the graph casts the weight itself"


# --- what has changed since --------------------


def _load(model: nn.Module) -> None:
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})


def _step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(picture()).square().sum().backward()
    optimizer.step()


def _train_a_step(model: nn.Module) -> None:
    model.train()
    model(picture().repeat(2, 1, 1, 1)).square().sum().backward()
    model.eval()


def _replace_parameter(model: nn.Module) -> None:
    model[2].weight = nn.Parameter(model[2].weight.detach() * 2)


def _swap_data(model: nn.Module) -> None:
    model[2].weight.data = model[2].weight.data * 2


def _replace_buffer(model: nn.Module) -> None:
    model[0][1].running_mean = model[0][1].running_mean + 1


def _in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model[1][0][1].running_var.mul_(3)


def _replace_child(model: nn.Module) -> None:
    model[1][1] = nn.AdaptiveMaxPool2d(1)


def _add_child(model: nn.Module) -> None:
    model.append(nn.ReLU())


def _remove_child(model: nn.Module) -> None:
    del model[2]


def _hook(model: nn.Module) -> None:
    model[1][0].register_forward_hook(lambda module, args, output: output * 2)


def _pre_hook(model: nn.Module) -> None:
    model[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def _attribute(model: nn.Module) -> None:
    model[0][1].eps = 0.5


def _forward(model: nn.Module) -> None:
    model[1][1].forward = lambda x: x.amin((2, 3), keepdim=True)  # type: ignore[method-assign]


def _remove_parameter(model: nn.Module) -> None:
    model[2].bias = None


def _fuse(model: nn.Module) -> None:
    fuse(model, inplace=True)


def _parametrize(model: nn.Module) -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 2

    nn.utils.parametrize.register_parametrization(model[2], "weight", Double().eval())


CHANGES = [
    _load, _step, _train_a_step, _replace_parameter, _swap_data, _replace_buffer, _in_place,
    _replace_child, _add_child, _remove_child, _hook, _pre_hook, _attribute, _forward,
    _remove_parameter, _fuse, _parametrize,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_change_is_noticed(change: Callable[[nn.Module], None]) -> None:
    captured = taped(network(), picture())
    before = captured(picture(1))
    change(captured.model)
    assert_right(captured, picture(1))
    assert change is _fuse or not torch.equal(captured(picture(1)), before)
    assert_right(captured, picture(2))
    assert tape(captured).recorded == 2, "once for the change, and not again"


@pytest.mark.parametrize("change", [_load, _step, _in_place, _replace_parameter])
def test_change_of_a_fused_model_is_noticed(change: Callable[[nn.Module], None]) -> None:
    layout = torch.channels_last
    model = fuse(network().to(memory_format=layout))
    x = picture(1).contiguous(memory_format=layout)
    captured = taped(model, x)
    captured(x)
    change(model)
    assert_right(captured, x)


def test_removed_hook_is_noticed() -> None:
    model = network()
    handle = model[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    captured = taped(model, picture())
    assert_right(captured, picture(1))
    handle.remove()
    assert_right(captured, picture(1))
    model[1].register_forward_pre_hook(lambda module, args: (args[0] + 2,))
    assert_right(captured, picture(1))
    assert tape(captured).recorded == 3


def test_global_hook_is_noticed() -> None:
    captured = taped(network(), picture())
    register = nn.modules.module.register_module_forward_hook
    handle = register(lambda module, args, output: output + 1)
    try:
        assert_right(captured, picture(1))
    finally:
        handle.remove()
    assert_right(captured, picture(1))
    assert tape(captured).recorded == 3


def test_tensor_that_is_a_plain_attribute() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.ones(1)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.table

    captured = taped(Table().eval(), torch.ones(1))
    captured.model.table = torch.ones(1)  # equal, and yet another tensor
    assert_right(captured, torch.ones(1))
    captured.model.table.mul_(5)
    assert_right(captured, torch.ones(1))
    assert tape(captured).recorded == 3


def test_attribute_that_does_not_compare_is_a_change() -> None:
    np = pytest.importorskip("numpy")
    captured = taped(network(), picture())
    captured.model.notes = np.ones(3)
    assert_right(captured, picture())
    captured.model.notes = np.ones(3)
    assert_right(captured, picture())
    assert tape(captured).recorded == 3


def test_conversion_of_the_model() -> None:
    captured = taped(network(), picture())
    captured.model.double()
    with pytest.raises(RuntimeError, match=r"type|dtype"):  # as the model itself would say
        captured(picture())
    captured.model.float()
    assert_right(captured, picture())
    captured.model.to(memory_format=torch.channels_last)
    assert_right(captured, picture(1))


@pytest.mark.parametrize("part", ["", "1.0.1"])
def test_training_mode(part: str) -> None:
    captured = taped(network(), picture())
    relaxed = taped(captured.model, picture(), on_mismatch="eager")
    statistics = captured.model.get_submodule("1.0.1").running_mean.clone()
    captured.model.get_submodule(part).train()
    message = "model: expected evaluation mode, got .*Sequential|'1.0.1'.* in training mode"
    with pytest.raises(ValueError, match=message):
        captured(picture())
    assert torch.equal(captured.model.get_submodule("1.0.1").running_mean, statistics)
    assert relaxed(picture()).requires_grad  # the model itself, which updates its statistics
    assert not torch.equal(captured.model.get_submodule("1.0.1").running_mean, statistics)
    captured.model.eval()
    for each in (captured, relaxed):
        assert_right(each, picture(1))


def test_training_of_a_part_without_buffers_is_its_own_affair() -> None:
    model = network()
    model[1].append(nn.Dropout())  # in training mode, as a new module is
    captured = taped(model, picture())
    first, second = captured(picture()), captured(picture())
    assert not torch.equal(first, second)
    model.eval()
    assert_right(captured, picture())


def test_other_device() -> None:
    captured = taped(network(), picture())
    captured.model.to("meta")
    with pytest.raises(ValueError, match=r"model: expected '0.0.weight' on cpu, got meta"):
        captured(picture())


def test_memory_that_the_graph_reads_lives() -> None:
    """A cache of the model's may be replaced while nothing that made it has changed."""

    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))
            self.cache: dict[torch.dtype, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype not in self.cache:
                self.cache.clear()
                self.cache[x.dtype] = (self.weight * 3).to(x.dtype)
            return (x * self.cache[x.dtype]).relu()

    model = Folded().eval()
    captured = taped(model, torch.ones(1000))
    kept = captured._memory
    tape(captured).steps.clear()  # so that only Captured itself may hold memory
    address = model.cache[torch.float32].data_ptr()
    model(torch.ones(1000, dtype=torch.float64))
    gc.collect()
    assert torch.float32 not in model.cache
    assert address in kept
    assert model.weight.data_ptr() not in kept, "not read by the last warm-up"
    assert len(kept) == 2, "the input and the folded weight, nothing made on the way"


def test_replaced_weights_are_freed_by_the_next_recording() -> None:
    captured = taped(network(), picture())
    old = weakref.ref(captured.model[2].weight)
    _replace_parameter(captured.model)
    assert old() is not None
    captured(picture())
    gc.collect()
    assert old() is None


# --- threads and failures --------------------


def test_threads() -> None:
    captured = taped(network(), picture())
    expected = {seed: eager(captured.model, picture(seed)) for seed in range(8)}
    wrong: list[Any] = []

    def work(seed: int) -> None:
        try:
            wrong.extend(
                seed for _ in range(25) if not torch.equal(captured(picture(seed)), expected[seed])
            )
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert tape(captured).recorded == 1
    assert tape(captured).replayed == 200


def test_exception_in_a_replay() -> None:
    captured = taped(network(), picture())
    tape(captured).fail_next = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        captured(picture())
    assert_right(captured, picture(1))


class Reader(nn.Module):
    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.sum().item() if self.reads else 2)


def test_model_that_cannot_be_recorded() -> None:
    with pytest.raises(RuntimeError, match=r"model: Reader cannot be recorded: .*not permitted"):
        taped(Reader(True).eval(), torch.ones(2))


def test_failed_recording_replays_nothing_stale() -> None:
    captured = taped(Reader(False).eval(), torch.ones(2))
    captured.model.reads = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Reader cannot be recorded"):
            captured(torch.ones(2))
    assert tape(captured).replayed == 1, "the one before the change was noticed"
    captured.model.reads = False
    assert_right(captured, torch.ones(2))


def test_error_of_the_models_own() -> None:
    with pytest.raises(RuntimeError, match="expected input"):
        taped(network(), torch.randn(1, 4, 9, 7))


# --- what is refused --------------------


def test_bad_arguments() -> None:
    model, x = network(), picture()
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got function"):
        taped(lambda x: x, x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"example\[1\]: expected a tensor, got int"):
        taped(model, x, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="example: expected at least one tensor, got none"):
        taped(model)
    with pytest.raises(ValueError, match="on_mismatch: expected 'error' or 'eager', got 'retry'"):
        taped(model, x, on_mismatch="retry")
    with pytest.raises(ValueError, match=r"example\[1\]: .* one cpu device, got meta"):
        taped(model, x, x.to("meta"))
    with pytest.raises(ValueError, match=r"example\[0\]: .*without overlap, got strides \(0, 1\)"):
        taped(model, torch.ones(1, 3).expand(2, 3))
    with pytest.raises(ValueError, match=r"example\[0\]: .*got torch.sparse_coo"):
        taped(model, torch.ones(2, 3).to_sparse())
    with pytest.raises(ValueError, match=r"model: expected evaluation mode, got Sequential"):
        taped(network().train(), x)
    with pytest.raises(ValueError, match=r"model: expected '0.0.weight' on cpu, got meta"):
        taped(network().to("meta"), x)
    with torch.inference_mode():
        hidden = network()
    with pytest.raises(ValueError, match=r"model: expected '0.0.weight' to be a normal tensor"):
        taped(hidden, x)


def test_cpu_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"example\[0\]: capture needs CUDA.*got cpu.*call the mod"
    ):
        capture(network(), picture())
    with pytest.raises(TypeError, match="model"):
        capture(3, picture())  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_cannot_be_copied(make: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="a captured model cannot be copied or pickled"):
        make(taped(network(), picture()))


def test_public_names() -> None:
    assert resnet_fused.capture is capture
    captured = taped(network(), picture())
    assert isinstance(captured, Captured)
    with pytest.raises(AttributeError):
        captured.model = network()  # type: ignore[misc]


def test_unchanged_model_stays_unchanged() -> None:
    model = fuse(network())
    state = _State(model)
    eager(model, picture())
    assert not state.changed()


# --- on a GPU --------------------


def on_gpu(model: nn.Module) -> nn.Module:
    return model.to("cuda", memory_format=torch.channels_last)  # type: ignore[call-overload]


def gpu_picture(seed: int, size: int = 64, batch: int = 1) -> Tensor:
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return x.to("cuda").contiguous(memory_format=torch.channels_last)


def resnet(seed: int = 7, fused: bool = True) -> nn.Module:
    model = models.resnet18(num_classes=10, fused=fused)
    return on_gpu(block_zoo.randomise(model, seed).eval())


def assert_parity_on_gpu(captured: Captured, x: Tensor, what: str = "result") -> None:
    plain = resnet_fused.unfuse(captured.model)
    reference = eager(double_model(plain), x.double())
    results = captured(x), eager(plain, x), reference
    assert_parity(*(r.cpu() for r in results), what=what)


@needs_gpu
@pytest.mark.parametrize("fused", [False, True])
def test_gpu_resnet18_at_batch_1(fused: bool) -> None:
    captured = capture(resnet(fused=fused), gpu_picture(0))
    assert_parity_on_gpu(captured, gpu_picture(1), "as captured")
    first = captured(gpu_picture(1))
    before = first.clone()
    captured.model.load_state_dict(resnet(seed=20).state_dict())
    assert_parity_on_gpu(captured, gpu_picture(1), "after load_state_dict")
    with torch.no_grad():
        for parameter in captured.model.parameters():
            parameter.mul_(0.9)
    assert_parity_on_gpu(captured, gpu_picture(2), "changed in place")
    captured.model.fc = nn.Linear(512, 3).cuda()
    assert_parity_on_gpu(captured, gpu_picture(3), "another child")
    assert torch.equal(first, before)


@needs_gpu
def test_gpu_graphs_of_one_model_outlive_each_others_recordings() -> None:
    """What the first one reads is freed by the model, and by CUDA, while it does not know yet."""
    model = resnet()
    small, large = capture(model, gpu_picture(0)), capture(model, gpu_picture(0, 96, 2))
    for seed in range(3):
        model.load_state_dict(resnet(seed=30 + seed).state_dict())
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        assert_parity_on_gpu(large, gpu_picture(seed, 96, 2), "the other shape")
        gc.collect()
        torch.cuda.empty_cache()
        assert_parity_on_gpu(small, gpu_picture(seed))


@needs_gpu
def test_gpu_graph_keeps_what_the_model_keeps_no_longer() -> None:
    """The model folds anew for a while; what the graph reads would be free, and nothing changed."""
    captured = capture(resnet(), gpu_picture(0))
    expected = captured(gpu_picture(1))
    norms = [m for m in captured.model.modules() if isinstance(m, nn.BatchNorm2d)]
    for eps in (0.5, 1e-5):
        for norm in norms:
            norm.eps = eps
        if eps == 0.5:
            eager(captured.model, gpu_picture(1))
    rubbish = [torch.full((64,), float("nan"), device="cuda") for _ in range(500)]
    assert torch.equal(captured(gpu_picture(1)), expected)
    del rubbish


@needs_gpu
def test_gpu_autocast() -> None:
    model, x = resnet(), gpu_picture(1)
    with torch.autocast("cuda", torch.bfloat16):
        captured = capture(model, gpu_picture(0))
    rubbish = [torch.full((2**i,), float("nan"), device="cuda") for i in range(20)]
    with torch.autocast("cuda", torch.bfloat16):
        results = captured(x), eager(resnet_fused.unfuse(model), x)
    assert results[0].dtype == torch.bfloat16
    reference = eager(double_model(resnet_fused.unfuse(model)), x.double())
    assert_parity(*(r.cpu() for r in (*results, reference)))
    with pytest.raises(ValueError, match=r"autocast: expected torch.bfloat16, got None"):
        captured(x)
    del rubbish


@needs_gpu
def test_gpu_streams_and_threads() -> None:
    captured = capture(resnet(), gpu_picture(0))
    pictures = [gpu_picture(seed) for seed in range(8)]
    expected = [captured(x).cpu() for x in pictures]
    wrong: list[Any] = []

    def work(i: int) -> None:
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.default_stream())
            for _ in range(20):
                with torch.cuda.stream(stream):
                    result = captured(pictures[i])
                    if not torch.equal(result.cpu(), expected[i]):
                        wrong.append(i)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_gpu
def test_gpu_call_on_another_stream_waits() -> None:
    captured = capture(resnet(), gpu_picture(0))
    x, y = gpu_picture(1), gpu_picture(2)
    expected = captured(x), captured(y)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)  # the first call's work has not begun when the second is made
    first = captured(x)
    with torch.cuda.stream(stream):
        second = captured(y)
    torch.cuda.synchronize()
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1])


@needs_gpu
def test_gpu_is_usable_after_a_failed_recording() -> None:
    stream = torch.cuda.current_stream()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="model: Reader cannot be recorded"):
            capture(Reader(True).eval(), torch.ones(2, device="cuda"))
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    torch.manual_seed(3)
    first = torch.randn(4, device="cuda")
    torch.manual_seed(3)
    assert torch.equal(torch.randn(4, device="cuda"), first)
    big = torch.ones(2**24, device="cuda")
    big.record_stream(torch.cuda.Stream())
    held = torch.cuda.memory_stats()["active_bytes.all.current"]
    del big
    torch.cuda.synchronize()
    small = torch.ones(1, device="cuda")  # during a capture nothing would look at events here
    assert torch.cuda.memory_stats()["active_bytes.all.current"] < held - 2**25
    del small
    torch.cuda.empty_cache()
    captured = capture(resnet(), gpu_picture(0))
    assert_parity_on_gpu(captured, gpu_picture(1))


@needs_gpu
def test_gpu_random_numbers_are_new_in_every_replay() -> None:
    model = nn.Sequential(nn.Dropout()).eval()
    model[0].train()
    captured = capture(model, torch.ones(4096, device="cuda"))
    first, second = (captured(torch.ones(4096, device="cuda")) for _ in range(2))
    assert not torch.equal(first, second)


@needs_gpu
def test_gpu_memory_is_freed() -> None:
    model, sizes = resnet(), []
    for seed in range(4):  # the first fills the model's and the libraries' own caches
        captured = capture(model, gpu_picture(0))
        captured(gpu_picture(1))
        model.load_state_dict(resnet(seed=20 + seed).state_dict())
        captured(gpu_picture(1))
        del captured
        gc.collect()
        sizes.append(torch.cuda.memory_allocated())
    assert sizes[-1] <= sizes[1]


@needs_gpu
def test_gpu_wrong_devices() -> None:
    captured = capture(resnet(), gpu_picture(0))
    with pytest.raises(ValueError, match=r"inputs\[0\]: .*on cuda:0, got .* on cpu"):
        captured(gpu_picture(0).cpu())
    with pytest.raises(ValueError, match=r"model: expected '.*' on cuda:0, got cpu"):
        capture(resnet().cpu(), gpu_picture(0))
    captured.model.cpu()
    torch.cuda.empty_cache()
    with pytest.raises(ValueError, match=r"model: expected '.*' on cuda:0, got cpu"):
        captured(gpu_picture(0))
    captured.model.cuda()
    assert_parity_on_gpu(captured, gpu_picture(1))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_gpu_other_than_the_current_one() -> None:
    model = resnet().to("cuda:1")
    captured = capture(model, gpu_picture(0).to("cuda:1"))
    result = captured(gpu_picture(1).to("cuda:1"))
    assert result.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(result, eager(model, gpu_picture(1).to("cuda:1")))
