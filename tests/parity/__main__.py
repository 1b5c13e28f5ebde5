"""Do our networks give the reference's numbers? ``python -m tests.parity FOLDER [PATTERN ...]``.

Runs the network of every golden file of FOLDER (or of those whose names match a PATTERN such as
"loftr_*") and prints a table, one line an array. Exit code 1: an array is outside its limit or
could not be made.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import golden


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("folder", type=Path, help="*.npz, MODEL.keys.json and tolerances.json")
    parser.add_argument("patterns", nargs="*", default=["*"], help="only files of these names")
    parser.add_argument("--failures", action="store_true", help="print only arrays that fail")
    arguments = parser.parse_args(argv)
    paths = [
        path
        for path in sorted(arguments.folder.glob("*.npz"))
        if any(fnmatch.fnmatch(path.stem, p.removesuffix(".npz")) for p in arguments.patterns)
    ]
    if not paths:
        parser.error(f"{arguments.folder} holds no golden files (*.npz) of these names")
    limits = golden.tolerances(arguments.folder)
    failed, unknown = [], []
    for path in paths:
        if not golden.family(path):
            unknown.append(path.stem)
            continue
        start = time.perf_counter()
        rows = golden.check_file(path, limits.get(path.stem))
        wrong = [row for row in rows if row.state == "FAIL"]
        failed += [path.stem] * bool(wrong)
        print(f"\n{path.stem}\n{golden.HEADER}")
        print("\n".join(row.line() for row in (wrong if arguments.failures else rows)))
        judged = sum(row.state in ("ok", "FAIL") for row in rows)
        verdict = f"{len(wrong)} FAILED" if wrong else "all within their limits"
        seconds = time.perf_counter() - start
        print(f"{path.stem}: {judged} arrays judged, {verdict} ({seconds:.1f} s)", flush=True)
    if unknown:
        print(f"\nnot checked, no network of this name: {', '.join(unknown)}")
    print(f"\nfailed in {', '.join(failed)}" if failed else "\nall agree")
    return 1 if failed or len(unknown) == len(paths) else 0


if __name__ == "__main__":
    sys.exit(main())
