"""Mapping on a part of the tracks: poses need some hundred points an image, time grows with all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap

from gim_hloc.colmap.database import open_database
from gim_hloc.tracks.base import components

# Tracks an image keeps for mapping, longest first, and matches a pair keeps where it has them.
# What it does to poses: docs/performance.md.
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
        names = {i.image_id: i.name for i in db.read_all_images()}
        counts = {name: db.num_keypoints_for_image(i) for i, name in names.items()}
    matches = {
        (names[a], names[b]): np.asarray(geometry.inlier_matches, np.int64)
        for (a, b), geometry in geometries.items()
    }
    kept = _of_long_tracks(matches, counts)
    if sum(k.sum() for k in kept.values()) > _WORTH * sum(map(len, matches.values())):
        return False
    shutil.copyfile(database, target)
    with open_database(target) as db:
        for (a, b), geometry in geometries.items():
            pair = names[a], names[b]
            if not kept[pair].all():
                geometry.inlier_matches = matches[pair][kept[pair]].astype(np.uint32)
                db.update_two_view_geometry(a, b, geometry)
    return True


def _of_long_tracks(
    matches: Mapping[tuple[str, str], np.ndarray], counts: Mapping[str, int]
) -> dict[tuple[str, str], np.ndarray]:
    """Which matches (M,) of each pair are kept, by the numbers of keypoints of all images."""
    track, image, row = components(list(counts.values()), list(counts), matches)
    own = np.unique(np.stack([image, track]), axis=1)  # an image's tracks, once each
    images, keypoints = (np.bincount(t, minlength=1) for t in (own[1], track))
    length = images - len(counts) * (keypoints > images)
    chance = np.random.default_rng(0).random(len(length))  # among equals: spread over the image
    order = np.lexsort((chance[own[1]], -length[own[1]], own[0]))
    rank = np.arange(len(order)) - np.searchsorted(own[0], own[0])
    keep = np.zeros(len(length), bool)
    keep[own[1, order[rank < TRACKS]]] = True
    numbers = {name: np.full(count, -1) for name, count in counts.items()}
    for index, of_image in enumerate(numbers.values()):
        of_image[row[image == index]] = track[image == index]
    kept = {}
    for (a, b), rows in matches.items():
        tracks = numbers[a][rows[:, 0]]
        kept[a, b] = keep[tracks]
        rest = np.flatnonzero(~kept[a, b])
        more = rest[np.argsort(-length[tracks[rest]], kind="stable")]
        kept[a, b][more[: max(PAIR_MATCHES - int(kept[a, b].sum()), 0)]] = True
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
