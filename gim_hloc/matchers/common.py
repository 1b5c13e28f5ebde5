"""What all matchers share: options of operating points, devices, settings that decide results."""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeVar

import torch
import yaml

from gim_hloc import weights
from gim_hloc.errors import InputError
from gim_hloc.geometry.warp import Warp
from gim_hloc.options import Count, build, options
from gim_hloc.types import E, ImageData, ImageOptions, MatcherInfo, Matches, Quality

Options = TypeVar("Options")
Precision = Literal["auto", "float32", "float16", "bfloat16"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """The number format that "auto" means on a device."""
    if precision == "auto":
        return "float16" if device.type == "cuda" else "float32"
    if precision not in _DTYPES:
        raise InputError(f"Unknown precision {precision!r}. Choose auto, {', '.join(_DTYPES)}.")
    return precision


def resolve_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """``resolve_precision`` as a torch type."""
    return _DTYPES[resolve_precision(precision, device)]


def resolve_options(
    kind: type[Options],
    *,
    quality: Quality,
    presets: Mapping[Quality, Mapping[str, Any]],
    overrides: Mapping[str, Any],
    matcher: str,
) -> Options:
    """Options of an operating point with some fields replaced.

    Args:
        kind: the frozen dataclass of options.
        quality: operating point.
        presets: fields that an operating point sets, by operating point.
        overrides: fields set by the user.
        matcher: name of the matcher, for the message.

    Raises:
        InputError: ``overrides`` names a field that ``kind`` lacks, or a value is refused.
    """
    return build(kind, {**presets[quality], **overrides}, where=matcher)


def parse_matcher_options(texts: Sequence[str]) -> dict[str, Any]:
    """Turn ``NAME=VALUE`` texts into typed values (YAML rules: numbers, true, null, text).

    Raises:
        InputError: for a text without ``=``, or a value that is no YAML.
    """
    values = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name.strip():
            raise InputError(f"Matcher option {text!r}: expected NAME=VALUE.")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(
                f"Matcher option {text!r}: {value!r} is no value; give a number, true, false, "
                "null, text, or a list as in [480, 640]."
            ) from error
        if isinstance(parsed, str) and parsed[-1:].isdigit():
            with contextlib.suppress(ValueError):
                parsed = float(parsed)  # YAML takes 1e-3 for text: its numbers need a point
        values[name.strip().replace("-", "_")] = parsed
    return values


def resolve_device(device: str | torch.device) -> torch.device:
    """Turn "auto" or a device name into a torch device that exists.

    Raises:
        InputError: torch does not know the device or cannot use it here.
    """
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(
            f"The device {device!r} cannot be used here ({str(error).splitlines()[0]}). "
            'Use "auto" or "cpu".'
        ) from error
    return resolved


def weight_files(info: MatcherInfo) -> tuple[dict[str, Path], dict[str, str]]:
    """Where the weight files of a matcher are, and their hashes.

    Raises:
        WeightsError: one cannot be had.
    """
    paths = {file: weights.locate(file) for file in info.checkpoint}
    return paths, {file: weights.sha256(path) for file, path in paths.items()}


@options
class OwnOptions:
    """Numbers of a matcher that has no options of its own."""

    max_size: Count | None = 1024  # long side in pixels; None keeps the image's


class MatcherBase(ABC, Generic[E]):
    """Base of all matchers: what of the protocol has a default.

    A subclass has ``encode`` and ``match``, which several threads may call, and names the option
    fields that decide its encodings in ``encode_fields``; all others decide matches. A matcher of
    your own (``examples/own_matcher.py``) also has the class attributes below.

    Attributes:
        info: facts about it.
        options_type: its options, a class made by ``gim_hloc.options.options``.
        presets: fields that an operating point sets, by operating point.
        version: stands for its code in the cache; by default the hash of its source file, and of
            those of the classes that it derives from, so that every edit counts. Declare it where
            it calls code in other files; it is not inherited.
    """

    info: MatcherInfo
    options_type: type[Any] = OwnOptions
    presets: Mapping[Quality, Mapping[str, Any]] = {}
    version: str | None = None
    encode_fields: tuple[str, ...] = ("max_size",)
    multiple_of: int = 1  # px, of the sides of images
    libraries: Mapping[str, str] = {}  # versions of those that change numbers

    @classmethod
    def make(cls, *, quality: Quality = "base", device: str = "auto", **overrides: Any) -> Self:
        """A matcher of the class's own ``info`` at an operating point."""
        options = resolve_options(
            cls.options_type,
            quality=quality,
            presets={quality: cls.presets.get(quality, {})},
            overrides=overrides,
            matcher=cls.info.name,
        )
        return cls(options=options, device=resolve_device(device))

    def __init__(
        self,
        *,
        options: Any,
        device: torch.device,
        info: MatcherInfo | None = None,
        image_options: ImageOptions | None = None,
        weights_hashes: Mapping[str, str] | None = None,
    ) -> None:
        self.info = info or self.info
        self.options = options
        self.image_options = image_options or ImageOptions(
            max_size=getattr(options, "max_size", None),
            upsample=getattr(options, "upsample", False),
            grayscale=self.info.colour == "gray",
            multiple_of=self.multiple_of,
        )
        self.device = device
        self.weights_hashes = dict(weights_hashes or {})

    @abstractmethod
    def encode(self, image: ImageData) -> E:
        """Compute what depends on one image only."""

    @abstractmethod
    def match(self, a: E, b: E) -> Matches:
        """Match two encodings."""

    def match_batch(self, pairs: Sequence[tuple[E, E]]) -> list[Matches]:
        """Match many pairs, one by one."""
        return [self.match(a, b) for a, b in pairs]

    def warp_batch(self, pairs: Sequence[tuple[E, E]]) -> list[Warp]:
        """Only dense matchers have warps."""
        raise InputError(f"{self.info.name} has no warps; choose a dense matcher.")

    def smaller(self) -> bool:
        """Nothing to make smaller."""
        return False

    def _settings(self, fields: Sequence[str], weights: Sequence[str]) -> dict[str, Any]:
        values: dict[str, Any] = {"matcher": self.info.name}
        values |= {key: getattr(self.options, key) for key in fields}
        values |= {f"version:{key}": value for key, value in self.libraries.items()}
        values |= {f"sha256:{key}": self.weights_hashes[key] for key in weights}
        return values

    def _encode_weights(self) -> list[str]:
        """Names of the weight files that decide encodings."""
        return list(self.weights_hashes)

    def encode_settings(self) -> dict[str, Any]:
        """Everything that decides encodings, flat and JSON-able."""
        return self._settings(self.encode_fields, self._encode_weights())

    def match_settings(self) -> dict[str, Any]:
        """Everything that decides matches of given encodings, flat and JSON-able."""
        fields = [
            f.name for f in dataclasses.fields(self.options) if f.name not in self.encode_fields
        ]
        mine = set(self._encode_weights())
        return self._settings(fields, [key for key in self.weights_hashes if key not in mine])

    def settings(self) -> dict[str, Any]:
        """Both parts, for the record of a run."""
        return {"encode": self.encode_settings(), "match": self.match_settings()}
