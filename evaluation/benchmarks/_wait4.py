"""Start a program, wait for it and write down what it used: ``_wait4.py RESULT PROGRAM [ARG ...]``.

A process of its own, kept tiny on purpose: Linux counts the peak memory of a process from before
its ``exec``, when it still was a copy of its parent. Started from a parent with PyTorch loaded,
every program would seem to need as much memory as that parent.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time


def main(result: str, command: list[str]) -> None:
    """Run the command; RESULT gets its usage, or why it could not be started."""
    start = time.perf_counter()
    try:
        process = subprocess.Popen(command)
    except OSError as error:
        found: dict[str, str | float] = {"error": str(error)}
    else:
        _, status, usage = os.wait4(process.pid, 0)
        found = {
            "wall_s": time.perf_counter() - start,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "maxrss": usage.ru_maxrss,
            "code": os.waitstatus_to_exitcode(status),
        }
    with open(result, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
