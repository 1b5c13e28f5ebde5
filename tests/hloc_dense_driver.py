"""Runs the real hloc's ``match_dense.main`` and our drop-in on the same pairs, mode by mode.

    hloc_dense_driver.py SCENE_FOLDER

Started by ``test_hloc_real.py`` where hloc can be imported.
"""

from __future__ import annotations

import copy
import itertools
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hloc import match_dense as theirs

import gim_hloc
from gim_hloc.evaluation.benchmarks import scene as synthetic_dense
from gim_hloc.hloc_plugin import match_dense as ours
from gim_hloc.hloc_plugin import models, registration
from gim_hloc.hloc_plugin.memory import content_key

KNOWN = "gim_hloc_known"


def known_model(folder: Path, preprocessing: Mapping[str, Any]) -> Any:
    """Give hloc a model of our synthetic matcher; pictures are told apart by content."""
    theirs = registration.import_hloc("match_dense")
    matchers = registration.import_hloc("matchers")
    base: Any = registration.import_hloc("utils.base_model").BaseModel
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    dataset = theirs.ImagePairDataset(folder, preprocessing, [(name, name) for name in files])
    names = {content_key(dataset[row][0][None]): name for row, name in enumerate(files)}

    class Known(models.DenseModel, base):
        """Our dense model with names."""

        def _encoding(self, image: Any) -> Any:
            key = content_key(image)
            return self.memory.get(
                key, lambda: self.matcher.encode(models.as_image(image, names[key]))
            )

    Known.__module__ = f"hloc.matchers.{KNOWN}"
    module: Any = types.ModuleType(Known.__module__)
    module.Known = Known
    sys.modules[Known.__module__] = module
    setattr(matchers, KNOWN, module)
    return Known


def main() -> None:
    """See the module."""
    work = Path(sys.argv[1])
    gim_hloc.register()
    synthetic_dense.register()
    names = sorted(path.name for path in (work / "images").iterdir())
    conf = {
        "output": "matches-known",
        "model": {
            "name": KNOWN, "matcher": "synthetic_dense", "scene": str(work / "scene.json"),
            "size": (72, 96), "num_matches": 800,
        },
        "preprocessing": {"grayscale": False, "resize_max": None, "dfactor": 1},
        "max_error": 2,
        "cell_size": 8,
    }  # fmt: skip
    our_conf: dict[str, Any] = copy.deepcopy(conf)
    our_conf["model"]["name"] = "gim_hloc_dense"
    known_model(work / "images", conf["preprocessing"])
    encoded: list[str] = []
    encode = synthetic_dense.SyntheticDense.encode

    def counted(self: Any, image: Any) -> Any:
        encoded.append(image.name)
        return encode(self, image)

    synthetic_dense.SyntheticDense.encode = counted  # type: ignore[method-assign]

    def both(stem: str, pairs: list[tuple[str, str]], **options: Any) -> None:
        file = work / f"{stem}.txt"
        file.write_text("\n".join(" ".join(pair) for pair in pairs))
        for side, function, settings, extra in (
            ("hloc", theirs.main, conf, {}),
            ("ours", ours.main, our_conf, {"tracks": "quantized", "progress": False}),
        ):
            before = len(encoded)
            folder = work / side
            folder.mkdir(exist_ok=True)
            own = dict(options)
            if "features_ref" in own:
                own["features_ref"] = folder / own["features_ref"]
            function(settings, file, work / "images", folder, **own, **extra)
            # Once an image, although hloc asks for each pair anew.
            used = len(encoded) - before
            assert used in (0, len({name for pair in pairs for name in pair})), (stem, side, used)

    mapped = list(itertools.combinations(names[:3], 2))
    both("first", mapped)
    both("first", mapped)  # all pairs are there
    both("more", list(itertools.combinations(names[:4], 2)), max_kps=500)
    reference = "feats_matches-known.h5"
    query = [(names[4], name) for name in names[:3]]
    both("ref", query, features="ref_", features_ref=reference)
    both("loc", query, features="loc_", features_ref=reference, max_kps=None)


if __name__ == "__main__":
    main()
