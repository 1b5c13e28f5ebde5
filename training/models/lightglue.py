"""LightGlue to be trained on top of a frozen detector.

``gim_lightglue`` (SuperPoint), ``aliked_lightglue``, ``disk_lightglue`` and ``xfeat_lighterglue``:
the same recipe, and with all but the first a matcher that may be used commercially. Pairs with
depth train all layers on detected keypoints; for pairs of videos the labels are the keypoints, and
the last layer is told that they belong together (``training.md`` §5.4).
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from gim_hloc import weights
from gim_hloc.errors import InputError
from gim_hloc.matchers import registry
from gim_hloc.matchers.lightglue import UNREAD, published_names
from gim_hloc.networks.keypoints import Subpixel
from gim_hloc.networks.lightglue import LightGlue, Side
from gim_hloc.networks.superpoint import SuperPoint, pad_with_random
from gim_hloc.options import Count, CountOrNone, options
from gim_hloc.training.batch import PairBatch
from gim_hloc.training.data.truth import warp_points
from gim_hloc.training.losses.lightglue import (
    IGNORED,
    assignment_loss,
    certainty_loss,
    label_loss,
    log_assignment,
    true_partners,
)
from gim_hloc.training.models.base import Match, TrainingModel, keep_graph
from gim_hloc.training.models.seeds import sample_seeds

logger = logging.getLogger(__name__)

_GRAY = (0.299, 0.587, 0.114)  # what red, green and blue weigh in a gray image
DETECTOR_FILES = {
    "gim_lightglue": "superpoint_v1.pth",
    "aliked_lightglue": "aliked-n16.pth",
    "disk_lightglue": "disk-depth-save.pth",
    "xfeat_lighterglue": "xfeat.pt",
}
_START_FILES = {
    "gim_lightglue": "superpoint_lightglue.pth",
    "aliked_lightglue": "aliked_lightglue.pth",
    "disk_lightglue": "disk_lightglue.pth",
    "xfeat_lighterglue": "xfeat-lighterglue.pt",
}


class Points(NamedTuple):
    """Keypoints of one image."""

    xy: torch.Tensor  # (N, 2) float32 network pixels
    descriptors: torch.Tensor  # (N, D) float32, rounded to half precision as encodings are


class FeatureCache:
    """Keypoints of the images used last, by the content of the image; a limit of 0 keeps none.

    A frozen detector gives the same image the same keypoints, and on a processor takes longer than
    a step of a small LightGlue. Worth its memory where images come back unchanged.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: OrderedDict[bytes, Points] = OrderedDict()

    def key(self, *tensors: torch.Tensor) -> bytes:
        """Of everything that keypoints depend on."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in tensors if self.limit else ():
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.digest()

    def get(self, key: bytes, device: torch.device) -> Points | None:
        """What was put under a key, if it is still there."""
        found = self._kept.get(key)
        if found is None:
            return None
        self._kept.move_to_end(key)
        return Points(found.xy.to(device), found.descriptors.to(device).float())

    def put(self, key: bytes, points: Points) -> None:
        """Keep keypoints under a key."""
        if not self.limit:
            return
        self._kept[key] = Points(points.xy.cpu(), points.descriptors.cpu().half())
        while len(self._kept) > self.limit:
            self._kept.popitem(last=False)


@options
class LightGlueOptions:
    """LightGlue to be trained; the defaults are the published network."""

    keypoints: Count = 2048
    """At most so many per image; labels of a video pair are filled up to as many."""
    layers: Count = 9
    """Pairs of self and cross attention."""
    dim: Count = 256
    """Channels inside LightGlue, a multiple of twice its heads."""
    heads: Count = 4
    """Attention heads."""
    detector: Literal["published", "random"] = "published"
    """Weights of the detector; random ones are for tests of gim_lightglue."""
    detection_threshold: float | None = None
    """Lowest score of a keypoint; None: the matcher's own."""
    nms_radius: Count | None = None
    """Pixels between keypoints; None: the matcher's own."""
    subpixel: Subpixel | None = None
    """Positions of keypoints; None: the matcher's own."""
    recompute: bool = False
    """Save memory by computing layers twice, as the published training does."""
    cache: CountOrNone = 0
    """Images whose keypoints are kept in memory (at 512 keypoints 140 kB each)."""

    def __post_init__(self) -> None:
        if self.dim % (2 * self.heads):
            raise InputError(
                f"LightGlue needs dim ({self.dim}) to be a multiple of twice its heads "
                f"({self.heads})."
            )


class LightGlueTraining(TrainingModel):
    """A frozen detector, LightGlue and its losses.

    Raises:
        WeightsError: the detector's weights cannot be had.
    """

    options_type = LightGlueOptions

    def __init__(self, name: str, options: LightGlueOptions) -> None:
        super().__init__()
        point = registry.operating_point(name)
        self.name = name
        self.options = options
        self.keypoints = options.keypoints
        self.detector: Any = _load_detector(name, options.detector).eval().requires_grad_(False)
        self.glue = LightGlue(
            input_dim=registry.describe(name).descriptor_dim or 0,
            dim=options.dim,
            heads=options.heads,
            layers=options.layers,
            depth_confidence=point.depth_confidence,
            width_confidence=point.width_confidence,
            filter_threshold=point.filter_threshold,
        )
        self.detection = {
            "threshold": options.detection_threshold,
            "radius": options.nms_radius,
            "subpixel": options.subpixel,
        }
        usual = (point.detection_threshold, point.nms_radius, point.subpixel)
        for key, value in zip(self.detection, usual, strict=True):
            if self.detection[key] is None:
                self.detection[key] = value
        self.cache = FeatureCache(options.cache)

    def train(self, mode: bool = True) -> LightGlueTraining:
        """Training or evaluation mode of LightGlue; the detector stays as it is."""
        super().train(mode)
        self.detector.eval()
        return self

    def forward(self, batch: PairBatch) -> dict[str, torch.Tensor]:
        """See ``TrainingModel``.

        Parts: ``assignment`` and ``certainty`` of pairs with depth, ``labels`` of the others (the
        three sum up to the loss), ``positives`` (true pairs of keypoints, or labels, a sample).
        A sample that has both depth and labels is taken for one with depth.
        """
        points, count = self._points(batch)
        xy, descriptors, valid = _pad(points)
        states = self.glue(
            *self._sides(xy, batch.box, descriptors, valid), recompute=self.options.recompute
        )
        size = len(batch)
        last = len(states) - 1

        def assign(layer: int, rows: torch.Tensor) -> torch.Tensor:
            x0, x1 = (side.x[rows] for side in states[layer])
            similarity, z0, z1 = self.glue.log_assignment[layer](x0, x1)
            return log_assignment(similarity, z0, z1, valid[rows], valid[rows + size])

        zero = xy.new_zeros(())
        assignment, certainty, labels, positives = zero, zero, zero, zero
        deep = [row for row, counted in enumerate(count) if counted is None]
        if deep:
            rows = torch.tensor(deep, device=xy.device)
            partner0, partner1 = _partners(batch, points, deep, xy.shape[1])
            positives = positives + (partner0 >= 0).sum()
            final = assign(last, rows)
            losses = [assignment_loss(final, partner0, partner1)]
            unsure = []
            for layer in range(last):
                now = assign(layer, rows)
                losses.append(assignment_loss(now, partner0, partner1))
                logits0, logits1 = (
                    self.glue.token_confidence[layer](s.x[rows]) for s in states[layer]
                )
                there = valid[rows], valid[rows + size]
                unsure.append(certainty_loss(logits0, logits1, now, final, *there))
            assignment = torch.stack(losses).mean(0).sum() / size
            if unsure:
                certainty = torch.stack(unsure).mean(0).sum() / size
        labelled = [(row, counted) for row, counted in enumerate(count) if counted]
        if labelled:
            rows, counts = torch.tensor(labelled, device=xy.device).unbind(1)
            positives = positives + counts.sum()
            labels = label_loss(assign(last, rows), counts).sum() / size
        return {
            "loss": keep_graph(assignment + certainty + labels, self),
            "assignment": assignment.detach(),
            "certainty": certainty.detach(),
            "labels": labels.detach(),
            "positives": positives / size,
        }

    def _sides(
        self,
        xy: torch.Tensor,
        size: tuple[int, int],
        descriptors: torch.Tensor,
        valid: torch.Tensor,
    ) -> tuple[Side, Side]:
        """What LightGlue wants of keypoints that `_pad` put together."""
        index = torch.arange(valid.shape[1], device=valid.device).expand(len(valid), -1)
        # An image without keypoints attends to its first row of padding: anything but NaN.
        attended = valid | (~valid.any(1, keepdim=True) & (index == 0))
        x, cos, sin = self.glue.embed(xy, size, descriptors)
        both = Side(x, cos, sin, attended, index, full=bool(valid.all()))
        half = len(xy) // 2
        return both.select(slice(half)), both.select(slice(half, None))

    def _points(self, batch: PairBatch) -> tuple[list[Points], list[int | None]]:
        """Keypoints of all first images, then of all second ones, and numbers of labels.

        A sample with depth has None labels: it is trained by its depth.
        """
        sides: list[list[Points]] = [[], []]
        count: list[int | None] = []
        seeds = sample_seeds(batch)
        # Read at once: each reading makes the processor wait for the GPU.
        facts = torch.stack([batch.has_depth.long(), batch.label_count.long()], 1).tolist()
        for row in range(len(batch)):
            images = (batch.image0[row], batch.image1[row])
            valid = (batch.valid0[row], batch.valid1[row])
            has_depth, given = facts[row]
            if has_depth:
                for side in (0, 1):
                    sides[side].append(self.detect(images[side], valid[side]))
                count.append(None)
                continue
            generator = torch.Generator().manual_seed(seeds[row])
            labels = batch.labels[row, :given]
            # The reference takes the first of the sorted rows, which all lie on one side.
            order = torch.randperm(len(labels), generator=generator)[: self.keypoints]
            labels = labels[order.to(labels.device)]
            count.append(len(labels))
            for side in (0, 1):
                xy = labels[:, 2 * side : 2 * side + 2]
                if len(xy):
                    # What no label says anything about: it may be like a label, but is none.
                    xy = pad_with_random(xy, self.keypoints, batch.box, generator)
                sides[side].append(self.describe(images[side], xy))
        return sides[0] + sides[1], count

    @torch.no_grad()
    def detect(self, image: torch.Tensor, valid: torch.Tensor) -> Points:
        """Keypoints of an image (3, H, W) on its valid pixels (H, W), strongest first."""
        key = self.cache.key(image, valid)
        if (found := self.cache.get(key, image.device)) is not None:
            return found
        # As at test: detectors run in full precision.
        with torch.autocast(image.device.type, enabled=False):
            seen = self._seen(image)
            if seen.amax() - seen.amin() < 1 / 255:
                # Networks that normalise each image find keypoints in nothing, at the border.
                xy = image.new_empty(0, 2)
                points = Points(xy, image.new_empty(0, self.glue.sizes["input_dim"]))
            else:
                xy, descriptors, _ = self.detector.detect_and_describe(
                    seen,
                    max_keypoints=self.keypoints,
                    mask=None if bool(valid.all()) else valid,
                    **self.detection,
                )
                points = _rounded(xy, descriptors)
        self.cache.put(key, points)
        return points

    @torch.no_grad()
    def describe(self, image: torch.Tensor, xy: torch.Tensor) -> Points:
        """Points (N, 2) of an image (3, H, W), with descriptors as keypoints there would have."""
        key = self.cache.key(image, xy)
        if (found := self.cache.get(key, image.device)) is not None:
            return found
        if not len(xy):
            return Points(xy, image.new_empty(0, self.glue.sizes["input_dim"]))
        with torch.autocast(image.device.type, enabled=False):
            points = _rounded(xy, self.detector.describe_points(self._seen(image), xy))
        self.cache.put(key, points)
        return points

    def _seen(self, image: torch.Tensor) -> torch.Tensor:
        """An image as the detector wants it."""
        if registry.describe(self.name).colour == "gray":
            return torch.tensordot(image.new_tensor(_GRAY), image, 1)[None]
        return image

    @torch.no_grad()
    def match(self, batch: PairBatch, *, seed: int = 0) -> list[Match]:
        """See ``TrainingModel``; nothing is drawn, ``seed`` has no effect."""
        results = []
        for row in range(len(batch)):
            points = [
                self.detect(batch.image0[row], batch.valid0[row]),
                self.detect(batch.image1[row], batch.valid1[row]),
            ]
            if min(len(p.xy) for p in points) == 0:
                none = points[0].xy[:0]
                results.append((none, none, none[:, 0]))
                continue
            a, b = (self.glue.start(p.xy, batch.box, p.descriptors) for p in points)
            ((index, score),) = self.glue.match([(a, b)])
            results.append((points[0].xy[index[:, 0]], points[1].xy[index[:, 1]], score.float()))
        return results

    def parameter_groups(self) -> list[tuple[float, list[nn.Parameter]]]:
        """All of LightGlue at the learning rate; the detector learns nothing."""
        return [(1.0, list(self.glue.parameters()))]

    def checkpoint(self) -> dict[str, torch.Tensor]:
        """See ``TrainingModel``.

        ``gim_lightglue`` holds both networks, under ``model.`` and ``superpoint.``; the others are
        LightGlue alone, as its authors publish it.
        """
        state = {key: value.detach() for key, value in self.glue.state_dict().items()}
        if self.name != "gim_lightglue":
            return state
        found = {f"model.{key}": value for key, value in state.items()}
        for key, value in self.detector.state_dict().items():
            found[f"superpoint.{key}"] = value.detach()
        return found

    def load_checkpoint(self, state: Mapping[str, torch.Tensor]) -> None:
        """See ``TrainingModel``."""
        self._load(state, path="the checkpoint")

    def _load(self, state: Mapping[str, torch.Tensor], path: str | Path) -> None:
        glue = dict(state)
        if self.name == "gim_lightglue":
            detector = weights.unwrap("lightglue.detector", state)
            weights.load_into(self.detector, detector, path=path)
            glue = weights.unwrap("lightglue.matcher", state)
        self._load_glue(glue, path)

    def _load_glue(self, state: Mapping[str, torch.Tensor], path: str | Path) -> None:
        names = published_names(state)
        weights.load_into(self.glue, names, path=path, optional=UNREAD)

    def initialise(self, path: Path | None) -> None:
        """Start from trained weights of LightGlue.

        Args:
            path: a file that the matcher of the same name reads, or for ``gim_lightglue``
                ``superpoint_lightglue.pth``. Of a file with more layers, the first ones are taken.
        """
        if path is None:
            logger.warning(
                "LightGlue of %s starts from random numbers. Published weights (%s, gim-weights "
                "download %s) are a better start, unless it shall be small.",
                self.name,
                _START_FILES[self.name],
                _START_FILES[self.name],
            )
            return
        state = weights.load_state_dict(path)
        if self.name == "gim_lightglue" and weights.recognise(state) == "gim_lightglue":
            self._load(state, path)
            return
        layers = self.glue.sizes["layers"]
        counts = {"transformers": layers, "log_assignment": layers, "token_confidence": layers - 1}
        names = {}
        for key, value in published_names(weights.unwrap("lightglue.matcher", state)).items():
            part, _, rest = key.partition(".")
            if part not in counts or int(rest.partition(".")[0]) < counts[part]:
                names[key] = value
        self._load_glue(names, path)


def _rounded(xy: torch.Tensor, descriptors: torch.Tensor) -> Points:
    """As an encoding holds them; clones, since tensors of inference mode have no gradients."""
    return Points(xy.clone().float(), descriptors.clone().half().float())


def _pad(points: list[Points]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions (R, N, 2), descriptors (R, N, D) and (R, N) which are not padding; N > 0."""
    longest = max(1, *(len(p.xy) for p in points))
    xy = points[0].xy.new_zeros(len(points), longest, 2)
    descriptors = xy.new_zeros(len(points), longest, points[0].descriptors.shape[1])
    valid = torch.zeros(xy.shape[:2], dtype=torch.bool, device=xy.device)
    for row, p in enumerate(points):
        xy[row, : len(p.xy)] = p.xy
        descriptors[row, : len(p.xy)] = p.descriptors
        valid[row, : len(p.xy)] = True
    return xy, descriptors, valid


@torch.no_grad()
def _partners(
    batch: PairBatch, points: list[Points], rows: list[int], length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Partners (R, length) of the keypoints of samples with depth; padding is ignored."""
    xy, _, _ = _pad(points)
    size = len(batch)
    sides = (xy[:size], xy[size:])
    there, visible, known = [], [], []
    for source in (0, 1):
        places, seen = warp_points(batch, sides[source], source=source, lookup="bilinear")
        there.append(places)
        visible.append(seen)
        known.append(_has_depth(batch, sides[source], source))
    fundamental = fundamental_matrices(batch)
    results = (
        torch.full((len(rows), length), IGNORED, dtype=torch.long, device=xy.device),
        torch.full((len(rows), length), IGNORED, dtype=torch.long, device=xy.device),
    )
    for at, row in enumerate(rows):
        n = (len(points[row].xy), len(points[size + row].xy))
        found = true_partners(
            *(sides[side][row, : n[side]] for side in (0, 1)),
            *(there[side][row, : n[side]] for side in (0, 1)),
            visible0=visible[0][row, : n[0]],
            visible1=visible[1][row, : n[1]],
            known0=known[0][row, : n[0]],
            known1=known[1][row, : n[1]],
            fundamental=fundamental[row],
        )
        for side in (0, 1):
            results[side][at, : n[side]] = found[side]
    return results


def _has_depth(batch: PairBatch, xy: torch.Tensor, source: int) -> torch.Tensor:
    """Whether the depth map of image ``source`` knows the pixel nearest to each point (B, N, 2)."""
    depth = batch.depth0 if source == 0 else batch.depth1
    matrix = batch.to_original0 if source == 0 else batch.to_original1
    homogeneous = torch.cat([xy.double(), torch.ones_like(xy[..., :1]).double()], -1)
    original = homogeneous @ matrix.transpose(1, 2)
    column, line = torch.floor(original[..., :2] / original[..., 2:] + 0.5).long().unbind(-1)
    height, width = depth.shape[1:]
    inside = (column >= 0) & (column < width) & (line >= 0) & (line < height)
    at = line.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    value = depth.flatten(1).gather(1, at)
    return inside & torch.isfinite(value) & (value > 0)


def fundamental_matrices(batch: PairBatch) -> torch.Tensor:
    """(B, 3, 3) float64 of the network images, x1^T F x0 = 0; zero where there is no motion."""
    x, y, z = batch.T_0to1[:, :3, 3].double().unbind(1)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).view(-1, 3, 3)
    essential = skew @ batch.T_0to1[:, :3, :3].double()
    to_ray0 = torch.linalg.inv(batch.K0.double()) @ batch.to_original0.double()
    to_ray1 = torch.linalg.inv(batch.K1.double()) @ batch.to_original1.double()
    return to_ray1.transpose(1, 2) @ essential @ to_ray0


def _random_superpoint(seed: int = 0) -> SuperPoint:
    """SuperPoint with random weights that let an image through to its outputs.

    Good for tests only: its keypoints come back in other images by chance.
    """
    network = SuperPoint()
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan = module.weight[0].numel()
            noise = torch.randn(module.weight.shape, generator=generator)
            # Without their mean, filters see structure and not brightness.
            noise -= noise.mean((1, 2, 3), keepdim=True)
            module.weight.data.copy_(noise * (2 / fan) ** 0.5)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return network


def _load_detector(name: str, kind: str) -> nn.Module:
    if kind == "random":
        if name != "gim_lightglue":
            raise InputError(f"Only gim_lightglue can have a random detector, not {name}.")
        return _random_superpoint()
    network: nn.Module = registry.matcher_class(name).load_detector(
        weights.locate(DETECTOR_FILES[name])
    )
    return network
