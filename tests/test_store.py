"""The store: hloc's layout, nothing reused that changed, nothing lost when killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gim_hloc.errors import InputError, LockedError, OutputError
from gim_hloc.matchers.base import Matches
from gim_hloc.matchers.sparse import make_encoding
from gim_hloc.store import (
    H5Store,
    Journal,
    OutputLock,
    encoding_from_arrays,
    encoding_to_arrays,
    matches_to_arrays,
    pair_keys,
    read_matches,
    rows_from_matches0,
)


def entry(value: float) -> dict[str, np.ndarray]:
    return {"a": np.full((3, 2), value, np.float32), "b": np.arange(5, dtype=np.int32)}


def filled(path: Path, names: list[str]) -> Journal:
    journal = Journal(path, "s")
    for i, name in enumerate(names):
        journal.append(name, entry(i), {"source": name})
    return journal


def test_journal_survives_reopening(tmp_path: Path) -> None:
    filled(tmp_path / "j", ["x/ö 1.jpg", "b"]).close()
    journal = Journal(tmp_path / "j", "s")
    assert journal.names() == ["x/ö 1.jpg", "b"]
    arrays, attributes = journal.read("x/ö 1.jpg")
    assert np.array_equal(arrays["a"], entry(0)["a"])
    assert arrays["b"].dtype == np.int32
    assert attributes == {"source": "x/ö 1.jpg"}


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(1, 10_000))
def test_journal_drops_only_the_torn_record(tmp_path_factory: pytest.TempPathFactory, cut: int):
    path = tmp_path_factory.mktemp("j") / "j"
    journal = filled(path, ["a", "b", "c"])
    start_of = {name: journal._offsets[name][0] for name in "abc"}
    journal.close()
    size = path.stat().st_size
    kept = max(0, size - cut)
    os.truncate(path, kept)
    reopened = Journal(path, "s")
    expected = [
        n
        for n, end in zip("abc", [*list(start_of.values())[1:], size + 1], strict=True)
        if kept >= (end - 16 if n != "c" else size)
    ]
    assert reopened.names() == expected
    reopened.append("d", entry(9), {"source": "d"})
    reopened.close()
    assert Journal(path, "s").names() == [*expected, "d"]


def test_journal_detects_a_flipped_byte(tmp_path: Path) -> None:
    filled(tmp_path / "j", ["a", "b", "c"]).close()
    raw = bytearray((tmp_path / "j").read_bytes())
    raw[-3] ^= 0xFF
    (tmp_path / "j").write_bytes(raw)
    assert Journal(tmp_path / "j", "s").names() == ["a", "b"]


def test_journal_of_other_settings_starts_anew(tmp_path: Path) -> None:
    filled(tmp_path / "j", ["a"]).close()
    assert Journal(tmp_path / "j", "other").names() == []


def test_store_reuses_by_settings_and_source(tmp_path: Path) -> None:
    path = tmp_path / "f.h5"
    store = H5Store(path, {"size": 1})
    store.put("x.jpg", entry(1), "s1")
    assert store.has("x.jpg", "s1")
    assert not store.has("x.jpg", "s2")
    store.finalize(["x.jpg"], {})
    assert not (tmp_path / "f.h5.journal").exists()
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


def test_damaged_h5_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "f.h5"
    store = H5Store(path, {})
    store.put("a.jpg", entry(1), "s")
    store.finalize(["a.jpg"], {})
    store.close()
    os.truncate(path, path.stat().st_size // 2)
    torn = H5Store(path, {})
    assert not torn.has("a.jpg", "s")
    assert "damaged" in caplog.text
    torn.put("a.jpg", entry(3), "s")
    torn.finalize(["a.jpg"], {})
    assert torn.get("a.jpg")[0]["a"][0, 0] == 3
    torn.close()


def test_missing_entry_is_a_users_error(tmp_path: Path) -> None:
    store = H5Store(tmp_path / "f.h5", {})
    with pytest.raises(OutputError, match="--overwrite"):
        store.get("nope")


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


def test_lock_stops_a_second_run(tmp_path: Path) -> None:
    with OutputLock(tmp_path), pytest.raises(LockedError, match=str(os.getpid())):
        OutputLock(tmp_path)
    OutputLock(tmp_path).close()


def make(seed: int = 0, n: int = 50):
    generator = torch.Generator().manual_seed(seed)
    return make_encoding(
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
    arrays, attributes = encoding_to_arrays(encoding)
    store = H5Store(tmp_path / "f.h5", {})
    store.put("i.jpg", arrays, "s", **attributes)
    journal = encoding_from_arrays("i.jpg", *store.get("i.jpg"))
    store.finalize(["i.jpg"], {})
    final = encoding_from_arrays("i.jpg", *store.get("i.jpg"))
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
    a, b = make(0, 50), make(1, 40)
    indices = torch.tensor([[3, 7], [10, 39], [49, 0]])
    scores = torch.tensor([0.5, 0.75, 1.0])
    arrays = matches_to_arrays(Matches.from_indices(a, b, indices, scores), len(a))
    assert arrays["matches0"].dtype == np.int32
    assert np.array_equal(rows_from_matches0(arrays["matches0"]), indices.numpy())
    with h5py.File(tmp_path / "m.h5", "w") as file:
        group = file.create_group("d-a.jpg/b.jpg")
        for key, value in arrays.items():
            group[key] = value
    rows, found = read_matches(tmp_path / "m.h5", "d/a.jpg", "b.jpg")
    assert np.array_equal(rows, indices.numpy())
    assert np.allclose(found, scores)
    swapped, _ = read_matches(tmp_path / "m.h5", "b.jpg", "d/a.jpg")
    assert np.array_equal(swapped, indices.numpy()[:, ::-1])
    with pytest.raises(InputError, match="no matches"):
        read_matches(tmp_path / "m.h5", "b.jpg", "c.jpg")


@given(st.lists(st.text("ab/-%", min_size=1, max_size=6), unique=True, max_size=12))
def test_pair_keys_never_collide(names: list[str]) -> None:
    keys = pair_keys(names)
    assert len(set(keys.values())) == len(names)


def test_pair_keys_are_hlocs_where_hloc_can_tell_names_apart() -> None:
    assert pair_keys(["a/b.jpg", "c.jpg"]) == {"a/b.jpg": "a-b.jpg", "c.jpg": "c.jpg"}
    assert pair_keys(["a/b.jpg", "a-b.jpg"]) == {"a/b.jpg": "a%2Fb.jpg", "a-b.jpg": "a-b.jpg"}
