"""A GPU that is made up: tensors on "cuda" without memory, and a guard over what is done with them.

torch's FakeTensorMode knows shapes, strides, dtypes and devices of tensors that do not exist, but
its backward pass needs a driver where the device is CUDA. So the tensors are on torch's device for
out-of-tree backends, which can be registered in Python, and every "cuda" that Python code names or
asks for is that device. All code above torch's dispatcher runs unmodified, forward and backward.

The guard sees each op that reaches the device and who called it. For our code it raises
`NotOnAGpu` where a GPU would have to be waited for, where memory is copied between it and the
host, where a tensor is on the CPU, and where other ranks are asked.

`install` cannot be undone: use it in a process of its own.
"""

import contextlib
import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import megatron_rltd

NAME = "fake_gpu"  # to torch's C++; Python code sees "cuda"
CUDA = torch.device("cuda", 0)
OURS = f"{Path(megatron_rltd.__file__).parent}/"
NOT_OURS: set[str] = set()  # files of stand-ins for others' code that ours calls
_THEIRS = {"forward", "checkpoint", "__call__"}  # of layers, and of their recomputation
_LABEL = "megatron_rltd"  # of autograd nodes that our code made

_state = threading.local()
_fake_device = FakeTensor.device.fget


class NotOnAGpu(AssertionError):
    """What our code did is no way to use a GPU."""


def _device() -> torch.device:
    return torch.device(NAME, 0)


@functools.cache
def _mode() -> FakeTensorMode:
    # One for all: tensors of different modes do not mix, and Transformer Engine caches some.
    return FakeTensorMode()


def install() -> None:
    """Register the device and let fake tensors say that it is "cuda"; once in a process."""
    if hasattr(torch, NAME):
        return
    _setup_privateuseone_for_python_backend(NAME)

    def device(self: FakeTensor) -> torch.device:
        own = _fake_device(self)
        return CUDA if own.type == NAME and not getattr(_state, "in_torch", False) else own

    FakeTensor.device = property(device, FakeTensor.device.fset)
    # No device to run real ops on, for constants say.
    FakeTensorMode.avoid_device_init = property(lambda mode: True)
    engine = torch.autograd._engine_run_backward

    def run_backward(*args, **kwargs):
        # Tensor.backward is itself called through the mode, which is off until it returns.
        mode = getattr(_state, "names", None)
        with mode or contextlib.nullcontext():
            return engine(*args, **kwargs)

    torch.autograd._engine_run_backward = run_backward


def _is_cuda(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.split(":")[0] == "cuda"
    )


def _named(value: Any) -> Any:
    return _device() if _is_cuda(value) else value


def caller() -> tuple[bool, str]:
    """Return whether our code called, and which line of it.

    The innermost frame of ours or Megatron's counts. What Megatron's data structures and helpers
    do for us is ours too; what its layers do, which we call on kept tokens, is theirs.
    """
    frame: FrameType | None = sys._getframe(1)
    entered = None  # the function of Megatron's that the code further out has called
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(OURS):
            name = f"{Path(file).relative_to(Path(OURS).parent)}:{frame.f_lineno}"
            return entered not in _THEIRS, f"{name} in {frame.f_code.co_name}"
        if "/megatron/core/" in file:
            entered = frame.f_code.co_name
        elif file in NOT_OURS:
            return False, ""
        frame = frame.f_back
    return False, ""


def _caller() -> tuple[bool, str]:
    """As `caller`, also of what torch's own backward functions do: whose forward it was."""
    ours, where = caller()
    node = None if ours else torch._C._current_autograd_node()
    if node is not None and _LABEL in node.metadata:
        return True, f"{node.name()} of {node.metadata[_LABEL]}"
    return ours, where


class _Names(TorchFunctionMode):
    """Below the names of torch's functions: "cuda" is the fake device."""

    def __init__(self, guard: "Guard"):
        super().__init__()
        self._guard = guard

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # For this thread: torch.tensor(list, device=...) is a tensor on the CPU, then a copy.
        torch._C._set_only_lift_cpu_tensors(True)
        kwargs = kwargs or {}
        if func == Tensor.is_cuda.__get__:
            return args[0].device.type == "cuda"
        if func == Tensor.cuda:
            func, args, kwargs = Tensor.to, (args[0], _device()), {}
        kwargs = {name: _named(value) for name, value in kwargs.items()}
        if isinstance(kwargs.get("device"), int):
            kwargs["device"] = _device()
        ours, where = caller()
        if kwargs.pop("pin_memory", False) or func == Tensor.pin_memory:
            if ours and not self._guard.warming_up:
                self._guard.report("a tensor on the CPU", "pin_memory", where)
            if func == Tensor.pin_memory:
                return args[0]
        _state.names = self
        result = func(*(_named(a) for a in args), **kwargs)
        if ours and torch.is_grad_enabled():
            _label(result, args, where)
        return result


def _label(result: Any, args: Any, where: str) -> None:
    """Mark the autograd nodes between the arguments and the result of a function."""
    before = {a.grad_fn for a in pytree.tree_leaves(args) if isinstance(a, Tensor)}
    nodes = [x.grad_fn for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
    while nodes:
        node = nodes.pop()
        if node is None or node in before or _LABEL in node.metadata:
            continue
        node.metadata[_LABEL] = where
        nodes += [following for following, _ in node.next_functions]


_NO_LAUNCH = {
    *("aten::empty.memory_format", "aten::empty_strided", "aten::empty_like", "aten::new_empty"),
    *("aten::new_empty_strided", "aten::_unsafe_view", "aten::detach", "aten::lift_fresh"),
}
_WAITING_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


def launches(func: torch._ops.OpOverload) -> bool:
    """Return whether an op starts a kernel: it is no view, and does not only allocate."""
    schema = func._schema
    if func.namespace == "c10d" or schema.name.startswith("aten::sym_"):
        return False
    name = f"{schema.name}.{schema.overload_name}".removesuffix(".")
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return not is_view and name not in _NO_LAUNCH


class Guard(TorchDispatchMode):
    """Sees every op. Ours may copy to the device while `warming_up`, as what is cached does.

    Attributes:
        found: What was wrong, one line each, in order.
        launched: Op to how often our code launched it, since the last `start`.
        launched_by_all: The same of all code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.warming_up = True
        self.start()

    def start(self) -> None:
        """Count from here."""
        self.launched: Counter[str] = Counter()
        self.launched_by_all: Counter[str] = Counter()

    def report(self, what: str, op: str, where: str) -> None:
        """Note and raise."""
        self.found.append(f"{what}: {op} at {where}")
        raise NotOnAGpu(self.found[-1])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "prim":  # asks for a tensor's device, thousands of times
            return func(*args, **(kwargs or {}))
        kwargs = {name: _named(value) for name, value in (kwargs or {}).items()}
        ours, where = _caller()
        inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if ours:
            self._check_inputs(func, args, inputs, where)
        before = getattr(_state, "in_torch", False)
        _state.in_torch = True
        try:
            with torch._C.DisableTorchFunction():
                result = func(*args, **kwargs)
        finally:
            _state.in_torch = before
        if ours:
            self._check_outputs(func, inputs, result, where)
        if launches(func):
            self._count(func, args, ours)
        return result

    def _check_inputs(self, func, args, inputs: list[Tensor], where: str) -> None:
        name = str(func)
        if name.startswith(("aten.index.", "aten.index_put")):
            if any(m is not None and m.dtype in (torch.bool, torch.uint8) for m in args[1]):
                self.report("waits for the GPU to count what a mask selects", name, where)
        elif name == "aten._local_scalar_dense.default" or set(_WAITING_TAGS) & set(func.tags):
            self.report("waits for the GPU", name, where)
        if func.namespace == "c10d":
            self.report("asks other ranks", name, where)
        on_cpu = [x for x in inputs if x.device.type == "cpu"]
        if on_cpu and not self.warming_up:
            self.report("a tensor on the CPU", name, where)
        if on_cpu and func.namespace == "megatron_rltd":
            self.report("a tensor on the CPU", name, where)
        if func.namespace == "megatron_rltd":
            self._check_kernel(func, args, where)

    def _check_kernel(self, func, args, where: str) -> None:
        # As csrc/bindings.cpp does, since kernels do not run here.
        if func._schema.is_mutable and not args[0].is_contiguous():
            self.report("a buffer that is written to is not contiguous", str(func), where)

    def _check_outputs(self, func, inputs: list[Tensor], result: Any, where: str) -> None:
        results = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        on_cpu = [x for x in results if x.device.type == "cpu"]
        if not on_cpu:
            return
        if any(x.device.type == "cuda" for x in inputs):
            self.report("copies from the GPU and waits for it", str(func), where)
        if not self.warming_up:
            self.report("a tensor on the CPU", str(func), where)

    def _count(self, func, args, ours: bool) -> None:
        names = [str(func).removesuffix(".default")]
        if func.namespace == "megatron_rltd":
            # csrc/bindings.cpp copies what its kernels cannot read as it is.
            loose = sum(_is_copied(x) for x in args if isinstance(x, Tensor))
            names += ["copies of arguments in megatron_rltd"] * loose
        for name in names:
            self.launched_by_all[name] += 1
            if ours:
                self.launched[name] += 1


def _is_copied(tensor: Tensor) -> bool:
    if tensor.dtype in (torch.int32, torch.int64):
        return not tensor.is_contiguous()
    return tensor.size(-1) > 1 and tensor.stride(-1) != 1


class _Stream(contextlib.AbstractContextManager):
    """A stream or an event: asked for by Megatron, waited for by nobody of ours."""

    def __init__(self, guard: Guard):
        self._guard = guard

    def __exit__(self, *exc_info):
        return None

    def __getattr__(self, name: str) -> Callable:
        def method(*args, **kwargs):
            ours, where = caller()
            if ours and name in ("synchronize", "query", "elapsed_time"):
                self._guard.report("waits for the GPU", f"torch.cuda.Stream.{name}", where)

        return method


def _waits(guard: Guard, name: str) -> Callable:
    """Return what stands for a function that waits for the GPU."""

    def function(*args, **kwargs):
        ours, where = caller()
        if ours:
            guard.report("waits for the GPU", f"torch.cuda.{name}", where)

    return function


def _cuda_functions(guard: Guard) -> dict[str, Callable]:
    """Return what stands for torch.cuda's functions that need a driver."""

    def stream(*args, **kwargs):
        return _Stream(guard)

    return {
        **{name: _waits(guard, name) for name in ("synchronize", "empty_cache", "mem_get_info")},
        **dict.fromkeys(("current_stream", "default_stream", "stream", "Stream", "Event"), stream),
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "manual_seed": lambda seed: None,
    }


@contextlib.contextmanager
def active() -> Iterator[Guard]:
    """Make every new tensor a fake one, "cuda" the fake device, and guard it."""
    guard = Guard()

    def shown(tensor: FakeTensor) -> str:
        ours, where = caller()
        if ours:
            guard.report("prints a tensor, and waits for it", "Tensor.__repr__", where)
        return f"FakeTensor({tuple(tensor.shape)}, {tensor.dtype}, {_fake_device(tensor)})"

    random = dict(
        get_rng_state=lambda *args, **kwargs: None, set_rng_state=lambda *args, **kwargs: None
    )
    with (
        mock.patch.multiple(torch.cuda, **_cuda_functions(guard)),
        mock.patch.object(torch.accelerator, "synchronize", _waits(guard, "synchronize")),
        mock.patch.multiple(torch, **random),
        mock.patch.multiple(torch.cuda, **random),
        mock.patch.multiple(torch.cuda.random, **random),
        mock.patch.object(FakeTensor, "__repr__", shown),
        _mode(),
        guard,
        _Names(guard),
    ):
        yield guard
