"""Reading weight files without running anything that they hold.

A file of ``torch.save`` is a pickle, and unpickling runs whatever the file names. The reader here
walks through the pickle with *names standing for themselves*: the few functions that describe
tensors become descriptions, dictionaries become dictionaries, and every other name becomes a
placeholder that swallows its arguments. Training checkpoints that carry configurations, callbacks
or optimisers of packages that are not installed are therefore read like any other, and a file made
to do harm does nothing. Tensors are made at the end, only those that were asked for, after their
sizes were compared with the bytes that are really there.

Formats: the zip archives of torch >= 1.6, the stream of older versions, and safetensors.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import pickle
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

if TYPE_CHECKING:
    import torch

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a stream, ``torch.serialization``
_LEGACY_PROTOCOL = 1001
_MAX_HEADER = 100 << 20  # bytes of a safetensors header, the format's own limit
_MAX_PICKLE = 1 << 30  # bytes; beyond it a pickle is no description of weights
_CHUNK = 16 << 20  # bytes read at once
_MAX_DIMENSIONS = 64

# Names of torch types by the names of storages and of safetensors.
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
_SAFETENSORS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "complex64": 8,
    "complex128": 16,
    # Numbers without a storage of their own, named by ``_rebuild_tensor_v3``.
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}


class UnreadableError(Exception):
    """The file is damaged, or no file of weights. The message is for people, without the path."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as the file describes it; nothing of it has been checked or read."""

    storage: Storage
    dtype: str
    offset: Any
    size: Any
    stride: Any

    def __setstate__(self, state: Any = None) -> None: ...


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file: its key, the type of its numbers, and how many it claims."""

    key: str
    dtype: str
    count: Any

    def __setstate__(self, state: Any = None) -> None: ...


def read(path: Path, inside: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Read a state dict.

    Args:
        path: a file of ``torch.save`` or of safetensors; told apart by content.
        inside: keys under one of which the state dict may lie; the first that exists is opened.

    Raises:
        OSError: the file cannot be opened.
        UnreadableError: anything else that is wrong with it.
    """
    with path.open("rb") as file:
        start = file.read(512)
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        if not start:
            raise UnreadableError("the file is empty")
        if not any(start):
            raise UnreadableError("it begins with zeros, as a copy that was cut off")
        if text := text_instead(start):
            raise UnreadableError(text)
        if start.startswith(b"PK\x03\x04"):
            return _read_zip(file, size, inside)
        if start[8:9] == b"{":
            return _read_safetensors(file, size)
        if start[:1] == b"\x80":
            return _read_stream(file, size, inside)
    raise UnreadableError("it is neither a file of torch.save nor of safetensors")


def read_notes(path: Path, key: str) -> dict[str, str]:
    """Texts by name that lie under a key beside the state dict; {} where there are none.

    Args:
        path: a file that ``read`` can read. Only zip archives of ``torch.save`` have notes.
        key: top-level key of what was saved.

    Raises:
        OSError: the file cannot be opened.
        UnreadableError: anything else that is wrong with it.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return {}
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        with _opened_zip(file, size) as archive:
            content = archive.content()
    notes = content.get(key) if isinstance(content, dict) else None
    if not isinstance(notes, dict):
        return {}
    return {k: v for k, v in notes.items() if isinstance(k, str) and isinstance(v, str)}


def text_instead(start: bytes) -> str | None:
    """What a file's first bytes are when a server sent a message instead of weights, or None."""
    begin = start.lstrip(b"\xef\xbb\xbf \t\r\n")[:64].lower()
    if begin.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")):
        return "it is a web page, not weights"
    if begin.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself"
    return None


# ----------------------------------------------------------------------------------------- pickles


class _Inert:
    """Stands for anything that is not a tensor. Takes what a pickle does to it and does nothing."""

    __slots__ = ()
    named = "an object"

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any = None) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def _swallow(self, *args: Any) -> None: ...

    append = extend = add = update = _swallow


class _Dict(dict):
    """A dictionary that a pickle can fill but give no attributes to."""

    __slots__ = ()

    def __init__(self, *args: Any) -> None:
        # Old versions of Python pickle an OrderedDict as a list of its pairs.
        pairs = args[0] if args and isinstance(args[0], list) else []
        super().__init__(
            tuple(pair) for pair in pairs if isinstance(pair, (list, tuple)) and len(pair) == 2
        )

    def __setstate__(self, state: Any = None) -> None: ...


class _Rebuild:
    """One of torch's functions that make tensors: returns a description instead."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any = None) -> None: ...


@dataclass(frozen=True)
class _DType:
    """A name of a number format in a pickle."""

    name: str

    def __setstate__(self, state: Any = None) -> None: ...


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    if not isinstance(storage, Storage):
        return _Inert()
    return TensorEntry(storage, storage.dtype, offset, size, stride)


def _tensor_of_dtype(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Any:
    if not isinstance(storage, Storage) or not isinstance(dtype, _DType):
        return _Inert()
    return TensorEntry(storage, dtype.name, offset, size, stride)


def _first(data: Any = None, *rest: Any) -> Any:
    return data


def _of_subclass(function: Any = None, kind: Any = None, args: Any = (), *rest: Any) -> Any:
    if isinstance(function, _Rebuild) and isinstance(args, tuple):
        return function(*args)
    return _Inert()


_REBUILD: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_subclass,
    ("torch", "Size"): _first,
}
_STORAGE_MODULES = ("torch", "torch.storage", "torch.cuda")


class _Unpickler(pickle.Unpickler):
    """Every name of the pickle resolves to one of the harmless things above."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _REBUILD:
            return _Rebuild(_REBUILD[module, name])
        if module in _STORAGE_MODULES and name.lstrip("_") in _STORAGES:
            return _DType(_STORAGES[name.lstrip("_")])
        if module == "torch" and name in _ITEM_BYTES:
            return _DType(name)
        if (module, name) == ("collections", "OrderedDict"):
            # A class of its own: what a pickle may do to a class ends with the pickle.
            return type("_Dict", (_Dict,), {"__slots__": ()})
        return type("_Inert", (_Inert,), {"__slots__": (), "named": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or not pid:
            raise UnreadableError("a storage is described in an unknown way")
        if pid[0] in ("module", b"module"):  # source code of a class, kept by old versions
            return pid[1] if len(pid) > 1 else _Inert()
        if len(pid) < 5 or not isinstance(pid[1], _DType):
            raise UnreadableError("a storage is described in an unknown way")
        if len(pid) > 5 and pid[5] is not None:
            raise UnreadableError("it holds views of storages, as torch before 0.4 wrote them")
        storage = Storage(str(pid[2]), pid[1].name, pid[4])
        return self.storages.setdefault(storage.key, storage)


class _Bounded(io.RawIOBase):
    """A file whose reads never ask for more than is there: sizes in a file may be lies."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size

    def read(self, count: int | None = -1) -> bytes:
        left = self._size - self._file.tell()
        return self._file.read(left if count is None or count < 0 else min(count, left))

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readline(self, size: int | None = -1) -> bytes:
        return self._file.readline(-1 if size is None else size)

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)


def _unpickle(file: _Bounded) -> tuple[Any, dict[str, Storage]]:
    """Read the pickle that begins at the file's position, and move behind it.

    Returns:
        What it holds, and all storages that it mentions by their keys.
    """
    start = file.tell()
    try:
        # Extension codes would look up what other parts of the process registered, and slots far
        # behind the pickle's length would make the interpreter reserve memory for all of them.
        for opcode, argument, position in pickletools.genops(cast(Any, file)):
            here = file.tell() - start
            if opcode.name.startswith("EXT") or (
                opcode.name == "LONG_BINPUT" and cast(int, argument) > here
            ):
                raise UnreadableError(f"its pickle uses {opcode.name} at byte {position}")
            if here > _MAX_PICKLE:
                raise UnreadableError("its pickle is larger than any description of weights")
        end = file.tell()
        file.seek(start)
        unpickler = _Unpickler(file)
        content = unpickler.load()
        file.seek(end)
    except UnreadableError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise UnreadableError(f"its pickle is damaged ({_told(error)})") from error
    return content, unpickler.storages


def _told(error: Exception) -> str:
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def _pick(content: Any, inside: Sequence[str]) -> dict[str, TensorEntry]:
    """The state dict in what a pickle holds."""
    for key in inside:
        if isinstance(content, dict) and key in content:
            content = content[key]
            break
    if not isinstance(content, dict):
        what = content.named if isinstance(content, _Inert) else type(content).__name__
        raise UnreadableError(f"it holds no state dict (names and tensors) but {what}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, TensorEntry):
            what = value.named if isinstance(value, _Inert) else type(value).__name__
            raise UnreadableError(
                f"it holds no state dict (names and tensors): {str(key)[:80]!r} is {what}"
            )
    return content


# ----------------------------------------------------------------------------------------- formats


@dataclass(frozen=True)
class _Archive:
    """An open zip archive of ``torch.save``."""

    archive: zipfile.ZipFile
    members: Mapping[str, zipfile.ZipInfo]  # by names without the archive's root folder
    size: int  # bytes of the file

    def read(self, name: str) -> bytearray:
        info = self.members.get(name)
        if info is None:
            raise UnreadableError(f"the archive lacks {name}")
        # torch never compresses: anything else could unfold to any size.
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > self.size:
            raise UnreadableError(f"the archive's {name} has an impossible size")
        data = bytearray(info.file_size)
        view, done = memoryview(data), 0
        try:
            with self.archive.open(info) as stream:
                while chunk := stream.read(_CHUNK):
                    view[done : done + len(chunk)] = chunk
                    done += len(chunk)
        except Exception as error:  # a wrong checksum, overlaps, the end of the file
            raise UnreadableError(f"the archive is damaged ({_told(error)})") from error
        if done != len(data):
            raise UnreadableError(f"the archive's {name} is cut off")
        return data

    def content(self) -> Any:
        pickled = self.read("data.pkl")
        return _unpickle(_Bounded(io.BytesIO(pickled), len(pickled)))[0]


@contextlib.contextmanager
def _opened_zip(file: BinaryIO, size: int) -> Iterator[_Archive]:
    try:
        archive = zipfile.ZipFile(file)
    except Exception as error:  # zipfile raises several classes on damage
        raise UnreadableError(f"the archive is damaged or cut off ({_told(error)})") from error
    with archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UnreadableError("the archive holds no data.pkl, so it is not of torch.save")
        root = pickles[0][: -len("data.pkl")]
        if f"{root}constants.pkl" in members:
            raise UnreadableError("it is a TorchScript program, not a state dict")
        inner = {k[len(root) :]: v for k, v in members.items() if k.startswith(root)}
        yield _Archive(archive, inner, size)


def _read_zip(file: BinaryIO, size: int, inside: Sequence[str]) -> dict[str, torch.Tensor]:
    with _opened_zip(file, size) as archive:
        order = "little"
        if "byteorder" in archive.members:  # absent before torch 2.1
            order = bytes(archive.read("byteorder")).decode(errors="replace").strip()
        if order not in ("little", "big"):
            raise UnreadableError(f"its byte order is {order[:20]!r}")
        state = _pick(archive.content(), inside)
        swap = order != sys.byteorder
        return _build(state, lambda key: archive.read(f"data/{key}"), swap=swap)


def _read_stream(file: BinaryIO, size: int, inside: Sequence[str]) -> dict[str, torch.Tensor]:
    """The format before torch 1.6: pickles, then each storage behind its length."""
    stream = _Bounded(file, size)
    if _unpickle(stream)[0] != _LEGACY_MAGIC or _unpickle(stream)[0] != _LEGACY_PROTOCOL:
        raise UnreadableError("it is a pickle, but not of torch.save")
    system, _ = _unpickle(stream)
    big = isinstance(system, dict) and system.get("little_endian") is False
    content, storages = _unpickle(stream)
    state = _pick(content, inside)
    keys, _ = _unpickle(stream)
    if not isinstance(keys, list):
        raise UnreadableError("the list of its storages is damaged")
    places: dict[str, tuple[int, int]] = {}  # key -> first byte, number of bytes
    for key in map(str, keys):
        head = stream.read(8)
        if len(head) < 8:
            raise UnreadableError("it is cut off between its storages")
        if key not in storages:
            raise UnreadableError(f"nothing says what its storage {key[:40]} holds")
        (count,) = struct.unpack("<q", head)
        start, length = stream.tell(), count * _ITEM_BYTES[storages[key].dtype]
        if count < 0 or start + length > size:
            raise UnreadableError(f"it is cut off: storage {key[:40]} claims {length} bytes")
        places[key] = (start, length)
        stream.seek(start + length)

    def stored(key: str) -> bytearray:
        if key not in places:
            raise UnreadableError(f"it lacks storage {key[:40]}")
        return _read_at(file, *places[key])

    return _build(state, stored, swap=big != (sys.byteorder == "big"))


def _read_safetensors(file: BinaryIO, size: int) -> dict[str, torch.Tensor]:
    """The format of Hugging Face: length of a JSON header, the header, the numbers."""
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(_MAX_HEADER, size - 8):
        raise UnreadableError(f"it is cut off: its header claims {length} bytes")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"its header is damaged ({_told(error)})") from error
    if not isinstance(header, dict):
        raise UnreadableError("its header is damaged")
    header.pop("__metadata__", None)
    start, available = 8 + length, size - 8 - length
    state: dict[str, TensorEntry] = {}
    places: dict[str, tuple[int, int]] = {}
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise UnreadableError(f"its entry {name[:80]!r} is damaged") from error
        if dtype not in _SAFETENSORS:
            raise UnreadableError(f"{name[:80]!r} has the unknown number format {str(dtype)[:20]}")
        if not _naturals([begin, end]) or not isinstance(shape, list) or not _naturals(shape):
            raise UnreadableError(f"its entry {name[:80]!r} is damaged")
        count = math.prod(shape)
        if not begin <= end <= available:
            raise UnreadableError(f"it is cut off: {name[:80]!r} lies outside the file")
        if end - begin != count * _ITEM_BYTES[_SAFETENSORS[dtype]]:
            raise UnreadableError(f"{name[:80]!r} has not the bytes of its shape")
        storage = Storage(name, _SAFETENSORS[dtype], count)
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        state[name] = TensorEntry(storage, storage.dtype, 0, shape, strides)
        places[name] = (start + begin, end - begin)
    ordered = sorted(places.values())
    if any(a + n > b for (a, n), (b, _) in itertools.pairwise(ordered)):
        raise UnreadableError("its tensors overlap")
    return _build(state, lambda key: _read_at(file, *places[key]), swap=sys.byteorder == "big")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _read_at(file: BinaryIO, start: int, length: int) -> bytearray:
    data = bytearray(length)
    file.seek(start)
    if file.readinto(data) != length:  # type: ignore[attr-defined]
        raise UnreadableError("it is cut off")
    return data


# ----------------------------------------------------------------------------------------- tensors


def _naturals(values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _build(
    state: Mapping[str, TensorEntry], stored: Callable[[str], bytearray], *, swap: bool
) -> dict[str, torch.Tensor]:
    """Make tensors of their descriptions, each checked against the bytes of its storage.

    Args:
        state: descriptions by name.
        stored: key of a storage -> its bytes.
        swap: whether the bytes of each number are in the other order than this machine's.
    """
    users: dict[str, list[str]] = {}
    for name, entry in state.items():
        _check(name, entry)
        users.setdefault(entry.storage.key, []).append(name)
    found: dict[str, torch.Tensor] = {}
    for key, names in users.items():  # one storage at a time: not twice the file in memory
        data = stored(key)
        for name in names:
            found[name] = _view(name, state[name], data, swap=swap)
    return {name: found[name] for name in state}


def _check(name: str, entry: TensorEntry) -> None:
    size, stride = entry.size, entry.stride
    if not (
        isinstance(size, (tuple, list))
        and isinstance(stride, (tuple, list))
        and len(size) == len(stride) <= _MAX_DIMENSIONS
        and _naturals([*size, *stride, entry.offset, entry.storage.count])
        and math.prod(size) < 1 << 40
    ):
        raise UnreadableError(f"the description of {name[:80]!r} is damaged")


def _view(name: str, entry: TensorEntry, data: bytearray, *, swap: bool) -> torch.Tensor:
    import torch

    dtype = getattr(torch, entry.dtype)
    bytes_each = _ITEM_BYTES[entry.dtype]
    claimed = entry.storage.count * _ITEM_BYTES[entry.storage.dtype]
    last = entry.offset + sum((n - 1) * s for n, s in zip(entry.size, entry.stride, strict=True))
    if claimed > len(data):
        raise UnreadableError(
            f"the storage of {name[:80]!r} has {len(data)} bytes, not the {claimed} that it claims"
        )
    if math.prod(entry.size) == 0:
        return torch.empty(entry.size, dtype=dtype)
    if (last + 1) * bytes_each > claimed:
        raise UnreadableError(f"{name[:80]!r} reaches beyond its storage")
    if swap:
        part = 2 if entry.dtype.startswith("complex") else 1
        data = bytearray(_swapped(data, bytes_each // part))
    whole = torch.frombuffer(data, dtype=dtype, count=len(data) // bytes_each)
    view = whole.as_strided(entry.size, entry.stride, entry.offset)
    # A tensor that is a small part of its storage would keep all of it in memory.
    return view.clone() if view.numel() * bytes_each < len(data) // 2 else view


def _swapped(data: bytearray, bytes_each: int) -> bytes:
    """The same numbers with the bytes of each reversed."""
    import numpy as np

    return (
        np.frombuffer(data, f"V{bytes_each}")
        .view(np.uint8)
        .reshape(-1, bytes_each)[:, ::-1]
        .tobytes()
    )
