"""Matching pairs of a set, in this process or in workers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gim_hloc import engine
from gim_hloc.errors import InputError
from gim_hloc.evaluation.zeb.predictions import Prediction
from gim_hloc.matchers import registry
from gim_hloc.matchers.base import Encoding, ImageData, ImageOptions, Matcher, Matches, Quality

logger = logging.getLogger(__name__)

Names = tuple[str, str]


class Images(Protocol):
    """Where a matcher finds its images."""

    def read(self, name: str, options: ImageOptions) -> ImageData:
        """An image as matchers are to see it; ``InputError`` names a file that is none."""


@dataclass(frozen=True)
class MatchTask:
    """Match pairs of names; what cannot be matched gives the reason.

    Attributes:
        name: of the matcher.
        quality: its operating point.
        overrides: more of its options.
        images: what it matches; must be picklable.
        batch_size: pairs a network call; 0 chooses.
        cache_gb: memory for encodings, 10^9 bytes; None chooses.
    """

    name: str
    quality: Quality
    overrides: Mapping[str, Any]
    images: Images | None = None
    batch_size: int = 0
    cache_gb: float | None = None
    # What is loaded stays in its process.
    _loaded: dict[str, Matcher] = field(default_factory=dict, repr=False, compare=False)

    def load(self, device: str) -> Matcher:
        """The matcher, loaded once."""
        if device not in self._loaded:
            self._loaded[device] = registry.load(
                self.name, quality=self.quality, device=device, **self.overrides
            )
        return self._loaded[device]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_loaded": {}}

    def open(
        self, device: str
    ) -> Callable[[Sequence[Names]], Iterator[tuple[Names, Prediction | str]]]:
        """Load the matcher."""
        matcher, images = self.load(device), self.images
        assert images is not None

        def read(name: str) -> ImageData | _Unusable:
            try:
                return images.read(name, matcher.image_options)
            except InputError as error:
                return _Unusable(str(error))

        encoder = _Encoder(matcher)
        batch = self.batch_size or (1 if matcher.device.type == "cpu" else 4)
        return lambda pairs: engine.match(
            encoder,
            pairs,
            read,
            lambda encodings: _match(matcher, encodings),
            cache_gb=self.cache_gb,
            batch_size=batch,
        )


class _Unusable:
    """Stands for the image or the encoding of a file that cannot be used."""

    def __init__(self, message: str) -> None:
        self.message = message


class _Encoder:
    def __init__(self, matcher: Matcher) -> None:
        self._matcher = matcher
        self.device = matcher.device

    def encode(self, image: ImageData | _Unusable) -> Any:
        if isinstance(image, _Unusable):
            return image
        try:
            return self._matcher.encode(image)
        except Exception as error:
            if engine.spoils_the_rest(error):
                raise
            logger.debug("%s cannot be encoded", image.name, exc_info=True)
            return _Unusable(f"{image.name} cannot be encoded ({_words(error)})")

    def smaller(self) -> bool:
        """No: a benchmark must not go on at another resolution when memory runs out."""
        return False


def _match(
    matcher: Matcher, pairs: Sequence[tuple[Encoding | _Unusable, Encoding | _Unusable]]
) -> list[Prediction | str]:
    """Match a batch."""
    results: list[Prediction | str] = [
        "; ".join(dict.fromkeys(e.message for e in pair if isinstance(e, _Unusable)))
        for pair in pairs
    ]
    rows = [row for row, reason in enumerate(results) if not reason]
    usable: list[Any] = [pairs[row] for row in rows]
    for row, (a, b), found in zip(rows, usable, _match_usable(matcher, usable), strict=True):
        results[row] = found if isinstance(found, str) else Prediction(
            points0=found.keypoints0.numpy(),
            points1=found.keypoints1.numpy(),
            scores=found.scores.numpy(),
            size0=a.size,
            size1=b.size,
        )  # fmt: skip
    return results


def _match_usable(
    matcher: Matcher, pairs: Sequence[tuple[Encoding, Encoding]]
) -> list[Matches | str]:
    """Match a batch, or, where one of it spoils it, its pairs one by one."""
    if not pairs:
        return []
    try:
        return [*matcher.match_batch(pairs)]
    except Exception as error:
        if engine.spoils_the_rest(error):
            raise
        if len(pairs) == 1:
            logger.debug("%s cannot be matched", [e.name for e in pairs[0]], exc_info=True)
            return [f"cannot be matched ({_words(error)})"]
    return [_match_usable(matcher, [pair])[0] for pair in pairs]


def _words(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
