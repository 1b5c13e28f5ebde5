"""Verification of pairs, each kept in the run's cache: what was verified once is only read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from gim_hloc import colmap, engine
from gim_hloc.cache import Cache
from gim_hloc.errors import InputError, OutputError
from gim_hloc.options import VerifyOptions
from gim_hloc.pipelines.correspondences import Correspondences
from gim_hloc.pipelines.inputs import Inputs
from gim_hloc.pipelines.layers import Layers
from gim_hloc.pipelines.matching import VerifyTask, pair_name, spread
from gim_hloc.store import digest, remove_cache, scored_rows

Pair = tuple[str, str]
Result = Mapping[str, np.ndarray]  # of ``colmap.Verification.verify``


class Verifier:
    """Verifies what layers matched.

    Attributes:
        cache: of the results.
        used: keys in it that this run asked for.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.options = inputs, inputs.options
        cache_file = inputs.folder.cache_file("database.db")
        if inputs.part is None and (self.options.overwrite or self.options.again("verify")):
            remove_cache(cache_file)
        self.cache = Cache(cache_file)
        self.used: set[str] = set()

    def close(self) -> None:
        """Close the cache."""
        self.cache.close()

    def bounds(self, layer: Correspondences) -> VerifyOptions:
        """The verification's numbers, with the matcher's own bound where the user set none."""
        verify = self.options.verify
        if verify.min_confidence_sum is None:
            own = layer.method.min_confidence_sum
            verify = dataclasses.replace(verify, min_confidence_sum=own)
        return verify

    def _verification(self, layer: Correspondences) -> colmap.Verification:
        return colmap.Verification(
            cameras=self.inputs.cameras,
            options=self.bounds(layer),
            seed=self.options.seed,
            poses=self.inputs.poses_if("fixed") or {},
            scale=self.inputs.scale(layer.method),
        )

    def keys(self, layer: Correspondences) -> dict[Pair, str]:
        """Keys of the results of all pairs of a layer."""
        verification = self._verification(layer)
        settings = [layer.matches.stamp, verification.settings()]
        keys = {
            pair: digest(
                [
                    settings,
                    layer.matches.source(pair_name(pair)) or "",
                    verification.pair_facts(*pair),
                ]
            )
            for pair in layer.selection.pairs
        }
        self.used.update(keys.values())
        return keys

    def verify(self, layer: Correspondences) -> dict[Pair, str]:
        """Verify what is not verified yet of a layer, or this part's share; the results' keys."""
        keys = self.keys(layer)
        pairs = self.inputs.folder.share(list(keys))
        todo = [pair for pair in pairs if keys[pair] not in self.cache]
        if not todo:
            return keys
        one = self.options.deterministic or bool(self.inputs.where.devices)
        task = VerifyTask(
            verification=self._verification(layer),
            features=layer.features.path,
            matches=layer.matches.path,
            keys={name: self.inputs.pair_key(name) for name in self.inputs.names},
            threads=1 if one else engine.usable_cores(),
        )
        with self.inputs.bar(len(pairs), "Verify", "pairs", len(pairs) - len(todo)) as bar:

            def done(pair: Pair, arrays: dict[str, np.ndarray]) -> None:
                self.cache.put(keys[pair], arrays)
                bar.update()

            spread(task, todo, self.inputs.where, done, chunk=64)
        return keys

    def result(self, key: str, pair: Pair) -> dict[str, np.ndarray]:
        """What was found of a pair."""
        found = self.cache.get(key)
        if found is None:
            raise OutputError(
                f"{self.cache.path} lost the pair {pair[0]} {pair[1]}. Repeat the command: it is "
                "verified again."
            )
        return found

    def confidences(self, layer: Correspondences) -> dict[Pair, float]:
        """Sum of the inliers' confidences of each pair of a layer; 0 for what was dropped."""
        keys = self.verify(layer)
        found = {}
        for pair, key in keys.items():
            result = self.result(key, pair)
            found[pair] = float(result["confidence"]) if len(result["inliers"]) else 0.0
        return found

    def merged(
        self, layers: Layers, keys: Sequence[Mapping[Pair, str]], pair: Pair
    ) -> tuple[np.ndarray, Result]:
        """Matches and geometry of a pair from all layers, by rows of the database.

        Layers with keypoints of their own add up; of those that match the same keypoints the last
        one that passed counts.
        """
        found: dict[int, tuple[Correspondences, Result]] = {}
        for layer, own in zip(layers.all, keys, strict=True):
            if pair in own:
                result: Result = self.result(own[pair], pair)
                slot = 0 if layer.shared else layers.all.index(layer)
                if slot not in found or len(result["inliers"]):
                    found[slot] = layer, result
        rows = np.concatenate(
            [layers.shifted(layer, pair, layer.rows(pair)) for layer, _ in found.values()]
        )
        passed = [(layer, result) for layer, result in found.values() if len(result["inliers"])]
        if len(passed) > 1:
            return rows, self._together(layers, pair, passed)
        layer, result = passed[0] if passed else next(iter(found.values()))
        inliers = layers.shifted(layer, pair, result["inliers"])
        doubtful = np.array(not passed and any(bool(r["doubtful"]) for _, r in found.values()))
        return rows, {**result, "inliers": inliers, "doubtful": doubtful}

    def _together(
        self, layers: Layers, pair: Pair, passed: Sequence[tuple[Correspondences, Result]]
    ) -> Result:
        """One geometry of what passed in several layers."""
        rows = [layers.shifted(layer, pair, result["inliers"]) for layer, result in passed]
        scores = [_scores_of(layer, pair, result["inliers"]) for layer, result in passed]
        verification = dataclasses.replace(
            self._verification(layers.first),
            options=dataclasses.replace(self.options.verify, min_confidence_sum=0.0),
        )
        xy0, xy1 = (layers.keypoints(name) for name in pair)
        return verification.verify(*pair, xy0, xy1, np.concatenate(rows), np.concatenate(scores))

    def require_matched(self, layer: Correspondences) -> None:
        """A part of a job verifies what is matched already."""
        pairs = layer.selection.pairs
        source = self.inputs.photographs.pair_source
        missing = [pair for pair in pairs if not layer.raw.has(pair_name(pair), source(pair))]
        if missing or not layer.matches.path.exists() or not layer.features.path.exists():
            raise InputError(
                f"--step verify: {len(missing)} of {len(pairs)} pairs are not matched yet. Run "
                "--step match, and then the same command with --stop-after "
                f"{'link' if layer.linker.detector_free else 'match'} instead of --step."
            )


def _scores_of(layer: Correspondences, pair: Pair, inliers: np.ndarray) -> np.ndarray:
    rows, scores = scored_rows(layer.matches.get(pair_name(pair))[0])
    if scores is None:
        return np.ones(len(inliers), np.float32)
    place = {tuple(row): score for row, score in zip(rows.tolist(), scores, strict=True)}
    return np.array([place[tuple(row)] for row in inliers.tolist()], dtype=np.float32)


__all__ = ["Result", "Verifier"]
