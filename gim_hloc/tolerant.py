"""A matcher to which a bad image or pair is a result: why it cannot be used, in words."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from gim_hloc.engine import is_of_the_device
from gim_hloc.types import Encoding, ImageData, Matcher, Matches

logger = logging.getLogger(__name__)


class Unusable:
    """Stands for the image or the encoding of what cannot be used."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class TolerantMatcher:
    """Encodes and matches for ``engine.match``, and goes on after what cannot be used.

    All that it gives is of one resolution: it has nothing smaller where memory runs out.

    Args:
        matcher: what encodes and matches.
        prefix: of its own failures, which say nothing about the images.
    """

    def __init__(self, matcher: Matcher, prefix: str = "") -> None:
        self._matcher, self._prefix = matcher, prefix
        self.device = matcher.device

    def encode(self, image: ImageData | Unusable) -> Any:
        """The encoding of an image, or what stands for it."""
        if isinstance(image, Unusable):
            return image
        try:
            return self._matcher.encode(image)
        except Exception as error:
            return Unusable(self._reason(f"{image.name} cannot be encoded", error))

    def smaller(self) -> bool:
        """No."""
        return False

    def match(
        self, pairs: Sequence[tuple[Encoding | Unusable, Encoding | Unusable]]
    ) -> list[Matches | str]:
        """Matches of each pair, or why there are none."""
        results: list[Matches | str] = [
            "; ".join(dict.fromkeys(one.reason for one in pair if isinstance(one, Unusable)))
            for pair in pairs
        ]
        rows = [row for row, reason in enumerate(results) if not reason]
        usable: list[Any] = [pairs[row] for row in rows]
        for row, found in zip(rows, self._match(usable), strict=True):
            results[row] = found
        return results

    def _match(self, pairs: Sequence[tuple[Encoding, Encoding]]) -> list[Matches | str]:
        """Match a batch, or, where one of it spoils it, its pairs one by one."""
        if not pairs:
            return []
        try:
            return [*self._matcher.match_batch(pairs)]
        except Exception as error:
            reason = self._reason("cannot be matched", error)
            if len(pairs) == 1:
                return [reason]
        return [self._match([pair])[0] for pair in pairs]

    def _reason(self, what: str, error: Exception) -> str:
        """Say what failed; raise what others would fail of too."""
        if is_of_the_device(error):
            raise error
        logger.debug("%s", what, exc_info=error)
        words = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
        return f"{self._prefix}{what} ({words})"
