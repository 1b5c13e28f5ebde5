"""From a model to depth maps, a dense cloud and a mesh: the steps, in their order.

Depth comes from grey values compared (``geometry.stereo``) or from the warps of the run's dense
matcher; what several views agree on is written in COLMAP's format, and fused and meshed by COLMAP.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gim_hloc import colmap, engine, matchers
from gim_hloc import images as image_module
from gim_hloc.cache import Cache
from gim_hloc.colmap import dense
from gim_hloc.colmap.dense import DenseView
from gim_hloc.errors import InputError, some
from gim_hloc.files import as_path
from gim_hloc.geometry import depth, stereo
from gim_hloc.images import ImageRecord
from gim_hloc.masks import MaskFolder
from gim_hloc.matchers.common import parse_matcher_options, resolve_device
from gim_hloc.options import DepthOptions, Where, build, given, select
from gim_hloc.pipelines import previews
from gim_hloc.pipelines.exports import folder_of_run, product_key, require_model
from gim_hloc.pipelines.maps import open_map
from gim_hloc.pipelines.matching import Pair, Photographs, spread, take_parts
from gim_hloc.pipelines.methods import CASCADES
from gim_hloc.pipelines.options import DensifyOptions, ReconstructOptions
from gim_hloc.pipelines.run import RunFolder, Step, part_of, progress_bar, scanned
from gim_hloc.store import digest
from gim_hloc.types import Warp

logger = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]

SIZES = {"fast": 640, "base": 1000, "precise": 1600}
"""Long side of depth maps by quality, pixels."""
FILES = ("dense/**/*",)
CACHE = "depth.cache"
FORMAT = 1  # raised when the search changes, so that depth of before is not reused

# Score from which a depth counts where two other views agree, and where one does: correlation of
# grey values; or trust in warps, which two others have agreed on already.
TRUST = {"images": (0.2, 0.3), "warps": (0.1, 0.1)}
_TOLERANCE = 0.01  # relative difference of depths that agree
_EPIPOLAR_PX = 1.5  # of a map: places of warps farther from the epipolar line are not used
_CYCLE_CELLS = 1.0  # after which a place of a warp counts half
_SPECKLE = 30  # pixels: smaller patches of depth are left out


# ------------------------------------------------------------------------------------------ tasks


@dataclass(frozen=True)
class StereoTask:
    """Depth of views by comparing grey values.

    Attributes:
        workspace: with the undistorted images.
        views: all, by name.
        photographs: for their masks.
        threads: views side by side.
    """

    workspace: Path
    views: Mapping[str, DenseView]
    photographs: Photographs
    threads: int

    def open(self, device: str) -> Callable[[Sequence[str]], Iterator[tuple[str, Arrays]]]:
        """Nothing is loaded before it is needed."""
        where = resolve_device(device)

        @functools.lru_cache(maxsize=32)
        def gray(name: str) -> stereo.GrayView:
            view = self.views[name]
            size = max(view.camera.width, view.camera.height)
            path = self.workspace / "images" / name
            rgb = image_module.read_rgb(path, max_size=size, upright=False)
            values = torch.from_numpy(rgb.astype(np.float32)) @ torch.tensor([0.299, 0.587, 0.114])
            if (keep := self._mask(view)) is not None:
                values[~torch.from_numpy(keep)] = stereo.MASKED
            return stereo.GrayView(camera=view.camera, gray=values.to(where))

        def find(name: str) -> Arrays:
            view = self.views[name]
            others = [gray(other) for other in view.neighbours]
            start = depth.surface(view.xy, 1 / view.depth, (view.camera.width, view.camera.height))
            return _arrays(*stereo.depth_of(gray(name), others, view.near_far, start.to(where)))

        return lambda names: engine.in_threads(
            find,
            names,
            workers=self.threads,
            inner_threads=max(1, engine.usable_cores() // self.threads),
        )

    def _mask(self, view: DenseView) -> np.ndarray | None:
        masks, records = self.photographs.masks, self.photographs.records
        keep = masks.load(records[view.source]) if masks is not None else None
        return view.mask(keep) if keep is not None else None


@dataclass(frozen=True)
class WarpTask:
    """Depths of both views of pairs from their warps.

    Attributes:
        loader: of the dense matcher.
        photographs: as it wants them.
        views: all, by name.
        batch_size: pairs a network call.
        cache_gb: memory for encodings.
    """

    loader: matchers.Loader
    photographs: Photographs
    views: Mapping[str, DenseView]
    batch_size: int = 1
    cache_gb: float | None = None

    def open(self, device: str) -> Callable[[Sequence[Pair]], Iterator[tuple[Pair, Arrays]]]:
        """Load the matcher."""
        matcher: Any = self.loader.load(device)
        sources = {view.source: view for view in self.views.values()}

        def read(pairs: Sequence[tuple[Any, Any]]) -> list[Arrays]:
            found = []
            for warp, (a, b) in zip(matcher.warp_batch(pairs), pairs, strict=True):
                one, two = sources[a.name], sources[b.name]
                arrays: Arrays = {}
                for side, (flow, here, there) in enumerate(
                    ((warp, one, two), (warp.swapped(), two, one))
                ):
                    inverse, weight = _read_warp(flow, here, there)
                    arrays |= {f"inverse{side}": inverse, f"weight{side}": weight}
                found.append(arrays)
            return found

        def match(pairs: Sequence[Pair]) -> Iterator[tuple[Pair, Arrays]]:
            names = {name: view.source for name, view in self.views.items()}
            back = {(names[a], names[b]): (a, b) for a, b in pairs}
            results = engine.match(
                matcher,
                list(back),
                lambda name: self.photographs.read(name, matcher.image_options),
                read,
                batch_size=self.batch_size,
                cache_gb=self.cache_gb,
            )
            return ((back[pair], arrays) for pair, arrays in results)

        return match


def _read_warp(warp: Warp, view: DenseView, other: DenseView) -> tuple[np.ndarray, np.ndarray]:
    """Inverse depth of a view's pixels by a warp, and trust in it (H, W)."""
    height, width = view.camera.height, view.camera.width
    reading = warp.read(torch.from_numpy(view.stored_pixels().reshape(-1, 2)))
    there = other.map_pixels(reading.xy_px.cpu().numpy()).T.reshape(2, height, width)
    places = torch.from_numpy(np.nan_to_num(there, nan=-1e4)).float()
    inverse, off = depth.triangulate(view.camera, other.camera, places)
    trust = reading.certainty / (1 + (reading.cycle_px / _CYCLE_CELLS) ** 2)
    weight = trust.cpu().reshape(height, width)
    weight[(off > _EPIPOLAR_PX) | (inverse <= 0)] = 0
    return inverse.numpy(), weight.numpy().astype(np.float16)


def _arrays(inverse: torch.Tensor, score: torch.Tensor) -> Arrays:
    return {"inverse": inverse.cpu().numpy(), "score": score.cpu().numpy().astype(np.float16)}


# ------------------------------------------------------------------------------------------ steps


@dataclass(kw_only=True)
class Densification:
    """The dense model of a run's largest model: its steps, and what they rest on.

    Attributes:
        folder: of the run.
        model_key: what stands for the model in the keys of what is made of it.
        images: image root.
        photographs: images and masks by name.
        options: what is wanted.
        quality: operating point, for the size of maps.
        loader: of the run's matcher, if it is dense.
        where: who does the work.
        cache_gb: memory for encodings.
        prune: whether to forget what was found for other settings.
        show: whether to draw progress bars.
    """

    folder: RunFolder
    model_key: str
    images: Path
    photographs: Photographs
    options: DepthOptions
    quality: str
    loader: matchers.Loader | None
    where: Where
    cache_gb: float | None = None
    prune: bool = False
    show: bool = False

    def __post_init__(self) -> None:
        self.workspace = self.folder.path / "dense"
        self.views: dict[str, DenseView] = {}
        self.points = 0  # of the cloud
        self.made: dict[str, Path] = {}  # the cloud and the mesh
        self.source = self.options.depth_from
        if self.source == "auto":
            self.source = "warps" if self.loader else "colmap" if colmap.has_cuda() else "images"
        if self.source == "warps" and self.loader is None:
            raise InputError("--depth-from warps needs a run of a dense matcher; this is none.")
        if self.source == "colmap" and not colmap.has_cuda():
            raise InputError(
                "--depth-from colmap needs a pycolmap with CUDA, which this is not: take images."
            )

    def steps(self) -> list[Step]:
        """The order of the work."""
        mesh = [Step("mesh", self.mesh)] if self.options.mesh else []
        return [
            Step("undistort", self.undistort),
            Step("depth", self.depth),
            Step("fuse", self.fuse),
            *mesh,
            Step("preview", self.preview),
        ]

    @property
    def model(self) -> Any:
        """The model as ``pycolmap.Reconstruction``."""
        return colmap.read_model(self.folder.path / "sparse" / "0")

    def undistort(self) -> None:
        """Undistorted images, their model, and the neighbours of each."""
        self.images_key = digest([self.model_key, self.options.depth_neighbours])

        def write(folder: Path) -> dict[str, Any]:
            model, notes = colmap.undistort(
                self.images, self.model, folder / "images", progress=self.show
            )
            dense.write_workspace(model, folder, neighbours=self.options.depth_neighbours)
            return {"notes": [f"{self.workspace}: {note}" for note in notes]}

        if self.folder.part is not None:
            if self.folder.facts("dense images", self.images_key) is None:
                raise InputError(
                    "--shard works on undistorted images, which are not there yet: run the same "
                    "command with --stop-after undistort instead of --shard first."
                )
            return
        for note in self._made("images", self.images_key, write)["notes"]:
            self.folder.note(note)

    def depth(self) -> None:
        """Maps of depth and normals of every view, as far as other views agree."""
        size = self.options.depth_size or SIZES[self.quality]
        listed = dense.dense_views(
            self.model, self.workspace, size=size, neighbours=self.options.depth_neighbours
        )
        self.views = {view.name: view for view in listed}
        if not self.views:
            raise InputError(f"No two images of {self.folder.path} share points: nothing to match.")
        gone = [v.source for v in listed if v.source not in self.photographs.records]
        if gone:
            raise InputError(f"{some(gone)}: not among the images in {self.images} any more.")
        keys = {name: self._key(name) for name in self.views}
        self.depth_key = digest([self.images_key, sorted(keys.values()), TRUST])
        if self.folder.part is not None:
            with Cache(self.folder.cache_file(CACHE)) as cache:
                self._search(cache, {name: keys[name] for name in self.folder.share(list(keys))})
            return

        def write(folder: Path) -> dict[str, Any]:
            if self.source == "colmap":
                dense.patch_match(self.workspace, folder, scratch=self.folder.hidden("stereo"))
                return {"given": None}
            with Cache(self.folder.cache_file(CACHE)) as cache:
                take_parts(self.folder, {Path(CACHE).stem: cache})
                self._search(cache, keys)
                given = self._agree(cache, keys, folder)
                if self.prune:
                    cache.prune(set(keys.values()))
            return {"given": given}

        facts = self._made("depth", self.depth_key, write)
        if facts["given"] is not None:
            logger.info(
                "Depth of %d views, %.0f%% of their pixels", len(keys), 100 * facts["given"]
            )

    def _key(self, name: str) -> str:
        """Of what is found of a view before others are asked."""
        view = self.views[name]
        names = [name, *view.neighbours]
        sources = [self.photographs.source(self.views[n].source) for n in names]
        settings = [FORMAT, self.images_key, self.source, self._settings, view.camera.width]
        return digest([*settings, *sources])

    @functools.cached_property
    def _settings(self) -> Any:
        """Of the matcher whose warps are read."""
        if self.source != "warps" or self.loader is None:
            return None
        matcher = self.loader.load(self._device)
        return [matcher.info.name, matcher.match_settings(), dict(matcher.weights_hashes)]

    @property
    def _device(self) -> str:
        return self.where.devices[0] if self.where.devices else self.where.device

    def _search(self, cache: Cache, keys: Mapping[str, str]) -> None:
        """Depth of the views that the cache lacks."""
        todo = [name for name in keys if keys[name] not in cache]
        with self._bar(len(keys), "Depth", "views", len(keys) - len(todo)) as bar:
            if self.source == "warps":
                for name, arrays in self._by_warps(todo):
                    cache.put(keys[name], arrays)
                    bar.update()
                return
            device = resolve_device(self._device)
            side_by_side = engine.default_workers(device, bool(self.where.devices))
            task = StereoTask(self.workspace, self.views, self.photographs, side_by_side)

            def done(name: str, arrays: Arrays) -> None:
                cache.put(keys[name], arrays)
                bar.update()

            spread(task, todo, self.where, done, chunk=1)

    def _by_warps(self, names: Sequence[str]) -> Iterator[tuple[str, Arrays]]:
        """What the warps of each view's pairs agree on; warps are kept until all views are done."""
        assert self.loader is not None
        partners = {name: self.views[name].neighbours for name in names}
        pairs = sorted({(min(n, o), max(n, o)) for n, others in partners.items() for o in others})
        settings = digest([self.images_key, self._settings])

        def key(pair: Pair) -> str:
            views = [self.views[name] for name in pair]
            sources = [self.photographs.source(view.source) for view in views]
            return digest([settings, *sources, *(view.camera.width for view in views)])

        part = self.folder.part
        path = self.folder.hidden(f"{part.name}.warps.cache" if part else "warps.cache")
        with Cache(path) as cache:
            todo = [pair for pair in pairs if key(pair) not in cache]
            matcher = self.loader.load(self._device)
            batch = 16 if matcher.device.type != "cpu" else 1
            task = WarpTask(self.loader, self.photographs, self.views, batch, self.cache_gb)
            with self._bar(len(pairs), "Warps", "pairs", len(pairs) - len(todo)) as bar:

                def done(pair: Pair, arrays: Arrays) -> None:
                    cache.put(key(pair), arrays)
                    bar.update()

                spread(task, todo, self.where, done, chunk=64)
            for name, others in partners.items():
                found = [(o, cache.get(key((min(name, o), max(name, o))))) for o in others]
                yield name, self._combined(name, [(o, arrays) for o, arrays in found if arrays])
        path.unlink()

    def _combined(self, name: str, found: Sequence[tuple[str, Arrays]]) -> Arrays:
        view = self.views[name]
        inverse, weight, speed = [], [], []
        for other, arrays in found:
            side = 0 if name < other else 1
            inverse.append(torch.from_numpy(arrays[f"inverse{side}"]))
            weight.append(torch.from_numpy(arrays[f"weight{side}"]).float())
            speed.append(depth.speed(view.camera, self.views[other].camera, inverse[-1]))
        return _arrays(
            *depth.consensus(
                torch.stack(inverse), torch.stack(weight), torch.stack(speed),
                tolerance_px=_EPIPOLAR_PX,
            )
        )  # fmt: skip

    def _agree(self, cache: Cache, keys: Mapping[str, str], folder: Path) -> float:
        """Write what other views agree with; the share of pixels that have depth."""
        least, sure = TRUST[self.source]

        @functools.lru_cache(maxsize=32)
        def found(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            arrays = cache.get(keys[name])
            assert arrays is not None
            inverse, score = (torch.from_numpy(arrays[k]).float() for k in ("inverse", "score"))
            return torch.where(score >= least, inverse, torch.zeros_like(inverse)), score

        shares = []
        for name, view in self.views.items():
            own, score = found(name)
            others = [(self.views[o].camera, found(o)[0]) for o in view.neighbours]
            count, mean = depth.agreement(view.camera, own, others, tolerance=_TOLERANCE)
            good = (count >= 2) | ((count >= 1) & (score >= sure))
            inverse = torch.where(good, mean, torch.zeros_like(mean))
            inverse = depth.without_speckles(inverse, _SPECKLE)
            normals = depth.normals(view.camera, inverse)
            values = torch.where(inverse > 0, 1 / inverse.clamp_min(1e-12), inverse)
            dense.write_maps(folder, name, values.numpy(), normals.numpy())
            shares.append(float((inverse > 0).float().mean()))
        return float(np.mean(shares))

    def fuse(self) -> None:
        """One cloud of all maps, with colours and normals."""
        self.cloud_key = digest([self.depth_key, "cloud"])

        def write(folder: Path) -> dict[str, Any]:
            count = dense.fuse(
                self.workspace, folder / "dense.ply", min_views=2,
                log_dir=self.folder.hidden("logs"),
            )  # fmt: skip
            return {"points": count}

        self.points = self._made("cloud", self.cloud_key, write)["points"]
        self.made["cloud"] = self.workspace / "dense.ply"
        logger.info("Dense cloud: %d points, %s", self.points, self.made["cloud"])

    def mesh(self) -> None:
        """A surface through the cloud."""

        def write(folder: Path) -> dict[str, Any]:
            notes = dense.mesh(
                self.workspace / "dense.ply", folder / "mesh.ply",
                log_dir=self.folder.hidden("logs"),
            )  # fmt: skip
            return {"notes": notes}

        for note in self._made("mesh", digest([self.cloud_key, "mesh"]), write)["notes"]:
            self.folder.note(note)
        self.made["mesh"] = self.workspace / "mesh.ply"
        logger.info("Mesh: %s", self.made["mesh"])

    def preview(self) -> None:
        """A page to look at."""

        def write(folder: Path) -> dict[str, Any]:
            facts = previews.dense_facts(self.folder.steps)
            assert facts is not None
            previews.write_dense_page(self.workspace, folder, facts)
            return {}

        self._made("page", digest([self.cloud_key, "page"]), write)

    def _made(self, what: str, key: str, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Facts of a step of the dense model; ``write`` makes its files in a folder for dense/."""
        facts = self.folder.facts(f"dense {what}", key)
        if facts is None:
            with self.folder.making(f"dense {what}", key, large=True) as made:
                place = made.path / "dense"
                place.mkdir()
                made.facts = {**write(place), "model": self.model_key}
            facts = made.facts
        return facts

    def _bar(self, total: int, title: str, unit: str, done: int) -> Any:
        return progress_bar(total, title, unit, done=done, show=self.show)


# ---------------------------------------------------------------------------------------- command


@dataclass(kw_only=True)
class DensifyResult:
    """What ``densify`` left.

    Attributes:
        output: folder of the run.
        workspace: COLMAP's dense workspace in it.
        cloud: the fused cloud; None where the run was to stop before it.
        mesh: the surface, if one was asked for and made.
        views: images with a depth map.
        points: of the cloud.
        timings: seconds of each step in this run.
        notes: what else to know.
    """

    output: Path
    workspace: Path
    cloud: Path | None
    mesh: Path | None
    views: int
    points: int
    timings: dict[str, float]
    notes: list[str]


def densify(
    output: Path | str,
    options: DensifyOptions | None = None,
    *,
    progress: bool = True,
    **overrides: Any,
) -> DensifyResult:
    """Find depth maps and a dense cloud for the largest model of a finished run.

    Args:
        output: folder of a run of ``reconstruct``; ``dense/`` is written there.
        options: all settings; None takes the defaults.
        progress: whether to draw progress bars.
        **overrides: single fields of ``DensifyOptions``, such as ``depth_size=1000``.

    Raises:
        InputError: no finished run is there, its images are gone or others, or an option does not
            fit it.
        OutputError: files that no run made are in the way.
        LockedError: a run holds the folder.
    """
    options = given(DensifyOptions, options, overrides)
    output = as_path(output, "output")
    part = part_of("depth" if options.shard else None, options.shard)
    folder, state = folder_of_run(output, makes=FILES, writes=[CACHE], part=part)
    with folder:
        require_model(folder)
        if options.overwrite and part is None:
            folder.drop(*(name for name in folder.steps if name.startswith("dense ")))
            (output / CACHE).unlink(missing_ok=True)
        work = _of_run(folder, state, options, show=progress)
        folder.go(work.steps(), until="depth" if part else options.stop_after)
        return DensifyResult(
            output=output,
            workspace=work.workspace,
            cloud=work.made.get("cloud"),
            mesh=work.made.get("mesh"),
            views=len(work.views),
            points=work.points,
            timings={
                step.name: folder.timings.get(step.name, 0.0) - folder.earlier.get(step.name, 0.0)
                for step in work.steps()
            },
            notes=list(dict.fromkeys(folder.notes)),
        )


def _of_run(
    folder: RunFolder, state: Mapping[str, Any], options: DensifyOptions, *, show: bool
) -> Densification:
    """What a finished run says of itself, its images and its matcher."""
    output = folder.path
    settings = build(ReconstructOptions, state["options"], where=f"{output / 'run.yaml'}")
    gathered = any(name.startswith("images/") for name in folder.files)  # of an extended run
    scene = open_map(output, images=options.images or (output / "images" if gathered else None))
    if scene.images is None:
        raise InputError(
            f"The images of {output} are not in {state.get('images')} any more: say where, "
            "--images FOLDER."
        )
    masks = settings.masks
    return Densification(
        folder=folder,
        model_key=product_key(folder),
        images=scene.images,
        photographs=Photographs(
            {
                name: dataclasses.replace(record, path=scene.images / name)
                for name, record in (scanned(output) or _found(scene.images, output)).items()
            },
            MaskFolder(masks, erode_px=settings.mask_erode, image_root=Path(state["images"]))
            if masks
            else None,
            scene.turns,
        ),
        options=select(DepthOptions, options),
        quality=settings.quality,
        loader=_dense_matcher(settings),
        where=options.where,
        prune=options.prune,
        show=show,
    )


def _found(root: Path, output: Path) -> dict[str, ImageRecord]:
    """Images of a run that did not keep what it found of them."""
    return {r.name: r for r in image_module.scan(root, exclude=[output], progress=False)}


def _dense_matcher(settings: ReconstructOptions) -> matchers.Loader | None:
    """How to load the matcher of a run, if it gives warps."""
    name = settings.matcher
    own = ":" in name  # code outside gim-hloc, which a file may not ask for
    if settings.features is not None or name in CASCADES or own:
        return None
    if not matchers.describe(name).has_warps:
        return None
    sizes = {} if settings.max_size is None else {"max_size": settings.max_size}
    overrides = {**parse_matcher_options(settings.matcher_options), **sizes}
    return matchers.Loader(name, settings.quality, overrides)


def summary_text(result: DensifyResult) -> str:
    """The last lines of a run, for the terminal."""
    if result.cloud is None:
        return f"Stopped as asked. What is finished is kept in {result.output}."
    seconds = result.timings["depth"] / max(1, result.views)
    lines = [f"{result.points} points of {result.views} images, {seconds:.1f} s an image"]
    lines += [f"Cloud:  {result.cloud}"]
    lines += [f"Mesh:   {result.mesh}"] if result.mesh else []
    lines += [f"Page:   {result.workspace / previews.DENSE_PAGE}"]
    return "\n".join(lines)
