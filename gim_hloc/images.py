"""Find, check and read images: one loader for every step.

Two pixel frames appear here, both hloc's (integer = pixel centre):

* *stored* pixels are those of the file, EXIF orientation not applied, as COLMAP reads them;
* *upright* pixels are those of the image turned by its EXIF orientation, as networks see it.

Pillow decodes, because it refuses damaged files where OpenCV fills the missing part with grey.
OpenCV decodes only 16-bit colour, which Pillow cuts to its upper eight bits. Files are recognised
by their first bytes, not by their suffix.

Memory: where 1/2, 1/4 or 1/8 of the size suffices, a JPEG is decoded at that size. Other codecs
have to decode the whole image (4 bytes a pixel) before it is reduced; images above 32 Mpx are
therefore decoded by one thread at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import io
import logging
import math
import os
import stat
import struct
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from gim_hloc.errors import InputError, some
from gim_hloc.products import find_products

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

    from gim_hloc.types import ImageData, ImageOptions

logger = logging.getLogger(__name__)

ImageLike: TypeAlias = "str | os.PathLike[str] | np.ndarray | torch.Tensor | Image"
"""An image for ``match`` and ``Localizer``: a path, or as ``in_memory`` takes it."""

SUFFIXES: frozenset[str] = frozenset(
    {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".heic", ".heif"}
)
# Pictures that users expect to count and that are not read: named instead of passed over.
_UNREAD_SUFFIXES = frozenset(
    {".gif", ".avif", ".jp2", ".jxl", ".tga"}
    | {".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"}
)
# OpenCV's own limit. Pillow's (89 Mpx warns, 179 Mpx fails) is below today's panoramas.
MAX_PIXELS = 2**30
MAX_BYTES = 2**32  # of a file: as many pixels at four bytes

_JPEG_REDUCTIONS = (8, 4, 2)
_LARGE_PIXELS = 32 * 2**20
_PIXELS_PER_BYTE = 4096  # no codec holds more but of pictures in one colour
_large_image_slot = threading.Lock()
_FULL_FRAME_DIAGONAL_MM = 43.27  # of 36 x 24 mm film, rounded as in COLMAP
_SYSTEM_NAMES = frozenset({"thumbs.db", "desktop.ini", "__macosx", "@eadir"})
_LISTED_REJECTIONS = 20


@dataclass(frozen=True, kw_only=True)
class Exif:
    """The EXIF values that matching and mapping use. Missing ones are None."""

    orientation: int = 1  # 1 to 8, EXIF 2.3; 1 = stored upright
    make: str | None = None  # maker of the camera
    model: str | None = None  # model of the camera
    focal_mm: float | None = None  # focal length in mm
    focal_35mm: float | None = None  # focal length in mm for the same view on 36 x 24 mm film
    sensor_mm: float | None = None  # long side of the sensor in mm, from FocalPlaneXResolution
    pixels: tuple[float, float] | None = None  # width and height of the photo when it was taken
    gps: tuple[float, float, float | None] | None = None  # latitude, longitude in deg; altitude, m


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """One usable image file."""

    name: str  # POSIX path relative to the image root
    path: Path  # where the file is
    width: int  # stored pixels
    height: int  # stored pixels
    sha256: str  # of the file's bytes
    exif: Exif = field(default_factory=Exif)
    video: str | None = None  # that it is a frame of
    stamp: tuple[int, int] | None = None  # bytes of the file and time of its change, ns

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in stored pixels."""
        return self.width, self.height

    @property
    def upright_size(self) -> tuple[int, int]:
        """(width, height) of the image turned upright."""
        return _turned_size(self.width, self.height, self.exif.orientation)

    @property
    def upright_to_stored(self) -> np.ndarray:
        """(2, 3) affine map from upright to stored pixels, hloc's frame."""
        return orientation_affine(self.exif.orientation, self.width, self.height)


@dataclass(frozen=True, kw_only=True)
class MemoryImage(ImageRecord):
    """An image that lies in memory; its stored pixels are those of the array."""

    pixels: _Pixels = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class RejectedImage:
    """One image file that is left out, and why."""

    name: str  # as in ImageRecord; characters that cannot be printed are escaped
    reason: Literal["unreadable", "empty", "tiny", "mirrored", "duplicate", "no_pose"]
    detail: str  # e.g. "JPEG: image file is truncated", "same bytes as a.jpg"

    def __str__(self) -> str:
        return f"{self.name}: {self.reason} ({self.detail})"


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """All images below one root, sorted by name."""

    root: Path
    images: tuple[ImageRecord, ...]
    rejected: tuple[RejectedImage, ...] = ()
    _by_name: dict[str, ImageRecord] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {record.name: record for record in self.images})

    @property
    def names(self) -> list[str]:
        """Names of the usable images, sorted."""
        return [record.name for record in self.images]

    def __getitem__(self, name: str) -> ImageRecord:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[ImageRecord]:
        return iter(self.images)

    def __len__(self) -> int:
        return len(self.images)


# Orientations without mirroring, each a quarter turn clockwise after the one before it.
_QUARTER_TURNS = (1, 6, 3, 8)


def turned(record: ImageRecord, quarter_turns: int) -> ImageRecord:
    """The same image, shown turned clockwise by so many quarter turns more than EXIF says."""
    index = (_QUARTER_TURNS.index(record.exif.orientation) + quarter_turns) % 4
    return replace(record, exif=replace(record.exif, orientation=_QUARTER_TURNS[index]))


# ------------------------------------------------------------------------------------------ listing


def scan(
    root: str | os.PathLike[str],
    *,
    min_size: int = 64,
    names: Sequence[str] | None = None,
    exclude: Sequence[str | os.PathLike[str]] = (),
    upright: bool = True,
    known: Mapping[str, ImageRecord] | None = None,
    progress: bool = False,
    workers: int | None = None,
) -> ImageSet:
    """Find the images below ``root`` and decode each one once to see whether it is intact.

    Hidden files and folders and those of operating systems are passed over, and so is, with a line
    in the log, what programs made of images that are here too (``gim_hloc.products``). Pictures in
    formats that are not read (GIF, raw files of cameras) are rejected by name, and so are mirrored
    ones (EXIF orientations 2, 4, 5 and 7): coordinates are those of stored pixels, and no camera
    sees the mirror image of what the others see.

    Args:
        root: folder, searched at any depth; links to folders are followed.
        min_size: images with a side below this many pixels are left out as ``tiny``.
        names: take exactly these images, POSIX paths relative to ``root``, instead of searching.
        exclude: folders that are not searched; ``root`` itself always is.
        upright: read the EXIF orientation; False takes every image as it is stored.
        known: records of an earlier scan with the same settings; files of the same size and time,
            or else of the same bytes, are not decoded again.
        progress: show a progress bar.
        workers: threads; by default the number of cores, at most 8.

    Returns:
        The usable images and the rejected ones. Of byte-identical files the first by name is kept.
        The result does not depend on ``workers``.

    Raises:
        InputError: ``root`` is no folder, or an image in ``names`` does not exist.
    """
    root = Path(root)
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise InputError(f"The image folder {root} {problem}.")
    found, unread = _list_images(root, exclude) if names is None else (check_names(root, names), [])
    results = map_in_threads(
        partial(_inspect, root, min_size=min_size, upright=upright, known=known or {}),
        found,
        workers=workers or min(8, os.cpu_count() or 1),
        title="Check images",
        progress=progress,
    )
    images: list[ImageRecord] = []
    rejected = [
        RejectedImage(
            name=printable(name),
            reason="unreadable",
            detail=f"{Path(name).suffix[1:].upper()} is not read; save it as PNG or JPEG",
        )
        for name in unread
    ]
    first_with: dict[str, str] = {}
    for result in results:
        if isinstance(result, RejectedImage):
            rejected.append(result)
            continue
        twin = first_with.setdefault(result.sha256, result.name)
        if twin == result.name:
            images.append(result)
        else:
            rejected.append(
                RejectedImage(name=result.name, reason="duplicate", detail=f"same bytes as {twin}")
            )
    rejected.sort(key=lambda image: image.name)
    return ImageSet(root=root, images=tuple(images), rejected=tuple(rejected))


def require_usable(image_set: ImageSet, minimum: int = 2) -> None:
    """Raise InputError, naming every rejected file, if there are fewer than ``minimum`` images."""
    count = len(image_set.images)
    if count >= minimum:
        return
    message = (
        f"{image_set.root} has {count} usable image{'s' * (count != 1)}; "
        f"{minimum} {'is' if minimum == 1 else 'are'} needed"
    )
    if not image_set.rejected:
        suffixes = " ".join(sorted(suffix[1:] for suffix in SUFFIXES))
        raise InputError(f"{message}. Files that count as images: {suffixes}.")
    lines = [f"  {rejected}" for rejected in image_set.rejected[:_LISTED_REJECTIONS]]
    if len(image_set.rejected) > _LISTED_REJECTIONS:
        lines.append(f"  and {len(image_set.rejected) - _LISTED_REJECTIONS} more")
    raise InputError("\n".join([f"{message}. Left out:", *lines]))


def _list_images(
    root: Path, exclude: Sequence[str | os.PathLike[str]]
) -> tuple[list[str], list[str]]:
    """Sorted names of all files below ``root`` with an image's suffix; read and unread ones.

    An unread one that also exists in a format that is read (``a.nef`` with ``a.jpg``) is no loss.
    """
    names = list_files(root, SUFFIXES | _UNREAD_SUFFIXES, exclude)
    listed = {name for name in names if os.path.splitext(name)[1].lower() in SUFFIXES}
    stems = {os.path.splitext(name)[0] for name in listed}
    unread = [n for n in names if n not in listed and os.path.splitext(n)[0] not in stems]
    for group in find_products(root, sorted(listed)):
        logger.warning("%s", group)
        listed.difference_update(group.names)
    return sorted(listed), sorted(unread)


def list_files(
    root: Path, suffixes: Collection[str], exclude: Sequence[str | os.PathLike[str]]
) -> list[str]:
    """Names of all files below a folder with these suffixes, but for hidden ones and systems'.

    Args:
        root: folder; links to folders are followed.
        suffixes: lower case.
        exclude: folders that are not searched; ``root`` itself always is.
    """
    # Masks may lie beside the images: the root is searched whatever is excluded.
    excluded = {os.path.realpath(folder) for folder in exclude} - {os.path.realpath(root)}
    visited: set[str] = set()
    names: list[str] = []
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_warn_unlisted):
        real = os.path.realpath(folder)
        if real in visited or real in excluded:
            subfolders.clear()
            continue
        visited.add(real)
        # Order decides which of two links to one folder is taken.
        subfolders[:] = sorted(name for name in subfolders if not _is_system_name(name))
        relative = Path(folder).relative_to(root)
        names += [
            (relative / name).as_posix()
            for name in files
            if os.path.splitext(name)[1].lower() in suffixes and not _is_system_name(name)
        ]
    return names


def _is_system_name(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def _warn_unlisted(error: OSError) -> None:
    logger.warning("Folder %s cannot be listed: %s", error.filename, error.strerror)


def check_names(root: Path, names: Sequence[str]) -> list[str]:
    """Names of existing images below ``root``, sorted, each once.

    Raises:
        InputError: a name leads out of ``root``, or no file has it.
    """
    unique = sorted(set(names))
    for name in unique:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or pure.as_posix() != name:
            raise InputError(
                f"Image name {name!r} is not a path relative to {root} with forward slashes."
            )
    missing = [name for name in unique if not (root / name).is_file()]
    if missing:
        raise InputError(f"Not found in {root}: {some(missing, 3)}.")
    return unique


def map_in_threads(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    *,
    workers: int,
    title: str,
    progress: bool,
) -> list[Any]:
    """Map in order. An interrupt or error does not wait for what is still queued."""
    from tqdm import tqdm

    pool = ThreadPoolExecutor(workers, thread_name_prefix="images")
    try:
        bar = tqdm(
            pool.map(function, items),
            total=len(items),
            desc=title,
            unit="image",
            disable=not (progress and items),
        )
        return list(bar)
    finally:
        pool.shutdown(cancel_futures=True)


def read_file(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        OSError: it cannot be read, is a pipe or a device, which may never end, or is too large.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a folder, pipe or device, not a file")
    if status.st_size > MAX_BYTES:
        raise OSError(errno.EFBIG, f"it has more than the limit of {MAX_BYTES:,} bytes")
    return path.read_bytes()


def _inspect(
    root: Path, name: str, *, min_size: int, upright: bool, known: Mapping[str, ImageRecord]
) -> ImageRecord | RejectedImage:
    """Read one file, hash it and decode it, as far as it is not known."""
    if problem := name_problem(name):
        return RejectedImage(name=printable(name), reason="unreadable", detail=problem)
    path = root / name
    before = known.get(name)
    if before is not None and min(before.size) < min_size:
        before = None
    try:
        stamp = _stamp(path)
        if before is not None and before.stamp == stamp:
            return replace(before, path=path)
        data = read_file(path)
    except OSError as error:
        detail = error.strerror or type(error).__name__
        return RejectedImage(name=name, reason="unreadable", detail=detail)
    if not data:
        return RejectedImage(name=name, reason="empty", detail="the file has no bytes")
    digest = hashlib.sha256(data).hexdigest()
    if before is not None and before.sha256 == digest:
        return replace(before, path=path, stamp=stamp)
    try:
        width, height, exif = _probe(data)
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        return RejectedImage(name=name, reason="unreadable", detail=_decoder_message(data, error))
    if min(width, height) < min_size:
        detail = f"{width} x {height} pixels, below {min_size}"
        return RejectedImage(name=name, reason="tiny", detail=detail)
    if not upright:
        exif = replace(exif, orientation=1)
    if exif.orientation not in _QUARTER_TURNS:
        detail = (
            f"EXIF orientation {exif.orientation}: the file holds the mirror image; save it "
            "upright, for example with ImageMagick's mogrify -auto-orient"
        )
        return RejectedImage(name=name, reason="mirrored", detail=detail)
    return ImageRecord(
        name=name, path=path, width=width, height=height, sha256=digest, exif=exif, stamp=stamp
    )


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def check_unchanged(record: ImageRecord) -> None:
    """Raise InputError if a file is not the one that was scanned."""
    try:
        if record.stamp is None or _stamp(record.path) == record.stamp:
            return
        if hashlib.sha256(read_file(record.path)).hexdigest() == record.sha256:
            return
    except OSError as error:
        raise InputError(f"{record.path} cannot be read: {error.strerror or error}.") from None
    raise InputError(
        f"{record.path} has changed since the images were listed. What was made of the others is "
        "kept: repeat the command."
    )


def to_json(records: Iterable[ImageRecord]) -> list[dict[str, Any]]:
    """What a later ``scan`` may be told as ``known``, but for the paths."""
    return [{**dataclasses.asdict(record), "path": ""} for record in records]


def from_json(listed: Any) -> dict[str, ImageRecord]:
    """Records by name from what ``to_json`` gave; empty where it is damaged."""
    try:
        found = {}
        for values in listed:
            exif: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in values["exif"].items()
            }
            stamp = values["stamp"] and tuple(values["stamp"])
            record = ImageRecord(**{**values, "exif": Exif(**exif), "stamp": stamp})
            found[record.name] = replace(record, path=Path(record.name))
        return found
    except (TypeError, KeyError, AttributeError):
        return {}


def name_problem(name: str) -> str | None:
    """Why a name cannot stand in text pairs, COLMAP's text models and UTF-8 databases, or None."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "the file's name is not valid UTF-8; rename it"
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        return "the file's name holds a tab, newline or other control character; rename it"
    return None


def printable(name: str) -> str:
    """A name with what cannot be printed escaped."""
    escaped = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if ord(c) >= 32 and ord(c) != 127 else f"\\x{ord(c):02x}" for c in escaped)


# ----------------------------------------------------------------------------------------- decoding


def _format(data: bytes) -> str | None:
    """Codec by the first bytes of a file."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"BM"):
        return "BMP"
    if data[:2] in (b"P5", b"P6") and data[2:3].isspace():
        return "PPM"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP"
    if data[4:8] == b"ftyp" and data[8:12] in {
        *(b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"),
        *(b"mif1", b"msf1"),
    }:
        return "HEIF"
    return None


def _decoder_message(data: bytes, error: Exception) -> str:
    codec = _format(data)
    message = str(error) or type(error).__name__
    return message if codec is None or message.startswith(codec) else f"{codec}: {message}"


def open_stored(data: bytes) -> ImageFile:
    """Open an image for decoding in stored pixels, EXIF orientation not applied.

    Decoders are called directly and not through ``PIL.Image.open``, whose limit of pixels is a
    global that a library must not move.

    Args:
        data: the file's bytes.

    Returns:
        The image, not yet decoded.

    Raises:
        ValueError: no known codec, its decoder is not installed, or too many pixels.
        Exception: whatever Pillow's decoder raises on damaged bytes.
    """
    codec = _format(data)
    reader: type[ImageFile]
    if codec == "JPEG":
        # The first picture of a phone's multi-picture file is the photo.
        from PIL.JpegImagePlugin import JpegImageFile as reader
    elif codec == "PNG":
        from PIL.PngImagePlugin import PngImageFile as reader
    elif codec == "BMP":
        from PIL.BmpImagePlugin import BmpImageFile as reader
    elif codec == "PPM":  # of benchmarks such as HPatches
        from PIL.PpmImagePlugin import PpmImageFile as reader
    elif codec == "TIFF":
        from PIL.TiffImagePlugin import TiffImageFile as reader

        # Pillow and OpenCV both turn TIFF, and only TIFF, without being asked.
        data = _clear_tiff_orientation(data)
    elif codec == "WebP":
        from PIL.WebPImagePlugin import WebPImageFile as reader
    elif codec == "HEIF":
        try:
            from pillow_heif.as_plugin import HeifImageFile as reader
        except ImportError:
            raise ValueError("HEIF needs pillow-heif: pip install 'gim-hloc[heif]'") from None
    else:
        raise ValueError("the content is not JPEG, PNG, TIFF, BMP, PPM, WebP or HEIF")
    image = reader(io.BytesIO(data))
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} is more than the limit of {MAX_PIXELS:,} pixels")
    if width * height > max(_LARGE_PIXELS, _PIXELS_PER_BYTE * len(data)):
        raise ValueError(f"{width} x {height} pixels cannot be in {len(data):,} bytes")
    if codec == "TIFF":
        _bound_tiff(image)
    return image


def _bound_tiff(image: Any) -> None:
    """Hold a TIFF to the bounds of other codecs: its tiles too, and without Pillow's own limit."""
    from PIL import Image

    columns, rows = image.tag_v2.get(322, 1), image.tag_v2.get(323, 1)
    if columns * rows > max(_LARGE_PIXELS, image.width * image.height):
        raise ValueError(f"tiles of {columns} x {rows} for {image.width} x {image.height} pixels")
    # What its ``load`` would do after a look at that limit.
    image.im = Image.core.new(image.mode, getattr(image, "_tile_size", image.size))


def _tiff_orientation(data: bytes) -> tuple[int, str, int] | None:
    """Where a TIFF keeps its orientation: offset, struct format and value; None without the tag."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    try:
        (start,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
        (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, start)
        first, step, value_at = (start + 8, 20, 12) if big else (start + 2, 12, 8)
        for entry in range(first, min(first + step * count, len(data)), step):
            tag, kind = struct.unpack_from(order + "HH", data, entry)
            if tag == 274 and kind == 3:
                offset = entry + value_at
                return offset, order + "H", struct.unpack_from(order + "H", data, offset)[0]
    except struct.error:
        pass  # cut short; the decoder will say so
    return None


def _clear_tiff_orientation(data: bytes) -> bytes:
    """The same TIFF with orientation 1."""
    found = _tiff_orientation(data)
    if found is None or found[2] == 1:
        return data
    offset, layout, _ = found
    patched = bytearray(data)
    struct.pack_into(layout, patched, offset, 1)
    return bytes(patched)


def _orientation(image: ImageFile, data: bytes) -> int:
    """EXIF orientation of a *loaded* image: asking a PNG that is not would decode it."""
    value: Any = None
    if _format(data) == "TIFF":
        found = _tiff_orientation(data)
        value = found[2] if found else None
    else:
        with contextlib.suppress(Exception):  # damaged metadata does not spoil the picture
            value = image.getexif().get(274)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


@contextlib.contextmanager
def _decoding(pixels: int) -> Iterator[None]:
    """Let only one thread decode when the decoded image is large."""
    if pixels <= _LARGE_PIXELS:
        yield
        return
    with _large_image_slot:
        yield


def _decoded_pixels(image: ImageFile) -> int:
    """Pixels that decoding will hold, after ``draft``. Progressive JPEGs keep all coefficients."""
    width, height = image.size
    if image.info.get("progressive"):
        scale = getattr(image, "decoderconfig", ()) or (1,)
        return width * height * int(scale[0]) ** 2
    return width * height


def _probe(data: bytes) -> tuple[int, int, Exif]:
    """Decode as cheaply as proves the file intact; (width, height) in stored pixels and EXIF."""
    image = open_stored(data)
    width, height = image.size
    if _format(data) == "JPEG":
        _draft(image, 8)
    with _decoding(_decoded_pixels(image)):
        image.load()
        exif = _read_exif(image, _orientation(image, data))
        del image  # before the next large one
    return width, height, exif


def _draft(image: ImageFile, factor: int) -> int:
    """Ask a JPEG decoder for 1/2, 1/4 or 1/8; returns the factor that it will use."""
    width, height = image.size
    if min(width, height) < factor:
        return 1
    image.draft(None, (width // factor, height // factor))
    return next(k for k in (1, *_JPEG_REDUCTIONS) if -(-width // k) == image.size[0])


@dataclass(frozen=True, kw_only=True)
class _Pixels:
    """A decoded image in stored orientation, perhaps reduced.

    Pixel i of a reduced axis covers stored pixels [i * factor, (i + 1) * factor) exactly; a last,
    partly covered one is dropped, so that no keypoint can lie outside the stored image.
    """

    rgb: np.ndarray  # (H, W, 3) uint8
    visible: np.ndarray | None  # (H, W) bool, False where fully transparent; None: all visible
    factor: int  # stored pixels per pixel
    stored_size: tuple[int, int]  # (width, height)
    orientation: int


def _decode(data: bytes, max_size: int | None) -> _Pixels:
    """Decode to 8-bit RGB, reduced by a power of two where the result keeps ``max_size``."""
    image = open_stored(data)
    width, height = image.size
    factor = 1
    if max_size is not None:
        factor = next((k for k in _JPEG_REDUCTIONS if max(width, height) // k >= max_size), 1)
    jpeg = _format(data) == "JPEG"
    if jpeg and factor > 1:
        factor = _draft(image, factor)
    with _decoding(_decoded_pixels(image)):
        if _is_deep(data, image):
            rgb, visible = _decode_deep(image, data)
            factor = 1
        else:
            rgb, visible = _decode_8bit(image, 1 if jpeg else factor)
        orientation = _orientation(image, data)
        del image  # before the next large one
    if factor > 1:
        rgb = rgb[: height // factor, : width // factor]
        visible = None if visible is None else visible[: height // factor, : width // factor]
    if visible is not None and visible.all():
        visible = None
    return _Pixels(
        rgb=rgb,
        visible=visible,
        factor=factor,
        stored_size=(width, height),
        orientation=orientation,
    )


def _decode_8bit(image: Image, reduce: int) -> tuple[np.ndarray, np.ndarray | None]:
    """RGB under the alpha channel (never composed with it) and where alpha is not zero."""
    visible = None
    image.load()
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A").point([0] + [255] * 255)
        visible = np.asarray(alpha.reduce(reduce) if reduce > 1 else alpha) > 127
        rgb = rgba.convert("RGB")
    else:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    if reduce > 1:
        rgb = rgb.reduce(reduce)
    return np.asarray(rgb), visible


def _is_deep(data: bytes, image: ImageFile) -> bool:
    """Whether the image has more than 8 bits a channel."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return True
    codec = _format(data)
    if codec == "PNG":
        return data[24] > 8
    if codec == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(258, 8)
        return max(bits if isinstance(bits, tuple) else (bits,)) > 8
    return False


def _decode_deep(image: ImageFile, data: bytes) -> tuple[np.ndarray, np.ndarray | None]:
    """As ``_decode_8bit`` for images of more than 8 bits a channel."""
    import cv2

    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image.load()
        values: np.ndarray | None = np.asarray(image)
    else:
        if _format(data) == "TIFF":
            data = _clear_tiff_orientation(data)
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None:
        return _decode_8bit(image, 1)
    visible = None
    if values.ndim == 3 and values.shape[2] == 4:
        visible = values[..., 3] > 0
    if values.ndim == 3:
        values = values[..., 2::-1]  # OpenCV's order is BGR
    values = _to_8bit(values)
    if values.ndim == 2:
        values = np.repeat(values[..., None], 3, axis=2)
    return np.ascontiguousarray(values), visible


def _to_8bit(values: np.ndarray) -> np.ndarray:
    """Map deep values to 8 bits so that the picture is neither black nor clipped.

    Sensors write 10, 12 or 14 bits into 16, and files do not say so. White is therefore the largest
    number with as many bits as the brightest pixel needs. Where the picture fills less than 1/16 of
    that range (thermal cameras, one hot pixel), too few grey levels would be left, and its 0.1 %
    and 99.9 % quantiles become black and white. Floating point in [0, 1] keeps that range.
    """
    if values.dtype == np.uint8:
        return values
    sample = values[:: max(1, values.shape[0] // 1024), :: max(1, values.shape[1] // 1024)]
    if values.dtype == np.uint16:
        low, high = np.quantile(sample, (0.001, 0.999))
        black, white = 0.0, float((1 << max(8, int(values.max()).bit_length())) - 1)
        if 0 < high - low < white / 16:
            black, white = float(low), float(high)
        levels = np.arange(2**16)
        table = np.clip((levels - black) * (255.0 / (white - black)) + 0.5, 0, 255)
        return table.astype(np.uint8)[values]
    finite = sample[np.isfinite(sample)]
    if finite.size == 0:
        return np.zeros(values.shape, np.uint8)
    low, high = (float(q) for q in np.quantile(finite, (0.001, 0.999)))
    if np.issubdtype(values.dtype, np.floating) and finite.min() >= 0 and finite.max() <= 1:
        low, high = 0.0, 1.0
    scaled = (np.nan_to_num(values.astype(np.float32)) - low) * (255.0 / max(high - low, 1e-12))
    return np.clip(scaled + 0.5, 0, 255).astype(np.uint8)


# --------------------------------------------------------------------------------------------- EXIF


def _read_exif(image: ImageFile, orientation: int) -> Exif:
    """EXIF values; a damaged block gives what can be read of it."""
    values: dict[str, Any] = {"orientation": orientation}
    with contextlib.suppress(Exception):
        exif = image.getexif()
        values["make"] = _text(exif.get(271))
        values["model"] = _text(exif.get(272))
        photo = exif.get_ifd(0x8769)
        values["focal_mm"] = _positive(photo.get(37386))
        values["focal_35mm"] = _positive(photo.get(41989))
        values["pixels"] = _pixels(photo)
        values["sensor_mm"] = _sensor_mm(photo, values["pixels"])
        values["gps"] = _gps(exif.get_ifd(0x8825))
    return Exif(**values)


def _text(value: Any) -> str | None:
    text = value.replace("\0", "").strip() if isinstance(value, str) else ""
    return text or None


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return number if math.isfinite(number) else None


def _positive(value: Any) -> float | None:
    number = _number(value)
    return number if number is not None and number > 0 else None


def _pixels(photo: dict[int, Any]) -> tuple[float, float] | None:
    width, height = _positive(photo.get(40962)), _positive(photo.get(40963))
    return None if width is None or height is None else (width, height)


def _sensor_mm(photo: dict[int, Any], pixels: tuple[float, float] | None) -> float | None:
    """Long side of the sensor: pixels of the full photo / pixels per unit on the sensor."""
    unit_mm = {2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}.get(photo.get(41488, 2))
    per_unit = _positive(photo.get(41486))
    if unit_mm is None or per_unit is None or pixels is None:
        return None
    return max(pixels) / per_unit * unit_mm


def _gps(ifd: dict[int, Any]) -> tuple[float, float, float | None] | None:
    latitude = _degrees(ifd.get(2), ifd.get(1), "S")
    longitude = _degrees(ifd.get(4), ifd.get(3), "W")
    if latitude is None or longitude is None or abs(latitude) > 90 or abs(longitude) > 180:
        return None
    if latitude == 0 and longitude == 0:
        return None  # what devices without a fix write
    altitude = _number(ifd.get(6))
    if altitude is not None and ifd.get(5) in (1, b"\x01"):
        altitude = -altitude
    return latitude, longitude, altitude


def _degrees(value: Any, reference: Any, negative: str) -> float | None:
    parts = [_number(part) for part in value] if isinstance(value, (tuple, list)) else []
    if len(parts) != 3 or None in parts:
        return None
    degrees = sum(part / 60**i for i, part in enumerate(parts) if part is not None)
    return -degrees if str(reference).strip("\0 ").upper() == negative else degrees


# What lenses for photography span along the long side: 8.5 to 500 mm on film.
_VIEW_DEGREES = (4.0, 130.0)
_SENSOR_MM = (1.0, 100.0)  # phones to medium format


def focal_prior(record: ImageRecord) -> float | None:
    """Focal length in stored pixels from EXIF, or None where it is missing or implausible.

    From the 35 mm equivalent by the ratio of diagonals, as COLMAP 4 does
    (``Bitmap::ExifFocalLength``); else from the focal length in mm and the sensor's size.
    """
    return _judged_focal(record)[0]


def doubtful_focal(record: ImageRecord) -> str | None:
    """What is implausible about the focal length in EXIF, or None."""
    return _judged_focal(record)[1]


def _judged_focal(record: ImageRecord) -> tuple[float | None, str | None]:
    exif = record.exif
    stated: dict[str, float] = {}
    if exif.focal_35mm is not None:
        diagonal = math.hypot(record.width, record.height)
        stated[f"{exif.focal_35mm:g} mm on 35 mm film"] = (
            exif.focal_35mm / _FULL_FRAME_DIAGONAL_MM * diagonal
        )
    doubts = []
    if exif.focal_mm is not None and exif.sensor_mm is not None:
        what = f"{exif.focal_mm:g} mm on a sensor of {exif.sensor_mm:.3g} mm"
        if _SENSOR_MM[0] <= exif.sensor_mm <= _SENSOR_MM[1]:
            stated[what] = exif.focal_mm / exif.sensor_mm * max(record.size)
        else:
            doubts.append(f"{what}, which no camera has")
    for what, focal in list(stated.items()):
        view = math.degrees(2 * math.atan2(max(record.size), 2 * focal))
        if not _VIEW_DEGREES[0] <= view <= _VIEW_DEGREES[1]:
            doubts.append(f"{what}, a field of view of {view:.3g} degrees")
            del stated[what]
    if stated and exif.pixels is not None:
        (short, long), (of_short, of_long) = sorted(record.size), sorted(exif.pixels)
        if abs(short / long * of_long / of_short - 1) > 0.03:
            doubts.append(
                f"{next(iter(stated))}, of a photo of {exif.pixels[0]:g}x{exif.pixels[1]:g} pixels "
                "before it was cropped"
            )
            stated.clear()
    # The diagonals of sensors of other proportions differ, and so may what the maker calls it.
    if len(stated) == 2 and max(stated.values()) > 1.3 * min(stated.values()):
        doubts.append(" but ".join(stated))
        stated.clear()
    return next(iter(stated.values()), None), "; ".join(doubts) or None


# ------------------------------------------------------------------------------------------ reading


def orientation_affine(orientation: int, width: int, height: int) -> np.ndarray:
    """Affine map from upright to stored pixels.

    Args:
        orientation: EXIF orientation, 1 to 8.
        width: of the stored image in pixels.
        height: of the stored image in pixels.

    Returns:
        (2, 3) float64, both frames hloc's (integer = pixel centre).
    """
    right, bottom = width - 1.0, height - 1.0
    rows = {
        1: ((1, 0, 0), (0, 1, 0)),
        2: ((-1, 0, right), (0, 1, 0)),
        3: ((-1, 0, right), (0, -1, bottom)),
        4: ((1, 0, 0), (0, -1, bottom)),
        5: ((0, 1, 0), (1, 0, 0)),
        6: ((0, 1, 0), (-1, 0, bottom)),
        7: ((0, -1, right), (-1, 0, bottom)),
        8: ((0, -1, right), (1, 0, 0)),
    }
    if orientation not in rows:
        raise ValueError(f"EXIF orientation must be 1 to 8, not {orientation}.")
    return np.array(rows[orientation], dtype=np.float64)


def _turned_size(width: int, height: int, orientation: int) -> tuple[int, int]:
    return (height, width) if orientation >= 5 else (width, height)


def _turn(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turn (H, W, ...) from stored to upright; a view. Inverse of ``orientation_affine``."""
    if orientation >= 5:
        array = np.swapaxes(array, 0, 1)
    # Written for the upright axes: which of them runs against the stored one.
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array


def upright_to_stored_pixels(array: np.ndarray, record: ImageRecord) -> np.ndarray:
    """Turn an upright array (H, W, ...) of an image back to how its file stores it."""
    # Quarter turns undo each other; all other orientations are their own inverse.
    inverse = {6: 8, 8: 6}.get(record.exif.orientation, record.exif.orientation)
    return np.ascontiguousarray(_turn(array, inverse))


def network_size(width: int, height: int, options: ImageOptions) -> tuple[int, int]:
    """(width, height) at which an upright image of this size reaches the network."""
    scale = 1.0
    if options.max_size is not None:
        scale = options.max_size / max(width, height)
        if not options.upsample:
            scale = min(scale, 1.0)
    step = options.multiple_of
    return tuple(  # type: ignore[return-value]
        max(step, round(side * scale) // step * step) for side in (width, height)
    )


def read_rgb(
    source: ImageRecord | str | os.PathLike[str],
    *,
    max_size: int | None = None,
    upright: bool = True,
) -> np.ndarray:
    """Read an image for people or for colours.

    Args:
        source: an image of ``scan`` or a path.
        max_size: reduce the long side to this many pixels; None keeps the stored size.
        upright: apply the EXIF orientation.

    Returns:
        (H, W, 3) uint8. Transparent pixels keep their colour. Not for mapping coordinates when
        reduced: use ``load``.

    Raises:
        InputError: the file cannot be read, or is not the one that was scanned.
    """
    pixels = _read(source if isinstance(source, ImageRecord) else Path(source), max_size)
    if isinstance(source, ImageRecord):
        check_unchanged(source)
    width, height = pixels.stored_size
    rgb = pixels.rgb
    scale = 1.0 if max_size is None else max_size / max(width, height)
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        rgb = np.rint(_resize(rgb, size)).astype(np.uint8)
    if upright:
        known = source.exif.orientation if isinstance(source, ImageRecord) else pixels.orientation
        rgb = _turn(rgb, known)
    return np.ascontiguousarray(rgb)


def read_stored(path: Path) -> tuple[np.ndarray, int]:
    """(H, W, 3) uint8 as the file stores it, and its EXIF orientation.

    Raises:
        InputError: the file cannot be read.
    """
    pixels = _read(path, None)
    return np.ascontiguousarray(pixels.rgb), pixels.orientation


def one(image: ImageLike, name: str, *, min_size: int) -> ImageRecord:
    """A single image.

    Args:
        image: a path, or as ``in_memory`` takes it.
        name: what one in memory is called; files have their own names.
        min_size: the shorter side has at least so many pixels.

    Raises:
        InputError: it cannot be used.
    """
    if not isinstance(image, str | os.PathLike):
        record = in_memory(image, name)
        if min(record.size) < min_size:
            raise InputError(f"{name} is {record.width}x{record.height} px; that is too small.")
        return record
    path = Path(image)
    if not path.exists():
        raise InputError(f"There is no image {path}.")
    if not path.is_file():
        raise InputError(f"{path} is a folder, pipe or device; give the file of an image.")
    found = scan(path.parent, names=[path.name], min_size=min_size)
    if found.rejected:
        raise InputError(
            f"{path} cannot be used: {found.rejected[0].reason}, {found.rejected[0].detail}."
        )
    return found.images[0]


def in_memory(image: ImageLike, name: str) -> MemoryImage:
    """An image that is none of a file.

    Args:
        image: array (H, W), (H, W, 1) or (H, W, 3), or tensor (1, H, W) or (3, H, W), uint8 or
            floating point in [0, 1], RGB; or a PIL image, with its EXIF.
        name: what it is called.

    Raises:
        InputError: another type, shape or range; an empty, damaged or mirrored image.
    """
    import PIL.Image
    import torch

    exif, visible = Exif(), None
    if isinstance(image, PIL.Image.Image):
        rgb, visible, exif = _of_pillow(image, name)
    elif isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise InputError(f"{name} is a tensor {tuple(image.shape)}; it must be (1 or 3, H, W).")
        tensor = image.detach().cpu().permute(1, 2, 0)
        rgb = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    elif isinstance(image, np.ndarray):
        if image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,)):
            raise InputError(f"{name} is an array {image.shape}; it must be (H, W[, 1 or 3]).")
        rgb = image
    else:
        raise InputError(
            f"{name} is {type(image).__name__!r}; it must be a path, an array (H, W, 3), a tensor "
            "(3, H, W) or a PIL image."
        )
    height, width = rgb.shape[:2]
    if not height * width:
        raise InputError(f"{name} is empty: {width}x{height} px.")
    rgb = _checked_8bit(rgb, name)
    rgb = np.broadcast_to(rgb.reshape(height, width, -1), (height, width, 3))
    pixels = _Pixels(
        rgb=np.ascontiguousarray(rgb), visible=visible, factor=1, stored_size=(width, height),
        orientation=exif.orientation,
    )  # fmt: skip
    return MemoryImage(
        name=name, path=Path(name), width=width, height=height, sha256="", exif=exif, pixels=pixels
    )


def _of_pillow(image: Any, name: str) -> tuple[np.ndarray, np.ndarray | None, Exif]:
    """RGB or grey values, where they are not transparent, and EXIF of an image of Pillow's."""
    try:
        image.load()
        orientation = image.getexif().get(274)
        exif = _read_exif(image, orientation if orientation in range(1, 9) else 1)
        deep = image.mode in ("I", "F") or image.mode.startswith("I;")
        rgb, visible = (_to_8bit(np.asarray(image)), None) if deep else _decode_8bit(image, 1)
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise InputError(f"{name} cannot be read: {type(error).__name__}: {error}.") from error
    if exif.orientation not in _QUARTER_TURNS:
        raise InputError(f"{name} is a mirror image (EXIF orientation {exif.orientation}).")
    return rgb, visible, exif


def _checked_8bit(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind != "f" or not (values.min() >= 0 and values.max() <= 1):
        span = f" in [{values.min()}, {values.max()}]" if values.dtype.kind in "iuf" else ""
        raise InputError(
            f"{name} is {values.dtype}{span}; it must be uint8, or floating point in [0, 1]."
        )
    return np.rint(values * np.float32(255)).astype(np.uint8)


def load(
    record: ImageRecord, options: ImageOptions, *, mask: np.ndarray | None = None
) -> ImageData:
    """Read an image as a network sees it.

    Order: decode (a JPEG at 1/2, 1/4 or 1/8 if that still has ``max_size``), grey if asked for,
    resize (area average when smaller, cubic when larger), turn upright.

    Args:
        record: an image of ``scan``.
        options: what the matcher wants.
        mask: (height, width) bool in stored pixels, True where keypoints are allowed.

    Returns:
        The image. Its mask is the given one, sampled at the stored position of every network
        pixel, and excludes fully transparent pixels; None if nothing is excluded.

    Raises:
        InputError: the file cannot be read any more, or changed its size, or the mask has another
            size.
    """
    import cv2
    import torch

    from gim_hloc.types import ImageData

    orientation = record.exif.orientation
    size = network_size(*record.upright_size, options)
    columns, rows = _turned_size(*size, orientation)
    pixels = _read(record, None if options.max_size is None else max(columns, rows))
    check_unchanged(record)  # after it was read, so that nothing can come in between
    if pixels.stored_size != record.size:
        raise InputError(f"{record.path} does not have {record.width} x {record.height} pixels.")
    if mask is not None and mask.shape != (record.height, record.width):
        raise InputError(
            f"The mask of {record.name} has {mask.shape[1]} x {mask.shape[0]} pixels, "
            f"the image has {record.width} x {record.height}."
        )

    array = pixels.rgb
    if options.grayscale:
        array = cv2.cvtColor(array, cv2.COLOR_RGB2GRAY)
    covered = (array.shape[1], array.shape[0])
    if covered != (columns, rows):
        array = _resize(array, (columns, rows))
    if array.ndim == 2:
        array = array[..., None]
    array = np.ascontiguousarray(_turn(array, orientation).transpose(2, 0, 1))
    # In NumPy: torch's threads would fight with the network's for so small a job.
    array = np.divide(array, np.float32(255), dtype=np.float32)

    scale = np.array([covered[0] / columns, covered[1] / rows]) * pixels.factor
    to_original = orientation_affine(orientation, columns, rows)
    to_original = to_original * scale[:, None]
    to_original[:, 2] += 0.5 * scale - 0.5

    allowed = None
    if mask is not None:
        extent = (covered[0] * pixels.factor, covered[1] * pixels.factor)
        allowed = _sample_nearest(mask, extent, (columns, rows))
    if pixels.visible is not None:
        visible = _sample_nearest(pixels.visible, covered, (columns, rows))
        allowed = visible if allowed is None else allowed & visible
    if allowed is not None:
        allowed = np.ascontiguousarray(_turn(allowed, orientation))
    return ImageData(
        image=torch.from_numpy(array),
        name=record.name,
        size=record.size,
        to_original=to_original,
        mask=None if allowed is None else torch.from_numpy(allowed),
    )


def _read(source: ImageRecord | Path, max_size: int | None) -> _Pixels:
    if isinstance(source, MemoryImage):
        return source.pixels
    path = source.path if isinstance(source, ImageRecord) else source
    try:
        data = read_file(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        return _decode(data, max_size)
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise InputError(f"{path} cannot be read: {_decoder_message(data, error)}.") from error


def _resize(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W[, 3]) uint8 to (width, height), float32 in [0, 255], half-pixel aligned.

    In floating point: averaging many pixels gives more than 8 bits, at no cost in time.
    """
    import cv2

    height, width = array.shape[:2]
    smaller = size[0] <= width and size[1] <= height
    # OpenCV falls back to bilinear, which aliases, if an axis grows under INTER_AREA.
    interpolation = cv2.INTER_AREA if smaller else cv2.INTER_CUBIC
    resized = cv2.resize(array.astype(np.float32), size, interpolation=interpolation)
    return resized if smaller else np.clip(resized, 0, 255)  # cubic overshoots at edges


def _sample_nearest(mask: np.ndarray, extent: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Sample the top left ``extent`` (width, height) of a mask on a grid of ``size``."""
    xs, ys = (
        np.clip(((np.arange(n) + 0.5) * (covered / n)).astype(np.int64), 0, covered - 1)
        for n, covered in zip(size, extent, strict=True)
    )
    return mask[np.ix_(ys, xs)]
