"""Reconstruct the rendered room and check the poses against the truth.

    python examples/demo.py [examples/room] [demo-output]

What ``make demo`` runs. Leaves with code 1 when the result is not as good as it should be.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gim_hloc.cli import common
from gim_hloc.evaluation.sfm import evaluate
from gim_hloc.pipelines.outcome import summary_text
from gim_hloc.pipelines.reconstruct import reconstruct

# Well above what was measured (see docs/benchmarks.md), well below what a mistake gives.
MAX_ROTATION_DEG = 0.3
MAX_CENTRE_PERCENT = 1.0


def main() -> int:
    """Run the demo."""
    here = Path(__file__).resolve().parent
    room = Path(sys.argv[1]) if len(sys.argv) > 1 else here / "room"
    output = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("demo-output")
    common.configure_logging()
    result = reconstruct(room / "images", output, quality="fast", export=("ply", "nerfstudio"))
    scores = evaluate(result.models[0], room / "gt")
    sys.stdout.write(summary_text(result) + "\n")
    sys.stdout.write(
        f"Against the true poses: {scores.registered} of {scores.total} images, mean rotation "
        f"error {scores.rotation.mean:.3f} degrees, mean centre error "
        f"{scores.centre_radius_percent.mean:.3f} % of the scene radius\n"
    )
    good = scores.registered == scores.total and scores.rotation.mean < MAX_ROTATION_DEG
    good = good and scores.centre_radius_percent.mean < MAX_CENTRE_PERCENT
    if not good:
        sys.stderr.write("error: the poses are not as good as they should be\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(common.run(main))
