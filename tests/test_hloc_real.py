"""The plugin in the real hloc.

Needs a checkout of hloc and a Python environment in which it runs, see ``test_hloc_interop.py``:
``GIM_HLOC_HLOC_CHECKOUT``, ``GIM_HLOC_HLOC_PYTHON`` and, unless it is in ``../shared/tools``,
``GIM_HLOC_WITH_HLOC``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import made_up
import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from test_hloc_match_dense import read

import gim_hloc
from gim_hloc import colmap
from gim_hloc.evaluation import sfm
from gim_hloc.evaluation.benchmarks import scene as synthetic_dense
from gim_hloc.hloc_plugin import confs

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
FOUNTAIN = SHARED / "data" / "fountain-P11"

pytestmark = pytest.mark.hloc


@dataclass(frozen=True)
class RealHloc:
    """How to run a script with hloc."""

    checkout: Path
    python: Path
    tool: Path

    def run(self, *arguments: str | Path, weights: Path | None = None) -> str:
        """Run a script, or ``-m MODULE``; returns what it printed."""
        command = [self.python, "-W", "ignore", self.tool, self.checkout, *arguments]
        environment = dict(os.environ)
        if weights is not None:
            environment["GIM_HLOC_WEIGHTS"] = str(weights)
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True, text=True, check=False, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def hloc() -> RealHloc:
    values = {
        "GIM_HLOC_HLOC_CHECKOUT": os.environ.get("GIM_HLOC_HLOC_CHECKOUT", ""),
        "GIM_HLOC_HLOC_PYTHON": os.environ.get("GIM_HLOC_HLOC_PYTHON", ""),
        "GIM_HLOC_WITH_HLOC": os.environ.get(
            "GIM_HLOC_WITH_HLOC", str(SHARED / "tools" / "with_hloc.py")
        ),
    }
    for variable, value in values.items():
        if not value or not Path(value).exists():
            pytest.skip(f"set {variable} to run against real hloc")
    checkout, python, script = (Path(value) for value in values.values())
    return RealHloc(checkout=checkout, python=python, tool=script)


def fountain(folder: Path, numbers: range) -> Path:
    if not FOUNTAIN.is_dir():
        pytest.skip("needs ../shared/data/fountain-P11")
    folder.mkdir(parents=True)
    for number in numbers:
        shutil.copy(FOUNTAIN / "images" / f"{number:04d}.jpg", folder)
    return folder


# ------------------------------------------------------------------------ bundled, real weights


@pytest.mark.slow
@pytest.mark.weights
def test_the_example_reconstructs_the_fountain(hloc: RealHloc, tmp_path: Path) -> None:
    images = fountain(tmp_path / "images", range(11))
    script = REPOSITORY / "examples" / "hloc_sfm.py"
    printed = hloc.run(script, images, tmp_path / "out")
    assert "11 of 11 images registered" in printed
    # The focal length was guessed by hloc: the shape of the path is what can be asked for.
    scores = sfm.evaluate(tmp_path / "out" / "sfm", FOUNTAIN / "gt")
    assert scores.registered == 11
    assert scores.rotation.mean < 1.0
    # hloc's +0.5 gives COLMAP's frame, and its half precision did not touch the keypoints.
    model = colmap.read_model(tmp_path / "out" / "sfm")
    with h5py.File(tmp_path / "out" / "features.h5") as file:
        for image_id in model.reg_image_ids():
            image = model.image(image_id)
            expected = file[image.name]["keypoints"][()]
            assert expected.dtype == np.float64
            xy = np.array([point.xy for point in image.points2D])
            np.testing.assert_allclose(xy, expected + 0.5, rtol=0, atol=1e-3)


@pytest.mark.weights
@pytest.mark.parametrize(
    ("extractor", "matcher"),
    [
        ("gim_hloc_aliked", "gim_hloc_aliked_lightglue"),
        ("gim_hloc_xfeat", "gim_hloc_xfeat"),
        ("gim_hloc_xfeat", "gim_hloc_xfeat_lighterglue"),
    ],
)
def test_hlocs_command_lines_with_our_confs(
    hloc: RealHloc, tmp_path: Path, extractor: str, matcher: str
) -> None:
    images = fountain(tmp_path / "images", range(4, 7))
    out = tmp_path / "out"
    plugin = ("-m", "gim_hloc.hloc_plugin")
    features, matches = confs.EXTRACT_FEATURES[extractor]["output"], out / "m.h5"
    listed = (out / "pairs.txt", out / f"{features}.h5")
    hloc.run(
        *plugin, "extract_features", "--conf", extractor,
        "--image_dir", images, "--export_dir", out,
    )  # fmt: skip
    hloc.run(*plugin, "pairs_from_exhaustive", "--output", listed[0], "--features", listed[1])
    hloc.run(
        *plugin, "match_features", "--conf", matcher,
        "--pairs", listed[0], "--features", features, "--export_dir", out,
    )  # fmt: skip
    (found,) = out.glob(f"*{confs.MATCH_FEATURES[matcher]['output']}_pairs.h5")
    found.rename(matches)
    hloc.run(
        *plugin, "reconstruction", "--sfm_dir", out / "sfm", "--image_dir", images,
        "--pairs", listed[0], "--features", listed[1], "--matches", matches,
        "--camera_mode", "SINGLE",
    )  # fmt: skip
    assert len(colmap.read_model(out / "sfm").reg_image_ids()) == 3


# -------------------------------------------------------------------------- our files in hloc


LOCALISE = """
import sys
from pathlib import Path
from hloc import localize_sfm, triangulation
run, images, truth, output = map(Path, sys.argv[1:])
names = sorted(path.name for path in images.iterdir())
query, others = names[2], names[:2] + names[3:]
files = (run / "pairs.txt", run / "features.h5", run / "matches.h5")
reference = output / "reference"
reference.mkdir(parents=True)
for file in ("cameras.txt", "points3D.txt"):
    (reference / file).write_text((truth / file).read_text())
lines = (truth / "images.txt").read_text().splitlines()
kept = [line for line in lines if line.split()[-1:] and line.split()[-1] in names]
(reference / "images.txt").write_text("".join(line + "\\n\\n" for line in kept))
# With the known poses alone, hloc's triangulation finds nothing under pycolmap 4.2.
triangulation.main(output / "sfm", reference, images, *files, estimate_two_view_geometries=True)
camera = (truth / "cameras.txt").read_text().splitlines()[-1].split()[1:]
(output / "queries.txt").write_text(" ".join([query, *camera]))
(output / "retrieval.txt").write_text("\\n".join(f"{query} {name}" for name in others))
localize_sfm.main(
    output / "sfm", output / "queries.txt", output / "retrieval.txt", *files[1:],
    output / "poses.txt",
)
"""


@pytest.mark.slow
def test_hloc_triangulates_and_localises_with_our_files(hloc: RealHloc, tmp_path: Path) -> None:
    images = fountain(tmp_path / "images", range(3, 8))
    run, out = tmp_path / "run", tmp_path / "out"
    gim_hloc.reconstruct(
        images,
        run,
        matcher="sift",
        quality="fast",
        pairs="exhaustive",
        intrinsics="PINHOLE,919.826667,921.836562,506.896667,335.767202",
        refine_keypoints=False,
        progress=False,
    )
    script = tmp_path / "localise.py"
    script.write_text(LOCALISE)
    hloc.run(script, run, images, FOUNTAIN / "gt", out)
    model = colmap.read_model(out / "sfm")
    assert model.num_points3D() > 300
    assert model.compute_mean_reprojection_error() < 1.0
    name, *pose = (out / "poses.txt").read_text().split()
    true = sfm.read_cameras(FOUNTAIN / "gt")
    rotation, translation = true[name]
    w, x, y, z, *moved = map(float, pose)
    found = Rotation.from_quat([x, y, z, w]).as_matrix()
    angle = np.degrees(Rotation.from_matrix(found @ rotation.T).magnitude())
    centres = np.array([-r.T @ t for r, t in true.values()])
    radius = np.linalg.norm(centres - centres.mean(0), axis=1).max()
    distance = np.linalg.norm(-found.T @ np.array(moved) + rotation.T @ translation)
    assert name == "0005.jpg"
    assert angle < 0.2
    assert distance < 0.003 * radius


# --------------------------------------------------------------------------- made-up checkpoints


FILES = {
    "gim_dkm": ["gim_dkm_100h.ckpt"],
    "gim_roma": ["gim_roma_100h.ckpt", "dinov2_vitl14_pretrain.pth"],
    "gim_loftr": ["gim_loftr_50h.ckpt"],
    "gim_lightglue": ["gim_lightglue_100h.ckpt"],
}
# Networks of random numbers, small enough for seconds.
SMALL: dict[str, dict[str, Any]] = {
    "gim_dkm": {"size": (96, 128), "upsample_size": (112, 144), "num_matches": 300},
    "gim_dkm_zeb": {"size": (96, 128), "upsample_size": None, "num_matches": 300},
    "gim_roma": {"size": (112, 112), "upsample_size": None, "num_matches": 300},
    "gim_loftr": {"threshold": 1e-9},
    "gim_superpoint": {"max_keypoints": 200},
    "gim_lightglue": {"filter_threshold": 0.0},
}

DENSE = """
import sys
from pathlib import Path
import gim_hloc.hloc_plugin
from hloc import match_dense
name, images, pairs, output, small, resize = sys.argv[1:]
conf = match_dense.confs[name]
conf["model"] |= eval(small)
conf["preprocessing"] |= eval(resize)
print("RETURNED", *match_dense.main(conf, Path(pairs), Path(images), Path(output)))
"""
SPARSE = """
import sys
from pathlib import Path
import gim_hloc.hloc_plugin
from hloc import extract_features, match_features
images, pairs, output, detector, matcher = sys.argv[1:]
conf = extract_features.confs["gim_superpoint"]
conf["model"] |= eval(detector)
conf["preprocessing"]["resize_max"] = 160
print("RETURNED", extract_features.main(conf, Path(images), Path(output)))
match = match_features.confs["gim_lightglue"]
match["model"] |= eval(matcher)
print("RETURNED", match_features.main(match, Path(pairs), conf["output"], Path(output)))
"""


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Three photographs, one of them of another size in a sub-folder, and all their pairs."""
    import cv2

    folder = tmp_path_factory.mktemp("three")
    images = fountain(folder / "images", range(4, 7))
    (images / "sub").mkdir()
    last = cv2.imread(str(images / "0006.jpg"))
    cv2.imwrite(str(images / "sub" / "0006.png"), last[:300, :401])
    (images / "0006.jpg").unlink()
    for path in images.glob("*.jpg"):
        cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)), (320, 214)))
    pairs = folder / "pairs.txt"
    pairs.write_text("0004.jpg 0005.jpg\n0004.jpg sub/0006.png\n0005.jpg sub/0006.png")
    return images, pairs


SIZES = {"0004.jpg": (320, 214), "0005.jpg": (320, 214), "sub/0006.png": (401, 300)}
GROUPS = ["0004.jpg/0005.jpg", "0004.jpg/sub-0006.png", "0005.jpg/sub-0006.png"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def weights_of(matcher: str, folder: Path) -> Path:
    for file in FILES[matcher]:
        if not (folder / file).exists():
            made_up.write_checkpoint(file, folder / file)
    return folder


@pytest.mark.parametrize(
    "name",
    ["gim_dkm", "gim_dkm_zeb", pytest.param("gim_roma", marks=pytest.mark.slow), "gim_loftr"],
)
def test_dense_confs_in_hlocs_own_main(
    hloc: RealHloc, three: tuple[Path, Path], checkpoints: Path, tmp_path: Path, name: str
) -> None:
    images, pairs = three
    (tmp_path / "out").mkdir()  # hloc does not make it
    script = tmp_path / "dense.py"
    script.write_text(DENSE)
    resize = {"resize_max": 160} if name == "gim_loftr" else {}
    printed = hloc.run(
        script, name, images, pairs, tmp_path / "out", repr(SMALL[name]), repr(resize),
        weights=weights_of(name.removesuffix("_zeb"), checkpoints),
    )  # fmt: skip
    output = confs.MATCH_DENSE[name]["output"]
    files = [tmp_path / "out" / f"feats_{output}.h5", tmp_path / "out" / f"{output}_pairs.h5"]
    assert f"RETURNED {files[0]} {files[1]}" in printed
    features, matches = map(read, files)
    assert sorted(features) == sorted(SIZES)
    assert sorted(matches) == GROUPS
    for key, found in matches.items():
        a, b = (part.replace("-", "/") for part in key.split("/", 1))
        count = len(found["scores"])
        assert 0 < count <= 300 or name == "gim_loftr"
        assert found["keypoints0"].shape == found["keypoints1"].shape == (count, 2)
        # Original pixels, hloc's frame: an image reaches from -0.5 to its side less 0.5.
        for image, xy in ((a, found["keypoints0"]), (b, found["keypoints1"])):
            assert (xy >= -0.5).all()
            assert (xy <= np.array(SIZES[image]) - 0.5).all()
        assert found["matches0"].dtype == np.int32
        rows = found["matches0"]
        assert rows.max(initial=-1) < len(features[b]["keypoints"])
        assert len(rows) <= len(features[a]["keypoints"])
    spread = np.ptp(matches[GROUPS[0]]["keypoints0"], axis=0)
    assert (spread > 0.5 * np.array([320, 214])).all()
    if name == "gim_loftr":
        # The end on the grid of cells is in image 1, as with hloc's own LoFTR.
        grid = (matches[GROUPS[0]]["keypoints1"] + 0.5) / np.array([320 / 160, 214 / 104]) - 0.5
        np.testing.assert_allclose(grid, (grid / 8).round() * 8, atol=1e-3)


def test_sparse_confs_in_hlocs_own_mains(
    hloc: RealHloc, three: tuple[Path, Path], checkpoints: Path, tmp_path: Path
) -> None:
    images, pairs = three
    script = tmp_path / "sparse.py"
    script.write_text(SPARSE)
    printed = hloc.run(
        script, images, pairs, tmp_path / "out",
        repr(SMALL["gim_superpoint"]), repr(SMALL["gim_lightglue"]),
        weights=weights_of("gim_lightglue", checkpoints),
    )  # fmt: skip
    stem = "feats-gim-superpoint-n2048-r1920"
    files = [
        tmp_path / "out" / f"{stem}.h5",
        tmp_path / "out" / f"{stem}_matches-gim-lightglue_pairs.h5",
    ]
    for path in files:
        assert f"RETURNED {path}" in printed
    features, matches = map(read, files)
    assert sorted(features) == sorted(SIZES)
    for name, found in features.items():
        count = len(found["keypoints"])
        assert 50 < count <= 200
        assert found["descriptors"].shape == (256, count)
        assert found["scores"].shape == (count,)
        assert tuple(found["image_size"]) == SIZES[name]
        # Whole pixels of the network's image, in hloc's frame, carried to the original.
        width, height = SIZES[name]
        scale = np.array([width / 160, height / round(height * 160 / width)])
        network = (found["keypoints"] + 0.5) / scale - 0.5
        np.testing.assert_allclose(network, network.round(), atol=1e-3)
        with h5py.File(files[0]) as file:
            uncertainty = file[name]["keypoints"].attrs["uncertainty"]
        np.testing.assert_allclose(uncertainty, 2 * scale.mean(), rtol=1e-5)
    assert sorted(matches) == GROUPS
    for key, found in matches.items():
        a, b = (part.replace("-", "/") for part in key.split("/", 1))
        assert found["matches0"].shape == (len(features[a]["keypoints"]),)
        assert (found["matches0"].dtype, found["matching_scores0"].dtype) == (np.int16, np.float16)
        assert found["matches0"].max() < len(features[b]["keypoints"])


# ------------------------------------------------------------------------------------- drop-in


def test_the_drop_in_writes_what_hloc_writes(hloc: RealHloc, tmp_path: Path) -> None:
    scene = synthetic_dense.make_scene(synthetic_dense.SceneOptions(views=5, size=(320, 240)))
    synthetic_dense.write_scene(scene, tmp_path)
    hloc.run(Path(__file__).with_name("hloc_dense_driver.py"), tmp_path)
    files = sorted(path.name for path in (tmp_path / "hloc").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == files
    assert len(files) == 3 + 4
    for file in files:
        theirs, ours = (read(tmp_path / side / file) for side in ("hloc", "ours"))
        assert sorted(ours) == sorted(theirs), file
        for group, arrays in theirs.items():
            assert sorted(ours[group]) == sorted(arrays), (file, group)
            for key, values in arrays.items():
                mine = ours[group][key]
                if key in ("matches0", "matching_scores0"):
                    # hloc's end at the last match, ours have a row for each keypoint.
                    assert (mine[len(values) :] <= 0).all()
                    mine = mine[: len(values)]
                assert (mine.dtype, mine.shape) == (values.dtype, values.shape), (file, group, key)
                # hloc scales by one, which changes the last digit of raw matches; where nothing
                # is rounded (loc_) that digit reaches the keypoints.
                exact = not key.startswith("keypoints") or not re.search("matches-|loc_", file)
                if exact or file == "feats_matches-known.h5":
                    np.testing.assert_array_equal(mine, values, err_msg=f"{file} {group} {key}")
                else:
                    np.testing.assert_allclose(mine, values, rtol=0, atol=1e-4)
