"""Golden arrays of gim_lightglue: SuperPoint, LightGlue, and both as the demo runs them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from gim_hloc.networks import superpoint
from gim_hloc.networks.keypoints import Detection
from gim_hloc.networks.lightglue import LightGlue, Side, Start
from gim_hloc.weights import load_into, strip_prefixes

from . import filled
from .golden import Golden, GoldenError, Weights

_HALF = 0.5  # the reference's keypoints have their origin in the corner of the first pixel


def load(weights: Weights) -> tuple[superpoint.SuperPoint, LightGlue]:
    """Detector and matcher with filled weights."""
    state = weights("gim_lightglue")
    detector = superpoint.SuperPoint()
    own = strip_prefixes(state, strip=("superpoint.",), drop=("model.",))
    load_into(detector, own, path="the filled gim_lightglue")
    rest = strip_prefixes(state, strip=("model.",), drop=("superpoint.",))
    matcher = LightGlue(input_dim=256, depth_confidence=-1, width_confidence=-1)
    load_into(matcher, rest, path="the filled gim_lightglue")
    return detector.eval(), matcher.fold()


def produce(golden: Golden, networks: tuple[superpoint.SuperPoint, LightGlue]) -> dict[str, Any]:
    """All arrays that the file holds."""
    detector, matcher = networks
    if golden.name.startswith("superpoint_"):
        return _superpoint(golden, detector)
    if golden.name.startswith("lightglue_demo_"):
        return _demo(_input(golden), detector, matcher)
    return _lightglue(golden, detector, matcher)


def _input(golden: Golden) -> Golden:
    """The file whose images a recording of LightGlue was made from, as its note says."""
    named = re.search(r"superpoint_\w+", golden.config["note"])
    if named is None:
        raise GoldenError(
            f"{golden.name}.npz does not say from which superpoint_ file it was made."
        )
    return golden.sibling(named[0])


def _gray(golden: Golden, side: str) -> torch.Tensor:
    return torch.from_numpy(golden[f"gray{side}"])[None, None] / 255


def _superpoint(golden: Golden, detector: superpoint.SuperPoint) -> dict[str, Any]:
    config = golden.config["config"]
    produced: dict[str, Any] = {}
    for side in "01":
        image = _gray(golden, side)
        if golden.has(f"logits{side}"):
            logits, raw = detector(image)
            scores = superpoint.score_map(logits)
            kept = superpoint.suppress(scores, config["nms_radius"])
            produced |= {
                f"logits{side}": logits,
                f"dense_desc_raw{side}": raw,
                f"dense_scores{side}": scores,
                f"nms_scores{side}": kept,
                f"nms_count{side}": (kept > 0).sum(),
            }
        points = _points(image, detector, config)
        wanted = config["max_num_keypoints"]
        name = f"demo{side}" if golden.has(f"demo{side}_keypoints") else f"top{wanted}_{side}"
        xy, count = points.xy, len(points.xy)
        if config["force_num_keypoints"]:
            torch.manual_seed(0)
            size = (image.shape[-1], image.shape[-2])
            xy = superpoint.pad_with_random(xy, wanted, size)
        produced |= {
            f"{name}_keypoints": xy[None] + _HALF,
            f"{name}_keypoint_scores": points.scores,
            f"{name}_descriptors": points.descriptors[None],
            f"{name}_descriptors16": points.descriptors[:, ::16],
            f"{name}_n_detected": count,
        }
    return produced


def _points(
    image: torch.Tensor, detector: superpoint.SuperPoint, config: dict[str, Any]
) -> Detection:
    return detector.detect(
        image,
        max_keypoints=config["max_num_keypoints"],
        threshold=config.get("detection_threshold", 0.0),
        radius=config.get("nms_radius", 3),
    )[0]


def _demo(
    images: Golden, detector: superpoint.SuperPoint, matcher: LightGlue
) -> dict[str, torch.Tensor]:
    """The whole way from images to matches."""
    starts, keypoints = [], []
    for side in "01":
        image = _gray(images, side)
        points = _points(image, detector, images.config["config"])
        keypoints.append(points.xy + _HALF)
        size = (image.shape[-1], image.shape[-2])
        starts.append(matcher.start(points.xy, size, points.descriptors))
    produced: dict[str, torch.Tensor] = {}
    for name, (index, score) in _both(matcher, starts).items():
        ends = [keypoints[0][index[:, 0]], keypoints[1][index[:, 1]]]
        produced[f"{name}_match_points"] = torch.cat(ends, 1)
        produced[f"{name}_match_scores"] = score
    return produced


def _lightglue(
    golden: Golden, detector: superpoint.SuperPoint, matcher: LightGlue
) -> dict[str, Any]:
    """LightGlue on recorded (or, where too large to record, made-up) features."""
    produced: dict[str, Any] = {}
    if golden.name == "lightglue_random":
        pair = [torch.from_numpy(array) for array in _made_up(golden)]
        features = [(pair[0], pair[1], (640, 480)), (pair[2], pair[3], (640, 480))]
        produced |= dict(zip(("keypoints0", "keypoints1"), pair[::2], strict=True))
        produced |= dict(zip(("descriptors0", "descriptors1"), pair[1::2], strict=True))
    else:
        features = []
        images = _input(golden)
        for side in "01":
            width, height = golden[f"image_size{side}"][0].tolist()
            xy = torch.from_numpy(golden[f"keypoints{side}"][0])
            descriptors = torch.from_numpy(golden[f"descriptors{side}"][0])
            features.append((xy, descriptors, (width, height)))
            # Our detector must make this very input.
            points = _points(_gray(images, side), detector, images.config["config"])
            produced[f"keypoints{side}"] = points.xy + _HALF
            produced[f"descriptors{side}"] = points.descriptors
    starts = [matcher.start(xy, size, descriptors) for xy, descriptors, size in features]
    produced |= _intermediates(matcher, starts)
    # The recording has the sides of image 0 swapped, as the demo handed them over: the angles
    # differ by a constant, and nothing else does, because attention sees differences only.
    xy, descriptors, (width, height) = features[0]
    swapped = matcher.start(xy, (height, width), descriptors)
    turns = torch.stack([swapped.cos, swapped.sin]).repeat_interleave(2, -1)
    produced["posenc0"] = turns[:, None, None]
    return produced | _matches(matcher, starts)


def _made_up(golden: Golden) -> Sequence[np.ndarray]:
    """The features that a note calls ``feature_pair(COUNT0, COUNT1, COMMON, seed)``."""
    counts = re.search(r"feature_pair\((\d+), *(\d+), *(\d+)", golden.config["note"])
    if counts is None:
        raise GoldenError(f"{golden.name}.npz does not say how many features were made up.")
    return filled.feature_pair(*(int(count) for count in counts.groups()), seed=golden.seed)


def _intermediates(matcher: LightGlue, starts: list[Start]) -> dict[str, torch.Tensor]:
    """States after each layer and the assignment; dustbins are the last row and column."""
    produced = {"self_attn_layer0_0": starts[0].x}
    states = tuple(Side.of([start]) for start in starts)
    for number, layer in enumerate(matcher.transformers):
        states = layer(*states) if number else layer.cross_attn(*states)
        produced |= {f"desc{side}_layer{number}": state.x for side, state in enumerate(states)}
    similarity, *logits = (t[0] for t in matcher.log_assignment[-1](states[0].x, states[1].x))
    score = similarity.log_softmax(1) + similarity.log_softmax(0)
    score = score + F.logsigmoid(logits[0])[:, None] + F.logsigmoid(logits[1])
    unmatched = [F.logsigmoid(-logit) for logit in logits]
    whole = F.pad(score, (0, 1, 0, 1))
    whole[:-1, -1], whole[-1, :-1] = unmatched
    return produced | {
        "log_assignment": whole,
        "log_assignment_rowmax": score.amax(1),
        "log_assignment_colmax": score.amax(0),
        "unmatched0": unmatched[0],
        "unmatched1": unmatched[1],
    }


def _both(matcher: LightGlue, starts: list[Start]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Matches at both thresholds, of one run: the threshold only chooses among mutual pairs."""
    matcher.filter_threshold = 0.0
    ((index, score),) = matcher.match([(starts[0], starts[1])])
    return {"th0.1": (index[score > 0.1], score[score > 0.1]), "th0": (index, score)}


def _matches(matcher: LightGlue, starts: list[Start]) -> dict[str, torch.Tensor]:
    """Matches at both thresholds. Scores are those of all mutual pairs, whatever the threshold."""
    found = _both(matcher, starts)
    mutual, confidence = found["th0"]
    produced: dict[str, torch.Tensor] = {}
    for name, (index, score) in found.items():
        produced |= {f"{name}_matches": index, f"{name}_scores": score}
        for side, start in enumerate(starts):
            partner = torch.full((len(start.x),), -1)
            partner[index[:, side]] = index[:, 1 - side]
            scores = start.x.new_zeros(len(start.x))
            scores[mutual[:, side]] = confidence
            produced |= {f"{name}_matches{side}": partner, f"{name}_matching_scores{side}": scores}
    return produced
