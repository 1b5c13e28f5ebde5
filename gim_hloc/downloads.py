"""Fetching files over the network: resumable, complete or absent, quick to say that it cannot."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import logging
import os
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gim_hloc.checkpoint_reader import text_instead
from gim_hloc.errors import WeightsError

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20  # bytes read at once
_CONNECT_SECONDS = 5.0  # for name look-up and connection, of all addresses together
_STALL_SECONDS = 20.0  # without a byte before the next address is tried
_REMEMBER_SECONDS = 60.0  # how long an unreachable host is not asked again
_AGENT = "gim-hloc"  # some hosts refuse Python's own name

_reached: dict[tuple[str, int], tuple[float, str | None]] = {}  # when asked, and what was wrong


def unreachable(sources: Sequence[str]) -> dict[str, str]:
    """Addresses whose host cannot be connected to now, and why.

    All hosts are tried side by side, so that without a network it takes seconds, not a time-out
    for every address.
    """
    hosts = {source: host for source in sources if (host := _host(source)) is not None}
    now = time.monotonic()
    asked = {
        host
        for host in hosts.values()
        if host not in _reached or now - _reached[host][0] > _REMEMBER_SECONDS
    }
    answers: dict[tuple[str, int], str | None] = {}
    # Daemons: a name look-up has no time-out, and must not keep the process from ending.
    threads = [
        threading.Thread(target=_try_to_connect, args=(host, answers), daemon=True)
        for host in asked
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, now + _CONNECT_SECONDS - time.monotonic()))
    for host in asked:
        problem = answers.get(host, f"no connection within {_CONNECT_SECONDS:g} s")
        _reached[host] = (time.monotonic(), problem)
    problems = {source: _reached[host][1] for source, host in hosts.items()}
    return {source: problem for source, problem in problems.items() if problem is not None}


def _host(source: str) -> tuple[str, int] | None:
    """Host and port that a request to an address connects to first; None for local files."""
    parts = urllib.parse.urlsplit(source)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return None
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname):
        parts = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    default = 443 if parts.scheme == "https" else 80
    return (parts.hostname or "", parts.port or default)


def _try_to_connect(host: tuple[str, int], answers: dict[tuple[str, int], str | None]) -> None:
    try:
        socket.create_connection(host, timeout=_CONNECT_SECONDS).close()
        answers[host] = None
    except (OSError, UnicodeError) as error:
        problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
        answers[host] = f"{host[0]} cannot be reached: {problem}"


def fetch(
    source: str, path: Path, *, check: Callable[[Path], None], size: int | None = None
) -> Path:
    """Download into ``path``, continuing a partial download; complete or absent at the end.

    Args:
        source: address of the file.
        path: where to put it.
        check: looks at the complete file before it gets its name; raises WeightsError to refuse it.
        size: bytes, where known.

    Raises:
        OSError: the connection failed. What came is kept for the next attempt.
        WeightsError: the answer is not the file. Nothing of it is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(path):
        if path.is_file():  # by another process while this one waited
            return path
        # One partial file per address: mirrors may serve other bytes under the same name.
        tag = hashlib.sha256(source.encode()).hexdigest()[:8]
        part = path.with_name(f"{path.name}.{tag}.part")
        version = part.with_suffix(".version")
        if not (size is not None and part.is_file() and part.stat().st_size == size):
            _fill(source, part, version, size)
        try:
            check(part)
        except WeightsError:
            part.unlink()
            raise
        finally:
            version.unlink(missing_ok=True)
        part.replace(path)
    return path


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Hold the download of a file for one process; others wait for it to end."""
    lock = path.with_name(f".{path.name}.lock")
    told = False
    while True:
        with lock.open("a+b") as file:
            # A lock on a file that its last holder removed meanwhile excludes nobody.
            if _lock(file.fileno()) and _same_file(file.fileno(), lock):
                try:
                    yield
                finally:
                    with contextlib.suppress(OSError):  # Windows keeps open files
                        lock.unlink()
                return
        if not told:
            logger.info("Another process downloads %s; waiting for it.", path.name)
            told = True
        time.sleep(0.2)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _lock(descriptor: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _fill(source: str, part: Path, version: Path, size: int | None) -> None:
    """Append what is missing to a partial file."""
    done = part.stat().st_size if part.is_file() else 0
    headers = {"User-Agent": _AGENT}
    if done:
        headers["Range"] = f"bytes={done}-"
        with contextlib.suppress(OSError, ValueError):
            # Without a match the server sends the whole of its newer file.
            headers["If-Range"] = json.loads(version.read_text())
    request = urllib.request.Request(source, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=_STALL_SECONDS)
    except urllib.error.HTTPError as error:
        if done and error.code == 416:  # the partial file is not a beginning of this file
            part.unlink()
            _fill(source, part, version, size)
            return
        raise
    with response:
        # Local addresses (file://) have no status and know no ranges.
        resumed = done > 0 and getattr(response, "status", None) == 206
        if not resumed:
            done = 0
        if "text/html" in (response.headers.get("Content-Type") or "").lower():
            raise WeightsError("the answer is a web page, not the file")
        tag = response.headers.get("ETag") or ""
        if tag.startswith('"'):  # weak ones do not promise the same bytes
            version.write_text(json.dumps(tag))
        expected = response.headers.get("Content-Length")
        total = int(expected) + done if expected else None
        told = f" ({total / 1e6:.1f} MB)" if total is not None else ""
        logger.info("Downloading %s%s", source, told)
        try:
            _copy(response, part, done=done, total=total, wanted=size)
        except http.client.HTTPException as error:  # not an OSError by itself
            raise ConnectionError(f"the connection broke ({error!r})") from error
    if total is not None and part.stat().st_size != total:
        raise ConnectionError(f"the connection ended after {part.stat().st_size} of {total} bytes")


def _copy(
    response: http.client.HTTPResponse,
    part: Path,
    *,
    done: int,
    total: int | None,
    wanted: int | None,
) -> None:
    from tqdm import tqdm

    # A bar where messages are shown too: commands turn them on, libraries leave them off.
    silent = not logger.isEnabledFor(logging.INFO)
    chunk = response.read(_CHUNK)
    if not done and (problem := text_instead(chunk[:512])):
        raise WeightsError(problem)
    with (
        tqdm(
            total=total or wanted,
            initial=done,
            unit="B",
            unit_scale=True,
            desc=part.name.split(".")[0],
            disable=True if silent else None,
        ) as bar,
        part.open("ab" if done else "wb") as out,
    ):
        while chunk:
            out.write(chunk)
            bar.update(len(chunk))
            chunk = response.read(_CHUNK)
