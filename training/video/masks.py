"""Where labels may be: masks of a segmentation, of a folder, or one for the whole video."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gim_hloc import weights
from gim_hloc.errors import InputError, WeightsError
from gim_hloc.images import ImageRecord
from gim_hloc.masks import EXCLUDED, MaskFolder, exclusion_masks
from gim_hloc.training.video.options import MaskOptions

logger = logging.getLogger(__name__)

_SIZE = 720  # px: long side that the segmentation sees
_WEIGHTS = ("encoder_epoch_20.pth", "decoder_epoch_20.pth")


@dataclass(frozen=True, kw_only=True, eq=False)
class FrameMasks:
    """Masks of the frames of one video; may be sent to another process.

    Attributes:
        settings: what decides the masks, JSON-able.
        folder: of masks named as their frames, or None.
        single: one mask of all frames, or None.
        erode_px: labels keep this distance from what is left out, px of the frames.
    """

    settings: dict[str, Any]
    folder: Path | None = None
    single: Path | None = None
    erode_px: int = 0

    def resolved(self) -> FrameMasks:
        """The same with paths that hold in any working folder."""
        return replace(
            self,
            folder=None if self.folder is None else self.folder.resolve(),
            single=None if self.single is None else self.single.resolve(),
        )

    def load(self, record: ImageRecord) -> np.ndarray | None:
        """(H, W) bool, True where labels may be; None where they may be everywhere.

        Raises:
            InputError: a mask cannot be read or does not fit.
        """
        if self.single is not None:
            # Under the name that a mask of this very frame would have.
            return _OneForAll(self.single, self.erode_px).load(record)
        if self.folder is not None:
            return MaskFolder(self.folder, erode_px=self.erode_px).load(record)
        return None


class _OneForAll(MaskFolder):
    """A mask that serves every image."""

    def __init__(self, path: Path, erode_px: int) -> None:
        super().__init__(path.parent, erode_px=erode_px)
        self._path = path

    def find(self, name: str) -> Path | None:
        """See ``MaskFolder.find``."""
        return self._path


def prepare_masks(
    records: Sequence[ImageRecord], out: Path, options: MaskOptions, *, device: str = "auto"
) -> FrameMasks:
    """Make or find the masks of frames.

    Args:
        records: frames.
        out: folder of masks that the segmentation makes; those that exist stay.
        options: see there.
        device: of the segmentation.

    Raises:
        InputError: the folder or image does not exist, or the first mask does not fit its frame; a
            class is unknown.
        WeightsError: masks were asked for by name and the weights cannot be had.
    """
    choice = options.masks
    if choice == "auto":
        choice = "segment" if _have_weights() else "none"
        if choice == "none":
            logger.info(
                "People, cars and sky are not masked: the segmentation's weights are not here "
                "(gim-weights download segmentation)."
            )
    if choice == "none":
        return FrameMasks(settings={"masks": "none"})
    settings: dict[str, Any] = {"masks": choice, "erode_px": options.mask_erode}
    if choice == "segment":
        settings |= {"classes": sorted(EXCLUDED), "max_size": _SIZE}
        settings |= {"weights": [weights.sha256(weights.locate(name)) for name in _WEIGHTS]}
        todo = [record for record in records if not (out / f"{record.name}.png").exists()]
        if todo:
            exclusion_masks(todo, out, EXCLUDED, max_size=_SIZE, device=device)
        return FrameMasks(settings=settings, folder=out, erode_px=options.mask_erode)
    path = Path(choice)
    if path.is_file():
        settings["masks"] = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        single = FrameMasks(settings=settings, single=path, erode_px=options.mask_erode)
        for record in records[:1]:  # one that does not fit is told now, not pair by pair
            single.load(record)
        return single
    if not path.is_dir():
        raise InputError(
            f"--masks is {choice!r}: give auto, segment, none, a folder of masks named as the "
            "frames (00000120.jpg.png), or one image for all frames."
        )
    for line in MaskFolder(path).check([record.name for record in records]):
        logger.warning("%s", line)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.png")):
        digest.update(file.relative_to(path).as_posix().encode() + b"\0" + file.read_bytes())
    settings["masks"] = f"sha256:{digest.hexdigest()}"
    masks = FrameMasks(settings=settings, folder=path, erode_px=options.mask_erode)
    for record in (r for r in records if MaskFolder(path).find(r.name) is not None):
        masks.load(record)
        break
    return masks


def _have_weights() -> bool:
    try:
        for name in _WEIGHTS:
            weights.locate(name, download=False)
    except WeightsError:
        return False
    return True
