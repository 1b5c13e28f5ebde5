"""Whole runs on real photographs with measured truth, and on nasty files. Minutes: ``-m slow``."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gim_hloc
from gim_hloc.evaluation.sfm import evaluate
from gim_hloc.pairs.select import PairOptions

pytestmark = [pytest.mark.slow, pytest.mark.weights]

FOUNTAIN = "PINHOLE,919.83,921.84,506.90,335.77"


def test_fountain(data: Path, tmp_path: Path) -> None:
    scene = data / "fountain-P11"
    result = gim_hloc.reconstruct(
        scene / "images", tmp_path / "out", intrinsics=FOUNTAIN, progress=False
    )
    scores = evaluate(result.models[0], scene / "gt")
    assert scores.registered == scores.total == 11
    assert scores.auc[0.5] >= 85  # the plain prototype's 83, our refinement's 89
    assert scores.auc[1.0] >= 93
    assert scores.centre_radius_percent.mean <= 0.06
    # the same features without intrinsics: one shared camera, close to the true focal length
    free = gim_hloc.reconstruct(scene / "images", tmp_path / "out", progress=False)
    assert set(free.report["counts"].values()) == {0}  # nothing was computed again
    assert {"images_encoded_now", "pairs_matched_now"} <= set(free.report["counts"])
    assert free.registered == 11
    (camera,) = free.report["models"][0]["cameras"]
    assert camera["params"][0] == pytest.approx(920, rel=0.01)
    # refinement is what makes the difference
    plain = gim_hloc.reconstruct(
        scene / "images", tmp_path / "out", intrinsics=FOUNTAIN, refine_keypoints=False,
        progress=False,
    )  # fmt: skip
    assert evaluate(plain.models[0], scene / "gt").auc[0.5] < scores.auc[0.5] - 2


def test_herz_jesus(data: Path, tmp_path: Path) -> None:
    scene = data / "Herz-Jesus-P8"
    result = gim_hloc.reconstruct(scene / "images", tmp_path, intrinsics=FOUNTAIN, progress=False)
    scores = evaluate(result.models[0], scene / "gt")
    assert scores.registered == scores.total == 8
    assert scores.auc[1.0] >= 85


def test_cyprus(data: Path, tmp_path: Path) -> None:
    result = gim_hloc.reconstruct(data / "cyprus" / "images", tmp_path, progress=False)
    assert result.registered == 10  # two of them are stored turned, without EXIF
    turned = {r["name"]: r.get("rotated_degrees") for r in result.report["images"]}
    assert {n: t for n, t in turned.items() if t} == {"DSC_6468.jpg": 180, "DSC_6471.jpg": 270}


def test_fox_sequence(data: Path, tmp_path: Path) -> None:
    scene = data / "fox"
    result = gim_hloc.reconstruct(
        scene / "images", tmp_path, pairs="sequential+retrieval", quality="fast", progress=False,
        intrinsics=str(scene / "gt" / "cameras.txt"),  # a wrong principal point turns the cameras
        pair=PairOptions(window=4, quadratic=False, neighbours=6),
    )  # fmt: skip
    scores = evaluate(result.models[0], scene / "gt")
    assert scores.registered >= 0.95 * scores.total
    # the reference is itself COLMAP's: 0.2 degrees and 0.2 % are its noise
    assert scores.rotation.median < 0.3
    assert scores.centre_extent_percent.median < 0.3


def test_nasty_files_among_good_ones(data: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(data / "odd", images)
    shutil.copytree(data / "fountain-P11" / "images", images / "fountain")
    result = gim_hloc.reconstruct(
        images, tmp_path / "out", quality="fast", progress=False,
        matcher_options=("max_keypoints=512",),
    )  # fmt: skip
    rows = {row["name"]: row for row in result.report["images"]}
    # the nasty folder holds copies of some good images: of those, the first by name is kept
    good = [n for n in rows if n.startswith("fountain/") and rows[n]["status"] != "duplicate"]
    assert len(good) >= 8
    assert all(rows[n]["model"] == 0 for n in good)
    assert all(row["reason"] for row in rows.values() if row["status"] != "registered")
    expected = {
        "truncated.jpg": "unreadable", "header_only.jpg": "unreadable", "empty.jpg": "empty",
        "text.jpg": "unreadable", "one_pixel.png": "tiny", "tiny.jpg": "tiny",
        "identical_b.jpg": "duplicate", "blank_white.jpg": "no_features",
        "huge_solid_12000x9000.png": "no_features", "still.gif": "unreadable",
    }  # fmt: skip
    assert {n: rows[n]["status"] for n in expected} == expected
    with open(data / "odd" / "manifest.csv", newline="", encoding="utf-8") as file:
        listed = [row["file"] for row in csv.DictReader(file)]
    suffixes = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".heic")
    pictures = [n for n in listed if n.lower().endswith(suffixes) and "/._" not in n]
    assert sorted(set(pictures) - set(rows)) == []


def test_demo_scene(room: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, room.parent / "demo.py", room, tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "20 of 20 images" in done.stdout
