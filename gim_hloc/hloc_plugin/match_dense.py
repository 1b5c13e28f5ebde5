"""hloc's ``match_dense.main`` with the same arguments and the same files, faster.

    from gim_hloc.hloc_plugin import confs, match_dense
    features, matches = match_dense.main(confs.MATCH_DENSE["gim_dkm"], pairs, images, outputs)

hloc loads and encodes both images of every pair; here every image is read and encoded once
(``engine.match``), pairs are matched in batches on a GPU, and keypoints come from
``tracks``: ``anchored`` (default, more accurate and with longer tracks) or ``quantized`` (hloc's
result). It does not need hloc, unless the configuration names one of hloc's own models.

As in hloc, images of ``features_ref`` and of an existing feature file keep their keypoints, and
pairs that are matched already are passed over unless ``overwrite``. Unlike hloc, ``overwrite``
leaves the keypoints that other pairs use, and files are replaced as a whole when all is done; a run
that was stopped goes on where it was.

The command ``python -m gim_hloc.hloc_plugin.match_dense`` has hloc's arguments, too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
from tqdm import tqdm

from gim_hloc import cache, engine, images, matchers
from gim_hloc.cli import common
from gim_hloc.errors import InputError, OutputError, some
from gim_hloc.hloc_files import find, group, open_h5, read
from gim_hloc.hloc_plugin import confs, models
from gim_hloc.hloc_plugin.foreign import HlocMatcher
from gim_hloc.hloc_plugin.registration import import_hloc, register
from gim_hloc.pairs.files import read_pairs
from gim_hloc.store import digest, remove_cache
from gim_hloc.tracks import quantized
from gim_hloc.tracks.anchored import AnchoredOptions
from gim_hloc.tracks.base import Arrays, Pair, Tracks
from gim_hloc.tracks.linker import ImagePoints, Kind, Linker, Quantized, linker_for
from gim_hloc.tracks.quantized import QuantizedOptions, Raw
from gim_hloc.types import ImageOptions, Matcher

logger = logging.getLogger(__name__)

Conf = Mapping[str, Any]

# Attribute of an image in a feature file: the match files whose rows are rows of its keypoints.
_USERS = "match_files"
_GPU_BATCH = 16  # pairs a network call; halved where memory is short
_PREPROCESSING = {"grayscale": True, "resize_max": 1024, "dfactor": 8}  # hloc's defaults
_OURS = ("gim_dkm", "gim_roma", "gim_loftr", "gim_hloc_dense")  # models that are not hloc's
_NOTHING = np.zeros((0, 2), np.float32)


def main(
    conf: Conf,
    pairs: Path,
    image_dir: Path,
    export_dir: Path | None = None,
    matches: Path | None = None,
    features: Path | str | None = None,
    features_ref: Path | Sequence[Path] | None = None,
    max_kps: int | None = 8192,
    overwrite: bool = False,
    *,
    tracks: Kind = "anchored",
    anchors: str = "auto",
    anchored: AnchoredOptions | None = None,
    batch_size: int | None = None,
    cache_gb: float | None = None,
    progress: bool = True,
) -> tuple[Path, Path]:
    """Match pairs densely and write keypoints and matches in hloc's layout.

    The arguments before the asterisk are hloc's.

    Args:
        conf: see ``gim_hloc.hloc_plugin.confs``, or one of hloc's.
        pairs: text file, ``name0 name1`` a line. For localisation name0 is the query.
        image_dir: folder of the images.
        export_dir: folder for files whose paths are not given.
        matches: match file.
        features: feature file (``Path``), or what its name begins with (``str``).
        features_ref: feature files whose keypoints stay as they are.
        max_kps: keypoints an image at most. None keeps all; images that are paired with images of
            ``features_ref`` then get one keypoint a match (localisation).
        overwrite: match pairs again and find keypoints of images in ``features`` again, but those
            that other pairs than these use.
        tracks: how matches become keypoints.
        anchors: sparse matcher whose keypoints are anchors; ``auto`` takes ``aliked_lightglue``
            where its weights are, else ``sift``; ``none`` leaves anchors to the grid.
        anchored: numbers of anchored tracks; ``max_kps`` counts.
        batch_size: pairs a network call; 16 on a GPU, else 1.
        cache_gb: memory for encodings, 10^9 bytes; None takes half of what is free.
        progress: show progress bars.

    Returns:
        Paths of the feature file and of the match file.

    Raises:
        InputError: a file or an image cannot be used, or an option is unknown.
        OutputError: a file cannot be written.
        WeightsError: the weights cannot be had.
    """
    if tracks not in get_args(Kind):
        raise InputError(f"tracks is {tracks!r}; choose {' or '.join(get_args(Kind))}.")
    lacking = [key for key in ("output", "model", "max_error", "cell_size") if key not in conf]
    if lacking or "name" not in conf["model"]:
        raise InputError(
            f"The configuration has no {' and no '.join(lacking or ['name of a model'])}. Copy "
            'one of hloc\'s or ours, e.g. dict(match_dense.confs["gim_dkm"], max_error=1).'
        )
    feature_path, match_path = _paths(conf, Path(pairs), export_dir, matches, features)
    references = [features_ref] if isinstance(features_ref, (str, Path)) else features_ref or ()
    for path in references:
        if not Path(path).is_file():
            raise InputError(f"The reference features {path} do not exist.")
    wanted = _unique(read_pairs(pairs, directed=True))
    if not wanted:
        raise InputError(f"{pairs} lists no pair: there is nothing to match.")
    _check_keys(wanted, match_path)
    if not overwrite:
        wanted = _missing(wanted, match_path)
    if not wanted:
        logger.info("All pairs of %s are in %s.", pairs, match_path)
        return feature_path, match_path
    for path in (feature_path, match_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    names = sorted({name for pair in wanted for name in pair})
    fixed = _keypoints([Path(path) for path in references], names)
    if feature_path.exists():
        there = _keypoints([feature_path], names)
        if overwrite:
            free = _only_used_here(feature_path, match_path, wanted)
            there = {name: xy for name, xy in there.items() if name not in free}
            if there:
                logger.info(
                    "%d images keep their keypoints in %s, which other pairs use: %s.",
                    len(there),
                    feature_path,
                    some(sorted(there)),
                )
        fixed |= there
    job = _Job(
        pairs=wanted,
        records=_records(Path(image_dir), names),
        fixed=fixed,
        anchored=dataclasses.replace(anchored or AnchoredOptions(), max_keypoints=max_kps),
        quantized=_quantized(conf, max_kps),
        progress=progress,
    )
    matcher = _load(conf)
    linker = (
        Quantized(matcher, job.quantized, functools.partial(models.match_free, matcher, fixed))
        if tracks == "quantized"
        else linker_for(matcher, tracks, anchored=job.anchored)
    )
    with cache.Cache(match_path.with_name(f"{match_path.name}.cache")) as found:
        points = job.points(anchors) if tracks == "anchored" else []
        arrays = job.match(linker, points, found, batch_size, cache_gb)
        job.write(feature_path, match_path, linker, job.link(linker, arrays), arrays)
    remove_cache(found.path)
    return feature_path, match_path


# ---------------------------------------------------------------------------------------- inputs


def _paths(
    conf: Conf,
    pairs: Path,
    export_dir: Path | None,
    matches: Path | None,
    features: Path | str | None,
) -> tuple[Path, Path]:
    """Where hloc would write features and matches."""
    if isinstance(features, Path):
        if matches is None:
            raise InputError("Give both features and matches as paths, or neither.")
        return features, Path(matches)
    if export_dir is None:
        raise InputError("Give export_dir, or features and matches as paths.")
    prefix = "feats_" if features is None else features
    default = Path(export_dir, f"{conf['output']}_{pairs.stem}.h5")
    return Path(export_dir, f"{prefix}{conf['output']}.h5"), Path(matches or default)


def _unique(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs without those that occur the other way round before."""
    kept: dict[Pair, None] = {}
    for a, b in pairs:
        if (b, a) not in kept:
            kept[a, b] = None
    return list(kept)


def _key(pair: Pair, between: str = "/") -> str:
    """Group of a pair in hloc's files."""
    return between.join(name.replace("/", "-") for name in pair)


def _check_keys(pairs: Sequence[Pair], match_path: Path) -> None:
    owners: dict[str, Pair] = {}
    for pair in pairs:
        for key in (_key(pair), _key(pair[::-1])):
            other = owners.setdefault(key, pair)
            if other != pair:
                raise InputError(
                    f"hloc cannot tell the pairs {' '.join(other)} and {' '.join(pair)} apart: it "
                    f"writes both as {key} in {match_path}. Rename one of the images."
                )


def _missing(pairs: Sequence[Pair], match_path: Path) -> list[Pair]:
    """Pairs that the file does not hold. hloc also takes those that it left half done for held."""
    if not match_path.exists():
        return list(pairs)
    with open_h5(match_path, "match file") as file:
        return [
            pair
            for pair in pairs
            if not any(
                find(file, f"{_key(ends, between)}/matches0") is not None
                for ends, between in itertools.product((pair, pair[::-1]), "/_")
            )
        ]


def _only_used_here(feature_path: Path, match_path: Path, pairs: Sequence[Pair]) -> set[str]:
    """Images whose keypoints in the feature file no other pair uses, as far as files say."""
    wanted = {key for pair in pairs for key in (_key(pair), _key(pair[::-1]))}
    used: set[str] = set()  # by other pairs of the match file, as names stand in its keys
    if match_path.exists():
        with open_h5(match_path, "match file") as file:
            for first in file:
                for second in group(file, first) or ():
                    if f"{first}/{second}" not in wanted:
                        used |= {first, second}
    free = set()
    with open_h5(feature_path, "feature file") as file:
        for name in {name for pair in pairs for name in pair}:
            image = group(file, name)
            users = () if image is None else image.attrs.get(_USERS, ())
            if list(users) == [str(match_path.resolve())] and name.replace("/", "-") not in used:
                free.add(name)
    return free


def _records(root: Path, names: Sequence[str]) -> dict[str, images.ImageRecord]:
    found = images.scan(root, names=names, min_size=1)
    records = {record.name: record for record in found.images}
    for rejected in found.rejected:
        if rejected.reason != "duplicate":
            raise InputError(f"{root}: {rejected}.")
        # Twice the same picture is not for us to judge here.
        (records[rejected.name],) = images.scan(root, names=[rejected.name], min_size=1).images
    return records


def _keypoints(files: Sequence[Path], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Keypoints (N, 2) of images that are in one of the files; the last file counts."""
    found = {}
    for path in files:
        with open_h5(path, "feature file") as file:
            for name in names:
                if find(file, f"{name}/keypoints") is None:
                    continue
                xy = read(file, f"{name}/keypoints").astype(np.float32)
                # Some extractors put scale and orientation behind x and y.
                if xy.ndim != 2 or xy.shape[1] < 2 or not np.isfinite(xy).all():
                    raise InputError(f"{path}, {name}: keypoints are not finite (N, 2) numbers.")
                found[name] = np.ascontiguousarray(xy[:, :2])
    return found


def _quantized(conf: Conf, max_kps: int | None) -> QuantizedOptions:
    """Numbers of hloc's aggregation; no size of a cell means that of the error."""
    error, cell = conf["max_error"], conf["cell_size"]
    values = [error, error if cell is None else cell]
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in values):
        raise InputError(f"max_error and cell_size are {values}; both are numbers of pixels.")
    return QuantizedOptions(max_error=values[0], cell_size=values[1], max_keypoints=max_kps)


def _load(conf: Conf) -> Matcher:
    """The matcher that hloc would use."""
    preprocessing = {**_PREPROCESSING, **conf.get("preprocessing", {})}
    image_options = ImageOptions(
        max_size=preprocessing["resize_max"],
        grayscale=bool(preprocessing["grayscale"]),
        multiple_of=int(preprocessing["dfactor"] or 1),
    )
    model = conf["model"]
    if model["name"] not in _OURS:
        return HlocMatcher(model, image_options)
    matcher = models.load_matcher(model, None if "matcher" in model else model["name"])
    if matcher.info.has_keypoints:
        raise InputError(f"{matcher.info.name} is a sparse matcher; use match_features.")
    matcher.image_options = image_options
    return matcher


# ------------------------------------------------------------------------------------------ work


@dataclasses.dataclass(kw_only=True)
class _Job:
    """Pairs to match and what is known about their images.

    Attributes:
        fixed: name -> (N, 2) keypoints that stay as they are.
    """

    pairs: list[Pair]
    records: dict[str, images.ImageRecord]
    fixed: dict[str, np.ndarray]
    anchored: AnchoredOptions
    quantized: QuantizedOptions
    progress: bool

    @functools.cached_property
    def free(self) -> frozenset[Pair]:
        """Pairs of which each match gives its query a keypoint of its own."""
        if self.quantized.max_keypoints is not None:
            return frozenset()
        return frozenset(p for p in self.pairs if p[0] not in self.fixed and p[1] in self.fixed)

    def match(
        self,
        linker: Linker,
        points: Sequence[ImagePoints],
        found: cache.Cache,
        batch_size: int | None,
        cache_gb: float | None,
    ) -> Callable[[Pair], Arrays]:
        """Match what the cache does not hold yet; returns what reads a pair from it."""
        matcher = linker.matcher
        linker.prepare(points)
        given = {image.name: image.keypoints.tobytes().hex() for image in points}
        settings = digest([linker.settings(), dataclasses.asdict(matcher.image_options)])
        sources = {n: digest([r.sha256, given.get(n)]) for n, r in self.records.items()}
        keys = {p: cache.key(settings, [sources[name] for name in p]) for p in self.pairs}
        todo = [pair for pair in self.pairs if found.get(keys[pair]) is None]
        with self._bar(len(self.pairs), "Match", "pairs", len(self.pairs) - len(todo)) as bar:
            for pair, arrays in engine.match(
                matcher,
                todo,
                lambda name: images.load(self.records[name], matcher.image_options),
                linker.reduce,
                cache_gb=cache_gb,
                batch_size=batch_size or (1 if matcher.device.type == "cpu" else _GPU_BATCH),
                workers=engine.default_workers(matcher.device, not matcher.info.side_by_side),
            ):
                found.put(keys[pair], arrays)
                bar.update()

        def stored(pair: Pair) -> Arrays:
            arrays = found.get(keys[pair])
            if arrays is None:
                raise OutputError(f"{found.path} lost {' '.join(pair)}. Repeat the command.")
            return arrays

        return stored

    def points(self, anchors: str) -> list[ImagePoints]:
        """Keypoints of all images: those that are fixed, else a detector's and room for a grid."""
        joint = {name for pair in self.pairs if pair not in self.free for name in pair}
        todo = joint - self.fixed.keys()
        points = {
            name: ImagePoints(
                name=name,
                size=record.size,
                keypoints=self.fixed.get(name, _NOTHING),
                fixed=name not in todo,
            )
            for name, record in self.records.items()
        }
        if todo and anchors != "none":
            detector = matchers.load_sparse(matchers.choose_detector(anchors))
            with self._bar(len(todo), "Anchors", "images") as bar:
                for name, encoding in engine.encode(
                    detector,
                    sorted(todo),
                    lambda name: images.load(self.records[name], detector.image_options),
                    workers=engine.default_workers(detector.device, False),
                ):
                    points[name].keypoints = encoding.keypoints.numpy()
                    points[name].scores = encoding.scores.numpy()
                    bar.update()
        return list(points.values())

    def _raw(self, linker: Linker, pair: Pair, arrays: Arrays) -> Raw:
        """Matches of a pair by coordinates; of free ones, what was read at the map's keypoints."""
        return linker.points(pair, arrays, at=1 if pair in self.free else None)

    def link(self, linker: Linker, stored: Callable[[Pair], Arrays]) -> Tracks:
        """Keypoints of the images that have none yet, and matches of all pairs."""
        joint = [pair for pair in self.pairs if pair not in self.free]
        tracks = linker.link(sorted(self.records), joint, stored)
        tracks.lengths = None
        tracks.keypoints |= self.fixed
        reach = dict.fromkeys(self.records, float(self.quantized.max_error))
        # In the order in which hloc aggregates pairs, which numbers keypoints.
        count = Counter(name for pair in self.pairs for name in pair)
        ordered = sorted(self.free, key=lambda p: (min(count[p[0]], count[p[1]]), p))
        for query in sorted({a for a, _ in self.free}):
            raws = [self._raw(linker, p, stored(p)) for p in ordered if p[0] == query]
            xy, scores = _unrepeated(
                np.concatenate([raw[0] for raw in raws]), np.concatenate([raw[2] for raw in raws])
            )
            tracks.keypoints[query] = np.concatenate([tracks.keypoints[query], xy])
            tracks.keypoint_scores[query] = np.concatenate([tracks.keypoint_scores[query], scores])
            reach[query] = 1e-3  # every match has its own keypoint
        given = functools.cache(lambda name: quantized.given(tracks.keypoints[name], reach[name]))
        for pair in self.pairs:
            if self.fixed.keys() & set(pair):
                raw = self._raw(linker, pair, stored(pair))
                tracks.matches[pair], tracks.scores[pair] = quantized.assign(
                    pair, raw, given(pair[0]), given(pair[1])
                )
        return tracks

    def write(
        self,
        feature_path: Path,
        match_path: Path,
        linker: Linker,
        tracks: Tracks,
        stored: Callable[[Pair], Arrays],
    ) -> None:
        """Add to both files. Features first: a pair in the match file has its keypoints."""
        found = sorted(self.records.keys() - self.fixed.keys())
        own = str(match_path.resolve())
        with _rewritten(feature_path) as file:
            for name in found:
                xy = tracks.keypoints[name].astype(np.float32)
                _put(file, name, {"keypoints": xy, "score": tracks.keypoint_scores[name]})
                file[name].attrs[_USERS] = [own]
            for name in self.fixed:
                if name in file and own not in (users := file[name].attrs.get(_USERS, [own])):
                    file[name].attrs[_USERS] = [*users, own]
        with _rewritten(match_path) as file:
            for pair in self.pairs:
                raw = self._raw(linker, pair, stored(pair))
                if (reverse := _key(pair[::-1])) in file:
                    del file[reverse]
                named = dict(zip(("keypoints0", "keypoints1", "scores"), raw, strict=True))
                _put(file, _key(pair), named | tracks.matches_arrays(pair))
        if found:
            mean = np.mean([len(tracks.keypoints[name]) for name in found])
            logger.info("%d images have %.1f keypoints on average.", len(found), mean)

    def _bar(self, total: int, text: str, unit: str, done: int = 0) -> tqdm:
        return tqdm(total=total, desc=text, unit=unit, initial=done, disable=not self.progress)


def _unrepeated(xy: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Different places (N, 2) as they appear first, and the scores (N,) that they collect."""
    places, first, number = np.unique(xy, axis=0, return_index=True, return_inverse=True)
    total = np.zeros(len(places), np.float32)
    np.add.at(total, number.reshape(-1), scores)
    order = np.argsort(first)
    return places[order].astype(np.float32), total[order]


def _put(file: h5py.File, key: str, arrays: Arrays) -> None:
    if key in file:
        del file[key]
    for name, values in arrays.items():
        file[f"{key}/{name}"] = values


@contextlib.contextmanager
def _rewritten(path: Path) -> Iterator[h5py.File]:
    """An h5 file with what is put into it, complete or as it was."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        if path.exists():
            shutil.copyfile(path, temporary)
        with h5py.File(temporary, "a") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


# --------------------------------------------------------------------------------- command line


def command(argv: Sequence[str] | None = None) -> int:
    """``python -m gim_hloc.hloc_plugin.match_dense``."""
    parser = argparse.ArgumentParser(
        prog="gim_hloc.hloc_plugin.match_dense",
        description="hloc.match_dense with the same arguments and files, faster.",
    )
    parser.add_argument("--pairs", type=Path, required=True, help="'name0 name1' a line")
    parser.add_argument("--image_dir", type=Path, required=True)
    parser.add_argument("--export_dir", type=Path, help="folder of files without a path")
    parser.add_argument("--matches", type=Path, help="match file")
    parser.add_argument("--features", help="feature file (.h5), or what its name begins with")
    parser.add_argument(
        "--conf", default="gim_dkm", help=f"{', '.join(confs.MATCH_DENSE)}, or one of hloc's"
    )
    parser.add_argument("--features_ref", type=Path, nargs="+", help="keypoints that stay")
    parser.add_argument("--max_kps", type=int, default=8192, help="an image; 0: all")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--tracks", choices=get_args(Kind), default="anchored")
    # --describer: in 0.1
    parser.add_argument("--anchors", "--describer", default="auto", help="their matcher, or none")
    parser.add_argument("--batch_size", type=int, help="pairs a network call")
    parser.add_argument("--cache_gb", type=float, help="memory for encodings")
    arguments = parser.parse_args(argv)
    common.configure_logging()

    def run() -> None:
        values = vars(arguments)
        values["conf"] = _conf(values["conf"])
        values["max_kps"] = values["max_kps"] or None
        if values["features"] is not None and values["features"].endswith(".h5"):
            values["features"] = Path(values["features"])
        main(**values)

    return common.run(run)


def _conf(name: str) -> Conf:
    if name in confs.MATCH_DENSE:
        return confs.MATCH_DENSE[name]
    register()
    table: dict[str, Conf] = import_hloc("match_dense").confs
    if name not in table:
        raise InputError(f"There is no configuration {name!r}; there are: {', '.join(table)}.")
    return table[name]


if __name__ == "__main__":
    sys.exit(command())
