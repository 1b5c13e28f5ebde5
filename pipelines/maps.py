"""Existing models to localise in or to extend: what an earlier run, or COLMAP, left."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gim_hloc import colmap
from gim_hloc.errors import InputError
from gim_hloc.hloc_files import find, open_h5, read
from gim_hloc.images import focal_prior
from gim_hloc.pairs.retrieval import strongest_first
from gim_hloc.pipelines.run import read_state
from gim_hloc.types import SparseEncoding

if TYPE_CHECKING:
    import h5py

    from gim_hloc.colmap import CameraSpec, MapView
    from gim_hloc.images import ImageRecord

# Keypoints may have moved from where they were detected (refinement to sub-pixel accuracy).
MOVED_PX = 8.0


@dataclass(kw_only=True)
class SceneMap:
    """A model with what is needed to match images to it.

    Attributes:
        folder: as given.
        model_folder: folder of the COLMAP model.
        model: ``pycolmap.Reconstruction``.
        views: registered images by name.
        features: h5 file in hloc's layout with keypoints and descriptors of the images, or None.
        images: folder of the images, or None.
        options: options of the run that made the map (``run.yaml``); empty for other maps.
        sources: image -> hash of what its features were made from; empty for other maps.
        turns: image -> quarter turns clockwise that show it upright.
    """

    folder: Path
    model_folder: Path
    model: Any
    views: dict[str, MapView]
    features: Path | None
    images: Path | None
    options: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    turns: dict[str, int] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether ``gim-reconstruct`` made it."""
        return bool(self.options)

    @functools.cached_property
    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids (N,) of the 3D points, ascending, and their positions (N, 3)."""
        return colmap.point_positions(self.model)

    @functools.cached_property
    def stamp(self) -> str:
        """Hash of poses, points and observations."""
        found = hashlib.sha256()
        arrays = [*self.points]
        for name, view in sorted(self.views.items()):
            found.update(name.encode("utf-8", "surrogateescape") + b"\0")
            arrays += [view.xy_px, view.points, *view.pose]
        for array in arrays:
            found.update(np.ascontiguousarray(array).tobytes())
        return found.hexdigest()[:24]

    def cameras_of_size(self, size: tuple[int, int]) -> list[CameraSpec]:
        """The different cameras of images of a (width, height), most used first."""
        counts: dict[tuple[Any, ...], int] = {}
        found: dict[tuple[Any, ...], CameraSpec] = {}
        for view in self.views.values():
            camera = view.camera
            if (camera.width, camera.height) == size:
                key = (camera.model, camera.params)
                counts[key] = counts.get(key, 0) + 1
                found[key] = camera
        return [found[key] for key in sorted(counts, key=lambda k: -counts[k])]


def open_map(
    folder: Path | str, *, features: Path | None = None, images: Path | None = None
) -> SceneMap:
    """Read a map.

    Args:
        folder: output folder of ``gim-reconstruct``, or a folder of a COLMAP model.
        features: feature file in hloc's layout instead of the run's own.
        images: image folder instead of the run's own.

    Raises:
        InputError: there is no model, it has no points, or a given file is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"There is no map {folder}.")
    model_folder = colmap.find_model(folder)
    model = colmap.read_model(model_folder)
    if not model.num_points3D():
        raise InputError(
            f"The model {model_folder} has no 3D points to localise by. Triangulate it first: "
            "gim-reconstruct IMAGES OUTPUT --model MAP."
        )
    state = read_state(folder) or {}
    made_here = state.get("command", "reconstruct") == "reconstruct"
    options = (state.get("options") or {}) if made_here else {}
    if features is None:
        # Dense matchers: what describes images are the anchors.
        candidates = (folder / "anchors.h5", folder / "features.h5")
        features = next((path for path in candidates if path.is_file()), None)
    elif not features.is_file():
        raise InputError(f"There is no feature file {features}.")
    if images is None and state.get("images"):
        images = Path(state["images"])
    if images is not None and not images.is_dir():
        if options and features is not None:
            images = None  # only some ways of matching need them
        else:
            raise InputError(f"There is no image folder {images}.")
    return SceneMap(
        folder=folder,
        model_folder=model_folder,
        model=model,
        views=colmap.map_views(model),
        features=features,
        images=images,
        options=options,
        sources=_sources(features),
        turns=_turns(folder, state),
    )


def _sources(features: Path | None) -> dict[str, str]:
    if features is None:
        return {}
    with open_h5(features, "feature file") as file:
        table = _table(file, "sources")
    # With the checksum of each entry, but in files of 0.1.
    return {name: given[0] if isinstance(given, list) else given for name, given in table.items()}


def _table(file: h5py.File, name: str) -> dict[str, Any]:
    """A table that our runs keep in an attribute; empty where others made the file."""
    try:
        return dict(json.loads(file.attrs.get(name, "{}")))
    except (OSError, TypeError, ValueError, RecursionError):
        return {}


def _turns(folder: Path, state: Mapping[str, Any]) -> dict[str, int]:
    try:
        facts = state["steps"]["rotations"]["facts"]
        return {name: int(turn) for name, (turn, _) in facts["images"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    try:  # of 0.1
        stored = json.loads((folder / "turns.json").read_text(encoding="utf-8"))["images"]
        return {name: int(entry["quarter_turns"]) for name, entry in stored.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def shared_camera(scene: SceneMap, record: ImageRecord) -> CameraSpec | None:
    """The map's camera for an image: the only one of its size, if EXIF does not contradict."""
    cameras = scene.cameras_of_size(record.size)
    if not cameras:
        return None
    # One physical camera may stand in a model several times, refined image by image.
    focal = [camera.params[0] for camera in cameras]
    if max(focal) > 1.02 * min(focal) or len({camera.model for camera in cameras}) > 1:
        return None
    stated = focal_prior(record)
    if stated is not None and not 0.9 < stated / focal[0] < 1.1:
        return None
    return cameras[0]


class MapFeatures:
    """Keypoints and descriptors of a map's images, read when they are asked for.

    Args:
        path: h5 file in hloc's layout.
        views: the images.

    Raises:
        InputError: an image or its descriptors are missing.
    """

    def __init__(self, path: Path, views: Mapping[str, MapView]) -> None:
        self.path = path
        self._views = views
        self._open = contextlib.ExitStack()
        self._file = self._open.enter_context(open_h5(path, "feature file"))
        missing = [n for n in views if find(self._file, f"{n}/keypoints") is None]
        if missing:
            raise InputError(
                f"{path} holds no keypoints of {len(missing)} of the map's {len(views)} images "
                f"(first: {missing[0]})."
            )
        bare = [name for name in views if find(self._file, f"{name}/descriptors") is None]
        if bare:
            raise InputError(
                f"{path} holds no descriptors of the map's images (first: {bare[0]}), so nothing "
                "can be matched to them. Extract features with the matcher you want, and give the "
                "file as --features."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return MapFeatures, (self.path, self._views)

    def close(self) -> None:
        """Close the file."""
        self._open.close()

    def descriptors(self, name: str) -> np.ndarray:
        """(n, D), strongest first."""
        arrays = self._arrays(name)
        return strongest_first(arrays["descriptors"].T, arrays["scores"])

    def _arrays(self, name: str) -> dict[str, np.ndarray]:
        """Keypoints (n, 2), descriptors (D, n) and scores (n,) of an image."""
        keypoints = read(self._file, f"{name}/keypoints")
        descriptors = read(self._file, f"{name}/descriptors")
        scores = np.ones(len(keypoints))
        if find(self._file, f"{name}/scores") is not None:
            scores = read(self._file, f"{name}/scores")
        if (
            keypoints.ndim != 2
            or keypoints.shape[1] < 2
            or descriptors.ndim != 2
            or not len(keypoints) == descriptors.shape[1] == scores.size
        ):
            raise InputError(
                f"{self.path}, {name}: keypoints {keypoints.shape}, descriptors "
                f"{descriptors.shape} and scores {scores.shape} are not (N, 2), (D, N) and (N,)."
            )
        return {"keypoints": keypoints[:, :2], "descriptors": descriptors, "scores": scores}

    def encoding(self, name: str) -> SparseEncoding:
        """An image's encoding as the matcher made it.

        Raises:
            InputError: its keypoints are not those of the model.
        """
        group = self._file[name]
        view = self._views[name]
        arrays = self._arrays(name)
        size = (view.camera.width, view.camera.height)
        arrays["image_size"] = np.array(size)
        attributes = {
            "network_size": group.attrs.get("network_size", size),
            "to_original": group.attrs.get("to_original", [1, 0, 0, 0, 1, 0]),
        }
        encoding = SparseEncoding.from_arrays(name, arrays, attributes)
        self._check(name, encoding.keypoints.numpy(), view)
        return encoding

    def _check(self, name: str, keypoints: np.ndarray, view: MapView) -> None:
        """Matches are rows of keypoints; they must be the model's rows too."""
        count = len(keypoints)
        seen = view.points[:count] >= 0
        moved = np.abs(keypoints[seen] - view.xy_px[:count][seen]).max(initial=0) if count else 0.0
        if count > len(view.xy_px) or moved > MOVED_PX:
            raise InputError(
                f"The keypoints of {name} in {self.path} ({count}) are not those of the model "
                f"({len(view.xy_px)}, up to {moved:.0f} px away): the model was made from other "
                "features."
            )


def same_features(path: Path, settings: Mapping[str, Any]) -> list[str]:
    """Names of the settings in which a map's features differ from a matcher's.

    Args:
        path: the map's feature file.
        settings: ``encode_settings`` of the matcher.
    """
    with open_h5(path, "feature file") as file:
        stored = _table(file, "settings")
    theirs = {k.removeprefix("encode."): v for k, v in stored.items() if k.startswith("encode.")}
    if not theirs:
        return []
    mine = json.loads(json.dumps(dict(settings), default=str))
    return sorted(k for k in {*theirs, *mine} if theirs.get(k) != mine.get(k))


__all__ = ["MapFeatures", "SceneMap", "open_map", "same_features", "shared_camera"]
