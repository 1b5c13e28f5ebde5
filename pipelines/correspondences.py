"""Keypoints and matches of a scene: encode, choose pairs, match, rotate, link."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gim_hloc.errors import InputError, some
from gim_hloc.options import StepName, to_mapping
from gim_hloc.pairs.files import read_pairs, write_pairs
from gim_hloc.pairs.retrieval import Lazy
from gim_hloc.pairs.select import Selection
from gim_hloc.pipelines import rotations
from gim_hloc.pipelines.inputs import Inputs
from gim_hloc.pipelines.matching import (
    EncodeTask,
    MatchTask,
    Stored,
    pair_name,
    spread,
)
from gim_hloc.pipelines.methods import Method
from gim_hloc.pipelines.run import Step
from gim_hloc.store import H5Store, digest, rows_from_matches0
from gim_hloc.tracks.base import matches0_arrays
from gim_hloc.tracks.linker import ImagePoints

logger = logging.getLogger(__name__)

Pair = tuple[str, str]

_ROUNDS = 3  # of looking for images that are stored rotated
_JUDGED = 1024  # strongest keypoints that the second matcher of a cascade judges turns by


class Correspondences:
    """The first half of a reconstruction: what one method finds.

    Args:
        inputs: of the run.
        method: that matches; the run's own by default.
        folder: of its files; that of the run by default.

    Attributes:
        detected: keypoints and descriptors of the detector.
        raw: what is stored of each matched pair.
        features: keypoints that the model is made of; of a sparse matcher ``detected``.
        matches: matches of these; of a sparse matcher ``raw``.
        keypoints: the newest ones of each image.
        selection: the pairs.
        encoded: images that were encoded in this run.
        matched: pairs likewise.
        dense_encodings: made in this run by a matcher without keypoints.
    """

    def __init__(
        self, inputs: Inputs, method: Method | None = None, folder: Path | None = None
    ) -> None:
        self.inputs, self.options, self.folder = inputs, inputs.options, inputs.folder
        self.output, self.names, self.records = inputs.output, inputs.names, inputs.records
        self.photographs, self.method = inputs.photographs, method or inputs.method
        self._place = folder
        self.linker = self.method.linker
        self.matcher, self.detector = self.method.matcher, self.method.detector
        self.keypoints: dict[str, np.ndarray] = {}
        self.selection: Selection
        self.encoded: set[str] = set()
        self.matched: set[Pair] = set()
        self.dense_encodings = 0
        self._rounds = 0
        if folder is None:
            self._read_rotations()
        self._open_stores()

    def close(self) -> None:
        """Close all files."""
        for store in self.stores():
            store.close()

    @property
    def shared(self) -> bool:
        """Whether the keypoints are those of another method, which has them already."""
        return False

    def rows(self, pair: Pair) -> np.ndarray:
        """(M, 2) matches of a pair, rows into ``keypoints``."""
        return rows_from_matches0(self.matches.get(pair_name(pair))[0]["matches0"])

    def confidence(self, pair: Pair) -> float:
        """Sum of the confidences of a pair's matches, verified or not."""
        scores = self.matches.get(pair_name(pair))[0].get("matching_scores0")
        return 0.0 if scores is None else float(scores[scores > 0].sum(dtype=float))

    def _open_stores(self) -> None:
        """The caches of the steps. ``detected`` and ``raw`` are what linking starts from."""
        if self.linker.detector_free:
            self.detected = self._store("anchors.h5", "encode")
            self.raw = self._store("raw_matches.h5", "match")
            self.features = self._store("features.h5", "link")
            self.matches = self._store("matches.h5", "link")
        else:
            self.detected = self.features = self._store("features.h5", "encode")
            self.raw = self.matches = self._store("matches.h5", "match")
        for store, what in ((self.detected, "Features"), (self.raw, "Matches")):
            if store.changed_settings:
                logger.info(
                    "%s of the earlier run are not reused: %s changed.",
                    what,
                    ", ".join(store.changed_settings),
                )

    def _store(self, name: str, step: StepName) -> H5Store:
        inputs = self.inputs
        # What an extension starts from was just put there.
        overwrite = self.options.overwrite and inputs.base is None
        place = self._place or self.output
        return H5Store(
            place / name,
            self.method.feature_settings if step == "encode" else self.method.match_settings,
            key_of=inputs.pair_key if "matches" in name else None,
            overwrite=inputs.part is None and (overwrite or self.options.again(step)),
            cache_file=None if self._place else self.folder.cache_file(name),
        )

    def stores(self) -> list[H5Store]:
        """All that are open."""
        return list(dict.fromkeys((self.detected, self.raw, self.features, self.matches)))

    # ------------------------------------------------------------------------------------ encode

    def encode(self) -> None:
        """Keypoints and descriptors of every image."""
        photographs, store = self.photographs, self.detected
        names = self.folder.share(self.names)
        todo = [n for n in names if not store.has(n, photographs.source(n))]
        with self.inputs.bar(len(names), "Encode", "images", len(names) - len(todo)) as bar:

            def done(name: str, entry: tuple[dict[str, np.ndarray], dict[str, Any]]) -> None:
                arrays, attributes = entry
                store.put(name, arrays, photographs.source(name), **attributes)
                self.encoded.add(name)
                logger.debug("encoded %s: %d keypoints", name, len(arrays["keypoints"]))
                bar.update()

            assert self.method.detector_loader is not None  # imported keypoints: another step
            task = EncodeTask(self.method.detector_loader, photographs, self.inputs.threads)
            spread(task, todo, self.inputs.where, done, chunk=4)
        if self.inputs.part is not None:
            return
        store.finalize(self.names, {"matcher": self.detector.info.name})
        self._read_keypoints(store)
        logger.info(
            "Encoded %d images (%d reused), %.0f keypoints an image",
            len(self.encoded),
            len(self.names) - len(self.encoded),
            np.mean([len(k) for k in self.keypoints.values()]),
        )

    def _read_keypoints(self, store: H5Store) -> None:
        self.keypoints = {name: store.get(name)[0]["keypoints"] for name in self.names}

    def take_over(self) -> None:
        """Take keypoints and matches over from hloc's files."""
        if self.inputs.imported is None:
            raise TypeError("only for imported files")
        with self.inputs.bar(len(self.selection.pairs), "Import", "pairs") as bar:
            notes = self.inputs.imported.take_over(
                self.records, self.selection.pairs, self.features, self.matches, bar.update
            )
        for note in notes:
            self.folder.note(note)
        self._read_keypoints(self.features)
        logger.info(
            "Imported %.0f keypoints an image, %d pairs",
            np.mean([len(k) for k in self.keypoints.values()]),
            len(self.selection.pairs),
        )

    # ------------------------------------------------------------------------------------- pairs

    def choose_pairs(self) -> None:
        """The pairs, and why these; half of the similar ones may wait (``add_pairs``)."""
        facts = self.folder.facts("pairs", self._pairs_key())
        path = self.output / "pairs.txt"
        if facts is not None and (self.inputs.part is not None or not facts.get("left")):
            listed = read_pairs(path, self.names)
            self.selection = Selection(pairs=listed, **facts)
        elif self.inputs.part is not None and self.inputs.plan.needs_descriptors:
            raise InputError(
                f"--step {self.inputs.part.step} works on pairs that are not chosen yet: run the "
                "same command with --stop-after pairs instead of --step first."
            )
        else:
            self.selection = self.inputs.select_pairs(
                lambda: Lazy(self.names, lambda n: self.detected.get(n)[0]["descriptors"].T)
            )
            self._keep_pairs()
        self.folder.notes += self.selection.notes

    def _pairs_key(self) -> str:
        inputs = self.inputs
        facts = [
            to_mapping(inputs.pair_options),
            [[name, self.photographs.source(name)] for name in self.names],
            [_file_stamp(path) for path in inputs.plan.files],
            self.method.feature_settings if inputs.plan.needs_descriptors else None,
            inputs.added,
        ]
        if inputs.adaptive:  # some were chosen by what was verified of the others
            cameras = [spec.to_facts() for spec in inputs.cameras]
            verification = to_mapping(self.options.verify), self.options.seed, inputs.poses_key()
            facts += [self.method.match_settings, cameras, *verification]
        return digest(facts)

    def _keep_pairs(self) -> None:
        if self.inputs.part is not None:
            return
        with self.folder.making("pairs", self._pairs_key()) as made:
            write_pairs(made.path / "pairs.txt", self.selection.pairs)
            made.facts = {
                k: v for k, v in vars(self.selection).items() if k not in ("pairs", "budget")
            }

    def add_pairs(self, pairs: Iterable[Pair]) -> None:
        """Match more pairs."""
        every = sorted({*self.selection.pairs, *pairs})
        if every != self.selection.pairs:
            self.selection.pairs[:] = every
            self.match()

    def close_pairs(self, notes: Sequence[str]) -> None:
        """No more pairs come; later runs take them as they are."""
        selection = self.selection
        assert selection.budget is not None
        taken, left = selection.budget.taken, selection.budget.left
        first = len(selection.pairs) - taken.total()
        told = (
            f"Of {len(selection.pairs)} pairs, {first} were chosen before any was matched, "
            f"{taken['joints']} to join groups of images that no verified pair connected, "
            f"{taken['loops']} to close loops, and {taken['few']} for images in few clear pairs; "
            f"{left} more were not needed."
        )
        logger.info("%s", told)
        selection.counts.update(taken)
        selection.notes.extend([told, *notes])
        self.folder.notes.extend([told, *notes])
        self.selection = dataclasses.replace(selection, left=0, budget=None)
        self._keep_pairs()

    # ------------------------------------------------------------------------------------- match

    def match(self) -> None:
        """What is stored of each pair."""
        photographs, store = self.photographs, self.raw
        pairs = self.folder.share(self.selection.pairs)
        todo = [p for p in pairs if not store.has(pair_name(p), photographs.pair_source(p))]
        logger.debug("to match: %d of %d pairs", len(todo), len(pairs))
        if self.inputs.part is not None:
            self._require_encoded(todo)
        task = self._match_task(todo)
        start = time.perf_counter()
        with self.inputs.bar(len(pairs), "Match", "pairs", len(pairs) - len(todo)) as bar:

            def done(pair: Pair, arrays: dict[str, np.ndarray]) -> None:
                store.put(pair_name(pair), arrays, photographs.pair_source(pair))
                self.matched.add(pair)
                count = len(self.linker.confidences(arrays))
                logger.debug("matched %s | %s: %d matches", *pair, count)
                bar.update()

            chunk = 16 if self.matcher.info.has_keypoints else 64  # neighbours share encodings
            spread(task, todo, self.inputs.where, done, chunk=chunk)
        if self.inputs.part is not None:
            return
        self.folder.notes += task.report.notes
        if self.linker.detector_free and task.report.encoded:
            self.dense_encodings += len(task.report.encoded)
            logger.info(
                "Encoded %d images %d times for %d pairs (%d encodings fit in memory)",
                len(set(task.report.encoded)),
                len(task.report.encoded),
                len(todo),
                task.report.capacity,
            )
        store.finalize([pair_name(p) for p in pairs], {"matcher": self.matcher.info.name})
        logger.info(
            "Matched %d pairs (%d reused) in %.1f s",
            len(todo),
            len(pairs) - len(todo),
            time.perf_counter() - start,
        )

    def _require_encoded(self, pairs: Sequence[Pair]) -> None:
        store = self.detected
        names = sorted({name for pair in pairs for name in pair})
        missing = [n for n in names if not store.has(n, self.photographs.source(n))]
        if missing:
            raise InputError(
                f"{len(missing)} images are not encoded yet: {some(missing)}. Run --step encode, "
                "or the same command with --stop-after pairs instead of --step, first."
            )

    def _stored(self) -> Stored:
        """Encodings to match."""
        return Stored(self.detected.path)

    def _match_task(self, todo: Sequence[Pair]) -> MatchTask:
        options = self.options
        anchored = self.linker.detector_free and options.tracks == "anchored"
        needed = sorted({name for pair in todo for name in pair}) if anchored else []
        assert self.method.loader is not None
        return MatchTask(
            loader=self.method.loader,
            photographs=self.photographs,
            stored=self._stored(),
            tracks=options.tracks,
            anchored=options.anchored,
            quantized=options.quantized,
            points=self._points(needed),
            threads=self.inputs.threads,
            batch_size=self.inputs.batch,
            cache_gb=options.cache_gb,
        )

    def _points(self, names: Sequence[str]) -> list[ImagePoints]:
        """What the linker is to know of images."""
        found = []
        for name in names:
            arrays, record = self.detected.get(name)[0], self.records[name]
            masks = self.photographs.masks
            found.append(
                ImagePoints(
                    name=name,
                    size=record.size,
                    keypoints=arrays["keypoints"],
                    scores=arrays["scores"],
                    mask=None if masks is None else masks.load(record),
                )
            )
        return found

    # --------------------------------------------------------------------------------- rotations

    def _read_rotations(self) -> None:
        """Take over what an earlier run found of images that are stored rotated."""
        self._decided = False
        entry = self.folder.steps.get("rotations", {})
        facts = entry.get("facts", {})
        if self.options.rotations == "none" or facts.get("settings") != digest(
            self.method.match_settings
        ):
            return
        self._decided = entry.get("key") == self._rotations_key()
        for name, (turn, sha) in facts["images"].items():
            if name in self.records and self.records[name].sha256 == sha:
                self.photographs.turns[name] = turn

    def _rotations_key(self) -> str:
        return digest([self.method.match_settings, sorted(r.sha256 for r in self.records.values())])

    def find_rotated(self) -> list[Step] | None:
        """Look for images that are stored rotated; with new ones, another pass is made."""
        # Which way up an image fits is judged with the detector's matches, whatever the matcher.
        turns = self.photographs.turns
        wanted = self.options.rotations == "auto" and not self.detector.info.rotation_invariant
        if wanted and not self._decided and self._rounds < _ROUNDS:
            self._rounds += 1
            found = self._find_rotations()
            for name, turn in found.items():
                turns[name] = (turns.get(name, 0) + turn) % 4
            self._decided = not found
            with self.folder.making("rotations", self._rotations_key()) as made:
                made.facts = {
                    "settings": digest(self.method.match_settings),
                    "images": {n: [t, self.records[n].sha256] for n, t in sorted(turns.items())},
                }
                made.whole = self._decided
            if found:
                again = [Step("encode", self.encode), Step("match", self.match)]
                if self.inputs.plan.needs_descriptors:  # similarity was judged by the unturned ones
                    again.insert(1, Step("pairs", self.choose_pairs))
                return [*again, Step("rotations", self.find_rotated)]
        if turns:
            listed = some([f"{n} by {90 * t}" for n, t in sorted(turns.items())], 8)
            self.folder.notes.append(
                f"{len(turns)} images are stored turned without EXIF saying so and were "
                f"matched upright (degrees clockwise): {listed}. Poses and "
                "keypoints are those of the stored files."
            )
            logger.info("%s", self.folder.notes[-1])
        return None

    def _find_rotations(self) -> dict[str, int]:
        levels, quality = self.inputs.levels, self.options.quality
        cascade = len(levels) > 1
        sums = {
            pair: float(self.linker.confidences(self.raw.get(pair_name(pair))[0]).sum(dtype=float))
            for pair in self.selection.pairs
        }
        groups = rotations.weak_groups(
            self.names,
            sums,
            {name: len(k) for name, k in self.keypoints.items()},
            self.detector.info.min_confidence_sum.get(quality),
            rotations.STRONG_SHARE / 3 if cascade else rotations.STRONG_SHARE,
        )
        if not groups:
            return {}
        # Of a cascade the second matcher judges, which knows the keypoints of the first.
        matcher = self.inputs.method_of(levels[1], quality).matcher if cascade else self.detector
        bound = matcher.info.min_confidence_sum.get(quality)
        most = _JUDGED if cascade else None
        stored = Stored(self.detected.path, most)

        def confidence(name: str, turn: int, others: Sequence[str]) -> float:
            encoding = matcher.encode(self.photographs.read(name, matcher.image_options, turn))
            if most is not None:
                encoding = encoding.strongest(most)
            found = matcher.match_batch([(encoding, stored(other)) for other in others])
            return sum(float(matches.scores.sum()) for matches in found)

        found: dict[str, int] = {}
        with self.inputs.bar(len(groups), "Rotate", "groups") as bar:
            for group in groups:
                if not found.keys() & set(group.members):
                    turn = rotations.best_rotation(group, confidence, bound, judged_anew=cascade)
                    if turn is not None:
                        found.update(dict.fromkeys(group.members, turn))
                bar.update()
        return {name: turn for name, turn in found.items() if turn}

    # -------------------------------------------------------------------------------------- link

    def link(self) -> None:
        """Link the raw matches of all pairs into tracks: keypoints and matches of every image."""
        pairs = self.selection.pairs
        source = digest([[pair_name(p), self.photographs.pair_source(p)] for p in pairs])
        names = [pair_name(p) for p in pairs]
        reused = all(self.features.has(n, source) for n in self.names) and all(
            self.matches.has(n, source) for n in names
        )
        if not reused:
            self.linker.prepare(self._points(self.names))
            with self.inputs.bar(len(pairs), "Link", "pairs") as bar:
                tracks = self.linker.link(
                    self.names, pairs, lambda p: self.raw.get(pair_name(p))[0], bar.update
                )
            for name in self.names:
                arrays = {
                    "keypoints": tracks.keypoints[name],
                    "image_size": np.array(self.records[name].size, dtype=np.int64),
                }
                self.features.put(name, arrays, source)
            nothing = np.zeros((0, 2), np.int64), np.zeros(0, np.float32)
            for pair, name in zip(pairs, names, strict=True):
                rows = tracks.matches.get(pair, nothing[0])
                scores = tracks.scores.get(pair, nothing[1])
                count = len(tracks.keypoints[pair[0]])
                self.matches.put(name, matches0_arrays(rows, scores, count), source)
        attributes = {
            "matcher": self.matcher.info.name,
            "tracks": self.options.tracks,
        }
        # Linking is quick, and every other list of pairs gives other tracks: none are kept.
        self.features.finalize(self.names, attributes, keep=False)
        self.matches.finalize(names, attributes, keep=False)
        self._read_keypoints(self.features)
        logger.info(
            "Linked into %.0f keypoints an image (%s tracks)",
            np.mean([len(k) for k in self.keypoints.values()]),
            self.options.tracks,
        )


def _file_stamp(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]
