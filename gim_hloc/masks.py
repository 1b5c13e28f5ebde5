"""Masks that keep moving objects, sky or rig parts out of a reconstruction.

A mask says where keypoints are allowed. It is never painted into the image, where its edges would
become features themselves. ``exclusion_masks`` makes masks of what moves or has no place from a
segmentation of the images.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from gim_hloc import weights
from gim_hloc.errors import InputError, OutputError, some
from gim_hloc.files import write_atomic
from gim_hloc.images import (
    ImageRecord,
    open_stored,
    read_file,
    read_rgb,
    upright_to_stored_pixels,
)

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


EXCLUDED = ("person", "sky", "car")
"""What a reconstruction of a static scene does without."""
_SEGMENTATION = {"encoder": "encoder_epoch_20.pth", "decoder": "decoder_epoch_20.pth"}


class MaskFolder:
    """A folder of masks in COLMAP's convention: black (0) = ignore, anything else = keep.

    The mask of ``cam0/a.jpg`` is ``cam0/a.jpg.png`` or, if there is none, ``cam0/a.png``. Masks are
    in stored pixels, as COLMAP takes them: EXIF orientation is not applied.

    Args:
        root: folder of the masks.
        erode_px: the kept area shrinks by this many stored pixels, so that no keypoint sits on the
            edge of a masked object. The borders of the image do not count as edges.
        image_root: folder of the images. Where it is also the folder of the masks, ``a.png`` is
            taken for an image and only ``a.jpg.png`` for a mask.

    Raises:
        InputError: ``root`` is no folder.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        erode_px: int = 4,
        image_root: str | os.PathLike[str] | None = None,
    ) -> None:
        self.root = Path(root)
        self.erode_px = erode_px
        if not self.root.is_dir():
            problem = "is not a folder" if self.root.exists() else "does not exist"
            raise InputError(f"The mask folder {self.root} {problem}.")
        if erode_px < 0:
            raise InputError(f"Masks cannot be eroded by {erode_px} pixels.")
        self._beside_images = (
            image_root is not None and Path(image_root).resolve() == self.root.resolve()
        )

    def find(self, name: str) -> Path | None:
        """Path of the mask of an image, or None."""
        for candidate in self._candidates(name):
            if candidate.is_file():
                return candidate
        return None

    def _candidates(self, name: str) -> list[Path]:
        candidates = [self.root / f"{name}.png"]
        if not self._beside_images:
            candidates.append(self.root / PurePosixPath(name).with_suffix(".png"))
        return candidates

    def load(self, record: ImageRecord) -> np.ndarray | None:
        """Read the mask of an image.

        A mask of another size but the same shape is enlarged or reduced, with a warning.

        Args:
            record: an image of ``images.scan``.

        Returns:
            (height, width) bool in stored pixels, True where keypoints are allowed, eroded by
            ``erode_px``; None if the image has no mask.

        Raises:
            InputError: the mask cannot be read, or its size does not fit the image.
        """
        import cv2

        path = self.find(record.name)
        if path is None:
            return None
        keep: np.ndarray = _read_nonzero(path).astype(np.uint8)
        height, width = keep.shape
        if (width, height) != record.size:
            _check_shape(path, (width, height), record)
            logger.warning(
                "Mask %s (%d x %d) is resized to its image (%d x %d).",
                *(path, width, height, record.width, record.height),
            )
            keep = cv2.resize(keep, record.size, interpolation=cv2.INTER_NEAREST_EXACT)
        if self.erode_px > 0:
            side = 2 * self.erode_px + 1
            disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
            keep = cv2.erode(keep, disk)  # OpenCV's default leaves the image's borders alone
        return keep.astype(bool)

    def nothing_left(self, record: ImageRecord) -> str | None:
        """Say that the mask of an image leaves nothing of it, or None."""
        keep = self.load(record)
        if keep is None or keep.any():
            return None
        eroded = f" after erosion by {self.erode_px} px" if self.erode_px else ""
        path = self.find(record.name)
        return f"the mask {path} leaves nothing of it{eroded}; black is what is ignored"

    def sha(self, name: str) -> str | None:
        """Hash of what ``load`` depends on: the file's bytes and the erosion. None without a mask.

        Args:
            name: name of the image.

        Raises:
            InputError: the mask cannot be read.
        """
        path = self.find(name)
        if path is None:
            return None
        digest = hashlib.sha256(_read_bytes(path))
        digest.update(f"erode_px={self.erode_px}".encode())
        return digest.hexdigest()

    def check(self, names: Sequence[str]) -> list[str]:
        """Compare the folder with the images and describe what looks wrong.

        Args:
            names: all images of the run.

        Returns:
            Warnings for people: images without a mask, masks of no image, and masks used twice.
        """
        users: dict[Path, list[str]] = {}
        without: list[str] = []
        for name in sorted(names):
            path = self.find(name)
            if path is None:
                without.append(name)
            else:
                users.setdefault(path, []).append(name)
        warnings: list[str] = []
        if names and not users:
            tried = " or ".join(str(path) for path in self._candidates(min(names)))
            return [f"No image has a mask in {self.root}; looked for {tried}, for example."]
        if without:
            warnings.append(
                f"{len(without)} of {len(names)} images have no mask and are used whole: "
                f"{some(without)}."
            )
        for path, sharers in users.items():
            if len(sharers) > 1:
                warnings.append(f"Mask {path} is used for several images: {some(sharers)}.")
        images = {self.root / name for name in names}
        unused = sorted(
            path.relative_to(self.root).as_posix()
            for path in self.root.rglob("*.png")
            if path not in users and path not in images and not path.name.startswith(".")
        )
        if unused:
            warnings.append(f"{len(unused)} masks belong to no image: {some(unused)}.")
        return warnings


def exclusion_masks(
    images: Iterable[ImageRecord],
    out: str | os.PathLike[str],
    classes: Sequence[str] = EXCLUDED,
    *,
    max_size: int = 1920,
    device: str = "auto",
    network: Any = None,
) -> list[Path]:
    """Write masks of what to leave out, in COLMAP's naming: ``MaskFolder(out)`` finds them.

    Args:
        images: images of ``images.scan``.
        out: folder of the masks, made if needed; ``a/b.jpg`` gets ``a/b.jpg.png``, in stored
            pixels, black where a class of ``classes`` is.
        classes: names of ``networks.segmentation.CLASSES``.
        max_size: long side that the network sees, pixels.
        device: "auto" (CUDA if there is one) or a torch device.
        network: a ``networks.segmentation.Segmentation`` to use; loaded by default.

    Returns:
        Paths of the masks, in the order of the images.

    Raises:
        InputError: unknown class, or an image that cannot be read.
        WeightsError: the weights of the segmentation cannot be had.
        OutputError: the folder cannot be written.
    """
    import cv2
    from PIL import Image
    from tqdm import tqdm

    from gim_hloc.networks import segmentation

    unknown = [name for name in classes if name not in segmentation.CLASSES]
    if unknown or not classes:
        raise InputError(
            f"No class named {', '.join(unknown) or '(none given)'}; choose from "
            f"{', '.join(segmentation.CLASSES)}."
        )
    model = load_segmentation(device) if network is None else network
    paths = []
    for record in tqdm(list(images), desc="masks", unit="image", disable=None):
        labels = model.segment(read_rgb(record), max_size=max_size)
        keep = segmentation.allowed(labels, classes).astype(np.uint8) * 255
        large = cv2.resize(keep, record.upright_size, interpolation=cv2.INTER_NEAREST_EXACT)
        encoded = io.BytesIO()
        Image.fromarray(upright_to_stored_pixels(large, record)).save(encoded, "PNG")
        path = Path(out) / f"{record.name}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, encoded.getvalue())
        except OSError as error:
            raise OutputError(f"The mask {path} cannot be written: {error}.") from error
        paths.append(path)
    return paths


def load_segmentation(device: str = "auto") -> Any:
    """The segmentation network with the published weights.

    Raises:
        WeightsError: a file cannot be had or is not the network's.
    """
    from gim_hloc.matchers.common import resolve_device
    from gim_hloc.networks.segmentation import Segmentation

    paths = {part: weights.locate(name) for part, name in _SEGMENTATION.items()}
    model = Segmentation()
    for part, path in paths.items():
        state = weights.load_state_dict(path)
        load_segmentation_state(getattr(model, part), state, path=path)
    return model.eval().requires_grad_(False).to(resolve_device(device))


def load_segmentation_state(
    module: torch.nn.Module, state: Mapping[str, torch.Tensor], *, path: str | Path
) -> None:
    """Load encoder or decoder strictly, but for what their training library left in the files."""
    state = weights.strip_prefixes(state, strip=(), drop=("._tmp_running_", "._running_iter"))
    counters = [key for key in module.state_dict() if key.endswith("num_batches_tracked")]
    weights.load_into(module, state, path=path, optional=counters)


def _read_bytes(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise InputError(f"The mask {path} cannot be read: {error.strerror}.") from error


def _read_nonzero(path: Path) -> np.ndarray:
    """(H, W) bool: where any colour channel is not zero. Palettes count by their colours.

    Where the colours say nothing, being black everywhere or nowhere, alpha is the mask.
    """
    data = _read_bytes(path)
    try:
        image = open_stored(data)
        image.load()
        # 16-bit and floating point values would be cut off by a conversion to RGB.
        single = image.mode in ("I", "F", "L", "1") or image.mode.startswith("I;")
        values = np.asarray(image if single else image.convert("RGB"))
        has_alpha = "A" in image.getbands() or "a" in image.getbands()
        transparent = has_alpha or "transparency" in image.info
        opaque = np.asarray(image.convert("RGBA"))[..., 3] != 0 if transparent else None
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise InputError(f"The mask {path} cannot be read: {error}.") from error
    nonzero: np.ndarray = (values != 0).any(axis=2) if values.ndim == 3 else values != 0
    says_nothing = nonzero.all() or not nonzero.any()
    return opaque if opaque is not None and says_nothing and not opaque.all() else nonzero


def _check_shape(path: Path, size: tuple[int, int], record: ImageRecord) -> None:
    """Refuse a mask whose sides are not those of the image in proportion, to a pixel."""
    width, height = size
    if abs(height - record.height * width / record.width) <= 1:
        return
    hint = "make masks from the very image"
    if size == record.upright_size:
        hint = "it has the upright image's size, but masks are in pixels as stored, as in COLMAP"
    raise InputError(
        f"The mask {path} has {width} x {height} pixels, its image {record.name} has "
        f"{record.width} x {record.height}: {hint}."
    )
