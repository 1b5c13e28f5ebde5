"""Whether a weight file is what its name says: by hash, or by its network's names and shapes."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gim_hloc import weights
from gim_hloc.errors import InputError, WeightsError
from gim_hloc.weight_files import WeightFile


@dataclass(frozen=True, kw_only=True)
class NetworkPart:
    """A network that a weight file fills, or one of several.

    Attributes:
        network: for messages.
        made_by: "module:attribute" of its class, or of a function that returns names and shapes.
        arguments: of that class or function.
        unwrapping: key of ``weights.UNWRAPPING``, or None.
        renamed_by: "module:function" from names in the file to the network's, or None.
        optional: names that may be missing or superfluous.
        ignored: ends of names that nothing reads in evaluation.
    """

    network: str
    made_by: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    unwrapping: str | None = None
    renamed_by: str | None = None
    optional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def _lightglue(input_dim: int, unwrapping: str | None = None) -> NetworkPart:
    return NetworkPart(
        network="LightGlue",
        made_by="gim_hloc.networks.lightglue:published_shapes",
        arguments={"input_dim": input_dim},
        unwrapping=unwrapping,
        renamed_by="gim_hloc.matchers.lightglue:_lightglue_key",
        optional=("confidence_thresholds", *(f"log_assignment.{i}.r" for i in range(9))),
    )


def _segmentation(half: str) -> NetworkPart:
    return NetworkPart(
        network=f"the segmentation's {half}",
        made_by=f"gim_hloc.networks.segmentation:{half.capitalize()}",
        ignored=("_tmp_running_mean", "_tmp_running_var", "_running_iter", "num_batches_tracked"),
    )


_SUPERPOINT = "gim_hloc.networks.superpoint:SuperPoint"
_DINOV2 = NetworkPart(network="DINOv2", made_by="gim_hloc.networks.dinov2:DINOv2")
_DKM = NetworkPart(network="DKM", made_by="gim_hloc.networks.dkm:DKM", unwrapping="dkm")
_ROMA = NetworkPart(network="RoMa", made_by="gim_hloc.networks.roma:RoMa", unwrapping="roma")
_LOFTR_BASELINE = NetworkPart(
    network="LoFTR",
    made_by="kornia.feature:LoFTR",
    arguments={"pretrained": None},
    unwrapping="loftr",
)

_SUPERGLUE = NetworkPart(
    network="SuperPoint and SuperGlue", made_by="gim_hloc.matchers.superglue:published_shapes"
)

NETWORKS: Mapping[str, tuple[NetworkPart, ...]] = {
    "aliked-n16.pth": (
        NetworkPart(
            network="ALIKED",
            made_by="kornia.feature:ALIKED",
            arguments={"model_name": "aliked-n16"},
            optional=("dkd.hw_grid",),
        ),
    ),
    "disk-depth-save.pth": (NetworkPart(network="DISK", made_by="gim_hloc.networks.disk:DISK"),),
    "aliked_lightglue.pth": (_lightglue(128),),
    "disk_lightglue.pth": (_lightglue(128),),
    "superpoint_lightglue.pth": (_lightglue(256),),
    "superpoint_v1.pth": (NetworkPart(network="SuperPoint", made_by=_SUPERPOINT),),
    "gim_lightglue_100h.ckpt": (
        NetworkPart(network="SuperPoint", made_by=_SUPERPOINT, unwrapping="gim_lightglue.detector"),
        _lightglue(256, "gim_lightglue.matcher"),
    ),
    "gim_loftr_50h.ckpt": (
        NetworkPart(
            network="GIM's LoFTR",
            made_by="gim_hloc.networks.loftr:LoFTR",
            unwrapping="gim_loftr",
        ),
    ),
    "gim_dkm_100h.ckpt": (_DKM,),
    "DKMv3_outdoor.pth": (_DKM,),
    "DKMv3_indoor.pth": (_DKM,),
    "gim_roma_100h.ckpt": (_ROMA,),
    "roma_outdoor.pth": (_ROMA,),
    "roma_indoor.pth": (_ROMA,),
    "dinov2_vitl14_pretrain.pth": (_DINOV2,),
    "loftr_outdoor.ckpt": (_LOFTR_BASELINE,),
    "loftr_indoor_ds_new.ckpt": (_LOFTR_BASELINE,),
    "superglue_outdoor.safetensors": (_SUPERGLUE,),
    "superglue_indoor.safetensors": (_SUPERGLUE,),
    "encoder_epoch_20.pth": (_segmentation("encoder"),),
    "decoder_epoch_20.pth": (_segmentation("decoder"),),
}
"""The networks that each weight file fills."""


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
        rename = getattr(importlib.import_module(module), attribute)
        state = {rename(name): value for name, value in state.items()}
    if part.ignored:
        expected = {k: v for k, v in expected.items() if not k.endswith(part.ignored)}
        state = {k: v for k, v in state.items() if not k.endswith(part.ignored)}
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
    blob = weights.git_blob(path)
    good, detail, name = _judge(path, file, blob)
    return Verdict(
        path=path, name=name, good=good, detail=detail, size=path.stat().st_size, git_blob=blob
    )


def _judge(path: Path, file: WeightFile | None, blob: str) -> tuple[bool | None, str, str | None]:
    original = file is not None and path.suffix == Path(file.name).suffix
    if file is not None and original and file.git_blob is not None:
        if blob == file.git_blob:
            return True, "exactly the published file (git blob hash)", file.name
        return False, f"not the published file: git blob {blob}, not {file.git_blob}", file.name
    try:
        state = weights.load_state_dict(path, inside=file.inside if file else _ANYWHERE)
    except WeightsError as error:
        return False, str(error), file.name if file else None
    name = file.name if file is not None else _BY_CONTENT.get(weights.recognise(state) or "")
    parts = NETWORKS.get(name or "", ())
    if not parts:
        return None, f"{len(state)} tensors; no network here to compare them with", name
    try:
        count = sum(check_part(part, state, path=path) for part in parts)
    except WeightsError as error:
        return False, str(error), name
    except (ImportError, AttributeError, InputError) as error:
        return None, f"{len(state)} tensors; their network cannot be made here ({error})", name
    networks = " and ".join(part.network for part in parts)
    return True, f"names and shapes of all {count} tensors of {networks}", name


_ANYWHERE = ("state_dict", "extractor", "model")
_BY_CONTENT = {
    "gim_lightglue": "gim_lightglue_100h.ckpt",
    "SuperPoint": "superpoint_v1.pth",
    "RoMa": "gim_roma_100h.ckpt",
    "DKM": "gim_dkm_100h.ckpt",
    "DINOv2": "dinov2_vitl14_pretrain.pth",
    "the segmentation's decoder": "decoder_epoch_20.pth",
}
