"""Choosing pairs by options: one way, a union such as ``sequential+retrieval``, or ``auto``."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np

from gim_hloc.errors import InputError, some
from gim_hloc.geometry.graph import connected
from gim_hloc.options import PairOptions
from gim_hloc.pairs.base import Pair, canonical
from gim_hloc.pairs.budget import Budget
from gim_hloc.pairs.covisibility import covisibility
from gim_hloc.pairs.exhaustive import exhaustive
from gim_hloc.pairs.files import read_pairs
from gim_hloc.pairs.poses import poses
from gim_hloc.pairs.retrieval import (
    ImageLoader,
    make_descriptor,
    read_global_descriptors,
    retrieval,
)
from gim_hloc.pairs.sequential import sequences, sequential
from gim_hloc.pairs.spatial import Position, has_fix, spatial

logger = logging.getLogger(__name__)

FEWEST = 20  # partners per image, where their number is not given


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What ``select`` is going to do; known before anything is computed."""

    components: tuple[str, ...]  # names of STRATEGIES, in the order of the union
    mode: str  # the same, joined by "+"
    why: str  # one sentence for users
    neighbours: int  # the resolved k
    needs_descriptors: bool  # whether local descriptors of all images must be there first
    files: tuple[Path, ...] = ()  # pair lists to read


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The chosen pairs."""

    pairs: list[Pair]  # sorted, without duplicates
    mode: str  # resolved, e.g. "sequential+retrieval"
    why: str  # one sentence for users
    counts: dict[str, int]  # pairs that each component found; pairs found twice count for both
    notes: list[str] = field(default_factory=list)  # what a user should know, one sentence each
    left: int = 0  # so many pairs wait for what these show
    budget: Budget | None = None  # that they are taken from; not kept


def plan(options: PairOptions, names: Sequence[str], frames: Collection[str] = ()) -> Plan:
    """Resolve the mode and check that what it needs exists.

    Args:
        options: pair options.
        names: the usable images.
        frames: those of them that are frames of videos.

    Raises:
        InputError: if the mode is unknown, or a file or model it needs is not given or missing.
    """
    n = len(set(names))
    k = options.neighbours or min(50, max(FEWEST, round(math.sqrt(n))))
    components, files = _parse_mode(options.mode)
    why = ""
    if "auto" in components:
        chosen, why = _auto(options, names, k, frames)
        i = components.index("auto")
        components = [*components[:i], *chosen, *components[i + 1 :]]
    components = list(dict.fromkeys(components))
    if "file" in components and not files:
        if options.pairs_file is None:
            raise InputError("Pairs from a file: name the pair list (option pairs_file)")
        files = [options.pairs_file]
    for path in files:
        if not path.is_file():
            raise InputError(f"There is no pair list '{path}'")
    for component in ("poses", "covisibility"):
        if component not in components:
            continue
        if options.model is None:
            raise InputError(
                f"Pairs from {component} need a COLMAP model (--pair.model, in gim-pairs --model)."
            )
        if not options.model.is_dir():
            raise InputError(f"There is no COLMAP model folder '{options.model}'")
    searches = "retrieval" in components or ("sequential" in components and options.loop_every > 0)
    needs_local = False
    if searches and options.global_descriptors is None:
        needs_local = make_descriptor(options.descriptor).needs_local
    elif searches and options.global_descriptors and not options.global_descriptors.is_file():
        raise InputError(f"There is no descriptor file '{options.global_descriptors}'")
    mode = "+".join(components)
    return Plan(
        components=tuple(components),
        mode=mode,
        why=why or f"{n} images, pairs as asked for: {_described(components, options, k)}",
        neighbours=k,
        needs_descriptors=needs_local,
        files=tuple(files),
    )


def select(
    options: PairOptions,
    names: Sequence[str],
    *,
    local_descriptors: Callable[[], Mapping[str, np.ndarray]] | None = None,
    gps: Mapping[str, Position | None] | None = None,
    load_image: ImageLoader | None = None,
    left_out: Collection[str] = (),
    frames: Collection[str] = (),
    adaptive: bool = False,
) -> Selection:
    """Choose pairs.

    Args:
        options: pair options.
        names: the usable images.
        local_descriptors: gives name -> (n, D) local descriptors, strongest first; called only if
            needed, once.
        gps: name -> (latitude, longitude in degrees, altitude in metres or None).
        load_image: (name, ``ImageOptions``) -> ``ImageData``, for global descriptors that look at
            the image.
        left_out: images that exist but are not usable; a pair list may name them.
        frames: see ``plan``.
        adaptive: half of the similar images wait, so that they can go where the graph is weak.

    Returns:
        The pairs, sorted, and what to tell the user about them.

    Raises:
        InputError: if something a mode needs is missing, or no pair results.
    """
    names = sorted(set(names))
    chosen = plan(options, names, frames)
    known = Known(
        options, names, chosen, local_descriptors, gps or {}, load_image, left_out, adaptive
    )
    found, notes = known.found, known.notes
    # Retrieval comes last: it looks for what the name order did not give.
    for component in sorted(chosen.components, key=lambda c: c == "retrieval"):
        found[component] = STRATEGIES[component].choose(known)
    union = canonical(pair for pairs in found.values() for pair in pairs)
    if not union and len(names) > 1:
        raise InputError(f"The mode {chosen.mode} gives no pair of the {len(names)} images")
    nothing = [component for component in chosen.components if not found[component]]
    if nothing and union:
        others = " beyond those of the other modes" if len(chosen.components) > 1 else ""
        notes.append(f"No pair came from {' and '.join(nothing)}{others}.")
    if known.budget is None:
        notes.extend(connectivity_notes(names, union))
    selection = Selection(
        pairs=union,
        mode=chosen.mode,
        why=chosen.why,
        counts={component: len(found[component]) for component in chosen.components},
        notes=notes,
        left=known.budget.left if known.budget else 0,
        budget=known.budget,
    )
    logger.debug("%d pairs (%s): %s", len(union), selection.mode, selection.why)
    return selection


@dataclass(frozen=True)
class Strategy:
    """A way of choosing pairs.

    Attributes:
        words: what it does, for users; ``{k}`` and fields of ``PairOptions`` are filled in.
        choose: gives the pairs, sorted.
        by_order: of the names; retrieval then looks for what is further away.
    """

    words: str
    choose: Callable[[Known], list[Pair]]
    by_order: bool = False


@dataclass
class Known:
    """What strategies choose by.

    Attributes:
        options: of the pairs.
        names: of the images, sorted.
        plan: what is to be done.
        local_descriptors: see ``select``.
        gps: see ``select``.
        load_image: see ``select``.
        left_out: see ``select``.
        adaptive: see ``select``.
        budget: of the pairs that wait.
        found: pairs of the strategies before.
        notes: for users, one sentence each.
    """

    options: PairOptions
    names: list[str]
    plan: Plan
    local_descriptors: Callable[[], Mapping[str, np.ndarray]] | None
    gps: Mapping[str, Position | None]
    load_image: ImageLoader | None
    left_out: Collection[str]
    adaptive: bool = False
    budget: Budget | None = None
    found: dict[str, list[Pair]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def k(self) -> int:
        """Partners an image."""
        return self.plan.neighbours

    @functools.cached_property
    def descriptors(self) -> tuple[np.ndarray, Mapping[str, np.ndarray] | None]:
        """(N, D) global descriptors of the images, and the local ones that were used."""
        rows, local = _describe(self.options, self.names, self.local_descriptors, self.load_image)
        empty = [name for name, row in zip(self.names, rows, strict=True) if not row.any()]
        if empty:
            self.notes.append(f"Without any feature, so never similar: {_counted(empty)}.")
        return rows, local


def _exhaustive(known: Known) -> list[Pair]:
    return exhaustive(known.names)


def _sequential(known: Known) -> list[Pair]:
    options = known.options
    rows, local = known.descriptors if options.loop_every else (None, None)
    return sequential(
        known.names,
        window=options.window,
        quadratic=options.quadratic,
        loop_every=options.loop_every,
        loop_neighbours=known.k,
        descriptors=rows,
        local=local,
    )


def _retrieval(known: Known) -> list[Pair]:
    rows, local = known.descriptors
    how: dict[str, Any] = {
        "k": known.k,
        "min_score": known.options.min_score,
        "exclude": [
            p for name, found in known.found.items() if STRATEGIES[name].by_order for p in found
        ],
        "local": local,
    }
    if not known.adaptive:
        return retrieval(known.names, rows, **how)
    budget = Budget(known.names, rows, **how)
    known.budget = budget if budget.left else None  # of few images no pair waits
    return budget.first


def _listed(known: Known) -> list[Pair]:
    return canonical(
        pair
        for path in known.plan.files
        for pair in read_pairs(path, known.names, skip=known.left_out)
    )


def is_numbered(names: Sequence[str]) -> bool:
    """Whether file names look like frames or shots in order, in each folder by itself.

    That is: most names share a pattern whose last number counts up in small or regular steps
    (``frame_0030``, ``frame_0060``; ``IMG_2331``, ``IMG_2332``), or hold date and time. Hashes and
    the scattered numbers of photo sites do not count.
    """
    ordered = 0
    for sequence in sequences(names).values():
        patterns: dict[str, list[tuple[int, ...]]] = {}
        for name in sequence:
            stem = PurePosixPath(name).stem.lower()
            numbers = tuple(int(digits) for digits in re.findall(r"\d+", stem))
            patterns.setdefault(re.sub(r"\d+", "#", stem), []).append(numbers)
        ordered += sum(len(ns) for ns in patterns.values() if _counts_up(ns))
    return ordered >= 0.8 * len(set(names))


def _counts_up(numbers: list[tuple[int, ...]]) -> bool:
    """Whether the numbers of one name pattern progress like those of a sequence."""
    numbers = sorted(numbers)
    if len(numbers) < 3 or not numbers[0]:
        return False
    if all(_is_time(n) for n in numbers):
        return True
    steps = [b[-1] - a[-1] for a, b in itertools.pairwise(numbers) if a[:-1] == b[:-1]]
    if len(steps) < 0.75 * (len(numbers) - 1):
        return False
    median = float(np.median(steps))
    # Steps of numbers scattered at random are exponentially distributed: about half of them lie
    # within a factor of two of the median, far from three quarters.
    regular = sum(step <= 10 or median / 2 <= step <= median * 2 for step in steps)
    return regular >= 0.75 * len(steps)


def _is_time(numbers: tuple[int, ...]) -> bool:
    """Whether numbers hold a date YYYYMMDD followed by a time HHMMSS."""
    for date, time in itertools.pairwise(numbers):
        year, month, day = date // 10000, date // 100 % 100, date % 100
        while time > 235959:  # milliseconds follow without a separator
            time //= 10
        if 1990 <= year < 2100 and 1 <= month <= 12 and 1 <= day <= 31 and time % 100 < 60:
            return True
    return False


def _parse_mode(mode: str) -> tuple[list[str], list[Path]]:
    """Component names, and the pair lists that stand in the mode by their path."""
    components: list[str] = []
    files: list[Path] = []
    # A path may hold a plus sign: try the whole first.
    for part in [mode] if Path(mode).is_file() else mode.split("+"):
        word = part.strip()
        if word in ("auto", *STRATEGIES):
            components.append(word)
        elif Path(word.removeprefix("file:")).is_file():
            components.append("file")
            files.append(Path(word.removeprefix("file:")))
        else:
            raise InputError(
                f"Unknown way of choosing pairs: '{word}'. Known are auto, "
                f"{', '.join(STRATEGIES)}, unions such as sequential+retrieval, and the path of a "
                "pair list that exists."
            )
    return components, files


def _auto(
    options: PairOptions, names: Sequence[str], k: int, frames: Collection[str]
) -> tuple[list[str], str]:
    """Components and reason for the mode auto."""
    n, limit = len(set(names)), options.exhaustive_limit
    if frames and (n > limit or set(names) <= set(frames)):
        components = ["sequential", "retrieval"]
        reason = f"{n} images, {len(frames)} of them frames of videos"
    elif n <= limit:
        components = ["exhaustive"]
        reason = f"{n} images, at most {limit}"
    elif is_numbered(names):
        components = ["sequential", "retrieval"]
        reason = f"{n} images > {limit}, file names are numbered"
    else:
        components = ["retrieval"]
        reason = f"{n} images > {limit}, file names are not numbered in order"
    return components, f"{reason}: {_described(components, options, k)}"


def _described(components: Sequence[str], options: PairOptions, k: int) -> str:
    """What a union does, in words."""
    more = " further" if any(STRATEGIES[name].by_order for name in components) else ""
    fields = {**vars(options), "k": k, "more": more}
    return " plus ".join(STRATEGIES[name].words.format_map(fields) for name in components)


def _describe(
    options: PairOptions,
    names: list[str],
    local_descriptors: Callable[[], Mapping[str, np.ndarray]] | None,
    load_image: ImageLoader | None,
) -> tuple[np.ndarray, Mapping[str, np.ndarray] | None]:
    """(N, D) global descriptors, from a file or computed, and the local ones that were used."""
    if options.global_descriptors is not None:
        return read_global_descriptors(options.global_descriptors, names), None
    describe = make_descriptor(options.descriptor, clusters=options.clusters, seed=options.seed)
    local = None
    if describe.needs_local:
        if local_descriptors is None:
            raise InputError(
                "Similar images are found by local descriptors, and this matcher has none: choose "
                "a sparse matcher, another way of choosing pairs, or give global descriptors"
            )
        local = local_descriptors()
    return np.asarray(describe(names, local=local, load_image=load_image)), local


def _spatial(known: Known) -> list[Pair]:
    """Spatial pairs of the images that have a position."""
    names, options = known.names, known.options
    positions = {name: p for name in names if (p := known.gps.get(name)) and has_fix(p)}
    if len(positions) < 2:
        raise InputError(
            f"Spatial pairs need GPS positions in the EXIF data, and {len(positions)} of "
            f"{len(names)} images have one: choose another way of choosing pairs"
        )
    without = [name for name in names if name not in positions]
    if without:
        known.notes.append(
            f"Without a GPS position, so without spatial pairs: {_counted(without)}."
        )
    return spatial(
        positions,
        max_neighbours=known.k,
        max_distance_m=options.max_distance_m,
        use_altitude=options.use_altitude,
    )


def _poses(known: Known) -> list[Pair]:
    from gim_hloc import colmap  # slow to import, and most ways do without

    cameras = _of_model(known, "poses", colmap.model_cameras)
    return poses(cameras, k=known.k, max_angle_deg=known.options.max_angle_deg)


def _covisibility(known: Known) -> list[Pair]:
    from gim_hloc import colmap

    observations = _of_model(known, "covisibility", colmap.model_observations)
    return covisibility(observations, k=known.k)


Of = TypeVar("Of")


def _of_model(known: Known, strategy: str, read: Callable[[Path], dict[str, Of]]) -> dict[str, Of]:
    """What a COLMAP model says about the images."""
    model = known.options.model
    if model is None:
        raise InputError(
            f"Pairs from {strategy} need a COLMAP model (--pair.model, in gim-pairs --model)."
        )
    inside = {name: what for name, what in read(model).items() if name in set(known.names)}
    if len(inside) < 2:
        raise InputError(
            f"The model '{model}' holds {len(inside)} of the {len(known.names)} images: its "
            "image names must be paths relative to the image folder"
        )
    outside = [name for name in known.names if name not in inside]
    if outside:
        known.notes.append(
            f"Not in the model, so without pairs by {strategy}: {_counted(outside)}."
        )
    return inside


# By their names in --pairs. They may be joined: sequential+retrieval.
STRATEGIES = {
    "exhaustive": Strategy("every image with every other", _exhaustive),
    "sequential": Strategy(
        "neighbours in name order (window {window})", _sequential, by_order=True
    ),
    "retrieval": Strategy("the {k} most similar{more} images", _retrieval),
    "spatial": Strategy("the {k} nearest images within {max_distance_m:g} m by GPS", _spatial),
    "poses": Strategy("the {k} nearest cameras that look the same way", _poses),
    "covisibility": Strategy("the {k} images that share most points in the model", _covisibility),
    "file": Strategy("the given pair list", _listed),
}


def connectivity_notes(names: Sequence[str], pairs: Sequence[Pair]) -> list[str]:
    """What the pair graph forbids: images without pairs, and parts that cannot meet."""
    groups = connected(names, pairs)
    notes = []
    alone = sorted(name for group in groups if len(group) == 1 for name in group)
    if alone:
        notes.append(f"In no pair, so they cannot be registered: {_counted(alone)}.")
    sizes = [len(group) for group in groups if len(group) > 1]
    if len(sizes) > 1:
        shown = ", ".join(map(str, sizes[:5])) + (", …" if len(sizes) > 5 else "")
        notes.append(
            f"No pair connects the {len(sizes)} groups of {shown} images: they become separate "
            "models. Add retrieval to the ways of choosing pairs to connect them."
        )
    return notes


def _counted(names: Sequence[str]) -> str:
    """A count and the first few names."""
    return f"{len(names)} image{'s' if len(names) != 1 else ''} ({some(names)})"
