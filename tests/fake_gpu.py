"""A fake GPU: a PyTorch device with tensors in the CPU's memory.

It really computes, so whole jobs run on it, and it refuses what a GPU refuses: operations on
tensors of two devices, and access by NumPy or a kernel to the memory of its tensors. Tests of
device handling thus need no GPU.

The device is a Python backend (`torch.utils.backend_registration`) with wrapper tensors. It cannot
be unregistered, so tests that use it run in their own process (see `tests/gpu/test_fake.py`).
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "fakegpu"
MEMORY = 8 << 30
"""Memory that the device reports, in bytes."""

CAST = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")
"""Operations that autocast computes in the lower precision."""

CROSS = ("aten.copy_", "aten._to_copy", "aten.to.", "aten.index_put")
"""Operations that may read from one device and write to the other."""


class FakeModule(backend_registration._DummyBackendModule):
    """The functions that PyTorch and `deepseek.device` need of a device module."""

    def __init__(self) -> None:
        self.allocated = 0
        self.synchronized = 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self) -> None:
        self.synchronized += 1

    def empty_cache(self) -> None:
        pass

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return MEMORY - self.allocated, MEMORY

    def memory_reserved(self, device: torch.device) -> int:
        return self.allocated

    def memory_allocated(self, device: torch.device) -> int:
        return self.allocated

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.allocated

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        """Ignore the state: random numbers come from the CPU's generator."""


class FakeTensor(Tensor):
    """A tensor of the fake GPU.

    Attributes:
        data_on_host: the values.
    """

    data_on_host: Tensor

    @staticmethod
    def __new__(cls, on_host: Tensor, requires_grad: bool = False) -> "FakeTensor":
        fake = Tensor._make_wrapper_subclass(
            cls,
            on_host.size(),
            strides=on_host.stride(),
            storage_offset=on_host.storage_offset(),
            dtype=on_host.dtype,
            device=torch.device(NAME, 0),
            requires_grad=requires_grad,
        )
        fake.data_on_host = on_host
        return fake

    def tolist(self) -> Any:
        return self.data_on_host.tolist()

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        """Replace torch's method, whose copy to the device does not reach a Python backend."""
        return tensor(data, dtype=dtype or self.dtype, device=NAME)

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the storage, which identifies views of the same memory."""
        return self.data_on_host.untyped_storage()

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(
            tuple(tensor(p, device=NAME) if isinstance(p, list) else p for p in parts)
        )

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute an operation on the host and return tensors on the right device.

    Raises:
        RuntimeError: its tensors are on two devices.
    """
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
    hosts = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor) and tensor.dim()]
    # The device may read a scalar of the host, but not write to it.
    if func._schema.is_mutable and args and isinstance(args[0], Tensor):
        hosts += [args[0]] if not isinstance(args[0], FakeTensor) else []
    if fakes and hosts and not str(func).startswith(CROSS):
        raise RuntimeError(f"{func}: expected all tensors on one device, found {NAME} and cpu")
    target = kwargs.get("device")
    on_device = bool(fakes) if target is None else torch.device(target).type == NAME
    if str(func).startswith("aten.copy_"):
        on_device = isinstance(args[0], FakeTensor)
    host_kwargs = {
        name: torch.device("cpu") if isinstance(value, torch.device) else value
        for name, value in kwargs.items()
        if name != "pin_memory"
    }
    result = func(*tree_map(_on_host, args), **tree_map(_on_host, host_kwargs))
    if not on_device:
        return result
    same = {id(fake.data_on_host): fake for fake in fakes}
    return tree_map(
        lambda value: (
            same.get(id(value), FakeTensor(value)) if isinstance(value, Tensor) else value
        ),
        result,
    )


def _on_host(value: Any) -> Any:
    return value.data_on_host if isinstance(value, FakeTensor) else value


def _casting(operation: Any) -> Callable[..., Any]:
    """Return an operation that casts its arguments to autocast's dtype first."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(value: Any) -> Any:
        if not isinstance(value, FakeTensor) or not value.is_floating_point():
            return value
        if value.dtype is torch.float64:
            return value
        return value.to(torch.get_autocast_dtype(NAME))

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operation(*tree_map(cast, args), **tree_map(cast, kwargs))

    return call


def generator() -> torch.Generator:
    """Return a random generator for the device, which has no own one."""
    return HOST_GENERATOR()


HOST_GENERATOR = torch.Generator
HOST_TENSOR = torch.tensor
HOST_ARANGE = torch.arange


def arange(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
    """Replace `torch.arange`, which resizes an empty tensor; wrapper tensors cannot be resized."""
    return HOST_ARANGE(*args, **kwargs).to(device)


def tensor(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
    """Replace `torch.tensor`, whose copy to the device does not reach a Python backend."""
    return HOST_TENSOR(*args, **kwargs).to(device)


@cache
def _inference_mode(mode: Any = True) -> Any:
    """Replace `torch.inference_mode`, as a decorator or a context."""
    if callable(mode):
        return torch.no_grad()(mode)
    return torch.no_grad() if mode else nullcontext()


def register() -> FakeModule:
    """Register the device with PyTorch, for the rest of this process, and return its module."""
    module = FakeModule()
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=module)
    anything = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    anything.fallback(torch.library.fallthrough_kernel)
    aten = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    # Operations without a tensor of the device, such as `torch.empty(2, device="fakegpu")`.
    creating = torch.library.Library("_", "IMPL", "PrivateUse1")
    creating.fallback(lambda operation, *args, **kwargs: _compute(operation, args, kwargs))
    torch.tensor = tensor  # type: ignore[assignment]
    torch.arange = arange  # type: ignore[assignment]
    # Wrapper tensors cannot be created in inference mode.
    torch.inference_mode = _inference_mode  # type: ignore[assignment,misc]
    for name in CAST:
        aten.impl(name, _casting(getattr(torch.ops.aten, name)))
    module.libraries = (anything, aten, creating)  # type: ignore[attr-defined] - they last as long as this
    return module
