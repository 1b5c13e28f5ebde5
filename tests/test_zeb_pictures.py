"""``gim-zeb worst``: colours by the true error, the right pairs, what is missing is named."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gim_hloc.cache import Cache
from gim_hloc.cli.zeb import main
from gim_hloc.errors import InputError
from gim_hloc.evaluation.dumps import Dump, DumpRecord, write_dump
from gim_hloc.evaluation.options import PictureOptions
from gim_hloc.evaluation.predictions import Prediction
from gim_hloc.evaluation.zeb import pictures
from gim_hloc.evaluation.zeb.datasets import ZebPair, find_root, find_set
from gim_hloc.evaluation.zeb.pictures import draw_worst
from gim_hloc.evaluation.zeb.run import ZebPairs

SIZE = (160, 120)
FOCAL = 100.0
# Motion along x: epipolar lines are rows.
POSE = np.eye(4)
POSE[0, 3] = 1.0
GREEN, RED = (0, 158, 115), (213, 94, 0)


def identifier(i: int) -> str:
    return f"s#{i:04d}#{i + 1:04d}"


@pytest.fixture
def zeb(tmp_path: Path) -> Path:
    """Five black images in a row, four pairs."""
    folder = tmp_path / "data" / "zeb" / "gl3d"
    folder.mkdir(parents=True)
    K = f"{FOCAL} 0 79.5 0 {FOCAL} 59.5 0 0 1"
    pose = " ".join(str(v) for v in POSE.ravel())
    for i in range(5):
        Image.new("RGB", SIZE, (0, 0, i)).save(folder / f"s_{i:04d}.png")
        if i < 4:
            text = f"{i:04d}.jpg {i + 1:04d}.jpg 0.5 0.5 {K} {K} {pose}"
            (folder / f"s_{i:04d}_{i + 1:04d}.txt").write_text(text)
    return tmp_path / "data"


def prediction(points0: list[Any], points1: list[Any]) -> Prediction:
    return Prediction(
        points0=np.array(points0, np.float32).reshape(-1, 2),
        points1=np.array(points1, np.float32).reshape(-1, 2),
        scores=np.ones(len(points0), np.float32),
        size0=SIZE,
        size1=SIZE,
    )


Write = Callable[..., Path]


@pytest.fixture
def write(zeb: Path, tmp_path: Path) -> Write:
    def made(matcher: str, errors: list[float], *, matches: bool = True) -> Path:
        out = tmp_path / "run"
        records = tuple(
            DumpRecord(
                identifier=identifier(i), covisible0=0.5, covisible1=0.5,
                rotation_error=error, translation_error=error, translation_distance=error,
                precision_before=0.5, correct_before=1, precision_after=1.0, correct_after=1,
            )
            for i, error in enumerate(errors)
        )  # fmt: skip
        if matches:
            known = prediction([(30, 40), (110, 90)], [(30, 40), (110, 30)])
            keep(zeb, out, matcher, {r.identifier: known for r in records})
        return write_dump(
            out / "dump" / "gim",
            Dump(matcher=matcher, dataset="GL3D", version="base", records=records),
        )

    return made


def keep(zeb: Path, out: Path, matcher: str, known: dict[str, Prediction]) -> None:
    """Keep matches as a run does, in place of what was there."""
    root = find_root(zeb)
    keys = ZebPairs.read(root, find_set("GL3D")).keys()
    path = out / "predictions" / f"{matcher}-01234567.db"
    path.unlink(missing_ok=True)
    with Cache(path) as kept:
        for name, found in known.items():
            kept.put(keys[name], found.to_arrays())


def pair(pose: np.ndarray = POSE) -> ZebPair:
    K = np.array([[FOCAL, 0, 79.5], [0, FOCAL, 59.5], [0, 0, 1.0]])
    return ZebPair(
        identifier="s#0#1", scene="s", image0="a", image1="b", covisible0=0.5, covisible1=0.5,
        K0=K, K1=K, T_0to1=pose, label="x",
    )  # fmt: skip


def test_errors_are_pixels_from_the_true_epipolar_lines() -> None:
    found = pictures.match_errors(
        prediction([(10, 20), (30, 40), (5, 5)], [(90, 20), (3, 43), (6, 0)]), pair()
    )
    np.testing.assert_allclose(found, [0, 3, 5], atol=1e-5)
    still = pictures.match_errors(prediction([(1, 1)], [(2, 2)]), pair(np.eye(4)))
    assert np.isnan(still).all()


def test_matches_are_drawn_where_they_are(zeb: Path, write: Write, tmp_path: Path) -> None:
    path = write("one", [10, 1, 2, 3])
    options = PictureOptions(count=1, side=SIZE[0], lines=0)
    report = draw_worst(zeb, [path], tmp_path / "out", options=options)
    (entry,) = report.lists
    assert entry.title == "Worst pairs of one (base)"
    picture = np.asarray(Image.open(entry.files[0])).astype(int)
    dark = np.flatnonzero((picture.max(2) < 60).sum(1) > 150)  # rows of the black images
    top = dark.min()
    left = np.flatnonzero((picture[dark].max(2) < 60).mean(0) > 0.5).min()
    below = top + SIZE[1] + 4
    for (x, y), row, colour in (
        ((30, 40), top, GREEN), ((30, 40), below, GREEN),
        ((110, 90), top, RED), ((110, 30), below, RED),
    ):  # fmt: skip
        np.testing.assert_allclose(picture[row + y, left + x], colour, atol=40)  # JPEG


def test_worst_and_most_different_pairs(zeb: Path, write: Write, tmp_path: Path) -> None:
    # By pair: both good, a better, b better, both useless though by far not equally.
    write("a", [1, 2, 50, math.inf])
    write("b", [1, 15, 3, 30])
    out = tmp_path / "out"
    dumps = tmp_path / "run" / "dump" / "gim"
    options = PictureOptions(count=2, side=64)
    report = draw_worst(zeb, [dumps], out, matchers=("b", "a"), options=options)
    numbers = {
        entry.title: [re.findall(r"s_(\d+)_", path.name)[0] for path in entry.files]
        for entry in report.lists
    }
    assert numbers == {
        "b (base) is better": ["0002"],
        "a (base) is better": ["0001"],
        "Worst pairs of b (base)": ["0003", "0001"],
        "Worst pairs of a (base)": ["0003", "0002"],
    }
    assert report.pictures == 3
    page = report.index.read_text()
    assert "a (base): no pose; 1 of 2 matches correct, 1 of 1 inliers" in page
    assert "b (base): error 30.00° (R 30.00°, t 30.00°)" in page
    for link in re.findall(r'src="([^"]+)"', page):
        assert (out / link).is_file()


def test_missing_images_and_labels_do_not_stop_the_rest(
    zeb: Path, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write("a", [1, 2, 3, 4])
    (zeb / "zeb" / "gl3d" / "s_0004.png").unlink()
    (zeb / "zeb" / "gl3d" / "s_0000_0001.txt").unlink()
    out = tmp_path / "out"
    # More pairs are asked for than there are.
    assert main(["worst", str(zeb), str(path), "--out", str(out), "--count", "9"]) == 1
    printed = capsys.readouterr()
    assert "GL3D s#0003#0004: " in printed.err
    assert "s_0004.png" in printed.err
    assert "no usable label" in printed.err
    assert "index.html: 2 pictures" in printed.out
    assert "no usable label" in (out / "index.html").read_text()


def test_bad_inputs_are_named(zeb: Path, write: Write, tmp_path: Path) -> None:
    none = write("none", [1, 2, 3, 4], matches=False)
    with pytest.raises(InputError, match="Predictions of one setting of none are needed"):
        draw_worst(zeb, [none], tmp_path / "out")
    for name in "abc":
        write(name, [1, 2, 3, 4])
    folder = none.parent
    with pytest.raises(InputError, match="GL3D has 4"):
        draw_worst(zeb, [folder], tmp_path / "out")
    with pytest.raises(InputError, match="no dump of these matchers"):
        draw_worst(zeb, [folder], tmp_path / "out", matchers=("d",))
    with pytest.raises(InputError, match="no dump of these matchers"):
        draw_worst(zeb, [folder], tmp_path / "out", sets=("KITTI",))
    with pytest.raises(InputError, match="count is 0; it must be at least 1"):
        PictureOptions(count=0)
    # One of the two has no matches: nothing to compare, and the reason is told.
    with pytest.raises(InputError, match="setting of none"):
        draw_worst(zeb, [folder], tmp_path / "out", matchers=("a", "none"))


def test_matchers_without_common_pairs_or_dumps_are_told(
    zeb: Path, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("a", [1, 2, 3, 4])
    path = write("b", [1, 2, 3, 4])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *lines[3:]]) + "\n")
    first = next(path.parent.glob("* a *"))
    first.write_text("\n".join(lines[:3]) + "\n")
    command = ["worst", str(zeb), str(path.parent), "--out", str(tmp_path / "out"), "--matchers"]
    assert main([*command, "a", "b"]) == 1
    assert capsys.readouterr().err.count("a (base) and b (base) share no pair") == 1
    assert "share no pair" in (tmp_path / "out" / "index.html").read_text()
    assert main([*command, "a"]) == 0
    assert main([*command, "a", "ab"]) == 1  # a slip of the pen is not the wish for one matcher
    assert "There is no dump of ab" in capsys.readouterr().err


def test_dumps_of_two_runs(zeb: Path, write: Write, tmp_path: Path) -> None:
    path = write("a", [1, 2, 3, 4])
    second = tmp_path / "again"
    shutil.copytree(tmp_path / "run", second)
    report = draw_worst(zeb, [path, second / "dump" / "gim"], tmp_path / "out")
    assert len({entry.title for entry in report.lists}) == 4
    # Too near to the root for a run to lie above it.
    assert pictures._run_folder(Path("/[T]/[T] a GL3D v.txt")) == Path("/")
    assert pictures._run_folder(path) == tmp_path / "run"


def test_a_pair_that_one_matcher_could_not_match_is_drawn(
    zeb: Path, write: Write, tmp_path: Path
) -> None:
    write("a", [1, 2, 3, 4])
    folder = write("b", [1, 2, 3, math.inf]).parent
    some = {identifier(i): prediction([(1, 1)], [(9, 1)]) for i in range(3)}
    keep(zeb, tmp_path / "run", "b", some)
    options = PictureOptions(count=1, side=64)
    report = draw_worst(zeb, [folder], tmp_path / "out", options=options)
    assert not report.problems
    assert len(report.lists[0].files) == 1
