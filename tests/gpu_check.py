"""Everything to find out about a GPU in eight minutes, without a network.

    python tests/gpu_check.py [--dry-run] [--only PART ...] [--out FOLDER]

Writes ``gpu_check.md`` and ``gpu_check.json`` into FOLDER ($OUT, else ``gpu-check``). The items run
in order of importance in a process of their own, which is started again when one of them ends it:
what fails costs its row, and its traceback is in the JSON. ``--dry-run``: tiny sizes, on any
machine. Networks whose weights are not here get made-up ones, and rows say so: those prove
arithmetic and time it; what is found with them means nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import made_up
import numpy as np
import one_by_one
import tiny_models
import torch
from one_by_one import Row
from training_scene import make_pairs

from gim_hloc import images, matchers, weights
from gim_hloc.evaluation.benchmarks import measure
from gim_hloc.matchers.roma import DINOV2
from gim_hloc.training import presets
from gim_hloc.training.batch import collate
from gim_hloc.training.models import build_model
from gim_hloc.training.models.lightglue import DETECTOR_FILES
from gim_hloc.training.optimiser import Step, make_optimiser, scale_loss
from gim_hloc.types import Matches

TESTS = Path(__file__).resolve().parent
FIRST = ("aliked_lightglue", "xfeat_lighterglue", "gim_dkm", "gim_roma", "gim_loftr")
LIMITS = {"tests": 60, "matchers": 190, "reconstruct": 80, "training": 70, "compiled": 50}
"""Seconds of each part; what one leaves, the next ones have."""
DETECTORS = {"gim_roma": DINOV2, **DETECTOR_FILES}
"""Files that models in training want beside their own."""


class Check:
    """The parts, each a method that yields the rows of an item; made in the folder ``work``."""

    def __init__(self, work: Path, dry: bool) -> None:
        self.work, self.dry = work, dry
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.cuda = self.device.type == "cuda"

    def tasks(self) -> dict[str, list[str]]:
        """Items of each part, the most important first."""
        small = [name for name in presets.NAMES if name.startswith("small")]
        paper = [name for name in presets.NAMES if name.startswith("paper")]
        rest = [name for name in matchers.names() if name not in FIRST]  # same code, other weights
        return {
            "tests": ["gpu"],
            "matchers": [*FIRST, *(["sift"] if self.dry else rest)],
            "reconstruct": ["xfeat_lighterglue", "aliked_lightglue", "gim_dkm"],
            "training": [*small, *(f"{n} compiled" for n in small), *paper][
                : 8 if self.dry else None
            ],
            "compiled": ["gim_dkm", "gim_roma", "gim_loftr"],
        }

    # ---------------------------------------------------------------------------------- materials

    def photographs(self, count: int) -> Path:
        """Folder of pictures of the rendered room: of most of it, at three places in turn."""
        folder = self.work / f"photographs-{count}"
        if not folder.exists():
            folder.mkdir(parents=True)
            views = sorted((TESTS.parent / "examples" / "room" / "images").glob("*.jpg"))
            for number in range(count):
                picture = cv2.imread(str(views[number % len(views)]))
                x, y = ((0, 0), (80, 60), (40, 30))[number // len(views) % 3]
                size = (320, 240) if self.dry else (1600, 1200)
                part = cv2.resize(picture[y : y + 540, x : x + 720], size)
                cv2.imwrite(str(folder / f"{number:02d}.jpg"), part)
        return folder

    def provide(self, files: Sequence[str]) -> str:
        """Make up the weight files that are not here; says which weights are in use."""
        folder = self.work / "weights"  # the last of GIM_HLOC_WEIGHTS
        make = made_up.write_small_checkpoint if self.dry else made_up.write_checkpoint
        for file in files:
            try:
                weights.locate(file, download=False)
            except weights.WeightsError:
                make(file, folder / file)
        missing = [f for f in files if weights.locate(f, download=False).parent == folder]
        if 0 < len(missing) < len(files):
            return f"made up: {', '.join(missing)}"
        return "made up" if missing else "trained" if files else "none"

    def options(self, name: str, **changes: Any) -> Row:
        """Numbers of a matcher, as far as it has them: as published, or tiny."""
        known = matchers.registry.operating_point(name)
        tiny: Row = {"max_keypoints": 256, "max_cells": 256, "max_size": 320, "num_matches": 100}
        if hasattr(known, "upsample_size"):
            tiny |= {"size": (112, 112), "upsample_size": (128, 128)}
        chosen = {**(tiny if self.dry else {}), **changes}
        return {key: value for key, value in chosen.items() if hasattr(known, key)}

    def rate(self, work: Callable[[], Any], amount: int = 1) -> float:
        """How much of it ``work`` does a second; the first time does not count."""
        start, runs, least = 0.0, -1, 0.0 if self.dry else 0.3
        while runs < 2 - self.dry or time.perf_counter() - start < least:
            if runs == 0:
                start = time.perf_counter()
            work()
            if self.cuda:
                torch.cuda.synchronize()
            runs += 1
        return amount * runs / (time.perf_counter() - start)

    def peak_gib(self) -> float | None:
        """Most memory of the GPU since the last time."""
        if not self.cuda:
            return None
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return peak

    # -------------------------------------------------------------------------------------- parts

    def tests(self, _: str) -> Iterator[Row]:
        """Tests that need a GPU."""
        for name in ("aliked_lightglue", "disk_lightglue"):  # nothing can be downloaded
            self.provide(matchers.describe(name).checkpoint)
        command = [sys.executable, "-P", "-m", "pytest", "-m", "gpu", str(TESTS / "test_gpu.py")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stdout[-6000:] + done.stderr[-2000:])
        result = done.stdout.strip().splitlines()[-1]
        if self.cuda and " passed" not in result:  # pytest is content with skipped ones
            raise RuntimeError(f"No test of a GPU ran: {result}")
        yield {"result": result}

    def matchers(self, name: str) -> Iterator[Row]:
        """A matcher in float32 and in half precision."""
        exact: list[Matches] = []
        halves = ["float16", "bfloat16"] if name in FIRST else ["float16"]
        if self.dry:  # a processor computes in half precision, but slowly
            halves = ["bfloat16"] if name == "xfeat_lighterglue" else []
        knows = "precision" in self.options(name, precision="")
        for precision in ("float32", *(halves if knows else ())):
            batches = (2,) if self.dry else (1, 4, 16) if exact else (1,)
            row, found = self.figures(name, batches, precision=precision)
            yield {**row, **(agreement(exact, found) if exact else {})}
            exact = exact or found

    def compiled(self, name: str) -> Iterator[Row]:
        """A matcher with ``compile``; without it is above."""
        yield self.figures(name, (1,), compile=True)[0]

    def figures(
        self, name: str, batches: Sequence[int], **changes: Any
    ) -> tuple[Row, list[Matches]]:
        """Speed and memory of a matcher, and matches of two pairs.

        "plain" is the published flow: both images encoded anew for every pair, one pair at a time.
        The gain over it follows from the measured rates, for all pairs of the images.
        """
        used = self.provide(matchers.describe(name).checkpoint)
        records = images.scan(self.photographs(3 if self.dry else 8)).images
        matcher = matchers.load(name, device=str(self.device), **self.options(name, **changes))
        seen = [images.load(record, matcher.image_options) for record in records]

        def plain() -> list[Matches]:
            return matcher.match_batch([(matcher.encode(seen[0]), matcher.encode(seen[1]))])

        self.peak_gib()
        start = time.perf_counter()
        plain()
        row = {**changes, "weights": used, "first pair s": time.perf_counter() - start}
        row |= {"plain pairs/s": self.rate(plain), "plain GiB": self.peak_gib()}
        row["images/s"] = self.rate(lambda: matcher.encode(seen[0]))
        codes = [matcher.encode(image) for image in seen]
        pairs = list(itertools.combinations(codes, 2))
        found = matcher.match_batch(pairs[:2])
        self.peak_gib()
        for size in batches:
            rate = self.rate(lambda: matcher.match_batch(pairs[:size]), size)  # noqa: B023
            ours = len(codes) / row["images/s"] + len(pairs) / rate
            row |= {
                f"pairs/s by {size}": rate,
                f"GiB by {size}": self.peak_gib(),
                f"gain by {size}": len(pairs) / row["plain pairs/s"] / ours,
            }
        return row, found

    def reconstruct(self, name: str) -> Iterator[Row]:
        """Share of time that the GPU idles, from the first image to the matches, and from there.

        NVML's utilisation: the share of a short time before in which any kernel ran.
        """
        from gim_hloc.pipelines.reconstruct import reconstruct  # pycolmap: only this part needs it

        dense = matchers.describe(name).has_warps
        used = self.provide(matchers.describe(name).checkpoint)
        self.provide(matchers.describe("aliked_lightglue").checkpoint)  # of anchors
        folder = self.photographs(3 if self.dry else 50)
        options = self.options(name)
        values = {key: [*v] if isinstance(v, tuple) else v for key, v in options.items()}
        for stop in ("match", None):
            start = time.perf_counter()
            with Utilisation(self.cuda) as busy:
                result = reconstruct(
                    folder,
                    self.work / f"run-{name}",
                    progress=False,
                    matcher=name,
                    matcher_options=tuple(f"{key}={value}" for key, value in values.items()),
                    quality="fast" if dense else "base",
                    pairs="sequential" if dense else "auto",
                    rotations="none",
                    device=str(self.device),
                    stop_after=stop,
                )
            yield {
                "until": stop or "the end",
                "weights": used,
                "seconds": time.perf_counter() - start,
                "GPU idle": 1 - float(np.mean(busy.samples)) if busy.samples else None,
                "samples": len(busy.samples),
                "images": len(list(folder.iterdir())),
                "registered": result.registered,
                "steps": dict(result.report.get("timings", {})),
            }
            if used != "trained":
                return  # nothing to map

    def training(self, name: str) -> Iterator[Row]:
        """Optimiser steps of one batch with the numbers of a preset."""
        config = presets.preset(name.split()[0])
        model_name, values = config.model, config.model_options
        box, size = config.data.box, config.data.batch_size
        half = config.runtime.precision == "bf16"
        if self.dry:
            values = tiny_models.TINY.get(model_name, tiny_models.TINY["aliked_lightglue"])
            box, size = tiny_models.box(model_name), 1
        self.provide([DETECTORS[model_name]] if model_name in DETECTORS else [])
        torch.manual_seed(0)
        model = build_model(model_name, **values)
        model.initialise(None)
        model.train().to(self.device)
        optimiser = make_optimiser(config, model, fused=self.cuda)
        step = Step(model, optimiser, clip=config.optimiser.clip_norm, device=self.device)
        if name.endswith("compiled"):
            model.compile()
        batch = collate(make_pairs(size, box)).to(self.device)
        losses: list[float] = []

        def once() -> None:
            step.statistics.keep()
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
                loss = model(batch)["loss"]
            scale_loss(loss, 1.0).backward()
            step.apply(1e-4)
            losses.append(float(loss.detach()))

        self.peak_gib()
        start = time.perf_counter()
        once()
        row = {"box": f"{box[0]}x{box[1]}", "batch": size, "bf16": half}
        row |= {"first step s": time.perf_counter() - start, "samples/s": self.rate(once, size)}
        row |= {"GiB": self.peak_gib(), "first loss": losses[0], "last loss": losses[-1]}
        yield row


class Utilisation(threading.Thread):
    """Samples how busy the GPU is, ten times a second."""

    def __init__(self, cuda: bool) -> None:
        super().__init__(daemon=True)
        self.cuda, self.samples, self.ended = cuda, list[float](), threading.Event()

    def run(self) -> None:
        while self.cuda and not self.ended.wait(0.1):
            self.samples.append(torch.cuda.utilization() / 100)

    def __enter__(self) -> Utilisation:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()


def agreement(exact: Sequence[Matches], found: Sequence[Matches]) -> Row:
    """How far the same pairs in another number format are from float32: warps in px, or matches."""
    warps = [(a.warp, b.warp) for a, b in zip(exact, found, strict=True) if a.warp and b.warp]
    if warps:
        off, certainty = [], []
        for a, b in warps:
            half = torch.tensor(a.certainty0.shape[::-1], device=a.flow0.device) / 2
            off.append(((a.flow0 - b.flow0).float() * half).norm(dim=-1).cpu().numpy().ravel())
            certainty.append(float((a.certainty0 - b.certainty0).abs().float().mean()))
        row = {f"px off, {q} %": float(np.percentile(off, q)) for q in (50, 95)}
        return {**row, "certainty off": float(np.mean(certainty))}
    total, same = sum(map(len, exact)), 0
    for a, b in zip(exact, found, strict=True):
        ends = [torch.cat([m.keypoints0, m.keypoints1], 1) for m in (a, b)]
        if len(a) and len(b):
            same += int((torch.cdist(ends[0], ends[1], p=float("inf")).amin(1) < 1).sum())
    return {"float32's matches": total, "found within 1 px": same / total if total else None}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on any machine")
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-check")))
    parser.add_argument("--tasks", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    folder = given.out.resolve()
    results, dry = folder / "rows.jsonl", given.dry_run
    limits = {part: seconds * (20 if dry else 1) for part, seconds in LIMITS.items()}
    if given.tasks is not None:
        check = Check(given.work, dry)
        return one_by_one.work(
            lambda part, item: getattr(check, part)(item), given.tasks, results, limits
        )
    if not (dry or torch.cuda.is_available()):
        parser.error("there is no CUDA device here; --dry-run runs everything at tiny sizes")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        made = [os.environ.get(weights.ENVIRONMENT, ""), f"{place}/weights"]
        os.environ[weights.ENVIRONMENT] = os.pathsep.join(made)
        os.environ |= {"TORCHDYNAMO_DISABLE": "1"} if dry else {}  # compiling takes minutes
        command = [sys.executable, __file__, "--out", str(folder), "--work", place]
        tasks = Check(Path(place), dry).tasks()
        one_by_one.supervise(
            [*command, *["--dry-run"] * dry],
            [(part, item) for part in given.only for item in tasks[part]],
            results,
            sum(limits.values()) + 10,
        )
    facts = {
        "dry run": dry,
        "date": measure.now(),
        "machine": measure.machine(),
        "commit": measure.commit(TESTS.parent),
        "versions": measure.versions(["torch", "kornia", "pycolmap", "numpy"]),
    }
    lines = one_by_one.read(results)
    (folder / "gpu_check.json").write_text(json.dumps({**facts, "lines": lines}, indent=1))
    (folder / "gpu_check.md").write_text(text := one_by_one.markdown("gpu-check", facts, lines))
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
