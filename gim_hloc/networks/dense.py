"""What DKM and RoMa share: warping, local correlation, Gaussian process, refiners.

Sources: DKM (Edstedt et al., CVPR 2023), RoMa (Edstedt et al., CVPR 2024), written anew.

Flow is a float32 tensor (B, 2, H, W) of normalised targets (x, y), -1 and 1 being the *edges* of
the other image. Networks compute in the number format of the features that they are given; flow,
certainty and everything that solves a linear system stay in float32.

At full resolution the refiners take nine tenths of the time and, computed plainly, all the memory.
At inference they therefore run on weights with batch normalisation folded in and channels filled up
to a multiple of 16 (1137 channels cost 1.4 times as much as 1152), in channels-last order; on a
processor in blocks of rows that stay in its cache. None of it changes numbers beyond rounding.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gim_hloc.geometry.warp import cell_centres

_ALIGN = 16  # channels are filled up to a multiple of it
_STRIPE_BYTES = 2 << 20  # of one block of rows in a refiner on a processor
_GATHER_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # of feature rows gathered at once


def resize(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize (B, C, H, W) to (height, width): bilinear, edges aligned, no antialiasing."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def start_flow(batch: int, size: tuple[int, int], device: torch.device) -> torch.Tensor:
    """The flow (B, 2, H, W) that maps every cell onto itself."""
    grid = cell_centres(*size, device=device).permute(2, 0, 1)
    return grid[None].expand(batch, -1, -1, -1)


def attenuated_certainty(certainty: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
    """Certainty in [0, 1] from logits, raised where the coarse scale was already doubtful.

    Args:
        certainty: (B, 1, H, W) logits of the finest scale.
        coarse: (B, 1, h, w) logits after the refinement at stride 16 of the first pass.
    """
    low = resize(coarse.float(), (certainty.shape[-2], certainty.shape[-1]))
    return torch.sigmoid(certainty.float() - 0.5 * low.clamp(max=0))


class _Windows:
    """Windows of (2 r + 2)^2 whole pixels of a map around fractional positions."""

    # All places of a correlation window differ from its centre by whole pixels and share one
    # fraction, so that (2 r + 2)^2 products per position, blended afterwards, replace (2 r + 1)^2
    # interpolated samples.

    def __init__(self, b: torch.Tensor, flow: torch.Tensor, radius: int) -> None:
        batch, channels, height, width = b.shape
        self.side = side = 2 * radius + 2
        # Windows of positions that are clamped here lie in the zeros around the map altogether.
        x, y = (
            (((flow[:, axis].float() + 1) * n - 1) / 2)
            .nan_to_num(nan=-1e6)
            .clamp(-(radius + 2), n + radius)
            for axis, n in enumerate((width, height))
        )
        left, top = x.floor(), y.floor()
        self.fraction = torch.stack([x - left, y - top], -1).reshape(-1, 2)
        padded = F.pad(b.permute(0, 2, 3, 1), (0, 0, side, side, side, side))
        rows, columns = padded.shape[1:3]
        element = torch.arange(batch, device=b.device).view(-1, 1, 1) * rows
        corner = (element + top.long() - radius + side) * columns + left.long() - radius + side
        steps = torch.arange(side, device=b.device) * columns
        self.starts = corner.reshape(-1, 1) + steps  # of every row of every window
        pixels = padded.reshape(-1, channels)
        if torch.is_grad_enabled() and b.requires_grad:
            # Pixel by pixel: the gradient of overlapping rows would need all of them at once.
            self.starts = (self.starts[..., None] + torch.arange(side, device=b.device)).flatten(1)
            self.rows = pixels
        else:
            # Rows of a window are contiguous: one gather per row instead of one per pixel.
            self.rows = pixels.as_strided((len(pixels) - side + 1, side * channels), (channels, 1))
        self.channels = channels
        budget = _GATHER_BYTES.get(b.device.type, _GATHER_BYTES["cuda"])
        self.step = max(1, budget // (side * side * channels * b.element_size()))

    def __len__(self) -> int:
        return len(self.starts)

    def gather(self, start: int) -> torch.Tensor:
        """(n, side^2, C): the windows from number ``start`` on, ``step`` of them."""
        index = self.starts[start : start + self.step].reshape(-1)
        return self.rows.index_select(0, index).view(-1, self.side * self.side, self.channels)


def local_correlation(
    a: torch.Tensor, b: torch.Tensor, flow: torch.Tensor, radius: int
) -> torch.Tensor:
    """Correlate each feature with a window around its target.

    Args:
        a: (B, C, H, W) features.
        b: (B, C, H, W) features of the other image.
        flow: (B, 2, H, W) normalised targets of ``a``'s cells in the other image.
        radius: of the window, in cells.

    Returns:
        (B, (2 radius + 1)^2, H, W) channels-last: entry ``iy (2 radius + 1) + ix`` is the product
        with ``b`` interpolated ``ix - radius`` cells right of and ``iy - radius`` cells below the
        target, divided by sqrt(C); zero outside ``b``.
    """
    batch, channels, height, width = a.shape
    windows = _Windows(b, flow, radius)
    # Scaled first: a product of 512 channels can leave the range of float16.
    queries = (a.permute(0, 2, 3, 1) * channels**-0.5).reshape(-1, channels)
    side = windows.side

    def block(start: int) -> torch.Tensor:
        query = queries[start : start + windows.step]
        # In this order of factors MKL is ten times as fast as in the other.
        products = torch.bmm(query[:, None], windows.gather(start).mT).float().view(-1, side, side)
        fraction = windows.fraction[start : start + windows.step]
        blended = torch.lerp(products[:, :-1], products[:, 1:], fraction[:, 1, None, None])
        blended = torch.lerp(blended[..., :-1], blended[..., 1:], fraction[:, 0, None, None])
        return blended.reshape(len(query), -1).to(a.dtype)

    starts = range(0, len(windows), windows.step)
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        # Gathered windows are hundreds of times larger than the maps: gather them again instead.
        out = torch.cat([checkpoint(block, start, use_reentrant=False) for start in starts])
    else:
        out = queries.new_empty(len(queries), (side - 1) ** 2)
        for start in starts:
            out[start : start + windows.step] = block(start)
    return out.view(batch, height, width, -1).permute(0, 3, 1, 2)


def warp_features(b: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Features of ``b`` (B, C, H, W) at normalised targets (B, 2, h, w): bilinear, zero outside."""
    if b.dtype == torch.float32 or torch.is_grad_enabled():
        return F.grid_sample(
            b.float(), flow.float().permute(0, 2, 3, 1), mode="bilinear", align_corners=False
        ).to(b.dtype)
    # grid_sample wants positions in the features' format, and half precision is too coarse.
    windows = _Windows(b, flow, 0)
    out = b.new_empty(len(windows), b.shape[1])
    for start in range(0, len(windows), windows.step):
        x, y = windows.fraction[start : start + windows.step].unbind(-1)
        weights = torch.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], -1)
        found = torch.bmm(weights[:, None].to(b.dtype), windows.gather(start))
        out[start : start + windows.step] = found[:, 0]
    return out.view(len(b), *flow.shape[-2:], -1).permute(0, 3, 1, 2)


@contextlib.contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Batch normalisation uses a batch's statistics without adding them to the running ones."""
    kept = [
        (m, m.momentum, m.num_batches_tracked, m.num_batches_tracked.clone())
        for m in module.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.num_batches_tracked is not None
    ]
    try:
        for norm, *_ in kept:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum, count, before in kept:
            norm.momentum = momentum
            count.copy_(before)


def recomputed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module, keep its inputs only, and compute the rest again for the gradients.

    Other than with ``torch.utils.checkpoint`` alone, running statistics see each batch once.
    """
    return checkpoint(
        module,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing here is random
        context_fn=lambda: (contextlib.nullcontext(), _statistics_kept(module)),
        **kwargs,
    )


def refiner_shapes(
    state: Mapping[str, torch.Tensor], features: Mapping[int, int], multiplier: Mapping[int, int]
) -> tuple[dict[int, int], dict[int, int], int]:
    """Widths of the refiners of a checkpoint.

    Args:
        state: names and tensors, prefixes taken off.
        features: channels of each image's features by stride.
        multiplier: of the channels inside, by stride; 1 where none is given.

    Returns:
        Channels of the displacement's embedding by stride, radii of the local correlation by stride
        (where there is one), and the number of hidden blocks.
    """
    embedding, radius = {}, {}
    for stride, channels in features.items():
        name = f"decoder.conv_refiner.{stride}"
        embedding[stride] = len(state[f"{name}.disp_emb.weight"])
        inputs = state[f"{name}.out_conv.weight"].shape[1] // multiplier.get(stride, 1)
        window = inputs - 2 * channels - embedding[stride]
        if window > 0:
            radius[stride] = (round(window**0.5) - 1) // 2
    return embedding, radius, count_modules(state, "decoder.conv_refiner.1.hidden_blocks.")


def count_modules(state: Mapping[str, torch.Tensor], prefix: str) -> int:
    """How many numbers follow a prefix in the names of a checkpoint."""
    return len({k[len(prefix) :].partition(".")[0] for k in state if k.startswith(prefix)})


class GaussianProcess(nn.Module):
    """Regression from features to places in the other image, encoded as cosines.

    The posterior mean is ``K_ab (K_bb + noise I)^-1 f``. Everything right of ``K_ab`` depends on
    image b alone: ``factor`` computes it once per image. Always float32.

    Args:
        dim: number of basis functions.
        temperature: of the kernel ``exp((cos - 1) / temperature)``.
        noise: variance added to the diagonal.
    """

    def __init__(self, dim: int, *, temperature: float = 0.2, noise: float = 0.1) -> None:
        super().__init__()
        self.pos_conv = nn.Conv2d(2, dim, 1)
        self.temperature = temperature
        self.noise = noise

    def kernel(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """(B, N, C), (B, M, C) -> (B, N, M)."""
        norms = x.norm(dim=-1)[:, :, None] * y.norm(dim=-1)[:, None]
        cosine = x @ y.mT / (norms + 1e-6)
        return ((cosine - 1) / self.temperature).exp()

    def basis(self, size: tuple[int, int]) -> torch.Tensor:
        """Basis functions at the cells of a grid, (1, N, dim)."""
        grid = start_flow(1, size, self.pos_conv.weight.device)
        places = self.pos_conv(grid)
        return (8 * torch.pi * places).cos().flatten(2).mT

    def factor(self, features: torch.Tensor) -> torch.Tensor:
        """What image b contributes: (B, C, h, w) -> (B, h w, dim)."""
        with torch.autocast(features.device.type, enabled=False):
            x = features.float().flatten(2).mT
            covariance = self.kernel(x, x)
            covariance = covariance + self.noise * torch.eye(x.shape[1], device=x.device)
            basis = self.basis((features.shape[-2], features.shape[-1]))
            # Always positive definite, and torch.linalg.inv fails on batches with some versions of
            # MKL. cholesky_ex does not wait for the device to report.
            root = torch.linalg.cholesky_ex(covariance)[0]
            return torch.cholesky_solve(basis.expand(len(x), -1, -1), root)

    def forward(
        self, a: torch.Tensor, b: torch.Tensor, factor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Posterior mean (B, dim, h, w) at the features ``a`` (B, C, h, w).

        Args:
            a: features of the image that is asked about.
            b: features of the other image.
            factor: ``self.factor(b)`` if it is there already.
        """
        factor = self.factor(b) if factor is None else factor
        with torch.autocast(a.device.type, enabled=False):
            x, y = (features.float().flatten(2).mT for features in (a, b))
            mean = self.kernel(x, y) @ factor.float()
        return mean.mT.reshape(len(a), -1, *a.shape[-2:])


class _Block(NamedTuple):
    """Depthwise 5x5 with normalisation folded in, then 1x1; channels filled up with zeros."""

    depthwise: torch.Tensor  # (P, 1, 5, 5)
    depthwise_bias: torch.Tensor  # (P)
    pointwise: torch.Tensor  # (P, P)
    pointwise_bias: torch.Tensor  # (P)


class _Folded(NamedTuple):
    blocks: tuple[_Block, ...]
    out: torch.Tensor  # (3, P)
    out_bias: torch.Tensor  # (3)


class ConvRefiner(nn.Module):
    """Improves flow and certainty at one scale, from both images' features at the present flow.

    Args:
        features: channels of each image's features.
        embedding: channels of the displacement's embedding.
        radius: of the local correlation in cells; 0 leaves it out.
        hidden: blocks after the first.
        multiplier: channels inside per channel of the input.
        certainty_first: whether the output is [certainty, dx, dy] (DKM) or [dx, dy, certainty].
        momentum: of the batch normalisation's running statistics, for training.
    """

    def __init__(
        self,
        *,
        features: int,
        embedding: int,
        radius: int = 0,
        hidden: int = 8,
        multiplier: int = 1,
        certainty_first: bool = True,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.features = features
        self.radius = radius
        self.certainty_first = certainty_first
        window = (2 * radius + 1) ** 2 if radius else 0
        inputs = 2 * features + embedding + window
        self.multiplier = multiplier
        self.channels = n = multiplier * inputs

        def block(groups: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(groups, n, 5, padding=2, groups=groups),
                nn.BatchNorm2d(n, momentum=momentum),
                nn.ReLU(),
                nn.Conv2d(n, n, 1),
            )

        self.block1 = block(inputs)
        self.hidden_blocks = nn.Sequential(*(block(n) for _ in range(hidden)))
        self.out_conv = nn.Conv2d(n, 3, 1)
        self.disp_emb = nn.Conv2d(2, embedding, 1)
        self._run = _run_blocks
        self._folded: dict[tuple[torch.device, torch.dtype], _Folded] = {}

    def forward(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        flow: torch.Tensor,
        *,
        displacement_scale: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict corrections.

        Args:
            a: (B, C, H, W) features of the image that is asked about.
            b: (B, C, H, W) features of the other image.
            flow: (B, 2, H, W) present targets.
            displacement_scale: factor on displacements before they are embedded.

        Returns:
            Raw (B, 2, H, W) flow and (B, 1, H, W) certainty corrections, float32; see ``refine``.
        """
        if self.training or torch.is_grad_enabled():
            x = torch.cat(self._inputs(a, b, flow, displacement_scale), 1)
            x = self.out_conv(self.hidden_blocks(self.block1(x))).float()
        else:
            x = self._infer(a, b, flow, displacement_scale)
        if self.certainty_first:
            return x[:, 1:], x[:, :1]
        return x[:, :2], x[:, 2:]

    def _inputs(
        self, a: torch.Tensor, b: torch.Tensor, flow: torch.Tensor, displacement_scale: float
    ) -> list[torch.Tensor]:
        displacement = flow - start_flow(1, (flow.shape[-2], flow.shape[-1]), flow.device)
        displacement = (displacement_scale * displacement).float()
        inputs = [a, warp_features(b, flow), self.disp_emb(displacement)]
        if self.radius:
            inputs.append(local_correlation(a, b, flow, self.radius))
        return inputs

    def _infer(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        flow: torch.Tensor,
        displacement_scale: float,
    ) -> torch.Tensor:
        folded = self.folded(a.dtype)
        height, width = flow.shape[-2:]
        on_cpu = a.device.type == "cpu"
        # Rows of zeros above and below let blocks of rows read their neighbours.
        margin = 2 if on_cpu else 0
        # A processor gains nothing from batches, and one element at a time bounds the memory.
        parts = [slice(i, i + 1) for i in range(len(a))] if on_cpu else [slice(None)]
        results = []
        for part in parts:
            inputs = self._inputs(a[part], b[part], flow[part], displacement_scale)
            x = a.new_zeros(len(inputs[0]), height + 2 * margin, width, folded.out.shape[1])
            inner = x[:, margin : margin + height]
            channel = 0
            for value in inputs:
                if self.multiplier > 1:
                    value = value.repeat_interleave(self.multiplier, 1)
                inner[..., channel : channel + value.shape[1]].copy_(value.permute(0, 2, 3, 1))
                channel += value.shape[1]
            del inputs, inner
            x = self._run(x, folded.blocks)[:, margin : margin + height]
            results.append(F.linear(x, folded.out, folded.out_bias).float().permute(0, 3, 1, 2))
        return torch.cat(results)

    def folded(self, dtype: torch.dtype) -> _Folded:
        """Weights for inference, made once per device and number format."""
        device = self.out_conv.weight.device
        if (device, dtype) not in self._folded:
            fill = -self.channels % _ALIGN

            def ready(value: torch.Tensor | None, *padding: int) -> torch.Tensor:
                assert value is not None  # every convolution here has a bias
                return F.pad(value.detach().float(), padding).to(dtype)

            blocks = []
            for depthwise, norm, _, pointwise in (self.block1, *self.hidden_blocks):
                gain = norm.weight / (norm.running_var + norm.eps).sqrt()
                bias = (depthwise.bias - norm.running_mean) * gain + norm.bias
                weight = depthwise.weight * gain[:, None, None, None]
                blocks.append(
                    _Block(
                        ready(weight, 0, 0, 0, 0, 0, 0, 0, fill),
                        ready(bias, 0, fill),
                        ready(pointwise.weight[..., 0, 0], 0, fill, 0, fill),
                        ready(pointwise.bias, 0, fill),
                    )
                )
            out = ready(self.out_conv.weight[..., 0, 0], 0, fill)
            self._folded[device, dtype] = _Folded(
                tuple(blocks), out, ready(self.out_conv.bias, 0, 0)
            )
        return self._folded[device, dtype]

    def compile(self, **options: Any) -> None:  # type: ignore[override]
        """Compile the blocks for inference on CUDA; costs minutes at the first call of a size.

        Args:
            **options: of ``torch.compile``.
        """
        # Compiled versions are counted by code object, and from the ninth on nothing is compiled:
        # five refiners in two passes need nine, and more where the last batch is smaller.
        own = types.FunctionType(
            _run_blocks.__code__.replace(co_name=f"_run_blocks_{id(self)}"), globals()
        )
        self._run = torch.compile(own, **{"dynamic": False, **options})

    def train(self, mode: bool = True) -> ConvRefiner:
        """Switch mode; weights may have changed, so what was folded is dropped."""
        self._folded.clear()
        return super().train(mode)

    def _apply(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        self._folded.clear()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        self._folded.clear()
        return super()._load_from_state_dict(*args, **kwargs)


def refine(
    flow: torch.Tensor,
    delta: torch.Tensor,
    *,
    stride: int,
    size: tuple[int, int],
) -> torch.Tensor:
    """Add a refiner's raw correction to the flow.

    Args:
        flow: (B, 2, h, w) normalised.
        delta: (B, 2, h, w) raw correction (x, y).
        stride: of the scale.
        size: (height, width) of the pass at stride 1.
    """
    x, y = delta.unbind(1)
    step = torch.stack([x * (stride / (4 * size[1])), y * (stride / (4 * size[0]))], 1)
    return flow + step


def _run_blocks(x: torch.Tensor, blocks: tuple[_Block, ...]) -> torch.Tensor:
    """Blocks of a refiner, (B, H, W, P) -> same; on a processor with two rows of zeros around H."""
    # On a processor ``x`` is overwritten: new memory of this size costs as much as a third of the
    # arithmetic, so that blocks write into two buffers in turn.
    if x.device.type != "cpu":
        for block in blocks:
            x = _whole(x, block)
        return x
    spare = torch.zeros_like(x)
    for block in blocks:
        _stripes(x, block, out=spare)
        x, spare = spare, x
    return x


def _whole(x: torch.Tensor, block: _Block) -> torch.Tensor:
    channels = x.shape[-1]
    y = F.conv2d(
        x.permute(0, 3, 1, 2), block.depthwise, block.depthwise_bias, padding=2, groups=channels
    )
    return F.linear(y.relu_().permute(0, 2, 3, 1), block.pointwise, block.pointwise_bias)


def _stripes(x: torch.Tensor, block: _Block, *, out: torch.Tensor) -> None:
    batch, height, width, channels = x.shape
    height -= 4
    step = max(1, _STRIPE_BYTES // (width * channels * x.element_size()))
    for element in range(batch):
        for top in range(0, height, step):
            rows = min(step, height - top)
            y = F.conv2d(
                x[element : element + 1, top : top + rows + 4].permute(0, 3, 1, 2),
                block.depthwise,
                block.depthwise_bias,
                padding=(0, 2),
                groups=channels,
            )
            y = y.relu_().permute(0, 2, 3, 1).reshape(-1, channels)
            target = out[element, top + 2 : top + 2 + rows].view(-1, channels)
            torch.addmm(block.pointwise_bias, y, block.pointwise.T, out=target)
