"""Made-up weights and features that depend on names only, for checks without the trained weights.

A tensor is a function of a seed, the network's name, the tensor's name in the checkpoint, its shape
and its type. Two programs that follow the recipe get the same bits on every platform, so outputs of
one network can be compared with those of another one that nobody has to ship. The recipe and the
gains (chosen so that deep random networks neither die nor explode) are those of the parity data.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

SEED = "shared-1"


class Rule(NamedTuple):
    """How the tensors are drawn whose names hold a pattern."""

    pattern: str  # regular expression, searched in the name
    gain: float = 1.0  # of weights; a filter's outputs have about this deviation for unit inputs
    centred: bool = False  # each filter's mean is taken off, so that it ignores constant inputs
    bias: float = 0.05  # deviation of a bias
    shift: float = 0.0  # mean of a bias


RULES: dict[str, tuple[Rule, ...]] = {
    "gim_loftr": (
        Rule(r"encode\.conv1\.weight", 8.0, True),
        Rule(r"bn3\.weight", 0.35),
        Rule(r"downsample\.1\.weight", 1.0),
        Rule(r"encode\..*(conv\d|downsample\.0)\.weight", 1.6, True),
        Rule(r"layer3_outconv\.weight", 1.9, True),
        Rule(r"layer2_outconv\.weight", 1.2, True),
        Rule(r"outconv", 1.2, True),
        Rule(r"loftr_coarse\..*norm2\.weight", 0.3),
        Rule(r"loftr_fine\..*norm2\.weight", 0.5),
    ),
    "gim_lightglue": (
        Rule(r"superpoint\.conv1a\.weight", 8.0, True),
        Rule(r"superpoint\.convPb\.weight", 4.0, True),
        Rule(r"superpoint\.conv.*weight", 1.7, True),
        Rule(r"posenc\.Wr", 3.0),
        Rule(r"Wqkv\.weight|to_qk\.weight", 14.0),
        Rule(r"ffn\.3\.weight", 0.04),
        Rule(r"ffn\.3\.bias", bias=0.005),
        Rule(r"final_proj\.weight", 14.0),
        Rule(r"matchability\.bias", bias=0.2, shift=2.0),
        Rule(r"matchability\.weight", 4.0),
    ),
    "gim_dkm": (
        Rule(r"encoder\.net\.conv1\.weight", 8.0, True),
        Rule(r"encoder\..*bn3\.weight", 0.35),
        Rule(r"encoder\..*(conv\d|downsample\.0)\.weight", 1.6, True),
        Rule(r"decoder\.proj\..*weight", 1.6, True),
        Rule(r"feat_input_modules\..*weight", 0.3, True),
        Rule(r"rrb_\w\.\d+\.conv\d\.weight", 1.4, True),
        Rule(r"terminal_module\..*weight", 0.4, True),
        Rule(r"conv_refiner\..*\.3\.weight", 1.6, True),
        Rule(r"out_conv\.weight", 1.5, True),
    ),
    "gim_roma": (
        Rule(r"encoder\.cnn\.layers\.0\.weight", 8.0, True),
        Rule(r"encoder\.cnn\.layers\.(3|7|10|14|17|20|23|27|30|33|36)\.weight", 1.7, True),
        Rule(r"decoder\.proj\.16\.0\.weight", 0.6, True),
        Rule(r"decoder\.proj\.\d+\.0\.weight", 1.6, True),
        Rule(r"embedding_decoder\.to_out\.weight", 1.0),
        Rule(r"embedding_decoder\..*qkv\.weight", 1.4),
        Rule(r"conv_refiner\..*\.3\.weight", 1.6, True),
        Rule(r"out_conv\.weight", 1.5, True),
        Rule(r"out_conv\.bias", shift=-0.2),
    ),
    "dinov2_vitl14": (
        Rule(r"patch_embed\.proj\.weight", 6.0, True),
        Rule(r"ls\d\.gamma", 0.3),
        Rule(r"qkv\.weight", 1.4),
    ),
    "semseg_encoder": (
        Rule(r"^conv1\.weight", 2.5, True),
        Rule(r"layer\d.*bn3\.weight", 0.35),
        Rule(r"(conv\d|downsample\.0)\.weight", 1.6, True),
    ),
    "semseg_decoder": (
        Rule(r"^conv_last\.4\.weight", 5.0),
        Rule(r"(ppm\.\d\.1|conv_last\.0|cbr_deepsup\.0)\.weight", 1.6, True),
    ),
}
"""The first rule whose pattern is found counts; none: the defaults of ``Rule``."""

_ANY = Rule("")


def uniform(tag: str, count: int) -> np.ndarray:
    """``count`` float64 numbers in [0, 1), multiples of 2^-24, that depend on ``tag`` only.

    The tag's SHA-256 seeds a PCG64 generator; each half of its 64-bit words, the low half first,
    gives its 24 highest bits. Nothing of numpy's distributions, which may change, takes part.
    """
    seed = int.from_bytes(hashlib.sha256(tag.encode()).digest()[:8], "little")
    words = np.random.PCG64(seed).random_raw((count + 1) // 2).astype("<u8")
    return (words.view("<u4")[:count] >> 8).astype(np.float64) / 2.0**24


def standard(tag: str, shape: Sequence[int]) -> np.ndarray:
    """Uniform numbers of mean 0 and variance 1, float64."""
    count = int(np.prod(tuple(shape), dtype=np.int64))
    return ((uniform(tag, count) - 0.5 + 2.0**-25) * np.sqrt(12.0)).reshape(tuple(shape))


def fill_array(
    model: str, key: str, shape: Sequence[int], dtype: str = "float32", seed: str = SEED
) -> np.ndarray:
    """The value of a tensor of a network of ``RULES``; ``key`` is its name in the checkpoint."""
    shape = tuple(shape)
    kind = key.rpartition(".")[2]
    if dtype.startswith("int"):
        return np.zeros(shape, dtype)
    if kind == "_running_iter":
        return np.ones(shape, dtype)
    rule = next((rule for rule in RULES.get(model, ()) if re.search(rule.pattern, key)), _ANY)
    z = standard(f"{seed}|{model}|{key}", shape)
    if kind in ("running_mean", "_tmp_running_mean"):
        value = 0.1 * z
    elif kind in ("running_var", "_tmp_running_var"):
        value = 1.0 + 0.2 * z
    elif kind == "bias":
        value = rule.shift + rule.bias * z
    elif kind in ("cls_token", "pos_embed", "mask_token"):
        value = 0.2 * z
    elif len(shape) < 2:  # weights of norms, scales of layers
        value = rule.gain * (1.0 + 0.1 * z)
    else:
        if rule.centred:
            z -= z.mean(axis=tuple(range(1, len(shape))), keepdims=True)
        value = rule.gain * z / np.sqrt(int(np.prod(shape[1:], dtype=np.int64)))
    return value.astype(dtype)


def fill_state_dict(
    model: str, keys: Mapping[str, Sequence[Any]] | Path, seed: str = SEED
) -> dict[str, torch.Tensor]:
    """A made-up checkpoint of ``keys``: {name: [shape, dtype]}, or a JSON file that holds it."""
    content = json.loads(keys.read_text(encoding="utf-8")) if isinstance(keys, Path) else keys
    return {
        key: torch.from_numpy(fill_array(model, key, shape, str(dtype), seed))
        for key, (shape, dtype) in content.items()
    }


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """Fingerprint of a state dict (16 hex digits), whatever the order of its tensors."""
    fingerprint = hashlib.sha256()
    for key in sorted(state):
        fingerprint.update(key.encode())
        fingerprint.update(state[key].contiguous().numpy().tobytes())
    return fingerprint.hexdigest()[:16]


def random_features(
    count: int, seed: str, *, size: tuple[int, int] = (640, 480), dim: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints (count, 2) in pixels of an image of ``size`` and unit descriptors (count, dim)."""
    xy = uniform(f"{seed}|kpts", 2 * count).reshape(count, 2) * (np.array(size) - 1.0)
    descriptors = standard(f"{seed}|desc", (count, dim))
    descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True)
    return xy.astype(np.float32), descriptors.astype(np.float32)


def feature_pair(
    count0: int, count1: int, common: int, seed: str = SEED
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Keypoints and descriptors of two made-up images of 640 x 480 pixels, one after the other.

    The first ``common`` rows correspond: moved by (-16, -8) pixels, with noisy descriptors.
    """
    xy0, descriptors0 = random_features(count0, f"{seed}|0")
    xy1, descriptors1 = random_features(count1, f"{seed}|1")
    xy1[:common] = np.clip(
        xy0[:common] - np.array([16, 8], np.float32), 0, np.array([639, 479], np.float32)
    )
    noisy = descriptors0[:common] + 0.02 * standard(f"{seed}|noise", (common, 256))
    descriptors1[:common] = noisy / np.linalg.norm(noisy, axis=1, keepdims=True)
    return xy0, descriptors0, xy1, descriptors1
