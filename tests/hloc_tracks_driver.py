"""Run the real hloc's aggregation and assignment on given matches and write down what it took.

``tracks`` starts this file in hloc's own environment:

    _hloc_tracks_driver.py MATCHES.h5 PAIRS.txt OUTPUT MAX_KEYPOINTS CELL:ERROR [CELL:ERROR ...]

``MATCHES.h5`` holds ``keypoints0``, ``keypoints1`` and ``scores`` by pair, as ``match_dense``
writes them. For every setting ``OUTPUT/CELL-ERROR/`` gets ``features.h5`` and ``matches.h5``, and
``OUTPUT/timings.json`` the processor seconds. It needs nothing of gim_hloc, because that
environment may hold other versions of every library.
"""

from __future__ import annotations

import collections
import importlib
import json
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any


def number(text: str) -> float:
    """A whole number where it is one, as in hloc's configurations."""
    value = float(text)
    return int(value) if value.is_integer() else value


def main(argv: list[str]) -> None:
    """See the module."""
    matches, pair_file, output = (Path(text) for text in argv[:3])
    limit = int(argv[3]) or None
    # By name and not by statement: this file is part of gim_hloc, which does not depend on hloc.
    match_dense: Any = importlib.import_module("hloc.match_dense")
    lines = pair_file.read_text().split("\n")
    pairs = [(line.split()[0], line.split()[1]) for line in lines if line]
    names = {name for pair in pairs for name in pair}
    seconds = {}
    for setting in argv[4:]:
        cell, error = (number(text) for text in setting.split(":"))
        folder = output / f"{cell}-{error}"
        folder.mkdir(parents=True)
        shutil.copy(matches, folder / "matches.h5")
        begin = time.process_time()
        keypoints = match_dense.aggregate_matches(
            {"max_error": error, "cell_size": cell},
            pairs,
            folder / "matches.h5",
            feature_path=folder / "features.h5",
            required_queries=set(names),
            max_kps=limit,
            cpdict=collections.defaultdict(list),
            bindict=collections.defaultdict(list),
        )
        if limit is not None:
            match_dense.assign_matches(pairs, folder / "matches.h5", keypoints, max_error=error)
        seconds[setting] = time.process_time() - begin
    versions = {
        "hloc": importlib.import_module("hloc").__version__,
        "python": platform.python_version(),
        "numpy": importlib.import_module("numpy").__version__,
        "scipy": importlib.import_module("scipy").__version__,
    }
    text = json.dumps({"seconds": seconds, "versions": versions}, indent=1)
    (output / "timings.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
