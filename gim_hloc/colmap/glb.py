"""A model as one binary glTF file: coloured points, cameras, and their outlines as lines."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np

from gim_hloc.colmap.target import Target, coloured_points, pose_of, principal, registered
from gim_hloc.files import write_atomic

_POINTS, _LINES = 0, 1  # modes of glTF
_FLOAT, _BYTE = 5126, 5121
_OUTLINE = 0.05  # depth of a camera's outline, of the cameras' mean distance from their middle
_NOTED_PX = 0.01
# glTF has y up; so have COLMAP's models once y, which is down in images, is turned.
_Y_DOWN = np.diag([1.0, -1.0, -1.0])
_Z_UP = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])


def write_glb(model: Any, target: Target) -> list[str]:
    """Write ``model.glb``, y up; cameras are glTF's, with their outlines as lines.

    Returns:
        A note where principal points are off the middle, which glTF's cameras cannot hold.
    """
    world = _Y_DOWN if target.metres is None else _Z_UP
    views = registered(model)
    xyz, rgb = coloured_points(model)
    centres = np.array([pose_of(view)[1] for view in views])
    depth = _OUTLINE * float(np.linalg.norm(centres - centres.mean(0), axis=1).mean()) or 1.0
    file = _Binary()
    primitives = []
    if len(xyz):
        rgba = np.column_stack([rgb, np.full(len(rgb), 255, np.uint8)])
        attributes = {"POSITION": file.add(xyz @ world.T), "COLOR_0": file.add(rgba)}
        primitives.append({"attributes": attributes, "mode": _POINTS})
    lines = np.concatenate([_outline(view, depth) for view in views]) @ world.T
    primitives.append({"attributes": {"POSITION": file.add(lines)}, "mode": _LINES})
    nodes: list[dict[str, Any]] = [
        {"mesh": number, "name": ("points", "cameras")[number - len(primitives)]}
        for number in range(len(primitives))
    ]
    cameras = []
    off = 0.0
    for number, view in enumerate(views):
        camera = view.camera
        size = np.array([camera.width, camera.height])
        off = max(off, float(np.linalg.norm(principal(camera) - size / 2)))
        field = 2 * np.arctan(camera.height / 2 / camera.focal_length_y)
        shape = size[0] / camera.focal_length_x / (size[1] / camera.focal_length_y)
        cameras.append(
            {
                "type": "perspective",
                "perspective": {
                    "yfov": float(field), "aspectRatio": float(shape), "znear": depth / 100,
                },
            }
        )  # fmt: skip
        rotation, centre = pose_of(view)
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = world @ rotation.T @ _Y_DOWN, world @ centre
        nodes.append({"camera": number, "name": view.name, "matrix": pose.T.ravel().tolist()})
    content = {
        "asset": {"version": "2.0", "generator": "gim-hloc"},
        "scene": 0,
        "scenes": [{"nodes": list(range(len(nodes)))}],
        "nodes": nodes,
        "meshes": [{"primitives": [primitive]} for primitive in primitives],
        "cameras": cameras,
        "buffers": [{"byteLength": len(file.data)}],
        "bufferViews": file.views,
        "accessors": file.accessors,
    }
    text = json.dumps(content, ensure_ascii=True).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text
    chunks += struct.pack("<I4s", len(file.data), b"BIN\0") + bytes(file.data)
    header = struct.pack("<4s2I", b"glTF", 2, 12 + len(chunks))
    write_atomic(target.folder / "model.glb", header + chunks)
    if off < _NOTED_PX:
        return []
    return [
        f"model.glb: its cameras have the middle of the image as principal point, up to {off:.2f} "
        "px from the true one."
    ]


def _outline(view: Any, depth: float) -> np.ndarray:
    """Ends (16, 3) of the eight edges of a camera's pyramid, by its pinhole."""
    camera = view.camera
    size = np.array([camera.width, camera.height])
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * size
    focal = (camera.focal_length_x, camera.focal_length_y)
    rays = np.column_stack([(corners - principal(camera)) / focal, np.ones(4)])
    rotation, centre = pose_of(view)
    base = depth * rays @ rotation + centre
    edges = [(base[i], base[(i + 1) % 4]) for i in range(4)] + [(centre, tip) for tip in base]
    return np.array(edges).reshape(-1, 3)


class _Binary:
    """The binary chunk of a file, with what glTF says of it."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.views: list[dict[str, int]] = []
        self.accessors: list[dict[str, Any]] = []

    def add(self, values: np.ndarray) -> int:
        """Add vertices (N, 3) or colours (N, 4) uint8; returns the number of their accessor."""
        colours = values.dtype == np.uint8
        stored = np.ascontiguousarray(values if colours else values.astype("<f4"))
        data = stored.tobytes()
        self.views.append({"buffer": 0, "byteOffset": len(self.data), "byteLength": len(data)})
        self.data += data
        accessor: dict[str, Any] = {
            "bufferView": len(self.views) - 1,
            "componentType": _BYTE if colours else _FLOAT,
            "count": len(stored),
            "type": "VEC4" if colours else "VEC3",
        }
        if colours:
            accessor["normalized"] = True
        else:
            accessor |= {"min": stored.min(0).tolist(), "max": stored.max(0).tolist()}
        self.accessors.append(accessor)
        return len(self.accessors) - 1
