"""gim-export on a finished run: what it writes, what it leaves alone, and whose its files are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fake_matcher
import numpy as np
import pytest
import yaml
from fake_matcher import SCENE, FakeMatcher, write_images
from PIL import Image, TiffImagePlugin
from synthetic import HEIGHT, INTRINSICS, WIDTH, camera_errors

import gim_hloc
from gim_hloc import colmap
from gim_hloc.cli.export import main
from gim_hloc.errors import InputError
from gim_hloc.lock import FolderLock
from gim_hloc.options import MapOptions
from gim_hloc.pipelines.exports import export
from gim_hloc.poses import similarity

fake_matcher.register()
pytestmark = pytest.mark.usefixtures("no_charts")
NAMES = SCENE.names[:5]
METRES = 10.0  # of a unit of the scene
LATITUDE, LONGITUDE = 55.7, 13.2


def tagged(path: Path, place: np.ndarray) -> None:
    """Write a GPS position into EXIF: metres east, north and up of a place on earth."""
    degrees = (LATITUDE + place[1] / 111_345.6, LONGITUDE + place[0] / 62_856.0)
    with Image.open(path) as image:
        image.load()
        exif = image.getexif()
        gps = exif.get_ifd(0x8825)
        for tag, reference, value in zip((1, 3), "NE", degrees, strict=True):
            whole, minutes = int(value), value % 1 * 60
            rest = (whole, int(minutes), minutes % 1 * 60)
            gps[tag] = reference
            gps[tag + 1] = tuple(TiffImagePlugin.IFDRational(round(v * 1e7), 10**7) for v in rest)
        gps[5], gps[6] = b"\0", TiffImagePlugin.IFDRational(round((place[2] + 50) * 1e4), 10**4)
        image.save(path, exif=exif, quality=95)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``images`` with GPS (z up is -y of the scene), ``masks``, and the finished run ``run``."""
    root = tmp_path_factory.mktemp("exports")
    write_images(root / "all")
    (root / "images").mkdir()
    (root / "masks").mkdir()
    for name in NAMES:
        shutil.copy(root / "all" / name, root / "images" / name)
        rotation, translation = SCENE.poses[name]
        x, y, z = -rotation.T @ translation * METRES
        tagged(root / "images" / name, np.array([x, z, -y]))
        mask = np.full((HEIGHT, WIDTH), 255, np.uint8)
        mask[:40] = 0
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
    run(root, root / "run", masks=root / "masks")
    return root


def run(place: Path, output: Path, **options: Any) -> Any:
    FakeMatcher.calls.clear()
    fixed = {
        "matcher": "fake", "intrinsics": INTRINSICS, "deterministic": True, "rotations": "none",
        "refine_keypoints": False, "rescue": "none", "export": (), "progress": False,
    }  # fmt: skip
    return gim_hloc.reconstruct(place / "images", output, **{**fixed, **options})


@pytest.fixture
def out(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "run", tmp_path / "out", symlinks=True))


def assert_metric(folder: Path) -> None:
    """A model is in metres, z up."""
    poses = colmap.model_cameras(folder)
    truth = {n: (r, t * METRES) for n, (r, t) in SCENE.poses.items() if n in NAMES}
    scale, rotation, _ = similarity(poses, truth) or (0, np.eye(3), 0)
    assert scale == pytest.approx(1, abs=2e-3)
    np.testing.assert_allclose(rotation @ [0, 0, 1], [0, -1, 0], atol=0.02)
    assert camera_errors(poses, truth)[0] < 0.05


def test_exports_of_a_finished_run(place: Path, out: Path, capsys: Any) -> None:
    before = yaml.safe_load((out / "run.yaml").read_text())
    model = (out / "sparse/0/points3D.bin").read_bytes()
    FakeMatcher.calls.clear()
    assert main([str(out), "--to", "3dgs", "nerfstudio", "--num-downscales", "1", "--quiet"]) == 0
    after = yaml.safe_load((out / "run.yaml").read_text())
    assert FakeMatcher.calls == []
    assert (out / "sparse/0/points3D.bin").read_bytes() == model
    for name in ("images", "options", "matcher", "weights"):
        assert after[name] == before[name]
    assert after["timings"].keys() == {*before["timings"], "export"}
    for folder in ("3dgs", "nerfstudio"):
        for kind in ("images", "images_2", "masks", "masks_2"):
            assert len(list((out / "export/0" / folder / kind).iterdir())) == len(NAMES)
    with Image.open(out / "export/0/nerfstudio/masks" / f"{NAMES[0]}.png") as mask:
        kept = np.asarray(mask) > 0  # as given: erosion is for keypoints
    assert not kept[:40].any()
    assert kept[40:].all()
    assert set(after["files"]) >= {
        str(p.relative_to(out)) for p in (out / "export").rglob("*") if not p.is_dir()
    }
    # The same again changes nothing; a run of the same model keeps what was exported.
    path = out / "export/0/3dgs/sparse/0/images.bin"
    stamp = path.stat().st_mtime_ns
    capsys.readouterr()
    assert main([str(out), "--to", "3dgs", "nerfstudio", "--num-downscales", "1"]) == 0
    assert capsys.readouterr().out.split() == [
        f"{out / 'export/0/3dgs'}",
        f"{out / 'export/0/nerfstudio'}",
    ]
    run(place, out, masks=place / "masks")
    assert path.stat().st_mtime_ns == stamp
    # Another model takes its exports away.
    run(place, out, masks=place / "masks", map=MapOptions(filter_max_reproj_error=3.0))
    assert not (out / "export").exists()


def test_everything_can_be_in_metres(out: Path) -> None:
    told = export(out, to=("geo", "ply", "metashape"), progress=False)
    assert told.metres[0]["by"] == "gps"
    assert told.metres[0]["rms_across_m"] < 0.05
    assert told.metres[0]["up_std_deg"] < 5
    (metric,) = {p.parent.parent for p in (out / "export/0/geo").rglob("images.bin")}
    page = (out / "export/0/geo/geo.html").read_text()
    assert "Metres by GPS positions of images" in page
    assert all(name in page for name in NAMES)
    assert_metric(metric / "0")

    def extent() -> float:
        body = (out / "export/0/points.ply").read_bytes().split(b"end_header\n")[1]
        vertices = np.frombuffer(body, "<f4,<f4,<f4,u1,u1,u1")
        return float(np.ptp(vertices["f2"]))

    own = extent()
    assert export(out, to=("ply",), progress=False).metres == []  # those of geo are not its own
    assert export(out, to=("ply",), gps="exif", progress=False).files == ["export/0/points.ply"]
    assert extent() == pytest.approx(3 * METRES, rel=0.05)  # upright: heights
    assert own < METRES
    a, b = (-SCENE.poses[n][0].T @ SCENE.poses[n][1] * METRES for n in (NAMES[0], NAMES[-1]))
    length = str(float(np.linalg.norm(a - b)))
    export(out, to=("ply",), scale=(NAMES[0], NAMES[-1], length), progress=False)
    assert extent() == pytest.approx(3 * METRES, rel=0.05)
    with pytest.raises(InputError, match="--gps and --scale say what a metre is"):
        export(out, to=("ply",), gps="exif", scale=("0,0,0", "1,0,0", 2), progress=False)
    with pytest.raises(InputError, match=r"'x\.jpg' is neither an image"):
        export(out, to=("ply",), scale=("x.jpg", "1,0,0", 2), progress=False)


def test_what_is_refused(place: Path, out: Path, tmp_path: Path, capsys: Any) -> None:
    assert main([str(tmp_path), "--to", "ply"]) == 2
    assert "is no output of gim-reconstruct" in capsys.readouterr().err
    assert main([str(out)]) == 2
    assert "Say what is wanted: --to" in capsys.readouterr().err
    assert main([str(out), "--to", "ply", "--images", str(tmp_path / "gone")]) == 2
    with FolderLock(out):
        assert main([str(out), "--to", "ply"]) == 3
    mine = out / "export"
    mine.write_text("mine")
    for _ in range(2):
        assert main([str(out), "--to", "ply"]) == 2
        assert "holds export, which no run made" in capsys.readouterr().err
    mine.unlink()
    mine = out / "export/0/cameras.xml"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert main([str(out), "--to", "metashape"]) == 2
    assert mine.read_text() == "mine"
    capsys.readouterr()
    # What fails leaves nothing behind, and what else is wanted is written.
    moved = Path(shutil.copytree(place / "images", tmp_path / "moved"))
    (moved / NAMES[0]).unlink()
    assert main([str(out), "--to", "3dgs", "ply", "--images", str(moved)]) == 2
    assert NAMES[0] in capsys.readouterr().err
    assert not (out / "export/0/3dgs").exists()
    assert (out / "export/0/points.ply").is_file()


def test_links_lead_to_where_the_images_are_now(place: Path, out: Path, tmp_path: Path) -> None:
    linked = out / "export/0/nerfstudio/images"
    for folder in ("moved", "moved again"):
        images = Path(shutil.copytree(place / "images", tmp_path / folder))
        export(out, to=("nerfstudio",), images=images, progress=False)
        assert {path.resolve() for path in linked.iterdir()} == {images / name for name in NAMES}
    with Image.open(images / NAMES[0]) as image:
        image.resize((WIDTH // 2, HEIGHT // 2)).save(tmp_path / "moved" / NAMES[0])
    for kind in ("nerfstudio", "realityscan", "openmvs"):
        with pytest.raises(InputError, match=f"{NAMES[0]} has {WIDTH // 2} x"):
            export(out, to=(kind,), images=tmp_path / "moved", progress=False)


def test_gps_as_priors_of_the_mapping_gives_metres(place: Path, tmp_path: Path) -> None:
    result = run(place, tmp_path / "out", poses="prior", export=("geo",))
    assert_metric(tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["metres"][0]["residuals_m"].keys() == set(NAMES)
    assert any("Metres by the GPS positions of 5 images" in note for note in report["notes"])
    assert result.registered == len(NAMES)


def test_priors_want_positions(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "all", tmp_path / "images")
    with pytest.raises(InputError, match="takes GPS positions with heights, and 0 images"):
        run(tmp_path, tmp_path / "out", poses="prior")
