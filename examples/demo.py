"""Reconstruct the rendered room and check the poses against the truth.

    python examples/demo.py [examples/room] [demo-output]

What ``make demo`` runs. Leaves with code 1 when the result is not as good as it should be.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gim_hloc.cli import common
from gim_hloc.evaluation.sfm import evaluate
from gim_hloc.pipelines.reconstruct import reconstruct, summary_text


def main() -> int:
    """Run the demo."""
    here = Path(__file__).resolve().parent
    room = Path(sys.argv[1]) if len(sys.argv) > 1 else here / "room"
    output = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("demo-output")
    common.configure_logging()
    result = reconstruct(room / "images", output, export=("ply", "nerfstudio"))
    scores = evaluate(result.models[0], room / "gt")
    sys.stdout.write(summary_text(result) + "\n")
    sys.stdout.write(
        f"Against the true poses: {scores.registered} of {scores.total} images, rotation error "
        f"{scores.rotation_error_deg.mean:.3f} degrees, centre error "
        f"{scores.centre_error_percent_of_radius.mean:.3f} % of the scene radius\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(common.run(main))
