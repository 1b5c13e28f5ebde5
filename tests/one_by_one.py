"""Items done one by one in a process that may die of them: each failure costs one row.

The process writes lines of JSON: rows as they come, and how each item ended. Its parent starts it
again with what is left.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

Row = dict[str, Any]
Task = tuple[str, str]  # part and item
RESTART = 3  # exit code: the GPU has to be opened anew; the item that spoiled it has its row
START = "ONE_BY_ONE_START"  # when the first process was started, seconds since 1970


class TimeOverError(BaseException):
    """Passes through what catches errors of files."""


def append(results: Path, **line: Any) -> None:
    with results.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def read(results: Path) -> list[Row]:
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def work(
    do: Callable[[str, str], Iterable[Row]],
    tasks: Sequence[Task],
    results: Path,
    limits: Mapping[str, float],
) -> int:
    """The process: do items; returns its exit code.

    Args:
        do: part, item -> rows.
        tasks: in their order.
        results: file of lines.
        limits: seconds of each part; what one leaves, the next ones have.
    """

    def late(*_: object) -> None:
        raise TimeOverError("the part's time is over")

    signal.signal(signal.SIGALRM, late)
    ends = dict(zip(limits, itertools.accumulate(limits.values()), strict=True))
    for part, item in tasks:
        since, error, spoilt = time.time(), None, False
        left = ends[part] - (since - float(os.environ[START]))
        try:
            if left <= 0:
                late()
            signal.setitimer(signal.ITIMER_REAL, left)
            for row in do(part, item):
                append(results, part=part, item=item, row=row)
        except (Exception, TimeOverError) as failure:
            error, spoilt = traceback.format_exc(), "CUDA error" in str(failure)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        append(results, part=part, item=item, took=time.time() - since, error=error)
        if spoilt:
            return RESTART
        gc.collect()  # what an error or a matcher still holds of the GPU
    return 0


def supervise(command: Sequence[str], tasks: Sequence[Task], results: Path, seconds: float) -> None:
    """The parent: ``command --tasks JSON`` does ``work``, again and again until all is done."""
    results.write_text("")
    start = time.time()
    left = list(tasks)
    while left:
        error = ""
        try:
            code = subprocess.run(
                [*command, "--tasks", json.dumps(left)],
                env={**os.environ, START: str(start)},
                timeout=max(1.0, start + seconds - time.time()),
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code, error = None, "the time is over"
        done = {(line["part"], line["item"]) for line in read(results) if "took" in line}
        left = [task for task in left if task not in done]
        if code == RESTART:
            continue
        for part, item in left if error else left[:1]:
            append(
                results,
                part=part,
                item=item,
                took=None,
                error=error or f"the process ended: {code}",
            )
        left = [] if error else left[1:]


def markdown(title: str, facts: Row, lines: Sequence[Row]) -> str:
    """The rows of each part as a table, and what failed by the last line of its traceback."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return "" if np.isnan(value) else f"{value:.3g}" if value < 100 else f"{value:.0f}"
        return "" if value is None else str(value)

    text = [f"# {title}", "", *(f"- {key}: {value}" for key, value in facts.items())]
    for part in dict.fromkeys(line["part"] for line in lines):
        mine = [line for line in lines if line["part"] == part]
        rows = [{"item": line["item"], **line["row"]} for line in mine if "row" in line]
        table = pd.DataFrame(rows).map(cell).to_markdown(index=False, disable_numparse=True)
        failed = [line for line in mine if line.get("error")]
        text += ["", f"## {part}", "", *([table, ""] if rows else [])]
        text += [f"- {f['item']}: {f['error'].strip().splitlines()[-1]}" for f in failed]
    return "\n".join(text) + "\n"
