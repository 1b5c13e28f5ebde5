"""A matcher that knows the answer: it gives a synthetic scene's exact keypoints and matches.

It runs through the whole pipeline in milliseconds, so that files, resuming and reports are tested
without a network. Options can make it slow, to be killed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from synthetic import HEIGHT, WIDTH, Scene, make_scene

from gim_hloc import matchers
from gim_hloc.types import ImageData, ImageOptions, MatcherInfo, Matches, SparseEncoding

NAME = "fake"
SCENE = make_scene(images=7, points=150)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the fake matcher."""

    seconds: float = 0.0  # a pair takes
    version: int = 0  # stands for any setting


class FakeMatcher(matchers.MatcherBase[SparseEncoding]):
    """See the module."""

    calls: list[str] = []  # noqa: RUF012 - shared on purpose, tests clear it
    name = NAME

    def __init__(self, options: Options) -> None:
        super().__init__(
            info=matchers.describe(self.name),
            options=options,
            image_options=ImageOptions(max_size=None),
            device=torch.device("cpu"),
        )

    def encode_settings(self) -> dict[str, Any]:
        return {"matcher": self.name, "version": self.options.version}

    def match_settings(self) -> dict[str, Any]:
        return {"matcher": self.name}

    def encode(self, image: ImageData) -> SparseEncoding:
        self.calls.append(image.name)
        keypoints = torch.from_numpy(SCENE.keypoints.get(image.name, np.zeros((0, 2), np.float32)))
        ids = torch.from_numpy(SCENE.points.get(image.name, np.zeros(0, np.int64)))
        if image.mask is not None and len(keypoints):
            columns, rows = keypoints.round().long().T
            allowed = image.mask[rows.clamp(0, HEIGHT - 1), columns.clamp(0, WIDTH - 1)]
            keypoints, ids = keypoints[allowed], ids[allowed]
        descriptors = torch.zeros(len(ids), 16)
        descriptors[:, 0] = ids.float()
        return SparseEncoding.make(
            name=image.name,
            size=image.size,
            network_size=image.network_size,
            to_original=image.to_original,
            keypoints=keypoints,
            descriptors=descriptors,
            scores=torch.ones(len(ids)),
        )

    def match(self, a: SparseEncoding, b: SparseEncoding) -> Matches:
        time.sleep(self.options.seconds)
        self.calls.append(f"{a.name}|{b.name}")
        _, rows_a, rows_b = np.intersect1d(
            a.descriptors[:, 0].numpy(), b.descriptors[:, 0].numpy(),
            assume_unique=True, return_indices=True,
        )  # fmt: skip
        indices = torch.from_numpy(np.stack([rows_a, rows_b], 1))
        return Matches.from_indices(a, b, indices, torch.ones(len(indices)))


def register(kind: type[FakeMatcher] = FakeMatcher) -> None:
    """Put a matcher in the registry once."""

    def make(*, quality: str, device: str, **overrides: Any) -> FakeMatcher:
        return kind(Options(**overrides))

    if kind.name not in matchers.names():
        matchers.register(
            kind.name,
            make,
            MatcherInfo(
                name=kind.name, kind="sparse", checkpoint=(), licence="MIT", commercial=True,
                colour="rgb", summary="knows the answer",
            ),
        )  # fmt: skip


def write_images(folder: Path, scene: Scene = SCENE) -> Path:
    """Pictures of the right size and different content for every image of a scene."""
    for i, name in enumerate(scene.names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
        Image.fromarray(pixels).resize((WIDTH, HEIGHT)).save(path)
    return folder
