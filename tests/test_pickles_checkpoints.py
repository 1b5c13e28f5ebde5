"""Reading weight files: nothing of them is run, whatever they hold and however they are damaged."""

from __future__ import annotations

import argparse
import builtins
import collections
import copyreg
import functools
import io
import json
import os
import pickle
import struct
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gim_hloc import weights
from gim_hloc.errors import WeightsError

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])


def state_dict() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shared = torch.randn(100)
    return collections.OrderedDict(
        matrix=torch.randn(3, 4),
        integers=torch.arange(5),
        half=torch.randn(7).half(),
        bfloat=torch.randn(2, 2).bfloat16(),
        turned=torch.randn(4, 6).t(),
        nothing=torch.empty(0, 3),
        scalar=torch.tensor(3.0),
        parameter=torch.nn.Parameter(torch.randn(3)),
        complex=torch.randn(3, dtype=torch.complex64),
        booleans=torch.tensor([True, False]),
        part=shared[10:13],
        other_part=shared[50:],
        double=torch.randn(2, dtype=torch.float64),
        bytes=torch.arange(4, dtype=torch.uint8),
    )


def save(content: Any, path: Path, zipped: bool) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.fixture
def ghost() -> Iterator[types.ModuleType]:
    """A module that exists while a file is written and is gone when it is read."""
    module = types.ModuleType("ghost")
    sys.modules["ghost"] = module
    yield module
    sys.modules.pop("ghost", None)


@FORMATS
def test_training_checkpoint_with_strangers(
    tmp_path: Path, ghost: types.ModuleType, zipped: bool
) -> None:
    def define(name: str, base: type) -> Any:
        kind = type(name, (base,), {"__module__": "ghost"})
        setattr(ghost, name, kind)
        return kind()

    node, thing, items = define("CfgNode", dict), define("Callback", object), define("L", list)
    node["TRAINER"] = {"lr": 1e-3}
    node.frozen = True
    thing.best = np.float64(0.5)
    items.append(3)
    saved = state_dict()
    path = save(
        {
            "hyper_parameters": {
                "config": node,
                "items": items,
                "arguments": argparse.Namespace(a=3),
                "function": functools.partial(print, 3),
                "array": np.zeros(3),
                "queue": collections.deque([1, 2]),
                "set": {1, 2},
                "default": collections.defaultdict(list, {3: [2]}),
                "path": Path("x"),
                "device": torch.device("cpu"),
                "dtype": torch.float32,
                "size": torch.Size([2]),
            },
            "callbacks": {"checkpoint": thing},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(5)}}}],
            "state_dict": saved,
        },
        tmp_path / "a.ckpt",
        zipped,
    )
    del sys.modules["ghost"]
    found = weights.load_state_dict(path)
    assert list(found) == list(saved)
    for name, value in saved.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    assert "ghost" not in sys.modules


@pytest.mark.parametrize("bits", [16, 32])
def test_dtypes_without_a_storage_of_their_own(tmp_path: Path, bits: int) -> None:
    dtype = {16: torch.uint16, 32: torch.uint32}[bits]
    saved = torch.tensor([1, 2, 3], dtype=torch.int32).to(dtype)
    path = save({"x": saved[1:]}, tmp_path / "a.pth", True)
    found = weights.load_state_dict(path)["x"]
    assert found.dtype == dtype
    assert found.tolist() == [2, 3]


# ---------------------------------------------------------------------------------- files that harm


def evil(marker: Path) -> list[Any]:
    """Objects whose unpickling would make ``marker``."""
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (os.system, (f"touch '{marker}'",)),
        (builtins.eval, (f"open({str(marker)!r}, 'w')",)),
        (open, (str(marker), "w")),
        (functools.partial, (os.system, f"touch '{marker}'")),
        (map, (os.system, [f"touch '{marker}'"])),
    ]

    class Evil:
        def __init__(self, call: Any) -> None:
            self.call = call

        def __reduce__(self) -> Any:
            return self.call

    return [Evil(call) for call in calls]


@FORMATS
@pytest.mark.parametrize("index", range(5))
def test_nothing_is_executed(tmp_path: Path, zipped: bool, index: int) -> None:
    marker = tmp_path / "ran"
    thing = evil(marker)[index]
    beside = save({"state_dict": {"x": torch.ones(2)}, "h": thing}, tmp_path / "a.pth", zipped)
    assert torch.equal(weights.load_state_dict(beside)["x"], torch.ones(2))
    for content in (thing, {"x": thing}, {"state_dict": {"x": torch.ones(2), "y": thing}}):
        path = save(content, tmp_path / "b.pth", zipped)
        with pytest.raises(WeightsError, match=r"b\.pth cannot be read.*no state dict"):
            weights.load_state_dict(path)
    assert not marker.exists()


def zip_with(pickled: bytes, path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        for name, data in members.items():
            archive.writestr(f"archive/data/{name}", data)
    return path


@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(S'touch MARKER'\ntR.",  # GLOBAL, REDUCE
        b"(S'touch MARKER'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch MARKER'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch MARKER\x85R.",  # STACK_GLOBAL
        b"\x80\x02cos\nsystem\nX\x0c\x00\x00\x00touch MARKER\x85\x81.",  # NEWOBJ
        b"\x80\x04cos\nsystem\n)}\x92.",  # NEWOBJ_EX
        b"cbuiltins\ngetattr\n(cos\nsystem\nS'__call__'\ntR(S'touch MARKER'\ntR.",
        b"ccollections\nOrderedDict\n)R}S'items'\ncos\nsystem\nsb.",  # BUILD on a dictionary
        b"ctorch._utils\n_rebuild_tensor_v2\n}S'__code__'\nNsb.",  # BUILD on a function
        b"ctorch._utils\n_rebuild_parameter\n(cos\nsystem\ntR(S'touch MARKER'\ntR.",
        b"ctorch\nload\n(S'MARKER'\ntR.",
        b"\x82\x01.",  # EXT1: an extension that the process registered
        b"Pos.system\n.",  # PERSID
    ],
)
def test_hand_made_pickles(tmp_path: Path, code: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if code.startswith(b"\x82"):
        monkeypatch.setitem(copyreg._inverted_registry, 1, ("os", "system"))  # type: ignore[attr-defined]
        monkeypatch.setitem(copyreg._extension_cache, 1, os.system)  # type: ignore[attr-defined]
    path = zip_with(code, tmp_path / "a.pth")
    if b"OrderedDict" in code:
        assert weights.load_state_dict(path) == {}  # its attributes are ignored
    else:
        with pytest.raises(WeightsError, match=r"a\.pth cannot be read"):
            weights.load_state_dict(path)
    assert not (tmp_path / "MARKER").exists()


def test_memory_is_not_reserved_for_lies(tmp_path: Path) -> None:
    """A slot of four thousand millions would need 64 GB; a string of 2^40 bytes a terabyte."""
    far_slot = zip_with(b"}r\xff\xff\xff\xff.", tmp_path / "a.pth")
    assert weights.load_state_dict(far_slot) == {}
    length = struct.pack("<Q", 1 << 40)
    for code in (b"\x80\x04\x8e" + length + b"x.", b"\x80\x05\x96" + length + b"x."):
        with pytest.raises(WeightsError):
            weights.load_state_dict(zip_with(code, tmp_path / "a.pth"))


def test_storages_that_the_list_of_a_stream_lacks(tmp_path: Path) -> None:
    """Their memory would never be filled."""
    path = save({"x": torch.zeros(10), "y": torch.ones(3)}, tmp_path / "a.pth", False)
    data = path.read_bytes()
    start = data.rindex(b"\x80\x02]")  # the list of storages
    path.write_bytes(data[:start] + pickle.dumps([], 2))
    with pytest.raises(WeightsError, match="lacks storages"):
        weights.load_state_dict(path)


def test_wrong_checksum(tmp_path: Path) -> None:
    path = save({"x": torch.full((1000,), 1.5)}, tmp_path / "a.pth", True)
    data = path.read_bytes()
    place = data.index(torch.full((10,), 1.5).numpy().tobytes())
    path.write_bytes(data[: place + 5] + b"\x01" + data[place + 6 :])
    with pytest.raises(WeightsError, match="checksum"):
        weights.load_state_dict(path)


# ----------------------------------------------------------------------------------- sizes that lie


class Described:
    """Pickles as a tensor with whatever numbers it is given."""

    def __init__(self, count: Any, offset: Any, size: Any, stride: Any) -> None:
        self.count, self.numbers = count, (offset, size, stride)

    def __reduce__(self) -> Any:
        arguments = (StorageOf(self.count), *self.numbers, False, collections.OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class StorageOf:
    def __init__(self, count: Any) -> None:
        self.count = count


class Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, StorageOf):
            return ("storage", torch.FloatStorage, "0", "cpu", obj.count)
        return None


def described(path: Path, *numbers: Any, stored: int = 4) -> Path:
    """A file whose only storage has ``stored`` floats, whatever its description says."""
    stream = io.BytesIO()
    Pickler(stream, 2).dump({"x": Described(*numbers)})
    return zip_with(stream.getvalue(), path, **{"0": np.arange(stored, dtype="<f4").tobytes()})


def test_descriptions_that_are_true(tmp_path: Path) -> None:
    found = weights.load_state_dict(described(tmp_path / "a.pth", 4, 1, (3,), (1,)))
    assert found["x"].tolist() == [1, 2, 3]
    found = weights.load_state_dict(described(tmp_path / "a.pth", 4, 0, (2, 2), (1, 2)))
    assert found["x"].tolist() == [[0, 2], [1, 3]]
    found = weights.load_state_dict(described(tmp_path / "a.pth", 4, 9, (0, 7), (7, 1)))
    assert found["x"].shape == (0, 7)


@pytest.mark.parametrize(
    "numbers",
    [
        (4000, 0, (4000,), (1,)),  # the storage claims more than is there
        (4, 0, (5,), (1,)),
        (4, 1, (4,), (1,)),
        (4, 0, (2, 2), (3, 1)),
        (4, 0, (2,), (1 << 61,)),
        (4, -1, (2,), (1,)),
        (4, 0, (2,), (-1,)),
        (4, 0, (-2,), (1,)),
        (-4, 0, (2,), (1,)),
        (4, 0, (2, 2), (1,)),
        (4, 0, (1 << 30, 1 << 30), (0, 0)),
        (4, 0, (2.0,), (1,)),
        (4, 0, 4, 1),
        (4, "0", (2,), (1,)),
        (True, 0, (1,), (1,)),
    ],
)
def test_descriptions_that_lie(tmp_path: Path, numbers: tuple[Any, ...]) -> None:
    with pytest.raises(WeightsError, match=r"storage|damaged|claims"):
        weights.load_state_dict(described(tmp_path / "a.pth", *numbers))


def test_stream_whose_storage_claims_more(tmp_path: Path) -> None:
    path = save({"x": torch.zeros(1000)}, tmp_path / "a.pth", False)
    data = bytearray(path.read_bytes())
    start = len(data) - 4000 - 8
    assert struct.unpack_from("<q", data, start) == (1000,)
    for count in (1001, 1 << 60, -1, 10):
        struct.pack_into("<q", data, start, count)
        path.write_bytes(data)
        with pytest.raises(WeightsError, match="storage"):
            weights.load_state_dict(path)


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}." + bytes(10_000_000))
    with pytest.raises(WeightsError, match="compressed"):
        weights.load_state_dict(path)


# -------------------------------------------------------------------------------------- safetensors


def tensors_file(header: Any, body: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(dtype: str, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def test_safetensors(tmp_path: Path) -> None:
    matrix = np.arange(6, dtype="<f4").reshape(2, 3)
    half = np.array([1.5], dtype="<f2")
    header = {
        "__metadata__": {"format": "pt"},
        "a": entry("F32", [2, 3], 2, 26),
        "b": entry("F16", [], 0, 2),
        "c": entry("I64", [0], 26, 26),
    }
    path = tmp_path / "a.safetensors"
    path.write_bytes(tensors_file(header, half.tobytes() + matrix.tobytes()))
    found = weights.load_state_dict(path)
    assert torch.equal(found["a"], torch.from_numpy(matrix))
    assert found["b"].shape == ()
    assert found["b"].dtype == torch.float16
    assert found["b"].item() == 1.5
    assert found["c"].shape == (0,)
    path.rename(tmp_path / "b.ckpt")  # told by content, not by name
    assert weights.load_state_dict(tmp_path / "b.ckpt").keys() == found.keys()


@pytest.mark.parametrize(
    "content",
    [
        tensors_file({"a": entry("F32", [2], 0, 8)}, bytes(7)),
        tensors_file({"a": entry("F32", [2], 0, 12)}, bytes(12)),
        tensors_file({"a": entry("F32", [2], -8, 0)}, bytes(8)),
        tensors_file({"a": entry("F32", [-2], 8, 0)}, bytes(8)),
        tensors_file({"a": entry("F32", [1 << 62], 0, 8)}, bytes(8)),
        tensors_file({"a": entry("F32", [2.0], 0, 8)}, bytes(8)),
        tensors_file({"a": entry("F32", [True, 2], 0, 8)}, bytes(8)),
        tensors_file({"a": entry("Q7", [2], 0, 8)}, bytes(8)),
        tensors_file({"a": entry("F32", "2", 0, 8)}, bytes(8)),
        tensors_file({"a": entry("F32", [2], 0)}, bytes(8)),
        tensors_file({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 2, 6)}, bytes(8)),
        tensors_file({"a": [1]}, bytes(8)),
        tensors_file(b'{"a": {}, "a": {}}', b""),
        tensors_file(b"{" * 100_000, b""),
        tensors_file(b"{}", b"", length=1 << 63),
        tensors_file(b"{}", b"", length=3),
        tensors_file(b'{"a": \xff}', b""),
    ],
)
def test_safetensors_that_lie(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"a\.safetensors cannot be read"):
        weights.load_state_dict(path)


# ------------------------------------------------------------------------------------------- damage


def samples(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("samples")
    content = {"state_dict": state_dict(), "epoch": 3}
    files = [save(content, folder / f"{zipped}.pth", zipped) for zipped in (True, False)]
    header = {"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 8, 12)}
    return [*(file.read_bytes() for file in files), tensors_file(header, bytes(12))]


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return samples(tmp_path_factory)


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["zip", "stream", "safetensors"])
def test_cut_off_files(tmp_path: Path, whole_files: list[bytes], kind: int) -> None:
    data, path = whole_files[kind], tmp_path / "a.pth"
    for length in sorted({*range(0, len(data), max(1, len(data) // 60)), len(data) - 1}):
        path.write_bytes(data[:length])
        with pytest.raises(WeightsError, match=r"a\.pth cannot be read"):
            weights.load_state_dict(path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_do_more_than_fail(
    tmp_path_factory: pytest.TempPathFactory, whole_files: list[bytes], data: st.DataObject
) -> None:
    content = bytearray(data.draw(st.sampled_from(whole_files)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.pth"
    path.write_bytes(content)
    try:
        found = weights.load_state_dict(path)
    except WeightsError:
        return
    for value in found.values():
        assert isinstance(value, torch.Tensor)
        value.clone()  # reads every number


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "web page"),
        (b"  <!DOCTYPE html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"PK\x03\x04broken", "damaged or cut off"),
        (bytes(1000), "zeros"),
        (b"some text", "neither"),
        (pickle.dumps({"x": 1}, 2), "magic number"),
    ],
)
def test_what_is_no_weight_file(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"a\.pth cannot be read.*{told}"):
        weights.load_state_dict(path)
    with pytest.raises(WeightsError, match="does not exist"):
        weights.load_state_dict(tmp_path / "b.pth")
    with pytest.raises(WeightsError, match="cannot be read"):
        weights.load_state_dict(tmp_path)


def test_programs_are_not_weights(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / "a.pt"))
    with pytest.raises(WeightsError, match="TorchScript"):
        weights.load_state_dict(tmp_path / "a.pt")


@pytest.mark.weights
def test_published_files_read_as_torch_reads_them() -> None:
    for file in weights.known():
        if file.carrier is None:
            continue
        path = weights.locate(file.name, download=False)
        expected = torch.load(path, weights_only=True, map_location="cpu")
        for key in file.inside:
            expected = expected.get(key, expected)
        found = weights.load_state_dict(path, inside=file.inside)
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
