"""``gim-masks IMAGES MASKS``: masks of what moves or has no place in a model."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gim_hloc.cli import common
from gim_hloc.masks import EXCLUDED

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Arguments:
    """Write masks that leave out people, sky and cars, for ``gim-reconstruct --masks MASKS``.

    A segmentation network (ADE20K, 150 classes) decides. Masks that are there already stay.
    """

    images: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """Folder of images, searched recursively."""
    masks: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MASKS")]
    """Folder to write a/b.jpg.png to for a/b.jpg: black is left out."""
    classes: tuple[str, ...] = EXCLUDED
    """What to leave out."""
    max_size: int = 1920
    """Long side in pixels that the network sees."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, ..."""
    overwrite: bool = False
    """Write masks anew that are there already."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    arguments = common.parse(_Arguments, prog="gim-masks", args=common.prog(argv))
    common.configure_logging()
    return common.run(lambda: _run(arguments))


def _run(arguments: _Arguments) -> int:
    from gim_hloc import images, masks

    found = images.scan(arguments.images, exclude=[arguments.masks])
    for rejected in found.rejected:
        logger.warning("Left out: %s (%s: %s)", rejected.name, rejected.reason, rejected.detail)
    images.require_usable(found)
    todo = [
        record
        for record in found.images
        if arguments.overwrite or not (arguments.masks / f"{record.name}.png").exists()
    ]
    written = []
    if todo:
        written = masks.exclusion_masks(
            todo,
            arguments.masks,
            arguments.classes,
            max_size=arguments.max_size,
            device=arguments.device,
        )
    sys.stdout.write(
        f"{len(written)} masks written to {arguments.masks}, "
        f"{len(found.images) - len(written)} were there already. Next: "
        f"gim-reconstruct {arguments.images} OUTPUT --masks {arguments.masks}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
