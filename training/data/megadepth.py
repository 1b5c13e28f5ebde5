"""MegaDepth with the scene files of D2-Net or LoFTR.

Two layouts of the scene files (``.npz``) are read, told apart by their content:

* D2-Net's: ``overlap_matrix``, ``image_paths``, ``depth_paths``, ``intrinsics``, ``poses`` (world
  to camera); entries of images that were left out are ``None``. Pairs are chosen by the two
  directed overlaps, evenly over bins.
* LoFTR's newer one, where ``pair_infos`` lists ((i, j), overlap, ...) instead of the matrix, a
  scene having one file per range of overlap. The one overlap stands for both directions.

A scene ``0022`` is ``0022.npz`` or all of ``0022_*.npz`` and ``0022.*.npz``. Depth maps are h5
files with the data set ``depth``. Principal points are COLMAP's and count from the corner of the
first pixel; they are converted.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.files import read_text
from gim_hloc.options import options
from gim_hloc.pickles import read_npz
from gim_hloc.training.data.posed import View, ViewPairs
from gim_hloc.training.data.source import (
    SUBSAMPLING_SEED,
    SourceOptions,
    choose_by_overlap,
    overlap_edges,
)

logger = logging.getLogger(__name__)

VALIDATION_SCENES = ("0022",)
# The two scenes of the MegaDepth-1500 benchmark are never trained on unless they are named.
_HELD_OUT = ("0015", "0022")


@options
class MegaDepthOptions(SourceOptions):
    """Which pairs of MegaDepth. The defaults are those of ``training.md`` §3."""

    root: Path  # folder that the paths of images and depth maps in the scene files begin from
    scene_info: Path | None = None  # folder of the scene files; None: output, scene_info... in root
    scenes: tuple[str, ...] | None = None  # names; None: all but 0015 and 0022; validation: 0022
    scene_list: Path | None = None  # file with a name per line, in place of scenes
    overlap: tuple[float, float] | None = None  # None: 0.01 to 0.7; validation: 0.1 to 0.7
    overlap_step: float = 0.1  # width of the bins that pairs are chosen from evenly
    max_pairs: int | None = None  # of a scene; None: 100000; validation: 2000
    drawn: int | None = None  # drawn of all pairs in the end; None: all; validation: 1000
    corner_origin: bool = True  # principal points count from the corner of the first pixel

    AUGMENT: ClassVar[Mapping[str, Any]] = {"photometric": "dark", "keep_scale": 0.5}


class MegaDepth(ViewPairs):
    """Pairs of MegaDepth.

    Raises:
        InputError: scene files are missing, damaged or of neither layout, or hold no pair.
    """

    def __init__(self, options: MegaDepthOptions) -> None:
        super().__init__(options.name or "megadepth", options.augmentation(), options.failures)
        from tqdm import tqdm

        self._root = Path(options.root)
        validation = options.split == "validation"
        overlap = options.overlap or ((0.1, 0.7) if validation else (0.01, 0.7))
        # A validation list is one draw, not an even one over bins.
        step = overlap[1] - overlap[0] if validation else options.overlap_step
        edges = overlap_edges(*overlap, step)
        limit = options.max_pairs or (2000 if validation else 100_000)
        self._views: list[View] = []
        pairs, lengths = [], []
        scenes = _scene_files(options)
        for name, files in tqdm(scenes.items(), desc=self.name, disable=len(scenes) < 10):
            found = [self._read_scene(path, options.corner_origin) for path in files]
            ends = np.concatenate([f[0] for f in found])
            overlaps = np.concatenate([f[1] for f in found])
            chosen = choose_by_overlap(overlaps[:, 0], overlaps[:, 1], edges, limit)
            if not len(chosen):
                logger.warning("No pair of scene %s overlaps in %s; it is left out.", name, overlap)
            pairs.append(ends[chosen].astype(np.int32))
            lengths.append(len(chosen))
        self._pairs = np.concatenate(pairs)
        if not len(self._pairs):
            raise InputError(f"No pair of {', '.join(scenes)} overlaps between {overlap}.")
        self._lengths = np.array(lengths, dtype=np.int64)
        drawn = options.drawn or (1000 if validation else None)
        if drawn is not None and drawn < len(self._pairs):
            rng = np.random.default_rng([SUBSAMPLING_SEED, 1])
            kept = np.sort(rng.choice(len(self._pairs), drawn, replace=False))
            owner = np.repeat(np.arange(len(lengths)), lengths)[kept]
            self._pairs = self._pairs[kept]
            self._lengths = np.bincount(owner, minlength=len(lengths))

    def _read_scene(self, path: Path, corner_origin: bool) -> tuple[np.ndarray, np.ndarray]:
        """Pairs (P, 2) as rows of ``_views``, which grows, and their overlaps (P, 2)."""
        info = read_npz(path)
        needed = {"image_paths", "depth_paths", "intrinsics", "poses"}
        if needed - info.keys() or not info.keys() & {"overlap_matrix", "pair_infos"}:
            raise InputError(
                f"{path} is no scene file: it needs {', '.join(sorted(needed))} and "
                f"overlap_matrix or pair_infos, and has {', '.join(sorted(info))}."
            )
        if "pair_infos" in info:
            rows = [(*entry[0], float(entry[1])) for entry in info["pair_infos"]]
            table = np.array(rows, dtype=np.float64).reshape(-1, 3)
            ends, overlaps = table[:, :2].astype(np.int64), table[:, [2, 2]]
        else:
            matrix = np.asarray(info["overlap_matrix"], dtype=np.float32)
            i, j = np.nonzero(np.triu((matrix > 0) & (matrix.T > 0), 1))
            ends, overlaps = np.stack([i, j], 1), np.stack([matrix[i, j], matrix[j, i]], 1)
        known = np.array(
            [
                all(info[key][k] is not None for key in needed)
                for k in range(len(info["image_paths"]))
            ],
            dtype=bool,
        )
        usable = known[ends].all(1)
        ends, overlaps = ends[usable], overlaps[usable]
        used = np.unique(ends)
        place = np.full(len(known), -1)
        place[used] = np.arange(len(self._views), len(self._views) + len(used))
        for k in used:
            K = np.array(info["intrinsics"][k], dtype=np.float64)
            if corner_origin:
                K[:2, 2] -= 0.5
            self._views.append(
                View(
                    name=str(info["image_paths"][k]),
                    image=self._root / str(info["image_paths"][k]),
                    depth=self._root / str(info["depth_paths"][k]),
                    K=K,
                    world_to_camera=np.array(info["poses"][k], dtype=np.float64),
                )
            )
        return place[ends], overlaps


_INFO_FOLDERS = ("output", "scene_info", "index/scene_info_0.1_0.7", "scene_info_0.1_0.7", "index")


def _scene_files(options: MegaDepthOptions) -> dict[str, list[Path]]:
    root = Path(options.root)
    folder = options.scene_info or next(
        (root / name for name in _INFO_FOLDERS if any((root / name).glob("[!.]*.npz"))), None
    )
    files = [] if folder is None else sorted(Path(folder).glob("[!.]*.npz"))
    if not files:
        raise InputError(
            f"{folder or root} holds no scene files (.npz); looked for in "
            f"{', '.join(_INFO_FOLDERS)}. Give scene_info."
        )
    by_scene: dict[str, list[Path]] = {}
    for path in files:
        by_scene.setdefault(path.stem.split("_")[0].split(".")[0], []).append(path)
    names = options.scenes
    if options.scene_list is not None:
        names = tuple(read_text(options.scene_list, "list of scenes").split())
    if names is None:
        if options.split == "validation":
            names = VALIDATION_SCENES
        else:
            names = tuple(name for name in by_scene if name not in _HELD_OUT)
    missing = [name for name in names if name not in by_scene]
    if missing or not names:
        raise InputError(
            f"{folder} has no scene file of {', '.join(missing[:10]) or 'any scene to train on'}."
        )
    return {name: by_scene[name] for name in names}
