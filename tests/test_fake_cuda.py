"""The pretended CUDA device refuses what CUDA refuses, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import FakeCuda
from torch import nn

CUDA = torch.device("cuda")

MIXED = "same device"


def here(*shape: int, **options) -> torch.Tensor:
    return torch.ones(*shape, device=CUDA, **options)


def there(*shape: int) -> torch.Tensor:
    return torch.ones(*shape)


def rows(device: str = "cpu") -> torch.Tensor:
    return torch.tensor([[0, 1]], device=device)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "sum": (lambda: here(3) + there(3), MIXED),
    "sum, other order": (lambda: there(3) + here(3), MIXED),
    "device scalar on host": (lambda: there(3) * here(1)[0], MIXED),
    "product": (lambda: here(2, 2) @ there(2, 2), MIXED),
    "einsum": (lambda: torch.einsum("ij,jk", here(2, 2), there(2, 2)), MIXED),
    "cat": (lambda: torch.cat([here(2), there(2)]), MIXED),
    "stack of a scalar": (lambda: torch.stack([here(2)[0], torch.tensor(1.0)]), MIXED),
    "module": (lambda: nn.Linear(2, 2)(here(1, 2)), MIXED),
    "moved module": (lambda: nn.Linear(2, 2).to(CUDA)(there(1, 2)), MIXED),
    "buffer": (lambda: nn.BatchNorm1d(2)(here(4, 2)), MIXED),
    "grid_sample": (
        lambda: F.grid_sample(here(1, 1, 2, 2), there(1, 1, 1, 2), align_corners=True),
        MIXED,
    ),
    "interpolated sum": (lambda: F.interpolate(here(1, 1, 2), 4) - there(1, 1, 4), MIXED),
    "gather": (lambda: here(1, 2).gather(1, rows()), MIXED),
    "index_select": (lambda: here(2, 2).index_select(0, rows()[0]), MIXED),
    "scatter": (lambda: here(1, 2).scatter_(1, rows(), 1.0), MIXED),
    "where": (lambda: torch.where(here(2) > 0, here(2), there(2)), MIXED),
    "mask of the host filled": (lambda: here(2).masked_fill(there(2) > 0, 0.0), MIXED),
    "range": (lambda: here(3) * torch.arange(3), MIXED),
    "written values": (lambda: here(3).__setitem__(rows("cuda")[0], there(2)), MIXED),
    "index": (lambda: there(3)[rows("cuda")[0]], "indices should be"),
    "numpy": (lambda: here(3).numpy(), "convert cuda"),
    "asarray": (lambda: __import__("numpy").asarray(here(3)), "convert cuda"),
    "generator of the host": (
        lambda: torch.randperm(3, generator=torch.Generator(), device=CUDA),
        "device type for generator",
    ),
    "generator of the device": (
        lambda: torch.rand(3, generator=torch.Generator(CUDA)),
        "device type for generator",
    ),
    "draw": (
        lambda: torch.multinomial(here(3), 1, generator=torch.Generator()),
        "device type for generator",
    ),
    "pinned": (lambda: here(3).pin_memory(), "cannot pin"),
    "half solve": (lambda: torch.linalg.solve(here(2, 2).half(), here(2).half()), "Half"),
    "half cholesky": (lambda: torch.linalg.cholesky_ex(here(2, 2).half()), "Half"),
    "integer product": (lambda: rows("cuda") @ rows("cuda").T, "not implemented"),
    "mixed types": (lambda: F.linear(here(1, 2).half(), here(2, 2)), "dtype"),
    "gradient elsewhere": (
        lambda: setattr(here(2).requires_grad_(), "grad", there(2)),
        "different device",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cuda_refuses_is_refused(name: str) -> None:
    attempt, words = REFUSED[name]
    with FakeCuda(), pytest.raises((RuntimeError, TypeError), match=words):
        attempt()


def test_what_cuda_allows_is_allowed() -> None:
    with FakeCuda() as gpu:
        x = here(2, 3)
        assert x.is_cuda
        assert x.device == torch.device("cuda", 0)
        layers = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)).to(CUDA)
        values = [x + torch.tensor(1.0), x[rows()[0]], x[:, None].mT, torch.zeros_like(x)]
        values += [x.new_zeros(2), x.masked_fill(x > 0, torch.tensor(2.0)), F.softmax(x, 0)]
        values += [torch.rand(2, generator=torch.Generator(CUDA), device=CUDA), layers(x)]
        values += [torch.from_numpy(x.cpu().numpy()).to(x), x.unbind(1)[2], x.max(1)[0]]
        for value in values:
            assert value.device.type == "cuda"
        x[0] = there(3)
        x[x > 5] = 0.0
        there(3).copy_(x[0])
        for value in (x.cpu(), x.to("cpu", torch.float16), there(2), torch.arange(3)):
            assert not value.is_cuda
        assert gpu.synchronisations == {"cpu": 3, "copy_": 1}
        assert float(x.sum()) == 6
        assert gpu.synchronisations["__float__"] == 1
    assert torch.arange(2).device.type == "cpu"
    assert not torch.cuda.is_available()


def test_gradients_and_optimisers_stay_on_the_device() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 1)
    x = torch.rand(8, 3)
    layer(x).square().sum().backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    with FakeCuda():
        layer.to(CUDA)
        optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1)
        with pytest.raises(RuntimeError, match=MIXED):
            layer(x)
        layer(x.to(CUDA)).square().sum().backward()
        assert layer.weight.grad.is_cuda
        before = layer.weight.detach().clone()
        optimiser.step()
        assert ((before - layer.weight).abs() > 0.05).all()
        torch.testing.assert_close(layer.weight.grad.cpu(), expected)


def test_autocast_follows_cuda_s_lists() -> None:
    with FakeCuda():
        layer = nn.Conv2d(1, 2, 1).to(CUDA)
        x = here(1, 1, 4, 4)
        with torch.autocast("cuda", torch.float16):
            y = layer(x)
            assert y.dtype == torch.float16
            for value in (y.softmax(1), y**2, y.sum(), F.layer_norm(y, (4,)), y.exp(), y + x):
                assert value.dtype == torch.float32
            for value in (F.relu(y), y * 2, F.max_pool2d(y, 2), x.flatten(2).mT @ x.flatten(2)):
                assert value.dtype == torch.float16
            assert torch.isinf(torch.full((2, 2), 300.0, device=CUDA) @ (300 * here(2, 2))).all()
            with torch.autocast("cuda", enabled=False), pytest.raises(RuntimeError, match="type"):
                layer(y)
        assert layer(x).dtype == torch.float32


def test_memory_is_limited_and_counted() -> None:
    with FakeCuda(limit=4000) as gpu:
        held = here(500)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            here(600)
        assert gpu.allocated() == 2000
        view = held[:10]
        assert gpu.allocated() == 2000
        del held
        assert gpu.allocated() == 2000
        del view
        assert gpu.allocated() == 0
        here(900)
