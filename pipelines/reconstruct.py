"""From an image folder to a COLMAP model: the steps, in their order, and what each rests on.

Every step leaves complete files or none, and its state is on disk when it ends (``run``): the same
command continues where an earlier one stopped, and does again only what has changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from gim_hloc import colmap, draw
from gim_hloc import images as image_module
from gim_hloc.errors import some
from gim_hloc.files import as_path
from gim_hloc.keywords import ReconstructKeywords
from gim_hloc.options import CameraOptions, given, replace, to_mapping
from gim_hloc.page import plural
from gim_hloc.pair_viewer import Ends
from gim_hloc.pipelines.cascade import Cascade
from gim_hloc.pipelines.correspondences import Correspondences
from gim_hloc.pipelines.exports import DENSE
from gim_hloc.pipelines.inputs import Inputs
from gim_hloc.pipelines.layers import Layers
from gim_hloc.pipelines.matching import take_parts, tell_kept
from gim_hloc.pipelines.modelling import Modelling
from gim_hloc.pipelines.options import ReconstructOptions
from gim_hloc.pipelines.outcome import (
    build_report,
    confidence_sums,
    plan_view,
    scene_view,
    versions,
)
from gim_hloc.pipelines.previews import dense_facts
from gim_hloc.pipelines.report import complete_report, write_report
from gim_hloc.pipelines.run import Step
from gim_hloc.pipelines.verifying import Verifier

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, repr=False)
class ReconstructResult:
    """What a reconstruction left.

    Attributes:
        output: folder of the run.
        models: folders of COLMAP models, largest first; empty for a dry run.
        report: the content of report.json.
        estimate: of a dry run.
    """

    output: Path
    models: list[Path] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    estimate: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"ReconstructResult({self._text()})"

    def _repr_html_(self) -> str:
        """The largest model from above, for notebooks."""
        text = f"<figcaption>{html.escape(self._text())}</figcaption>"
        if not self.models:
            return f"<figure>{text}</figure>"
        picture = draw.data_url(plan_view(self.model()), ".png")
        return f'<figure><img src="{picture}">{text}</figure>'

    def _text(self) -> str:
        if not self.report:
            return f"{self.output}, {'an estimate' if self.estimate else 'no model yet'}"
        return (
            f"{self.output}: {self.registered} of {self.report['summary']['images']} images "
            f"registered, {plural(len(self.models), 'model')}"
        )

    @property
    def registered(self) -> int:
        """Images with a pose in the largest model."""
        return int(self.report.get("summary", {}).get("registered", 0))

    def model(self, index: int = 0) -> Any:
        """Read a model as ``pycolmap.Reconstruction``."""
        return colmap.read_model(self.models[index])


def reconstruct(
    images: Path | str,
    output: Path | str,
    options: ReconstructOptions | None = None,
    *,
    progress: bool = True,
    **overrides: Unpack[ReconstructKeywords],
) -> ReconstructResult:
    """Reconstruct an image folder or a video.

    Args:
        images: folder of images and videos, searched recursively, or a video.
        output: folder of the run; what an earlier run with the same settings left there is reused.
        options: all settings; ``None`` takes the defaults.
        progress: whether to draw progress bars.
        **overrides: single fields of ``ReconstructOptions`` or ``CameraOptions``, such as
            ``matcher="sift"`` or ``camera_mode="single"``.

    Returns:
        Models, report and folder.

    Raises:
        InputError: unusable images or options; nothing was written over.
        OutputError: the folder holds files that no run made, or another image set.
        WeightsError: the matcher's weights are missing.
        LockedError: another run holds the folder.
        MappingError: no model came out; features, matches, database and report are kept.
    """
    options = with_overrides(given(ReconstructOptions, options, {}), overrides)
    start = time.perf_counter()
    folder, output = as_path(images, "images"), as_path(output, "output")
    inputs = Inputs(folder, output, options, show=progress)
    if options.dry_run:
        return ReconstructResult(output=inputs.output, estimate=inputs.estimate())
    if options.stop_after == "frames" and (inputs.videos.found or inputs.panoramas.found):
        return ReconstructResult(output=inputs.output)
    with inputs.folder, _seeded(options):
        run = _Reconstruction(inputs, start)
        try:
            return run.go()
        finally:
            run.close()


def with_overrides(options: ReconstructOptions, overrides: Mapping[str, Any]) -> ReconstructOptions:
    """Replace single fields, those of the camera options included; unknown ones are errors."""
    names = {f.name for f in dataclasses.fields(CameraOptions)}
    own = {name: value for name, value in overrides.items() if name not in names}
    camera = {name: value for name, value in overrides.items() if name in names}
    options = replace(options, own)
    return replace(options, {"cameras": replace(options.cameras, camera)})


@contextlib.contextmanager
def _seeded(options: ReconstructOptions) -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.manual_seed(options.seed)
    colmap.set_seed(options.seed)
    if options.deterministic:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Reconstruction:
    """One run: its steps, and its report."""

    def __init__(self, inputs: Inputs, start: float) -> None:
        inputs.open_folder()
        self.inputs, self.start = inputs, start
        self.matching = Correspondences(inputs)
        self.layers, self.verifier = Layers(self.matching), Verifier(inputs)
        self.cascade = Cascade(inputs, self.layers, self.verifier)
        self.modelling = Modelling(inputs, self.layers, self.verifier)
        self.report: dict[str, Any] = {}
        if inputs.part is None:
            stores = {store.cache_file.stem: store for store in self.matching.stores()}
            take_parts(inputs.folder, {**stores, "database": self.verifier.cache})

    def steps(self) -> list[Step]:
        """The order of the work."""
        matching, modelling = self.matching, self.modelling
        first = [
            Step("encode", matching.encode),
            Step("pairs", matching.choose_pairs),
            Step("match", matching.match),
            Step("rotations", matching.find_rotated),  # another pass if images lie on their sides
        ]
        if self.inputs.imported is not None:
            first = [Step("pairs", matching.choose_pairs), Step("import", matching.take_over)]
        if self.inputs.linker.detector_free:
            first.append(Step("link", matching.link))
        if len(self.inputs.levels) > 1:
            first.append(Step("cascade", self.cascade.escalate))
        return [
            *first,
            Step("verify", modelling.verify),
            Step("map", modelling.map),  # writes the database anew where cameras were parted
            Step("rescue", modelling.look_for_lost),  # another pass if it joins images
            Step("refine", modelling.refine),
            *([Step("dense", modelling.densify)] if self.inputs.options.dense else []),
            Step("export", modelling.export),
            Step("report", self._report),
        ]

    def go(self) -> ReconstructResult:
        """Do what is not done yet, or the part of an array job."""
        inputs, options = self.inputs, self.inputs.options
        if inputs.part is not None:
            # Encoding needs no pairs; other parts read what is chosen.
            wanted = {"encode": ("encode",)}.get(inputs.part.step, ("pairs", inputs.part.step))
            for step in self.steps():
                if step.name in wanted:
                    step.run()
            return ReconstructResult(output=inputs.output)
        steps = self.steps()
        # Frames of videos are images like others from here on.
        made = inputs.videos.found or inputs.panoramas.found
        redone = options.start == "frames" and bool(made)
        again = steps[0].name if redone else options.start
        inputs.folder.go(steps, again=again, until=options.stop_after)
        if options.stop_after is None:  # else much is not asked for yet
            kept = [store.kept() for layer in self.layers.all for store in layer.stores()]
            tell_kept([*kept, (self.verifier.cache, self.verifier.used)], prune=options.prune)
        if self.modelling.failure is not None:
            if self.modelling.models:
                logger.warning("All else is done: %s", inputs.output / "report.html")
            raise self.modelling.failure
        return ReconstructResult(
            output=inputs.output, models=self.modelling.models, report=self.report
        )

    def close(self) -> None:
        """Close all files."""
        self.verifier.close()
        self.layers.close()

    def _report(self) -> None:
        """What happened to each image and pair, in numbers and to look at."""
        loaded = [colmap.read_model(path) for path in self.modelling.models]
        if self.modelling.failure is not None:
            self.inputs.folder.notes.append(
                str(self.modelling.failure) or type(self.modelling.failure).__name__
            )
            if not loaded and "refine" in self.inputs.folder.steps:
                self.inputs.folder.note("sparse/ still holds the model of the run before.")
        for note in self.inputs.folder.notes:
            logger.debug("note: %s", note)
        report = build_report(
            image_set=self.inputs.image_set,
            keypoints={name: len(self.layers.keypoints(name)) for name in self.inputs.names},
            selection=self.matching.selection,
            verified=self.modelling.verified,
            models=loaded,
            paths=[str(path.relative_to(self.inputs.output)) for path in self.modelling.models],
            left_model=self.modelling.left_model,
            notes=list(dict.fromkeys(self.inputs.folder.notes)),
            confidence=confidence_sums(
                self.modelling.verified,
                self.verifier.bounds(self.matching).min_confidence_sum,
                self.modelling.confidence_meaning(),
            ),
            mapped=self.modelling.as_mapped(loaded[0]) if loaded else None,
            pose_errors=self.modelling.pose_errors,
        )
        rescued = report["rescue"] = self.modelling.rescue.told(loaded[:1])
        if rescued and rescued["images"]:
            report["notes"].append(
                f"{len(rescued['images'])} images that the first mapping lacked, or that hung on "
                f"few points, were matched anew with {rescued['matcher']} and are in the largest "
                f"model: {some(rescued['images'])}."
            )
        steps = self.inputs.folder.steps  # also what gim-export and gim-densify made of this model
        if loaded and "export geo" in steps:
            report["metres"] = steps["export geo"]["facts"]["metres"]
        if loaded and (dense := dense_facts(steps)):
            report["dense"] = dense
        masked = self.modelling.masked()
        for row in report["images"]:
            if row["name"] in self.inputs.photographs.turns:
                row["rotated_degrees"] = 90 * self.inputs.photographs.turns[row["name"]]
            if row["name"] in masked:
                row["reason"] = masked[row["name"]]
        for rows, described in zip(self.modelling.intrinsics, report["models"], strict=False):
            for camera in described["cameras"]:
                camera.update(rows.get(str(camera["id"]), {}))
        used = [layer.method.matcher for layer in self.layers.all]
        report["settings"] = to_mapping(
            {
                "images": str(self.inputs.root),
                **dataclasses.asdict(self.inputs.options),
                "pair": dataclasses.asdict(self.inputs.pair_options),
                "mapper_used": self.modelling.mapper_name(),
                "matcher_settings": dataclasses.asdict(self.inputs.matcher.options),
                "matcher_licence": "; ".join(dict.fromkeys(x.info.licence for x in used)),
                "weights_sha256": {k: v for x in used for k, v in x.weights_hashes.items()},
                "device": str(self.inputs.matcher.device),
                "threads": self.inputs.threads,
            }
        )
        report["versions"] = versions()
        report["counts"] = {
            "images_encoded_now": sum(len(layer.encoded) for layer in self.layers.all),
            "dense_encodings_now": sum(layer.dense_encodings for layer in self.layers.all),
            "pairs_matched_now": sum(len(layer.matched) for layer in self.layers.all),
        }
        seconds = time.perf_counter() - self.start
        earlier = sum(self.inputs.folder.earlier.values())
        report["summary"] = {"seconds": seconds, "seconds_of_all_runs": seconds + earlier}
        report["timings"] = dict(self.inputs.folder.timings)
        self.report = complete_report(report)
        masks = self.inputs.photographs.masks
        try:
            write_report(
                self.report,
                self.inputs.output,
                images=lambda name: image_module.read_rgb(
                    self.inputs.records[name], max_size=960, upright=False
                ),
                scene=scene_view(loaded[0]) if loaded else None,
                pair_matches=self._pair_matches,
                masks=(lambda name: masks.load(self.inputs.records[name])) if masks else None,
                dense=self.inputs.output / DENSE if "dense" in report else None,
            )
        except Exception as error:  # the model is worth more than its report
            logger.warning("The report could not be written: %s", error)
            logger.debug("", exc_info=True)

    def _pair_matches(self, pairs: Sequence[tuple[str, str]]) -> Iterator[Ends]:
        """Coordinates of the matches in both images, and whether each is an inlier."""
        inliers = colmap.inlier_matches(self.inputs.output / "database.db", pairs)
        one = np.array([1 << 32, 1], dtype=np.uint64)
        for (a, b), good in zip(pairs, inliers, strict=True):
            rows = self.layers.rows((a, b))
            yield (
                self.layers.keypoints(a)[rows[:, 0]],
                self.layers.keypoints(b)[rows[:, 1]],
                np.isin(rows.astype(np.uint64) @ one, good.astype(np.uint64) @ one),
            )
