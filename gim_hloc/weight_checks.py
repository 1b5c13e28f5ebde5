"""Whether a weight file is what its name says: by hash, or by its network's names and shapes."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from gim_hloc import weights
from gim_hloc.errors import InputError, WeightsError
from gim_hloc.weights import NetworkPart, WeightFile


def expected_shapes(part: NetworkPart) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's weights, by making it without memory for them.

    Raises:
        ImportError, AttributeError, InputError: the network is not part of this installation.
    """
    module, _, attribute = part.made_by.partition(":")
    maker = getattr(importlib.import_module(module), attribute)
    with torch.device("meta"):
        made = maker(**part.arguments)
    if isinstance(made, torch.nn.Module):
        return {name: tuple(value.shape) for name, value in made.state_dict().items()}
    return {name: tuple(shape) for name, shape in made.items()}


def check_part(part: NetworkPart, state: Mapping[str, torch.Tensor], *, path: Path) -> int:
    """Compare a file's names and shapes with those of a network that it fills.

    Returns:
        Number of tensors compared.

    Raises:
        WeightsError: they differ.
        ImportError, AttributeError, InputError: the network is not part of this installation.
    """
    expected = expected_shapes(part)
    if part.unwrapping is not None:
        state = weights.unwrap(part.unwrapping, state)
    if part.renamed_by is not None:
        module, _, attribute = part.renamed_by.partition(":")
        state = getattr(importlib.import_module(module), attribute)(state)
    if part.ignored:
        ends = tuple(part.ignored)
        expected = {k: v for k, v in expected.items() if not k.endswith(ends)}
        state = {k: v for k, v in state.items() if not k.endswith(ends)}
    weights.check_names(expected, state, path=path, network=part.network, optional=part.optional)
    return len(expected)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found out about a weight file.

    Attributes:
        path: the file.
        name: the published file that it should be, or None where nothing tells.
        good: True: the content is right; False: it is not; None: it can be read, but there is
            nothing to compare it with.
        detail: for people, one or more lines.
        size: bytes.
        git_blob: SHA-1 that git gives the content.
    """

    path: Path
    name: str | None
    good: bool | None
    detail: str
    size: int
    git_blob: str


def verify(path: Path, file: WeightFile | None = None) -> Verdict:
    """Check a weight file: its hash where one is published, else names and shapes.

    Args:
        path: the file.
        file: what it should be; by default told by its name, else by its content.

    Raises:
        WeightsError: there is no such file.
    """
    if not path.is_file():
        raise WeightsError(f"There is no weight file {path}.")
    file = file or weights.find(path.name)
    good, detail, name = _judge(path, file)
    return Verdict(
        path=path,
        name=name,
        good=good,
        detail=detail,
        size=path.stat().st_size,
        git_blob=weights.git_blob(path),
    )


def _judge(path: Path, file: WeightFile | None) -> tuple[bool | None, str, str | None]:
    different = None
    if file and (file.git_blob or file.sha256) and path.suffix == Path(file.name).suffix:
        different = weights.wrong_hash(path, file)
        if different is None:
            return True, "exactly the published file (by its hash)", file.name
    try:
        state = weights.load_state_dict(path, inside=file.inside if file else ("extractor",))
        file = file or weights.find(_BY_CONTENT.get(weights.recognise(state) or "", ""))
        parts = file.networks if file else ()
        count = sum(check_part(part, state, path=path) for part in parts)
        networks = " and ".join(part.network for part in parts)
        found = f"names and shapes of all {count} tensors of {networks}"
    except WeightsError as error:
        return False, str(error), file.name if file else None
    except (ImportError, AttributeError, InputError) as error:
        found = f"{len(state)} tensors; their network cannot be made here ({error})"
        parts = ()
    else:
        found = found if parts else f"{len(state)} tensors; no network here to compare them with"
    name = file.name if file else None
    if different:
        return False, f"not the published file: {different}. It has {found}", name
    return True if parts else None, found, name


_BY_CONTENT = {
    "gim_lightglue": "gim_lightglue_100h.ckpt",
    "SuperPoint": "superpoint_v1.pth",
    "RoMa": "gim_roma_100h.ckpt",
    "DKM": "gim_dkm_100h.ckpt",
    "DINOv2": "dinov2_vitl14_pretrain.pth",
    "the segmentation's decoder": "decoder_epoch_20.pth",
}
