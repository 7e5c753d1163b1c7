"""A device of torch that computes on the CPU, but refuses what a GPU refuses; it takes the place of one in tests.

Tensors are on it only if they were made there or moved there. An operation on them and on tensors of the CPU is an
error, and so is reading their memory directly, and float64. It stays registered in the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "simulated"
Keywords = Mapping[str, Any]
# The operators of autocast's list for bf16 that training uses.
_IN_BF16 = ("addmm", "bmm", "linear", "matmul", "mm", "scaled_dot_product_attention")
_AUTOCAST = "AutocastPrivateUse1"
_LIBRARIES = list[torch.library.Library]()
_COPIES = (torch.ops.aten.copy_, torch.ops.aten._to_copy)


class _Module(_DummyBackendModule):
    """What torch asks of `torch.simulated`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """That of `register`."""
        return [torch.bfloat16]

    @staticmethod
    def empty_cache() -> None:
        """Nothing, as tensors are of the CPU."""


class _OnDevice(torch.Tensor):
    """A tensor of the device; `held` has its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls: type[_OnDevice], held: torch.Tensor) -> _OnDevice:
        if held.dtype == torch.float64:
            raise TypeError(f"{NAME} has no float64, as the GPUs of Apple silicon")
        sizes: dict[str, Any] = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made: _OnDevice = torch.Tensor._make_wrapper_subclass(cls, held.size(), **sizes, device=device())
        made.held = held
        return made

    def tolist(self) -> object:
        """Torch refuses this for tensors of other classes, not of other devices."""
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, operator: OpOverload, _types: object, args: Sequence[object] = (), kwargs: Keywords | None = None
    ) -> object:
        return _computed(operator, args, kwargs or {})


class _Operators(TorchDispatchMode):
    """Makes tensors on the device where an operator asks for it."""

    def __torch_dispatch__(
        self, operator: OpOverload, _types: object, args: Sequence[object] = (), kwargs: Keywords | None = None
    ) -> object:
        return _computed(operator, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Makes the tensor of a list on the CPU first, since `torch.tensor` calls no operator that could be replaced."""

    def __torch_function__(
        self,
        function: Callable[..., object],
        _types: object,
        args: Sequence[object] = (),
        kwargs: Keywords | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        if function is torch.tensor and _is_simulated(kwargs.get("device")):
            return function(*args, **{**kwargs, "device": "cpu"}).to(device())
        return function(*args, **kwargs)


def device() -> torch.device:
    """The device, once it is registered."""
    return torch.device(NAME, 0)


@contextmanager
def simulated() -> Iterator[torch.device]:
    """The device, which exists while the block runs."""
    with _Functions(), _Operators():
        yield device()


def register() -> None:
    """Make the device and its autocast to bf16 known to torch, in this process and for good."""
    _setup_privateuseone_for_python_backend(NAME, _Module())
    # A backend in Python has no allocator, whose cache Accelerate empties from 1.16 on.
    torch.accelerator.empty_cache = _Module.empty_cache
    # Freed libraries would take their kernels with them.
    _LIBRARIES.extend(torch.library.Library(name, "IMPL", _AUTOCAST) for name in ("_", "aten"))
    others, aten = _LIBRARIES
    others.fallback(torch.library.fallthrough_kernel)
    for name in _IN_BF16:
        aten.impl(name, _in_bf16(getattr(torch.ops.aten, name)), _AUTOCAST)


def _in_bf16(operator: OpOverloadPacket) -> Callable[..., object]:
    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.bfloat16() if tensor.dtype == torch.float32 else tensor

    def run(*args: object, **kwargs: object) -> object:
        with torch._C._DisableAutocast():
            return operator(*_mapped(cast, args), **{name: _mapped(cast, value) for name, value in kwargs.items()})

    return run


def _is_simulated(given: object) -> bool:
    return given is not None and torch.device(given).type == NAME


def _computed(operator: OpOverload, args: Sequence[object], kwargs: Keywords) -> object:
    """Compute on the CPU; the result is on the device if an argument is, or if `device` says so."""
    tensors = list(_tensors((*args, *kwargs.values())))
    own = [tensor for tensor in tensors if isinstance(tensor, _OnDevice)]
    # As on a GPU, single numbers may come from the CPU.
    foreign = [tensor for tensor in tensors if not isinstance(tensor, _OnDevice) and tensor.dim()]
    is_copy = operator.overloadpacket in _COPIES
    if own and foreign and not is_copy:
        shapes = [tuple(tensor.shape) for tensor in foreign]
        raise RuntimeError(f"{operator} gets tensors of {NAME} and, with shapes {shapes}, of the cpu")
    asked = kwargs.get("device")
    is_own = bool(own) if asked is None else _is_simulated(asked)
    if operator.overloadpacket is torch.ops.aten.copy_:
        is_own = isinstance(args[0], _OnDevice)
    there = {**kwargs, "device": torch.device("cpu")} if _is_simulated(asked) else kwargs
    result = operator(*_mapped(_held, args), **{name: _mapped(_held, value) for name, value in there.items()})
    # An operator that changes a tensor in place returns that tensor.
    same = {id(tensor.held): tensor for tensor in own}

    def wrapped(tensor: torch.Tensor) -> torch.Tensor:
        return same[id(tensor)] if id(tensor) in same else _OnDevice(tensor)

    return _mapped(wrapped, result) if is_own else result


def _held(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.held if isinstance(tensor, _OnDevice) else tensor


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """The tensors in what an operator takes or returns."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _mapped(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:  # noqa: ANN401 - of any operator
    """The same with other tensors. torch's `tree_map` knows more kinds of values, which takes half of a training."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(change, part) for part in value])
    return value
