"""``gim-zeb make``: overlaps and labels of scenes that are known, names, damaged inputs."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gim_hloc import colmap
from gim_hloc.cli.zeb import main
from gim_hloc.errors import InputError, OutputError
from gim_hloc.evaluation.options import MakeOptions
from gim_hloc.evaluation.zeb import datasets, make
from gim_hloc.evaluation.zeb.make import make_set

SHARED = Path(__file__).parents[2] / "shared" / "data"
SIZE = (80, 60)
FOCAL = 80.0
WALL = 5.0  # depth of the wall in front of all cameras
WIDE = WALL * SIZE[0] / FOCAL  # of what a camera sees of it


def write_model(
    folder: Path,
    names: Sequence[str],
    shifts: Sequence[float],
    *,
    points: np.ndarray | None = None,
    camera: str = f"PINHOLE {SIZE[0]} {SIZE[1]} {FOCAL} {FOCAL} 40 30",
    hidden: Collection[tuple[int, int]] = (),
) -> Path:
    """A text model of cameras that look along z, moved along x; each sees the points in its image.

    Points in ``hidden`` (image, row of points) are not observed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cameras.txt").write_text(f"1 {camera}\n")
    points = np.zeros((0, 3)) if points is None else points
    tracks: list[list[str]] = [[] for _ in points]
    lines = []
    for i, (name, shift) in enumerate(zip(names, shifts, strict=True)):
        local = points - [shift, 0, 0]
        xy = local[:, :2] / local[:, 2:] * FOCAL + [40, 30]
        seen = np.flatnonzero(((xy > 0) & (xy < SIZE)).all(1))
        seen = [k for k in seen if (i, k) not in hidden]
        lines += [
            f"{i + 1} 1 0 0 0 {-shift} 0 0 1 {name}",
            " ".join(f"{xy[k, 0]} {xy[k, 1]} {k + 1}" for k in seen),
        ]
        for column, k in enumerate(seen):
            tracks[k] += [str(i + 1), str(column)]
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    rows = [
        f"{k + 1} {x} {y} {z} 9 9 9 0.1 {' '.join(track)}"
        for k, ((x, y, z), track) in enumerate(zip(points, tracks, strict=True))
        if track
    ]
    (folder / "points3D.txt").write_text("".join(row + "\n" for row in rows))
    return folder


def write_images(folder: Path, names: Sequence[str], size: tuple[int, int] = SIZE) -> Path:
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def wall(step: float = 0.06) -> np.ndarray:
    x, y = np.meshgrid(np.arange(-4, 9, step), np.arange(-1.9, 1.9, step))
    return np.column_stack([x.ravel(), y.ravel(), np.full(x.size, WALL)])


NAMES = ("a.png", "b.png", "c.png", "d.png")
SHIFTS = (0.0, 1.0, 2.5, 4.7)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", NAMES, SHIFTS, points=wall())


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", NAMES)


OPTIONS = MakeOptions(name="mine", min_overlap=0.01)


def labels(made: make.MadeSet) -> dict[str, datasets.ZebPair]:
    found = datasets.read_labels(made.folder.parent, made.zeb_set)
    assert not found.bad
    return {pair.identifier: pair for pair in found.pairs}


# ------------------------------------------------------------------------------------------ overlap


def expected(i: int, j: int) -> float:
    return max(0.0, 1 - abs(SHIFTS[i] - SHIFTS[j]) / WIDE)


def test_overlap_is_what_the_cameras_share_of_the_wall(
    model: Path, images: Path, tmp_path: Path
) -> None:
    made = make_set(model, images, tmp_path / "out", OPTIONS)
    assert made.from_points
    pairs = labels(made)
    for i in range(4):
        for j in range(i + 1, 4):
            key = f"mine#{NAMES[i][0]}#{NAMES[j][0]}"
            if expected(i, j) < 0.01:
                assert key not in pairs
                continue
            assert pairs[key].covisible0 == pytest.approx(expected(i, j), abs=0.03)
            assert pairs[key].covisible0 == pairs[key].covisible1


def test_broken_tracks_do_not_lower_the_overlap(images: Path, tmp_path: Path) -> None:
    # b observes every second point only: what it sees is the same.
    hidden = {(1, k) for k in range(0, len(wall()), 2)}
    model = write_model(tmp_path / "m", NAMES, SHIFTS, points=wall(), hidden=hidden)
    pairs = labels(make_set(model, images, tmp_path / "out", OPTIONS))
    assert pairs["mine#a#b"].covisible0 == pytest.approx(expected(0, 1), abs=0.04)


def test_overlap_from_poses_at_the_given_depth(images: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", NAMES, SHIFTS)
    with pytest.raises(InputError, match=r"--depth NEAR FAR"):  # they look past each other
        make_set(model, images, tmp_path / "out", OPTIONS)
    options = MakeOptions(name="mine", min_overlap=0.01, depth=(WALL, WALL))
    made = make_set(model, images, tmp_path / "out", options)
    assert not made.from_points
    assert labels(made)["mine#a#c"].covisible0 == pytest.approx(expected(0, 2), abs=0.04)


def test_what_is_behind_something_is_not_seen(images: Path, tmp_path: Path) -> None:
    # A board before camera b hides the wall behind it; a sees the wall at that place.
    x, y = np.meshgrid(np.arange(0.6, 1.4, 0.02), np.arange(-0.75, 0.75, 0.02))
    board = np.column_stack([x.ravel(), y.ravel(), np.full(x.size, 2.0)])
    back = wall()
    points = np.concatenate([back, board])
    # In b, the board covers 32 of 80 columns (its x is -0.4 to 0.4 at depth 2).
    at_b = (back[:, 0] - 1.0) / WALL * FOCAL
    hidden = {(1, k) for k in np.flatnonzero(np.abs(at_b) < 16)}
    # In a it covers other places.
    at_a = back[:, 0] / WALL * FOCAL
    hidden |= {(0, k) for k in np.flatnonzero((at_a > 24) & (at_a < 56))}
    model = write_model(tmp_path / "m", NAMES[:2], SHIFTS[:2], points=points, hidden=hidden)
    with_board = labels(make_set(model, images, tmp_path / "one", OPTIONS))["mine#a#b"].covisible0
    plain = write_model(tmp_path / "p", NAMES[:2], SHIFTS[:2], points=back)
    without = labels(make_set(plain, images, tmp_path / "two", OPTIONS))["mine#a#b"].covisible0
    assert without == pytest.approx(0.8, abs=0.03)
    # Of the 64 shared columns of the wall, b does not see up to 32, a is spared a few.
    assert with_board < without - 0.15


def test_bins_are_filled_alike_and_by_the_seed(images: Path, tmp_path: Path) -> None:
    names = [f"{i:02d}.png" for i in range(12)]
    write_images(images, names)
    model = write_model(tmp_path / "m", names, np.linspace(0, 4.6, 12).tolist(), points=wall(0.2))
    found = []
    for run, seed in enumerate((0, 0, 1)):
        options = MakeOptions(name="mine", pairs_per_bin=3, seed=seed)
        made = make_set(model, images, tmp_path / f"out{run}", options)
        assert sum(part.taken for part in made.bins) == made.pairs == len(labels(made))
        assert all(part.taken == min(3, part.found) for part in made.bins)
        assert all(p.covisible0 >= 0.1 for p in labels(made).values())
        found.append(sorted(labels(made)))
    assert found[0] == found[1]
    assert found[0] != found[2]
    everything = MakeOptions(name="mine", pairs_per_bin=0, min_overlap=0.5, max_overlap=0.7)
    made = make_set(model, images, tmp_path / "all", everything)
    assert {(part.low, part.found - part.taken) for part in made.bins} == {(0.5, 0), (0.6, 0)}


# ------------------------------------------------------------------------------------------- labels


def test_labels_have_the_pose_and_the_principal_point_between_pixels(
    model: Path, images: Path, tmp_path: Path
) -> None:
    made = make_set(model, images, tmp_path / "out", OPTIONS)
    pair = labels(made)["mine#a#b"]
    # COLMAP's (40, 30) has its origin at the corner of the first pixel.
    np.testing.assert_allclose(pair.K0, [[FOCAL, 0, 39.5], [0, FOCAL, 29.5], [0, 0, 1]])
    np.testing.assert_allclose(pair.T_0to1[:3, 3], [-1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(pair.T_0to1[:3, :3], np.eye(3), atol=1e-12)
    line = (made.folder / pair.label).read_text().split()
    assert len(line) == 38
    stored = np.asarray(Image.open(made.folder / pair.image0))
    np.testing.assert_array_equal(stored, np.asarray(Image.open(images / "a.png")))


def test_reduced_images_have_the_reduced_calibration(
    model: Path, images: Path, tmp_path: Path
) -> None:
    options = MakeOptions(name="mine", min_overlap=0.01, max_size=40)
    made = make_set(model, images, tmp_path / "out", options)
    pair = labels(made)["mine#a#b"]
    np.testing.assert_allclose(pair.K1, [[40, 0, 19.5], [0, 40, 14.5], [0, 0, 1]])
    assert Image.open(made.folder / pair.image1).size == (40, 30)


def test_distortion_is_taken_out(tmp_path: Path) -> None:
    # A white dot where the distorted camera sees a direction must lie where K sees it.
    size, params = (200, 150), (180.0, 100.0, 75.0, -0.2)
    ray = np.array([0.3, -0.2])
    at = ray * (1 + params[3] * (ray @ ray)) * params[0] + params[1:3] - 0.5
    y, x = np.mgrid[: size[1], : size[0]]
    dot = 255 * np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / 8)
    images = tmp_path / "images"
    images.mkdir()
    for i, name in enumerate(("a.png", "b.png")):
        picture = np.rint(dot).astype(np.uint8).repeat(3).reshape(*dot.shape, 3)
        picture[0, 0] = i  # not the same bytes
        Image.fromarray(picture).save(images / name)
    camera = f"SIMPLE_RADIAL {size[0]} {size[1]} {' '.join(map(str, params))}"
    model = write_model(tmp_path / "m", ("a.png", "b.png"), (0.0, 1.0), camera=camera)
    options = MakeOptions(name="mine", depth=(5.0, 5.0))
    made = make_set(model, images, tmp_path / "out", options)
    (pair,) = labels(made).values()
    seen = np.asarray(Image.open(made.folder / pair.image0).convert("L"), dtype=np.float64)
    rows, columns = np.mgrid[: seen.shape[0], : seen.shape[1]]
    centre = [(seen * grid).sum() / seen.sum() for grid in (columns, rows)]
    expected_px = pair.K0[:2, :2] @ ray + pair.K0[:2, 2]
    assert np.linalg.norm(expected_px - at) > 1  # the distortion is worth the test
    np.testing.assert_allclose(centre, expected_px, atol=0.1)


def test_binary_models_give_the_same_set(model: Path, images: Path, tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.mkdir()
    colmap.read_model(model).write_binary(str(binary))
    one = make_set(model, images, tmp_path / "one", OPTIONS)
    two = make_set(binary, images, tmp_path / "two", OPTIONS)
    assert sorted(labels(one)) == sorted(labels(two))


# -------------------------------------------------------------------------------------------- names


def test_names_in_files() -> None:
    stems = make.file_stems(
        ["left/1.jpg", "left-1.png", "left_1.JPG", "LEFT/1.jpg", "a b#c.png", "übung.tif", "v1.2"]
    )
    assert stems["a b#c.png"] == "a_b_c"
    assert stems["übung.tif"] == "übung"
    assert stems["v1.2"] == "v1.2"  # no image's suffix
    assert sorted(stems[n].casefold() for n in ("left/1.jpg", "left-1.png", "LEFT/1.jpg")) == [
        "left_1", "left_1_2", "left_1_3",
    ]  # fmt: skip


@given(st.lists(st.text(min_size=1, max_size=120), unique=True, max_size=12))
def test_no_two_images_share_a_file(names: list[str]) -> None:
    stems = make.file_stems(names)
    assert len({stem.casefold() for stem in stems.values()}) == len(names)
    for stem in stems.values():
        assert "-" not in stem
        assert "/" not in stem
        assert not any(character.isspace() for character in stem)
        assert len(stem.encode()) < 100


def test_sub_folders_blanks_and_twins(tmp_path: Path) -> None:
    names = ("left/1.png", "right/1.png", "left-1.png", "my photo.png")
    images = write_images(tmp_path / "images", names)
    model = write_model(tmp_path / "m", names, (0.0, 0.5, 1.0, 1.5), points=wall(0.2))
    made = make_set(model, images, tmp_path / "out", OPTIONS)
    assert made.pairs == len(labels(made)) == 6
    described = json.loads((made.folder / "set.json").read_text())
    stored = described["scenes"]["mine"]["images"]
    assert sorted(stored.values()) == sorted(names)
    for stem, name in stored.items():
        own = np.asarray(Image.open(made.folder / f"mine-{stem}.png"))
        np.testing.assert_array_equal(own, np.asarray(Image.open(images / name)))
    checked = datasets.verify(tmp_path / "out")
    assert checked.complete
    assert checked.sets[0].images == 4


# ---------------------------------------------------------------------------------------- the set


def test_scenes_are_added(model: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = make_set(model, images, out, MakeOptions(name="Both", scene="one"))
    with pytest.raises(OutputError, match="set already"):
        make_set(model, images, out, MakeOptions(name="Both", scene="two"))
    with pytest.raises(OutputError, match="scene one already"):
        make_set(model, images, out, MakeOptions(name="Both", scene="one", add=True))
    second = make_set(model, images, out, MakeOptions(name="Both", scene="two", add=True))
    assert first.folder == second.folder == out / "zeb" / "both"
    assert second.zeb_set.pairs == 2 * first.pairs
    assert second.zeb_set.scenes == 2
    assert {pair.scene for pair in labels(second).values()} == {"one", "two"}
    with pytest.raises(OutputError, match="no set that a scene"):
        make_set(model, images, out, MakeOptions(name="other", add=True))


def test_a_set_that_was_not_finished_is_none(model: Path, images: Path, tmp_path: Path) -> None:
    made = make_set(model, images, tmp_path / "out", OPTIONS)
    (made.folder / "set.json").unlink()
    with pytest.raises(InputError, match="no folder of a ZEB set"):
        datasets.find_root(tmp_path / "out")
    with pytest.raises(OutputError, match="was not finished"):
        make_set(model, images, tmp_path / "out", OPTIONS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "does not describe a set"),
        ('{"separator": "-"}', "'name' is missing"),
        ('{"name": "other"}', "must be named other"),
        ('{"name": "mine", "separator": "#"}', "neither - nor _"),
        ('{"name": "mine", "pad_ratio": 1.5}', "needs img_size"),
        ('{"name": "mine", "scenes": 3}', "does not describe a set"),
    ],
)
def test_damaged_descriptions_are_named(tmp_path: Path, text: str, message: str) -> None:
    folder = tmp_path / "zeb" / "mine"
    folder.mkdir(parents=True)
    (folder / "set.json").write_text(text)
    with pytest.raises(InputError, match=message):
        datasets.present_sets(tmp_path)


def test_a_description_by_hand_needs_a_name_only(model: Path, images: Path, tmp_path: Path) -> None:
    made = make_set(model, images, tmp_path / "out", OPTIONS)
    (made.folder / "set.json").write_text('{"name": "Mine"}')
    (found,) = datasets.present_sets(tmp_path / "out")
    assert (found.pairs, found.scenes) == (made.pairs, 1)
    assert datasets.verify(tmp_path / "out").complete


# --------------------------------------------------------------------------------------- bad inputs


def test_names_of_sets_and_scenes_that_cannot_be() -> None:
    for name in ("GTA-SfM", "kit", "my set", "../x", ""):
        with pytest.raises(InputError):
            MakeOptions(name=name)
    with pytest.raises(InputError, match="name of a scene"):
        MakeOptions(name="mine", scene="a-b")
    assert MakeOptions(name="my-house").scene_name == "my_house"
    with pytest.raises(InputError, match="no range"):
        MakeOptions(name="mine", min_overlap=0.5, max_overlap=0.5)


def test_unusable_images_are_named_and_the_rest_is_made(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "a.png").unlink()
    write_images(images, ["d.png"], size=(40, 30))
    out = tmp_path / "out"
    assert main(["make", str(model), str(images), str(out), "--set", "mine"]) == 1
    printed = capsys.readouterr()
    assert "a.png is not in" in printed.err
    assert "d.png is 40x30, its camera 80x60" in printed.err
    assert "1 pairs of 2 images, overlaps from the model's points; 2 images left out" in printed.out
    (images / "b.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"1 of the 4 images .* usable state"):
        make_set(model, images, tmp_path / "other", OPTIONS)


def test_bad_inputs_are_named(images: Path, model: Path, tmp_path: Path) -> None:
    empty = write_model(tmp_path / "empty", (), ())
    with pytest.raises(InputError, match="0 registered images"):
        make_set(empty, images, tmp_path / "out", OPTIONS)
    with pytest.raises(InputError, match="no COLMAP model"):
        make_set(tmp_path, images, tmp_path / "out", OPTIONS)
    with pytest.raises(InputError, match="does not exist"):
        make_set(model, tmp_path / "nowhere", tmp_path / "out", OPTIONS)
    with pytest.raises(InputError, match="seed is -1"):
        MakeOptions(name="mine", seed=-1)
    high = MakeOptions(name="mine", min_overlap=0.95)
    with pytest.raises(InputError, match=r"None of the 6 pairs .* largest is that of a\.png and"):
        make_set(model, images, tmp_path / "out", high)
    same = write_model(tmp_path / "same", NAMES[:2], (1.0, 1.0), points=wall(0.2))
    with pytest.raises(InputError, match="None of the 1 pairs"):
        make_set(same, images, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------- real images


@pytest.mark.skipif(not (SHARED / "fountain-P11").is_dir(), reason="needs ../shared/data")
def test_fountain_is_made_run_checked_and_tabled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = SHARED / "fountain-P11", tmp_path / "run"
    made = ["make", str(source / "gt"), str(source / "images"), str(tmp_path), "--set", "Fountain"]
    assert main([*made, "--max-size", "400", "--pairs-per-bin", "2", "--min-overlap", "0.6"]) == 0
    assert "assumed depths" in capsys.readouterr().out
    assert main(["run", str(tmp_path), "--out", str(out), "--matchers", "root_sift"]) == 0
    assert "root_sift on Fountain (gim): 8 of 8 pairs, 0 failed" in capsys.readouterr().out
    dumps = str(out / "dump" / "gim")
    assert main(["check", dumps]) == 0
    assert main(["check", dumps, "--sets", "Fountain"]) == 0
    assert capsys.readouterr().out.count("Good Fountain: 1 file, 8 pairs") == 2
    table = tmp_path / "table.csv"
    assert main(["table", dumps, "--out", str(table)]) == 0
    row = next(line for line in table.read_text().splitlines() if ",Fountain," in line)
    assert float(row.split(",")[6]) > 0.6  # AUC@5: neighbours of a fountain are easy
    assert main(["data", str(tmp_path)]) == 0
