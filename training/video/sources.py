"""What users call a video: files, folders of images, YouTube ids and addresses, lists of them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from gim_hloc.errors import InputError, OutputError

logger = logging.getLogger(__name__)

_YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")
_HOSTS = ("youtube.com", "www.youtube.com", "m.youtube.com", "music.youtube.com")
_SHORT_HOST = "youtu.be"
_PATHS = ("shorts", "embed", "live", "v")
_VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")


@dataclass(frozen=True, kw_only=True)
class VideoSource:
    """One video.

    Attributes:
        id: name of its folder: the YouTube id, or the name of the file or folder.
        path: where it is; None until a YouTube video is fetched.
    """

    id: str
    path: Path | None

    @property
    def address(self) -> str:
        """Where it comes from, for people."""
        return f"https://www.youtube.com/watch?v={self.id}" if self.path is None else str(self.path)


def find_sources(names: Sequence[str]) -> list[VideoSource]:
    """Resolve what a user gave.

    Args:
        names: video files, folders of images, YouTube ids or addresses, and ``.txt`` files with one
            of these a line (empty lines and ``#`` comments are passed over). What exists as a file
            or folder is taken as that.

    Raises:
        InputError: nothing fits a name, or two videos would share a folder.
    """
    found: dict[str, VideoSource] = {}
    for name in _expand(names):
        source = find_source(name)
        before = found.setdefault(source.id, source)
        if before != source:
            raise InputError(
                f"{before.path} and {source.path} are both called {source.id}: rename one of them."
            )
    if not found:
        raise InputError("No video was named.")
    return list(found.values())


def find_source(name: str) -> VideoSource:
    """Resolve one name; see `find_sources`.

    Raises:
        InputError: nothing fits it.
    """
    path = Path(name)
    if _exists(path):
        label = re.sub(r"[^A-Za-z0-9_.-]+", "_", path.resolve().stem).strip(".") or "video"
        return VideoSource(id=label, path=path)
    video_id = youtube_id(name)
    if video_id is None:
        raise InputError(
            f"{name!r} is neither a file or folder that exists nor a YouTube id (11 letters, "
            "digits, _ and -) or address."
        )
    return VideoSource(id=video_id, path=None)


def youtube_id(text: str) -> str | None:
    """The YouTube id in an id or address, or None."""
    if _YOUTUBE_ID.fullmatch(text):
        return text
    try:
        parts = urlsplit(text)
    except ValueError:  # no address at all, for instance "http://["
        return None
    if parts.scheme not in ("http", "https"):
        return None
    host, segments = (parts.hostname or ""), [s for s in parts.path.split("/") if s]
    candidate = ""
    if host == _SHORT_HOST and segments:
        candidate = segments[0]
    elif host in _HOSTS and segments[:1] == ["watch"]:
        candidate = parse_qs(parts.query).get("v", [""])[0]
    elif host in _HOSTS and len(segments) >= 2 and segments[0] in _PATHS:
        candidate = segments[1]
    return candidate if _YOUTUBE_ID.fullmatch(candidate) else None


def download(video_id: str, folder: Path, *, max_height: int = 1080, progress: bool = True) -> Path:
    """Fetch a YouTube video without its sound, unless it is there already.

    Args:
        video_id: 11 letters, digits, ``_`` and ``-``.
        folder: of the file ``<id>.<suffix>``; made if needed. An interrupted download continues.
        max_height: rows at most; of the rest, the largest and then fastest.
        progress: show yt-dlp's own progress.

    Raises:
        InputError: the id is none, yt-dlp is not installed, or the video cannot be had.
        OutputError: the folder cannot be written.
    """
    if not _YOUTUBE_ID.fullmatch(video_id):
        raise InputError(f"{video_id!r} is no YouTube id: 11 letters, digits, _ and -.")
    there = _downloaded(video_id, folder)
    if there is not None:
        return there
    try:
        import yt_dlp
    except ImportError:
        raise InputError(
            f'{video_id} is fetched with yt-dlp: pip install "gim-hloc[video]", or fetch the file '
            f"by other means and put it into {folder}."
        ) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error}.") from error
    small = f"[height<={max_height}]"
    options: dict[str, Any] = {
        "format": f"bv*[ext=mp4]{small}/b[ext=mp4]{small}/bv*{small}/b{small}",
        "format_sort": ["height", "fps"],
        "paths": {"home": str(folder)},
        "outtmpl": {"default": "%(id)s.%(ext)s"},
        "noplaylist": True,
        "quiet": True,
        "noprogress": not progress,
    }
    address = f"https://www.youtube.com/watch?v={video_id}"
    try:
        with yt_dlp.YoutubeDL(options) as downloader:
            downloader.download([address])
    except yt_dlp.utils.YoutubeDLError as error:
        raise InputError(f"{address} cannot be fetched: {error}") from error
    found = _downloaded(video_id, folder)
    if found is None:
        raise InputError(f"{address} was fetched, but {folder} holds no file of it.")
    return found


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # longer than any file name; not a name at all
        return False


def _downloaded(video_id: str, folder: Path) -> Path | None:
    for suffix in _VIDEO_SUFFIXES:
        path = folder / f"{video_id}{suffix}"
        if path.is_file():
            return path
    return None


def _expand(names: Sequence[str]) -> list[str]:
    expanded: list[str] = []
    for name in names:
        if not name.endswith(".txt"):
            expanded.append(name)
            continue
        try:
            lines = Path(name).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"The list of videos {name} cannot be read: {error}.") from error
        lines = [line.split("#", 1)[0].strip() for line in lines]
        expanded += [line for line in lines if line]
    return expanded
