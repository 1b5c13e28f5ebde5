"""What is made of the models of a run for other programs: one step a format, tied to its model."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gim_hloc import colmap
from gim_hloc.clock import timed
from gim_hloc.colmap.export import FORMATS, export_model
from gim_hloc.errors import GimError, InputError
from gim_hloc.files import as_path, json_value, read_text
from gim_hloc.images import ImageRecord, turned
from gim_hloc.masks import MaskFolder
from gim_hloc.options import TargetOptions, given, select, to_mapping
from gim_hloc.pipelines.options import HandoverOptions
from gim_hloc.pipelines.previews import write_metres_page
from gim_hloc.pipelines.run import Part, RunFolder, read_state, scanned
from gim_hloc.poses import match_names, read_poses
from gim_hloc.store import digest
from gim_hloc.surveys import read_control_points, read_positions

logger = logging.getLogger(__name__)

DENSE = "dense"  # folder of the dense model in OUTPUT, COLMAP's workspace


def product_key(folder: RunFolder) -> str:
    """What stands for the models of a run in the keys of what is made of them."""
    step = folder.steps["refine"]
    return digest([step["key"], [folder.files[name] for name in step["files"]]])


def stale_products(folder: RunFolder, kinds: Iterable[str]) -> list[str]:
    """Steps of some kinds that were done for other models than those that are there."""
    key = product_key(folder)

    def stale(entry: Mapping[str, Any]) -> bool:
        # Without a key it is to be made again (--from); earlier versions had the models' as key.
        return entry["key"] is not None and entry["facts"].get("model", entry["key"]) != key

    wanted = set(kinds)
    return [
        name for name, entry in folder.steps.items() if name.split()[0] in wanted and stale(entry)
    ]


def reference(options: TargetOptions, kind: str = "") -> tuple[str | None, Any]:
    """The option that says what a metre is, and its value; GPS for what is to be on earth.

    Raises:
        InputError: there are two, or the file that one names is not there.
    """
    named = {name: getattr(options, name) for name in ("gps", "gcp", "scale", "ref_model")}
    said = [(name, value) for name, value in named.items() if value is not None]
    flags = [f"--{name.replace('_', '-')}" for name, _ in said]
    if len(said) > 1:
        raise InputError(f"{' and '.join(flags)} say what a metre is: give one of them.")
    for flag, (name, value) in zip(flags, said, strict=True):
        if name != "scale" and value != "exif" and not Path(value).exists():
            raise InputError(f"{flag}: there is no {value}.")
    return said[0] if said else ("gps", "exif") if kind == "geo" else (None, None)


@dataclass(kw_only=True)
class Exports:
    """Models of a run in other programs' formats.

    Attributes:
        folder: of the run.
        models: folders of the models, in OUTPUT.
        images: image root.
        records: the images by name, with the orientations in which they were matched.
        masks: of the images.
        options: what exports hold.
        show: whether to draw progress bars.
    """

    folder: RunFolder
    models: Sequence[Path]
    images: Path
    records: Mapping[str, ImageRecord]
    masks: MaskFolder | None
    options: TargetOptions
    show: bool

    def make(self, kinds: Iterable[str]) -> Exception | None:
        """Make what is not there yet, and tell its notes. What fails leaves no old one behind.

        Returns:
            The error of the last format that failed: a caller has more to do than exports.
        """
        failure: Exception | None = None
        for kind in kinds:
            step = f"export {kind}"
            try:
                key = self._key(kind)
            except GimError as error:  # a file of metres cannot be read: the old export stays
                failure = error
                continue
            facts = self.folder.facts(step, key)
            try:
                if facts is None:
                    with self.folder.making(step, key, large=FORMATS[kind].large) as made:
                        made.facts = self._write(kind, made.path)
                    facts = made.facts
            except Exception as error:
                failure = error
                self.folder.drop(step)
                continue
            for sentence in facts["notes"]:
                if sentence not in self.folder.notes:  # what is said of several formats
                    self.folder.note(sentence)
        return failure

    def _key(self, kind: str) -> str:
        parts: list[Any] = [product_key(self.folder), self._reference_key(kind)]
        if FORMATS[kind].large:
            masks = [self.masks.find(name) for name in self.records] if self.masks else []
            stamps = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in masks if p]
            # Links lead from where the folder is to where the images are.
            parts += [
                to_mapping(self.options),
                stamps,
                os.path.relpath(self.images, self.folder.path),
            ]
        if FORMATS[kind].dense:
            parts += [{n: f for n, f in self.folder.files.items() if n.startswith(f"{DENSE}/")}]
        return digest(parts)

    def _reference_key(self, kind: str) -> Any:
        """What stands for the metres of an export."""
        by, where = reference(self.options, kind)
        if by is None:
            return None
        path = Path(str(where))
        if by == "gps" and where == "exif":
            content: Any = {name: record.exif.gps for name, record in self.records.items()}
        elif by == "ref_model":
            found = read_poses(path, list(self.records))
            content = {n: [part.tolist() for part in pose] for n, pose in found.poses.items()}
        else:
            content = read_text(path, f"file of --{by}") if by != "scale" else None
        return [by, str(where), self.options.crs, content]

    def _metres(self, kind: str, model: Any) -> colmap.Metres | None:
        by, where = reference(self.options, kind)
        names = list(self.records)
        orientations = {name: r.exif.orientation for name, r in self.records.items()}
        if by == "gps":
            fixes = {n: r.exif.gps for n, r in self.records.items() if r.exif.gps is not None}
            if where != "exif":
                fixes = read_positions(Path(where), names)
            return colmap.metres_by_gps(model, fixes, orientations, self.options.crs)
        if by == "gcp":
            return colmap.metres_by_control_points(model, *read_control_points(where, names))
        if by == "ref_model":
            return colmap.metres_by_poses(model, read_poses(where, names).poses)
        if by == "scale":
            ends = [_place(text, model) for text in where[:2]]
            return colmap.metres_by_distance(model, ends, where[2], orientations)
        return None

    def _write(self, kind: str, folder: Path) -> dict[str, Any]:
        notes: list[str] = []
        described = []
        for index, path in enumerate(self.models):
            model = colmap.read_model(path)
            try:
                metres = self._metres(kind, model)
            except InputError as error:
                if index == 0:
                    raise
                notes.append(f"Model {index} is not exported as {kind}: {error}")
                continue
            if metres is not None:
                metres.apply(model)
                notes += metres.notes
                described.append(metres.described())
            dense = self.folder.path / DENSE
            notes += export_model(
                model, folder / "export" / str(index), formats=(kind,),
                images=self.images, place=self.folder.path / "export" / str(index),
                progress=self.show, options=self.options, mask=self._mask if self.masks else None,
                dense=dense if index == 0 and dense.is_dir() else None, metres=metres,
            )  # fmt: skip
            if kind == "geo" and metres is not None:
                centres = {n: -r.T @ t for n, (r, t) in colmap.poses_of(model).items()}
                place = folder / "export" / str(index) / "geo"
                write_metres_page(place, json_value(metres.described()), centres)
        notes = [note.replace(f"{folder}", f"{self.folder.path}") for note in notes]
        return {"notes": notes, "metres": described, "model": product_key(self.folder)}

    def _mask(self, name: str) -> Any:
        assert self.masks is not None
        return self.masks.load(self.records[name])


@dataclass(kw_only=True)
class ExportResult:
    """What ``export`` left.

    Attributes:
        output: folder of the run.
        files: that belong to the exports, relative to it.
        notes: what formats could not hold, and what else to know.
        metres: how they were found for each model, with residuals, where an option says so.
    """

    output: Path
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    metres: list[dict[str, Any]] = field(default_factory=list)


def export(
    output: Path | str,
    options: HandoverOptions | None = None,
    *,
    progress: bool = True,
    **overrides: Any,
) -> ExportResult:
    """Write the models of a finished run in other programs' formats; computes nothing again.

    Args:
        output: folder of a run of ``reconstruct``.
        options: all settings; None takes the defaults.
        progress: whether to draw progress bars.
        **overrides: single fields of ``HandoverOptions``, such as ``to=("3dgs",)``.

    Raises:
        InputError: no finished run is there, or options or images cannot be used.
        OutputError: files that no run made are in the way.
        LockedError: a run holds the folder.
    """
    options = given(HandoverOptions, options, overrides)
    output = as_path(output, "output")
    if not options.to:
        raise InputError(f"Say what is wanted: --to and some of {', '.join(FORMATS)}.")
    makes = [f"export/[0-9]*/{name}" for kind in options.to for name in FORMATS[kind].files]
    folder, state = folder_of_run(output, makes=makes)
    with folder, timed(folder.timings, "export"):
        require_model(folder)
        root = _images(folder, state, options)
        exports = Exports(
            folder=folder,
            models=[
                p.parent for p in sorted((output / "sparse").glob("[0-9]*/images.bin"), key=_number)
            ],
            images=root,
            records=_records(folder, root),
            masks=_masks(folder, state),
            options=select(TargetOptions, options),
            show=progress,
        )
        failure = exports.make(options.to)
        folder.save()
    if failure is not None:
        raise failure
    made = [folder.steps[f"export {kind}"] for kind in options.to]
    return ExportResult(
        output=output,
        files=[name for step in made for name in step["files"]],
        notes=list(dict.fromkeys(folder.notes)),
        metres=max((step["facts"]["metres"] for step in made), key=len),
    )


def folder_of_run(
    output: Path, *, makes: Sequence[str], writes: Sequence[str] = (), part: Part | None = None
) -> tuple[RunFolder, dict[str, Any]]:
    """The folder of a run of ``reconstruct``, for another command, and what its run.yaml says.

    Raises:
        InputError: it is none.
        OutputError: files that no run made are in the way.
    """
    state = read_state(output)
    if state is None or state.get("command", "reconstruct") != "reconstruct":
        raise InputError(f"{output} is no output of gim-reconstruct: there is no run.yaml of it.")
    return RunFolder(output, "reconstruct", makes=makes, writes=writes, part=part), state


def require_model(folder: RunFolder) -> None:
    """Refuse a run that has not come to its models."""
    if "refine" not in folder.steps:
        raise InputError(
            f"{folder.path} has no finished model: repeat the command of gim-reconstruct first."
        )


def _number(path: Path) -> int:
    return int(path.parent.name)


def _place(text: str, model: Any) -> np.ndarray:
    """A place (3,) in a model: ``x,y,z``, or the camera of an image."""
    with contextlib.suppress(ValueError):
        values = np.array(text.split(","), float)
        if len(values) == 3 and np.isfinite(values).all():
            return values
    poses = colmap.poses_of(model)
    name = match_names([text], poses).get(text)
    if name is None:
        raise InputError(f"--scale: {text!r} is neither an image of the model nor a place x,y,z.")
    rotation, translation = poses[name]
    return np.asarray(-rotation.T @ translation)


def _images(folder: RunFolder, state: Mapping[str, Any], options: HandoverOptions) -> Path:
    """Where the images of a run are; frames of videos and extended runs have them in OUTPUT."""
    gathered = any(name.startswith("images/") for name in folder.files)
    root = folder.path / "images" if gathered else Path(str(state.get("images")))
    root = options.images or root
    if not root.is_dir() and (options.images or any(FORMATS[kind].large for kind in options.to)):
        raise InputError(
            f"The images of {folder.path} are not in {root}: say where they are, --images FOLDER."
        )
    return root


def _records(folder: RunFolder, root: Path) -> dict[str, ImageRecord]:
    turns = folder.steps.get("rotations", {}).get("facts", {}).get("images", {})
    return {
        name: dataclasses.replace(turned(record, int(turns.get(name, (0,))[0])), path=root / name)
        for name, record in scanned(folder.path).items()
    }


def _masks(folder: RunFolder, state: Mapping[str, Any]) -> MaskFolder | None:
    masks = state["options"].get("masks")
    if masks is not None and not Path(masks).is_dir():
        folder.note(f"The masks of the run are not in {masks} any more: exports have none.")
        return None
    return masks_in(masks, Path(str(state.get("images"))))


def masks_in(folder: Path | str | None, images: Path) -> MaskFolder | None:
    """Masks as they are given: erosion keeps keypoints off edges, and others have none of these."""
    return MaskFolder(folder, erode_px=0, image_root=images) if folder else None
