"""Videos: frames by number and time, colours, turns, damage, sampling, sources."""

from __future__ import annotations

import itertools
import logging
import math
import re
import sys
import types
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from video_files import HEIGHT, WIDTH, numbered, read_number, turn_container, write_video

from gim_hloc import hdr
from gim_hloc.cli.video import main
from gim_hloc.errors import InputError, OutputError
from gim_hloc.options import FrameFileOptions, FramesOptions
from gim_hloc.picks import measure_motion, pick_frames
from gim_hloc.training.video import sources
from gim_hloc.training.video.frames import on_grid, write_frames
from gim_hloc.training.video.options import LabelOptions, SamplingOptions
from gim_hloc.training.video.sampling import make_plan, time_range
from gim_hloc.videos import ImageSequence, VideoReader, open_source

av = pytest.importorskip("av", reason="PyAV reads videos")


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 numbered frames with B-frames and a key frame every 12."""
    path = tmp_path_factory.mktemp("video") / "numbers.mp4"
    return write_video(path, [numbered(n) for n in range(100)], rate=Fraction(30000, 1001))


# ---------------------------------------------------------------------------------------- positions


def test_every_frame_is_where_it_should_be(numbers: Path) -> None:
    reader = VideoReader(numbers)
    assert len(reader.times) == 100
    assert reader.size == (WIDTH, HEIGHT)
    assert reader.fps == pytest.approx(30000 / 1001, rel=1e-9)
    found = [(frame.index, read_number(frame.rgb())) for frame in reader.read()]
    assert found == [(n, n) for n in range(100)]
    assert reader.damaged == 0


@settings(max_examples=15, deadline=None)
@given(st.sets(st.integers(0, 99), min_size=1, max_size=6))
def test_frames_are_found_at_random(numbers: Path, wanted: set[int]) -> None:
    frames = list(VideoReader(numbers).read(wanted))
    assert [frame.index for frame in frames] == sorted(wanted)
    assert [read_number(frame.rgb()) for frame in frames] == sorted(wanted)
    for frame in frames:
        assert frame.time == pytest.approx(frame.index * 1001 / 30000, abs=1e-4)


def test_a_far_frame_is_jumped_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "long.mp4", [numbered(n) for n in range(300)])
    reader = VideoReader(path)
    decoded = []
    original = VideoReader._decode_packet
    monkeypatch.setattr(
        VideoReader, "_decode_packet", lambda s, p: decoded.append(0) or original(s, p)
    )
    (frame,) = reader.read([290])
    assert read_number(frame.rgb()) == 290
    assert len(decoded) < 40


def test_reading_is_lazy(numbers: Path) -> None:
    reader = VideoReader(numbers)
    frames = reader.read()
    assert next(frames).index == 0
    frames.close()  # type: ignore[attr-defined]


def test_times_outside_of_the_video_are_refused(numbers: Path) -> None:
    with pytest.raises(InputError, match="0 to 99"):
        list(VideoReader(numbers).read([100]))


def test_variable_frame_rate(tmp_path: Path) -> None:
    """Grid frames are even in time although frames are not."""
    milliseconds = np.cumsum([0] + [20] * 30 + [80] * 30).tolist()
    path = write_video(
        tmp_path / "vfr.mp4",
        [numbered(n) for n in range(61)],
        stamps=milliseconds,
        unit=Fraction(1, 1000),
    )
    reader = VideoReader(path)
    np.testing.assert_allclose(reader.times, np.array(milliseconds) / 1000, atol=1e-3)
    assert reader.fps == pytest.approx(60 / 3.0)
    # 20 grid frames are one second: 0.6 s of the fast part, the rest of the slow one.
    positions = on_grid(reader, [0, 12, 20, 40, 60])
    expected = [np.abs(np.array(milliseconds) - t).argmin() for t in (0, 600, 1000, 2000, 3000)]
    assert positions.tolist() == expected
    frames = [read_number(frame.rgb()) for frame in reader.read(positions.tolist())]
    assert frames == expected


def test_sub_frame_jitter_does_not_move_the_grid(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    stamps = (np.arange(80) * 33.3 + generator.uniform(-12, 12, 80)).round().astype(int)
    stamps -= stamps[0]
    path = write_video(
        tmp_path / "jitter.mkv",
        [numbered(n) for n in range(80)],
        stamps=stamps.tolist(),
        unit=Fraction(1, 1000),
    )
    assert on_grid(VideoReader(path), np.arange(0, 80, 10)).tolist() == list(range(0, 80, 10))


def test_stamps_in_decoding_order(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    """This file's stamps contradict the decoder, whose order is the smooth one."""
    with caplog.at_level(logging.WARNING):
        reader = VideoReader(data / "video" / "box_static_camera.mp4")
    assert "not in display order" in caplog.text
    frames = [cv2.resize(f.rgb(), (80, 60)).astype(float) for f in reader.read(range(120))]
    steps = [np.abs(b - a).mean() for a, b in itertools.pairwise(frames)]
    skips = [np.abs(b - a).mean() for a, b in zip(frames, frames[2:], strict=False)]
    assert np.mean(steps) < 0.9 * np.mean(skips)
    assert len(reader.times) == 455  # of 456 packets the last is not to be shown
    assert reader.damaged == 1


@pytest.mark.parametrize(
    ("name", "size", "fps", "frames"),
    [
        ("drive_highway", (960, 540), 25, 221),
        ("dog_handheld", (1280, 720), 29.97, 122),
        ("fox_from_frames", (540, 960), 10, 50),
    ],
)
def test_real_videos(data: Path, name: str, size: tuple[int, int], fps: float, frames: int) -> None:
    reader = VideoReader(data / "video" / f"{name}.mp4")
    assert (reader.size, len(reader.times)) == (size, frames)
    assert reader.fps == pytest.approx(fps)


def test_frames_are_those_of_their_source(data: Path) -> None:
    """The fox video was encoded from photographs: colours and turns can be compared."""
    reader = VideoReader(data / "video" / "fox_from_frames.mp4")
    photos = sorted((data / "fox" / "images").iterdir())
    for frame in reader.read([0, 23, 24, 49]):
        truth = cv2.cvtColor(cv2.imread(str(photos[frame.index])), cv2.COLOR_BGR2RGB)
        difference = frame.rgb().astype(float) - truth
        assert np.abs(difference).mean() < 3
        assert np.abs(difference.mean(axis=(0, 1))).max() < 0.5
        neighbour = cv2.imread(str(photos[(frame.index + 3) % 50]))[..., ::-1].astype(float)
        assert np.abs(frame.rgb() - neighbour).mean() > 8


# ---------------------------------------------------------------------------- colours, turns, shape

_COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 120, 40), (255, 255, 255), (16, 16, 16)]


def _write_yuv(path: Path, weights: tuple[float, float], space: int, full: bool) -> None:
    """Colour bars, turned into YCbCr here by the definition."""
    bars = np.repeat(np.array(_COLOURS, float) / 255, 32, axis=0)
    kr, kb = weights
    y = bars @ np.array([kr, 1 - kr - kb, kb])
    cb, cr = (bars[:, 2] - y) / (2 * (1 - kb)), (bars[:, 0] - y) / (2 * (1 - kr))
    scale, offset, chroma = (255, 0, 255) if full else (219, 16, 224)
    planes = [scale * y + offset, (chroma * cb + 128)[::2], (chroma * cr + 128)[::2]]
    frame = av.VideoFrame(len(bars), 64, "yuv420p")
    for plane, row in zip(frame.planes, planes, strict=True):
        array = np.zeros((plane.height, plane.line_size), np.uint8)
        array[:, : plane.width] = np.rint(row).clip(0, 255)
        plane.update(array.tobytes())
    frame.pts = 0
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = len(bars), 64, "yuv420p"
        stream.options = {"qp": "0"}
        for tagged in (stream.codec_context, frame):
            tagged.colorspace, tagged.color_range = space, 2 if full else 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("weights", "space"),
    [((0.2126, 0.0722), 1), ((0.299, 0.114), 5), ((0.299, 0.114), 2)],
    ids=["bt709", "bt601", "untagged"],
)
def test_colours(tmp_path: Path, weights: tuple[float, float], space: int, full: bool) -> None:
    """Matrix and range are followed; small untagged videos are BT.601."""
    _write_yuv(tmp_path / "bars.mp4", weights, space, full)
    (frame,) = VideoReader(tmp_path / "bars.mp4").read()
    seen = frame.rgb()[32, 16::32]
    np.testing.assert_allclose(seen, _COLOURS, atol=2)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_turned_containers(tmp_path: Path, quarters: int) -> None:
    path = write_video(tmp_path / "turned.mp4", [numbered(n) for n in (5, 600)])
    turn_container(path, quarters)
    reader = VideoReader(path)
    for frame, n in zip(reader.read(), (5, 600), strict=True):
        upright = frame.rgb()
        assert upright.shape[1::-1] == reader.size
        assert read_number(np.rot90(upright, quarters)) == n  # np.rot90 turns against the clock


def test_oblong_pixels_become_square(tmp_path: Path) -> None:
    def widen(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

    path = write_video(tmp_path / "wide.mp4", [numbered(3)] * 3, change=widen)
    reader = VideoReader(path)
    frame = next(iter(reader.read([1])))
    assert frame.rgb().shape == (reader.size[1], reader.size[0], 3)
    assert reader.size == (2 * WIDTH, HEIGHT)
    assert read_number(frame.rgb()[:, ::2]) == 3


# ------------------------------------------------------------------------------------------- damage


def test_damage_is_tolerated_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_video(tmp_path / "bad.ts", [numbered(n) for n in range(60)], gop=12)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 600] = b"\xa5" * 600
    path.write_bytes(content)
    reader = VideoReader(path)
    with caplog.at_level(logging.WARNING):
        written = write_frames(reader, np.arange(0, 60, 5), lambda n: tmp_path / f"{n}.png")
    assert reader.damaged > 0
    assert "damaged in" in caplog.text
    assert written <= 12
    numbers = {int(p.stem): read_number(np.array(Image.open(p))) for p in tmp_path.glob("*.png")}
    # Frames were lost: those behind the damage are where their time says.
    assert len(reader.times) < 60
    assert numbers[0] == 0
    assert {n: numbers[n] for n in (45, 50, 55)} == {45: 45, 50: 50, 55: 55}


@pytest.mark.parametrize("suffix", [".h264", ".avi", ".mkv", ".mov", ".ts"])
def test_containers(tmp_path: Path, suffix: str) -> None:
    """Also those without time stamps, or with none of use."""
    path = write_video(tmp_path / f"x{suffix}", [numbered(n) for n in range(70)])
    reader = VideoReader(path)
    assert reader.fps == (25 if suffix == ".h264" else 30)
    assert [read_number(frame.rgb()) for frame in reader.read()] == list(range(70))
    assert [read_number(frame.rgb()) for frame in reader.read([3, 40, 69])] == [3, 40, 69]
    assert reader.damaged == 0


def test_cut_off_file_gives_what_it_has(tmp_path: Path) -> None:
    path = write_video(tmp_path / "cut.mkv", [numbered(n) for n in range(60)])
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    reader = VideoReader(path)
    frames = list(reader.read())
    assert 20 < len(frames) < 60
    assert [read_number(f.rgb()) for f in frames[:20]] == list(range(20))


@pytest.mark.parametrize("content", [b"", b"not a video at all", b"\0" * 4096])
def test_what_is_no_video_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.mp4").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.mp4"):
        open_source(tmp_path / "x.mp4")


def test_sound_alone_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        samples = np.zeros((1, 800), np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(InputError, match="no video stream"):
        open_source(tmp_path / "a.wav")


# ---------------------------------------------------------------------------------- image sequences


def test_image_sequences_count_as_people_do(tmp_path: Path) -> None:
    for n in (0, 1, 2, 9, 10, 11, 100):
        Image.fromarray(numbered(n)).save(tmp_path / f"shot{n}.png")
    source = ImageSequence(tmp_path, fps=10)
    assert [read_number(f.rgb()) for f in source.read()] == [0, 1, 2, 9, 10, 11, 100]
    assert [f.time for f in source.read([3])] == [pytest.approx(0.3)]
    Image.fromarray(numbered(1)[:50]).save(tmp_path / "shot5.png")
    with pytest.raises(InputError, match="160 x 50"):
        list(source.read()) and list(ImageSequence(tmp_path).read())


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images"):
        open_source(tmp_path)


# ------------------------------------------------------------------------------------------ writing


def test_written_frames_stay(numbers: Path, tmp_path: Path) -> None:
    reader = VideoReader(numbers)

    def place(n: int) -> Path:
        return tmp_path / f"{n}.png"

    place(20).write_bytes(b"mine")
    assert write_frames(reader, [10, 20, 30], place, FrameFileOptions(format="png")) == 2
    assert place(20).read_bytes() == b"mine"
    assert read_number(np.array(Image.open(place(30)))) == 30
    assert write_frames(reader, [10, 20, 30], place) == 0


# ----------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("fps", "gap", "steps"),
    [
        (24, 10, (10, 20, 40)),
        (29.97, 10, (10, 20, 40)),
        (30, 10, (10, 20, 40)),
        (30.0003, 10, (10, 20, 40)),  # measured, not 31
        (50, 20, (20, 40, 80)),
        (59.94, 20, (20, 40, 80)),
    ],
)
def test_published_gaps(fps: float, gap: int, steps: tuple[int, ...]) -> None:
    plan = make_plan(fps, 1000, SamplingOptions())
    assert (plan.gap, plan.steps) == (gap, steps)
    assert plan.frames.tolist() == list(range(0, 1000, gap))


@settings(max_examples=60, deadline=None)
@given(
    fps=st.floats(5, 120),
    frames=st.integers(200, 500),
    gap=st.integers(1, 20),
    lengths=st.sets(st.integers(1, 5), min_size=1),
    start=st.floats(0, 2),
)
def test_pairs(fps: float, frames: int, gap: int, lengths: set[int], start: float) -> None:
    steps = tuple(gap * length for length in lengths)
    if (frames - 1) / fps - start <= 2 * gap / fps:
        return
    plan = make_plan(fps, frames, SamplingOptions(gap=gap, steps=steps, start=start, trim=0))
    chosen = plan.frames
    assert (chosen % gap == 0).all()
    assert (np.diff(chosen) == gap).all()
    assert start - 1e-6 <= chosen[0] / fps < start + gap / fps + 1e-6
    assert chosen[-1] <= frames - 1 < chosen[-1] + gap
    expected = {(a, b) for a in chosen.tolist() for b in chosen.tolist() if b - a in steps}
    assert set(map(tuple, plan.pairs.tolist())) == expected
    assert len(plan.pairs) == len(expected)


def test_long_videos_lose_their_ends() -> None:
    default = SamplingOptions()
    assert time_range(3600, default) == (300, 3300)
    assert time_range(899, default) == (0, 899)
    assert time_range(900, default) == (300, 600)
    assert time_range(3600, SamplingOptions(start=0, end=3600)) == (0, 3600)
    with pytest.raises(InputError, match="empty"):
        time_range(100, SamplingOptions(start=100))


def test_bad_sampling_is_refused() -> None:
    with pytest.raises(InputError, match="multiples"):
        make_plan(30, 100, SamplingOptions(gap=10, steps=(15,)))
    with pytest.raises(InputError, match="two make a pair"):
        make_plan(30, 8, SamplingOptions())


# --------------------------------------------------------------------------------------- the chosen


def test_frames_of_an_earlier_run_are_replaced(tmp_path: Path) -> None:
    """A second choice leaves no frame of the first, and none of other videos is touched."""
    frames = [numbered(n) for n in range(24)]
    video = open_source(write_video(tmp_path / "v.mp4", frames))
    out = tmp_path / "out"

    def pick(number: int, prefix: str = "v") -> set[str]:
        options = FramesOptions(num=number, min_motion=0)
        return {p.path.name for p in pick_frames(video, out, options, prefix=prefix).frames}

    first = pick(8)
    other = pick(2, "v_2")  # its names begin as those of the first
    (out / "v_999999.jpg").write_bytes(b"a user's own")
    second = pick(3)
    assert not first <= second
    files = {p.name for p in out.iterdir()} - {"frames.csv", "v_999999.jpg"}
    assert files == second | other
    listed = {line.split(",")[0] for line in (out / "frames.csv").read_text().splitlines()[1:]}
    assert listed == second | other


def test_files_of_the_user_are_never_replaced(tmp_path: Path) -> None:
    video = open_source(write_video(tmp_path / "v.mp4", [numbered(n) for n in range(24)]))
    options = FramesOptions(num=4, min_motion=0)
    names = [p.path.name for p in pick_frames(video, tmp_path / "a", options, prefix="v").frames]
    for name in (names[2], "frames.csv"):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_bytes(b"a user's own")
        with pytest.raises(OutputError, match=name):
            pick_frames(video, out, options, prefix="v")
        assert (out / name).read_bytes() == b"a user's own"


@pytest.mark.parametrize("size", [0, -5])
def test_no_image_is_reduced_to_nothing(size: int) -> None:
    with pytest.raises(InputError, match="max_size"):
        FramesOptions(num=3, max_size=size)
    with pytest.raises(InputError, match="max_size"):
        LabelOptions(max_size=size)


def _texture(seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).uniform(0, 255, (60, 120, 3)).astype(np.float32)
    return (
        cv2.resize(noise, (480, 240), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)
    )


def test_sharpest_frames_with_motion(tmp_path: Path) -> None:
    """Two seconds of motion, one sharp frame per half second; then one second of standing still."""
    texture = _texture()
    sharp = {4, 16, 26, 39}
    for n in range(60):
        x = min(n, 39)
        view = texture[20:140, x : x + 200]
        if n < 40 and n not in sharp:
            view = cv2.GaussianBlur(view, (0, 0), 3)
        Image.fromarray(view).save(tmp_path / f"{n:03d}.png")
    source = ImageSequence(tmp_path, fps=20)
    report = pick_frames(source, tmp_path / "out", FramesOptions(fps=2), prefix="v")
    assert [f.index for f in report.frames] == sorted(sharp)
    assert (report.buckets, report.still) == (6, 2)
    assert report.frames[1].motion == pytest.approx(12 / 200, abs=0.005)
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["frames.csv", *(f"v_{n:06d}.jpg" for n in sorted(sharp))]
    rows = (tmp_path / "out" / "frames.csv").read_text().splitlines()
    assert rows[0] == "file,index,time_s,sharpness,motion"
    assert rows[2].startswith("v_000016.jpg,16,0.800000,")
    everything = pick_frames(source, tmp_path / "all", FramesOptions(num=6, min_motion=0))
    assert len(everything.frames) == 6


def test_motion_is_measured_in_shares_of_the_long_side() -> None:
    gray = cv2.cvtColor(_texture(), cv2.COLOR_RGB2GRAY)
    view = gray[20:140, 40:240]
    assert measure_motion(view, view) == pytest.approx(0, abs=1e-3)
    assert measure_motion(view, gray[23:143, 44:244]) == pytest.approx(5 / 200, rel=0.05)
    other = cv2.cvtColor(_texture(1), cv2.COLOR_RGB2GRAY)
    assert measure_motion(view, other[20:140, 40:240]) == 1
    flat = np.zeros((120, 200), np.uint8)
    assert measure_motion(flat, flat) == 0
    assert measure_motion(flat, flat + 99) == 1
    assert not math.isnan(measure_motion(view, flat))


def test_a_resting_camera_gives_few_frames(data: Path, tmp_path: Path) -> None:
    """Only the box moves in this video; whoever wants it all says so."""
    source = open_source(data / "video" / "drive_highway.mp4")
    report = pick_frames(source, tmp_path / "a", FramesOptions(num=5, max_size=320, end=2.0))
    assert 2 <= len(report.frames) <= 5
    assert Image.open(report.frames[0].path).size == (320, 180)
    for frame in report.frames:
        assert frame.time <= 2.0


@pytest.mark.parametrize("values", [{"fps": 1.0, "num": 3}, {"fps": 0.0}, {"num": 0}])
def test_bad_choices_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        FramesOptions(**values)


# ------------------------------------------------------------------------------------------ sources

_ID = "Od-rKbC30TM"


@pytest.mark.parametrize(
    "text",
    [
        _ID,
        f"https://www.youtube.com/watch?v={_ID}",
        f"https://youtube.com/watch?list=x&v={_ID}&t=3",
        f"http://youtu.be/{_ID}?si=abc",
        f"https://m.youtube.com/shorts/{_ID}",
        f"https://www.youtube.com/embed/{_ID}",
    ],
)
def test_youtube_ids(text: str) -> None:
    source = sources.find_source(text)
    assert (source.id, source.path) == (_ID, None)


@pytest.mark.parametrize(
    "text",
    [
        "no-such.mp4",
        "Od-rKbC30T",
        "Od-rKbC30TM ",
        "Od-rKbC30TM\n",
        "Od-rKbC30T;",
        "$(rm -rf ab)",
        "--exec=abcd",
        f"https://evil.example/watch?v={_ID}",
        f"https://youtube.com.evil.example/watch?v={_ID}",
        "https://www.youtube.com/watch?v=$(reboot)",
        f"file:///etc/{_ID}",
        "http://[",
        f"https://www.youtube.com/watch?v={'a' * 5000}",
        "a\0b",
        "",
    ],
)
def test_what_is_no_source_is_refused(text: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    if text == "":
        with pytest.raises(InputError):
            sources.find_sources([])
        return
    with pytest.raises(InputError, match="neither"):
        sources.find_source(text)


def test_lists_of_videos(tmp_path: Path) -> None:
    (tmp_path / "a b.mp4").write_bytes(b"")
    listing = tmp_path / "list.txt"
    listing.write_text(f"\ufeff{_ID}\n\n# a comment\n  {tmp_path / 'a b.mp4'}  # another\n{_ID}\n")
    assert [s.id for s in sources.find_sources([str(listing)])] == [_ID, "a_b"]
    (tmp_path / "a_b.mkv").write_bytes(b"")
    with pytest.raises(InputError, match="both called a_b"):
        sources.find_sources([str(listing), str(tmp_path / "a_b.mkv")])
    with pytest.raises(InputError, match=r"none\.txt"):
        sources.find_sources([str(tmp_path / "none.txt")])


class _FakeDownloader:
    """Stands for yt_dlp.YoutubeDL: writes a file, or fails."""

    calls: list[Any] = []  # noqa: RUF012 - shared on purpose

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def __enter__(self) -> _FakeDownloader:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def download(self, addresses: list[str]) -> None:
        self.calls.append((self.options, addresses))
        if _ID not in addresses[0]:
            raise _YoutubeError("Video unavailable")
        (Path(self.options["paths"]["home"]) / f"{_ID}.mp4").write_bytes(b"video")


class _YoutubeError(Exception):
    pass


def test_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("yt_dlp")
    module.YoutubeDL = _FakeDownloader  # type: ignore[attr-defined]
    module.utils = types.SimpleNamespace(YoutubeDLError=_YoutubeError)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yt_dlp", module)
    _FakeDownloader.calls.clear()
    folder = tmp_path / "100%(id)s"  # must not be taken for a template
    path = sources.download(_ID, folder, max_height=720)
    assert path == folder / f"{_ID}.mp4"
    assert sources.download(_ID, folder) == path
    ((options, addresses),) = _FakeDownloader.calls
    assert addresses == [f"https://www.youtube.com/watch?v={_ID}"]
    assert "height<=720" in options["format"]
    with pytest.raises(InputError, match="Video unavailable"):
        sources.download("AAAAAAAAAAA", folder)
    with pytest.raises(InputError, match="no YouTube id"):
        sources.download("../../../etc", folder)


def test_without_yt_dlp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yt_dlp", None)
    with pytest.raises(InputError, match=r"pip install .*video"):
        sources.download(_ID, tmp_path)


def test_without_pyav(numbers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"pip install .*video"):
        open_source(numbers)


# ------------------------------------------------------------------------------------ files cut off


@pytest.mark.parametrize("suffix", ["mkv", "ts", "flv", "avi"])
def test_a_file_that_is_cut_off_is_named(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (96, 480, 3)).astype(np.uint8)
    frames = [noise[:, 4 * n : 4 * n + 160] for n in range(60)]
    whole = write_video(tmp_path / f"whole.{suffix}", frames, b_frames=0)
    assert VideoReader(whole).remarks == []
    data = whole.read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    # Whole packets of a transport stream, the last one from within a frame.
    cut.write_bytes(data[: (int(len(data) * 0.6) // 188 - 1) * 188])
    (remark,) = VideoReader(cut).remarks
    if suffix == "ts":  # promises no length
        assert remark == "The file ends within a frame: it may be cut off."
    else:
        found = re.fullmatch(r"The file says 2.0 s, its frames end at (.*) s: it may.*", remark)
        assert found is not None
        assert float(found[1]) == pytest.approx(1.2, abs=0.15)
    assert main(["frames", str(cut), str(tmp_path / "out"), "--fps", "2"]) == 0
    told = capsys.readouterr()
    assert remark in told.out
    assert remark in told.err


def test_sound_that_goes_on_is_no_cut(tmp_path: Path) -> None:
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 160, 96, "yuv420p"
        sound = container.add_stream("pcm_s16le", rate=8000)
        for n in range(10):
            container.mux(video.encode(av.VideoFrame.from_ndarray(numbered(n), format="rgb24")))
        container.mux(video.encode(None))
        for n in range(20):
            part = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
            part.sample_rate, part.pts = 8000, 800 * n
            container.mux(sound.encode(part))
        container.mux(sound.encode(None))
    assert VideoReader(path).remarks == []


# ---------------------------------------------------------------------------------------------- HDR

GREYS = [(v, v, v) for v in (10, 60, 120, 190)]
PATCHES = [*GREYS, (180, 60, 40), (40, 90, 160)]


def hdr_signal(srgb: np.ndarray, transfer: int) -> np.ndarray:
    """The signal in [0, 1] of sRGB values whose white is 203 cd/m^2, in BT.2020 primaries."""
    v = srgb / 255
    light = np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    to_2020 = [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
    light = light @ np.transpose(to_2020)
    if transfer == 16:
        y = (light * 0.0203) ** 0.1593017578125
        return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375
    shown = light * 0.203
    scene = shown * (shown @ [0.2627, 0.678, 0.0593])[..., None] ** (1 / 1.2 - 1)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    high = a * np.log(np.maximum(12 * scene - b, 1e-9)) + c
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), high)


@pytest.mark.parametrize(("transfer", "name"), [(16, "HDR, PQ"), (18, "HDR, HLG")])
def test_hdr_is_brought_to_srgb(tmp_path: Path, transfer: int, name: str) -> None:
    truth = np.repeat(np.array(PATCHES, np.float64)[None], 32, 0).repeat(32, 1)
    signal = np.rint(hdr_signal(truth, transfer) * 65535).astype(np.uint16)
    path = tmp_path / "hdr.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width = signal.shape[:2]
        stream.pix_fmt = "yuv444p10le"
        codec = stream.codec_context
        codec.color_trc, codec.color_primaries = transfer, 9
        codec.colorspace, codec.color_range = 9, 1
        frame = av.VideoFrame.from_ndarray(signal, format="rgb48le")
        frame = frame.reformat(format="yuv444p10le", dst_colorspace=9, dst_color_range=1)
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    reader = VideoReader(path)
    assert reader.remarks == [f"Its colours ({name}) are brought to sRGB."]
    (read,) = reader.read()
    assert np.abs(read.rgb()[16, 16::32].astype(int) - PATCHES).max() <= 2


def test_highlights_are_rolled_off_without_a_change_of_hue() -> None:
    bright = hdr.to_srgb(np.full((1, 1, 3), round(0.9 * 65535), np.uint16), 16)  # 3900 cd/m^2
    assert bright.tolist() == [[[255, 255, 255]]]
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None, :, None].repeat(3, 2)
    for transfer in (16, 18):
        levels = hdr.to_srgb(ramp, transfer)[0].astype(int)
        assert (np.diff(levels, axis=0) >= 0).all()
        assert (np.ptp(levels, axis=1) <= 1).all()  # grey stays grey
