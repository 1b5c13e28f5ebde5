"""Frames of HDR and wide-gamut videos in sRGB, as matchers and viewers expect images.

Signal -> light -> BT.709 primaries -> highlights rolled off -> sRGB. Light is counted in units of
reference white, 203 cd/m^2 (ITU-R BT.2408). Up to ``KNEE`` of it nothing is changed, so that a
scene graded for both looks the same; above, light approaches 1 exponentially.

Sources: SMPTE ST 2084 (PQ), ITU-R BT.2100 (HLG, on a display of 1000 cd/m^2), BT.2087 (primaries).
"""

from __future__ import annotations

from typing import Any

import numpy as np

REFERENCE_WHITE = 203.0  # cd/m^2
KNEE = 0.6  # light, in reference white, up to which nothing is changed
_BT2020, _PQ, _HLG = 9, 16, 18  # code points of ITU-T H.273
_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
    np.float32,
)
_LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)  # of BT.2020


def transfer_name(frame: Any) -> str | None:
    """What is unlike sRGB about the colours of a PyAV frame; None: nothing."""
    transfer = int(frame.color_trc)
    if transfer in (_PQ, _HLG):
        return "HDR, PQ" if transfer == _PQ else "HDR, HLG"
    return "BT.2020" if int(frame.color_primaries) == _BT2020 else None


def to_srgb(signal: np.ndarray, transfer: int) -> np.ndarray:
    """Convert a frame with BT.2020 primaries.

    Args:
        signal: (H, W, 3) uint16 RGB, full range.
        transfer: code point of H.273; other than PQ and HLG is taken for that of SDR.

    Returns:
        (H, W, 3) uint8.
    """
    values = signal.astype(np.float32) / 65535
    if transfer == _PQ:
        light = _pq_light(values)
    elif transfer == _HLG:
        light = _hlg_light(values)
    else:
        light = values**2.4
    light = np.maximum(light @ _TO_BT709.T, 0)
    if transfer in (_PQ, _HLG):
        peak = light.max(-1, keepdims=True)
        rolled = KNEE + (1 - KNEE) * -np.expm1(-np.maximum(peak - KNEE, 0) / (1 - KNEE))
        light *= np.where(peak > KNEE, rolled / np.maximum(peak, 1e-6), 1)
        encoded = np.where(
            light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 1e-6) ** (1 / 2.4) - 0.055
        )
    else:
        encoded = light ** (1 / 2.4)  # stays as SDR videos are
    return np.rint(encoded.clip(0, 1) * 255).astype(np.uint8)


def _pq_light(signal: np.ndarray) -> np.ndarray:
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = signal ** np.float32(1 / m2)
    linear: np.ndarray = (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** np.float32(1 / m1)
    return linear * np.float32(10000 / REFERENCE_WHITE)


def _hlg_light(signal: np.ndarray) -> np.ndarray:
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    scene = scene.astype(np.float32)
    luma = np.maximum(scene @ _LUMA, 1e-9)[..., None]
    shown: np.ndarray = scene * luma ** np.float32(0.2)
    return shown * np.float32(1000 / REFERENCE_WHITE)
