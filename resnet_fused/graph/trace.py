"""One module's own forward as a graph of calls: children stay calls, plain Sequentials are opened.

Tracing runs the module's forward once on symbols (torch.fx). The module itself is not touched: the
forward runs on a shallow copy, and what a trace cannot represent is refused with its reason —
branches on data, random numbers drawn in forward, tensors made in forward, attributes written.
"""

from __future__ import annotations

import builtins
import inspect
import operator
import random
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor, fx, nn

from resnet_fused.graph.marker import original_class
from resnet_fused.process_lock import ProcessLock


class Untraceable(Exception):
    """This forward cannot be represented as a graph; the message says why."""


def trace(module: nn.Module, *, training: bool, sequences: bool = False) -> fx.Graph:
    """The graph of ``type(module).forward``.

    Args:
        module: its forward is traced with its required arguments; optional ones keep their
            defaults.
        training: the value of ``self.training`` to trace with.
        sequences: arguments are lists of tensors instead of tensors.

    Raises:
        Untraceable: with the reason.
    """
    start, ends = _random_states(), []
    for _ in range(_MOST_TRIES):
        try:
            with _tracing.here():
                interval = sys.getswitchinterval()
                try:
                    sys.setswitchinterval(_UNDISTURBED)
                    before = _random_states()
                    graph = _trace_once(module, training, sequences)
                    ends.append(_random_states())
                finally:
                    sys.setswitchinterval(interval)
        except BaseException:
            _restore_random_states(start)
            raise
        if _equal(before, ends[-1]):
            return graph
        _restore_random_states(start)
        if len(ends) >= _TRIES and all(_equal(ends[-1], end) for end in ends[-_TRIES:]):
            break
    raise Untraceable("forward draws random numbers")


# The generators are the whole process's, and another thread may draw from them wherever a trace
# lets Python go on there. A forward that draws moves them by as much every time.
_TRIES, _MOST_TRIES = 6, 64
_UNDISTURBED = 1.0  # seconds that other threads' Python code waits, unless this one waits itself


def _trace_once(module: nn.Module, training: bool, sequences: bool) -> fx.Graph:
    probe = _shallow_copy(module)
    probe.training = training
    before = _attributes(probe)
    try:
        graph = _run_on_symbols(probe, sequences)
    except Untraceable:
        raise
    except Exception as error:  # a user's forward may raise anything when run on symbols
        if (interrupt := _behind(error)) is not None:
            raise interrupt from None
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Untraceable(f"forward cannot be traced: {message}") from error
    written = sorted(k for k, v in _attributes(probe).items() if before.get(k) != v)
    if any(name.startswith("_tensor_constant") for name in written):
        raise Untraceable("forward makes a tensor")
    if written:
        raise Untraceable(f"forward writes self.{written[0]}")
    return graph


def _behind(error: BaseException | None) -> BaseException | None:
    """The interrupt while which an exception was raised: torch.fx asserts as it cleans up."""
    while error is not None and isinstance(error, Exception):
        error = error.__context__
    return error


def opens(module: nn.Module) -> bool:
    """Whether a parent's graph looks inside: a hookless Sequential of PyTorch's own modules."""
    return is_plain_sequence(module) and all(
        opens(m) or _is_pytorch_leaf(m) for m in module.children()
    )


def is_plain_sequence(module: nn.Module) -> bool:
    """Whether calling a module only calls its children in turn."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and "forward" not in vars(module)
        and not has_hooks(module)
    )


def _is_pytorch_leaf(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn") and not any(module.children())


def has_hooks(module: nn.Module) -> bool:
    """Whether calling this module runs anything beside its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class _Symbol(fx.Proxy):
    """A symbol that keeps `x += y` apart from `x = x + y`, which torch.fx does not."""


def _inplace(name: str) -> Any:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"):
    setattr(_Symbol, f"__{_name}__", _inplace(_name))


class _TensorSymbol(_Symbol):
    """A symbol that ``isinstance(x, torch.Tensor)`` takes for a tensor while tracing."""

    _is_param = _is_buffer = False  # what isinstance(x, nn.Parameter) and nn.Buffer ask for


_tracing = ProcessLock()


def _run_on_symbols(probe: nn.Module, sequences: bool) -> fx.Graph:
    """Trace, with Python's isinstance, and not C code's type checks, taking a symbol for a tensor.

    After an interrupt nothing is left of what is changed for the whole process meanwhile. So that
    is put back without a call, before which an interrupt might come.
    """

    def answer(value: object, kinds: Any) -> bool:
        return ask(value, kinds) or (type(value) is _TensorSymbol and issubclass(Tensor, kinds))

    ask = builtins.isinstance
    call, look_up = nn.Module.__call__, nn.Module.__getattr__
    try:
        builtins.isinstance = answer
        return _Tracer(sequences).trace(probe)
    except BaseException as error:
        _end_patches(error)
        raise
    finally:
        builtins.isinstance = ask
        nn.Module.__call__ = call  # type: ignore[method-assign]
        nn.Module.__getattr__ = look_up  # type: ignore[method-assign]


def _end_patches(error: BaseException) -> None:
    """Undo what torch.fx has patched, and what an interrupt kept it from undoing."""
    traceback.clear_frames(error.__traceback__)  # ends with-blocks left without their ends
    symbolic: Any = sys.modules["torch.fx._symbolic_trace"]
    patcher = getattr(symbolic, "CURRENT_PATCHER", None)
    if patcher is not None:
        patcher.revert_all_patches()
        symbolic.CURRENT_PATCHER = None


_NOT_TENSORS = ("size", "dim", "numel", "stride", "item", "tolist", "chunk", "split", "unbind")


def _modes() -> tuple[Any, ...]:
    """What `with torch.no_grad()` and the like change; a graph cannot hold it."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")),
    )


class _Tracer(fx.Tracer):
    """torch.fx's, for the thread that made it.

    torch.fx puts its own ``__call__`` and ``__getattr__`` into nn.Module for as long as it traces.
    Whatever other threads run meanwhile is handed through.
    """

    def __init__(self, sequences: bool) -> None:
        super().__init__()
        self.thread = threading.get_ident()
        self.sequences = sequences
        self.tensors: set[fx.Node] = set()
        self.modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not opens(m)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if self._is_tensor(node):
            self.tensors.add(node)
            return _TensorSymbol(node, self)
        return _Symbol(node, self)

    def _is_tensor(self, node: fx.Node) -> bool:
        if node.op in ("call_function", "call_method"):
            about = node.target is getattr or node.target in _NOT_TENSORS
            return not about and any(n in self.tensors for n in node.all_input_nodes)
        return node.op != "placeholder" or not self.sequences

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise Untraceable("forward switches gradients or autocast on or off")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        return a.node if type(a) is _TensorSymbol else super().create_arg(a)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        for i, parameter in enumerate(parameters, start=1):
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise Untraceable(f"forward takes {parameter}")
            if parameter.default is not parameter.empty:
                self.graph.erase_node(args[i].node)
                args[i] = parameter.default
        return fn, args


def _shallow_copy(module: nn.Module) -> nn.Module:
    kind = original_class(module)
    probe = kind.__new__(kind)
    probe.__dict__.update(vars(module))
    for name in ("_parameters", "_buffers", "_modules"):
        probe.__dict__[name] = dict(probe.__dict__[name])
    return probe


def _attributes(module: nn.Module) -> dict[str, int]:
    own = {k: id(v) for k, v in vars(module).items()}
    for name in ("_parameters", "_buffers", "_modules"):
        own.pop(name)
        own.update({k: id(v) for k, v in vars(module)[name].items()})
    return own


def _random_states() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), numpy.random.get_state()


def _equal(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether states of the generators are the same."""
    return (
        torch.equal(a[0], b[0])
        and a[1] == b[1]
        and all(numpy.array_equal(x, y) for x, y in zip(a[2], b[2], strict=True))
    )


def _restore_random_states(states: tuple[Any, ...]) -> None:
    torch_state, python_state, numpy_state = states
    torch.set_rng_state(torch_state)
    random.setstate(python_state)
    numpy.random.set_state(numpy_state)
