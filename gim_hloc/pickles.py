"""Reading files of torch.save, safetensors and NumPy without running anything that they hold.

A pickle calls whatever it names. The unpickler here looks names up in a table of a few functions
that make arrays, calls nothing else, and lets anything else stand for itself as `Foreign`.
Arrays never have more numbers than the file has bytes for.
"""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import pickle
import re
import struct
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

import numpy as np

from gim_hloc.errors import InputError

_CHECKPOINT_PICKLE = 256 << 20  # bytes; beyond it a pickle is no description of weights
_ITEMS = 10_000_000  # of containers, and ten times the bytes of their pickle
_UNPACKED = 1 << 30  # bytes of a compressed array that are unpacked whatever the ratio
_RATIO = 100  # of compression beyond that


class UnreadableError(Exception):
    """The file is damaged or not what it should be; the message is for people, without the path."""


class Foreign:
    """An object of a class that is no data. It swallows what the pickle puts into it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def _swallow(self, *_: Any) -> None: ...

    __setitem__ = append = extend = add = _swallow


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Calls only functions of ``known``, and only with what those check themselves."""

    stack: list[Any]
    append: Callable[[Any], None]
    known: ClassVar[Mapping[str, Any]] = {}
    # Without opcodes that reach what other code registered, or that reserve memory for lies.
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code: function
        for code, function in pickle._Unpickler.dispatch.items()  # type: ignore[attr-defined]
        if code
        not in (
            *pickle.EXT1 + pickle.EXT2 + pickle.EXT4 + pickle.PERSID,
            *pickle.BYTEARRAY8 + pickle.NEXT_BUFFER + pickle.READONLY_BUFFER,
        )
    }

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        return self.known.get(full, Foreign(full))

    def _call(self, function: Any, arguments: Any) -> Any:
        # Functions can only come from the table: no opcode makes one.
        if isinstance(function, types.FunctionType):
            return function(*arguments)
        return Foreign(getattr(function, "name", type(function).__name__))

    def _instantiate(self, klass: Any, args: Any) -> None:  # INST and OBJ
        self.append(self._call(klass, args))

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def load_newobj_ex(self) -> None:
        self.stack.pop()
        self.load_reduce()

    def load_build(self) -> None:
        """Drop the state: attributes of dictionaries, parameters and foreign objects."""
        self.stack.pop()

    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
    }


def _told(error: Exception) -> str:
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def _natural(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 62 for value in values)


# -------------------------------------------------------------------------------------- checkpoints


def text_instead(start: bytes) -> str | None:
    """What a file's first bytes are when a server sent a message instead of weights, or None."""
    begin = start.lstrip(b"\xef\xbb\xbf \t\r\n")[:64].lower()
    if begin.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")):
        return "it is a web page, not weights"
    if begin.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself"
    return None


def read_checkpoint(path: Path) -> Any:
    """Read a file of torch.save or of safetensors; told apart by content.

    Returns:
        What was saved, with `Foreign` in place of objects that are no tensors, numbers, text or
        plain containers. Tensors of zip archives are mapped, not copied.

    Raises:
        OSError: the file cannot be opened.
        UnreadableError: anything else that is wrong with it.
    """
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise UnreadableError("the file is empty")
    if not any(start):
        raise UnreadableError("it begins with zeros, as a copy that was cut off")
    if text := text_instead(start):
        raise UnreadableError(text)
    try:
        if start.startswith(b"PK\x03\x04"):
            return _read_archive(path)
        if start[8:9] == b"{":
            from safetensors.torch import load_file

            return load_file(path)
        if start[:1] == b"\x80":
            return _read_stream(path)
    except (UnreadableError, OSError):
        raise
    except Exception as error:  # a damaged file can fail in any way
        raise UnreadableError(f"it is damaged or cut off ({_told(error)})") from error
    raise UnreadableError("it is neither a file of torch.save nor of safetensors")


def _read_archive(path: Path) -> Any:
    """The format of torch >= 1.6: a zip archive, whose storages are mapped.

    Not by ``torch.load``: it runs TorchScript programs, and leaves checksums and sizes alone.
    """
    import torch

    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        members = {member.filename: member for member in archive.infolist()}
        roots = [name[: -len("data.pkl")] for name in members if name.endswith("data.pkl")]
        if len(roots) != 1:
            raise UnreadableError("the archive holds no data.pkl, so it is not of torch.save")
        root = roots[0]
        if f"{root}constants.pkl" in members:
            raise UnreadableError("it is a TorchScript program, not a state dict")
        # torch never compresses: anything else could unfold to any size.
        if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
            raise UnreadableError("the archive is compressed, so it is not of torch.save")
        if members[f"{root}data.pkl"].file_size > _CHECKPOINT_PICKLE:
            raise UnreadableError("its pickle is larger than any description of weights")
        if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
            raise UnreadableError("the bytes of its numbers are in the order of other machines")
        if damaged := archive.testzip():
            raise UnreadableError(f"it is damaged: wrong checksum of {damaged}")
        whole = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)

        def storage(pid: tuple[Any, ...]) -> torch.TypedStorage:
            _, kind, key, _, count = pid
            file.seek(members[f"{root}data/{key}"].header_offset + 26)
            start = sum(struct.unpack("<HH", file.read(4)), file.tell())
            dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
            data = whole[start : start + count * dtype.itemsize]
            return torch.TypedStorage(wrap_storage=data, dtype=dtype, _internal=True)

        sizes = {name.removeprefix(f"{root}data/"): m.file_size for name, m in members.items()}
        unpickler = _checkpoint_unpickler(lambda key: sizes.get(key, 0))(
            io.BytesIO(archive.read(f"{root}data.pkl")), encoding="utf-8"
        )
        unpickler.persistent_load = storage
        return unpickler.load()


def _read_stream(path: Path) -> Any:
    """The format before torch 1.6: pickles, then each storage behind its length."""
    import torch

    size = path.stat().st_size
    unpickler = _checkpoint_unpickler(lambda _: size)
    last: Any = None

    def load(stream: BinaryIO, **arguments: Any) -> Any:  # parts of the stream
        nonlocal last
        last = unpickler(stream, **arguments).load()
        return last

    pickles = types.SimpleNamespace(__name__="pickles", Unpickler=unpickler, load=load)
    with (
        path.open("rb") as file,
        # Reads of a map never reserve more than is there, and a map is no file that torch would
        # take for an archive of 2016.
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream,
    ):
        content = torch.load(
            cast(Any, stream), pickle_module=pickles, weights_only=False, map_location="cpu"
        )
    if not unpickler.asked <= set(last):  # the list of storages that follow
        raise UnreadableError("it lacks storages that it mentions")
    return content


def _checkpoint_unpickler(stored: Callable[[str], int]) -> Any:
    """An unpickler of tensors; ``stored`` gives the bytes of a storage in the file, or a bound."""
    import torch
    from torch.serialization import StorageType

    class Unpickler(_Unpickler):
        known: ClassVar = _checkpoint_names()
        asked: ClassVar[set[str]] = set()

        def find_class(self, module: str, name: str) -> Any:
            if name == "UntypedStorage":
                return torch.UntypedStorage
            with contextlib.suppress(KeyError):
                return StorageType(name)
            return super().find_class(module, name)

        def load_binpersid(self) -> None:
            pid = self.stack.pop()
            if not isinstance(pid, tuple) or len(pid) not in (5, 6) or any(pid[5:]):
                raise UnreadableError("it describes a storage in an unknown way")
            _, kind, key, _, count = pid[:5]
            each = 1 if kind is torch.UntypedStorage else kind.dtype.itemsize
            if type(key) is not str or not _natural(count) or count * each > stored(key):
                raise UnreadableError(f"its storage {str(key)[:40]} claims more than is there")
            self.asked.add(key)
            self.append(self.persistent_load(("storage", *pid[1:])))

        dispatch: ClassVar = {**_Unpickler.dispatch, pickle.BINPERSID[0]: load_binpersid}

    return Unpickler


def _checkpoint_names() -> dict[str, Any]:
    import torch

    def tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
        return view(storage, storage.dtype, offset, size, stride)

    def tensor_of_dtype(
        storage: Any, offset: Any, size: Any, stride: Any, _: Any, __: Any, dtype: Any, *___: Any
    ) -> torch.Tensor:
        return view(storage, dtype, offset, size, stride)

    def view(storage: Any, dtype: Any, offset: Any, size: Any, stride: Any) -> torch.Tensor:
        """As ``torch._utils._rebuild_tensor``, which lets a storage grow to what is claimed."""
        data = storage._untyped_storage
        if len(size) != len(stride) or not _natural(offset, *size, *stride):
            raise UnreadableError("the description of a tensor is damaged")
        if 0 in size:
            return torch.empty(size, dtype=dtype)
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if (last + 1) * dtype.itemsize > data.nbytes():
            raise UnreadableError("a tensor claims more than its storage has")
        return torch.empty(0, dtype=dtype).set_(data, offset, size, stride)

    def first(data: Any, *_: Any) -> Any:
        return data

    def of_subclass(function: Any, _: Any, arguments: Any, *__: Any) -> Any:
        return function(*arguments) if function in (tensor, tensor_of_dtype) else Foreign("tensor")

    return {
        "torch._utils._rebuild_tensor": tensor,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_tensor_v3": tensor_of_dtype,
        "torch._utils._rebuild_parameter": first,
        "torch._utils._rebuild_parameter_with_state": first,
        "torch._tensor._rebuild_from_type_v2": of_subclass,
        "collections.OrderedDict": _ordered,
        **{str(v): v for v in vars(torch).values() if isinstance(v, torch.dtype)},
    }


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    return dict(pairs)  # Python 2 wrote an OrderedDict as a list of its pairs


# -------------------------------------------------------------------------------------------- NumPy


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
            if start == b"\x93NUMPY":
                return {"": _read_array(file, path.stat().st_size)}
            if start[:4] != b"PK\x03\x04":
                raise UnreadableError("it is neither .npz nor .npy")
            arrays = {}
            with zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    if member.filename.endswith(".npy"):
                        if member.file_size > max(_UNPACKED, _RATIO * member.compress_size):
                            raise UnreadableError(
                                f"{member.filename} would unpack to {member.file_size:,} bytes"
                            )
                        with archive.open(member) as stream:
                            name = member.filename.removesuffix(".npy")
                            arrays[name] = _read_array(stream, member.file_size)
            return arrays
    except FileNotFoundError:
        raise InputError(f"The file {path} does not exist.") from None
    except (OSError, UnreadableError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from None
    except Exception as error:  # a damaged file can fail in any way
        raise InputError(f"{path} is damaged ({_told(error)}). Fetch or write it again.") from None


def _read_array(file: Any, size: int) -> np.ndarray:
    """Read one array from a stream of ``size`` bytes."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:  # version 3 only names fields of structured arrays in UTF-8
        raise UnreadableError(f"version {version[0]}.{version[1]} of the format is not read")
    # An object takes a byte of its pickle at least.
    each = 1 if dtype.hasobject else max(dtype.itemsize, 1)
    if not _natural(*shape) or math.prod(shape) * each > size:
        raise UnreadableError(f"an array of shape {shape!s:.60} is cut off")
    if not dtype.hasobject:
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)
    if dtype.fields is not None:
        raise UnreadableError("it holds a structured array of objects")
    value = _ObjectUnpickler(file, encoding="latin1").load()
    _check_tree(value, size)
    if isinstance(value, np.ndarray) and value.shape == shape:
        return value
    if shape == ():
        boxed = np.empty((), dtype=object)
        boxed[()] = value
        return boxed
    raise UnreadableError("an array of objects does not have the shape that the file states")


def _check_tree(value: Any, size: int) -> None:
    """Refuse what is far larger than its pickle: containers that hold others again and again."""
    left, todo = _ITEMS + 10 * size, [value]
    while todo:
        item = todo.pop()
        if isinstance(item, (Foreign, types.FunctionType)):
            raise UnreadableError("it holds a name that is no data")
        if isinstance(item, dict):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            todo += item
        elif isinstance(item, np.ndarray) and item.dtype.hasobject:
            todo += item.ravel().tolist()
        left -= 1
        if len(todo) > left:
            raise UnreadableError("its containers hold one another again and again")


_TYPE = re.compile(r"[<>|=]?(\?|[biufc]\d{1,2}|O\d?|[SUV]\d{1,9})")


def _dtype(text: Any, *_: Any) -> np.dtype[Any]:
    text = text.decode("latin1") if isinstance(text, bytes) else text
    if not isinstance(text, str) or not _TYPE.fullmatch(text):
        raise UnreadableError(f"it holds an array of type {text!r:.40}")
    return np.dtype("O") if "O" in text else np.dtype(text, copy=True)


def _new_array(*_: Any) -> np.ndarray:
    return np.empty(0)


def _scalar(dtype: Any, data: Any = b"") -> Any:
    raw = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(dtype, np.dtype) or dtype.hasobject or len(raw) != dtype.itemsize:
        raise UnreadableError("a number is malformed")
    return np.frombuffer(raw, dtype)[0]


def _encode(text: str, encoding: Any = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise UnreadableError("its text is malformed")
    return text.encode(encoding)


def _bytes() -> bytes:
    return b""


def _complex(real: float, imaginary: float) -> complex:
    return complex(real, imaginary)


def _set(items: Any = ()) -> set[Any]:
    return set(items)


def _frozenset(items: Any = ()) -> frozenset[Any]:
    return frozenset(items)


class _ObjectUnpickler(_Unpickler):
    """Arrays and scalars of NumPy as well; any other name is refused."""

    known: ClassVar = {
        "numpy.ndarray": _new_array,
        "numpy.dtype": _dtype,
        "_codecs.encode": _encode,
        "collections.OrderedDict": _ordered,
        **{
            f"{module}.{name}": function
            for module in ("numpy.core.multiarray", "numpy._core.multiarray")
            for name, function in (("_reconstruct", _new_array), ("scalar", _scalar))
        },
        **{
            f"{module}.{name}": function
            for module in ("builtins", "__builtin__")
            for name, function in (
                ("bytes", _bytes),
                ("complex", _complex),
                ("set", _set),
                ("frozenset", _frozenset),
            )
        },
    }

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.known:
            raise UnreadableError(
                f"it holds objects of {module}.{name}, which are not read because reading them "
                "would run code"
            )
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Fill an array or set the byte order of a type, with nothing else that a state can say."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, np.dtype) and not target.hasobject:
            order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
            if any(part is not None for part in state[2:5]) or len(state) > 8:
                raise UnreadableError("it holds a structured array among its objects")
            sizes = (target.itemsize, target.alignment) if target.kind in "SUV" else (-1, -1)
            cast(Any, target).__setstate__((3, order, None, None, None, *sizes, 0))
        elif isinstance(target, np.ndarray):
            shape, dtype, fortran, data = state[-4:]
            if isinstance(data, str):
                data = data.encode("latin1")
            items = math.prod(shape) * (1 if dtype.hasobject else dtype.itemsize)
            container = list if dtype.hasobject else bytes
            if not _natural(*shape) or not isinstance(data, container) or len(data) != items:
                raise UnreadableError("the content of an array does not fit its shape")
            cast(Any, target).__setstate__((1, shape, dtype, bool(fortran), data))

    dispatch: ClassVar = {**_Unpickler.dispatch, pickle.BUILD[0]: load_build}
