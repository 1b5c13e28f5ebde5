"""Videos as input of a reconstruction: their frames, cameras and pairs, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import fake_matcher
import numpy as np
import pycolmap
import pytest
import yaml
from PIL import Image
from synthetic import HEIGHT, INTRINSICS, WIDTH, camera_errors, make_scene, record
from video_files import turn_container, write_video

import gim_hloc
from gim_hloc import colmap
from gim_hloc.cli.reconstruct import main
from gim_hloc.errors import InputError, OutputError
from gim_hloc.images import read_rgb
from gim_hloc.options import CameraOptions, PairOptions, VideoOptions
from gim_hloc.pairs.select import plan
from gim_hloc.pipelines import videos
from gim_hloc.pipelines.reconstruct import ReconstructResult

pytest.importorskip("av", reason="PyAV reads videos")
fake_matcher.register()
pytestmark = pytest.mark.usefixtures("no_charts")


def moving(
    path: Path,
    frames: int = 8,
    *,
    step: int = 12,
    seed: int = 0,
    size: tuple[int, int] = (160, 96),
    rate: int = 2,
    stamps: Sequence[int] | None = None,
) -> Path:
    """A video of a texture that moves ``step`` pixels a frame."""
    width, height = size
    noise = np.random.default_rng(seed).uniform(0, 255, (height // 4, width, 3)).astype(np.float32)
    texture = cv2.resize(noise, (4 * width, height), interpolation=cv2.INTER_CUBIC)
    texture = texture.clip(0, 255).astype(np.uint8)
    views = [texture[:, step * n : step * n + width] for n in range(frames)]
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_video(path, views, rate=Fraction(rate), stamps=stamps)


def run(source: Path, output: Path, **options: Any) -> ReconstructResult:
    fixed = {"matcher": "fake", "rescue": "none", "deterministic": True}
    return gim_hloc.reconstruct(source, output, progress=False, **{**fixed, **options})


def frames_only(source: Path, output: Path, **options: Any) -> list[str]:
    """Names of the images that a run takes from videos."""
    run(source, output, stop_after="frames", **options)
    return sorted(str(p.relative_to(output / "images")) for p in (output / "images").rglob("*.jpg"))


# ---------------------------------------------------------------------------------- from end to end


@pytest.fixture(scope="module")
def scene() -> Iterator[fake_matcher.Scene]:
    """What the fake matcher sees in the frames of phone.mp4, and again in those of more.mp4."""
    found, again = (
        make_scene(names=[f"{name}_{n:06d}.jpg" for n in range(8)], points=200)
        for name in ("phone", "more")
    )
    found.keypoints |= again.keypoints
    found.points |= again.points
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_matcher, "SCENE", found)
        yield found


@pytest.fixture(scope="module")
def phone(scene: fake_matcher.Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``in/phone.mp4``, and ``out``, which the command made of it."""
    root = tmp_path_factory.mktemp("phone")
    video = moving(root / "in" / "phone.mp4", size=(WIDTH, HEIGHT), step=60)
    command = [str(video), str(root / "out"), "--export", "3dgs", "--matcher", "fake"]
    command += ["--rescue", "none", "--no-refine-keypoints", "--quiet", "--intrinsics", INTRINSICS]
    assert main(command) == 0
    return root


def test_a_video_becomes_a_3dgs_folder(scene: fake_matcher.Scene, phone: Path) -> None:
    video, out = phone / "in" / "phone.mp4", phone / "out"
    assert os.listdir(phone / "in") == ["phone.mp4"]
    rotation, centre = camera_errors(
        colmap.poses_of(colmap.read_model(out / "sparse/0")), scene.poses
    )
    assert rotation < 0.01
    assert centre < 1e-3
    handed = pycolmap.Reconstruction(out / "export/0/3dgs/sparse/0")
    assert {str(c.model_name) for c in handed.cameras.values()} == {"PINHOLE"}
    names = {image.name for image in handed.images.values()}
    assert names == {f"phone_{n:06d}.jpg" for n in range(8)}
    assert names == set(os.listdir(out / "export/0/3dgs/images"))
    state = yaml.safe_load((out / "run.yaml").read_text())
    assert state["images"] == str(out / "images")
    assert {f"images/{name}" for name in scene.names} <= state["files"].keys()
    rows = (out / "images/frames.csv").read_text().splitlines()
    assert rows[3].startswith("phone_000002.jpg,2,1.000000,")
    # The same command reads no frame again, and pairs are those of a sequence.
    before = {path: path.stat().st_mtime_ns for path in (out / "images").rglob("*.jpg")}
    run(video, out, stop_after="pairs", deterministic=False)
    assert before == {path: path.stat().st_mtime_ns for path in (out / "images").rglob("*.jpg")}
    assert (out / "pairs.txt").read_text().count("phone_") == 2 * 28
    report = json.loads((out / "report.json").read_text())
    assert "phone.mp4: 8 of 8 frames used." in report["notes"]


@pytest.mark.weights
def test_the_room_as_a_video(room: Path, tmp_path: Path) -> None:
    """Real matches through a real codec, against the poses that the room was rendered with."""
    shots = sorted((room / "images").iterdir())[:4]
    views = [read_rgb(path, max_size=480) for path in shots]
    video = write_video(tmp_path / "room.mp4", views, rate=Fraction(2), quality=10)
    result = run(video, tmp_path / "out", matcher="xfeat", quality="fast", refine_keypoints=False)
    truth = colmap.poses_of(colmap.read_model(room / "gt"))
    found = colmap.poses_of(result.model())
    assert result.registered == 4
    named = {path.name: found[f"room_{n:06d}.jpg"] for n, path in enumerate(shots)}
    assert camera_errors(named, truth)[0] < 1.0


def test_a_run_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    moving(folder / "a.mp4")
    moving(folder / "b.mp4", seed=1)
    original = videos.choose_frames

    def dies(source: Any, *args: Any, **kwargs: Any) -> Any:
        if source.path.name == "b.mp4":
            raise KeyboardInterrupt
        return original(source, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(videos, "choose_frames", dies)
        with pytest.raises(KeyboardInterrupt):
            frames_only(folder, out)
    first = out / "images" / "a" / "000000.jpg"
    made = first.stat().st_mtime_ns
    assert len(frames_only(folder, out)) == 16
    assert first.stat().st_mtime_ns == made
    # A frame that is gone, and other settings: the frames are made anew, and no old one is left.
    first.unlink()
    assert len(frames_only(folder, out)) == 16
    assert len(frames_only(folder, out, video=VideoOptions(fps=1))) == 8
    assert len(frames_only(folder, out, overwrite=True, start="frames")) == 16
    # Frames go with their video.
    (folder / "b.mp4").unlink()
    run(folder, out, stop_after="pairs")
    assert os.listdir(out / "images") == ["a"]


# ------------------------------------------------------------------------------------- many sources


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Photographs, two videos, one of them twice, a Live Photo and a file that is no video."""
    folder = tmp_path / "in"
    moving(folder / "walk.mp4")
    moving(folder / "sub" / "drive.mov", frames=5, seed=1)
    shutil.copy(folder / "walk.mp4", folder / "walk.mov")
    for n in range(2):
        pixels = np.random.default_rng(n).integers(0, 255, (96, 160, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"IMG_{n}.jpg")
    moving(folder / "IMG_1.mov", seed=2)
    (folder / "notes.mp4").write_text("no video at all")
    return folder


def test_photographs_and_videos_are_one_set(
    mixed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    before = sorted(mixed.rglob("*"))
    run(mixed, out, stop_after="pairs")
    assert sorted(mixed.rglob("*")) == before
    images = {str(p.relative_to(out / "images")) for p in (out / "images").rglob("*.jpg")}
    walk = {f"walk/{n:06d}.jpg" for n in range(8)}
    drive = {f"sub/drive/{n:06d}.jpg" for n in range(5)}
    assert images == {"IMG_0.jpg", "IMG_1.jpg", *walk, *drive}
    assert (out / "images/IMG_0.jpg").samefile(mixed / "IMG_0.jpg")
    assert "IMG_1.mov is passed over as a moving version of IMG_1.jpg" in caplog.text
    assert "Left out: walk.mp4 (duplicate: same frames as walk.mov)" in caplog.text
    assert "Left out: notes.mp4 (unreadable:" in caplog.text


def test_videos_of_one_stem_have_folders_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    moving(folder / "a.mkv")
    moving(folder / "a.mp4", seed=1)
    names = frames_only(folder, tmp_path / "out")
    assert {name.split("/")[0] for name in names} == {"a", "a_mp4"}


def test_each_video_has_its_own_camera() -> None:
    records = [record(f"{video}/{n}.jpg", video=video) for video in "ab" for n in range(2)]
    cameras, _ = colmap.assign_cameras([*records, record("photo.jpg")], CameraOptions())
    assert [len(spec.names) for spec in cameras] == [2, 2, 1]
    single, _ = colmap.assign_cameras(records, CameraOptions(camera_mode="single"))
    assert len(single) == 1


def test_frames_are_paired_as_a_sequence() -> None:
    frames, photographs = [f"a/{n}.jpg" for n in range(9)], [f"{n:x}.jpg" for n in range(90)]
    modes = {
        count: plan(PairOptions(), [*frames, *photographs[:count]], frames).mode
        for count in (0, 9, 90)
    }
    assert modes == {0: "sequential+retrieval", 9: "exhaustive", 90: "sequential+retrieval"}
    assert plan(PairOptions(mode="exhaustive"), frames, frames).mode == "exhaustive"


# ------------------------------------------------------------------------------------ which frames


def test_uneven_frames_are_picked_by_time(tmp_path: Path) -> None:
    """Variable frame rate: many frames in the first second, few after it; one for each bucket."""
    stamps = [*range(0, 1000, 50), 1250, 1750, 2400]  # ms
    video = moving(tmp_path / "vfr.mkv", len(stamps), step=8, rate=1000, stamps=stamps)
    names = frames_only(video, tmp_path / "out")
    rows = (tmp_path / "out/images/frames.csv").read_text().splitlines()[1:]
    assert [int(float(row.split(",")[2]) / 0.5) for row in rows] == [0, 1, 2, 3, 4]
    assert len(names) == 5


def test_long_videos_give_a_bounded_number(tmp_path: Path) -> None:
    video = moving(tmp_path / "long.mp4", 30, step=8)
    assert len(frames_only(video, tmp_path / "a", video=VideoOptions(max_frames=6))) == 6
    assert len(frames_only(video, tmp_path / "b", video=VideoOptions(num=12, max_frames=6))) == 12


@pytest.mark.parametrize("quarters", [0, 1])
def test_turned_recordings_come_upright(tmp_path: Path, quarters: int) -> None:
    video = moving(tmp_path / "a.mp4")
    turn_container(video, quarters)
    names = frames_only(video, tmp_path / "out")
    sizes = {Image.open(tmp_path / "out/images" / name).size for name in names}
    assert sizes == {(96, 160) if quarters else (160, 96)}


def test_a_display_matrix_that_is_none_is_passed_over(tmp_path: Path) -> None:
    video = moving(tmp_path / "a.mp4")
    data = bytearray(video.read_bytes())
    start = data.index(b"tkhd")
    matrix = start + 4 + (36 if data[start + 4] == 1 else 24) + 16
    data[matrix : matrix + 36] = bytes(36)
    video.write_bytes(data)
    names = frames_only(video, tmp_path / "out")
    assert Image.open(tmp_path / "out/images" / names[0]).size == (160, 96)


# ---------------------------------------------------------------------------------- what is refused


def _text(path: Path) -> Path:
    path.write_text("no video")
    return path


def _photograph(path: Path) -> Path:
    Image.new("RGB", (160, 96)).save(path.with_suffix(".jpg"))
    return path.with_suffix(".jpg")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_text, r"a\.mp4 cannot be read as a video"),
        (_photograph, r"a\.jpg is an image: give the folder"),
        (lambda path: path, r"no image folder or video .*a\.mp4"),
        (lambda path: moving(path, 8, rate=30), r"gives 1 image; 2 are needed. It lasts 0\.2 s"),
        (lambda path: moving(path, step=0), r"gives 1 image.*7 of them show no motion"),
    ],
    ids=["text", "image", "missing", "short", "still"],
)
def test_what_gives_no_frames_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    video = make(tmp_path / "a.mp4")
    with pytest.raises(InputError, match=message):
        run(video, tmp_path / "out")
    assert main([str(video), str(tmp_path / "other"), "--quiet", "--matcher", "fake"]) == 2


def test_a_truncated_video_says_so(tmp_path: Path) -> None:
    video = moving(tmp_path / "a.mkv", 12, step=8)
    video.write_bytes(video.read_bytes()[: int(video.stat().st_size * 0.6)])
    result = run(video, tmp_path / "out", dry_run=True)
    assert result.estimate["images"] < 12
    assert not (tmp_path / "out").exists()
    names = frames_only(video, tmp_path / "out")
    assert len(names) == result.estimate["images"]
    state = yaml.safe_load((tmp_path / "out/run.yaml").read_text())
    (step,) = (entry for name, entry in state["steps"].items() if name.startswith("frames "))
    assert any("it may be cut off" in remark for remark in step["facts"]["remarks"])


def test_other_videos_need_another_output(tmp_path: Path) -> None:
    first, other = moving(tmp_path / "a.mp4"), moving(tmp_path / "b.mp4", seed=1)
    out = tmp_path / "out"
    run(first, out, stop_after="pairs")
    with pytest.raises(OutputError, match="made of other images"):
        run(other, out)
    assert len(list((out / "images").glob("a_*.jpg"))) == 8
    run(other, out, stop_after="pairs", overwrite=True)
    assert {path.name[:2] for path in (out / "images").glob("*.jpg")} == {"b_"}


def test_frames_go_into_no_folder_of_the_user(tmp_path: Path) -> None:
    video = moving(tmp_path / "images" / "a.mp4")
    for source in (video, video.parent):
        with pytest.raises(InputError, match="choose another output folder"):
            run(source, tmp_path)
    mine = tmp_path / "out" / "images" / "a_000003.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(OutputError, match="no run made"):
        run(video, tmp_path / "out")
    assert mine.read_bytes() == b"mine"


def test_parts_of_array_jobs_wait_for_the_frames(tmp_path: Path) -> None:
    video, out = moving(tmp_path / "a.mp4"), tmp_path / "out"
    with pytest.raises(InputError, match="--stop-after frames"):
        run(video, out, step="encode", shard="0/2")
    frames_only(video, out)
    for part in range(2):
        run(video, out, step="encode", shard=f"{part}/2")
    fake_matcher.FakeMatcher.calls.clear()
    run(video, out, stop_after="pairs")
    assert fake_matcher.FakeMatcher.calls == []


def test_a_map_grows_by_a_video(scene: fake_matcher.Scene, phone: Path, tmp_path: Path) -> None:
    more = moving(tmp_path / "more.mp4", 3, seed=1, size=(WIDTH, HEIGHT), step=60)
    options = {"intrinsics": INTRINSICS, "refine_keypoints": False, "deterministic": False}
    grown = run(more, tmp_path / "grown", extend=phone / "out", **options)
    assert grown.registered == 11
    links = [path.is_symlink() for path in (tmp_path / "grown/images").rglob("*.jpg")]
    assert (len(links), sum(links)) == (11, 8)
    poses = colmap.poses_of(grown.model())
    assert camera_errors({n: poses[n] for n in scene.names}, scene.poses)[0] < 0.01
    for n in range(3):  # the fake matcher sees the same in both videos
        seen, again = poses[f"phone_{n:06d}.jpg"], poses[f"more_{n:06d}.jpg"]
        assert np.allclose(seen[0], again[0], atol=1e-3)
