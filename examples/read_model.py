"""Read a finished reconstruction: poses, points, and which images see a point.

python examples/read_model.py OUTPUT
"""

from __future__ import annotations

import sys

import numpy as np

from gim_hloc import colmap


def main() -> None:
    """Print what a model holds."""
    model = colmap.read_model(sys.argv[1] if len(sys.argv) > 1 else "demo-output")
    for image_id in sorted(model.reg_image_ids()):
        image = model.image(image_id)
        camera = model.camera(image.camera_id)
        centre = image.projection_center()
        print(f"{image.name}: centre {np.round(centre, 3)}, {camera.model_name} {camera.params}")
    xyz, rgb, views, errors = colmap.points(model)
    print(f"{len(xyz)} points, {views.mean():.1f} views a point, error {errors.mean():.2f} px")
    point = model.points3D[min(model.point3D_ids())]
    seen_by = [model.image(element.image_id).name for element in point.track.elements]
    print(f"the first point, colour {rgb[0]}, is seen by {', '.join(seen_by)}")


if __name__ == "__main__":
    main()
