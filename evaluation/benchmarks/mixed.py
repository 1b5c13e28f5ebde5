"""Folders mixed from several places: no model may join two places, and no image may get lost.

    python -m gim_hloc.evaluation.benchmarks.mixed [--shared ../shared/data] [--work DIR]

Each matcher encodes and matches all places once. Mixes of some of them, and each place alone, are
then reconstructed from those files. Exit code 1: a model joins places, or an image is lost.
"""

from __future__ import annotations

import itertools
import random
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from gim_hloc import colmap, matchers
from gim_hloc import images as image_module
from gim_hloc.cli import common
from gim_hloc.colmap import PairVerification
from gim_hloc.errors import InputError, MappingError
from gim_hloc.evaluation.benchmarks.measure import machine
from gim_hloc.options import MapOptions, Mapper, VerifyOptions
from gim_hloc.pairs.files import write_pairs
from gim_hloc.pipelines.extension import gather
from gim_hloc.pipelines.outcome import QUANTILES, versions
from gim_hloc.pipelines.reconstruct import reconstruct
from gim_hloc.types import Quality

_PLACES = ("fountain-P11", "cyprus", "Herz-Jesus-P8", "fox")


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Reconstruct folders with photographs of several places, and count what was joined or lost."""

    room: Path = Path("examples/room")
    """The example scene."""
    shared: Path = Path("../shared/data")
    """Folder of the shared scenes."""
    images: int = 4
    """Images of a place, the first ones by name."""
    sizes: tuple[int, ...] = (2, 3, 4, 5)
    """Places in a mix."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the choice of places and of COLMAP."""
    matchers: tuple[str, ...] = ("aliked_lightglue", "disk_lightglue", "sift")
    """Matchers to run."""
    mappers: tuple[Mapper, ...] = ("incremental", "global")
    """COLMAP's mappers to run."""
    quality: Quality = "base"
    """Operating point of the matchers."""
    max_size: int | None = None
    """Long side in pixels that they see, instead of the operating point's."""
    min_confidence_sum: float | None = None
    """Bound of the verification instead of the matcher's own."""
    work: Path | None = None
    """Where to keep the runs, which are reused; a temporary folder otherwise."""


@dataclass(frozen=True)
class Judgement:
    """What became of a mix."""

    joined: int  # models with images of several places
    lost: frozenset[str]  # images that are in a model of their place alone, and in none of the mix


def place_of(name: str) -> str:
    """Place of an image of the mix."""
    return name.split("/", 1)[0]


def judge(models: Sequence[Collection[str]], alone: Collection[str]) -> Judgement:
    """Judge the models of a mix.

    Args:
        models: images of each model.
        alone: images that are registered where each place of the mix stands alone.
    """
    joined = sum(len({place_of(name) for name in model}) > 1 for model in models)
    return Judgement(joined, frozenset(alone).difference(*models))


def mixes(
    places: Sequence[str], sizes: Sequence[int], seeds: Sequence[int]
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(seed, places) of every mix."""
    for size, seed in itertools.product(sizes, seeds):
        yield seed, tuple(sorted(random.Random(seed).sample(sorted(places), size)))


def spread(pairs: Sequence[PairVerification]) -> dict[str, list[float]]:
    """Confidence sums of the pairs of one place ("related") and of two ("unrelated")."""
    found: dict[str, list[float]] = {"related": [], "unrelated": []}
    for pair in pairs:
        same = place_of(pair.name0) == place_of(pair.name1)
        found["related" if same else "unrelated"].append(pair.confidence or 0.0)
    return found


class _Benchmark:
    def __init__(self, options: BenchmarkOptions, work: Path) -> None:
        self.options, self.work = options, work
        folders = {"room": options.room / "images"}
        folders |= {name: options.shared / name / "images" for name in _PLACES}
        if max(options.sizes) > len(folders):
            raise InputError(f"There are {len(folders)} places; --sizes asks for more.")
        self.names: dict[str, list[str]] = {}
        for place, folder in folders.items():
            records = image_module.scan(folder).images[: options.images]
            gather(records, work / "images" / place)
            self.names[place] = [f"{place}/{record.name}" for record in records]

    def union(self, matcher: str) -> list[PairVerification]:
        """Encode, match and verify everything once, every geometry whatever its sum."""
        folder = self.work / matcher
        reconstruct(
            self.work / "images", folder, matcher=matcher, pairs="exhaustive",
            quality=self.options.quality, max_size=self.options.max_size, rotations="none",
            verify=VerifyOptions(min_confidence_sum=0), stop_after="verify",
        )  # fmt: skip
        names = sorted(name for place in self.names.values() for name in place)
        return colmap.read_verification(
            folder / "database.db", list(itertools.combinations(names, 2))
        )

    def models(
        self, matcher: str, mapper: Mapper, seed: int, places: Sequence[str]
    ) -> list[set[str]]:
        """Images of each model that a folder with some of the places gives."""
        folder = self.work / "mixes" / "+".join(places)
        for place in places:
            records = image_module.scan(self.work / "images" / place).images
            gather(records, folder / "images" / place)
        names = sorted(name for place in places for name in self.names[place])
        write_pairs(folder / "pairs.txt", list(itertools.combinations(names, 2)))
        try:
            result = reconstruct(
                folder / "images", folder / f"{matcher}-{mapper}-{seed}", progress=False,
                features=self.work / matcher / "features.h5",
                matches=self.work / matcher / "matches.h5",
                pairs=str(folder / "pairs.txt"), mapper=mapper, seed=seed, deterministic=True,
                refine_keypoints=False, export=(),
                verify=VerifyOptions(min_confidence_sum=self.bound(matcher)),
            )  # fmt: skip
        except MappingError:
            return []
        found: list[set[str]] = [set() for _ in result.models]
        for index in range(len(found)):
            model = result.model(index)
            found[index] = {model.image(i).name for i in model.reg_image_ids()}
        return found

    def bound(self, matcher: str) -> float:
        """The sum below which a pair is dropped; imported matches have none of their own."""
        if self.options.min_confidence_sum is not None:
            return self.options.min_confidence_sum
        return matchers.describe(matcher).min_confidence_sum.get(self.options.quality, 0.0)

    def run(self) -> int:
        """Print both tables; returns how many models join places plus how many images are lost."""
        options = self.options
        _say(f"machine: {machine()}\nversions: {versions()}")
        _say(f"places: { {place: len(names) for place, names in self.names.items()} }\n")
        _say("| matcher, quality | bound | pairs | " + " | ".join(f"{q:.0%}" for q in QUANTILES))
        _say("|---" * (3 + len(QUANTILES)) + "|")
        for matcher in options.matchers:
            for kind, sums in spread(self.union(matcher)).items():
                cells = [f"{value:.1f}" for value in np.quantile(sums, QUANTILES)]
                head = f"| {matcher} {options.quality} | {self.bound(matcher):g} "
                _say(f"{head}| {len(sums)} {kind} | " + " | ".join(cells) + " |")
        _say("\n| matcher | mapper | places | mixes | models | joining places | images lost |")
        _say("|---" * 7 + "|")
        wrong = 0
        for matcher, mapper in itertools.product(options.matchers, options.mappers):
            alone = {
                place: _kept(self.models(matcher, mapper, options.seeds[0], (place,)))
                for place in self.names
            }
            for size in options.sizes:
                found: list[Judgement] = []
                models = 0
                for seed, places in mixes(list(self.names), (size,), options.seeds):
                    mixed = self.models(matcher, mapper, seed, places)
                    models += len(mixed)
                    found.append(judge(mixed, set().union(*(alone[place] for place in places))))
                joined, lost = sum(j.joined for j in found), sum(len(j.lost) for j in found)
                wrong += joined + lost
                counts = [size, len(found), models, joined, lost]
                _say(f"| {matcher} | {mapper} | " + " | ".join(map(str, counts)) + " |")
        return wrong


def _kept(models: Sequence[set[str]]) -> set[str]:
    """Images of models that are kept beside others; smaller ones are, where there is no other."""
    return set().union(*(m for m in models if len(m) >= MapOptions().min_model_size))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the module."""
    options = tyro.cli(BenchmarkOptions, args=common.prog(argv))
    common.configure_logging()

    def run() -> int:
        with tempfile.TemporaryDirectory() as folder:
            return int(_Benchmark(options, options.work or Path(folder)).run() > 0)

    return common.run(run)


if __name__ == "__main__":
    sys.exit(main())
