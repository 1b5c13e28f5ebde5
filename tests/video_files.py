"""Videos whose frames say their own number, made for tests."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

WIDTH, HEIGHT = 160, 96
_BLOCK = 16  # px: side of the black and white blocks that spell the number, ten in a row


def numbered(n: int) -> np.ndarray:
    """(96, 160, 3) frame that spells ``n`` in binary above, its complement below."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for bit in range(WIDTH // _BLOCK):
        half = slice(0, HEIGHT // 2) if n >> bit & 1 else slice(HEIGHT // 2, HEIGHT)
        image[half, bit * _BLOCK : (bit + 1) * _BLOCK] = 255
    return image


def read_number(image: np.ndarray) -> int:
    """The inverse of `numbered`, also after lossy coding."""
    centres = np.arange(WIDTH // _BLOCK) * _BLOCK + _BLOCK // 2
    bright = image[HEIGHT // 4, centres].mean(axis=-1) > 127
    return int((bright * (1 << np.arange(len(centres)))).sum())


def write_video(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    stamps: Sequence[int] | None = None,
    rate: Fraction = Fraction(30),
    unit: Fraction | None = None,
    b_frames: int = 2,
    gop: int = 12,
    quality: int = 18,
    change: Callable[[object], None] | None = None,
) -> Path:
    """Encode RGB frames with H.264.

    Args:
        path: file; its suffix says the container.
        frames: (H, W, 3) uint8.
        stamps: presentation times in ``unit``; evenly spaced by default.
        rate: nominal frame rate.
        unit: of the stamps in seconds.
        b_frames: in a row.
        gop: frames between key frames.
        quality: quantiser.
        change: called with the stream before encoding.
    """
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(quality), "bf": str(b_frames), "g": str(gop)}
        stream.options |= {"x264-params": f"keyint={gop}:scenecut=0:bframes={b_frames}:b-adapt=0"}
        unit = unit or 1 / rate
        stream.time_base = unit
        stream.codec_context.time_base = unit
        if change is not None:
            change(stream)
        for n, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame.pts = n if stamps is None else stamps[n]
            frame.time_base = unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def turn_container(path: Path, clockwise_quarters: int) -> None:
    """Write a display matrix into an mp4 file: players turn its frames clockwise."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd")
    version = data[start + 4]
    matrix = start + 4 + (4 + 32 if version == 1 else 4 + 20) + 16
    a, b = {0: (1, 0), 1: (0, 1), 2: (-1, 0), 3: (0, -1)}[clockwise_quarters % 4]
    one = 1 << 16
    values = (a * one, b * one, 0, -b * one, a * one, 0, 0, 0, 1 << 30)
    data[matrix : matrix + 36] = struct.pack(">9i", *values)
    path.write_bytes(data)
