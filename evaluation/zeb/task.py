"""Matching pairs of a set, in this process or in workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gim_hloc import engine
from gim_hloc.errors import InputError
from gim_hloc.evaluation.zeb.predictions import Prediction
from gim_hloc.matchers import Loader
from gim_hloc.tolerant import TolerantMatcher, Unusable
from gim_hloc.types import Encoding, ImageData, ImageOptions, Matches

Names = tuple[str, str]


class Images(Protocol):
    """Where a matcher finds its images."""

    def read(self, name: str, options: ImageOptions) -> ImageData:
        """An image as matchers are to see it; ``InputError`` names a file that is none."""


@dataclass(frozen=True)
class MatchTask:
    """Match pairs of names; what cannot be matched gives the reason.

    Attributes:
        loader: of the matcher.
        images: what it matches; must be picklable.
        batch_size: pairs a network call; 0 chooses.
        cache_gb: memory for encodings, 10^9 bytes; None chooses.
    """

    loader: Loader
    images: Images | None = None
    batch_size: int = 0
    cache_gb: float | None = None

    def open(
        self, device: str
    ) -> Callable[[Sequence[Names]], Iterator[tuple[Names, Prediction | str]]]:
        """Load the matcher."""
        matcher, images = self.loader.load(device), self.images
        assert images is not None

        tolerant = TolerantMatcher(matcher)

        def read(name: str) -> ImageData | Unusable:
            try:
                return images.read(name, matcher.image_options)
            except InputError as error:
                return Unusable(str(error))

        def match(pairs: Sequence[tuple[Any, Any]]) -> list[Prediction | str]:
            return [
                found if isinstance(found, str) else _prediction(found, *pair)
                for found, pair in zip(tolerant.match(pairs), pairs, strict=True)
            ]

        batch = self.batch_size or (1 if matcher.device.type == "cpu" else 4)
        return lambda pairs: engine.match(
            tolerant, pairs, read, match, cache_gb=self.cache_gb, batch_size=batch
        )


def _prediction(found: Matches, a: Encoding, b: Encoding) -> Prediction:
    return Prediction(
        points0=found.keypoints0.numpy(),
        points1=found.keypoints1.numpy(),
        scores=found.scores.numpy(),
        size0=a.size,
        size1=b.size,
    )
