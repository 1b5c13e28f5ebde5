"""A matcher with all that belongs to it: linker, detector, and the settings that decide reuse."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from gim_hloc import matchers
from gim_hloc.errors import InputError
from gim_hloc.matchers import registry
from gim_hloc.matchers.common import parse_matcher_options, resolve_device
from gim_hloc.options import Quality, Where
from gim_hloc.pipelines.imported import ImportedMatcher
from gim_hloc.pipelines.options import ReconstructOptions
from gim_hloc.tracks.linker import Linker, linker_for
from gim_hloc.types import Matcher, SparseEncoding

# Raised when the meaning of a stored array changes, so that older files are not reused.
FORMAT = 1
DEFAULT = "aliked_lightglue"

# Names of cascades: their matchers, from the cheapest to the strongest. The second matches the
# keypoints of the first, the third has its own.
CASCADES = {"cascade": ("xfeat", "xfeat_lighterglue", "aliked_lightglue")}


def choose_matcher(quality: Quality, where: Where) -> str:
    """What ``--matcher auto`` stands for, by what was measured (README)."""
    device = str(resolve_device(where.devices[0] if where.devices else where.device))
    missing = any(registry.missing_weights(name) for name in CASCADES["cascade"])
    return "cascade" if quality == "fast" and device == "cpu" and not missing else DEFAULT


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to match images.

    Attributes:
        matcher: what matches.
        linker: what makes keypoints and matches of it.
        detector: whose keypoints are the first anchors; the matcher itself if it has keypoints.
        loader: how workers load the matcher; None for imported files.
        detector_loader: likewise.
        quality: operating point of both.
        feature_settings: all that decides what is stored of an image.
        match_settings: all that decides what is stored of a pair.
        notes: for the report.
    """

    matcher: Matcher[Any]
    linker: Linker
    detector: Matcher[SparseEncoding]
    loader: matchers.Loader | None
    detector_loader: matchers.Loader | None
    quality: Quality
    feature_settings: dict[str, Any]
    match_settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the matcher."""
        return self.matcher.info.name

    @property
    def min_confidence_sum(self) -> float | None:
        """Sum of confidences that pairs of unrelated images do not reach; None: not calibrated."""
        return self.matcher.info.min_confidence_sum.get(self.quality)

    def shares_keypoints(self, other: Method) -> bool:
        """Whether it matches the keypoints and descriptors that another method found."""
        if self.linker.detector_free or other.linker.detector_free:
            return False
        return self.feature_settings == other.feature_settings


def detection_options(detector: Matcher[SparseEncoding]) -> dict[str, Any]:
    """Options that decide a matcher's keypoints, for another that is to find the same."""
    own = {field.name for field in dataclasses.fields(detector.options)}
    return {key: value for key, value in detector.encode_settings().items() if key in own}


def load_method(
    options: ReconstructOptions,
    name: str,
    quality: Quality,
    device: str,
    *,
    detect_as: Method | None = None,
    own: bool = True,
) -> Method:
    """Load a matcher and what belongs to it.

    Args:
        options: of the run.
        name: of the matcher.
        quality: operating point.
        device: "auto" or a torch device.
        detect_as: a method whose keypoints are to be matched, if the matcher can.
        own: whether the run's options of its matcher are meant for this one.

    Raises:
        InputError: an option does not fit it, or the anchors' detector has no keypoints.
        WeightsError: weights are missing.
    """
    sizes = {
        key: value
        for key in ("max_size", "max_keypoints")
        if (value := getattr(options, key)) is not None
    }
    overrides = {**parse_matcher_options(options.matcher_options), **sizes} if own else {}
    if detect_as is not None:
        overrides = detection_options(detect_as.detector)
    if not matchers.describe(name).has_keypoints:
        overrides.pop("max_keypoints", None)  # of the anchors
    loader = matchers.Loader(name, quality, overrides)
    matcher = loader.load(device)
    linker = linker_for(
        matcher, options.tracks, anchored=options.anchored, quantized=options.quantized
    )
    detector, detector_loader, notes = matcher, loader, []
    if linker.detector_free:
        anchors = matchers.choose_detector(options.anchors)
        count = options.max_keypoints
        detector_loader = matchers.Loader(
            anchors, quality, {} if count is None else {"max_keypoints": count}
        )
        detector = detector_loader.load(device)
        if not detector.info.has_keypoints:
            raise InputError(
                f"{anchors} has no keypoints; choose a sparse matcher for the anchors."
            )
        if options.anchors == "auto" and anchors != "aliked_lightglue":
            notes.append(f"The weights of aliked_lightglue are missing: anchors are {anchors}'s.")
    return _method(options, linker, detector, loader, detector_loader, quality, notes)


def imported_method(options: ReconstructOptions, matcher: ImportedMatcher) -> Method:
    """Keypoints and matches of hloc's files."""
    return _method(options, linker_for(matcher), matcher, None, None, options.quality, [])


def _method(
    options: ReconstructOptions,
    linker: Linker,
    detector: Matcher[SparseEncoding],
    loader: matchers.Loader | None,
    detector_loader: matchers.Loader | None,
    quality: Quality,
    notes: list[str],
) -> Method:
    features: dict[str, Any] = {
        "format": FORMAT,
        **{f"encode.{key}": value for key, value in detector.encode_settings().items()},
    }
    if options.masks is not None:
        features["mask_erode"] = options.mask_erode
    return Method(
        matcher=linker.matcher,
        linker=linker,
        detector=detector,
        loader=loader,
        detector_loader=detector_loader,
        quality=quality,
        feature_settings=features,
        match_settings={**features, **linker.settings()},
        notes=notes,
    )
