"""Learned keypoints matched by LightGlue.

Here are ``gim_lightglue`` (SuperPoint, trained on internet videos) and ``lightglue`` (SuperPoint,
as LightGlue's authors trained it); those with kornia's detectors are in ``lightglue_kornia``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from gim_hloc import weights
from gim_hloc.matchers.common import Precision, resolve_dtype, resolve_precision
from gim_hloc.matchers.nearest import Nearest, ratio
from gim_hloc.matchers.sparse import DetectorMatcher, DetectorOptions, no_matches
from gim_hloc.networks.lightglue import LightGlue, sizes_of
from gim_hloc.networks.superpoint import SuperPoint
from gim_hloc.options import options
from gim_hloc.types import Matches, SparseEncoding

_STRONG, _DISTINCT = 512, 0.85  # see ``SparseOptions.min_distinct``


@options
class SparseOptions(DetectorOptions):
    """Numbers of a matcher with learned keypoints and LightGlue."""

    depth_confidence: float = 0.95  # stop early when this part of the points is certain; -1: never
    width_confidence: float = 0.99  # drop points that are surely unmatchable; -1: never
    filter_threshold: float = 0.1  # lowest confidence of a match, in [0, 1]
    # Mutual nearest neighbours with a ratio below 0.85 among the strongest 512 keypoints of both; a
    # pair with fewer shows nothing in common and is not matched.
    min_distinct: Annotated[int, Field(ge=0)] = 0
    # Of LightGlue; auto: float16 on CUDA, bfloat16 on processors with instructions for it, float32
    # elsewhere.
    precision: Precision = "auto"


def _load_glue(
    dim: int | None, path: Path, options: SparseOptions, device: torch.device
) -> LightGlue:
    state = weights.load_state_dict(path)
    state = published_names(weights.unwrap("lightglue.matcher", state))
    sizes: dict[str, Any] = {"input_dim": dim, **sizes_of(state)}
    glue = LightGlue(
        **sizes,
        depth_confidence=options.depth_confidence,
        width_confidence=options.width_confidence,
        filter_threshold=options.filter_threshold,
        # Below this many points, a GPU is no faster with fewer.
        pruning_min=1536 if device.type == "cuda" else -1,
    )
    weights.load_into(glue, state, path=path, optional=UNREAD)
    return glue.to(device).fold()


# Some published files hold parameters that no version of the network reads.
UNREAD = ("confidence_thresholds", *(f"log_assignment.{i}.r" for i in range(9)))


def published_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LightGlue's weights by kornia's names; files of the first release have others."""
    return {_lightglue_key(key): value for key, value in state.items()}


def _lightglue_key(key: str) -> str:
    """The published name of a weight in kornia's words."""
    parts = key.split(".")
    if parts[0] in ("self_attn", "cross_attn"):
        return ".".join(["transformers", parts[1], parts[0], *parts[2:]])
    return key


def _precision(wanted: Precision, device: torch.device) -> Precision:
    """Number format of LightGlue on a device."""
    if wanted == "auto" and device.type == "cpu":
        # PyTorch before 2.10 does not tell.
        has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"
    return resolve_precision(wanted, device)


class LightGlueMatcher(DetectorMatcher):
    """A detector with descriptors, and LightGlue.

    ``match`` may be called from several threads.
    """

    options_type = SparseOptions

    def __init__(self, name: str, *, options: SparseOptions, device: torch.device) -> None:
        super().__init__(name, options=options, device=device)
        self.precision = _precision(options.precision, device)
        self.dtype = resolve_dtype(self.precision, device)
        glue_file = self.info.checkpoint[-1]  # GIM publishes both networks in one file
        self.glue: Any = _load_glue(
            self.info.descriptor_dim, self.paths[glue_file], options, device
        )
        # Encodings may be shared by matchers with other weights or on other devices.
        self._cache_key = f"{glue_file}:{self.weights_hashes[glue_file]}:{device}:{self.dtype}"

    def match_settings(self) -> dict[str, Any]:
        """See ``MatcherBase``; with the number format that "auto" stands for."""
        return super().match_settings() | {"precision": self.precision}

    def match(self, a: SparseEncoding, b: SparseEncoding) -> Matches:
        """Match two encodings."""
        return self._match([(a, b)])[0]

    def _unrelated(self, a: SparseEncoding, b: SparseEncoding) -> bool:
        """Whether the strongest keypoints of two images have nothing in common."""
        if not self.options.min_distinct:
            return False
        ends = (e.descriptors[:_STRONG].to(self.device).float() for e in (a, b))
        _, cosine, rival = Nearest(*ends).among()
        return int((ratio(cosine, rival) < _DISTINCT).sum()) < self.options.min_distinct

    def match_batch(self, pairs: Sequence[tuple[SparseEncoding, SparseEncoding]]) -> list[Matches]:
        """Match many pairs: at once on a GPU, one by one on a processor (padding costs time)."""
        if self.device.type == "cpu":
            return [self.match(a, b) for a, b in pairs]
        return self._match(pairs)

    @torch.inference_mode()
    def _match(self, pairs: Sequence[tuple[SparseEncoding, SparseEncoding]]) -> list[Matches]:
        results = [no_matches(a, b) for a, b in pairs]
        rows = [
            row
            for row, (a, b) in enumerate(pairs)
            if len(a) and len(b) and not self._unrelated(a, b)
        ]
        if rows:
            with self._autocast():
                found = self.glue.match([[self._start(code) for code in pairs[r]] for r in rows])
            for row, (index, score) in zip(rows, found, strict=True):
                results[row] = Matches.from_indices(*pairs[row], index, score)
        return results

    def _start(self, encoding: SparseEncoding) -> Any:
        """LightGlue's part that depends on one image; computed twice at worst by two threads."""
        if self._cache_key not in encoding.cache:
            size = encoding.network_size
            xy = encoding.network_keypoints.clamp(min=0).minimum(torch.tensor(size))
            encoding.cache[self._cache_key] = self.glue.start(
                xy.to(self.device), size, encoding.descriptors.to(self.device).float()
            )
        return encoding.cache[self._cache_key]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        )


class SuperPointLightGlue(LightGlueMatcher):
    """SuperPoint and LightGlue."""

    whole_pixels = True

    @staticmethod
    def load_detector(path: Path) -> torch.nn.Module:
        """See ``LightGlueMatcher``; also from a file that holds LightGlue as well."""
        network = SuperPoint()
        state = weights.unwrap("lightglue.detector", weights.load_state_dict(path))
        weights.load_into(network, state, path=path)
        return network
