"""Frames of videos: read by time stamp, upright, in sRGB."""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import cv2
import numpy as np
from PIL import Image

from gim_hloc import hdr
from gim_hloc.errors import InputError
from gim_hloc.files import natural_key
from gim_hloc.images import SUFFIXES, read_rgb
from gim_hloc.options import FrameFileOptions

if TYPE_CHECKING:
    import av

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mts", ".m2ts", ".ts", ".3gp"}
    | {".mpg", ".mpeg", ".wmv", ".flv"}
)
_PROBED = 48  # frames decoded to see whether time stamps are in display order
_EVEN = 0.1  # share by which the spacing of evenly spaced frames may vary, and of those that do
_SLACK = 0.1  # s by which the last packet may end before a file says that it ends
_HD_ROWS = 720  # from this height on, untagged videos are taken for BT.709, below for BT.601


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """One frame, converted when asked for.

    Attributes:
        index: position in display order.
        time: seconds after the first frame.
        rgb: gives (H, W, 3) uint8, upright, full range.
        gray: gives (h, w) uint8 reduced to a long side of so many pixels; cheap.
    """

    index: int
    time: float
    rgb: Callable[[], np.ndarray]
    gray: Callable[[int], np.ndarray]


class FrameSource(Protocol):
    """A video to read.

    Attributes:
        path: file or folder.
        times: (N,) seconds after the first frame, in display order.
        fps: frame rate by time stamps, see `measure_fps`.
        size: (width, height) of upright frames in pixels.
        digest: tells whether it is the same video.
        damaged: errors of the decoder and frames it did not give, so far.
    """

    path: Path
    times: np.ndarray
    fps: float
    size: tuple[int, int]
    digest: str
    damaged: int
    remarks: list[str]

    def read(self, indices: Iterable[int] | None = None) -> Iterator[Frame]:
        """Frames in display order, one at a time.

        Args:
            indices: positions in display order, each given once; None gives all. A frame that
                cannot be decoded is replaced by its nearest neighbour in time.
        """
        ...


def measure_fps(times: np.ndarray, otherwise: float) -> float:
    """Frame rate by time stamps.

    Where nearly all frames are evenly spaced, the rate is theirs, so that frames that were lost
    leave gaps; else it is the mean rate.

    Args:
        times: (N,) seconds, ascending.
        otherwise: for videos of one frame.
    """
    spacing = np.diff(times)
    if not len(spacing) or times[-1] <= times[0]:
        return otherwise
    usual = float(np.median(spacing))
    even = np.abs(spacing - usual) <= _EVEN * usual
    if not even.all() and even.mean() >= 1 - _EVEN:
        return round(float(1 / spacing[even].mean()), 9)
    return round(float(len(spacing) / (times[-1] - times[0])), 9)


def time_between(duration: float, start: float | None, end: float | None) -> tuple[float, float]:
    """First and last moment in seconds of a part of a video; None: of the video.

    Raises:
        InputError: nothing is left.
    """
    first, last = max(0.0, start or 0.0), min(duration, duration if end is None else end)
    if first >= last:
        raise InputError(
            f"The range from {first:g} s to {last:g} s is empty; the video has {duration:.1f} s."
        )
    return first, last


# ---------------------------------------------------------------------------------------- reading


class VideoReader:
    """A video file, decoded with PyAV.

    The packets are listed first, which tells the time of every frame without decoding. Frames are
    then found by their time stamps, after a jump to the last key frame before them. Where time
    stamps contradict the decoder's order (files that were cut or written carelessly), the decoder
    is right, and frames are counted instead.

    Args:
        path: video file.

    Raises:
        InputError: PyAV is not installed, or the file cannot be read or has no video.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        _require_av()
        self.path = Path(path)
        self.damaged = 0
        self.remarks: list[str] = []
        stamps, keys, self.digest, rate = self._list_packets()
        self._stamps = np.sort(stamps)
        self._keys = np.searchsorted(self._stamps, np.sort(keys)) if len(keys) else np.zeros(1, int)
        self._key_stamps = self._stamps[self._keys] if len(self._stamps) else np.zeros(1, np.int64)
        self._counting, frames, turned = self._probe()
        if not len(self._stamps):
            # No time stamps at all: evenly spaced frames, from the start each time.
            count = frames if frames < _PROBED else sum(1 for _ in self._decode(0))
            self.times = np.arange(count) / rate
        else:
            self.times = (self._stamps - self._stamps[0]) * self._unit
        self.size = turned
        self.fps = measure_fps(self.times, rate)
        self.damaged = 0  # what the probe met is met again
        if self._counting and len(self._stamps):
            logger.warning(
                "%s: time stamps are not in display order; frames are counted as they are decoded.",
                self.path,
            )

    def _open(self) -> Any:
        import av

        try:
            container = av.open(str(self.path))
        except (OSError, av.error.FFmpegError) as error:
            raise InputError(f"{self.path} cannot be read as a video: {error}.") from error
        if not container.streams.video:
            container.close()
            raise InputError(f"{self.path} has no video stream.")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        return container

    def _list_packets(self) -> tuple[np.ndarray, np.ndarray, str, float]:
        """Time stamps of packets and of key frames, a digest, and the container's frame rate."""
        import av

        stamps: list[int] = []
        keys: list[int] = []
        digest = hashlib.sha256()
        with self._open() as container:
            stream = container.streams.video[0]
            self._unit = float(stream.time_base or 0)
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            self._aspect = float(stream.sample_aspect_ratio or 1) or 1.0
            promised = _promised_end(container)
            end = 0.0  # of all streams: sound may go on for longer than frames
            digest.update(f"{stream.codec_context.name} {stream.width} {stream.height}".encode())
            try:
                for packet in container.demux():
                    stamp = packet.pts if packet.pts is not None else packet.dts
                    if packet.size and stamp is not None and packet.time_base is not None:
                        last = float((stamp + (packet.duration or 0)) * packet.time_base)
                        end = max(end, last)
                    if packet.stream_index != stream.index:
                        continue
                    # Edit lists mark what players do not show.
                    if not packet.size or packet.is_discard:
                        continue
                    digest.update(f" {stamp} {packet.size}".encode())
                    if stamp is None:
                        continue
                    stamps.append(stamp)
                    if packet.is_keyframe:
                        keys.append(stamp)
            except av.error.FFmpegError as error:
                logger.warning("%s ends early: %s", self.path, error)
            if end < promised - max(_SLACK, 2 / rate):
                self.remarks.append(
                    f"The file says {promised:.1f} s, its frames end at {end:.1f} s: it may be cut "
                    "off."
                )
            elif container.format.name == "mpegts" and _ends_within_a_frame(self.path, stream.id):
                self.remarks.append("The file ends within a frame: it may be cut off.")
        return np.array(stamps, np.int64), np.array(keys, np.int64), digest.hexdigest()[:24], rate

    def _probe(self) -> tuple[bool, int, tuple[int, int]]:
        """Whether frames must be counted, how many were looked at, and their upright size."""
        seen: list[int | None] = []
        size = None
        for decoded in self._decode(0):
            if size is None:
                size = _upright_size(decoded, self._aspect)
                if getattr(decoded, "rotation", 0) % 90:
                    self.remarks.append("Its rotation is no quarter turn and is passed over.")
                if name := hdr.transfer_name(decoded):
                    self.remarks.append(f"Its colours ({name}) are brought to sRGB.")
            seen.append(decoded.pts)
            if len(seen) >= _PROBED:
                break
        if size is None:
            raise InputError(f"{self.path} has no frame that can be decoded.")
        stamps = [stamp for stamp in seen if stamp is not None]
        counting = not len(self._stamps) or len(stamps) < len(seen) or stamps != sorted(stamps)
        return counting, len(seen), size

    def _decode(self, key: int) -> Iterator[av.VideoFrame]:
        """Decoded frames in the decoder's order from the ``key``-th key frame on."""
        import av

        with self._open() as container:
            stream = container.streams.video[0]
            if key > 0:
                container.seek(int(self._key_stamps[key]), stream=stream)
            packets = container.demux(stream)
            while True:
                try:
                    packet = next(packets, None)
                except av.error.FFmpegError as error:  # a file that was cut off
                    logger.debug("%s: %s", self.path, error)
                    self.damaged += 1
                    return
                if packet is None:
                    return
                yield from self._decode_packet(packet)

    def _decode_packet(self, packet: Any) -> list[av.VideoFrame]:
        import av

        # The library tells of concealed damage in its log only, and of a repeated message once.
        level, skip = av.logging.get_level(), av.logging.get_skip_repeated()
        av.logging.set_level(av.logging.ERROR)
        av.logging.set_skip_repeated(False)
        try:
            with av.logging.Capture(local=False) as messages:
                frames: list[av.VideoFrame] = packet.decode()
        except av.error.FFmpegError as error:
            logger.debug("%s: %s", self.path, error)
            frames, messages = [], [(0, "", "")]
        finally:
            av.logging.set_level(level)
            av.logging.set_skip_repeated(skip)
        self.damaged += bool(messages)
        return frames

    def _positions(self, key: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Frames with their positions in display order, ascending."""
        if self._counting:
            # A jump lands on a key frame whose stamp is known to be wrong: count from the start.
            yield from enumerate(self._decode(0))
            return
        last = -1
        for decoded in self._decode(key):
            stamp = decoded.pts
            position = last + 1 if stamp is None else int(np.searchsorted(self._stamps, stamp))
            if position > last:
                yield position, decoded
                last = position

    def read(self, indices: Iterable[int] | None = None) -> Iterator[Frame]:
        """See `FrameSource.read`."""
        count = len(self.times)
        wanted = list(range(count)) if indices is None else sorted(set(map(int, indices)))
        if wanted and not 0 <= wanted[0] <= wanted[-1] < count:
            raise InputError(f"{self.path} has frames 0 to {count - 1}.")
        for run in self._runs(wanted):
            key = int(np.searchsorted(self._keys, run[0], side="right")) - 1
            yield from self._read_run(max(0, key), run)

    def _runs(self, wanted: Sequence[int]) -> Iterator[list[int]]:
        """Wanted frames that are decoded in one go: between two runs lies a key frame to jump to.

        Jumping costs a new decoder, so that key frames are passed over where frames are close.
        """
        run: list[int] = []
        for index in wanted:
            if run and not self._counting:
                key = self._keys[int(np.searchsorted(self._keys, index, side="right")) - 1]
                if key - run[-1] > 64:
                    yield run
                    run = []
            run.append(index)
        if run:
            yield run

    def _read_run(self, key: int, run: Sequence[int]) -> Iterator[Frame]:
        left = iter(run)
        index = next(left, None)
        previous: tuple[int, av.VideoFrame] | None = None
        for position, decoded in self._positions(key):
            while index is not None and position >= index:
                place, frame = position, decoded
                if position > index:
                    self.damaged += 1
                    if previous is not None and index - previous[0] <= position - index:
                        place, frame = previous
                yield self._frame(index, place, frame)
                index = next(left, None)
            if index is None:
                return
            previous = position, decoded
        while index is not None and previous is not None:
            self.damaged += 1
            yield self._frame(index, *previous)
            index = next(left, None)

    def _frame(self, index: int, place: int, frame: av.VideoFrame) -> Frame:
        time = float(self.times[min(place, len(self.times) - 1)])
        return Frame(
            index=index,
            time=time,
            rgb=lambda: _to_rgb(frame, self.size),
            gray=lambda max_size: _to_gray(frame, reduced_size(self.size, max_size)),
        )


def _promised_end(container: Any) -> float:
    """Seconds at which a file says that it ends: by its duration and by its number of frames."""
    stream = container.streams.video[0]
    start = (container.start_time or 0) / 1e6
    rate = float(stream.average_rate or 0)
    return start + max((container.duration or 0) / 1e6, stream.frames / rate if rate else 0.0)


def _ends_within_a_frame(path: Path, pid: int) -> bool:
    """Whether a transport stream, which promises nothing, was cut off.

    Frames are filled up to whole packets: the last packet of a frame has an adaptation field with
    stuffing, but for the one frame of 184 that fits.
    """
    with path.open("rb") as file:
        size = 188 if file.read(1) == b"G" else 192  # Blu-ray: a time before each packet
        count, rest = divmod(path.stat().st_size, size)
        for number in range(count - 1, max(-1, count - 5000), -1):
            file.seek(number * size + size - 188)
            head = file.read(6)
            if head[0] == 0x47 and (head[1] & 0x1F) << 8 | head[2] == pid:
                clock = head[5] & 0x10 and head[4] <= 7  # all that the field holds
                return bool(rest) or head[3] >> 4 & 3 == 1 or bool(clock)
    return bool(rest)


def _upright_size(frame: av.VideoFrame, aspect: float) -> tuple[int, int]:
    """(width, height) with square pixels, turned as the container says."""
    width, height = round(frame.width * aspect), frame.height
    return (height, width) if _quarter_turns(frame) % 2 else (width, height)


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Turns by 90 degrees against the clock that make the frame upright; none where it is odd."""
    turns, rest = divmod(getattr(frame, "rotation", 0), 90)
    return turns % 4 if rest == 0 else 0


def _to_rgb(frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 in sRGB's range, by the matrix and range that the frame states."""
    from av.video.reformatter import Colorspace, Interpolation

    space = int(frame.colorspace)
    known = {int(value) for value in Colorspace} - {0, 2}  # RGB and "unspecified"
    if space not in known:
        space = int(Colorspace.ITU709 if frame.height >= _HD_ROWS else Colorspace.ITU601)
    turns = _quarter_turns(frame)
    width, height = size[::-1] if turns % 2 else size
    wide = hdr.transfer_name(frame) is not None
    # Without the two flags, results are cut off instead of rounded: a grey level too dark.
    exact = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    converted = frame.reformat(
        width=width,
        height=height,
        format="rgb48le" if wide else "rgb24",
        src_colorspace=space,
        src_color_range=int(frame.color_range) or None,
        interpolation=exact,
    )
    array = converted.to_ndarray()
    if wide:
        array = hdr.to_srgb(array, int(frame.color_trc))
    return np.ascontiguousarray(np.rot90(array, turns))


def _to_gray(frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
    """(h, w) uint8 luma, for measuring."""
    turns = _quarter_turns(frame)
    width, height = size[::-1] if turns % 2 else size
    array = frame.reformat(width=width, height=height, format="gray", interpolation="AREA")
    return np.ascontiguousarray(np.rot90(array.to_ndarray(), turns))


class ImageSequence:
    """A folder of images, one per frame, in the order of their names with numbers as numbers.

    Args:
        path: folder; its images must have one size.
        fps: frames per second.

    Raises:
        InputError: no image, or one that cannot be read or has another size.
    """

    def __init__(self, path: str | os.PathLike[str], *, fps: float = 30.0) -> None:
        if not fps > 0:
            raise InputError(f"The frame rate is {fps}, it must be positive.")
        self.path = Path(path)
        self.fps = float(fps)
        self.damaged = 0
        self.remarks: list[str] = []
        images = (
            p for p in self.path.glob("[!.]*") if p.suffix.lower() in SUFFIXES and p.is_file()
        )
        self._files = sorted(images, key=lambda p: natural_key(p.name))
        if not self._files:
            raise InputError(f"{self.path} holds no images, and no video is named so.")
        rows, columns = read_rgb(self._files[0]).shape[:2]
        self.size = (columns, rows)
        self.times = np.arange(len(self._files)) / self.fps
        listing = "\n".join(f"{p.name} {p.stat().st_size}" for p in self._files)
        self.digest = hashlib.sha256(f"{self.fps}\n{listing}".encode()).hexdigest()[:24]

    def read(self, indices: Iterable[int] | None = None) -> Iterator[Frame]:
        """See `FrameSource.read`; an image that cannot be read raises InputError here."""
        wanted = range(len(self._files)) if indices is None else sorted(set(map(int, indices)))
        for index in wanted:
            array = self._load(self._files[index])
            yield Frame(
                index=index,
                time=float(self.times[index]),
                rgb=partial(_same, array),
                gray=partial(_reduced_gray, array),
            )

    def _load(self, path: Path) -> np.ndarray:
        array = read_rgb(path)
        rows, columns = array.shape[:2]
        if (columns, rows) != self.size:
            raise InputError(
                f"{path} has {columns} x {rows} pixels, the first image of the sequence has "
                f"{self.size[0]} x {self.size[1]}: frames of one video have one size."
            )
        return array


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _reduced_gray(rgb: np.ndarray, max_size: int) -> np.ndarray:
    gray: np.ndarray = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    size = reduced_size((gray.shape[1], gray.shape[0]), max_size)
    if size != (gray.shape[1], gray.shape[0]):
        gray = cv2.resize(gray, size, interpolation=cv2.INTER_AREA)
    return gray


def open_source(path: str | os.PathLike[str], *, fps: float = 30.0) -> FrameSource:
    """A video file or a folder of images.

    Args:
        path: file or folder.
        fps: frame rate of a folder.

    Raises:
        InputError: it does not exist or cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return ImageSequence(path, fps=fps)
    if not path.is_file():
        raise InputError(f"The video {path} does not exist.")
    return VideoReader(path)


def _require_av() -> None:
    try:
        import av  # noqa: F401
    except ImportError:
        raise InputError('Videos are read with PyAV: pip install "gim-hloc[video]"') from None


# ---------------------------------------------------------------------------------------- writing


def reduced_size(size: tuple[int, int], max_size: int | None) -> tuple[int, int]:
    """(width, height) with a long side of at most ``max_size`` pixels."""
    scale = 1.0 if max_size is None else min(1.0, max_size / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def frame_file(rgb: np.ndarray, options: FrameFileOptions) -> bytes:
    """JPEG (colours at full resolution) or PNG of a frame, reduced as the options say."""
    size = (rgb.shape[1], rgb.shape[0])
    reduced = reduced_size(size, options.max_size)
    if reduced != size:
        rgb = cv2.resize(rgb, reduced, interpolation=cv2.INTER_AREA)
    buffer = io.BytesIO()
    if options.format == "png":
        Image.fromarray(rgb).save(buffer, "PNG", compress_level=3)
    else:
        Image.fromarray(rgb).save(buffer, "JPEG", quality=options.jpeg_quality, subsampling="4:4:4")
    return buffer.getvalue()


def warn_of_damage(source: FrameSource) -> None:
    """Say what is odd about a video, and how often the decoder met damage, if it did."""
    for remark in source.remarks:
        logger.warning("%s: %s", source.path, remark)
    if source.damaged:
        logger.warning(
            "%s is damaged in %d places; frames there may show artefacts or their neighbour.",
            source.path,
            source.damaged,
        )
