"""Mapping on a part of the tracks: poses need some hundred points an image, time grows with all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import scipy  # its packages are loaded when they are used

from gim_hloc.colmap.database import open_database

# Tracks an image keeps for mapping, longest first, and matches a pair keeps where it has them.
# Measured (docs/performance.md): poses after refinement are those of all tracks from 300 on.
TRACKS, PAIR_MATCHES = 500, 150
_WORTH = 0.8  # a larger share than this would save nothing


def thin(database: Path, target: Path) -> bool:
    """Copy a verified database with the matches of its longest tracks alone.

    Keypoints stay, so that a model of it holds rows of both. Tracks that show two keypoints of one
    image are taken last.

    Returns:
        Whether it was worth it; else nothing is written.
    """
    with open_database(database) as db:
        found = zip(*db.read_two_view_geometries(), strict=True)
        geometries = {pycolmap.pair_id_to_image_pair(pair): g for pair, g in found}
        counts = {i.image_id: db.num_keypoints_for_image(i.image_id) for i in db.read_all_images()}
    matches = {pair: np.asarray(g.inlier_matches, np.int64) for pair, g in geometries.items()}
    kept = _of_long_tracks({p: m for p, m in matches.items() if len(m)}, counts)
    if sum(k.sum() for k in kept.values()) > _WORTH * sum(map(len, matches.values())):
        return False
    shutil.copyfile(database, target)
    with open_database(target) as db:
        for pair, keep in kept.items():
            if not keep.all():
                geometries[pair].inlier_matches = matches[pair][keep].astype(np.uint32)
                db.update_two_view_geometry(*pair, geometries[pair])
    return True


def _of_long_tracks(
    matches: dict[tuple[int, int], np.ndarray], counts: dict[int, int]
) -> dict[tuple[int, int], np.ndarray]:
    """Which matches (M,) of each pair are kept; keypoints of all images are numbered in a row."""
    if not matches:
        return {}
    order = sorted(counts)
    start = dict(zip(order, np.cumsum([0, *(counts[i] for i in order)]), strict=False))
    ends = [
        np.concatenate([start[pair[k]] + m[:, k] for pair, m in matches.items()]) for k in (0, 1)
    ]
    total = sum(counts.values())
    graph = scipy.sparse.coo_array((np.ones(len(ends[0]), np.int8), ends), shape=(total, total))
    number, track = scipy.sparse.csgraph.connected_components(graph, directed=False)
    used = np.unique(np.concatenate(ends))  # sorted, and with it the images
    image = np.repeat(np.arange(len(order)), [counts[i] for i in order])[used]
    seen = np.unique(np.stack([track[used], image]), axis=1)
    images, keypoints = (np.bincount(t, minlength=number) for t in (seen[0], track[used]))
    length = images - len(order) * (keypoints > images)
    chance = np.random.default_rng(0).random(number)  # among equals: spread over the image
    keep = np.zeros(number, bool)
    for index in range(len(order)):
        own = seen[0, seen[1] == index]
        keep[own[np.lexsort((chance[own], -length[own]))[:TRACKS]]] = True
    kept = {}
    for pair, rows in matches.items():
        own = track[start[pair[0]] + rows[:, 0]]
        chosen = keep[own]
        rest = np.flatnonzero(~chosen)
        more = rest[np.argsort(-length[own[rest]], kind="stable")]
        chosen[more[: max(PAIR_MATCHES - int(chosen.sum()), 0)]] = True
        kept[pair] = chosen
    return kept


def complete(model: Any, database: Path, options: Any) -> None:
    """Triangulate all tracks of a database in a model of a part of them, and adjust it as a whole.

    ``options`` are those of the mapping.
    """
    wanted = pycolmap.DatabaseCacheOptions()
    wanted.image_names = set(options.image_names)
    with open_database(database) as db:
        cache = pycolmap.DatabaseCache.create(db, wanted)
    mapper, triangulation = pycolmap.IncrementalMapper(cache), options.get_triangulation()
    mapper.begin_reconstruction(model)
    for image_id in sorted(model.reg_image_ids()):
        mapper.triangulate_image(triangulation, image_id)
    mapper.iterative_global_refinement(
        options.ba_global_max_refinements,
        options.ba_global_max_refinement_change,
        options.get_mapper(),
        options.get_global_bundle_adjustment(),
        triangulation,
    )
    mapper.end_reconstruction(False)
    model.tear_down()  # images of the database that have no pose


__all__ = ["complete", "thin"]
