"""Adding images to an existing model: what is taken over from the run that made it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gim_hloc import images as image_module
from gim_hloc.errors import InputError, OutputError
from gim_hloc.images import ImageRecord, ImageSet, RejectedImage
from gim_hloc.matchers import refuse_code
from gim_hloc.pipelines.maps import SceneMap, open_map, shared_camera
from gim_hloc.poses import KnownPoses
from gim_hloc.store import cache_path, remove_cache
from gim_hloc.tracks.anchored import AnchoredOptions
from gim_hloc.tracks.quantized import QuantizedOptions

if TYPE_CHECKING:
    from gim_hloc.pipelines.reconstruct import ReconstructOptions

# Everything that decides encodings, anchors and readings: new images must be treated as the old.
_TAKEN_OVER = (
    "matcher", "quality", "max_size", "max_keypoints", "tracks", "anchors", "matcher_options",
    "masks", "mask_erode", "rotations", "anchored", "quantized",
)  # fmt: skip
_TYPES = {"anchored": AnchoredOptions, "quantized": QuantizedOptions}


class Extension:
    """The run whose model is extended.

    Args:
        folder: its output folder, which is only read.

    Raises:
        InputError: it is no output of ``gim-reconstruct``, or lacks what is needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.map: SceneMap = open_map(folder)
        if not self.map.ours:
            raise InputError(
                f"--extend {folder}: there is no run.yaml, so it is no output of gim-reconstruct. "
                "Other models: put all images into one folder and give the model as --model."
            )
        if self.map.options.get("features"):
            raise InputError(
                f"--extend {folder}: its keypoints and matches came from files (--features), so "
                "new images cannot be matched to them."
            )
        if self.map.images is None:
            raise InputError(f"--extend {folder}: the folder of its images is not there any more.")

    def options(self, given: ReconstructOptions) -> ReconstructOptions:
        """The given options with the map's where those decide.

        Raises:
            InputError: an option was given that differs from the map's.
        """
        default = type(given)()
        values: dict[str, Any] = {}
        for name in _TAKEN_OVER:
            if name not in self.map.options:
                continue
            value = self.map.options[name]
            if name in _TYPES:
                known = {f.name for f in dataclasses.fields(_TYPES[name])}
                value = _TYPES[name](**{k: v for k, v in value.items() if k in known})
            elif name == "masks":
                value = None if value is None else Path(value)
            elif isinstance(value, list):
                value = tuple(value)
            asked = getattr(given, name)
            if name in ("matcher", "anchors") and asked != value:
                refuse_code(str(value), f"The map {self.folder}", f"--{name}")
            if asked not in (getattr(default, name), value):
                raise InputError(
                    f"--{name.replace('_', '-')} {asked}: the map {self.folder} was made with "
                    f"{value}, and its images are not computed again."
                )
            values[name] = value
        rig = self.map.options.get("cameras", {}).get("rig")
        if rig is not None and given.cameras.rig is None:
            values["cameras"] = dataclasses.replace(given.cameras, rig=Path(rig))
        return dataclasses.replace(given, **values)

    def images(self, new: ImageSet) -> tuple[ImageSet, list[str]]:
        """Images of the map and the new ones.

        Args:
            new: what the folder of new images holds; images that the map has are passed over.

        Returns:
            All images, and the names of the new ones.

        Raises:
            InputError: a new image has the name of another one of the map, or none is new.
        """
        root = self.map.images
        if root is None:
            raise InputError(f"The folder of the images of {self.folder} is not there any more.")
        names = sorted({*self.map.views, *self.map.sources})
        old = image_module.scan(root, min_size=1, names=names)
        if old.rejected:
            raise InputError(f"The map's image {root / str(old.rejected[0])}.")
        known = {record.name: record for record in old.images}
        by_content = {record.sha256: record.name for record in old.images}
        added: list[ImageRecord] = []
        rejected = list(new.rejected)
        for record in new.images:
            twin = known.get(record.name)
            if twin is not None and twin.sha256 != record.sha256:
                raise InputError(
                    f"{record.name} in {new.root} is another image than {record.name} in {root}: "
                    "rename it, or put the new images into a sub-folder."
                )
            if twin is None and record.sha256 in by_content:
                detail = f"same bytes as {by_content[record.sha256]} of the map"
                rejected.append(RejectedImage(name=record.name, reason="duplicate", detail=detail))
            elif twin is None:
                added.append(record)
        if not added:
            raise InputError(f"{new.root} holds no image that {self.folder} does not have already.")
        everything = sorted([*old.images, *added], key=lambda record: record.name)
        union = ImageSet(root=new.root, images=tuple(everything), rejected=tuple(rejected))
        return union, [record.name for record in added]

    def poses(self, records: Sequence[ImageRecord], *, intrinsics: str | None) -> KnownPoses:
        """Poses and cameras of the map; new images share its camera where that is plain.

        Args:
            records: all images.
            intrinsics: those given for the new images.
        """
        views = self.map.views
        cameras = {name: view.camera for name, view in views.items()}
        for record in records:
            if record.name not in cameras and intrinsics is None:
                shared = shared_camera(self.map, record)
                if shared is not None:
                    cameras[record.name] = shared
        return KnownPoses(
            poses={name: view.pose for name, view in views.items()},
            cameras=cameras,
            source=str(self.map.model_folder),
        )

    def seed(self, output: Path, *, detector_free: bool, overwrite: bool) -> None:
        """Copy features and matches of the map to where a run continues from them.

        Args:
            output: folder of the new run.
            detector_free: whether the matcher has no keypoints of its own.
            overwrite: replace files that are there already, with what is kept beside them.
        """
        names = {"features.h5": "features.h5", "matches.h5": "matches.h5"}
        if detector_free:
            names = {"anchors.h5": "anchors.h5", "raw_matches.h5": "raw_matches.h5"}
            if not (self.folder / "raw_matches.h5").is_file():
                names = {"anchors.h5": "anchors.h5", "readings.h5": "raw_matches.h5"}  # of 0.1
        try:
            for name, new in names.items():
                source, target = self.folder / name, output / new
                if overwrite:
                    remove_cache(cache_path(target))
                if source.is_file() and (overwrite or not target.exists()):
                    temporary = target.with_name(f"{new}.tmp")
                    shutil.copyfile(source, temporary)
                    os.replace(temporary, target)
        except OSError as error:
            raise OutputError(f"Cannot copy {self.folder} to {output}: {error}") from None


def gather(records: Sequence[ImageRecord], folder: Path) -> None:
    """Put images of several folders under one, as links (copies where links are not possible).

    Raises:
        OutputError: the folder cannot be written.
    """
    try:
        for record in records:
            target = folder / record.name
            source = record.path.resolve()
            if target.is_symlink() and target.resolve() == source:
                continue
            if target.exists() and not target.is_symlink():
                if hashlib.sha256(target.read_bytes()).hexdigest() == record.sha256:
                    continue  # a copy of earlier
                raise OutputError(f"{target} was replaced by another image: move it away.")
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                target.unlink()
            try:
                target.symlink_to(source)
            except OSError:  # Windows without the right to link
                shutil.copyfile(source, target)
    except OSError as error:
        raise OutputError(f"Cannot write to {folder}: {error}") from None


__all__ = ["Extension", "gather"]
