"""How much faster pairs are when every image is encoded once, against both images for every pair.

    python -m gim_hloc.evaluation.benchmarks.encode_once examples/room --matchers gim_loftr

Both ways run the same network on the same pairs in turn, in one process, so that a busy machine
disturbs both alike. What the trained weights find does not matter for time: made-up weights are
used where the trained ones are missing.

The gain that is possible follows from the split of a pair's time into encoding and matching: with
``N`` images, exhaustive pairs spend ``N (N - 1)`` encodings the one way and ``N`` the other.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from tqdm import tqdm

from gim_hloc import images as image_module
from gim_hloc import matchers, weights
from gim_hloc.cli import common
from gim_hloc.errors import InputError, WeightsError
from gim_hloc.evaluation.benchmarks.measure import machine, now, versions
from gim_hloc.evaluation.made_up import write_checkpoint
from gim_hloc.matchers.common import parse_matcher_options
from gim_hloc.schedule import Budget, EncodingPool, encoding_bytes, order_pairs
from gim_hloc.types import Matcher

# What must be reached: times faster, or the share of what the split of a pair's cost allows.
LEAST_GAIN = {"gim_loftr": 2.5}
LEAST_SHARE = 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeOnceOptions:
    """Time pairs with every image encoded once, and with both images encoded for every pair."""

    images: Annotated[Path, tyro.conf.Positional]
    """Folder of images."""
    matchers: tuple[str, ...] = ("gim_loftr", "gim_dkm", "gim_roma")
    """Dense and semi-dense matchers."""
    count: int = 8
    """Images, all pairs of which are matched."""
    matcher_options: tuple[str, ...] = ()
    """Options of the matchers as NAME=VALUE, e.g. "size=[192, 256]"; sizes decide the time."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    compare_precision: bool = False
    """On a GPU: also time float32 against float16 and compare their warps."""


@dataclasses.dataclass(kw_only=True)
class Timing:
    """Seconds of the two ways over the same pairs."""

    matcher: str
    size: str
    pairs: int
    once_s: float  # per pair, every image encoded once
    each_s: float  # per pair, both images encoded for every pair
    encode_s: float  # one image, median
    match_s: float  # one pair, median
    encodings: int  # of the first way
    images: int
    megabytes: float  # of one encoding
    difference: float  # largest, of results of the two ways

    @property
    def gain(self) -> float:
        """How many times faster the first way is."""
        return self.each_s / self.once_s

    @property
    def allowed(self) -> float:
        """The gain that the split of the cost allows."""
        each = 2 * self.encode_s + self.match_s
        once = self.encode_s * self.images / self.pairs + self.match_s
        return each / once

    def failures(self) -> list[str]:
        """What was promised and is missed."""
        found = []
        if self.encodings != self.images:
            found.append(f"{self.encodings} encodings of {self.images} images")
        if self.difference != 0:
            found.append(f"the two ways differ by {self.difference:g}")
        least = LEAST_GAIN.get(self.matcher)
        if least is not None and self.gain < least:
            found.append(f"{self.gain:.2f} times faster, promised {least}")
        if self.gain < LEAST_SHARE * self.allowed:
            found.append(
                f"{self.gain:.2f} times faster, less than {LEAST_SHARE} of {self.allowed:.2f}"
            )
        return [f"{self.matcher}: {text}" for text in found]


_HEADER = (
    "| matcher | network size | pairs | encodings | encode s/image | match s/pair | share of "
    "encoding in a pair | each pair anew s/pair | encode once s/pair | gain | allowed by the split "
    "| MB an encoding |\n" + "|---" * 12 + "|"
)


def row(timing: Timing) -> str:
    """One line of the table."""
    encoding = 2 * timing.encode_s
    cells = [
        timing.matcher,
        timing.size,
        f"{timing.pairs}",
        f"{timing.encodings}",
        f"{timing.encode_s:.3f}",
        f"{timing.match_s:.3f}",
        f"{encoding / (encoding + timing.match_s):.0%}",
        f"{timing.each_s:.3f}",
        f"{timing.once_s:.3f}",
        f"{timing.gain:.2f}",
        f"{timing.allowed:.2f}",
        f"{timing.megabytes:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def provide_weights(names: Sequence[str], folder: Path) -> list[str]:
    """Write made-up checkpoints for the matchers whose trained ones are missing.

    Returns:
        Names of the files that were made up. The folder is put into the search path.
    """
    made = []
    for file in dict.fromkeys(f for name in names for f in matchers.describe(name).checkpoint):
        try:
            weights.locate(file, download=False)
        except WeightsError:
            write_checkpoint(file, folder / file)
            made.append(file)
    if made:
        others = os.environ.get(weights.ENVIRONMENT)
        os.environ[weights.ENVIRONMENT] = os.pathsep.join(
            [*([others] if others else []), str(folder)]
        )
    return made


def time_matcher(matcher: Matcher, read: dict[str, Any], *, progress: bool = True) -> Timing:
    """Time both ways on all pairs of some images, pair by pair in turn."""
    names = sorted(read)
    order = order_pairs(list(itertools.combinations(names, 2)), len(names))
    encode_s: list[float] = []
    match_s: list[float] = []

    def clock() -> float:
        if matcher.device.type == "cuda":
            torch.cuda.synchronize(matcher.device)
        return time.perf_counter()

    def encode(image: Any) -> Any:
        start = clock()
        encoding = matcher.encode(image)
        encode_s.append(clock() - start)
        return encoding

    def match(a: Any, b: Any) -> list[torch.Tensor]:
        start = clock()
        if matcher.info.has_warps:  # drawing matches from them is no part of the network
            (warp,) = matcher.warp_batch([(a, b)])
            found = [warp.flow0, warp.flow1, warp.certainty0, warp.certainty1]
        else:
            matches = matcher.match(a, b)
            found = [matches.keypoints0, matches.keypoints1, matches.scores]
        match_s.append(clock() - start)
        return found

    match(encode(read[names[0]]), encode(read[names[1]]))  # warm up
    encode_s.clear()
    match_s.clear()
    once = each = difference = 0.0
    bar = tqdm(order, desc=matcher.info.name, unit=" pairs", disable=not progress)
    with EncodingPool(
        read.__getitem__, encode, order, Budget(device=1 << 60), matcher.device
    ) as pool:
        for position, pair in enumerate(bar):
            start = clock()
            a, b = pool.acquire([pair], position)[0]
            first = match(a, b)
            size = encoding_bytes(a)
            pool.release([pair])
            del a, b
            middle = clock()
            second = match(encode(read[pair[0]]), encode(read[pair[1]]))
            end = clock()
            once, each = once + middle - start, each + end - middle
            difference = max(difference, _difference(first, second))
        encodings = len(pool.encoded)
    options = matcher.options
    shown = getattr(options, "size", None) or read[names[0]].network_size[::-1]
    upsampled = getattr(options, "upsample_size", None)
    return Timing(
        matcher=matcher.info.name,
        size=" -> ".join(
            f"{h} x {w}" for h, w in (shown, upsampled or shown)[: 1 + bool(upsampled)]
        ),
        pairs=len(order),
        once_s=once / len(order),
        each_s=each / len(order),
        encode_s=statistics.median(encode_s),
        match_s=statistics.median(match_s),
        encodings=encodings,
        images=len(names),
        megabytes=size / 1e6,
        difference=difference,
    )


def _difference(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    largest = 0.0
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel():
            largest = max(largest, float((a.float() - b.float()).abs().max()))
    return largest


def compare_precisions(name: str, options: EncodeOnceOptions, read_pair: Any) -> str:
    """On a GPU: pairs a second, memory and warps in float16 against float32."""
    overrides = parse_matcher_options(options.matcher_options)
    found = {}
    for precision in ("float32", "float16"):
        matcher = matchers.load(
            name, device=options.device, **{**overrides, "precision": precision}
        )
        a, b = (matcher.encode(image) for image in read_pair(matcher))
        torch.cuda.reset_peak_memory_stats()
        matcher.match(a, b)
        torch.cuda.synchronize()
        start, rounds = time.perf_counter(), 10
        for _ in range(rounds):
            matcher.match(a, b)
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / rounds
        warp = matcher.warp_batch([(a, b)])[0] if matcher.info.has_warps else None
        found[precision] = (1 / seconds, torch.cuda.max_memory_allocated() / 2**30, warp)
        del matcher, a, b
        torch.cuda.empty_cache()
    text = ", ".join(f"{k}: {v[0]:.2f} pairs/s, {v[1]:.2f} GiB" for k, v in found.items())
    full, half = found["float32"][2], found["float16"][2]
    if full is not None and half is not None:
        cells = full.flow0.new_tensor([full.flow0.shape[1] / 2, full.flow0.shape[0] / 2])
        apart = ((full.flow0 - half.flow0.float()) * cells).norm(dim=-1).flatten()
        middle, most = float(apart.median()), float(apart.kthvalue(int(0.9 * len(apart)))[0])
        text += f"; warps apart: median {middle:.3f} px, 90 % below {most:.3f} px"
    return f"{name}: {text}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the module."""
    options = tyro.cli(EncodeOnceOptions, args=common.prog(argv))
    common.configure_logging()
    return common.run(lambda: _run(options))


def _run(options: EncodeOnceOptions) -> int:
    records = image_module.scan(options.images).images[: options.count]
    if len(records) < 3:
        raise InputError(f"{options.images} has {len(records)} usable images; three are needed.")
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        made = provide_weights(options.matchers, Path(folder))
        sys.stdout.write(
            f"date: {now()}\nmachine: {machine()}\nversions: {versions(['torch', 'kornia'])}\n"
            + (f"made-up weights: {', '.join(made)}\n" if made else "")
            + _HEADER
            + "\n"
        )
        for name in options.matchers:
            overrides = parse_matcher_options(options.matcher_options)
            matcher = matchers.load(name, device=options.device, **overrides)
            read = {r.name: image_module.load(r, matcher.image_options) for r in records}
            timing = time_matcher(matcher, read)
            sys.stdout.write(row(timing) + "\n")
            sys.stdout.flush()
            failures += timing.failures()
            if options.compare_precision and matcher.device.type == "cuda":
                del matcher
                sys.stdout.write(
                    compare_precisions(
                        name,
                        options,
                        lambda m: [image_module.load(r, m.image_options) for r in records[:2]],
                    )
                    + "\n"
                )
    for failure in failures:
        sys.stdout.write(f"MISSED: {failure}\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
