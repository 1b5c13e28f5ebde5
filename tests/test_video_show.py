"""gim-video propagate and show: right pixels, right numbers, and nothing to show."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gim_hloc.cli import video as command
from gim_hloc.errors import InputError
from gim_hloc.training.video._show_html import _histogram, _round_up, reason_kind
from gim_hloc.training.video._show_pictures import (
    Failure,
    PairView,
    contact_sheet,
    covisible,
    draw_pair,
    spread_rows,
    thumbnail_pair,
)
from gim_hloc.training.video.folder import VideoFolder, VideoInfo
from gim_hloc.training.video.options import ShowOptions
from gim_hloc.training.video.propagated import (
    PropagatedStore,
    PropagatedWriter,
    StartRecord,
    VideoFacts,
)
from gim_hloc.training.video.propagation import FILE_NAME
from gim_hloc.training.video.show import show, show_folder
from gim_hloc.training.video.store import LabelWriter, StoreInfo

SIZE = (160, 90)
EVIL = "</script><img src=x onerror=alert(1)>"


def make_store(path: Path, made: int, failed: int = 0, notes: tuple[str, ...] = ()) -> Path:
    generator = np.random.default_rng(0)
    settings = {
        "options": {"min_joined": 8, "require": "all"},
        "steps": [10, 20, 40],
        "labels": [[10, "sift", "a"], [20, "sift", "b"], [10, f"disk {EVIL}", "c"]],
    }
    writer = PropagatedWriter(path, settings, VideoFacts(video=EVIL, size=SIZE, fps=25.0, gap=10))
    records = []
    for k in range(made + failed):
        start = 10 * k
        if k < made:
            count = 20 + k
            labels = np.concatenate(
                [generator.uniform((0, 0), SIZE, (count, 2)) for _ in range(2)], axis=1
            )
            record = StartRecord(
                start=start,
                target=9990,
                reached=(start, start + 100 + 10 * k),
                joined=count + 5,
                count=count,
                hops=3,
                ended="7 labels left at 200; 8 needed",
            )
            writer.put(record, labels)
        else:
            record = StartRecord(
                start=start,
                target=9990,
                reached=(start, start + 40),
                joined=9,
                count=0,
                hops=1,
                ended="no labels between 40 and 80",
                failure=f"3 of 9 labels fit one motion; 64 are needed {EVIL}",
            )
            writer.put(record, None)
        records.append(record)
    writer.finish(records, notes)
    writer.close()
    return path


def frame(index: int) -> np.ndarray:
    return np.full((SIZE[1], SIZE[0], 3), index % 200, dtype=np.uint8)


# ------------------------------------------------------------------------------------------ page


@pytest.mark.parametrize(("made", "failed"), [(0, 2), (1, 0), (1, 1), (9, 1)])
def test_the_legend_names_colours_that_are_there(tmp_path: Path, made: int, failed: int) -> None:
    """With 0 or 1 pairs too; and a failure's cause is counted with it."""
    with PropagatedStore(make_store(tmp_path / "p.h5", made, failed)) as store:
        page = show(store, frame, tmp_path / "show").sheet.read_text()
    assert "0 or more" not in page
    assert "fewer than 0" not in page
    assert page.count("■") == min(made, 3)
    cause = "fewer than 64 fit one motion"
    assert ("the chain ended: a segment without labels" in page and cause in page) == (failed > 0)


# ------------------------------------------------------------------------------------- pictures


def bright(region: np.ndarray) -> np.ndarray:
    """(x, y) of the middle of what is coloured; the rest of these pictures is grey."""
    colourful = region.astype(int).max(axis=2) - region.astype(int).min(axis=2) > 60
    y, x = np.nonzero(colourful)
    return np.array([x.mean(), y.mean()])


@pytest.mark.parametrize("size", [(320, 180), (180, 320), (2560, 1440)])
def test_dots_lie_on_their_pixels(size: tuple[int, int]) -> None:
    """A single label: its dot in both frames, at the place that the frame is scaled to."""
    label = np.array([[0.3 * size[0], 0.6 * size[1], 0.7 * size[0], 0.2 * size[1]]])
    empty = np.full((size[1], size[0], 3), 90, dtype=np.uint8)
    view = PairView(frames=(empty, empty), indices=(0, 40), labels=label, size=size, text=())
    picture = draw_pair(view, max_size=(640, 640), lines=0)
    scale = min(640 / size[0], 640 / size[1], 1.0)
    width, height = round(size[0] * scale), round(size[1] * scale)
    assert picture.shape == (2 * height + 24, 2 * width + 24, 3)
    for end in (0, 1):
        expected = (label[0, 2 * end : 2 * end + 2] + 0.5) * scale - 0.5
        left = 8 + end * (width + 8)
        panel = picture[8 : 8 + height, left : left + width]
        # The box of one point is drawn over its dot and has no colour of its own.
        assert np.abs(bright(panel) - expected).max() < 1.5


def test_same_colours_on_both_sides() -> None:
    labels = np.array([[10, 10, 150, 80], [150, 80, 10, 10]], np.float32)
    view = PairView(
        frames=(frame(90), frame(90)), indices=(0, 40), labels=labels, size=SIZE, text=()
    )
    picture = draw_pair(view, lines=2).astype(int)
    width, height = SIZE
    # Dots of the grey row: the box is only drawn in the upper one.
    first = picture[16 + height + 10 : 16 + height + 13, 8 + 10 : 8 + 13].mean(axis=(0, 1))
    second = picture[16 + height + 80 : 16 + height + 83, 16 + width + 149 : 16 + width + 152]
    other = picture[16 + height + 10 : 16 + height + 13, 16 + width + 10 : 16 + width + 13]
    assert np.abs(first - second.mean(axis=(0, 1))).max() < 60
    assert np.abs(first - other.mean(axis=(0, 1))).max() > 90


def test_share_of_a_frame_in_the_box() -> None:
    labels = np.array([[0, 0, 40, 10], [80, 45, 40, 55], [10, 10, 120, 30]], np.float32)
    assert covisible(labels, SIZE) == pytest.approx((0.25, 80 * 45 / (160 * 90)))
    assert covisible(labels[:0], SIZE) == (0.0, 0.0)


def test_lines_are_spread_over_the_frame() -> None:
    generator = np.random.default_rng(1)
    crowd = generator.uniform(0, 8, (5000, 2))
    others = generator.uniform((0, 0), SIZE, (300, 2))
    rows = spread_rows(np.concatenate([crowd, others]), 100, SIZE)
    assert 60 < len(rows) <= 110
    assert (rows < 5000).sum() < 5
    assert spread_rows(others, 300, SIZE).tolist() == list(range(300))


def test_missing_frames_are_said_in_the_picture() -> None:
    failure = Failure(indices=(0, 40), what="Start 0", reason="none")
    both = thumbnail_pair(failure, lambda index: frame(30) if index == 0 else None, SIZE)
    nothing = thumbnail_pair(failure, lambda index: None, SIZE)
    assert both.shape == nothing.shape
    half = both.shape[1] // 2 - 4
    assert (both[:, :half] == 30).all()
    assert len(np.unique(both[:, -half:])) > 2  # letters


def test_contact_sheets_hold_all_failures() -> None:
    failures = [Failure(indices=(k, k + 1), what=f"Start {k}", reason="x " * 60) for k in range(7)]
    thumbnails = [thumbnail_pair(f, frame, SIZE) for f in failures]
    one, seven = (contact_sheet(failures[:n], thumbnails[:n], "title") for n in (1, 7))
    assert seven.shape[1] > 2.5 * one.shape[1]
    assert seven.shape[0] > 2.2 * one.shape[0]
    for k in range(7):  # each thumbnail stands there: it is as grey as its frame
        assert (seven == k + 1).all(axis=2).sum() > 500


# ---------------------------------------------------------------------------------------- sheet


def test_bars_add_up() -> None:
    generator = np.random.default_rng(2)
    for values in ([5], [7, 7, 7], generator.integers(30, 9000, 500).tolist()):
        text = _histogram(values, "labels")
        bars = re.findall(r"<title>([\d,]+) to ([\d,]+) labels: ([\d,]+)</title>", text)
        found = [tuple(int(part.replace(",", "")) for part in bar) for bar in bars]
        assert sum(number for _, _, number in found) == len(values)
        for low, high, number in found:
            assert number == sum(low <= value <= high for value in values)
    assert [_round_up(v) for v in (0.2, 1, 1.5, 4, 7, 11, 401)] == [1, 1, 2, 5, 10, 20, 500]


def test_reasons_are_counted_by_kind() -> None:
    kinds = {
        reason_kind(text)
        for text in (
            "480 labels left at 120; 512 needed",
            "13 labels left at 1200; 512 needed",
            "no labels between 40 and 80",
            "no labels between 80 and 120",
            "12 of 700 labels fit one motion; 64 are needed",
            "13 of 600 labels fit one motion; 64 are needed",
        )
    }
    assert len(kinds) == 3


def read_sheet(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    # One file that reaches nothing outside, and shows text as text.
    assert not re.search(r"https?://|<script|<img src=x|url\(", text.replace("http-equiv", ""))
    assert set(re.findall(r'src="(\w+):', text)) <= {"data"}
    for tag in ("section", "svg", "figure", "table", "ul", "div", "main"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag
    return text


def test_a_video_with_many_pairs(tmp_path: Path) -> None:
    path = make_store(tmp_path / "p.h5", 30, 5)
    with PropagatedStore(path) as store:
        report = show(store, frame, tmp_path / "out", ShowOptions(pairs=10))
        again = show(store, frame, tmp_path / "again", ShowOptions(pairs=10))
        other = show(store, frame, tmp_path / "other", ShowOptions(pairs=10, seed=1))
        # Pictures of an earlier page go, those of the user stay.
        (tmp_path / "other" / "pairs" / "mine.jpg").write_bytes(b"a user's own")
        fewer = show(store, frame, tmp_path / "other", ShowOptions(pairs=3, seed=1))
    left = {path.name for path in (tmp_path / "other" / "pairs").iterdir()}
    assert left == {"mine.jpg", *(path.name for path in fewer.figures)}
    assert len(report.figures) == 10
    names = [[path.name for path in r.figures] for r in (report, again, other)]
    assert names[0] == names[1] != names[2]
    assert names[0] == sorted(names[0])
    assert report.missing == ()
    with Image.open(report.figures[0]) as figure:
        assert figure.width == 720  # widened so that the text fits
    text = read_sheet(report.sheet)
    assert "30 <span>/</span> 35" in text
    assert f"{sum(range(20, 50)):,}" in text
    assert text.count("<figure><img") == 10
    assert text.count("rx=") == 30  # lines of the timeline
    assert text.count("<circle class=fail") == 5
    assert text.count("<li><img") == 5
    assert "fewer than 64 fit one motion" in text


def test_fewer_than_ten_pairs(tmp_path: Path) -> None:
    with PropagatedStore(make_store(tmp_path / "p.h5", 3)) as store:
        report = show(store, frame, tmp_path / "out")
    assert len(report.figures) == 3
    assert report.contact is None
    assert read_sheet(report.sheet).count("<figure><img") == 3


def test_nothing_was_propagated(tmp_path: Path) -> None:
    with PropagatedStore(make_store(tmp_path / "p.h5", 0, 0, ("no frame to start from",))) as store:
        report = show(store, frame, tmp_path / "out")
    text = read_sheet(report.sheet)
    assert report.figures == ()
    assert "0 <span>/</span> 0" in text
    assert "No frame to start from" in text


def test_only_failures(tmp_path: Path) -> None:
    with PropagatedStore(make_store(tmp_path / "p.h5", 0, 40)) as store:
        report = show(store, frame, tmp_path / "out")
    assert report.contact is not None
    text = read_sheet(report.sheet)
    assert text.count("<li><img") == 24
    assert "24 of 40" in text


def test_old_pictures_do_not_stay(tmp_path: Path) -> None:
    for number, made in enumerate((12, 2)):
        with PropagatedStore(make_store(tmp_path / f"{number}.h5", made, 2 - 2 * number)) as store:
            report = show(store, frame, tmp_path / "out")
    assert set((tmp_path / "out" / "pairs").iterdir()) == set(report.figures)
    assert not (tmp_path / "out" / "failures.jpg").exists()


def test_missing_frames(tmp_path: Path) -> None:
    with PropagatedStore(make_store(tmp_path / "p.h5", 2)) as store:
        report = show(store, lambda index: frame(index) if index else None, tmp_path / "out")
    assert report.missing == (0,)
    assert len(report.figures) == 2
    assert "could not be read" in read_sheet(report.sheet)


def test_frames_of_another_size_are_refused(tmp_path: Path) -> None:
    with (
        PropagatedStore(make_store(tmp_path / "p.h5", 2)) as store,
        pytest.raises(InputError, match=r"64 x 48.*160 x 90.*label the video again"),
    ):
        show(store, lambda index: np.zeros((48, 64, 3), np.uint8), tmp_path / "out")


# -------------------------------------------------------------------------------------- commands


@pytest.fixture
def folder(tmp_path: Path) -> VideoFolder:
    """A video of a plane that slides by, with labels that say so."""
    video = VideoFolder(tmp_path / "videos" / "walk")
    video.write_info(
        VideoInfo(
            id="walk",
            source="walk.mp4",
            digest="0",
            size=SIZE,
            fps=30.0,
            frames=240,
            duration=8.0,
            image_format="png",
            quality=95,
            max_size=None,
        )
    )
    video.frames.mkdir()
    for k in range(0, 240, 10):
        Image.fromarray(frame(k)).save(video.frame_path(k))
    generator = np.random.default_rng(4)
    points = generator.uniform((0, 0), (SIZE[0] + 60, SIZE[1]), (700, 2))
    lift = generator.uniform(0.5, 1.5, 700)
    info = StoreInfo(
        video="walk", labeller="sift", zoom=False, steps=(10, 20, 40), size=SIZE, fps=30.0, gap=10
    )
    with LabelWriter(video.label_path("sift", False), info) as writer:
        for step in info.steps:
            for i in range(0, 240 - step, 10):
                ends = [points - np.stack([0.2 * f * lift, 0 * lift], 1) for f in (i, i + step)]
                seen = np.all([(e[:, 0] >= 0) & (e[:, 0] <= SIZE[0] - 1) for e in ends], axis=0)
                writer.put(i, i + step, np.concatenate(ends, axis=1)[seen])
        writer.fail(5, 15, "no matches")
        writer.write()
    return video


def test_the_commands(folder: VideoFolder, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(folder.root.parent)
    assert command.main(["show", out]) == 2
    assert "gim-video propagate" in capsys.readouterr().err
    assert command.main(["propagate", out, "--min-joined", "60", "--min-final", "20"]) == 0
    told = capsys.readouterr()
    assert "walk: 16 of 16 starts propagated" in told.err
    assert str(folder.root / FILE_NAME) in told.out
    with PropagatedStore(folder.root / FILE_NAME) as store:
        assert len(store) == 16
        assert store.settings["options"]["min_joined"] == 60
        for start, target in store:
            labels, (i, j) = store.read(start, target)
            # Every point moved by its own speed, which is between half and one and a half.
            moved = (labels[:, 0] - labels[:, 2]) / (0.2 * (j - i))
            assert (np.abs(labels[:, 1] - labels[:, 3]) < 1).all()
            assert ((moved > 0.45) & (moved < 1.55)).all()
    assert command.main(["show", out, "--pairs", "4"]) == 0
    assert "4 pairs drawn" in capsys.readouterr().out
    text = read_sheet(folder.root / "show" / "sheet.html")
    assert "sift, frames 5 and 15" in text
    assert (folder.root / "show" / "failures.jpg").is_file()
    assert command.main(["show", out, "--videos", "talk"]) == 2
    assert "no video talk; it has: walk" in capsys.readouterr().err


def test_labels_of_another_frame_size(folder: VideoFolder) -> None:
    from gim_hloc.training.video.propagation import propagate_folder

    text = (folder.root / "video.json").read_text()
    (folder.root / "video.json").write_text(text.replace("160", "320").replace("90", "180"))
    with pytest.raises(InputError, match=r"size \(160, 90\).*\(320, 180\)"):
        propagate_folder(folder)


def test_a_frame_file_that_is_damaged(folder: VideoFolder) -> None:
    assert (
        command.main(["propagate", str(folder.root), "--min-joined", "60", "--min-final", "20"])
        == 0
    )
    folder.frame_path(0).write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    folder.frame_path(5).unlink(missing_ok=True)
    report = show_folder(folder, options=ShowOptions(pairs=30))
    assert report.missing == (0, 5, 15)
