"""``report.html`` of a localisation: each query, and its matches to the best images of the map."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gim_hloc import page
from gim_hloc.files import json_value, write_atomic
from gim_hloc.pair_viewer import Ends, Pair, embed


def write_page(
    report: Mapping[str, Any],
    output: Path,
    pairs: Sequence[Pair],
    sizes: Mapping[str, tuple[int, int]],
    picture: Callable[[str], np.ndarray | None],
    matches: Callable[[Sequence[Pair]], Iterable[Ends]],
) -> None:
    """Write ``report.html``.

    Args:
        report: the content of report.json.
        output: folder of the run.
        pairs: of a query and an image of the map, the most interesting first.
        sizes: (width, height) of the files of both, px.
        picture: of an image, EXIF orientation not applied; None if it does not open.
        matches: of pairs, in their order.
    """
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    rows = [
        {"name0": a, "name1": b, "inliers": int(inlier.sum()), "matches": len(inlier)}
        for (a, b), (_, _, inlier) in zip(pairs, matches(pairs), strict=True)
    ]
    data = embed(names, rows, sizes, picture, matches) if pairs else None
    full = json_value(report)
    text = page.render("localize.html.j2", full=full, pair_data=data, total=len(pairs))
    write_atomic(output / "report.html", text)
