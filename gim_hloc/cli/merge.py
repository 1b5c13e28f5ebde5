"""``gim-merge OUTPUT SHARD...``: bring together what array jobs did in folders of their own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from gim_hloc.cli import common
from gim_hloc.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Bring together what jobs with --step and --shard did where machines share no file system.

    Each job had an OUTPUT of its own, copied to this machine. Nothing of them is changed. A run of
    the same command in OUTPUT, without --step and --shard, then takes over what they did.
    """

    output: tyro.conf.Positional[Path]
    """Folder of the run; made if missing."""
    shards: tyro.conf.Positional[tuple[Path, ...]]
    """Output folders of the jobs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    options = common.parse(MergeOptions, args=common.prog(argv), prog="gim-merge")
    common.configure_logging()
    return common.run(lambda: merge(options.output, options.shards))


def merge(output: Path, shards: Sequence[Path]) -> int:
    """Copy the entries of the shards' caches to where the next run in ``output`` finds them.

    Raises:
        InputError: a shard holds nothing that a run left.
        LockedError: a run works in one of the folders.
    """
    from gim_hloc.cache import Cache
    from gim_hloc.lock import FolderLock
    from gim_hloc.pipelines.run import HIDDEN

    taken = 0
    with FolderLock(output):
        for number, shard in enumerate(shards):
            caches = [*shard.glob(f"{HIDDEN}/*-of-*/*.cache"), *shard.glob("*.cache")]
            if not caches:
                raise InputError(f"{shard} holds nothing that a job with --step left.")
            folder = output / HIDDEN / f"merged-{number}-of-{len(shards)}"
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(caches):
                with Cache(folder / path.name) as cache:
                    taken += cache.merge(path)
    logger.info("%d results of %d shards lie ready in %s", taken, len(shards), output)
    return 0
