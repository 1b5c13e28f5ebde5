"""Dense matching through hloc's ``match_dense.main`` and through our drop-in: time without network.

    python -m gim_hloc.evaluation.benchmarks.hloc_dense [--views N --pairs N --width PX]
        [--hloc CHECKOUT --with-hloc TOOL.py --hloc-python PYTHON]

Both get the same images, the same pairs and the same matcher, which knows the scene and plays the
network; its time on one thread (with anchored tracks that of the detector of anchors, too) is
taken off the wall time of ``main``. What is left is reading images, finding keypoints, writing
files. The same in processor seconds of all processes stands beside it: it does not depend on what
else the machine does.

* ``hloc``: the real ``hloc.match_dense.main`` with our model in it, which encodes each image once;
* ``quantized``: our ``match_dense.main`` with hloc's tracks. Its files must be hloc's: the same
  groups, datasets, types and shapes, and equal keypoints and matches;
* ``anchored``: our ``match_dense.main`` as it is by default: the same groups and datasets.

hloc's environment needs gim_hloc, too. Exit code 1 means that a bound was missed or files differ, 2
that a program failed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from gim_hloc.cli import common
from gim_hloc.errors import InputError
from gim_hloc.evaluation import sfm, synthetic_dense
from gim_hloc.evaluation.benchmarks import measure
from gim_hloc.evaluation.synthetic_dense import SceneOptions

DRIVER = Path(__file__).with_name("_hloc_dense_driver.py")
PACKAGES = ("gim-hloc", "torch", "numpy", "scipy", "h5py")
SIDES = ("hloc", "quantized", "anchored")


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Compare hloc's dense matching with ours, network aside."""

    views: int = 24
    """Images of the synthetic scene."""
    pairs: int | None = None
    """Pairs of the most similar views; all of them unless given."""
    width: int = 1600
    """Width of the images, px; the height is three quarters of it."""
    samples: int = 5000
    """Matches drawn per pair."""
    describer: str = "sift"
    """Detector of anchors; its time counts as the network's. none: a grid alone."""
    hloc: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Checkout of cvg/Hierarchical-Localization; GIM_HLOC_HLOC_CHECKOUT without."""
    with_hloc: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Script that runs another with hloc importable; GIM_HLOC_WITH_HLOC without."""
    hloc_python: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Python of hloc's environment; GIM_HLOC_HLOC_PYTHON without."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write every number to this file."""

    max_time_ratio: float = 0.1
    """Bound: wall time outside the network, ours over hloc's, for both kinds of tracks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see the module."""
    options = tyro.cli(BenchmarkOptions, prog="hloc_dense", args=common.prog(argv))
    common.configure_logging()
    return common.run(lambda: _run(options))


def hloc_paths(options: BenchmarkOptions) -> dict[str, Path]:
    """Python, tool and checkout of hloc, from the options or the environment.

    Raises:
        InputError: one of them is missing.
    """
    given = {
        "python": options.hloc_python or os.environ.get("GIM_HLOC_HLOC_PYTHON"),
        "tool": options.with_hloc or os.environ.get("GIM_HLOC_WITH_HLOC"),
        "checkout": options.hloc or os.environ.get("GIM_HLOC_HLOC_CHECKOUT"),
    }
    missing = [name for name, value in given.items() if not value or not Path(value).exists()]
    if missing:
        raise InputError(
            "To run hloc, give --hloc, --with-hloc and --hloc-python (or the environment variables "
            f"of their help) and let them exist; missing: {', '.join(missing)}."
        )
    return {name: Path(str(value)) for name, value in given.items()}


def _run(options: BenchmarkOptions) -> int:
    paths = hloc_paths(options)
    if options.views < 4:
        raise InputError("Give at least 4 views.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scene = synthetic_dense.make_scene(
            SceneOptions(views=options.views, size=(options.width, options.width * 3 // 4))
        )
        synthetic_dense.write_scene(scene, folder)
        pairs = scene.pairs(options.pairs)
        (folder / "pairs.txt").write_text("\n".join(f"{a} {b}" for a, b in pairs))
        conf = {
            "output": "matches-known",
            "model": {
                "name": "gim_hloc_dense",
                "matcher": synthetic_dense.NAME,
                "scene": str(folder / "scene.json"),
                "size": [144, 192],  # a small network: its time does not count
                "num_matches": options.samples,
            },
            "preprocessing": {"grayscale": False, "resize_max": None, "dfactor": 1},
            "max_error": 2,
            "cell_size": 8,
        }
        results: dict[str, dict[str, Any]] = {}
        for side in SIDES:
            command = [*paths.values(), DRIVER, folder, side, folder / side]
            command += [json.dumps(conf), options.describer]
            threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            usage = measure.measured_run(command, log=folder / f"{side}.log", environment=threads)
            found = json.loads((folder / side / "timings.json").read_text())
            found["outside_s"] = found["wall_s"] - found["network_s"]
            found["outside_processor_s"] = found["processor_s"] - found["network_processor_s"]
            results[side] = found | {"peak_tree_mib": usage.peak_tree_mib}
        sentences = [s for side in SIDES[1:] for s in _differences(results, side)]
    for side in SIDES[1:]:
        for key, of in (("ratio", "outside_s"), ("processor_ratio", "outside_processor_s")):
            results[side][key] = results[side][of] / results["hloc"][of]
        ratio = results[side]["ratio"]
        if ratio > options.max_time_ratio:
            sentences.append(
                f"{side}: {ratio:.3f} of hloc's time outside the network, more than "
                f"{options.max_time_ratio:g}"
            )
    context = {
        "date": measure.now(),
        "commit": measure.commit(Path(__file__).parent),
        "machine": measure.machine(),
        "versions": measure.versions(PACKAGES) | results["hloc"]["versions"],
    }
    _say(", ".join(f"{name} {value}" for name, value in context["versions"].items()))
    _say(f"{len(scene.names)} images of {options.width} px, {len(pairs)} pairs")
    _say("| side | wall | network | outside | ratio | processor, outside | ratio | peak memory |")
    _say("|" + 8 * "---|")
    for side, found in results.items():
        wall, processor = (found.get(key, 1.0) for key in ("ratio", "processor_ratio"))
        _say(
            f"| {side} | {found['wall_s']:.1f} s | {found['network_s']:.1f} s | "
            f"{found['outside_s']:.2f} s | {wall:.3f} | {found['outside_processor_s']:.2f} s | "
            f"{processor:.3f} | {found['peak_tree_mib']:.0f} MiB |"
        )
    if options.json is not None:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        text = {**context, "settings": settings, "missed": sentences, "results": results}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(sfm.plain(text), indent=1) + "\n")
    for sentence in sentences:
        _say("missed: " + sentence)
    _say("every bound is met" if not sentences else f"{len(sentences)} bounds are missed")
    return 1 if sentences else 0


def _differences(results: dict[str, dict[str, Any]], side: str) -> list[str]:
    """What a side's files have otherwise than hloc's."""
    found = []
    for which in ("features", "matches"):
        theirs, ours = (Path(results[name][which]) for name in ("hloc", side))
        expected, mine = _read(theirs), _read(ours)
        if theirs.name != ours.name:
            found.append(f"{side}: {ours.name} instead of {theirs.name}")
        if sorted(expected) != sorted(mine):
            found.append(f"{side}: {ours.name} has other groups or datasets than hloc's")
            continue
        bad = 0
        for name, value in expected.items():
            same_type = mine[name].dtype == value.dtype
            if side == "quantized":
                # hloc scales raw matches, which changes their last digits.
                raw = which == "matches" and name.rpartition("/")[2].startswith("keypoints")
                same = mine[name].shape == value.shape and (
                    np.allclose(mine[name], value, rtol=0, atol=1e-3)
                    if raw
                    else np.array_equal(mine[name], value)
                )
            else:
                same = mine[name].shape[1:] == value.shape[1:]
            bad += not (same and same_type)
        if bad:
            found.append(f"{side}: {bad} of {len(expected)} datasets of {ours.name} differ")
    return found


def _read(path: Path) -> dict[str, np.ndarray]:
    import h5py

    found: dict[str, np.ndarray] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, h5py.Dataset):
            found[name] = value[()]

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
