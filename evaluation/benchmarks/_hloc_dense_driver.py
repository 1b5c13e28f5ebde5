"""Dense matching from files to files, by the real hloc or by our drop-in, with a clock.

``hloc_dense`` starts this file in hloc's own environment, in which gim_hloc is installed, too:

    _hloc_dense_driver.py SCENE_FOLDER hloc|quantized|anchored OUTPUT CONF_JSON DESCRIBER

``OUTPUT/timings.json`` gets the wall seconds of ``main`` and those that the network (the synthetic
matcher, and the detector of anchors) takes of them, and the same in processor seconds of all
processes.
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
import multiprocessing
import resource
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gim_hloc.hloc_plugin import match_dense, models, registration
from gim_hloc.hloc_plugin.memory import content_key

KNOWN = "gim_hloc_known"


class Busy:
    """Time spent in functions that are watched, called one after the other.

    Of the wall seconds, what other threads and processes of this program compute meanwhile is taken
    off, down to the processor seconds of the call: reading images ahead is not network, be it on
    the same core. What strangers on the machine do to the call is no work of ours and stays in.

    Attributes:
        wall_s: wall seconds.
        processor_s: processor seconds of the calling threads.
        calls: by name.
    """

    def __init__(self) -> None:
        self.wall_s = self.processor_s = 0.0
        self.calls: dict[str, int] = {}

    def watch(self, owner: Any, name: str) -> None:
        """Replace a function of a class or module by one that is timed."""
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            before = clocks()
            try:
                return plain(*args, **kwargs)
            finally:
                wall, own, others = (b - a for a, b in zip(before, clocks(), strict=True))
                self.processor_s += own
                self.wall_s += max(own, wall - others)

        setattr(owner, name, timed)


def clocks() -> tuple[float, float, float]:
    """Wall seconds, processor seconds of this thread, and of the rest of this program."""
    own, own_children = time.thread_time(), 0.0
    for child in multiprocessing.active_children():
        try:  # first number: nanoseconds on a processor
            for file in Path(f"/proc/{child.pid}/task").glob("*/schedstat"):
                own_children += int(file.read_text().split()[0]) / 1e9
        except (OSError, ValueError, IndexError):  # it has just ended, or this is not Linux
            continue
    return time.perf_counter(), own, time.process_time() - own + own_children


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def known_model(folder: Path, preprocessing: Mapping[str, Any]) -> Any:
    """Give hloc a model of our synthetic matcher, which knows images by name.

    hloc hands over pictures alone: they are told apart by content.

    Args:
        folder: images.
        preprocessing: of hloc's configuration.

    Returns:
        The class; hloc finds it as the model ``KNOWN``.
    """
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


def draw(self: Any, warp: Any, a: Any, b: Any) -> Any:
    """Matches of a warp, drawn in no time: how they are spread is not what is measured."""
    import torch

    from gim_hloc.geometry.seeds import pair_seed
    from gim_hloc.geometry.warp import transform
    from gim_hloc.types import Matches

    rows, certainty = warp.stacked()
    good = torch.nonzero(certainty > 0.5)[:, 0]
    generator = torch.Generator().manual_seed(pair_seed(0, a.name, b.name))
    chosen = good[torch.randperm(len(good), generator=generator)[: self.options.num_matches]]
    return Matches(
        keypoints0=transform(warp.frame0, rows[chosen, :2]),
        keypoints1=transform(warp.frame1, rows[chosen, 2:]),
        scores=certainty[chosen],
    )


def main(argv: list[str]) -> None:
    """See the module."""
    from gim_hloc.evaluation import synthetic_dense
    from gim_hloc.matchers import lightglue, sift

    folder, output = Path(argv[0]), Path(argv[2])
    side: Any = argv[1]
    conf, describer = json.loads(argv[3]), argv[4]
    output.mkdir(parents=True)
    registration.register()
    synthetic_dense.register()
    matcher: Any = synthetic_dense.SyntheticDense
    matcher.draw = draw
    busy = Busy()
    images, pairs = folder / "images", folder / "pairs.txt"
    arguments = (pairs, images, output)
    processor = processor_seconds()
    if side == "hloc":
        theirs = registration.import_hloc("match_dense")
        model = known_model(images, conf["preprocessing"])
        busy.watch(model, "_forward")  # our share of hloc's time is not hloc's
        conf = copy.deepcopy(conf)
        conf["model"]["name"] = KNOWN
        start = time.perf_counter()
        features, matches = theirs.main(conf, *arguments)
    else:
        engine: Any = importlib.import_module("gim_hloc.engine")
        engine.default_workers = lambda *_: 1  # networks one after the other: their times add up
        for name in ("encode", "warp_batch" if side == "anchored" else "match_batch"):
            busy.watch(matcher, name)
        for detector in (sift.SiftMatcher, lightglue.LightGlueMatcher):
            busy.watch(detector, "encode")
        start = time.perf_counter()
        features, matches = match_dense.main(
            conf, *arguments, tracks=side, describer=describer, progress=False
        )
    wall = time.perf_counter() - start
    result = {
        "wall_s": wall,
        "network_s": busy.wall_s,
        "processor_s": processor_seconds() - processor,
        "network_processor_s": busy.processor_s,
        "calls": busy.calls,
        "features": str(features),
        "matches": str(matches),
        "versions": {
            "hloc": registration.import_hloc().__version__,
            "pycolmap": importlib.import_module("pycolmap").__version__,
        },
    }
    (output / "timings.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
