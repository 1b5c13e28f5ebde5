"""Run the real hloc from images to a model and write down what each of its stages took.

``vs_hloc`` starts this file in hloc's own environment. It is the user's side of hloc's SfM
notebook: the public ``main`` functions, in their order, with the settings made equal to ours. It
needs nothing of gim_hloc, because that environment may hold other versions of every library.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What hloc's ``reconstruction.main`` does, by the stage of ours that does the same.
RECONSTRUCTION_STAGES = {
    "create_empty_db": "verify",
    "import_images": "verify",
    "import_features": "verify",
    "import_matches": "verify",
    "estimation_and_geometric_verification": "verify",
    "run_reconstruction": "map",
}


class Stopwatch:
    """Adds up wall seconds by stage name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block; several blocks of one name add up."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def wrap(self, function: Any, name: str) -> Any:
        """Return ``function`` with its calls timed under ``name``."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return timed


def hloc_module(name: str) -> Any:
    """Import one module of hloc.

    By name and not by statement: within gim_hloc only ``hloc_plugin`` may depend on hloc, and this
    file is part of gim_hloc although it never runs inside it.
    """
    return importlib.import_module(f"hloc.{name}")


def image_options(intrinsics: str | None) -> dict[str, Any] | None:
    """Turn ``MODEL,p0,p1,...`` into the options of COLMAP's image reader."""
    if intrinsics is None:
        return None
    model, _, params = intrinsics.partition(",")
    return {"camera_model": model.strip(), "camera_params": params.strip()}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="new folder for everything")
    parser.add_argument("--keypoints", type=int, default=2048, help="budget per image")
    parser.add_argument("--detection-threshold", type=float, default=0.2)
    parser.add_argument("--camera-mode", default="SINGLE", help="pycolmap.CameraMode")
    parser.add_argument("--intrinsics", help="MODEL,p0,p1,...; then they stay fixed")
    parser.add_argument("--pairs", type=Path, help="pair file; all pairs without it")
    parser.add_argument("--half", action="store_true", help="hloc's float16 keypoints")
    parser.add_argument("--features-file", type=Path, help="given features: only reconstruct")
    parser.add_argument("--matches-file", type=Path, help="given matches: only reconstruct")
    return parser.parse_args(argv)


def make_features_and_matches(
    arguments: argparse.Namespace, pairs: Path, clock: Stopwatch
) -> tuple[Path, Path]:
    """Extract ALIKED features and match them with LightGlue, as hloc's commands would."""
    extract_features = hloc_module("extract_features")
    match_features = hloc_module("match_features")
    features, matches = arguments.output / "features.h5", arguments.output / "matches.h5"
    conf = copy.deepcopy(extract_features.confs["aliked-n16"])
    conf["model"]["max_num_keypoints"] = arguments.keypoints
    conf["model"]["detection_threshold"] = arguments.detection_threshold
    with clock.stage("encode"):
        extract_features.main(conf, arguments.images, feature_path=features, as_half=arguments.half)
    if arguments.pairs is None:
        with clock.stage("pairs"):
            hloc_module("pairs_from_exhaustive").main(pairs, features=features)
    with clock.stage("match"):
        match_features.main(
            copy.deepcopy(match_features.confs["aliked+lightglue"]),
            pairs,
            features=features,
            matches=matches,
        )
    return features, matches


def main(argv: list[str] | None = None) -> None:
    """Run hloc and write ``OUTPUT/timings.json``; the model is in ``OUTPUT/sfm``."""
    arguments = parse_arguments(argv)
    clock = Stopwatch()
    reconstruction = hloc_module("reconstruction")
    pycolmap = importlib.import_module("pycolmap")
    torch = importlib.import_module("torch")
    arguments.output.mkdir(parents=True, exist_ok=True)
    pairs = arguments.pairs or arguments.output / "pairs.txt"

    if arguments.features_file is not None:
        features, matches = arguments.features_file, arguments.matches_file
    else:
        features, matches = make_features_and_matches(arguments, pairs, clock)

    # hloc offers no timings: its own steps are wrapped where ``main`` looks them up.
    for function, stage in RECONSTRUCTION_STAGES.items():
        setattr(reconstruction, function, clock.wrap(getattr(reconstruction, function), stage))
    fixed = arguments.intrinsics is not None
    model = reconstruction.main(
        arguments.output / "sfm",
        arguments.images,
        pairs,
        features,
        matches,
        camera_mode=getattr(pycolmap.CameraMode, arguments.camera_mode),
        image_options=image_options(arguments.intrinsics),
        mapper_options={
            "ba_refine_focal_length": False,
            "ba_refine_principal_point": False,
            "ba_refine_extra_params": False,
        }
        if fixed
        else None,
    )
    result = {
        "timings": clock.seconds,
        "registered": 0 if model is None else model.num_reg_images(),
        "points": 0 if model is None else model.num_points3D(),
        "versions": {
            "hloc": importlib.import_module("hloc").__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pycolmap": pycolmap.__version__,
        },
    }
    (arguments.output / "timings.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
