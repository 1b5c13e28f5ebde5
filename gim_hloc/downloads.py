"""Fetching files over the network: resumable, bounded, complete or absent."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock

from gim_hloc.errors import WeightsError
from gim_hloc.pickles import text_instead

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20  # bytes read at once
_STALL_SECONDS = 10.0  # to connect, or without a byte, before the next address is tried
_AGENT = "gim-hloc"  # some hosts refuse Python's own name


def fetch(
    source: str,
    path: Path,
    *,
    check: Callable[[Path], None],
    size: int | None = None,
    most: int,
) -> Path:
    """Download into ``path``, continuing a partial download; complete or absent at the end.

    Args:
        source: address of the file.
        path: where to put it.
        check: looks at the complete file before it gets its name; raises WeightsError to refuse it.
        size: bytes, where known.
        most: bytes that are never exceeded, whatever the server says.

    Raises:
        OSError: the connection failed. What came is kept for the next attempt.
        WeightsError: the answer is not the file. Nothing of it is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with filelock.FileLock(lock):
        try:
            if path.is_file():  # by another process while this one waited
                return path
            part = _fill(source, path, size, most)
            check(part)
            part.replace(path)
        except WeightsError:
            for left in path.parent.glob(f"{path.name}.{_tag(source)}*.part"):
                left.unlink()
            raise
        finally:
            with contextlib.suppress(OSError):  # Windows keeps open files
                lock.unlink()
    return path


def _tag(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _open(source: str, **headers: str) -> Any:
    request = urllib.request.Request(source, headers={"User-Agent": _AGENT, **headers})
    return urllib.request.urlopen(request, timeout=_STALL_SECONDS)


def _fill(source: str, path: Path, size: int | None, most: int) -> Path:
    """Fetch what is missing of a partial file, which is returned."""
    response = _open(source)
    try:
        headers = response.headers
        if "text/html" in (headers.get("Content-Type") or "").lower():
            raise WeightsError("the answer is a web page, not the file")
        length = headers.get("Content-Length")
        total = int(length) if length and length.isdigit() else size
        if size is not None and total != size:
            raise WeightsError(f"the server has {total} bytes, expected {size}")
        if total is not None and total > most:
            raise WeightsError(f"the server would send {total} bytes, {most} at most are expected")
        # One partial file for each address and version: the bytes of two do not fit together.
        version = f"{headers.get('ETag')} {headers.get('Last-Modified')} {total}"
        part = path.with_name(f"{path.name}.{_tag(source)}-{_tag(version)}.part")
        done = part.stat().st_size if part.is_file() else 0
        if done and done == total:
            return part
        if done:
            response.close()
            response = _open(source, Range=f"bytes={done}-")
            # Local addresses (file://) have no status and know no ranges.
            done = done if getattr(response, "status", None) == 206 else 0
        logger.info("Downloading %s", source)
        try:
            _copy(response, part, done=done, total=total, most=most)
        except http.client.HTTPException as error:  # not an OSError by itself
            raise ConnectionError(f"the connection broke ({error!r})") from error
    finally:
        response.close()
    if total is not None and part.stat().st_size != total:
        raise ConnectionError(f"the connection ended after {part.stat().st_size} of {total} bytes")
    return part


def _copy(response: Any, part: Path, *, done: int, total: int | None, most: int) -> None:
    from tqdm import tqdm

    chunk = response.read(_CHUNK)
    if not done and (problem := text_instead(chunk[:512])):
        raise WeightsError(problem)
    with (
        tqdm(
            total=total,
            initial=done,
            unit="B",
            unit_scale=True,
            desc=part.name.split(".")[0],
            # A bar where messages are shown too: commands turn them on, libraries leave them off.
            disable=None if logger.isEnabledFor(logging.INFO) else True,
        ) as bar,
        part.open("ab" if done else "wb") as out,
    ):
        while chunk:
            done += len(chunk)
            if done > (most if total is None else total):
                raise WeightsError(f"the server sends more than the {total or most} bytes expected")
            out.write(chunk)
            bar.update(len(chunk))
            chunk = response.read(_CHUNK)
