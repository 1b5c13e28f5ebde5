"""Whether a matcher keeps its promises.

python -m gim_hloc.matchers.check mine:Matcher [NAME=VALUE ...]

Prints a line a check. The exit code is 1 where one failed, 2 where the matcher cannot be loaded.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import torch
from PIL import Image

from gim_hloc import images, workers
from gim_hloc.errors import GimError
from gim_hloc.geometry.warp import Warp, transform
from gim_hloc.matchers.common import parse_matcher_options
from gim_hloc.matchers.own import fault
from gim_hloc.matchers.registry import Loader
from gim_hloc.types import (
    ImageData,
    ImageOptions,
    Kind,
    Matcher,
    Matches,
    SparseEncoding,
)

WIDTH, HEIGHT = 640, 480
SHIFT = np.array([[1.0, 0.0, 9.0], [0.0, 1.0, -6.0]])  # of the scene's pixels, image 0 -> image 1
_ANGLE = 5.0  # degrees
_TOLERANCE = 3.0  # px, of a right match
_LEAST, _SHARE = 30, 0.7  # matches, and those of them that must be right


class BrokenPromiseError(Exception):
    """A promise that is not kept; says what to do."""


def require(holds: bool, what: str) -> None:
    """Say what is to be done where something does not hold."""
    if not holds:
        raise BrokenPromiseError(what)


def usable(wrong: str | None) -> None:
    """Refuse what every run refuses of another's matcher."""
    require(wrong is None, str(wrong))


# ------------------------------------------------------------------------------------ the pictures


@functools.cache
def scene() -> np.ndarray:
    """(H, W, 3) uint8: patches of all sizes, with corners everywhere and no repetition."""
    rng = np.random.default_rng(0)
    picture = np.full((HEIGHT, WIDTH, 3), 128, np.float32)
    for side in (96, 48, 24, 12):
        for _ in range(2 * WIDTH * HEIGHT // side**2):
            centre = rng.uniform((0, 0), (WIDTH, HEIGHT))
            box: Any = (centre, rng.uniform(0.3, 1, 2) * side, rng.uniform(0, 90))
            corners = np.rint(cv2.boxPoints(box)).astype(np.int32)
            cv2.fillConvexPoly(picture, corners, rng.uniform(0, 255, 3).tolist(), cv2.LINE_AA)
    return cv2.GaussianBlur(picture, (0, 0), 0.8).astype(np.uint8)


def rotation() -> np.ndarray:
    """(2, 3): about the middle of the picture."""
    return cv2.getRotationMatrix2D(((WIDTH - 1) / 2, (HEIGHT - 1) / 2), _ANGLE, 1.0)


def write_pictures(folder: Path) -> dict[str, images.ImageRecord]:
    """The scene, seen from elsewhere, lying on its side with an EXIF orientation, and nothing."""
    first = scene()
    turned = Image.fromarray(np.rot90(first).copy())  # a viewer turns it back
    exif = turned.getexif()
    exif[274] = 6
    turned.save(folder / "turned.png", exif=exif)
    pictures = {
        "a": first,
        "shifted": cv2.warpAffine(first, SHIFT, (WIDTH, HEIGHT), borderMode=cv2.BORDER_REFLECT),
        "rotated": cv2.warpAffine(
            first, rotation(), (WIDTH, HEIGHT), borderMode=cv2.BORDER_REFLECT
        ),
        "blank": np.full_like(first, 90),
    }
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return {Path(r.name).stem: r for r in images.scan(folder, min_size=16).images}


# --------------------------------------------------------------------------------------- the checks


@dataclass
class _Contract:
    """A matcher and what it says about the pictures."""

    loader: Loader
    device: str
    records: Mapping[str, images.ImageRecord]

    def __post_init__(self) -> None:
        self.matcher: Matcher[Any] = self.loader.load(self.device)
        self.info = self.loader.entry.info

    def read(self, name: str, mask: np.ndarray | None = None) -> ImageData:
        return images.load(self.records[name], self.matcher.image_options, mask=mask)

    def encoded(self, name: str) -> Any:
        return self.matcher.encode(self.read(name))

    def pair(self, other: str) -> tuple[Any, Any]:
        return self.encoded("a"), self.encoded(other)

    def checks(self) -> tuple[Callable[[], None], ...]:
        """All, in the order in which a matcher is written."""
        return (
            self.protocol, self.settings, self.encode, self.match, self.masks, self.shifted_image,
            self.rotated_image, self.turned_file, self.blank_image, self.repeatable, self.batches,
            self.threads, self.stored, self.worker,
        )  # fmt: skip

    def protocol(self) -> None:
        wanted = [name for name in vars(Matcher) if not name.startswith("_")]
        lacks = [n for n in [*wanted, *Matcher.__annotations__] if not hasattr(self.matcher, n)]
        require(not lacks, f"it lacks {', '.join(lacks)}: derive from MatcherBase")
        kinds = get_args(Kind)
        require(self.info.kind in kinds, f"info.kind must be one of {', '.join(kinds)}")
        require(
            isinstance(self.matcher.image_options, ImageOptions), "image_options is no ImageOptions"
        )

    def settings(self) -> None:
        again = self.loader.entry.load(self.loader.quality, self.device, self.loader.overrides)
        for name in ("encode_settings", "match_settings"):
            values = getattr(self.matcher, name)()
            require(isinstance(values, dict), f"{name} must return a dict")
            try:
                json.dumps(values, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise BrokenPromiseError(
                    f"{name} must hold numbers, texts and lists only ({error})"
                ) from None
            require(values == getattr(again, name)(), f"{name} must be the same each time")

    def encode(self) -> None:
        found = self.encoded("a")
        usable(fault("encode", found, ()))
        require(found.name == "a.png", "the encoding must have the image's name")
        require(found.size == (WIDTH, HEIGHT), "the encoding must have the image's size")
        if self.info.kind != "sparse":
            return
        require(isinstance(found, SparseEncoding), "a sparse matcher encodes as SparseEncoding")
        tensors(found, "the encoding's", "keypoints", "descriptors", "scores")
        count = len(found)
        require(count >= _LEAST, f"{count} keypoints of a picture full of corners; find more")
        self.within(found.keypoints, "keypoints")
        require(
            bool((found.scores[1:] <= found.scores[:-1]).all()),
            "keypoints must be sorted, the highest score first",
        )
        width = found.descriptors.shape[-1]
        wanted = torch.uint8 if self.info.binary else torch.float16
        require(
            found.descriptors.shape == (count, width) and found.descriptors.dtype == wanted,
            f"descriptors must be (N, D) {wanted}, not {tuple(found.descriptors.shape)} "
            f"{found.descriptors.dtype}: see info.binary",
        )
        require(self.info.descriptor_dim in (None, width), f"info.descriptor_dim must be {width}")

    def within(self, xy: torch.Tensor, what: str) -> None:
        require(xy.dtype == torch.float32, f"{what} must be float32, not {xy.dtype}")
        low, high = xy.min(0).values, xy.max(0).values
        inside = (low >= -0.5).all() and (high <= torch.tensor([WIDTH, HEIGHT]) - 0.5).all()
        require(
            bool(inside),
            f"{what} must lie in the image, in stored pixels with the top left one's centre at "
            f"(0, 0); they span {low.tolist()} to {high.tolist()}",
        )

    def masks(self) -> None:
        allowed = np.zeros((HEIGHT, WIDTH), bool)
        allowed[:, : WIDTH // 2] = True
        found = self.matcher.encode(self.read("a", allowed))
        xy = self.matcher.match(found, self.encoded("shifted")).keypoints0
        if self.info.kind == "sparse":
            xy = found.keypoints
        beyond = int((xy[:, 0] > WIDTH // 2 + 1).sum())
        require(not beyond, f"{beyond} points where image.mask is False; leave them out")

    def match(self) -> None:
        a, b = self.pair("shifted")
        found = self.matcher.match(a, b)
        usable(fault("match", found, (a, b)))
        tensors(found, "the matches'", "keypoints0", "keypoints1", "scores")
        count = len(found)
        require(count >= _LEAST, f"{count} matches of a picture and its shifted copy; find more")
        self.within(found.keypoints0, "keypoints0")
        self.within(found.keypoints1, "keypoints1")
        require(
            found.scores.dtype == torch.float32
            and bool(((found.scores >= 0) & (found.scores <= 1)).all()),
            "scores must be float32 in [0, 1]: how likely a match is right",
        )
        if self.info.kind == "sparse":
            rows: Any = found.indices
            require(rows is not None, "sparse matchers give indices: use Matches.from_indices")
            tensors(found, "the matches'", "indices")
            require(rows.dtype == torch.int64, f"indices must be int64, not {rows.dtype}")
            twice = max(int(rows[:, side].bincount().max()) for side in (0, 1))
            require(twice == 1, "a keypoint must be matched once at most")
        if self.info.kind == "dense":
            warps = self.matcher.warp_batch([(a, b)])
            require(
                isinstance(warps, list) and len(warps) == 1 and isinstance(warps[0], Warp),
                "warp_batch must return a list of a Warp a pair",
            )
            (warp,) = warps
            require(
                bool((warp.certainty0 >= 0).all() and (warp.certainty0 <= 1).all()),
                "certainties of the warp must be in [0, 1]",
            )

    def repeatable(self) -> None:
        one, two = (self.matcher.match(*self.pair("rotated")) for _ in range(2))
        require(
            same(one, two),
            "the same images must give the same matches: set seeds, keep no state of other images",
        )

    def batches(self) -> None:
        pairs = [self.pair("shifted"), self.pair("rotated")]
        alone = [self.matcher.match(*pair) for pair in pairs]
        batch = self.matcher.match_batch(pairs)
        require(
            isinstance(batch, list)
            and len(batch) == 2
            and all(same(*both) for both in zip(alone, batch, strict=True)),
            "match_batch must give what match gives for each pair",
        )

    def threads(self) -> None:
        names = ["shifted", "rotated"] * 3
        alone = {name: self.matcher.match(*self.pair(name)) for name in set(names)}
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda name: self.matcher.match(*self.pair(name)), names))
        require(
            all(same(alone[name], one) for name, one in zip(names, found, strict=True)),
            "several threads encode and match at a time: make what is no tensor (detectors, "
            "buffers) within the method",
        )

    def stored(self) -> None:
        if self.info.kind != "sparse":
            return
        pair = self.pair("shifted")
        again = [SparseEncoding.from_arrays(e.name, *e.to_arrays()) for e in pair]
        require(
            same(self.matcher.match(*pair), self.matcher.match(*again)),
            "encodings read back from a file must match as fresh ones: match may only use their "
            "fields (keypoints, descriptors, scores)",
        )

    def worker(self) -> None:
        found: list[Matches] = []
        where = workers.Where(devices=(self.device if self.device != "auto" else "cpu",))
        task = _Remote(self.loader, self.records)
        workers.run(task, ["shifted"], where, lambda _, matches: found.append(matches))
        require(
            same(found[0], self.matcher.match(*self.pair("shifted"))),
            "another process must give the same matches: set seeds, and use no hash() or set order",
        )

    def blank_image(self) -> None:
        self.matcher.match(*self.pair("blank"))

    def turned_file(self) -> None:
        found = self.matcher.match(*self.pair("turned"))
        record = self.records["turned"]
        self.right(
            found,
            record.upright_to_stored,
            "map keypoints by image.to_original, as encode_network_keypoints",
        )

    def shifted_image(self) -> None:
        self.right(self.matcher.match(*self.pair("shifted")), SHIFT, "it is not shifted by (9, -6)")

    def rotated_image(self) -> None:
        self.right(
            self.matcher.match(*self.pair("rotated")), rotation(), f"it is turned by {_ANGLE:g}°"
        )

    def right(self, found: Matches, truth: np.ndarray, hint: str) -> None:
        require(len(found) >= _LEAST, f"{len(found)} matches; find more ({hint})")
        error = (transform(truth, found.keypoints0) - found.keypoints1).norm(dim=1)
        share = float((error <= _TOLERANCE).float().mean())
        require(
            share >= _SHARE,
            f"{share:.0%} of {len(found)} matches are right within {_TOLERANCE:g} px, "
            f"{_SHARE:.0%} should be ({hint})",
        )


def tensors(found: Any, whose: str, *names: str) -> None:
    """Refuse fields that are no tensors in main memory."""
    for name in names:
        value = getattr(found, name)
        require(
            isinstance(value, torch.Tensor) and value.device.type == "cpu",
            f"{whose} {name} must be a tensor in main memory, not {type(value).__name__}"
            + (f" on {value.device}" if isinstance(value, torch.Tensor) else ""),
        )


def same(one: Matches, two: Matches) -> bool:
    """Whether both are the same matches, up to float noise."""
    return len(one) == len(two) and all(
        torch.allclose(getattr(one, name), getattr(two, name), atol=1e-3)
        for name in ("keypoints0", "keypoints1", "scores")
    )


@dataclass(frozen=True)
class _Remote:
    """Match the picture with others, in another process."""

    loader: Loader
    records: Mapping[str, images.ImageRecord]

    def open(self, device: str) -> Callable[[Sequence[str]], Iterator[tuple[str, Matches]]]:
        """Load the matcher."""
        contract = _Contract(self.loader, device, self.records)
        return lambda names: (
            (name, contract.matcher.match(*contract.pair(name))) for name in names
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Check a matcher; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m gim_hloc.matchers.check",
        description="Whether a matcher keeps its promises.",
    )
    parser.add_argument("matcher", help="module:Class, file.py:Class or a name")
    parser.add_argument("options", nargs="*", metavar="NAME=VALUE", help="options of the matcher")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(argv)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            loader = Loader(given.matcher, "base", parse_matcher_options(given.options))
            contract = _Contract(loader, given.device, write_pictures(Path(folder)))
        except GimError as error:
            sys.stderr.write(f"error: {error}\n")
            return error.exit_code
        for check in contract.checks():
            result = "ok"
            try:
                check()
            except (BrokenPromiseError, GimError) as error:
                result = f"failed: {error}"
            except Exception as error:  # in what is done with its results
                result = f"failed: what it returned is of no use ({type(error).__name__}: {error})"
            failed += result != "ok"
            sys.stdout.write(f"{check.__name__.replace('_', ' '):<14} {result}\n")
            if failed and check in (contract.protocol, contract.encode, contract.match):
                sys.stdout.write("The other checks rest on this and are left out.\n")
                break
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
