"""Reading NumPy's files without running anything that they hold.

Arrays of Python objects are stored as pickles, and unpickling runs whatever the file names. Here
the few names that describe arrays stand for small functions that check what they are given; plain
containers, numbers and text are data anyway; every other name is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gim_hloc.errors import InputError

_MAGIC_NPY = b"\x93NUMPY"
_MAGIC_ZIP = b"PK\x03\x04"
_TYPE = re.compile(r"[<>|=]?(\?|[biufc]\d{1,2}|O\d?|[SUV]\d{1,9}|[mM]8(\[\w{1,4}\])?)")
_MAX_DEPTH = 100  # of containers inside containers


class _UnreadableError(Exception):
    """Message for people, without the path."""


def read_npz(path: Path | str) -> dict[str, np.ndarray]:
    """Read all arrays of an ``.npz`` file; the one array of an ``.npy`` file has the name ``""``.

    Args:
        path: the file. Arrays of objects may hold numbers, text, ``None``, arrays and containers of
            these, pickled by Python 2 or 3 and any NumPy.

    Returns:
        Name -> array, in the order of the file. A pickled object that is no array is an array of
        objects with no dimensions, as ``numpy.load`` gives it.

    Raises:
        InputError: the file is missing, damaged, or holds objects that are not data.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(6)
            file.seek(0)
            if start == _MAGIC_NPY:
                return {"": _read_array(file)}
            if start[:4] != _MAGIC_ZIP:
                raise _UnreadableError("it is neither .npz nor .npy")
            with zipfile.ZipFile(file) as archive:
                arrays = {}
                for name in archive.namelist():
                    if name.endswith(".npy"):
                        with archive.open(name) as member:
                            arrays[name[: -len(".npy")]] = _read_array(member)
                return arrays
    except FileNotFoundError:
        raise InputError(f"The file {path} does not exist.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}.") from None
    except _UnreadableError as error:
        raise InputError(f"{path} cannot be read: {error}.") from None
    except MemoryError:
        raise InputError(f"{path} claims arrays that do not fit into memory.") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        # RuntimeError: an encrypted archive, and containers nested without end.
        raise InputError(f"{path} is damaged: {error}. Fetch or write it again.") from None


def _read_array(file: Any) -> np.ndarray:
    try:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            # Version 3 only names fields of structured arrays in UTF-8.
            raise _UnreadableError(f"version {version[0]}.{version[1]} of the format is not read")
        shape, fortran, dtype = read_header(file)
        if dtype.hasobject:
            if dtype.fields is not None:
                raise _UnreadableError("it holds a structured array of objects")
            return _unpickle_array(file, shape)
        data = file.read()
        if len(data) < math.prod(shape) * dtype.itemsize:
            raise _UnreadableError("an array is cut off")
        flat = np.frombuffer(data, dtype, count=math.prod(shape))
        return flat.reshape(shape, order="F" if fortran else "C").copy()
    except (ValueError, EOFError, struct.error) as error:
        raise _UnreadableError(f"an array is damaged ({error})") from None


def _unpickle_array(file: BinaryIO, shape: tuple[int, ...]) -> np.ndarray:
    data = io.BytesIO(file.read())
    try:
        value = _plain(_Unpickler(data, encoding="latin1").load())
    except _UnreadableError:
        raise
    except RecursionError:
        raise _UnreadableError("its containers are nested without end") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        raise _UnreadableError(f"its objects are damaged ({error})") from None
    if isinstance(value, np.ndarray) and value.shape == tuple(shape):
        return value
    if shape == ():
        boxed = np.empty((), dtype=object)
        boxed[()] = value
        return boxed
    raise _UnreadableError("an array of objects does not have the shape that the file states")


class _Allowed:
    """What a name in a pickle stands for; cannot be changed by the pickle."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise _UnreadableError("it sets the state of a name")


class _Type:
    """A pickled ``numpy.dtype``."""

    __slots__ = ("order", "text")

    def __init__(self, text: Any, *_: Any) -> None:
        text = text.decode("latin1") if isinstance(text, bytes) else text
        if not isinstance(text, str) or not _TYPE.fullmatch(text):
            raise _UnreadableError(f"it holds an array of type {text!r:.40}")
        self.text = text
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or any(s is not None for s in state[2:5]):
            raise _UnreadableError("it holds a structured array among its objects")
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "=", "|"):
            raise _UnreadableError("the byte order of an array is unknown")
        self.order = order

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.text).newbyteorder(self.order)  # type: ignore[arg-type]


class _Array:
    """A pickled ``numpy.ndarray``, empty until its state is set."""

    __slots__ = ("state",)

    def __init__(self, *_: Any) -> None:
        self.state: tuple[tuple[int, ...], _Type, bool, Any] | None = None

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise _UnreadableError("the state of an array is malformed")
        shape, kind, fortran, data = state[-4:]
        sizes = isinstance(shape, tuple) and all(isinstance(n, int) and n >= 0 for n in shape)
        if not sizes or len(shape) > 32 or not isinstance(kind, _Type):
            raise _UnreadableError("the state of an array is malformed")
        self.state = shape, kind, bool(fortran), data


def _scalar(kind: Any, data: Any = b"") -> Any:
    if not isinstance(kind, _Type) or kind.dtype.hasobject:
        raise _UnreadableError("a number is malformed")
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, kind.dtype, count=1)[0]


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise _UnreadableError("its text is malformed")
    return text.encode(encoding)


_NUMPY: dict[str, Callable[..., Any]] = {
    "_reconstruct": _Array,
    "ndarray": _Array,
    "scalar": _scalar,
    "dtype": _Type,
}
_NUMPY_MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
_PLAIN: dict[str, Callable[..., Any]] = {
    "set": set,
    "frozenset": frozenset,
    "list": list,
    "tuple": tuple,
    "dict": dict,
    "complex": complex,
    "bytearray": bytearray,
    "bytes": bytes,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _NUMPY_MODULES and name in _NUMPY:
            return _Allowed(_NUMPY[name])
        if module in ("builtins", "__builtin__") and name in _PLAIN:
            return _Allowed(_PLAIN[name])
        if (module, name) == ("_codecs", "encode"):
            return _Allowed(_encode)
        if (module, name) == ("collections", "OrderedDict"):
            return _Allowed(dict)
        raise _UnreadableError(
            f"it holds objects of {module}.{name}, which are not read because reading them would "
            "run code"
        )


def _plain(value: Any, depth: int = 0) -> Any:
    """The value with arrays in place of their descriptions."""
    if depth > _MAX_DEPTH:
        raise _UnreadableError("its containers are nested without end")
    if isinstance(value, _Array):
        return _build(value, depth)
    if isinstance(value, _Type):
        return value.dtype
    if isinstance(value, _Allowed):
        raise _UnreadableError("it holds a name that is no data")
    if isinstance(value, dict):
        return {_plain(k, depth + 1): _plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value)(_plain(v, depth + 1) for v in value)
    return value


def _build(array: _Array, depth: int) -> np.ndarray:
    if array.state is None:
        raise _UnreadableError("an array has no content")
    shape, kind, fortran, data = array.state
    dtype = kind.dtype
    count = math.prod(shape)
    order = "F" if fortran else "C"
    if dtype.hasobject:
        if not isinstance(data, list) or len(data) != count:
            raise _UnreadableError("the content of an array does not fit its shape")
        flat = np.empty(count, dtype=object)
        for k, item in enumerate(data):
            flat[k] = _plain(item, depth + 1)
        return flat.reshape(shape, order=order)  # type: ignore[call-overload]
    raw = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(raw, (bytes, bytearray)) or len(raw) != count * dtype.itemsize:
        raise _UnreadableError("the content of an array does not fit its shape")
    flat = np.frombuffer(bytes(raw), dtype, count=count)
    return flat.reshape(shape, order=order).copy()  # type: ignore[call-overload]
