"""What the golden files of DKM and RoMa have in common: intermediate results, warps, the demo."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from gim_hloc.geometry.sampling import balance_weights, kernel_density
from gim_hloc.geometry.warp import Warp, cell_centres
from gim_hloc.networks.dense import refine, resize

from .golden import Golden


class Recorder(contextlib.ExitStack):
    """Collects intermediate results by hooks, until it is closed; calls of one name are batched."""

    def __init__(self, golden: Golden) -> None:
        super().__init__()
        self.golden = golden
        self.parts: dict[str, list[torch.Tensor]] = {}
        self.certainty = torch.zeros(0)  # logits so far, (2, 1, h, w)

    def record(self, name: str, value: torch.Tensor) -> None:
        """Keep a result that the file holds."""
        if self.golden.has(name):
            self.parts.setdefault(name, []).append(value)

    def arrays(self) -> dict[str, Any]:
        return {name: torch.cat(parts) for name, parts in self.parts.items()}

    def watch(self, module: nn.Module, name: str | Callable[[Any, Any], None]) -> None:
        """Record a module's output, or call a function with its arguments and its output."""

        def hook(_: nn.Module, args: Any, output: Any) -> None:
            if isinstance(name, str):
                self.record(name, output)
            else:
                name(args, output)

        self.callback(module.register_forward_hook(hook).remove)

    def replace(self, owner: Any, name: str, function: Any) -> None:
        """Replace a method or attribute of an object."""
        before = owner.__dict__.get(name)
        setattr(owner, name, function)
        if before is None:
            self.callback(delattr, owner, name)
        else:
            self.callback(setattr, owner, name, before)

    def watch_refiners(self, refiners: nn.ModuleDict, sizes: Sequence[tuple[int, int]]) -> None:
        """Record corrections and flows; ``sizes`` (height, width) are those of the passes."""
        for key, refiner in refiners.items():
            self._watch_refiner(int(key), refiner, sizes)

    def _watch_refiner(self, stride: int, refiner: Any, sizes: Sequence[tuple[int, int]]) -> None:
        calls: Counter[str] = Counter()
        run = refiner._run

        def run_blocks(x: torch.Tensor, blocks: Sequence[Any]) -> torch.Tensor:
            x = run(x, blocks[:1])
            if not calls["pass"]:
                inner = x[:, 2:-2, :, : refiner.channels]  # without the rows of zeros
                self.record(f"refiner{stride}_block1", inner.permute(0, 3, 1, 2).clone())
            return run(x, blocks[1:])

        def corrected(args: Any, output: Any) -> None:
            number, flow, (delta, change) = calls["pass"], args[2], output
            calls["pass"] += 1
            size = (flow.shape[-2], flow.shape[-1])
            flow = refine(flow, delta, stride=stride, size=sizes[number])
            self.certainty = resize(self.certainty, size) + change
            self.record(f"refiner{stride}_call{number}_dflow", delta)
            self.record(f"refiner{stride}_call{number}_dcert", change)
            self.record(f"pass{number}_flow{stride}", flow)
            self.record(f"pass{number}_cert{stride}", self.certainty)

        self.replace(refiner, "_run", run_blocks)
        self.watch(refiner, corrected)


def results(golden: Golden, warp: Warp) -> dict[str, torch.Tensor]:
    """Both directions side by side, and the part of drawing matches without random numbers."""
    grid = cell_centres(warp.flow0.shape[0], warp.flow0.shape[1])
    sides = [torch.cat([grid, warp.flow0], -1), torch.cat([warp.flow1, grid], -1)]
    both = torch.cat(sides, 1)
    rows = both.reshape(-1, 4)
    points = rows[:: -(-len(rows) // golden["kde_points"].shape[0])]  # recorded: evenly spaced
    density = kernel_density(points)
    return {
        "warp": both,
        "certainty": torch.cat([warp.certainty0, warp.certainty1], 1),
        "kde_points": points,
        "kde_density": density,
        "balance_weight": balance_weights(density),
    }


def demo(
    kde_points: torch.Tensor,
    images: Sequence[np.ndarray],
    paddings: Sequence[tuple[int, int, int, int]],
) -> dict[str, np.ndarray]:
    """Pixels of the unpadded images, corner origin, as the reference's demo draws them."""
    points = kde_points.double().numpy()
    produced: dict[str, np.ndarray] = {}
    inside = np.ones(len(points), dtype=bool)
    padded, start, own = [], [], []
    for index, (image, (left, right, top, bottom)) in enumerate(zip(images, paddings, strict=True)):
        height, width = image.shape[:2]
        full = np.array([width + left + right, height + top + bottom])
        pixels = full * (points[:, 2 * index : 2 * index + 2] + 1) / 2 - (left, top)
        inside &= ((pixels > 0) & (pixels <= (width - 1, height - 1))).all(1)
        produced[f"demo_kpts{index}"] = pixels
        padded += [full[1], full[0]]
        start += [left, top]
        own += [width, height]
    return produced | {"demo_inside": inside, "demo_geometry": np.array(padded + start + own)}
