"""From matches to COLMAP models: verify, map, refine, export."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gim_hloc import colmap, engine
from gim_hloc import images as image_module
from gim_hloc.errors import InputError, MappingError, some
from gim_hloc.options import DepthOptions, TargetOptions, select
from gim_hloc.pipelines.cascade import Rescue
from gim_hloc.pipelines.densify import Densification
from gim_hloc.pipelines.exports import Exports, masks_in, product_key, stale_products
from gim_hloc.pipelines.inputs import Inputs
from gim_hloc.pipelines.layers import Layers
from gim_hloc.pipelines.panoramas import LIST as PANORAMAS
from gim_hloc.pipelines.panoramas import poses_text
from gim_hloc.pipelines.run import HIDDEN, SNAPSHOTS, Made, Step
from gim_hloc.pipelines.verifying import Verifier
from gim_hloc.schedule import EncodingPool, encoding_bytes, memory_budget, order_pairs
from gim_hloc.store import digest

if TYPE_CHECKING:
    from gim_hloc.colmap import MapJob, PairVerification, Refined

logger = logging.getLogger(__name__)

Pair = tuple[str, str]

# Steps that make something of the models: another model takes it away.
OF_MODEL = ("export", "dense")

_COLOUR_PX = 1600  # long side of what points get their colours from
_GREY_BYTES = 2**29  # of grey values kept between the rounds of refinement; beyond, files are read


class Modelling:
    """The second half of a reconstruction.

    Attributes:
        cameras: of the database; mapping may part them.
        verified: what verification left of each pair.
        models: folders of the finished models, largest first.
        left_model: image -> why it left a model.
        intrinsics: of each model's cameras, by their ids.
        pose_errors: of each model's images, by their names.
        failure: why there is no model, no dense model, or a format was not written.
    """

    def __init__(self, inputs: Inputs, layers: Layers, verifier: Verifier) -> None:
        self.inputs, self.options, self.folder = inputs, inputs.options, inputs.folder
        self.output, self.names, self.records = inputs.output, inputs.names, inputs.records
        self.photographs, self.method = inputs.photographs, inputs.method
        self.layers, self.verifier = layers, verifier
        self.rescue = Rescue(inputs, layers, verifier)
        self.cameras = inputs.cameras
        self.verified: list[PairVerification] = []
        self.models: list[Path] = []
        self.map_notes: list[str] = []  # kept, so that a reused model tells them again
        self.left_model: dict[str, str] = {}
        self.intrinsics: list[dict[str, dict[str, Any]]] = []
        self.pose_errors: list[dict[str, dict[str, Any]]] = []
        self.failure: Exception | None = None
        self.before: list[Any] = []  # models that images are to be registered into

    # ------------------------------------------------------------------------------------ verify

    def verify(self) -> None:
        """Verify each pair, and write COLMAP's database of what passed."""
        verifier, layers = self.verifier, self.layers
        if self.inputs.part is not None:
            verifier.require_matched(layers.first)
            verifier.verify(layers.first)
            return
        self.rescue.restore(self._first_map_key)
        keys = [verifier.keys(layer) for layer in layers.all]
        self.database_key = self._database_key(keys)
        pairs = layers.pairs
        path = self.output / "database.db"
        if self.folder.facts("verify", self.database_key) is not None:
            self.verified = colmap.read_verification(path, pairs)
            logger.info("Database reused: %s", path)
            self._tell_doubtful()
            return
        for layer in layers.all:
            verifier.verify(layer)
        prior = self.inputs.poses_if("prior")
        with self.folder.making("verify", self.database_key) as made:
            self.verified = colmap.write_database(
                made.path / "database.db",
                cameras=self.inputs.cameras,
                names=self.names,
                keypoints=layers.keypoints,
                pairs=((*pair, *verifier.merged(layers, keys, pair)) for pair in pairs),
                priors={n: -r.T @ t for n, (r, t) in prior.items()} if prior else None,
                prior_stddev=self.inputs.prior_stddev(),
            )
        self._judge_poses()
        logger.info(
            "Verified %d of %d pairs", sum(v.inliers > 0 for v in self.verified), len(pairs)
        )
        self._tell_doubtful()

    def _database_key(self, keys: Sequence[Mapping[Pair, str]]) -> str:
        cameras = [spec.to_facts() for spec in self.inputs.cameras]
        listed = [key for own in keys for key in own.values()]
        return digest([listed, cameras, self.inputs.poses_key()])

    def _tell_doubtful(self) -> None:
        doubtful = sum(v.doubtful for v in self.verified)
        if doubtful:
            self.folder.note(
                f"{doubtful} of {len(self.verified)} pairs had enough inliers but too little "
                "confidence and were left out, as pairs of unrelated places: a sum below "
                f"{self.verifier.bounds(self.layers.first).min_confidence_sum:g} "
                "(--verify.min-confidence-sum)."
            )

    def confidence_meaning(self) -> str:
        """What the confidence of a match is, for the report."""
        if self.inputs.imported is not None:
            said = "Confidences are those of the imported file, 1 where it has none."
        elif self.method.linker.detector_free:
            said = f"Confidences are those of the {self.options.tracks} tracks' readings."
        else:
            said = f"Confidences are those that {self.method.name} gives its matches."
        if self.inputs.poses_if("fixed") is not None:
            said += " Pairs whose poses are known are judged by these alone."
        return said

    def _judge_poses(self) -> None:
        """Warn when hardly a match agrees with fixed poses."""
        known = self.inputs.poses_if("fixed")
        if known is None:
            return
        pairs = [v for v in self.verified if v.name0 in known and v.name1 in known]
        matches, inliers = sum(v.matches for v in pairs), sum(v.inliers for v in pairs)
        if matches and inliers < 0.1 * matches:
            self.folder.note(
                f"Only {inliers / matches:.1%} of the matches agree with the known poses. Are they "
                "those of these images (order of names), in the convention of their format, and do "
                "the intrinsics fit?"
            )

    # --------------------------------------------------------------------------------------- map

    def map(self) -> list[Step] | None:
        """Models of the verified pairs, as COLMAP's mappers leave them."""
        self.failure = None
        self.map_key = self._map_key(self.database_key)
        facts = self.folder.facts("map", self.map_key)
        if facts is None:
            if "cameras" in self.folder.steps:  # parted in the database by another mapping
                self.folder.steps.pop("cameras")
                self.folder.steps.pop("verify")
                return [Step("verify", self.verify), Step("map", self.map)]
            try:
                facts = self._mapped()
            except MappingError as error:
                self.failure = error
                return None
        self.map_notes = facts["notes"]
        parted = [colmap.CameraSpec.of_facts(spec) for spec in facts["cameras"]]
        self.cameras = parted
        if parted == self.inputs.cameras:
            return None
        return [Step("verify", self._write_cameras)]

    def _first_map_key(self) -> str:
        """Of the model of the layers before the rescue."""
        return self._map_key(self._database_key([self.verifier.keys(x) for x in self.layers.all]))

    def _map_key(self, database_key: str) -> str:
        return digest(
            {
                "database": database_key,
                "map": dataclasses.asdict(self.options.map),
                "mapper": colmap.resolve_mapper(self.options.mapper, len(self.names)),
                "refine_intrinsics": self.options.cameras.refine_intrinsics,
                "threads": 1 if self.options.deterministic else "many",
                "poses": self.inputs.poses_key(),
            }
        )

    def _mapped(self) -> dict[str, Any]:
        if not any(pair.inliers for pair in self.verified):
            raise self._nothing_matched()
        with (
            self.folder.making("map", self.map_key) as made,
            self.inputs.bar(len(self.names), "Map", "images") as bar,
        ):

            def registered(model: int, count: int) -> None:
                bar.set_postfix_str(f"model {model}", refresh=False)
                bar.n = count
                bar.refresh()

            # A copy: cameras are parted in it while mapping tries what explains the images.
            database = self.folder.hidden("mapping.db")
            if self.cameras == self.inputs.cameras:
                shutil.copyfile(self.output / "database.db", database)
            else:
                colmap.copy_with_cameras(self.output / "database.db", database, self.cameras)
            job = dataclasses.replace(self._job(), database=database, progress=registered)
            if self.inputs.poses_if("fixed", "refine") is not None:
                mapped = colmap.triangulate_known(job)
                cameras, models, notes = self.cameras, mapped.models, mapped.notes
            else:
                rigs = any(spec.rig is not None for spec in self.cameras)
                split = self.options.cameras.camera_mode == "auto" and not rigs
                grouped = colmap.map_scene(job, split=split, start=self.before)
                cameras, models, notes = list(grouped.cameras), grouped.models, grouped.notes
                notes = [*self.map_notes, *notes]
            colmap.write_models(models, made.path / HIDDEN / "mapped")
            database.unlink()
            made.facts = {"notes": notes, "cameras": [spec.to_facts() for spec in cameras]}
        return made.facts

    # ------------------------------------------------------------------------------------ rescue

    def look_for_lost(self) -> list[Step] | None:
        """Match images that no model holds anew; where that joins them, another pass is made."""
        if not self.rescue.due(self.map_key):
            return None
        before = [] if self.failure else self._mapped_models()
        groups = [colmap.well_supported(model) for model in before]
        if not self.rescue.attempt(self.map_key, groups):
            return None
        self.before = before if groups and len(groups[0]) > 2 else []
        return [Step("verify", self.verify), Step("map", self.map)]

    def as_mapped(self, model: Any) -> Any:
        """What COLMAP's mapper had made of a model; None where that is not kept."""
        names = set(colmap.poses_of(model))
        return max(
            self._mapped_models(),
            key=lambda before: len(names & set(colmap.poses_of(before))),
            default=None,
        )

    def _mapped_models(self) -> list[Any]:
        folder = self.output / HIDDEN / "mapped"
        count = len(list(folder.iterdir())) if folder.is_dir() else 0
        return [colmap.read_model(folder / str(i)) for i in range(count)]

    def _write_cameras(self) -> None:
        """The database with the cameras that mapping found it to have."""
        key = digest([self.map_key, [spec.to_facts() for spec in self.cameras]])
        if self.folder.facts("cameras", key) is None:
            with self.folder.making("cameras", key) as made:
                colmap.copy_with_cameras(
                    self.output / "database.db", made.path / "database.db", self.cameras
                )

    def _job(self) -> MapJob:
        snapshots = self.output / SNAPSHOTS
        return colmap.MapJob(
            database=self.output / "database.db",
            cameras=self.cameras,
            options=self.options.map,
            mapper="incremental" if self.inputs.poses_if("prior") else self.options.mapper,
            refine_intrinsics=self.options.cameras.refine_intrinsics,
            poses=self.inputs.poses_if("fixed", "refine", "prior"),
            pose_use=self.options.poses,
            seed=self.options.seed,
            threads=1 if self.options.deterministic else -1,
            log_dir=self.folder.hidden("logs"),
            snapshots=snapshots if snapshots.is_dir() else None,
            # COLMAP takes one bound for all images: sizes that differ meet in the middle.
            stored_px=float(np.exp(-np.mean(np.log(list(self.inputs.scale().values()))))),
        )

    def mapper_name(self) -> str:
        """For the report."""
        if self.inputs.known is not None:
            return f"known poses, {self.options.poses}"
        return colmap.resolve_mapper(self.options.mapper, len(self.names))

    def _nothing_matched(self) -> MappingError:
        found = sum(pair.matches for pair in self.verified)
        return MappingError(
            f"Nothing matched: no pair of images passed the verification ({len(self.verified)} "
            f"tried, {found} matches in all). Are these images of one scene, and are the weights "
            f"of {self.method.name} the published ones? Features, matches and the report are "
            "kept." + "".join(f" {name}: {why}." for name, why in list(self.masked().items())[:5])
        )

    # ------------------------------------------------------------------------------------ refine

    def refine(self) -> None:
        """The models as they are handed over: refined, checked, aligned, coloured."""
        if self.failure is not None:
            return
        options = self.options
        self.model_key = digest(
            {
                "map": self.map_key,
                "refine": {**dataclasses.asdict(options.refine), "rounds": self._rounds()}
                if options.refine_keypoints
                else None,
                "warps": dataclasses.asdict(options.warps) if options.refine_warps else None,
            }
        )
        facts = self.folder.facts("refine", self.model_key)
        if facts is not None:
            logger.info("Model reused: %s", self.output / "sparse")
        else:
            try:
                facts = self._refined()
            except MappingError as error:
                self.failure = error
                return
        self._drop_stale()
        self.left_model, self.intrinsics = facts["left_model"], facts["intrinsics"]
        self.pose_errors = facts.get("pose_errors", [])  # models of 0.1 have none
        self.folder.notes += [*self.map_notes, *facts["notes"]]
        self.models = [self.output / "sparse" / str(i) for i in range(len(self.intrinsics))]

    def _refined(self) -> dict[str, Any]:
        job = self._job()
        mapped = self.output / HIDDEN / "mapped"
        count = len(list(mapped.iterdir()))
        notes: list[str] = []
        with self.folder.making("refine", self.model_key) as made:
            improved = [self._improve(job, mapped / str(i), i, notes, made) for i in range(count)]
            models = [model for model, _ in improved]
            seen = [set(colmap.poses_of(model)) for model in models]
            reasons: dict[str, str] = {}
            if job.poses is None:  # known poses carry a model that would not stand alone
                models, reasons = self._checked(job, models, notes)
            # Models may have been split: a part has the cameras of the whole.
            intrinsics = [
                next(
                    rows
                    for names, (_, rows) in zip(seen, improved, strict=True)
                    if names >= set(colmap.poses_of(model))
                )
                for model in models
            ]
            known = self.inputs.poses_if("refine", "prior")
            for model, rows in zip(models, intrinsics, strict=True):
                if self.inputs.fixes:
                    notes += self._lay_on_gps(model, rows)
                elif known is not None:
                    colmap.align(model, known)
                unread = colmap.extract_colours(
                    model,
                    lambda n: image_module.read_rgb(
                        self.records[n], max_size=_COLOUR_PX, upright=False
                    ),
                )
                if unread:
                    made.whole = False
                    notes.append(
                        f"{len(unread)} images could not be read any more for the colours of the "
                        f"points: {some(unread)}. Repeat the command when they are back."
                    )
            for model, path in zip(
                models, colmap.write_models(models, made.path / "sparse"), strict=True
            ):
                if text := poses_text(colmap.poses_of(model)):
                    (path / PANORAMAS).write_text(text, encoding="utf-8")
            errors = [self._pose_errors(*one) for one in zip(models, intrinsics, strict=True)]
            made.facts = {
                "notes": notes,
                "left_model": reasons,
                "intrinsics": intrinsics,
                "pose_errors": errors,
            }
        return made.facts

    def _lay_on_gps(self, model: Any, intrinsics: Mapping[str, Any]) -> list[str]:
        """Put a model into metres, adjusted with them, and say how well."""
        records = self.inputs.turned_records()
        orientations = {name: record.exif.orientation for name, record in records.items()}
        used = {int(model.image(i).camera_id) for i in model.reg_image_ids()}
        free = colmap.unknown_cameras(model, self._job())
        try:
            metres = colmap.lay_on_gps(
                model, self.inputs.fixes, orientations,
                fixed=used - free, threads=1 if self.options.deterministic else -1,
                focal=all(intrinsics[str(camera)]["refined"] for camera in free),
            )  # fmt: skip
        except InputError as error:  # a small model beside others
            return [f"A model stays in units of its own: {error}"]
        return metres.notes

    def _pose_errors(self, model: Any, intrinsics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        if self._held() or any(spec.rig is not None for spec in self.cameras):
            return {}  # images of a rig have no poses of their own
        known = {int(camera) for camera, row in intrinsics.items() if not row["refined"]}
        threads = 1 if self.options.deterministic else -1
        found = colmap.pose_errors(model, known, threads)
        return {name: dataclasses.asdict(error) for name, error in found.items()}

    def _improve(
        self, job: MapJob, path: Path, index: int, notes: list[str], made: Made
    ) -> tuple[Any, dict[str, dict[str, Any]]]:
        """What follows mapping: warps read again, patches compared, intrinsics settled.

        Returns:
            The model, and what is known of its cameras by their ids.
        """
        with colmap.colmap_log(job.log_dir):
            model = colmap.read_model(path)
            fixed = job.fixed | colmap.hold_undetermined(model, job)
            before = {camera["id"]: camera["params"] for camera in colmap.cameras_of(model)}
            refined = None
            try:
                if self.options.refine_warps:
                    sentence = self._refine_by_warps(model, fixed)
                    notes.append(f"The model was {sentence}.")
                    logger.info("Model %d: %s", index, sentence)
                if self.options.refine_keypoints:
                    refined = self._refine_by_patches(model, fixed)
                    notes.append(f"The model was {refined.sentence}.")
                    logger.info("Model %d: %s", index, refined.sentence)
            except (RuntimeError, MemoryError) as error:
                if not engine.is_out_of_memory(error):
                    raise
                made.whole = False
                notes.append(
                    f"Memory ran out while model {index} was refined ({error}): it is as it was "
                    "mapped. The same command tries the refinement again."
                )
                logger.warning("%s", notes[-1])
                model, refined = colmap.read_model(path), None
                fixed = job.fixed | colmap.hold_undetermined(model, job)
            said, found = colmap.settle(model, job, before, refined.robust_px if refined else None)
            rows = {} if self._held() else colmap.describe_intrinsics(model, job, found)
            # Afterwards: what patches did not confirm says little about intrinsics.
            if refined is not None and refined.original is not None:
                said.append(colmap.give_back(model, refined, job.threads))
        for note in said:
            logger.info("Model %d: %s", index, note)
            notes.append(f"Model {index}: {note}")
        return model, {str(camera): row for camera, row in rows.items()}

    def _checked(
        self, job: MapJob, models: Sequence[Any], notes: list[str]
    ) -> tuple[list[Any], dict[str, str]]:
        """What is left of models, and why images left them (see ``colmap.check_models``)."""
        checked = colmap.check_models(models, min_model_size=job.options.min_model_size)
        for note in checked.notes:
            logger.warning("%s", note)
        notes += checked.notes
        if not checked.models:
            raise MappingError(
                " ".join(checked.notes)
                or "No model came out: what COLMAP built has hardly a point (see the images in "
                "the report). Is there parallax between the photographs (a camera that only turns "
                "has none), and enough overlap?"
            )
        return checked.models, checked.reasons

    def _drop_stale(self) -> None:
        """Take away what was made of another model."""
        stale = stale_products(self.folder, OF_MODEL)
        if stale:
            self.folder.drop(*stale)
            logger.info("Removed what was made of the model before: %s", ", ".join(stale))

    def _held(self) -> set[str]:
        """Images whose poses must not move."""
        return set(self.inputs.poses_if("fixed") or ())

    def _refine_by_warps(self, model: Any, fixed: set[int]) -> str:
        matcher = self.method.matcher

        def read(name: str) -> Any:
            return self.photographs.read(name, matcher.image_options)

        registered = {model.image(i).name for i in model.reg_image_ids()}
        pairs = [p for p in self.layers.first.selection.pairs if registered.issuperset(p)]
        budget = memory_budget(matcher.device, self.options.cache_gb)
        first = matcher.encode(read(pairs[0][0])) if pairs else None
        size = max(1, encoding_bytes(first))
        order = order_pairs(pairs, max(2, budget.total // size))
        rounds = self.options.warps.rounds
        with (
            EncodingPool(
                read,
                matcher.encode,
                order * rounds,
                budget,
                matcher.device,
            ) as pool,
            self.inputs.bar(rounds * len(order), "Reread", "pairs") as bar,
        ):
            if first is not None:
                pool.put(pairs[0][0], first)
            position = itertools.count()

            def warp(a: str, b: str) -> Any:
                here = next(position)
                encodings = pool.acquire([(a, b)], here)
                try:
                    return matcher.warp_batch(encodings)[0]
                finally:
                    pool.release([(a, b)])

            sentence = colmap.refine_by_warps(
                model,
                warp,
                order,
                options=self.options.warps,
                fixed=fixed,
                threads=1 if self.options.deterministic else -1,
                progress=bar.update,
                held=self._held(),
            )
            self.layers.first.dense_encodings += len(pool.encoded)
        return sentence

    def _rounds(self) -> int:
        """Of refinement by patches."""
        return self.options.refine.rounds or (1 if self.options.quality == "fast" else 2)

    def _refine_by_patches(self, model: Any, fixed: set[int]) -> Refined:
        import cv2

        largest = max(record.width * record.height for record in self.records.values())

        @functools.lru_cache(_GREY_BYTES // largest)
        def stored(name: str) -> np.ndarray:
            rgb = image_module.read_rgb(self.records[name], upright=False)
            return cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)

        def gray(name: str) -> np.ndarray:
            return stored(name).astype(np.float32)

        total = 2 * self._rounds() * model.num_reg_images()
        with self.inputs.bar(total, "Refine", "views") as bar:
            refined = colmap.refine_tracks(
                model,
                gray,
                rounds=self._rounds(),
                options=self.options.refine,
                fixed=fixed,
                threads=1 if self.options.deterministic else -1,
                progress=bar.update,
                held=self._held(),
                scale=self.inputs.scale(),
            )
            bar.total = bar.n
            bar.refresh()
        return refined

    # ------------------------------------------------------------------ dense, export and report

    def densify(self) -> None:
        """The dense model of the largest model."""
        if not self.models:
            return
        try:
            work = Densification(
                folder=self.folder,
                model_key=product_key(self.folder),
                images=self.inputs.root,
                photographs=self.photographs,
                options=select(DepthOptions, self.options),
                quality=self.options.quality,
                loader=self.method.loader if self.method.matcher.info.has_warps else None,
                where=self.inputs.where,
                cache_gb=self.options.cache_gb,
                prune=self.options.prune,
                show=self.inputs.show,
            )
            for step in work.steps():
                step.run()
        except Exception as error:  # the report and what else is wanted come first
            self.failure = error

    def export(self) -> None:
        """The models in other formats. A format that fails leaves no old one."""
        if not self.models:
            return
        exports = Exports(
            folder=self.folder,
            models=self.models,
            images=self.inputs.root,
            records=self.inputs.turned_records(),
            masks=masks_in(self.options.masks, self.inputs.source),
            options=select(TargetOptions, self.options),
            show=self.inputs.show,
        )
        self.failure = exports.make(self.options.export) or self.failure

    def masked(self) -> dict[str, str]:
        """Images of which their masks leave nothing, and the sentence that says so."""
        masks = self.photographs.masks
        empty = [name for name in self.names if not len(self.layers.keypoints(name))]
        said = {name: masks.nothing_left(self.records[name]) for name in empty if masks}
        return {name: why for name, why in said.items() if why}
