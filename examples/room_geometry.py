"""Geometry of the example room: textured patches and the furniture built from them.

The world is right-handed, in metres, z up, floor at z = 0, origin in the middle of the floor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from room_textures import (
    TEXEL,
    Array,
    book_spine,
    bricks,
    cardboard,
    fabric,
    globe_map,
    leafy_wallpaper,
    load_photo,
    mosaic,
    painted,
    planks,
    plaster,
    poster,
    rug,
    terrazzo,
    texels,
    tint,
    vary,
    wood,
    wrap,
)

Vec = Sequence[float] | Array

ROOM = (6.4, 5.2, 2.8)  # metres along x, y, z; x and y are centred on the origin


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A textured grid of points."""

    points: Array  # (rows, columns, 3) metres, row 0 at the top as seen from the front
    uv: Array  # (rows, columns, 2) texture coordinates in [0, 1], v downwards
    texture: int  # index of the texture
    glow: float = 0.0  # light the surface gives off, in units of its own texture

    @property
    def area(self) -> float:
        """Area in square metres (rows and columns taken as parallelograms)."""
        return float(np.linalg.norm(_cross_grid(self.points), axis=-1).sum())


def _cross_grid(points: Array) -> Array:
    right = points[:-1, 1:] - points[:-1, :-1] + points[1:, 1:] - points[1:, :-1]
    down = points[1:, :-1] - points[:-1, :-1] + points[1:, 1:] - points[:-1, 1:]
    return np.cross(down, right) / 4.0


@dataclass
class Builder:
    """Collects textures and patches while the room is furnished."""

    rng: np.random.Generator
    textures: list[Array] = field(default_factory=list)
    patches: list[Patch] = field(default_factory=list)
    sizes: list[tuple[float, float]] = field(
        default_factory=list
    )  # metres (width, height) a texture covers

    def texture(self, image: Array, metres: tuple[float, float] | None = None) -> int:
        """Register an image that covers ``metres``, by default one ``TEXEL`` per texel."""
        self.textures.append(np.ascontiguousarray(image, dtype=np.uint8))
        height, width = image.shape[:2]
        self.sizes.append(metres or (width * TEXEL, height * TEXEL))
        return len(self.textures) - 1

    def photo(self, name: str) -> int:
        """Register one of the photographs."""
        return self.texture(load_photo(name))

    def crop(self, texture: int, width: float, height: float) -> Array:
        """Corner coordinates (2, 2, 2) of a random piece of a texture, in its metric size.

        The longer side of the piece follows the columns of the texture: grain runs along a board.
        """
        swap = height > width
        wide, high = (height, width) if swap else (width, height)
        total_w, total_h = self.sizes[texture]
        du, dv = min(wide / total_w, 1.0), min(high / total_h, 1.0)
        u0, v0 = self.rng.uniform(0, 1 - du), self.rng.uniform(0, 1 - dv)
        u, v = np.array([u0, u0 + du]), np.array([v0, v0 + dv])
        grid = np.stack(np.meshgrid(u, v), axis=-1)
        return grid.transpose(1, 0, 2) if swap else grid

    def quad(
        self,
        corner: Vec,
        right: Vec,
        down: Vec,
        texture: int,
        *,
        whole: bool = False,
        glow: float = 0.0,
    ) -> None:
        """Add a rectangle given by its top-left corner and its two edges as seen from the front.

        Args:
            corner: top-left corner.
            right: edge to the right.
            down: edge downwards.
            texture: index of the texture.
            whole: show the whole texture instead of a random piece in metric size.
            glow: light given off.
        """
        c, r, d = (np.asarray(a, dtype=float) for a in (corner, right, down))
        points = np.array([[c, c + r], [c + d, c + r + d]])
        if whole:
            uv = np.stack(np.meshgrid([0.0, 1.0], [0.0, 1.0]), axis=-1)
        else:
            uv = self.crop(texture, float(np.linalg.norm(r)), float(np.linalg.norm(d)))
        self.patches.append(Patch(points=points, uv=uv, texture=texture, glow=glow))

    def box(
        self,
        base: Vec,
        size: Vec,
        texture: int,
        *,
        yaw: float = 0.0,
        faces: dict[str, int] | None = None,
        skip: str = "",
    ) -> None:
        """Add a box.

        Args:
            base: centre of the bottom face.
            size: extents along its own x, y and z.
            texture: texture of the faces, each showing another random piece.
            yaw: rotation about z in degrees.
            faces: textures shown whole on single faces; keys are ``-x +x -y +y -z +z``.
            skip: names of faces to leave out, separated by blanks.
        """
        a = math.radians(yaw)
        ex = np.array([math.cos(a), math.sin(a), 0.0])
        ey = np.array([-math.sin(a), math.cos(a), 0.0])
        ez = np.array([0.0, 0.0, 1.0])
        sx, sy, sz = size
        centre = np.asarray(base, dtype=float) + ez * sz / 2
        layout = {
            "-y": (-ey * sy, ex * sx, -ez * sz),
            "+y": (ey * sy, -ex * sx, -ez * sz),
            "-x": (-ex * sx, -ey * sy, -ez * sz),
            "+x": (ex * sx, ey * sy, -ez * sz),
            "+z": (ez * sz, ex * sx, -ey * sy),
            "-z": (-ez * sz, ex * sx, ey * sy),
        }
        for name, (normal, right, down) in layout.items():
            if name in skip.split():
                continue
            own = (faces or {}).get(name)
            corner = centre + normal / 2 - right / 2 - down / 2
            self.quad(corner, right, down, texture if own is None else own, whole=own is not None)

    def lathe(
        self,
        base: Vec,
        profile: Sequence[tuple[float, float]],
        texture: int,
        *,
        segments: int = 48,
        turn: float = 0.0,
    ) -> None:
        """Add a surface of revolution about a vertical axis.

        Args:
            base: origin of the profile.
            profile: (radius, height) from top to bottom.
            texture: texture wrapped once around.
            segments: facets around the axis.
            turn: rotation of the seam in degrees.
        """
        angle = np.linspace(0, 2 * math.pi, segments + 1) + math.radians(turn)
        radius, height = (np.array(column, dtype=float) for column in zip(*profile, strict=True))
        x, y = radius[:, None] * np.cos(angle), radius[:, None] * np.sin(angle)
        points = np.stack([x, y, np.broadcast_to(height[:, None], x.shape)], axis=-1) + np.asarray(
            base, dtype=float
        )
        steps = np.hypot(np.diff(radius), np.diff(height))
        v = np.concatenate([[0.0], np.cumsum(steps)]) / steps.sum()
        uv = np.stack(np.meshgrid(np.linspace(0, 1, segments + 1), v), axis=-1)
        self.patches.append(Patch(points=points, uv=uv, texture=texture))

    def disc(self, centre: Vec, radius: float, texture: int, *, segments: int = 48) -> None:
        """Add a horizontal disc facing up, showing the middle of the texture."""
        angle = np.linspace(0, 2 * math.pi, segments + 1)
        ring = np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=-1)
        points = np.asarray(centre, dtype=float) + radius * np.stack([0 * ring, ring])
        uv = 0.5 + 0.5 * np.stack([0 * ring, ring])[..., :2] * (1, -1)
        self.patches.append(Patch(points=points, uv=uv, texture=texture))

    def sphere(self, centre: Vec, radius: float, texture: int, *, turn: float = 0.0) -> None:
        """Add a sphere; the seam of the texture is rotated by ``turn`` degrees."""
        polar = np.linspace(0, math.pi, 33)
        profile = [(radius * math.sin(p), radius * math.cos(p)) for p in polar]
        self.lathe(centre, profile, texture, segments=64, turn=turn)

    def on_wall(
        self, wall: str, along: float, height: float, depth: float = 0.0
    ) -> tuple[Array, Array, Array]:
        """Point on a wall and the wall's right and front directions, as seen from inside.

        Args:
            wall: one of ``north south east west`` (north is +y, east is +x).
            along: metres to the right of the middle of the wall.
            height: metres above the floor.
            depth: metres in front of the wall.
        """
        front = {"north": (0, -1, 0), "south": (0, 1, 0), "east": (-1, 0, 0), "west": (1, 0, 0)}[
            wall
        ]
        n = np.array(front, dtype=float)
        right = np.cross((0.0, 0.0, 1.0), n)
        point = -n * (np.abs(n) @ np.array(ROOM)) / 2 + right * along + n * depth
        return point + np.array([0.0, 0.0, height]), right, n

    def picture(
        self,
        wall: str,
        along: float,
        height: float,
        size: tuple[float, float],
        texture: int,
        frame: int,
        **more: float,
    ) -> None:
        """Hang a framed picture centred at (along, height); ``more`` is depth, border, glow."""
        depth, border = more.get("depth", 0.035), more.get("border", 0.05)
        w, h = size
        centre, right, n = self.on_wall(wall, along, height)
        up = np.array([0.0, 0.0, 1.0])
        yaw = math.degrees(math.atan2(right[1], right[0]))
        corner = centre + n * depth * 0.4 - right * w / 2 + up * h / 2
        self.quad(corner, right * w, -up * h, texture, whole=True, glow=more.get("glow", 0.0))
        middle = centre + n * depth / 2
        for side in (-1, 1):
            bar = middle + side * right * (w + border) / 2 - up * (h / 2 + border)
            self.box(bar, (border, depth, h + 2 * border), frame, yaw=yaw)
            rail = middle + up * (side * (h + border) / 2 - border / 2)
            self.box(rail, (w, depth, border), frame, yaw=yaw)


def _shell(b: Builder) -> dict[str, int]:
    """Floor, ceiling, walls, beams and skirting; returns the shared materials."""
    rng = b.rng
    sx, sy, sz = ROOM
    x0, y0 = sx / 2, sy / 2
    tex = {
        "oak": b.texture(wood(rng, 420, 900, (168, 122, 76))),
        "walnut": b.texture(wood(rng, 420, 900, (104, 68, 44))),
        "pine": b.texture(wood(rng, 420, 900, (206, 168, 116))),
        "white": b.texture(painted(rng, 300, 700, (214, 208, 194))),
        "dark": b.texture(wood(rng, 200, 500, (58, 46, 40))),
        "paper": b.texture(fabric(rng, 120, 160, (222, 212, 190))),
    }
    floor = b.texture(planks(rng, texels(sy), texels(sx), (158, 112, 70)))
    b.quad((-x0, y0, 0), (sx, 0, 0), (0, -sy, 0), floor, whole=True)
    ceiling = b.texture(plaster(rng, texels(sy, 0.004), texels(sx, 0.004), (214, 208, 196)))
    b.quad((-x0, -y0, sz), (sx, 0, 0), (0, sy, 0), ceiling, whole=True)
    walls = {
        "north": bricks(rng, texels(sz), texels(sx), (158, 92, 68)),
        "south": leafy_wallpaper(rng, texels(sz), texels(sx), (212, 200, 170)),
        "east": plaster(rng, texels(sz), texels(sy), (128, 152, 140)),
        "west": plaster(rng, texels(sz), texels(sy), (190, 160, 116)),
    }
    for wall, image in walls.items():
        corner, right, _ = b.on_wall(wall, 0.0, sz)
        width = sx if wall in ("north", "south") else sy
        b.quad(corner - right * width / 2, right * width, (0, 0, -sz), b.texture(image), whole=True)
        base, right, _ = b.on_wall(wall, 0.0, 0.0, 0.012)
        b.box(
            base,
            (width, 0.024, 0.11),
            tex["white"],
            yaw=math.degrees(math.atan2(right[1], right[0])),
        )
    for x in (-1.9, -0.35, 1.35):
        b.box((x, 0, sz - 0.17), (0.16, sy, 0.17), tex["walnut"], skip="+z")
    return tex


def _walls(b: Builder, tex: dict[str, int]) -> None:
    """Pictures, window, door, mosaic and clock-like plates on the walls."""
    rng = b.rng
    b.picture("north", 0.15, 1.62, (0.85, 0.85), b.photo("astronaut"), tex["dark"])
    b.picture("north", 1.25, 1.72, (0.87, 0.58), b.photo("rocket"), tex["pine"])
    b.picture("north", 2.35, 1.55, (0.70, 0.70), b.photo("camera"), tex["walnut"], depth=0.05)
    b.picture("south", -1.85, 1.70, (0.90, 0.60), b.photo("chelsea"), tex["oak"])
    b.picture("south", -0.55, 1.78, (0.84, 0.56), b.photo("coffee"), tex["dark"], depth=0.05)
    b.picture(
        "south",
        0.55,
        1.65,
        (0.62, 0.86),
        b.texture(poster(rng, 640, 460)),
        tex["white"],
        border=0.035,
    )
    b.picture("south", 2.35, 1.50, (0.80, 1.05), b.texture(poster(rng, 760, 580)), tex["walnut"])
    b.picture("east", -1.55, 1.72, (1.00, 0.67), b.photo("flower"), tex["walnut"], border=0.07)
    b.picture("east", -0.2, 1.75, (0.98, 0.85), b.photo("hubble"), tex["dark"], border=0.04)
    b.picture(
        "west",
        0.35,
        1.60,
        (1.86, 1.24),
        b.photo("china"),
        tex["white"],
        border=0.09,
        depth=0.12,
        glow=0.75,
    )
    b.picture("west", -1.65, 1.65, (0.70, 0.98), b.texture(poster(rng, 720, 520)), tex["oak"])
    # Door with four panels in the east wall.
    base, right, _ = b.on_wall("east", 1.5, 0.0, 0.02)
    b.box(base, (0.92, 0.04, 2.06), tex["white"], yaw=math.degrees(math.atan2(right[1], right[0])))
    for du in (-0.2, 0.2):
        for z, high in ((0.18, 0.72), (1.02, 0.9)):
            panel, right, _ = b.on_wall("east", 1.5 + du, z, 0.05)
            b.box(
                panel,
                (0.32, 0.02, high),
                tex["white"],
                yaw=math.degrees(math.atan2(right[1], right[0])),
            )
    knob, _, _ = b.on_wall("east", 1.12, 1.0, 0.09)
    b.sphere(knob, 0.035, tex["dark"])
    # Band of mosaic below the window.
    strip = b.texture(mosaic(rng, 200, 1060))
    corner, right, _ = b.on_wall("west", -1.2, 0.83, 0.006)
    b.quad(corner, right * 3.2, (0, 0, -0.6), strip, whole=True)


def _table(b: Builder, tex: dict[str, int]) -> None:
    """Table in the middle with things on it, two chairs, and the rug below."""
    rng = b.rng
    b.box(
        (0.05, 0.0, 0.0),
        (2.9, 2.1, 0.012),
        b.texture(fabric(rng, 60, 60, (120, 60, 50))),
        yaw=7,
        faces={"+z": b.texture(rug(rng, 700, 967))},
        skip="-z",
    )
    yaw, cx, cy = 12.0, 0.1, 0.05
    a = math.radians(yaw)

    def at(x: float, y: float, z: float) -> Vec:
        return cx + x * math.cos(a) - y * math.sin(a), cy + x * math.sin(a) + y * math.cos(a), z

    b.box(
        at(0, 0, 0.71),
        (1.45, 0.82, 0.04),
        tex["oak"],
        yaw=yaw,
        faces={"+z": b.texture(planks(rng, 410, 725, (176, 126, 78), 0.002))},
    )
    b.box(at(0, 0, 0.63), (1.3, 0.68, 0.08), tex["oak"], yaw=yaw)
    for x in (-0.64, 0.64):
        for y in (-0.33, 0.33):
            b.box(at(x, y, 0.012), (0.07, 0.07, 0.70), tex["oak"], yaw=yaw)
    top = 0.75
    z = top
    for k, (w, d, h) in enumerate(
        ((0.30, 0.22, 0.045), (0.27, 0.20, 0.03), (0.25, 0.18, 0.055), (0.2, 0.15, 0.025))
    ):
        cover, spine = b.texture(poster(rng, 220, 300)), np.rot90(book_spine(rng, 200, 36))
        faces = {"+z": cover, "-y": b.texture(spine)}
        b.box(
            at(-0.45, 0.08, z), (w, d, h), tex["paper"], yaw=yaw + (8, -17, 31, -5)[k], faces=faces
        )
        z += h
    b.lathe(
        at(0.0, 0.16, top), [(0.0, 0.04), (0.05, 0.035), (0.11, 0.012), (0.115, 0.0)], tex["dark"]
    )
    b.sphere(at(0.0, 0.16, top + 0.215), 0.185, b.texture(wrap(globe_map(rng, 420, 960))), turn=70)
    vase = [
        (0.05, 0.36),
        (0.042, 0.33),
        (0.045, 0.29),
        (0.085, 0.2),
        (0.1, 0.13),
        (0.085, 0.05),
        (0.06, 0.0),
    ]
    b.lathe(at(0.46, 0.12, top), vase, b.texture(wrap(terrazzo(rng, 220, 344, (200, 190, 170)))))
    side = {name: b.texture(poster(rng, 260, 220)) for name in ("-y", "+y", "-x", "+x")}
    b.box(at(0.40, -0.2, top), (0.2, 0.14, 0.27), tex["paper"], yaw=yaw + 28, faces=side)
    mug = b.texture(mosaic(rng, 110, 260, 9.0))
    b.lathe(at(-0.05, -0.22, top), [(0.0, 0.085), (0.038, 0.085), (0.043, 0.1), (0.043, 0.0)], mug)
    page = b.texture(poster(rng, 420, 300))
    b.box(
        at(-0.32, -0.24, top), (0.21, 0.297, 0.004), tex["paper"], yaw=yaw - 24, faces={"+z": page}
    )
    for x, y, turn, wood_tex in (
        (0.2, -0.95, 170.0, tex["walnut"]),
        (-0.35, 0.98, -8.0, tex["pine"]),
    ):
        t = math.radians(turn)

        def chair(px: float, py: float, pz: float, x: float = x, y: float = y, t: float = t) -> Vec:
            return (
                x + px * math.cos(t) - py * math.sin(t),
                y + px * math.sin(t) + py * math.cos(t),
                pz,
            )

        cushion = b.texture(fabric(rng, 150, 150, vary(rng, (130, 70, 60), 0.3)))
        b.box(chair(0, 0, 0.43), (0.44, 0.44, 0.04), wood_tex, yaw=turn)
        b.box(chair(0, 0, 0.47), (0.4, 0.4, 0.05), cushion, yaw=turn, faces={"+z": cushion})
        for px in (-0.19, 0.19):
            for py, high in ((-0.19, 0.43), (0.19, 0.98)):
                b.box(chair(px, py, 0.0), (0.045, 0.045, high), wood_tex, yaw=turn)
        for pz in (0.62, 0.75, 0.88):
            b.box(chair(0, 0.19, pz), (0.34, 0.02, 0.07), wood_tex, yaw=turn)


def _furniture(b: Builder, tex: dict[str, int]) -> None:
    """Everything that stands on the floor away from the table, and the lamp."""
    rng = b.rng
    # Bookcase on the north wall, filled with books of their own.
    left, width, deep = -2.75, 1.5, 0.30
    y = ROOM[1] / 2 - deep / 2
    mid = left + width / 2
    for x in (left, left + width):
        b.box((x, y, 0), (0.03, deep, 2.05), tex["walnut"])
    b.box((mid, ROOM[1] / 2 - 0.015, 0), (width, 0.02, 2.05), tex["walnut"])
    shelves = (0.06, 0.46, 0.84, 1.24, 1.62, 2.03)
    for z in shelves:
        b.box((mid, y, z), (width - 0.03, deep, 0.025), tex["walnut"])
    for shelf, z in enumerate(shelves[:-1]):
        x = left + 0.02
        room_above = shelves[shelf + 1] - z - 0.03
        while x < left + width - 0.08:
            thick, high = rng.uniform(0.018, 0.055), room_above * rng.uniform(0.6, 0.96)
            if rng.random() < 0.07:
                x += rng.uniform(0.04, 0.16)
                continue
            spine = b.texture(book_spine(rng, texels(high, 0.002), max(10, texels(thick, 0.002))))
            b.box(
                (x + thick / 2, y - rng.uniform(0.01, 0.05), z + 0.025),
                (thick, 0.2, high),
                tex["paper"],
                faces={"-y": spine, "-x": spine, "+x": spine},
                skip="+y -z",
            )
            x += thick + rng.uniform(0.001, 0.004)
    # Sideboard on the east wall, with things on top.
    b.box((2.95, 0.95, 0.08), (0.45, 1.7, 0.72), tex["pine"])
    for y in (0.4, 0.95, 1.5):
        b.box((2.715, y, 0.14), (0.02, 0.5, 0.6), tex["pine"])
        b.sphere((2.69, y + 0.2, 0.45), 0.018, tex["dark"])
    b.lathe(
        (2.95, 0.42, 0.80),
        [(0.0, 0.42), (0.03, 0.42), (0.05, 0.3), (0.14, 0.2), (0.12, 0.06), (0.07, 0.0)],
        b.texture(wrap(terrazzo(rng, 200, 388, (92, 104, 112)))),
        turn=20,
    )
    b.box((2.97, 1.0, 0.80), (0.24, 0.34, 0.16), b.texture(cardboard(rng, 200, 260)), yaw=14)
    b.box(
        (2.96, 1.04, 0.96),
        (0.2, 0.26, 0.11),
        b.texture(fabric(rng, 160, 200, (58, 92, 110))),
        yaw=-9,
    )
    b.sphere((2.93, 1.55, 0.80 + 0.13), 0.13, b.texture(mosaic(rng, 150, 300, 10.0)), turn=180)
    # Sofa on the south wall.
    cloth = b.texture(fabric(rng, 500, 760, (92, 104, 116)))
    b.box((-0.75, -2.12, 0.08), (2.0, 0.85, 0.30), cloth)
    b.box((-0.75, -2.46, 0.38), (2.0, 0.22, 0.46), cloth)
    for x in (-1.68, 0.18):
        b.box((x, -2.12, 0.38), (0.2, 0.85, 0.22), cloth)
    for x in (-1.13, -0.37):
        b.box((x, -2.02, 0.38), (0.73, 0.64, 0.12), cloth, yaw=rng.uniform(-2, 2))
    for x, colour, turn in ((-1.3, (176, 96, 52), 14.0), (-0.2, (66, 100, 84), -11.0)):
        cushion = b.texture(rug(rng, 150, 150) if x > -1 else fabric(rng, 150, 150, colour))
        b.box((x, -2.2, 0.5), (0.42, 0.14, 0.40), cushion, yaw=turn, faces={"+y": cushion})
    # Crate with cartons.
    for k in range(4):
        b.box((-1.05, -0.72, 0.02 + 0.115 * k), (0.62, 0.46, 0.10), tex["pine"], yaw=33)
    carton = {name: b.texture(cardboard(rng, 170, 210)) for name in ("-x", "+x", "-y", "+y", "+z")}
    b.box((-1.05, -0.72, 0.48), (0.42, 0.34, 0.30), tex["paper"], yaw=51, faces=carton)
    # Pedestal with a sphere.
    stone = b.texture(tint(load_photo("gravel"), (70, 62, 56), (226, 216, 198)), (0.9, 0.9))
    b.lathe(
        (1.25, 0.72, 0.0),
        [(0.2, 0.62), (0.2, 0.56), (0.16, 0.54), (0.16, 0.08), (0.21, 0.06), (0.21, 0.0)],
        stone,
    )
    b.disc((1.25, 0.72, 0.62), 0.2, b.texture(terrazzo(rng, 150, 150, (196, 186, 170))))
    b.sphere(
        (1.25, 0.72, 0.62 + 0.17),
        0.17,
        b.texture(wrap(load_photo("retina")[330:1080, 330:1080])),
        turn=200,
    )
    # Pouf.
    pouf = b.texture(wrap(tint(load_photo("grass"), (40, 50, 30), (190, 200, 130))))
    b.lathe(
        (1.05, -0.85, 0.0),
        [(0.27, 0.4), (0.31, 0.34), (0.32, 0.2), (0.31, 0.06), (0.27, 0.0)],
        pouf,
        turn=120,
    )
    b.disc((1.05, -0.85, 0.40), 0.27, b.texture(fabric(rng, 200, 200, (120, 128, 84))))
    # Plants in pots: one in the south-east corner, a small one beside the bookcase.
    pot = b.texture(tint(load_photo("brick"), (96, 52, 40), (214, 168, 138)))
    for x, y, scale in ((2.72, -2.12, 0.95), (-0.85, 2.25, 0.7)):
        b.lathe(
            (x, y, 0.0),
            [
                (0.17 * scale, 0.34 * scale),
                (0.2 * scale, 0.36 * scale),
                (0.2 * scale, 0.3 * scale),
                (0.13 * scale, 0.0),
            ],
            pot,
            turn=100 * scale,
        )
        b.disc((x, y, 0.32 * scale), 0.18 * scale, stone)
        for k in range(22):
            leaf = tint(
                plaster(rng, 60, 260, (120, 140, 80)),
                (30, 54, 26),
                vary(rng, (150, 200, 96), 0.12),
            )
            cv2.line(leaf, (0, 30), (260, 30), (150, 170, 110), 3, cv2.LINE_AA)
            t = 2.4 * k + rng.normal(0, 0.2)
            reach, rise = scale * rng.uniform(0.25, 0.5), scale * rng.uniform(0.35, 0.95)
            s = np.linspace(0, 1, 7)
            out = reach * s**1.4 + 0.02
            up = 0.32 * scale + rise * np.sin(s * rng.uniform(1.4, 2.3)) / 1.0
            half = scale * 0.055 * np.sin(np.clip(s * 0.96 + 0.04, 0, 1) * math.pi) ** 0.7 + 0.004
            direction, across = (
                np.array([math.cos(t), math.sin(t)]),
                np.array([-math.sin(t), math.cos(t)]),
            )
            rows = []
            for sign in (1, -1):
                flat = out[:, None] * direction + sign * half[:, None] * across + (x, y)
                rows.append(np.concatenate([flat, (up - 0.3 * half)[:, None]], axis=1))
            uv = np.stack(np.meshgrid(s, [0.0, 1.0]), axis=-1)
            b.patches.append(Patch(points=np.stack(rows), uv=uv, texture=b.texture(leaf)))
    # Pendant lamp above the table.
    shade = b.texture(fabric(rng, 120, 400, (206, 170, 112)))
    b.lathe((0.12, 0.1, 1.92), [(0.05, 0.26), (0.13, 0.2), (0.3, 0.0)], shade, turn=30)
    b.lathe((0.12, 0.1, 1.92), [(0.012, 0.9), (0.012, 0.2)], tex["dark"], segments=12)


def furnish_room(rng: np.random.Generator) -> Builder:
    """Build the whole room.

    Args:
        rng: decides all texture details, the books and the leaves.

    Returns:
        The builder that holds the patches and textures.
    """
    builder = Builder(rng)
    materials = _shell(builder)
    _walls(builder, materials)
    _table(builder, materials)
    _furniture(builder, materials)
    return builder
