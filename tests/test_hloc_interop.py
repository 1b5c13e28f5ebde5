"""Real hloc reads the files of our runs.

Needs a checkout of hloc, a Python environment in which it runs, and a script that makes it
importable there; without them the tests are skipped. Set ``GIM_HLOC_HLOC_CHECKOUT``,
``GIM_HLOC_HLOC_PYTHON`` and, unless it is in ``../shared/tools``, ``GIM_HLOC_WITH_HLOC``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest

import gim_hloc
from gim_hloc import colmap
from gim_hloc.evaluation import sfm
from gim_hloc.evaluation.benchmarks import vs_hloc

SHARED = Path(__file__).parents[2] / "shared"
FOUNTAIN = SHARED / "data" / "fountain-P11"
INTRINSICS = "PINHOLE,919.826667,921.836562,506.896667,335.767202"

pytestmark = [pytest.mark.hloc, pytest.mark.slow]


@dataclass(frozen=True)
class RealHloc:
    """How to run a script with hloc."""

    checkout: Path
    python: Path
    tool: Path

    def run(self, script: Path, *arguments: str | Path) -> str:
        command = [self.python, self.tool, self.checkout, script, *arguments]
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout


@pytest.fixture(scope="module")
def hloc() -> RealHloc:
    tool = os.environ.get("GIM_HLOC_WITH_HLOC", str(SHARED / "tools" / "with_hloc.py"))
    values = {
        "GIM_HLOC_HLOC_CHECKOUT": os.environ.get("GIM_HLOC_HLOC_CHECKOUT", ""),
        "GIM_HLOC_HLOC_PYTHON": os.environ.get("GIM_HLOC_HLOC_PYTHON", ""),
        "GIM_HLOC_WITH_HLOC": tool,
    }
    for variable, value in values.items():
        if not value or not Path(value).exists():
            pytest.skip(f"set {variable} to run against real hloc")
    checkout, python, script = (Path(value) for value in values.values())
    return RealHloc(checkout=checkout, python=python, tool=script)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five photographs, some of them in a sub-folder: hloc's pair keys are special there."""
    if not FOUNTAIN.is_dir():
        pytest.skip("needs ../shared/data/fountain-P11")
    root = tmp_path_factory.mktemp("images")
    (root / "right").mkdir()
    for number in range(2, 7):
        folder = root / "right" if number > 4 else root
        shutil.copy(FOUNTAIN / "images" / f"{number:04d}.jpg", folder)
    return root


@pytest.fixture(scope="module", params=["sift", "aliked_lightglue"])
def run(
    request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Output folder of a run of ours."""
    output = tmp_path_factory.mktemp(request.param) / "run"
    gim_hloc.reconstruct(
        images,
        output,
        matcher=request.param,
        quality="fast",
        max_keypoints=1024,
        pairs="exhaustive",
        intrinsics=INTRINSICS,
        camera_mode="single",
        refine_keypoints=False,  # so that both models hold the keypoints of the file
        progress=False,
    )
    return output


def test_hloc_reconstructs_from_our_files(
    hloc: RealHloc, images: Path, run: Path, tmp_path: Path
) -> None:
    output = tmp_path / "hloc"
    hloc.run(
        vs_hloc.DRIVER,
        *("--images", images, "--output", output, "--intrinsics", INTRINSICS),
        *("--pairs", run / "pairs.txt", "--features-file", run / "features.h5"),
        *("--matches-file", run / "matches.h5"),
    )
    assert json.loads((output / "timings.json").read_text())["registered"] == 5
    theirs = sfm.evaluate(output / "sfm", FOUNTAIN / "gt")
    ours = sfm.evaluate(run, FOUNTAIN / "gt")
    assert theirs.registered == ours.registered == 5
    # Five cameras on a gentle arc: the pairs judge better than an alignment of their centres.
    for scores in (theirs, ours):
        errors = [error for error in scores.pair_errors if np.isfinite(error)]
        assert len(errors) == 10
        assert np.median(errors) < 0.5
    # Both models stand on the same pixels: stored ones, half a pixel from COLMAP's.
    with h5py.File(run / "features.h5") as features:
        for folder in (output / "sfm", run / "sparse" / "0"):
            model = colmap.read_model(folder)
            for image_id in model.reg_image_ids():
                image = model.image(image_id)
                xy = np.array([point.xy for point in image.points2D])
                expected = features[image.name]["keypoints"][:] + 0.5
                np.testing.assert_allclose(xy, expected, rtol=0, atol=1e-3)


READ = """
import json, sys
from pathlib import Path
from hloc.utils.io import get_keypoints, get_matches, list_h5_names
from hloc.utils.parsers import parse_retrieval
folder = Path(sys.argv[1])
names = sorted(list_h5_names(folder / "features.h5"))
pairs = [(a, b) for a, others in parse_retrieval(folder / "pairs.txt").items() for b in others]
keypoints = {name: get_keypoints(folder / "features.h5", name) for name in names}
counts = {}
for a, b in pairs:
    for first, second in ((a, b), (b, a)):
        matches, scores = get_matches(folder / "matches.h5", first, second)
        assert len(matches) == len(scores)
        if len(matches):
            assert matches[:, 0].max() < len(keypoints[first])
            assert matches[:, 1].max() < len(keypoints[second])
        counts[first + " " + second] = len(matches)
print("RESULT" + json.dumps(dict(
    names=names, pairs=pairs, counts=counts,
    keypoints={n: [str(k.dtype), *k.shape, float(k.min()), float(k.max())]
               for n, k in keypoints.items()})))
"""


def test_hlocs_readers_accept_every_entry(
    hloc: RealHloc, images: Path, run: Path, tmp_path: Path
) -> None:
    script = tmp_path / "read.py"
    script.write_text(READ)
    printed = hloc.run(script, run)
    found = json.loads(printed[printed.index("RESULT") + len("RESULT") :])
    names = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.jpg"))
    assert found["names"] == names
    assert "right/0005.jpg" in names
    assert len(found["pairs"]) == 10
    for dtype, count, width, lowest, highest in found["keypoints"].values():
        assert (dtype, width) == ("float32", 2)
        assert 100 < count <= 1024
        assert lowest >= -0.5
        assert highest <= 1023.5
    for a, b in found["pairs"]:
        assert found["counts"][f"{a} {b}"] == found["counts"][f"{b} {a}"]
    assert np.median(list(found["counts"].values())) > 50
