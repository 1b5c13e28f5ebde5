"""The k most similar images by a global descriptor.

The default descriptor needs no download: VLAD (Jégou et al., "Aggregating local descriptors into a
compact image representation", CVPR 2010) over the matcher's own local descriptors, with a codebook
learnt on the scene and the intra-normalisation of Arandjelović and Zisserman ("All about VLAD",
CVPR 2013). Other descriptors join through ``register_descriptor`` or as a file in hloc's layout.

VLAD sums descriptors up and so confuses places that look alike. Where the local descriptors are at
hand, they choose the partners from a shortlist three times as long, by mutual nearest neighbours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.pairs.base import Pair, best_of, best_pairs, unique_names

if TYPE_CHECKING:
    from gim_hloc.types import ImageData, ImageOptions

_STRONGEST = 400  # local descriptors of an image that re-ranking compares
_RATIO = 0.85  # of the distances to the nearest and the second nearest descriptor
_CHUNK = 65536  # descriptors assigned to clusters at once: 16 MB of distances for 64 clusters


ImageLoader = Callable[[str, "ImageOptions"], "ImageData"]


class GlobalDescriptor(Protocol):
    """Computes one vector per image. Similar images have a high cosine."""

    needs_local: bool  # whether ``local`` must be given

    def __call__(
        self,
        names: Sequence[str],
        *,
        local: Mapping[str, np.ndarray] | None,
        load_image: ImageLoader | None,
    ) -> np.ndarray:
        """Describe images.

        Args:
            names: N image names, sorted.
            local: name -> local descriptors (n, D) of the matcher, strongest first, or None. It may
                read lazily.
            load_image: reads an image at the size wanted, or None.

        Returns:
            (N, E) float array; an all-zero row marks an image that must not be retrieved.
        """
        ...


class Vlad:
    """The default global descriptor; see ``vlad``."""

    needs_local = True

    def __init__(self, *, clusters: int = 64, seed: int = 0) -> None:
        self.clusters = clusters
        self.seed = seed

    def __call__(
        self,
        names: Sequence[str],
        *,
        local: Mapping[str, np.ndarray] | None,
        load_image: ImageLoader | None,
    ) -> np.ndarray:
        """Aggregate the local descriptors of each image."""
        if local is None:
            raise InputError("Retrieval by VLAD needs the local descriptors of a sparse matcher")
        return vlad(Rows(names, local), clusters=self.clusters, seed=self.seed)


class Rows(Sequence[np.ndarray]):
    """The values of a mapping in the order of names, read when they are used."""

    def __init__(self, names: Sequence[str], values: Mapping[str, np.ndarray]) -> None:
        self._names = names
        self._values = values

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i: Any) -> Any:
        return self._values[self._names[i]]


_DESCRIPTORS: dict[str, Callable[..., GlobalDescriptor]] = {"vlad": Vlad}


def register_descriptor(name: str, make: Callable[..., GlobalDescriptor]) -> None:
    """Offer another global descriptor to ``PairOptions.descriptor``.

    Args:
        name: its name in options and on the command line.
        make: called with ``clusters`` and ``seed`` of the pair options (ignore what does not
            apply), returns the descriptor.
    """
    _DESCRIPTORS[name] = make


def make_descriptor(name: str, *, clusters: int = 64, seed: int = 0) -> GlobalDescriptor:
    """Make a registered global descriptor.

    Raises:
        InputError: if the name is not registered.
    """
    if name not in _DESCRIPTORS:
        known = ", ".join(sorted(_DESCRIPTORS))
        raise InputError(f"Unknown global descriptor '{name}'; known are: {known}")
    return _DESCRIPTORS[name](clusters=clusters, seed=seed)


def retrieval(
    names: Sequence[str],
    descriptors: np.ndarray,
    *,
    k: int = 20,
    min_score: float | None = None,
    exclude: Iterable[Pair] = (),
    local: Mapping[str, np.ndarray] | None = None,
    database: tuple[Sequence[str], np.ndarray] | None = None,
    database_local: Mapping[str, np.ndarray] | None = None,
) -> list[Pair]:
    """Pair each image with the k most similar ones by cosine similarity.

    Args:
        names: N image names.
        descriptors: (N, D), row i belongs to ``names[i]``; need not be normalised. Rows of zeros
            (images without features) are never neighbours.
        k: partners per image.
        min_score: least cosine similarity of a pair; None accepts every value.
        exclude: pairs that are settled already, for example by ``sequential``: they take none of
            the k places, so that the search finds loops instead of the neighbouring frames.
        local: name -> (n, D) local descriptors, strongest first. With them, the k partners are
            those of the 3 k most similar images that share most mutual nearest neighbours.
        database: (names, descriptors) to search in instead, for localisation. Then the pairs are
            directed, (query, database image), sorted by query and then name, and a query that is in
            the database is not paired with itself.
        database_local: as ``local``, of the database's images.

    Returns:
        Sorted pairs.

    Raises:
        ValueError: if shapes do not fit or a name occurs twice.
        InputError: if ``k`` is below 1.
    """
    if k < 1:
        raise InputError(f"Retrieval needs at least 1 neighbour per image, not {k}")
    if database is None:
        ordered, scores_of = cosine_scores(names, descriptors, min_score=min_score)
        rerank = None if local is None else mutual_neighbours(ordered, local)
        return best_pairs(ordered, scores_of, k, exclude=exclude, rerank=rerank)
    queries, query_rows = _normalised(names, descriptors)
    targets, target_rows = _normalised(*database)
    if query_rows.shape[1] != target_rows.shape[1]:
        raise ValueError(
            f"Query descriptors have {query_rows.shape[1]} values, database descriptors "
            f"{target_rows.shape[1]}"
        )
    count = None
    if local is not None and database_local is not None:
        count = mutual_neighbours(queries, local, (targets, database_local))
    column = {name: j for j, name in enumerate(targets)}
    settled: dict[str, list[int]] = {}
    for query, target in exclude:
        if target in column:
            settled.setdefault(query, []).append(column[target])
    pairs: list[Pair] = []
    for i, query in enumerate(queries):
        scores = _scores(query_rows[i : i + 1], target_rows, min_score)[0]
        if query in column:
            scores[column[query]] = -np.inf
        scores[settled.get(query, [])] = -np.inf
        best = best_of(scores, k, partial(count, i) if count is not None else None)
        pairs.extend((query, targets[j]) for j in sorted(best.tolist()))
    return pairs


def mutual_neighbours(
    names: Sequence[str],
    local: Mapping[str, np.ndarray],
    others: tuple[Sequence[str], Mapping[str, np.ndarray]] | None = None,
) -> Callable[[int, np.ndarray], np.ndarray]:
    """Compare images by the strongest of their local descriptors.

    Args:
        names: images.
        local: name -> (n, D) local descriptors, strongest first; read once an image, when needed.
        others: images to compare with, and their descriptors; the same ones by default.

    Returns:
        (index of an image, indices (m,) of others) -> (m,) numbers of mutual nearest neighbours.
    """

    def strongest(names: Sequence[str], local: Mapping[str, np.ndarray], index: int) -> np.ndarray:
        rows = _vectors(local[names[index]][:_STRONGEST])
        return _unit(rows).astype(np.float16)  # half: all images stay in memory

    first = cache(partial(strongest, names, local))
    second = first if others is None else cache(partial(strongest, *others))

    def count(i: int, found: np.ndarray) -> np.ndarray:
        rows = first(i).astype(np.float32)
        return np.array([_mutual(rows, second(j).astype(np.float32)) for j in found.tolist()])

    return count


def _mutual(a: np.ndarray, b: np.ndarray) -> int:
    """Number of distinct mutual nearest neighbours of unit vectors (N, D) and (M, D)."""
    if len(a) < 1 or len(b) < 2:
        return 0
    cosine = a @ b.T
    rows, nearest = np.arange(len(a)), cosine.argmax(1)
    mutual = cosine.argmax(0)[nearest] == rows
    # Half of all descriptors have a mutual neighbour by chance; Lowe's ratio leaves few of these.
    first = cosine[rows, nearest]
    cosine[rows, nearest] = -1
    second = cosine.max(1)
    return int((mutual & (1 - first < _RATIO**2 * (1 - second))).sum())


def cosine_scores(
    names: Sequence[str], descriptors: np.ndarray, *, min_score: float | None = None
) -> tuple[list[str], Callable[[np.ndarray], np.ndarray]]:
    """Sorted names and a function that gives rows of their cosine similarity matrix."""
    ordered, unit = _normalised(names, descriptors)
    return ordered, lambda rows: _scores(unit[rows], unit, min_score)


def _normalised(names: Sequence[str], descriptors: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names in sorted order with their descriptors, of unit length or zero."""
    rows = np.asarray(descriptors, dtype=np.float32)
    if rows.ndim != 2 or len(rows) != len(names):
        raise ValueError(
            f"Need one global descriptor per image: {len(names)} names, array {rows.shape}"
        )
    ordered = unique_names(names)
    position = {name: i for i, name in enumerate(names)}
    # Sorting first makes the result independent of the input order to the last bit.
    rows = rows[[position[name] for name in ordered]]
    return ordered, _unit(rows)


def _scores(queries: np.ndarray, rows: np.ndarray, min_score: float | None) -> np.ndarray:
    """Cosine similarity (Q, N); minus infinity where a side is zero or the score is too low."""
    scores: np.ndarray = queries @ rows.T
    if min_score is not None:
        scores[scores < min_score] = -np.inf
    scores[~queries.any(axis=1)] = -np.inf
    scores[:, ~rows.any(axis=1)] = -np.inf
    return scores


def _unit(x: np.ndarray) -> np.ndarray:
    """Scale the last axis to unit length; zeros stay zeros."""
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    unit: np.ndarray = x / np.where(norm > 0, norm, 1)
    return unit


def vlad(
    local_descriptors: Sequence[np.ndarray],
    *,
    clusters: int = 64,
    seed: int = 0,
    max_train: int = 32_000,
    iterations: int = 20,
) -> np.ndarray:
    """Aggregate local descriptors into one vector per image, with a codebook learnt on them.

    Each descriptor adds its difference from the nearest cluster centre to that cluster's block.
    Each block is normalised (a repeated texture counts once), then the whole.

    Args:
        local_descriptors: per image (n_i, D), n_i may be 0. Read twice, one image at a time, so a
            lazy sequence keeps memory small.
        clusters: size of the codebook.
        seed: of the training sample and of k-means. The same input gives the same output.
        max_train: descriptors that k-means sees, about equally many from each image.
        iterations: at most so many rounds of k-means.

    Returns:
        (N, clusters * D) float32 of unit length; zeros for an image without descriptors.

    Raises:
        ValueError: if descriptors of different length meet.
        InputError: if ``clusters`` is below 1.
    """
    centres = codebook(
        local_descriptors, clusters=clusters, seed=seed, max_train=max_train, iterations=iterations
    )
    return aggregate(local_descriptors, centres)


def codebook(
    local_descriptors: Sequence[np.ndarray],
    *,
    clusters: int = 64,
    seed: int = 0,
    max_train: int = 32_000,
    iterations: int = 20,
) -> np.ndarray:
    """Cluster centres (K, D) float32 for ``aggregate``, learnt on images; see ``vlad``."""
    if clusters < 1:
        raise InputError(f"VLAD needs at least 1 cluster, not {clusters}")
    n = len(local_descriptors)
    share = max(1, max_train // max(n, 1))
    sample = []
    lengths = set()
    for i in range(n):
        rows = _vectors(local_descriptors[i])
        lengths.add(rows.shape[1])
        if len(rows) > share:
            chosen = np.random.default_rng([seed, i]).choice(len(rows), share, replace=False)
            rows = rows[np.sort(chosen)]
        sample.append(rows)
    if len(lengths) > 1:
        raise ValueError(f"Local descriptors of different length: {sorted(lengths)}")
    if not any(len(rows) for rows in sample):
        return np.zeros((clusters, max(lengths, default=1)), dtype=np.float32)
    return _kmeans(np.concatenate(sample), clusters, seed=seed, iterations=iterations)


def aggregate(local_descriptors: Sequence[np.ndarray], centres: np.ndarray) -> np.ndarray:
    """VLAD vectors (N, K * D) of images for given centres (K, D); see ``vlad``."""
    n, clusters = len(local_descriptors), len(centres)
    out = np.zeros((n, centres.size), dtype=np.float32)
    for i in range(n):
        rows = _vectors(local_descriptors[i])
        if len(rows) == 0:
            continue
        sums, counts = _cluster_sums(rows, _assign(rows, centres), clusters)
        blocks = _unit(sums - counts[:, None] * centres)
        out[i] = _unit(blocks.ravel())
    return out


def _vectors(rows: np.ndarray) -> np.ndarray:
    """Descriptors (n, D) as float32; binary ones (uint8) as a vector of their bits, ±1/2."""
    if rows.dtype == np.uint8:
        return np.unpackbits(rows, axis=1).astype(np.float32) - np.float32(0.5)
    return np.asarray(rows, dtype=np.float32)


def _cluster_sums(
    rows: np.ndarray, labels: np.ndarray, clusters: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sum (K, D) and number (K,) of the rows of each cluster."""
    from scipy import sparse

    # A sparse product adds each row once, in order: the sums do not depend on BLAS threads, and
    # np.add.at is many times slower.
    ones = np.ones(len(rows), dtype=np.float32)
    members = sparse.csr_matrix((ones, (labels, np.arange(len(rows)))), (clusters, len(rows)))
    sums: np.ndarray = members @ rows
    return sums, np.bincount(labels, minlength=clusters).astype(np.float32)


def _assign(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Index of the nearest centre of each row (N,)."""
    half = 0.5 * np.einsum("kd,kd->k", centres, centres)
    labels = np.empty(len(rows), dtype=np.int64)
    for start in range(0, len(rows), _CHUNK):
        block = rows[start : start + _CHUNK]
        labels[start : start + _CHUNK] = np.argmax(block @ centres.T - half, axis=1)
    return labels


def _kmeans(rows: np.ndarray, clusters: int, *, seed: int, iterations: int) -> np.ndarray:
    """Centres (K, D) by Lloyd's algorithm from a k-means++ start."""
    rng = np.random.default_rng(seed)
    # The start needs only a rough idea of the density, and it passes over its rows K times.
    start = rows
    if len(rows) > 50 * clusters:
        start = rows[np.sort(rng.choice(len(rows), 50 * clusters, replace=False))]
    centres = np.empty((clusters, rows.shape[1]), dtype=np.float32)
    centres[0] = start[rng.integers(len(start))]
    nearest = np.sum((start - centres[0]) ** 2, axis=1, dtype=np.float64)
    for c in range(1, clusters):
        total = nearest.sum()
        # With fewer distinct rows than clusters, spare centres repeat a row and stay unused.
        p = nearest / total if total > 0 else None
        centres[c] = start[rng.choice(len(start), p=p)]
        nearest = np.minimum(nearest, np.sum((start - centres[c]) ** 2, axis=1, dtype=np.float64))
    labels = _assign(rows, centres)
    for _ in range(iterations):
        sums, counts = _cluster_sums(rows, labels, clusters)
        used = counts > 0
        centres[used] = sums[used] / counts[used, None]
        previous, labels = labels, _assign(rows, centres)
        if np.array_equal(previous, labels):
            break
    return centres


def read_global_descriptors(path: Path | str, names: Sequence[str]) -> np.ndarray:
    """Read global descriptors from an h5 file in hloc's layout.

    Args:
        path: h5 file with a group per image name (nested by slashes) that holds the dataset
            ``global_descriptor``, as hloc's ``extract_features`` writes it.
        names: the images wanted.

    Returns:
        (N, D) float32 in the order of ``names``.

    Raises:
        InputError: if the file cannot be read or lacks an image.
    """
    from gim_hloc.hloc_files import read  # h5py comes with it

    with _open_h5(path, names, "global_descriptor") as file:
        rows = [read(file, f"{name}/global_descriptor").ravel() for name in names]
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        raise InputError(f"'{path}' holds global descriptors of several widths: {sorted(widths)}.")
    return np.stack(rows).astype(np.float32) if rows else np.zeros((0, 1), dtype=np.float32)


class Lazy(Mapping[str, np.ndarray]):
    """Arrays by name that are read each time they are asked for."""

    def __init__(self, names: Iterable[str], read: Callable[[str], np.ndarray]) -> None:
        self._names = list(names)
        self._read = read

    def __getitem__(self, name: str) -> np.ndarray:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class LocalDescriptors(Lazy):
    """Local descriptors (n, D) by image name in a feature file of hloc's layout.

    One image is read at a time, when it is asked for.

    Args:
        path: h5 file with a group per image name that holds ``descriptors`` (D, n) and, unless they
            stand strongest first, ``scores`` (n,).
        names: the images wanted.

    Raises:
        InputError: if the file cannot be read or lacks an image.
    """

    def __init__(self, path: Path | str, names: Sequence[str]) -> None:
        with _open_h5(path, names, "descriptors"):
            pass  # the check is all
        super().__init__(names, partial(_read_local, path))


def _read_local(path: Path | str, name: str) -> np.ndarray:
    from gim_hloc.hloc_files import find, read  # h5py comes with it

    with _open_h5(path, [name], "descriptors") as file:
        rows = read(file, f"{name}/descriptors").T
        if find(file, f"{name}/scores") is None:
            return rows
        return strongest_first(rows, read(file, f"{name}/scores"))


def strongest_first(rows: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Descriptors (n, D) sorted by their scores (n,); hloc's are not always."""
    return rows[np.argsort(-scores, kind="stable")]


@contextlib.contextmanager
def _open_h5(path: Path | str, names: Sequence[str], dataset: str) -> Iterator[Any]:
    """Open a file in hloc's layout that has a dataset for each of the images."""
    from gim_hloc.hloc_files import find, open_h5  # h5py comes with it

    with open_h5(path, "descriptor file") as file:
        missing = [name for name in names if find(file, f"{name}/{dataset}") is None]
        if missing:
            shown = ", ".join(f"'{name}'" for name in missing[:5])
            raise InputError(
                f"'{path}' lacks the {dataset} of {len(missing)} of {len(names)} images: {shown}"
                f"{', …' if len(missing) > 5 else ''}. Extract it for all images first."
            )
        yield file
