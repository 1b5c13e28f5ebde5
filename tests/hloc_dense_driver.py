"""Runs the real hloc's ``match_dense.main`` and our drop-in on the same pairs, mode by mode.

    hloc_dense_driver.py WORK CHECKPOINT_FREE_SCENE

Started by ``test_hloc_real.py`` where hloc can be imported. The synthetic matcher knows images by
name, which hloc does not give to its models: here they are recognised by their content.
"""

from __future__ import annotations

import copy
import itertools
import sys
import types
from pathlib import Path
from typing import Any

import hloc.matchers
from hloc import match_dense as theirs
from hloc.utils.base_model import BaseModel

import gim_hloc
from gim_hloc.evaluation import synthetic_dense
from gim_hloc.hloc_plugin import match_dense as ours
from gim_hloc.hloc_plugin import models
from gim_hloc.hloc_plugin.memory import content_key

NAMES: dict[str, str] = {}
ENCODED: list[str] = []


class Known(models.DenseModel, BaseModel):
    """Our dense model with names."""

    def _encoding(self, image: Any) -> Any:
        key = content_key(image)

        def make() -> Any:
            ENCODED.append(NAMES[key])
            return self.matcher.encode(models.as_image(image, NAMES[key]))

        return self.memory.get(key, make)


def main() -> None:
    """See the module."""
    work = Path(sys.argv[1])
    gim_hloc.register()
    synthetic_dense.register()
    Known.__module__ = "hloc.matchers.known"
    module = types.ModuleType(Known.__module__)
    module.Known = Known  # type: ignore[attr-defined]
    sys.modules[Known.__module__] = hloc.matchers.known = module

    names = sorted(path.name for path in (work / "images").iterdir())
    conf = {
        "output": "matches-known",
        "model": {
            "name": "known", "matcher": "synthetic_dense", "scene": str(work / "scene.json"),
            "size": (72, 96), "num_matches": 800,
        },
        "preprocessing": {"grayscale": False, "resize_max": None, "dfactor": 1},
        "max_error": 2,
        "cell_size": 8,
    }  # fmt: skip
    our_conf: dict[str, Any] = copy.deepcopy(conf)
    our_conf["model"]["name"] = "gim_hloc_dense"
    dataset = theirs.ImagePairDataset(
        work / "images", conf["preprocessing"], [(n, n) for n in names]
    )
    for index, name in enumerate(names):
        NAMES[content_key(dataset[index][0][None])] = name

    def both(stem: str, pairs: list[tuple[str, str]], **options: Any) -> None:
        file = work / f"{stem}.txt"
        file.write_text("\n".join(" ".join(pair) for pair in pairs))
        for side, function, settings, extra in (
            ("hloc", theirs.main, conf, {}),
            ("ours", ours.main, our_conf, {"tracks": "quantized", "progress": False}),
        ):
            folder = work / side
            folder.mkdir(exist_ok=True)
            own = dict(options)
            if "features_ref" in own:
                own["features_ref"] = folder / own["features_ref"]
            function(settings, file, work / "images", folder, **own, **extra)

    mapped = list(itertools.combinations(names[:3], 2))
    both("first", mapped)
    assert sorted(ENCODED) == names[:3], ENCODED  # once each, although hloc has 3 pairs
    both("first", mapped)  # all pairs are there
    both("more", list(itertools.combinations(names[:4], 2)), max_kps=500)
    reference = "feats_matches-known.h5"
    query = [(names[4], name) for name in names[:3]]
    both("ref", query, features="ref_", features_ref=reference)
    both("loc", query, features="loc_", features_ref=reference, max_kps=None)


if __name__ == "__main__":
    main()
