"""Match two images: coordinates, robust geometry, files and pictures.

Coordinates are stored pixels (EXIF orientation not applied) in hloc's frame: (0, 0) is the centre
of the top left pixel.
"""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from gim_hloc import draw, images, matchers, pair_pictures
from gim_hloc.clock import timed
from gim_hloc.errors import InputError, OutputError
from gim_hloc.files import as_path, write_atomic
from gim_hloc.masks import MaskFolder
from gim_hloc.options import FitOptions
from gim_hloc.pipelines.rotations import BELIEVED_GAIN, BELIEVED_LEAST
from gim_hloc.two_view import Fit, fit_geometry

if TYPE_CHECKING:
    from gim_hloc.geometry.warp import Warp
    from gim_hloc.images import ImageLike, ImageRecord
    from gim_hloc.types import ImageData, Matcher, Quality

Format = Literal["npz", "csv", "h5"]
Rotations = Literal["auto", "none"]

# What names of results end with; the first says of which files they are.
_ENDS = ("matches.npz", "matches.csv", "features.h5", "matches.h5", "match.png", "warp.png")

_MIN_SIDE = 16  # pixels; networks have no cell left below
_LONGEST_STEM = 80  # characters of an image's name in the names of the results


@dataclass(kw_only=True, repr=False)
class MatchResult:
    """Matches of two images.

    Attributes:
        matcher: its name.
        images: the two image files.
        keypoints0: (M, 2) float32 x, y in image 0, stored pixels, hloc's frame.
        keypoints1: (M, 2) the same in image 1.
        scores: (M,) float32 confidence in [0, 1].
        fit: robust geometry, or None where none was asked for.
        warp: the dense correspondence, of dense matchers only.
        features: all keypoints of both images, (N0, 2) and (N1, 2), of sparse matchers only.
        indices: (M, 2) rows of the matches in ``features``, of sparse matchers only.
        rotated_degrees: clockwise, of image 1 before it was matched; coordinates are the file's.
        seconds: time of each step.
    """

    matcher: str
    images: tuple[ImageRecord, ImageRecord]
    keypoints0: np.ndarray
    keypoints1: np.ndarray
    scores: np.ndarray
    fit: Fit | None = None
    warp: Warp | None = None
    features: tuple[np.ndarray, np.ndarray] | None = None
    indices: np.ndarray | None = None
    rotated_degrees: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        return f"MatchResult({self.summary()})"

    def _repr_html_(self) -> str:
        """The picture of the matches, for notebooks."""
        picture = pair_pictures.draw_inliers(
            self.images, self.keypoints0, self.keypoints1, self.fit, plain=False
        )
        text = html.escape(" ".join(filter(None, (self.summary(), self.remark))))
        image = f'<img src="{draw.data_url(picture)}">'
        return f"<figure>{image}<figcaption>{text}</figcaption></figure>"

    @property
    def inliers(self) -> np.ndarray:
        """(M,) bool: matches that agree with the fundamental matrix; all True without a fit."""
        return np.ones(len(self), dtype=bool) if self.fit is None else self.fit.inliers

    @property
    def fundamental(self) -> np.ndarray | None:
        """(3, 3) fundamental matrix, x1' F x0 = 0 in stored pixels, or None."""
        return None if self.fit is None else self.fit.fundamental

    @property
    def homography(self) -> np.ndarray | None:
        """(3, 3) homography from image 1 to image 0 in stored pixels, or None."""
        return None if self.fit is None else self.fit.homography

    @property
    def remark(self) -> str | None:
        """What is wrong with the geometry, for people, or None."""
        return None if self.fit is None else self.fit.remark

    def summary(self) -> str:
        """One line: counts and seconds."""
        steps = ", ".join(f"{step} {seconds:.2f}" for step, seconds in self.seconds.items())
        a, b = self.images
        total = sum(self.seconds.values())
        return f"{a.name} - {b.name}: {self._counts()}; {self.matcher}, {total:.2f} s ({steps})"

    def _counts(self) -> str:
        counts = f"{len(self)} matches"
        if self.fit is not None:
            counts += (
                f", {int(self.fit.inliers.sum())} inliers of the fundamental matrix"
                f", {int(self.fit.homography_inliers.sum())} of the homography"
            )
        turned = f"; {self.images[1].name} turned by {self.rotated_degrees}°"
        return counts + (turned if self.rotated_degrees else "")

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        formats: Sequence[Format] = ("npz",),
        pictures: bool = True,
    ) -> list[Path]:
        """Write coordinates and pictures, named after the images and the matcher.

        Args:
            folder: made if missing. Results of the same two images are replaced; those of
                others of the same names stay, and these get a number.
            formats: of the coordinates.
            pictures: whether to draw the matches (``..._match.png``) and image 1 projected onto
                image 0 (``..._warp.png``, where there is a warp or a homography).

        Returns:
            The written files.

        Raises:
            InputError: an unknown format.
            OutputError: the folder cannot be written.
        """
        return _save(self, as_path(folder, "folder"), formats, pictures=pictures)


def match(
    a: ImageLike,
    b: ImageLike,
    *,
    matcher: str | Matcher = "aliked_lightglue",
    quality: Quality = "base",
    device: str = "auto",
    mask0: str | os.PathLike[str] | None = None,
    mask1: str | os.PathLike[str] | None = None,
    mask_erode: int = 4,
    fit: FitOptions | None = FitOptions(),
    rotations: Rotations = "auto",
    **options: Any,
) -> MatchResult:
    """Match two images.

    Args:
        a: image 0: a path, an array (H, W[, 1 or 3]) or tensor (1 or 3, H, W) that is uint8 or
            floating point in [0, 1], or a PIL image. Coordinates are those of its pixels.
        b: image 1.
        matcher: name of a matcher (``gim_hloc.matchers.names()``), or one that is loaded already,
            for many pairs; ``quality``, ``device`` and ``options`` are then its own.
        quality: operating point of the matcher.
        device: where it runs: auto, cpu, cuda, ...
        mask0: mask of image 0 in its stored pixels; black is ignored.
        mask1: mask of image 1.
        mask_erode: keypoints keep this many pixels away from masked ones.
        fit: thresholds of the robust fits; None leaves them out.
        rotations: auto turns image 1 by quarters where next to nothing matches as it is.
        **options: of the matcher, such as ``max_size=1600``.

    Returns:
        Matches, geometry and timings.

    Raises:
        InputError: an image, a mask or an option cannot be used or has a wrong type.
        WeightsError: the matcher's weights are missing.
    """
    if not isinstance(fit, FitOptions | None):
        raise InputError(f"fit is {fit!r}; it must be FitOptions or None.")
    if rotations not in get_args(Rotations):
        raise InputError(f"rotations is {rotations!r}; choose one of auto, none.")
    seconds: dict[str, float] = {}
    with timed(seconds, "read"):
        records = _open_pair(a, b)
        masks = [
            _read_mask(mask, name, record, mask_erode)
            for mask, name, record in zip((mask0, mask1), ("mask0", "mask1"), records, strict=True)
        ]
    with timed(seconds, "load"):
        loaded = _load_matcher(matcher, quality, device, options)
    result = _match(loaded, records, masks, fit, seconds)
    if rotations == "none" or loaded.info.rotation_invariant or not _weak(result):
        return result
    turned = [
        _match(loaded, (records[0], images.turned(records[1], k)), masks, fit, seconds)
        for k in (1, 2, 3)
    ]
    for k, other in enumerate(turned, start=1):
        other.rotated_degrees = 90 * k
    best = max(turned, key=_confidence)
    believed = _confidence(best) >= max(BELIEVED_LEAST, BELIEVED_GAIN * _confidence(result))
    return best if believed else result


def _confidence(result: MatchResult) -> float:
    return float(result.scores[result.inliers].sum(dtype=float))


def _weak(result: MatchResult) -> bool:
    """Whether two images match so little that one may be stored turned."""
    return _confidence(result) < BELIEVED_LEAST or result.remark is not None


def _load_matcher(
    matcher: str | Matcher, quality: Quality, device: str, options: dict[str, Any]
) -> Matcher:
    if not isinstance(matcher, str):
        if isinstance(matcher, type) or not hasattr(matcher, "match_batch"):
            raise InputError(
                f"matcher is {matcher!r}; it must be a name, or what gim_hloc.matchers.load gave."
            )
        if options:
            raise InputError(f"A loaded matcher has its options already; {min(options)} is new.")
        return matcher

    return matchers.load(matcher, quality=quality, device=device, **options)


def _match(
    matcher: Matcher,
    records: tuple[ImageRecord, ImageRecord],
    masks: Sequence[np.ndarray | None],
    fit_options: FitOptions | None,
    seconds: dict[str, float],
) -> MatchResult:
    with timed(seconds, "read"):
        data = [
            images.load(record, matcher.image_options, mask=mask)
            for record, mask in zip(records, masks, strict=True)
        ]
    with timed(seconds, "encode"):
        one, two = (matcher.encode(image) for image in data)
    with timed(seconds, "match"):
        matches = matcher.match(one, two)
        keypoints0, keypoints1, scores = (
            np.asarray(values.detach().cpu(), dtype=np.float32)
            for values in (matches.keypoints0, matches.keypoints1, matches.scores)
        )
    fitted = None
    if fit_options is not None:
        with timed(seconds, "fit"):
            scale0, scale1 = (_scale(image) for image in data)
            fitted = fit_geometry(keypoints0, keypoints1, fit_options, scale0=scale0, scale1=scale1)
    features = indices = None
    if matches.indices is not None:
        features = (one.keypoints.cpu().numpy(), two.keypoints.cpu().numpy())
        indices = matches.indices.numpy()
    return MatchResult(
        matcher=matcher.info.name,
        images=records,
        keypoints0=keypoints0,
        keypoints1=keypoints1,
        scores=scores,
        fit=fitted,
        warp=matches.warp,
        features=features,
        indices=indices,
        seconds=seconds,
    )


def _scale(image: ImageData) -> float:
    """Stored pixels a network pixel, at least 1."""
    return max(1.0, float(np.sqrt(abs(np.linalg.det(image.to_original[:, :2])))))


# ------------------------------------------------------------------------------------------ inputs


def _open_pair(a: ImageLike, b: ImageLike) -> tuple[ImageRecord, ImageRecord]:
    """Check two images and name them by their paths below the folder that they share."""
    one, two = (
        images.one(image, name, min_size=_MIN_SIDE)
        for image, name in ((a, "image0"), (b, "image1"))
    )
    if isinstance(one, images.MemoryImage) or isinstance(two, images.MemoryImage):
        return one, two
    if one.path.samefile(two.path):
        raise InputError(f"Both images are {one.path}; give two different ones.")
    names = [one.path.name, two.path.name]
    if names[0] == names[1]:
        paths = [str(record.path.absolute()) for record in (one, two)]
        shared = os.path.commonpath(paths)
        names = [Path(path).relative_to(shared).as_posix() for path in paths]
    return dataclasses.replace(one, name=names[0]), dataclasses.replace(two, name=names[1])


class _MaskFile(MaskFolder):
    """One mask, whatever its name."""

    def __init__(self, path: Path, *, erode_px: int) -> None:
        super().__init__(path.parent, erode_px=erode_px)
        self.path = path

    def find(self, name: str) -> Path | None:
        """Path of the mask."""
        return self.path


def _read_mask(
    given: str | os.PathLike[str] | None, name: str, record: ImageRecord, erode_px: int
) -> np.ndarray | None:
    if given is None:
        return None
    path = as_path(given, name)
    if not path.is_file():
        raise InputError(f"There is no mask {path}.")
    if not isinstance(erode_px, int) or erode_px < 0:
        raise InputError(f"mask_erode is {erode_px!r}; it must be a number of pixels, at least 0.")
    mask = _MaskFile(path, erode_px=erode_px)
    if nothing := mask.nothing_left(record):
        raise InputError(f"{record.name} cannot be matched: {nothing}.")
    return mask.load(record)


# ----------------------------------------------------------------------------------------- outputs


def _save(
    result: MatchResult, folder: Path, formats: Sequence[Format], *, pictures: bool
) -> list[Path]:
    unknown = sorted(set(formats) - set(get_args(Format)))
    if unknown:
        raise InputError(f"Unknown format {unknown[0]!r}. Known: {', '.join(get_args(Format))}.")
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        base = _base(result, folder)
        for kind in get_args(Format):
            if kind in formats:
                written += _WRITERS[kind](result, folder, base)
        if pictures:
            written += _write_pictures(result, folder, base)
    except OSError as error:
        raise OutputError(f"Cannot write to {folder}: {error}") from error
    return written


def _base(result: MatchResult, folder: Path) -> str:
    """What the files of a result begin with: results of other images are not written over."""
    stems = [record.path.stem[:_LONGEST_STEM] for record in result.images]
    base = name = "_".join([*stems, result.matcher])
    images_of_it = [record.sha256 for record in result.images]
    number = 1
    while any(os.path.lexists(folder / f"{name}_{end}") for end in _ENDS):
        try:
            with np.load(folder / f"{name}_{_ENDS[0]}") as before:
                if before["sha256"].tolist() == images_of_it and all(images_of_it):
                    break
        except (OSError, ValueError, KeyError):  # not known of which images they are
            pass
        number += 1
        name = f"{base}-{number}"
    return name


def _write_npz(result: MatchResult, folder: Path, base: str) -> list[Path]:
    arrays: dict[str, Any] = {
        "names": np.array([record.name for record in result.images]),
        "sizes": np.array([record.size for record in result.images]),
        "sha256": np.array([record.sha256 for record in result.images]),
        "matcher": np.array(result.matcher),
        "keypoints0": result.keypoints0,
        "keypoints1": result.keypoints1,
        "scores": result.scores,
        "inliers": result.inliers,
    }
    for name in ("fundamental", "homography"):
        if getattr(result, name) is not None:
            arrays[name] = getattr(result, name)
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    path = folder / f"{base}_matches.npz"
    write_atomic(path, stream.getvalue())
    return [path]


def _write_csv(result: MatchResult, folder: Path, base: str) -> list[Path]:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["x0", "y0", "x1", "y1", "score", "inlier"])
    for xy0, xy1, score, inlier in zip(
        result.keypoints0, result.keypoints1, result.scores, result.inliers, strict=True
    ):
        writer.writerow([*(f"{value:.4f}" for value in (*xy0, *xy1)), f"{score:.5f}", int(inlier)])
    path = folder / f"{base}_matches.csv"
    write_atomic(path, stream.getvalue())
    return [path]


def _write_h5(result: MatchResult, folder: Path, base: str) -> list[Path]:
    """Keypoints and matches as hloc reads them: two files, since both are looked up by name."""
    import h5py

    names = [record.name for record in result.images]
    if result.features is None or result.indices is None:
        # Every match has a keypoint of its own.
        features = (result.keypoints0, result.keypoints1)
        indices = np.arange(len(result))[:, None].repeat(2, axis=1)
    else:
        features, indices = result.features, result.indices
    matches0 = np.full(len(features[0]), -1, dtype=np.int32)
    scores0 = np.zeros(len(features[0]), dtype=np.float32)
    matches0[indices[:, 0]] = indices[:, 1]
    scores0[indices[:, 0]] = result.scores
    paths = [folder / f"{base}_features.h5", folder / f"{base}_matches.h5"]
    streams = [io.BytesIO(), io.BytesIO()]
    with h5py.File(streams[0], "w") as file:
        for record, keypoints in zip(result.images, features, strict=True):
            group = file.create_group(record.name)
            group["keypoints"] = keypoints.astype(np.float32)
            group["keypoints"].attrs["uncertainty"] = 1.0
            group["image_size"] = np.array(record.size)
    with h5py.File(streams[1], "w") as file:
        group = file.create_group("/".join(name.replace("/", "-") for name in names))
        group["matches0"], group["matching_scores0"] = matches0, scores0
        group["keypoints0"], group["keypoints1"] = result.keypoints0, result.keypoints1
        group["scores"], group["inliers"] = result.scores, result.inliers
    for path, stream in zip(paths, streams, strict=True):
        write_atomic(path, stream.getvalue())
    return paths


_WRITERS = {"npz": _write_npz, "csv": _write_csv, "h5": _write_h5}


def _write_pictures(result: MatchResult, folder: Path, base: str) -> list[Path]:
    names = [record.name for record in result.images]
    texts = {
        "match": [" \N{EM DASH} ".join(names), f"{result.matcher}: {result._counts()}"],
        "warp": [f"{names[0]}, {names[1]} projected onto it, and both", result.matcher],
    }
    drawn = {
        folder / f"{base}_match.png": pair_pictures.draw_inliers(
            result.images, result.keypoints0, result.keypoints1, result.fit
        ),
        folder / f"{base}_warp.png": pair_pictures.draw_projection(
            result.images, result.keypoints0, result.fit, result.warp
        ),
    }
    for path, picture in drawn.items():
        if picture is None:
            path.unlink(missing_ok=True)  # of an earlier run: it would pass for this one's
        else:
            kind = path.stem.rpartition("_")[2]
            write_atomic(path, draw.encode(draw.caption(picture, texts[kind]), ".png"))
    return [path for path, picture in drawn.items() if picture is not None]
