"""The store: hloc's layout, nothing reused that changed, nothing lost when killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gim_hloc.errors import InputError, OutputError
from gim_hloc.store import (
    H5Store,
    cache_path,
    pair_keys,
    read_matches,
    rows_from_matches0,
)
from gim_hloc.tracks.base import matches0_arrays
from gim_hloc.types import SparseEncoding


def entry(value: float) -> dict[str, np.ndarray]:
    return {"a": np.full((3, 2), value, np.float32), "b": np.arange(5, dtype=np.int32)}


def test_store_reuses_by_settings_and_source(tmp_path: Path) -> None:
    path = tmp_path / "f.h5"
    store = H5Store(path, {"size": 1})
    store.put("x.jpg", entry(1), "s1")
    assert store.has("x.jpg", "s1")
    assert not store.has("x.jpg", "s2")
    store.finalize(["x.jpg"], {})
    store.close()

    again = H5Store(path, {"size": 1})
    assert again.has("x.jpg", "s1")
    assert not again.has("x.jpg", "changed image")
    again.close()
    other = H5Store(path, {"size": 2})
    assert not other.has("x.jpg", "s1")
    assert other.changed_settings == ["size"]
    other.close()
    fresh = H5Store(path, {"size": 1}, overwrite=True)
    assert not fresh.has("x.jpg", "s1")
    fresh.close()


def test_store_keeps_old_entries_beside_new_ones(tmp_path: Path) -> None:
    path = tmp_path / "f.h5"
    for name, value in (("a.jpg", 1.0), ("d/b.jpg", 2.0)):
        store = H5Store(path, {})
        store.put(name, entry(value), "s")
        store.finalize(["a.jpg"] if name == "a.jpg" else ["a.jpg", "d/b.jpg"], {"matcher": "m"})
        store.close()
    with h5py.File(path) as file:
        assert file.attrs["matcher"] == "m"
        assert file["a.jpg/a"][0, 0] == 1
        assert file["d/b.jpg/a"][0, 0] == 2


def stored(path: Path, *, keep: bool) -> None:
    store = H5Store(path, {})
    for name, value in (("a.jpg", 1.0), ("b.jpg", 2.0)):
        store.put(name, entry(value), "s", turned=90)
    store.finalize(["a.jpg", "b.jpg"], {}, keep=keep)
    store.close()


def damage(path: Path, how: str) -> None:
    raw = bytearray(path.read_bytes())
    if how == "cut":
        raw = raw[: len(raw) // 2]
    elif how == "emptied":
        raw = bytearray()
    else:  # a byte of b.jpg's first array
        raw[raw.index(entry(2.0)["a"].tobytes()) + 5] ^= 0xFF
    path.write_bytes(raw)


@pytest.mark.parametrize("how", ["cut", "emptied", "flipped"])
def test_damaged_h5_is_written_again_from_the_cache(tmp_path: Path, how: str) -> None:
    path = tmp_path / "f.h5"
    stored(path, keep=True)
    damage(path, how)
    again = H5Store(path, {})
    assert [again.has(name, "s") for name in ("a.jpg", "b.jpg")] == [True, True]
    again.finalize(["a.jpg", "b.jpg"], {})
    again.close()
    with h5py.File(path) as file:
        assert np.array_equal(file["b.jpg/a"][()], entry(2.0)["a"])
        assert file["b.jpg"].attrs["turned"] == 90


@pytest.mark.parametrize("how", ["cut", "emptied", "flipped"])
def test_damage_without_a_cache_is_computed_again(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "f.h5"
    stored(path, keep=False)
    assert path.exists()
    damage(path, how)
    torn = H5Store(path, {})
    assert not torn.has("b.jpg", "s")
    assert torn.has("a.jpg", "s") == (how == "flipped")
    assert "damaged" in caplog.text
    torn.put("a.jpg", entry(1.0), "s")
    torn.put("b.jpg", entry(3.0), "s")
    torn.finalize(["a.jpg", "b.jpg"], {})
    assert torn.get("b.jpg")[0]["a"][0, 0] == 3
    torn.close()


def test_flipped_byte_of_the_cache_costs_that_entry(tmp_path: Path) -> None:
    path = tmp_path / "f.h5"
    store = H5Store(path, {})
    store.put("a.jpg", entry(1.0), "s")
    store.put("b.jpg", entry(2.0), "s")
    store.close()
    damage(cache_path(path), "flipped")
    again = H5Store(path, {})
    assert [again.has(name, "s") for name in ("a.jpg", "b.jpg")] == [True, False]
    again.close()


def test_what_was_made_stays_when_settings_and_names_change_back(tmp_path: Path) -> None:
    path = tmp_path / "f.h5"
    stored(path, keep=True)
    for settings, names in (({"size": 2}, ["a.jpg"]), ({}, ["a.jpg"])):
        store = H5Store(path, settings)
        if settings:
            assert not store.has("a.jpg", "s")
            store.put("a.jpg", entry(7.0), "s")
        assert store.has("a.jpg", "s")
        store.finalize(names, {})
        store.close()
    with h5py.File(path) as file:
        assert list(file) == ["a.jpg"]
    back = H5Store(path, {})
    assert back.has("b.jpg", "s")
    assert back.get("b.jpg")[0]["a"][0, 0] == 2
    assert back.get("b.jpg")[1] == {"turned": 90, "source": "s"}
    back.close()


def test_h5_files_of_0_1_are_read(tmp_path: Path) -> None:
    path = tmp_path / "f.h5"
    stored(path, keep=False)
    with h5py.File(path, "r+") as file:
        sources = {name: given[0] for name, given in json.loads(file.attrs["sources"]).items()}
        del file.attrs["sources"]
        file.attrs["sources"] = json.dumps(sources)
    old = H5Store(path, {})
    assert old.has("b.jpg", "s")
    old.finalize(["a.jpg", "b.jpg"], {})
    old.close()
    with h5py.File(path) as file:  # with checksums now
        assert json.loads(file.attrs["sources"])["b.jpg"][0] == "s"


def test_nothing_to_write_is_a_file_too(tmp_path: Path) -> None:
    store = H5Store(tmp_path / "f.h5", {})
    store.finalize([], {"notes": "none"})
    store.close()
    with h5py.File(tmp_path / "f.h5") as file:
        assert (list(file), file.attrs["notes"]) == ([], "none")


def test_missing_entry_is_a_users_error(tmp_path: Path) -> None:
    store = H5Store(tmp_path / "f.h5", {})
    with pytest.raises(OutputError, match="computed again"):
        store.get("nope")
    store.close()


def test_entries_survive_kill_9(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import os, signal, numpy as np
        from pathlib import Path
        from gim_hloc.store import H5Store
        store = H5Store(Path({str(tmp_path / "f.h5")!r}), {{}})
        for i in range(7):
            store.put(f"{{i}}.jpg", {{"a": np.full(1000, i)}}, "s")
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    process = subprocess.run([sys.executable, "-c", script], check=False)
    assert process.returncode == -signal.SIGKILL
    store = H5Store(tmp_path / "f.h5", {})
    assert [store.has(f"{i}.jpg", "s") for i in range(8)] == [True] * 7 + [False]
    assert store.get("6.jpg")[0]["a"][0] == 6


def make(seed: int = 0, n: int = 50):
    generator = torch.Generator().manual_seed(seed)
    return SparseEncoding.make(
        name="i.jpg",
        size=(4000, 3000),
        network_size=(1024, 768),
        to_original=np.array([[3.9, 0.1, 1.4], [-0.1, 3.9, 1.4]]),
        keypoints=torch.rand(n, 2, generator=generator) * 3000,
        descriptors=torch.randn(n, 128, generator=generator),
        scores=torch.rand(n, generator=generator),
    )


def test_encoding_round_trip_is_exact(tmp_path: Path) -> None:
    encoding = make()
    arrays, attributes = encoding.to_arrays()
    store = H5Store(tmp_path / "f.h5", {})
    store.put("i.jpg", arrays, "s", **attributes)
    journal = SparseEncoding.from_arrays("i.jpg", *store.get("i.jpg"))
    store.finalize(["i.jpg"], {})
    final = SparseEncoding.from_arrays("i.jpg", *store.get("i.jpg"))
    for back in (journal, final):
        for field in ("keypoints", "network_keypoints", "descriptors", "scores"):
            assert torch.equal(getattr(back, field), getattr(encoding, field)), field
        assert back.size == encoding.size
        assert back.network_size == encoding.network_size
    with h5py.File(tmp_path / "f.h5") as file:  # hloc's layout
        group = file["i.jpg"]
        assert group["keypoints"].dtype == np.float32
        assert group["descriptors"].shape == (128, 50)
        assert list(group["image_size"]) == [4000, 3000]
        assert group["keypoints"].attrs["uncertainty"] == 1.0


def test_matches_round_trip(tmp_path: Path) -> None:
    indices = np.array([[3, 7], [10, 39], [49, 0]])
    scores = np.array([0.5, 0.75, 1.0])
    arrays = matches0_arrays(indices, scores, 50)
    assert arrays["matches0"].dtype == np.int32
    assert np.array_equal(rows_from_matches0(arrays["matches0"]), indices)
    with h5py.File(tmp_path / "m.h5", "w") as file:
        group = file.create_group("d-a.jpg/b.jpg")
        for key, value in arrays.items():
            group[key] = value
    rows, found = read_matches(tmp_path / "m.h5", "d/a.jpg", "b.jpg")
    assert np.array_equal(rows, indices)
    assert np.allclose(found, scores)
    swapped, _ = read_matches(tmp_path / "m.h5", "b.jpg", "d/a.jpg")
    assert np.array_equal(swapped, indices[:, ::-1])
    with pytest.raises(InputError, match="no matches"):
        read_matches(tmp_path / "m.h5", "b.jpg", "c.jpg")


@given(st.lists(st.text("ab/-%", min_size=1, max_size=6), unique=True, max_size=12))
def test_pair_keys_never_collide(names: list[str]) -> None:
    keys = pair_keys(names)
    assert len(set(keys.values())) == len(names)


def test_pair_keys_are_hlocs_where_hloc_can_tell_names_apart() -> None:
    assert pair_keys(["a/b.jpg", "c.jpg"]) == {"a/b.jpg": "a-b.jpg", "c.jpg": "c.jpg"}
    assert pair_keys(["a/b.jpg", "a-b.jpg"]) == {"a/b.jpg": "a%2Fb.jpg", "a-b.jpg": "a-b.jpg"}
