"""A pretended CUDA device: what would fail on a GPU fails here, on a processor.

``with FakeCuda() as gpu:`` makes ``torch.device("cuda")`` usable. Its tensors live in main memory
and are computed there, but they say that they are on ``cuda:0``, and every function that CUDA would
refuse raises what CUDA raises:

* operands on different devices (tensors of no dimension excepted, where CUDA excepts them);
* ``numpy()``, random generators of the other device, pinning what is no host memory;
* linear algebra in half precision, products of integer matrices.

``torch.autocast("cuda")`` follows CUDA's lists of functions, which are not those of a processor.
``gpu.synchronisations`` counts by name where the processor would wait for the device.
``gpu.limit`` bytes of tensors may exist at a time; beyond, ``torch.OutOfMemoryError`` is raised.

What it cannot show: kernels that do not exist, races of streams, speed, and what happens inside
PyTorch's own C++ functions. Functions are checked where Python calls them.

PyTorch's own code in Python must not hide the calls inside it, so that its checks for
``__torch_function__`` are switched off while the device exists; only functions written in C++ come
here.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda", 0)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# CUDA's autocast lists (aten/src/ATen/autocast_mode.h), by the names that Python calls; these and
# the lists below hold what our code calls.
_PRODUCTS = _words("matmul mm mv bmm addmm baddbmm linear einsum")
_LOWER = _PRODUCTS | _words("conv1d conv2d conv_transpose2d prelu scaled_dot_product_attention")
_FLOAT = _words(
    """
    exp expm1 log log2 log1p reciprocal rsqrt tan pow softplus layer_norm group_norm norm
    l1_loss smooth_l1_loss mse_loss binary_cross_entropy_with_logits cdist logsumexp
    upsample_nearest2d upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d
    prod softmax log_softmax cumsum linalg_vector_norm sum
    """
)
_PROMOTE = _words("atan2 cross grid_sampler tensordot")
_LINALG = _words(
    "cholesky cholesky_ex cholesky_solve inv solve lstsq svd qr eigh eigvalsh det cdist"
)
_LINALG_WAITS = _words("linalg_cholesky linalg_inv linalg_solve linalg_eigh linalg_svd")
# Functions that take no operand of another device, not even without dimensions.
_STRICT = _LOWER | _words(
    "cat stack hstack vstack gather index_select scatter scatter_reduce index_add cdist"
)
_WAITS = _words(
    """
    item tolist __bool__ __int__ __float__ __index__ nonzero argwhere masked_select _unique2
    unique_dim equal allclose bincount
    """
)


class CudaTensor(torch.Tensor):
    """A tensor that says it is on the device. Data are in main memory."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _call(func, args, kwargs or {})


class CudaParameter(CudaTensor, torch.nn.Parameter):
    """The same for parameters."""


class CudaGenerator(torch.Generator):
    """A random generator of the device."""

    def __new__(cls) -> CudaGenerator:
        return super().__new__(cls, "cpu")

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE


class FakeCuda(TorchFunctionMode):
    """The device, while the context lasts.

    Attributes:
        synchronisations: how often the processor would have waited, by function.
        limit: bytes that may be in use; None for no limit.
        events: "empty_cache" and "out of memory", in order.
        held: bytes in use whenever ``torch.cuda.empty_cache`` was called.
    """

    current: FakeCuda | None = None

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self.limit = limit
        self.synchronisations: Counter[str] = Counter()
        self.events: list[str] = []
        self.held: list[int] = []
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._patches = contextlib.ExitStack()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    def __enter__(self) -> FakeCuda:
        assert FakeCuda.current is None, "there is one device"
        FakeCuda.current = self
        for target, name, value in _patches(self):
            self._patches.enter_context(mock.patch.object(target, name, value))
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._patches.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()
        FakeCuda.current = None

    def waited(self, name: str) -> None:
        """Count a synchronisation."""
        self.synchronisations[name] += 1

    @contextlib.contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """Synchronisations within a block."""
        before = Counter(self.synchronisations)
        found: Counter[str] = Counter()
        yield found
        found.update(self.synchronisations - before)

    def allocated(self) -> int:
        """Bytes of the tensors that Python holds."""
        sizes = {}
        for key, reference in list(self._alive.items()):
            tensor = reference()
            if tensor is None:
                del self._alive[key]
            else:
                with torch._C.DisableTorchFunction():
                    storage = tensor.untyped_storage()
                    sizes[storage.data_ptr()] = storage.nbytes()
        return sum(sizes.values())

    def register(self, tensor: torch.Tensor) -> None:
        """Account for a new tensor.

        Raises:
            torch.OutOfMemoryError: there is no room for it.
        """
        self._alive[id(tensor)] = weakref.ref(tensor)
        if self.limit is not None and self.allocated() > self.limit:
            del self._alive[id(tensor)]
            self.events.append("out of memory")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate (pretended).")


def is_cuda(value: Any) -> bool:
    """Whether a value is a tensor of the device."""
    return isinstance(value, CudaTensor)


def tag(value: Any) -> Any:
    """Say of tensors, or containers of them, that they are on the device."""
    if isinstance(value, torch.Tensor):
        if not isinstance(value, CudaTensor):
            parameter = isinstance(value, torch.nn.Parameter)
            value.__class__ = CudaParameter if parameter else CudaTensor
            if FakeCuda.current is not None:
                FakeCuda.current.register(value)
        return value
    if isinstance(value, (tuple, list)):
        for part in value:
            tag(part)
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)


def _on(device: Any) -> bool:
    """Whether a device argument means the pretended device."""
    return torch.device(device).type == "cuda"


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _mixed(name: str) -> RuntimeError:
    return RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, "
        f"cuda:0 and cpu! (pretended, in {name})"
    )


def _waited(name: str) -> None:
    if FakeCuda.current is not None:
        FakeCuda.current.waited(name)


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", str(func))
    owner = getattr(func, "__self__", None)
    if name == "__get__":
        return _property(getattr(owner, "__name__", ""), func, args)
    if name == "__set__":
        return _set(getattr(owner, "__name__", ""), func, args)
    special = _SPECIAL.get(name)
    if special is not None:
        return special(func, args, kwargs)
    tensors = [*_tensors(args), *_tensors(kwargs)]
    device = kwargs.get("device")
    if device is not None:
        here = _on(device)
        if here:
            kwargs = {**kwargs, "device": "cpu"}
        _check_generator(kwargs.get("generator"), here)
        result = _run(func, args, kwargs)
        if any(result is t for t in tensors):  # as_tensor
            result = result.clone() if not is_cuda(result) and here else result
        return tag(result) if here else result
    if not any(is_cuda(t) for t in tensors):
        if not tensors or name.startswith(("rand", "multinomial", "bernoulli", "normal")):
            _check_generator(kwargs.get("generator"), False)
        return _run(func, args, kwargs)
    if name not in _METADATA:
        _check_devices(name, tensors)
    _check_generator(kwargs.get("generator"), True)
    if name in _WAITS or name in _LINALG_WAITS:
        _waited(name)
    args, kwargs = _autocast(name, args, kwargs)
    _check_types(name, [*_tensors(args), *_tensors(kwargs)])
    return tag(_compute(name, func, args, kwargs))


def _compute(name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Products of half precision sum in float32, as on a GPU; a processor takes ages over them."""
    half = (torch.float16, torch.bfloat16)
    tensors = [*_tensors(args), *_tensors(kwargs)]
    with torch._C.DisableTorchFunction():
        types = {t.dtype for t in tensors if t.is_floating_point()}
    if name.strip("_") not in _LOWER or len(types) != 1 or types.isdisjoint(half):
        return _run(func, args, kwargs)

    def wide(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            with torch._C.DisableTorchFunction():
                return value.float() if value.is_floating_point() else value
        if isinstance(value, (tuple, list)):
            return type(value)(wide(v) for v in value)
        return value

    result = _run(func, wide(args), {key: wide(value) for key, value in kwargs.items()})
    with torch._C.DisableTorchFunction():
        return result.to(types.pop())


_METADATA = _words("_has_compatible_shallow_copy_type view_as expand_as reshape_as")


def _check_generator(generator: Any, here: bool) -> None:
    if generator is not None and isinstance(generator, CudaGenerator) != here:
        wanted, found = ("cuda", "cpu") if here else ("cpu", "cuda")
        raise RuntimeError(
            f"Expected a '{wanted}' device type for generator but found '{found}' (pretended)"
        )


def _check_devices(name: str, tensors: list[torch.Tensor]) -> None:
    others = [t for t in tensors if not is_cuda(t)]
    if not others:
        return
    with torch._C.DisableTorchFunction():
        dims = [t.dim() for t in others]
        here = max(t.dim() for t in tensors if is_cuda(t))
    if any(dims) or name.rstrip("_") in _STRICT or name in _STRICT:
        raise _mixed(name)
    inplace = name.endswith("_") and not name.endswith("__")
    if here == 0 and inplace and not is_cuda(tensors[0]):
        raise _mixed(name)


def _check_types(name: str, tensors: list[torch.Tensor]) -> None:
    with torch._C.DisableTorchFunction():
        types = {t.dtype for t in tensors}
    plain = name.strip("_").removeprefix("linalg_")
    if (plain in _LINALG or name in _LINALG) and types & {torch.float16, torch.bfloat16}:
        raise RuntimeError(f"\"{name}\" not implemented for 'Half' (pretended)")
    integers = {t for t in types if not t.is_floating_point and not t.is_complex}
    if plain in _PRODUCTS and integers:
        raise RuntimeError(f'"{name}_cuda" not implemented for {integers} (pretended)')


def _autocast(name: str, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if not torch.is_autocast_enabled("cuda"):
        return args, kwargs
    plain = name if name.startswith("_upsample") else name.strip("_")
    if plain in _LOWER:
        dtype: torch.dtype = torch.get_autocast_dtype("cuda")
    elif plain in _FLOAT:
        dtype = torch.float32
    elif plain in _PROMOTE:
        with torch._C.DisableTorchFunction():
            types = {t.dtype for t in _tensors((args, kwargs)) if t.is_floating_point()}
        dtype = torch.float32 if torch.float32 in types else torch.get_autocast_dtype("cuda")
    elif plain == "binary_cross_entropy":
        raise RuntimeError("binary_cross_entropy is unsafe to autocast (pretended)")
    else:
        return args, kwargs
    if name.endswith("_") and not name.endswith("__"):
        return args, kwargs  # in place: the operand keeps its type

    def cast(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            with torch._C.DisableTorchFunction():
                eligible = value.is_floating_point() and value.dtype != torch.float64
                needed = eligible and value.dtype != dtype
            if not (is_cuda(value) and needed):
                return value
            return tag(_run(torch.Tensor.to, (value, dtype), {}))
        if isinstance(value, (tuple, list)):
            parts = [cast(v) for v in value]
            return tuple(parts) if type(value) is tuple else parts
        return value

    with torch.autocast("cuda", enabled=False):
        return cast(args), {key: cast(value) for key, value in kwargs.items()}


def _property(name: str, func: Any, args: Any) -> Any:
    (tensor,) = args
    if not is_cuda(tensor):
        return _run(func, args, {})
    if name == "device":
        return DEVICE
    if name in ("is_cuda", "is_cpu"):
        return name == "is_cuda"
    return tag(_run(func, args, {}))


def _set(name: str, func: Any, args: Any) -> Any:
    tensor, value = args
    elsewhere = isinstance(value, torch.Tensor) and is_cuda(value) != is_cuda(tensor)
    if name == "grad" and elsewhere:
        raise RuntimeError("assigned grad has data located on a different device (pretended)")
    return _run(func, args, {})


def _numpy(func: Any, args: Any, kwargs: Any) -> Any:
    if is_cuda(args[0]):
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first. (pretended)"
        )
    return _run(func, args, kwargs)


def _to(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, *rest = args
    options = {key: value for key, value in kwargs.items() if value is not None}
    here = is_cuda(tensor)
    names = ["non_blocking", "copy"]
    first = rest.pop(0) if rest else options.pop("device", options.pop("other", None))
    if isinstance(first, torch.Tensor):
        here = is_cuda(first)
        with torch._C.DisableTorchFunction():
            options["dtype"] = first.dtype
    elif isinstance(first, torch.dtype):
        options["dtype"] = first
    elif first is not None:
        here = _on(first)
    if rest and not isinstance(first, (torch.Tensor, torch.dtype)):
        names.insert(0, "dtype")
    options |= {key: value for key, value in zip(names, rest, strict=False) if value is not None}
    return _move(tensor, here, options)


def _move(tensor: torch.Tensor, here: bool, options: dict[str, Any]) -> Any:
    there = is_cuda(tensor)
    if there and not here:
        _waited("cpu")
    options = {key: value for key, value in options.items() if key != "non_blocking"}
    result = _run(torch.Tensor.to, (tensor, "cpu"), options)
    if result is tensor and here != there:
        result = _run(torch.clone, (result,), {})
    return tag(result) if here else result


def _cpu(func: Any, args: Any, kwargs: Any) -> Any:
    return _move(args[0], False, {})


def _pin(func: Any, args: Any, kwargs: Any) -> Any:
    if is_cuda(args[0]):
        raise RuntimeError(
            "cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned"
        )
    return _run(torch.clone, args, {})


def _copy(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, source = args[0], kwargs.get("src", args[1] if len(args) > 1 else None)
    if is_cuda(source) and not is_cuda(tensor):
        _waited("copy_")
    return _run(func, args, kwargs)


def _masks(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    with torch._C.DisableTorchFunction():
        return any(
            isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8)
            for part in parts
        )


def _get_item(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, index = args
    if not is_cuda(tensor):
        if any(is_cuda(t) for t in _tensors(index)):
            with torch._C.DisableTorchFunction():
                scalars = all(t.dim() == 0 for t in _tensors(index))
            if not scalars:
                raise RuntimeError(
                    "indices should be either on cpu or on the same device as the indexed tensor "
                    "(cpu) (pretended)"
                )
            _waited("__index__")
        return _run(func, args, kwargs)
    if _masks(index):
        _waited("mask")
    return tag(_run(func, args, kwargs))


def _set_item(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, index, value = args
    indices = list(_tensors(index))
    with torch._C.DisableTorchFunction():
        indexed = any(t.dim() for t in indices)
        whole = isinstance(value, torch.Tensor) and value.dim() > 0
    if not is_cuda(tensor) and any(is_cuda(t) for t in indices) and indexed:
        raise RuntimeError("indices should be on cpu (pretended)")
    if isinstance(value, torch.Tensor) and is_cuda(value) != is_cuda(tensor):
        if indexed and (whole or not is_cuda(tensor)):
            raise _mixed("__setitem__")
        if is_cuda(value):
            _waited("copy_")
    if is_cuda(tensor) and _masks(index) and whole:
        _waited("mask")
    if indexed and isinstance(value, torch.Tensor):
        with torch._C.DisableTorchFunction():
            if value.dtype != tensor.dtype:
                raise RuntimeError(
                    "Index put requires the source and destination dtypes match (pretended)"
                )
    return _run(func, args, kwargs)


def _where(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = [*_tensors(args), *_tensors(kwargs)]
    if any(is_cuda(t) for t in tensors):
        _check_devices("where", tensors)
        if len(args) == 1:
            _waited("nonzero")
        return tag(_run(func, args, kwargs))
    return _run(func, args, kwargs)


_SPECIAL: dict[str, Callable[..., Any]] = {
    "numpy": _numpy,
    "__array__": _numpy,
    "__dlpack__": _numpy,
    "to": _to,
    "cpu": _cpu,
    "pin_memory": _pin,
    "copy_": _copy,
    "__getitem__": _get_item,
    "__setitem__": _set_item,
    "where": _where,
}


def _no(*_: Any, **__: Any) -> bool:
    return False


def _patches(gpu: FakeCuda) -> Iterator[tuple[Any, str, Any]]:
    for module in (torch.nn.functional, torch.functional, torch._tensor, torch.autograd):
        for name in (
            "has_torch_function",
            "has_torch_function_unary",
            "has_torch_function_variadic",
        ):
            if hasattr(module, name):
                yield module, name, _no

    yield torch, "Generator", _Generator
    # Whether recomputed tensors look like the first ones is asked inside and outside of C++.
    checks = dict.fromkeys(
        torch.utils.checkpoint._allowed_determinism_checks_to_fns, lambda x: (x.shape, x.dtype)
    )
    yield torch.utils.checkpoint, "_allowed_determinism_checks_to_fns", checks

    def empty_cache() -> None:
        gpu.events.append("empty_cache")
        gpu.held.append(gpu.allocated())

    total = 16 << 30
    answers: dict[str, Any] = {
        "is_available": True,
        "is_bf16_supported": True,
        "memory_allocated": 1 << 20,
        "memory_reserved": 1 << 20,
        "manual_seed_all": None,
    }
    for name, value in answers.items():
        yield torch.cuda, name, lambda *_, _value=value, **__: _value
    yield (
        torch.cuda,
        "mem_get_info",
        lambda *_: ((gpu.limit or total) - (gpu.allocated() if gpu.limit else 0), total),
    )
    yield torch.cuda, "empty_cache", empty_cache


class _AnyGenerator(type):
    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        return CudaGenerator() if _on(device) else torch._C.Generator(device)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, torch._C.Generator)


class _Generator(metaclass=_AnyGenerator):
    """``torch.Generator`` while the device exists."""
