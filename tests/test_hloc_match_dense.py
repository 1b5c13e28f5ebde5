"""The drop-in for hloc's ``match_dense.main``: files, references, resuming. No hloc needed."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from gim_hloc.errors import InputError
from gim_hloc.evaluation.benchmarks import scene as synthetic_dense
from gim_hloc.hloc_plugin import confs, match_dense
from gim_hloc.tracks.anchored import AnchoredOptions
from gim_hloc.tracks.quantized import QuantizedOptions, quantize

SIZE = (320, 240)
NAMES = [f"view_{i:03d}.png" for i in range(5)]
ALL = list(itertools.combinations(NAMES, 2))
GRID = AnchoredOptions(grid_px=12)

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Setup:
    folder: Path
    scene: synthetic_dense.Scene
    conf: dict[str, Any]

    def pairs(self, path: Path, pairs: list[tuple[str, str]]) -> Path:
        path.write_text("\n".join(f"{a} {b}" for a, b in pairs))
        return path

    def run(
        self, pairs: list[tuple[str, str]], output: Path, **options: Any
    ) -> tuple[dict[str, Arrays], dict[str, Arrays]]:
        output.mkdir(exist_ok=True)
        options = {"anchors": "none", "anchored": GRID, "progress": False} | options
        found = match_dense.main(
            options.pop("conf", self.conf),
            self.pairs(output / "pairs.txt", pairs),
            self.folder / "images",
            options.pop("export_dir", output),
            **options,
        )
        return read(found[0]), read(found[1])


def read(path: Path) -> dict[str, Arrays]:
    """Datasets by the name of their group."""
    found: dict[str, Arrays] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, h5py.Dataset):
            group, _, key = name.rpartition("/")
            found.setdefault(group, {})[key] = value[()]

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return found


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    synthetic_dense.register()
    folder = tmp_path_factory.mktemp("scene")
    scene = synthetic_dense.make_scene(
        synthetic_dense.SceneOptions(views=len(NAMES), size=SIZE, boxes=2)
    )
    synthetic_dense.write_scene(scene, folder)
    conf = {
        "output": "matches-known",
        "model": {
            "name": "gim_hloc_dense", "matcher": "synthetic_dense",
            "scene": str(folder / "scene.json"), "size": (72, 96), "num_matches": 400,
            "noise_px": 0.2, "outlier_share": 0.0,
        },
        "preprocessing": {"grayscale": False, "resize_max": None, "dfactor": 1},
        "max_error": 2,
        "cell_size": 8,
    }  # fmt: skip
    return Setup(folder, scene, conf)


def rows(arrays: Arrays) -> np.ndarray:
    first = np.flatnonzero(arrays["matches0"] >= 0)
    return np.stack([first, arrays["matches0"][first]], 1)


def errors(setup: Setup, a: str, b: str, xy0: np.ndarray, xy1: np.ndarray) -> np.ndarray:
    true = setup.scene.true_position(a, b, xy0.astype(np.float64))
    found: np.ndarray = np.linalg.norm(true - xy1, axis=1)
    return found[np.isfinite(found)]


@pytest.fixture(scope="module")
def anchored(
    setup: Setup, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Arrays], dict[str, Arrays]]:
    output = tmp_path_factory.mktemp("anchored")
    return output, *setup.run(ALL, output)


def test_quantised_tracks_are_hlocs(setup: Setup, tmp_path: Path) -> None:
    features, matches = setup.run(ALL, tmp_path, tracks="quantized", max_kps=300)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "feats_matches-known.h5", "matches-known_pairs.h5", "pairs.txt",
    ]  # fmt: skip
    raw = {
        (a, b): tuple(matches[f"{a}/{b}"][k] for k in ("keypoints0", "keypoints1", "scores"))
        for a, b in ALL
    }
    assert all(len(ends[0]) == 400 for ends in raw.values())
    expected = quantize(
        NAMES,
        raw,
        QuantizedOptions(max_error=2, cell_size=8, max_keypoints=300),  # type: ignore
    )
    for name in NAMES:
        assert features[name]["keypoints"].dtype == np.float32
        np.testing.assert_array_equal(features[name]["keypoints"], expected.keypoints[name])
        np.testing.assert_array_equal(features[name]["score"], expected.keypoint_scores[name])
    for a, b in ALL:
        found = matches[f"{a}/{b}"]
        assert (found["matches0"].dtype, found["matching_scores0"].dtype) == (np.int32, np.float16)
        np.testing.assert_array_equal(rows(found), expected.matches[a, b])
        # hloc's ends at the last matched row, which its readers that index by it cannot take.
        assert len(found["matches0"]) == len(features[a]["keypoints"])


def test_anchored_tracks_are_accurate_and_longer(
    setup: Setup, anchored: tuple[Path, dict[str, Arrays], dict[str, Arrays]], tmp_path: Path
) -> None:
    _, features, matches = anchored
    assert set(features) == set(NAMES)
    worst = {}
    for kind, (keypoints, pairs) in {
        "anchored": (features, matches),
        "quantized": setup.run(ALL, tmp_path, tracks="quantized"),
    }.items():
        found = []
        for a, b in ALL:
            both = rows(pairs[f"{a}/{b}"])
            xy0, xy1 = keypoints[a]["keypoints"], keypoints[b]["keypoints"]
            found.append(errors(setup, a, b, xy0[both[:, 0]], xy1[both[:, 1]]))
            raw = pairs[f"{a}/{b}"]
            near = errors(setup, a, b, raw["keypoints0"], raw["keypoints1"])
            assert np.median(near) < 0.5
        worst[kind] = np.median(np.concatenate(found))
    assert worst["anchored"] < 0.35
    assert worst["anchored"] < 0.5 * worst["quantized"]


def test_finished_pairs_are_passed_over(
    setup: Setup,
    anchored: tuple[Path, dict[str, Arrays], dict[str, Arrays]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = shutil.copytree(anchored[0], tmp_path / "again")
    before = {p.name: p.stat().st_mtime_ns for p in output.glob("*.h5")}
    monkeypatch.setattr(match_dense, "_load", pytest.fail)
    # hloc takes a pair and its reverse for one.
    found = setup.run([(b, a) for a, b in ALL], output)
    assert set(found[1]) == set(anchored[2])
    assert {p.name: p.stat().st_mtime_ns for p in output.glob("*.h5")} == before


def test_images_that_have_keypoints_keep_them(setup: Setup, tmp_path: Path) -> None:
    for kind in ("anchored", "quantized"):
        output = tmp_path / kind
        three, matched = setup.run(list(itertools.combinations(NAMES[:3], 2)), output, tracks=kind)
        match_file = output / "matches-known_pairs.h5"
        everything, more = setup.run(ALL, output, tracks=kind)
        assert set(everything) == set(NAMES)
        for name in NAMES[:3]:
            np.testing.assert_array_equal(everything[name]["keypoints"], three[name]["keypoints"])
        for group, arrays in matched.items():
            for key, values in arrays.items():
                np.testing.assert_array_equal(more[group][key], values)
        a, b = NAMES[0], NAMES[4]
        both = rows(more[f"{a}/{b}"])
        assert len(both) > 20
        xy0, xy1 = (everything[n]["keypoints"][both[:, k]] for k, n in enumerate((a, b)))
        assert np.median(errors(setup, a, b, xy0, xy1)) < 3
        # Half done: a pair without matches is matched again, which hloc does not do.
        with h5py.File(match_file, "a") as file:
            del file[f"{a}/{b}/matches0"]
        _, repaired = setup.run(ALL, output, tracks=kind)
        assert len(rows(repaired[f"{a}/{b}"])) > 20


def test_overwriting_starts_over(
    setup: Setup, anchored: tuple[Path, dict[str, Arrays], dict[str, Arrays]], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    setup.run([(NAMES[1], NAMES[0])], output, max_kps=50)
    with h5py.File(output / "feats_matches-known.h5", "a") as file:
        file.create_group("other.png").create_dataset("keypoints", data=np.zeros((1, 2)))
    features, matches = setup.run(ALL, output, overwrite=True)
    assert set(features) - set(NAMES) == {"other.png"}  # not ours to delete
    assert set(matches) == {f"{a}/{b}" for a, b in ALL}  # the reverse one would be stale
    for name in NAMES:
        np.testing.assert_array_equal(features[name]["keypoints"], anchored[1][name]["keypoints"])
    for group, arrays in matches.items():
        np.testing.assert_array_equal(arrays["matches0"], anchored[2][group]["matches0"])


@pytest.mark.parametrize(
    ("kind", "own_match_file"), [("anchored", False), ("anchored", True), ("quantized", False)]
)
def test_overwriting_keeps_what_a_map_uses(
    setup: Setup, tmp_path: Path, kind: str, own_match_file: bool
) -> None:
    """A second list shares images with the map: its matches are rows of the map's keypoints."""
    sfm = list(itertools.combinations(NAMES[:4], 2))
    before, _ = setup.run(sfm, tmp_path, tracks=kind)
    paths = tmp_path / "feats_matches-known.h5", tmp_path / "matches-known_pairs.h5"
    loc = [(NAMES[4], name) for name in NAMES[:3]]
    second = tmp_path / "loc.h5" if own_match_file else paths[1]
    options: dict[str, Any] = {"tracks": kind, "overwrite": True, "features": paths[0]}
    for _ in range(2):  # when it is said again, too
        setup.run(loc, tmp_path / "2", matches=second, max_kps=None, **options)
    after = read(paths[0])
    for name in NAMES[:4]:
        np.testing.assert_array_equal(after[name]["keypoints"], before[name]["keypoints"])
    found = read(paths[1]) | read(second)
    assert {f"{a}/{b}" for a, b in [*sfm, *loc]} == set(found)
    for a, b in [*sfm, *loc]:
        pair = rows(found[f"{a}/{b}"])
        xy0, xy1 = (after[n]["keypoints"][pair[:, k]] for k, n in enumerate((a, b)))
        assert np.median(errors(setup, a, b, xy0, xy1)) < (0.5 if kind == "anchored" else 3.0)
    # The map's own list, said again, finds keypoints anew only where nothing else uses them.
    again, _ = setup.run(sfm, tmp_path, tracks=kind, overwrite=True, max_kps=40)
    assert len(again[NAMES[3]]["keypoints"]) <= 40
    np.testing.assert_array_equal(again[NAMES[0]]["keypoints"], before[NAMES[0]]["keypoints"])


@pytest.mark.parametrize("kind", ["anchored", "quantized"])
def test_no_size_of_a_cell_is_that_of_the_error(setup: Setup, tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"tracks": kind, "conf": setup.conf | {"cell_size": None}}
    none, _ = setup.run(ALL[:1], tmp_path / "none", **options)
    options["conf"] = setup.conf | {"cell_size": setup.conf["max_error"]}
    same, _ = setup.run(ALL[:1], tmp_path / "same", **options)
    for name in ALL[0]:
        np.testing.assert_array_equal(none[name]["keypoints"], same[name]["keypoints"])


@pytest.mark.parametrize("numbers", [{"cell_size": "8"}, {"max_error": None}, {"cell_size": 0}])
def test_numbers_of_the_configuration_are_checked_before_matching(
    setup: Setup, tmp_path: Path, numbers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(conf: Any) -> Any:
        raise AssertionError("it began to work")

    monkeypatch.setattr(match_dense, "_load", load)
    with pytest.raises(InputError, match="cell_size"):
        setup.run(ALL[:1], tmp_path, conf=setup.conf | numbers)


@pytest.mark.parametrize("kind", ["anchored", "quantized"])
def test_references_with_scale_and_orientation(setup: Setup, tmp_path: Path, kind: str) -> None:
    built, _ = setup.run(ALL[:1], tmp_path / "map", tracks=kind)
    plain = tmp_path / "map" / "feats_matches-known.h5"
    wide = tmp_path / "wide.h5"
    with h5py.File(wide, "w") as file:
        for name, arrays in built.items():
            xy = arrays["keypoints"]
            file[f"{name}/keypoints"] = np.column_stack([xy, np.ones(len(xy)), np.full(len(xy), 9)])
    _, expected = setup.run(ALL[:1], tmp_path / "a", tracks=kind, features_ref=plain)
    _, found = setup.run(ALL[:1], tmp_path / "b", tracks=kind, features_ref=wide)
    key = "/".join(ALL[0])
    assert len(rows(expected[key])) > 20
    np.testing.assert_array_equal(found[key]["matches0"], expected[key]["matches0"])
    for bad in (np.zeros((5, 1)), np.zeros(6), np.full((3, 2), np.nan)):
        with h5py.File(wide, "w") as file:
            file[f"{NAMES[0]}/keypoints"] = bad
        with pytest.raises(InputError, match=r"wide\.h5, view_000\.png: keypoints are not finite"):
            setup.run(ALL[:1], tmp_path / "c", tracks=kind, features_ref=wide)


@pytest.mark.parametrize("which", ["feats_matches-known.h5", "matches-known_pairs.h5"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_cut_files_are_named_and_left_as_they_are(
    setup: Setup, tmp_path: Path, which: str, overwrite: bool
) -> None:
    setup.run(ALL[:1], tmp_path)
    data = (tmp_path / which).read_bytes()
    (tmp_path / which).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=which.replace(".", r"\.") + " is cut off or damaged"):
        setup.run(ALL[1:3], tmp_path, overwrite=overwrite)
    assert (tmp_path / which).read_bytes() == data[: len(data) // 2]


@pytest.mark.parametrize("kind", ["anchored", "quantized"])
def test_localisation_gives_each_match_a_keypoint(setup: Setup, tmp_path: Path, kind: str) -> None:
    built = tmp_path / "map"
    reference, _ = setup.run(list(itertools.combinations(NAMES[:4], 2)), built, tracks=kind)
    query = NAMES[4]
    features, matches = setup.run(
        [(query, name) for name in NAMES[:4]],
        tmp_path / "loc",
        tracks=kind,
        max_kps=None,
        features_ref=built / "feats_matches-known.h5",
    )
    assert set(features) == {query}
    xy = features[query]["keypoints"]
    assert len(np.unique(xy, axis=0)) == len(xy)
    total = 0
    for name in NAMES[:4]:
        found = matches[f"{query}/{name}"]
        both = rows(found)
        assert len(np.unique(both[:, 1])) == len(both)
        # Query keypoints are exactly what was matched: nothing is rounded.
        raw = {tuple(point) for point in found["keypoints0"].tolist()}
        assert {tuple(point) for point in xy[both[:, 0]].tolist()} <= raw
        there = reference[name]["keypoints"][both[:, 1]]
        assert np.median(errors(setup, query, name, xy[both[:, 0]], there)) < (
            0.4 if kind == "anchored" else 2.0
        )
        total += len(both)
    assert total > (400 if kind == "anchored" else 100)


def test_a_stopped_run_goes_on(
    setup: Setup,
    anchored: tuple[Path, dict[str, Arrays], dict[str, Arrays]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matcher = synthetic_dense.SyntheticDense
    plain, calls = matcher.warp_batch, []

    def counted(self: Any, pairs: Any, stop: int) -> Any:
        calls.extend(pairs)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return plain(self, pairs)

    monkeypatch.setattr(matcher, "warp_batch", lambda self, pairs: counted(self, pairs, 4))
    with pytest.raises(KeyboardInterrupt):
        setup.run(ALL, tmp_path)
    assert not list(tmp_path.glob("*.h5"))
    calls.clear()
    monkeypatch.setattr(matcher, "warp_batch", lambda self, pairs: counted(self, pairs, 99))
    features, matches = setup.run(ALL, tmp_path)
    assert len(calls) == len(ALL) - 4
    for name in NAMES:
        np.testing.assert_array_equal(features[name]["keypoints"], anchored[1][name]["keypoints"])
    assert set(matches) == set(anchored[2])
    assert not list(tmp_path.glob("*.cache*"))


def test_a_detector_gives_anchors(setup: Setup, tmp_path: Path) -> None:
    options = AnchoredOptions(grid_px=0)
    features, _ = setup.run(ALL[:1], tmp_path, anchors="sift", anchored=options)
    assert all(len(features[name]["keypoints"]) > 50 for name in ALL[0])


def test_what_cannot_be_used_is_said_at_once(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = ALL[:1]
    with pytest.raises(InputError, match="tracks is 'none'; choose anchored or quantized"):
        setup.run(pair, tmp_path, tracks="none")
    with pytest.raises(InputError, match=r"missing\.png"):
        setup.run([(NAMES[0], "missing.png")], tmp_path)
    with pytest.raises(InputError, match=r"The reference features .*none\.h5 do not exist"):
        setup.run(pair, tmp_path, features_ref=Path("none.h5"))
    with pytest.raises(InputError, match="Give both features and matches as paths"):
        setup.run(pair, tmp_path, features=tmp_path / "f.h5")
    with pytest.raises(InputError, match="Give export_dir"):
        setup.run(pair, tmp_path, export_dir=None)
    with pytest.raises(InputError, match=r"the pairs a-b\.png c\.png and a/b\.png c\.png apart"):
        setup.run([("a/b.png", "c.png"), ("a-b.png", "c.png")], tmp_path)
    model = {"name": "gim_hloc_dense", "matcher": "sift"}
    with pytest.raises(InputError, match="sift is a sparse matcher"):
        setup.run(pair, tmp_path, conf=setup.conf | {"model": model})
    with pytest.raises(InputError, match=r"no setting 'sizes'\. Did you mean 'size'"):
        setup.run(pair, tmp_path, conf=setup.conf | {"model": setup.conf["model"] | {"sizes": 1}})
    with pytest.raises(InputError, match="lists no pair"):
        setup.run([], tmp_path)
    with pytest.raises(InputError, match="no model and no max_error and no cell_size"):
        setup.run(pair, tmp_path, conf={"output": "x"})
    with pytest.raises(InputError, match="no name of a model"):
        setup.run(pair, tmp_path, conf=setup.conf | {"model": {}})
    monkeypatch.setitem(__import__("sys").modules, "hloc", None)
    with pytest.raises(InputError, match="hloc is not installed"):
        setup.run(pair, tmp_path, conf=setup.conf | {"model": {"name": "loftr"}})


def test_the_command_takes_hlocs_arguments(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(confs.MATCH_DENSE, "known", setup.conf)
    pairs = setup.pairs(tmp_path / "few.txt", ALL[:1])
    common = ["--pairs", str(pairs), "--image_dir", str(setup.folder / "images"), "--conf", "known"]
    assert match_dense.command([*common, "--export_dir", str(tmp_path), "--anchors", "none"]) == 0
    assert set(read(tmp_path / "feats_matches-known.h5")) == set(ALL[0])
    assert set(read(tmp_path / "matches-known_few.h5")) == {"/".join(ALL[0])}
    paths = ["--features", str(tmp_path / "f.h5"), "--matches", str(tmp_path / "m.h5")]
    assert match_dense.command([*common, *paths, "--tracks", "quantized", "--max_kps", "0"]) == 0
    assert set(read(tmp_path / "m.h5")) == {"/".join(ALL[0])}
    capsys.readouterr()
    assert match_dense.command([*common, *paths[:2]]) == 2
    assert "error: Give both features and matches" in capsys.readouterr().err
