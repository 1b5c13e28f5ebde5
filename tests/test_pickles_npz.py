"""Arrays of objects are read as NumPy reads them, and nothing in a file is ever run."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gim_hloc.errors import InputError
from gim_hloc.pickles import read_npz


def same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray):
        assert isinstance(b, np.ndarray)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        return all(same(x, y) for x, y in zip(a.flat, b.flat, strict=True))
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def objects(*items: object) -> np.ndarray:
    array = np.empty(len(items), dtype=object)
    for k, item in enumerate(items):
        array[k] = item
    return array


def with_payload(path: Path, payload: bytes, shape: str = "(1,)") -> Path:
    """An .npz whose array of objects is the given pickle."""
    header = f"{{'descr': '|O', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + payload
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", member)
    return path


def test_what_scene_files_hold(tmp_path: Path) -> None:
    content = {
        "image_paths": objects("a/b.jpg", None, "ünïcode.jpg"),
        "intrinsics": objects(np.eye(3), None, np.asfortranarray(np.arange(9.0).reshape(3, 3))),
        "pair_infos": objects(((0, 1), 0.25, np.zeros((0, 2))), ((1, np.int64(2)), 1.0, "x")),
        "overlap_matrix": np.arange(6, dtype=">f4").reshape(2, 3),
        "names": np.array([["abc", "d"]]),
        "fortran": np.asfortranarray(np.arange(12).reshape(3, 4)),
        "dict": np.array({"k": [1, 2.5, b"raw", True, {3}]}, dtype=object),
        "flags": np.array([True, False]),
    }
    path = tmp_path / "scene.npz"
    np.savez_compressed(path, **content)
    read = read_npz(path)
    assert list(read) == list(content)
    for name, array in content.items():
        assert same(array, read[name]), name
    read["overlap_matrix"][0, 0] = 5  # arrays are the caller's own


@pytest.mark.parametrize("protocol", range(5))
def test_every_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    array = objects(np.arange(3.0), ("a", b"\xff\x00"), np.float32(2.5))
    path = with_payload(tmp_path / "p.npz", pickle.dumps(array, protocol=protocol), "(3,)")
    assert same(array, read_npz(path)["a"])


def test_arrays_pickled_by_python_2_are_read(tmp_path: Path) -> None:
    # As Python 2 wrote np.array([np.array([1.5])], dtype=object) elements: old module, str bytes.
    inner = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\nt"
        b"cnumpy\ndtype\n(S'f8'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\n"
        b"S'\\x00\\x00\\x00\\x00\\x00\\x00\\xf8?'\ntb"
    )
    outer = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\nt"
        b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI63\ntbI00\n(l" + inner + b"atb."
    )
    read = read_npz(with_payload(tmp_path / "old.npz", outer))["a"]
    np.testing.assert_array_equal(read[0], [1.5])


class Harm:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


def test_code_is_refused_by_name_and_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = tmp_path / "harm.npz"
    np.savez(path, a=objects(Harm(marker)))
    with pytest.raises(InputError, match=r"harm\.npz cannot .* pathlib"):
        read_npz(path)
    assert not marker.exists()
    np.load(path, allow_pickle=True)["a"]
    assert marker.exists()  # NumPy's own reader runs it: the test can fail


@pytest.fixture
def few_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds itself is gone through for less than the five seconds of a user."""
    monkeypatch.setattr("gim_hloc.pickles._ITEMS", 100_000)


@pytest.mark.parametrize(
    "payload",
    [
        b"cbuiltins\neval\n(S'1+1'\ntR.",
        b"cnumpy.core.multiarray\nfromfile\n.",
        b"cnumpy\nndarray\n.",  # a name is no data
        b"cnumpy\nndarray\n}S'__call__'\nI1\nsb.",  # state of a name
        b"(lp0\ng0\na.",  # a list that holds itself
        b"cnumpy.core.multiarray\n_reconstruct\n(tR(I1\n(I1000000000000\nt"
        b"cnumpy\ndtype\n(S'f8'\ntRI00\nS''\ntb.",
        b"cnumpy\ndtype\n(S'f8,O'\ntR.",
        b"\x80\x04",
        b"",
    ],
)
@pytest.mark.usefixtures("few_items")
def test_made_up_pickles_are_refused(tmp_path: Path, payload: bytes) -> None:
    with pytest.raises(InputError, match=r"bad\.npz"):
        read_npz(with_payload(tmp_path / "bad.npz", payload))


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut", b"\x93NUMPY\x01\x00\x10"])
def test_files_that_are_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "none.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"none\.npz"):
        read_npz(path)
    with pytest.raises(InputError, match="does not exist"):
        read_npz(tmp_path / "missing.npz")


def test_a_huge_claim_is_refused(tmp_path: Path) -> None:
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    path = tmp_path / "huge.npy"
    path.write_bytes(member)
    with pytest.raises(InputError, match="cut off"):
        read_npz(path)


def test_single_arrays(tmp_path: Path) -> None:
    path = tmp_path / "one.npy"
    np.save(path, np.arange(4))
    np.testing.assert_array_equal(read_npz(path)[""], np.arange(4))


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner),
        max_leaves=8,
    )
)
def test_any_nesting_of_data_survives(value: object) -> None:
    import tempfile

    buffer = io.BytesIO()
    np.savez(buffer, a=objects(value))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npz"
        path.write_bytes(buffer.getvalue())
        assert same(value, read_npz(path)["a"][0])


def nested(levels: int) -> bytes:
    """A pickle of lists, each of which holds the one before twice: 2^levels items."""
    code = b"]q\x00."[:-1]
    for level in range(levels):
        code += b"]q" + bytes([level + 1]) + b"(h" + bytes([level]) + b"h" + bytes([level]) + b"e"
    return code


@pytest.mark.parametrize(
    "payload",
    [
        b"\x80\x02(" + nested(100) + b"l.",  # never ends for who walks through it
        b"(cbuiltins\nbytearray\n(L7800000000L\ntRl.",
        b"(cbuiltins\nbytes\n(L7800000000L\ntRl.",
        b"(cnumpy\nndarray\n(L7800000000L\ntRl.",
        b"\x80\x04(\x8e" + (1 << 40).to_bytes(8, "little") + b"l.",
        b"\x80\x05(\x96" + (1 << 40).to_bytes(8, "little") + b"l.",
        b"(cnumpy\ndtype\n(S'V999999999'\ntR}S'a'\nsbl.",
        # A type of objects that says that it holds none: its bytes would be taken for pointers.
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\nt"
        b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'AAAAAAAA'\ntb.",
    ],
)
@pytest.mark.usefixtures("few_items")
def test_bombs_in_pickles_are_refused(tmp_path: Path, payload: bytes) -> None:
    with pytest.raises(InputError, match=r"bad\.npz"):
        read_npz(with_payload(tmp_path / "bad.npz", payload))


@pytest.mark.parametrize("shape", ["(10**18,)", "(1000000000000000000,)", "(-1,)", "(True, 2)"])
@pytest.mark.parametrize("kind", ["<f8", "|V0", "|O", "<U0"])
def test_shapes_beyond_the_file_are_refused(tmp_path: Path, shape: str, kind: str) -> None:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    (tmp_path / "bad.npy").write_bytes(member)
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        archive.writestr("a.npy", member)
    for name in ("bad.npy", "bad.npz"):
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            read_npz(tmp_path / name)


def test_archives_that_unpack_to_anything_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, a=np.zeros(1000))
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = (4_000_000_000).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.npy would unpack to 4,000,000,000 bytes"):
        read_npz(path)


def test_byte_orders_of_arrays_of_objects(tmp_path: Path) -> None:
    kinds = [">f4", "<f8", ">i2", ">U3", "S4", "?", ">c8"]
    content = objects(*(np.array([1, 0, 2]).astype(kind) for kind in kinds * 2))
    np.savez(tmp_path / "a.npz", a=content)
    with np.load(tmp_path / "a.npz", allow_pickle=True) as file:
        assert same(file["a"], read_npz(tmp_path / "a.npz")["a"])  # NumPy swaps to native order
