"""The command ``gim-pairs``: write a list of image pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from gim_hloc.cli import common
from gim_hloc.errors import InputError, OutputError
from gim_hloc.options import PairOptions

if TYPE_CHECKING:
    import numpy as np

    from gim_hloc.images import ImageSet
    from gim_hloc.pairs.retrieval import ImageLoader


@dataclass(frozen=True, kw_only=True)
class Arguments(common.Licences):
    """Choose image pairs and write them, one "name0 name1" a line, as hloc reads them.

    Example: gim-pairs photos pairs.txt --mode sequential+retrieval
    """

    images: tyro.conf.Positional[Path]  # folder of the images, searched at any depth
    output: tyro.conf.Positional[Path]  # pair list to write
    pairs: Annotated[PairOptions, tyro.conf.arg(name="")] = field(default_factory=PairOptions)
    # Feature file in hloc's layout whose local descriptors retrieval uses; without it --matcher
    # computes them.
    features: Path | None = None
    matcher: str = "aliked_lightglue"  # sparse matcher whose local descriptors retrieval uses
    quality: Literal["fast", "base", "precise"] = "fast"  # operating point of that matcher
    device: str = "auto"  # where the matcher runs: auto, cpu, cuda, cuda:1, ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``gim-pairs``; returns the exit code."""
    arguments = common.parse(Arguments, prog="gim-pairs", args=common.prog(argv))
    common.configure_logging()
    return common.run(lambda: run(arguments))


def run(arguments: Arguments) -> None:
    """Choose the pairs of a folder, write them and print a summary.

    Raises:
        GimError: naming what is missing or wrong.
    """
    from gim_hloc import images
    from gim_hloc.pairs import plan, select, write_pairs

    if arguments.output.is_dir():  # before the descriptors take their time
        raise OutputError(f"The pair list '{arguments.output}' is a folder; give a file's name.")
    image_set = images.scan(arguments.images)
    images.require_usable(image_set)
    for rejected in image_set.rejected:
        print(f"Left out: {rejected}")
    names = image_set.names
    # Say what is going to happen before descriptors take their time.
    print(plan(arguments.pairs, names).why)
    selection = select(
        arguments.pairs,
        names,
        local_descriptors=lambda: _local_descriptors(arguments, image_set),
        gps={record.name: record.exif.gps for record in image_set.images},
        load_image=_image_loader(image_set),
        left_out=[rejected.name for rejected in image_set.rejected],
    )
    write_pairs(arguments.output, selection.pairs)
    for note in selection.notes:
        print(note)
    counts = ", ".join(f"{mode} {count}" for mode, count in selection.counts.items())
    print(f"{len(selection.pairs)} pairs of {len(names)} images ({counts}): {arguments.output}")


def _image_loader(image_set: ImageSet) -> ImageLoader:
    """A function that reads an image of the set by its name."""
    from gim_hloc import images

    return lambda name, options: images.load(image_set[name], options)


def _local_descriptors(arguments: Arguments, image_set: ImageSet) -> Mapping[str, np.ndarray]:
    """Local descriptors of all images, from the feature file or computed now."""
    from gim_hloc.pairs.retrieval import LocalDescriptors

    if arguments.features is not None:
        return LocalDescriptors(arguments.features, image_set.names)
    from tqdm import tqdm

    from gim_hloc import engine, images, matchers

    if not matchers.describe(arguments.matcher).has_keypoints:
        raise InputError(
            f"Retrieval needs local descriptors, and {arguments.matcher} has none: choose a sparse "
            "matcher with --matcher, or give --features"
        )
    matcher = matchers.load_sparse(
        arguments.matcher, quality=arguments.quality, device=arguments.device
    )
    descriptors: dict[str, np.ndarray] = {}
    with tqdm(total=len(image_set), desc="Describing images", unit="image") as progress:
        for name, encoding in engine.encode(
            matcher,
            image_set.names,
            lambda name: images.load(image_set[name], matcher.image_options),
            workers=engine.default_workers(matcher.device, deterministic=False),
        ):
            descriptors[name] = encoding.descriptors.cpu().numpy()
            progress.update()
    return descriptors
