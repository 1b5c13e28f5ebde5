"""ScanNet as it was preprocessed for LoFTR.

* ``train_scene_info/npz/<scene>.npz``: ``name`` (n, 4) integers (scene, scan, frame, frame) and
  ``score`` (n,), the overlap;
* ``intrinsics.npz``: 3 x 3 numbers for 640 x 480 images by name of the scan;
* ``scans/scene0000_00/``: ``color/<frame>.jpg``, ``depth/<frame>.png`` in millimetres and
  ``pose/<frame>.txt``, camera to world.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.options import options
from gim_hloc.pickles import read_npz
from gim_hloc.training.data.augment import RawPair
from gim_hloc.training.data.depth_maps import MILLIMETRES
from gim_hloc.training.data.posed import View, read_view
from gim_hloc.training.data.rgbd import read_matrix
from gim_hloc.training.data.source import (
    PairSource,
    SourceOptions,
    choose_by_overlap,
    overlap_edges,
    relative_pose,
)

SIZE = (640, 480)  # of depth maps, of resized images and what the intrinsics are for
_FRAME_STEP = 10  # only such frames were exported


@options
class ScanNetOptions(SourceOptions):
    """Which pairs of ScanNet. The defaults are those of ``training.md`` §3."""

    root: Path  # folder of everything
    scans: Path | None = None  # folder of the scans; None: scans, train... in root, or root
    scene_info: Path | None = None  # folder of the scene files; None: train_scene_info/npz in root
    intrinsics: Path | None = None  # file; None: intrinsics.npz in root or beside the scene files
    scenes: tuple[str, ...] | None = None  # names of scene files without suffix; None: all
    overlap: tuple[float, float] = (0.0, 0.7)  # of pairs
    overlap_step: float = 0.1  # width of the bins that pairs are chosen from evenly
    max_pairs: int = 10_000  # of a scene file

    AUGMENT: ClassVar[Mapping[str, Any]] = {"photometric": "none", "keep_scale": 0.5}


class ScanNet(PairSource):
    """Pairs of ScanNet.

    Raises:
        InputError: a part is missing or damaged, or there are no pairs.
    """

    def __init__(self, options: ScanNetOptions) -> None:
        super().__init__(options.name or "scannet", options.augmentation(), options.failures)
        from tqdm import tqdm

        root = Path(options.root)
        self._scans = options.scans or _first(root, ("scans", "train", "scannet_train"), root)
        folder = options.scene_info or _first(
            root, ("train_scene_info/npz", "train_scene_info", "scene_data/train"), root
        )
        files = {path.stem: path for path in sorted(Path(folder).glob("[!.]*.npz"))}
        files.pop("intrinsics", None)
        names = options.scenes or tuple(files)
        missing = [name for name in names if name not in files]
        if missing or not names:
            raise InputError(f"{folder} has no scene file of {', '.join(missing) or 'any scene'}.")
        intrinsics = options.intrinsics or next(
            (
                place / "intrinsics.npz"
                for place in (root, Path(folder), Path(folder).parent)
                if (place / "intrinsics.npz").is_file()
            ),
            root / "intrinsics.npz",
        )
        self._intrinsics = {
            name: np.asarray(K, dtype=np.float64).reshape(K.shape)[:3, :3]
            for name, K in read_npz(intrinsics).items()
        }
        self._intrinsics_file = intrinsics
        edges = overlap_edges(*options.overlap, options.overlap_step)
        pairs, lengths = [], []
        for name in tqdm(names, desc=self.name, disable=len(names) < 100):
            info = read_npz(files[name])
            if info.keys() < {"name", "score"} or info["name"].shape[1:] != (4,):
                raise InputError(f"{files[name]} is no scene file: it needs name (n, 4) and score.")
            frames = info["name"].astype(np.int32)
            exported = (frames[:, 2:] % _FRAME_STEP == 0).all(1)
            frames, score = frames[exported], info["score"][exported]
            chosen = choose_by_overlap(score, score, edges, options.max_pairs)
            pairs.append(frames[chosen])
            lengths.append(len(chosen))
        self._pairs = np.concatenate(pairs)
        self._lengths = np.array(lengths, dtype=np.int64)
        if not len(self._pairs):
            raise InputError(f"{folder} has no pairs with an overlap in {options.overlap}.")

    def scene_lengths(self) -> np.ndarray:
        """Pairs of each scene file."""
        return self._lengths

    def describe(self, index: int) -> str:
        """Scan and frames."""
        scene, scan, i, j = self._pairs[index]
        return f"{self.name} scene{scene:04d}_{scan:02d} {i} - {j}"

    def load(self, index: int) -> RawPair:
        """Read images, depth and poses; everything on 640 x 480 pixels."""
        scene, scan, *frames = self._pairs[index]
        name = f"scene{scene:04d}_{scan:02d}"
        if name not in self._intrinsics:
            raise InputError(f"{self._intrinsics_file} has no intrinsics of {name}.")
        views, content = [], []
        for frame in frames:
            pose = read_matrix(self._scans / name / "pose" / f"{frame}.txt", (4,))
            if not np.isfinite(pose).all():  # tracking was lost
                raise InputError(f"{name}: the pose of frame {frame} is not known.")
            view = View(
                name=f"{name}/{frame}",
                image=self._scans / name / "color" / f"{frame}.jpg",
                depth=self._scans / name / "depth" / f"{frame}.png",
                K=self._intrinsics[name],
                world_to_camera=np.linalg.inv(pose),
                size=SIZE,
            )
            views.append(view)
            content.append(read_view(view, MILLIMETRES))
        (image0, depth0, k0), (image1, depth1, k1) = content
        return RawPair(
            image0=image0,
            image1=image1,
            names=(views[0].name, views[1].name),
            depth0=depth0,
            depth1=depth1,
            K0=k0,
            K1=k1,
            T_0to1=relative_pose(views[0].world_to_camera, views[1].world_to_camera, name),
        )


def _first(root: Path, names: tuple[str, ...], otherwise: Path) -> Path:
    return next((root / name for name in names if (root / name).is_dir()), otherwise)
