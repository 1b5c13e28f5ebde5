"""gim-video propagate and show: right pixels, right numbers, and nothing to show."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gim_hloc.cli import video as command
from gim_hloc.errors import InputError
from gim_hloc.training.video.folder import VideoFolder, VideoInfo
from gim_hloc.training.video.options import ShowOptions
from gim_hloc.training.video.propagated import (
    PropagatedStore,
    PropagatedWriter,
    StartRecord,
    VideoFacts,
)
from gim_hloc.training.video.propagation import FILE_NAME, propagate_folder
from gim_hloc.training.video.show import covisible, draw_pair, reason_kind, show, show_folder
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
        start, count = 10 * k, 20 + k
        if k < made:
            record = StartRecord(
                start=start, target=9990, reached=(start, start + 100 + 10 * k), joined=count + 5,
                count=count, hops=3, ended="7 labels left at 200; 8 needed",
            )  # fmt: skip
            labels = [generator.uniform((0, 0), SIZE, (count, 2)) for _ in range(2)]
            writer.put(record, np.concatenate(labels, axis=1))
        else:
            record = StartRecord(
                start=start, target=9990, reached=(start, start + 40), joined=9, count=0, hops=1,
                ended="no labels between 40 and 80",
                failure=f"3 of 9 labels fit one motion; 64 are needed {EVIL}",
            )  # fmt: skip
            writer.put(record, None)
        records.append(record)
    writer.finish(records, notes)
    writer.close()
    return path


def frame(index: int) -> np.ndarray:
    return np.full((SIZE[1], SIZE[0], 3), index % 200, dtype=np.uint8)


def read_sheet(path: Path) -> str:
    """The page without plotly: one file that shows text as text and may reach nothing outside."""
    text = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    head, body = text[: text.index("<style>")], text[text.index("<body>") :]
    assert "<img src=x" not in text
    assert not re.search(r"https?://", head + body)
    assert set(re.findall(r'src="(\w+):', body)) <= {"data"}
    return head + body


# ------------------------------------------------------------------------------------- pictures


def test_same_colours_on_both_sides() -> None:
    labels = np.array([[10, 10, 150, 80], [150, 80, 10, 10]], np.float32)
    picture = draw_pair((frame(90), frame(90)), labels, SIZE, lines=2).astype(int)
    width, height = SIZE
    assert picture.shape == (2 * height + 24, 2 * width + 24, 3)

    def tone(side: int, x: int, y: int) -> np.ndarray:  # in the grey row: it has no boxes
        left, top = 8 + side * (width + 8) + x, 16 + height + y
        return picture[top - 1 : top + 2, left - 1 : left + 2].mean(axis=(0, 1))

    assert np.abs(tone(0, 10, 10) - tone(1, 150, 80)).max() < 60
    assert np.abs(tone(0, 10, 10) - tone(1, 10, 10)).max() > 90


def test_share_of_a_frame_in_the_box() -> None:
    labels = np.array([[0, 0, 40, 10], [80, 45, 40, 55], [10, 10, 120, 30]], np.float32)
    assert covisible(labels, SIZE) == pytest.approx((0.25, 80 * 45 / (160 * 90)))
    assert covisible(labels[:0], SIZE) == (0.0, 0.0)


def test_reasons_are_counted_by_kind() -> None:
    kinds = {
        reason_kind(f"{first}; {last}" if last else first)
        for first, last in (
            ("480 labels left at 120", "512 needed"), ("13 labels left at 1200", "512 needed"),
            ("no labels between 40 and 80", ""), ("no labels between 80 and 120", ""),
            ("12 of 700 labels fit one motion", "64 are needed"),
            ("13 of 600 labels fit one motion", "64 are needed"),
        )
    }  # fmt: skip
    assert len(kinds) == 3


# ---------------------------------------------------------------------------------------- sheet


def test_a_video_with_many_pairs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with PropagatedStore(make_store(tmp_path / "p.h5", 30, 40)) as store:
        report = show(store, lambda k: frame(k) if k else None, out, ShowOptions(pairs=10))
        text = read_sheet(report.sheet)
        with Image.open(report.figures[0]) as figure:
            assert figure.width >= 720  # widened so that the text fits
        other = show(store, frame, tmp_path / "other", ShowOptions(pairs=10, seed=1))
        # Pictures of an earlier page go, those of the user stay.
        (out / "pairs" / "mine.jpg").write_bytes(b"a user's own")
        fewer = show(store, frame, out, ShowOptions(pairs=3))
    names = [[path.name for path in r.figures] for r in (report, other)]
    assert len(names[0]) == 10
    assert names[0] == sorted(names[0]) != names[1]
    left = {path.name for path in (out / "pairs").iterdir()}
    assert left == {"mine.jpg", *(path.name for path in fewer.figures)}
    assert "30 <span>/</span> 70" in text
    assert f"{sum(range(20, 50)):,}" in text
    assert text.count("<figure>\n<img") == 10
    assert text.count("<li><img") == 24
    assert "24 of 40" in text
    assert "fewer than 64 fit one motion" in text
    assert "the chain ended: a segment without labels" in text
    assert report.contact is not None
    with PropagatedStore(make_store(tmp_path / "q.h5", 2)) as store:
        assert show(store, frame, out).contact is None
    assert not (out / "failures.jpg").exists()


@pytest.mark.parametrize(("made", "failed"), [(0, 0), (0, 2), (1, 0), (1, 1), (9, 1)])
def test_few_pairs(tmp_path: Path, made: int, failed: int) -> None:
    notes = ("no frame to start from",)
    with PropagatedStore(make_store(tmp_path / "p.h5", made, failed, notes)) as store:
        report = show(store, lambda k: frame(k) if k else None, tmp_path / "show")
    text = read_sheet(report.sheet)
    assert "No frame to start from" in text
    assert f"{made} <span>/</span> {made + failed}" in text
    assert len(report.figures) == text.count("<figure>\n<img") == made
    # The timeline's legend names the colours that are there.
    assert "0 labels or more" not in text.replace("20 labels", "")
    assert len(re.findall(r'"name":"(?:fewer than )?\d+ labels', text)) == min(made, 3)
    assert report.missing == ((0,) if made + failed else ())
    assert ("could not be read" in text) == bool(report.missing)


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
            id="walk", source="walk.mp4", digest="0", size=SIZE, fps=30.0, frames=240,
            duration=8.0, image_format="png", quality=95, max_size=None,
        )
    )  # fmt: skip
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
    printed = capsys.readouterr()
    assert "walk: 16 of 16 starts propagated" in printed.err
    assert str(folder.root / FILE_NAME) in printed.out
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
    assert "sift, frames 5 and 15" in read_sheet(folder.root / "show" / "sheet.html")
    assert (folder.root / "show" / "failures.jpg").is_file()
    assert command.main(["show", out, "--videos", "talk"]) == 2
    assert "no video talk; it has: walk" in capsys.readouterr().err
    # A frame that is damaged, and two that are not there.
    folder.frame_path(0).write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    assert show_folder(folder, options=ShowOptions(pairs=30)).missing == (0, 5, 15)


def test_labels_of_another_frame_size(folder: VideoFolder) -> None:
    text = (folder.root / "video.json").read_text()
    (folder.root / "video.json").write_text(text.replace("160", "320").replace("90", "180"))
    with pytest.raises(InputError, match=r"size \(160, 90\).*\(320, 180\)"):
        propagate_folder(folder)
