"""The training loop: one process or many, interrupted at any moment or not, the same weights.

Everything that a step depends on is a function of the settings and of the place in the run: which
pairs (`loader`), which learning rate (`schedules`), which random numbers (stored with the state).
State is stored at borders between optimiser steps only, so that no half-accumulated gradient is
ever part of it; what was accumulated when a run stops is thrown away and done again.

``torchrun --nproc_per_node=8 --nnodes=5 ... -m gim_hloc.cli.train ...`` and ``gim-train ...`` run
the same code; Lightning Fabric finds out where it is and starts the missing processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from gim_hloc import weights
from gim_hloc.errors import GimError, InputError
from gim_hloc.lock import FolderLock
from gim_hloc.training import checkpoints, logs, schedules, validation
from gim_hloc.training.batch import PairBatch, collate
from gim_hloc.training.checkpoints import Best, Progress
from gim_hloc.training.config import TrainConfig, dump, write_config
from gim_hloc.training.loader import EpochLoader, PairData, open_sources, validation_loader
from gim_hloc.training.models import build_model, model_options
from gim_hloc.training.optimiser import Step, make_optimiser, scale_loss
from gim_hloc.training.processes import (
    Signals,
    Together,
    lost_peers_are_named,
    make_fabric,
    processes,
    synchronises,
)

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from gim_hloc.training.models.base import TrainingModel

logger = logging.getLogger(__name__)


UNUSABLE = "unusable_pairs.jsonl"
"""File of a run with the pairs that could not be read or have too little truth."""


class NotFiniteError(GimError):
    """Loss or gradients were not finite for many optimiser steps in a row."""

    exit_code = 5


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The arithmetic of a run."""

    world: int  # processes
    batches: int  # micro-batches an epoch of each process
    accumulation: int  # micro-batches of an optimiser step
    windows: tuple[int, ...]  # of each optimiser step of an epoch; the last may have fewer
    epochs: int
    warmup: int  # optimiser steps

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return len(self.windows)

    @property
    def total(self) -> int:
        """Optimiser steps of the run."""
        return self.steps_per_epoch * self.epochs


def make_plan(config: TrainConfig, *, batches: int, world: int) -> Plan:
    """Return the arithmetic of a run.

    Args:
        config: its settings.
        batches: micro-batches an epoch of each process.
        world: processes.
    """
    accumulation = schedules.accumulation_steps(
        config.optimiser.canonical_batch, world=world, batch_size=config.data.batch_size
    )
    parts = schedules.windows(batches, accumulation)
    given = config.optimiser.warmup_steps
    return Plan(
        world=world,
        batches=batches,
        accumulation=accumulation,
        windows=tuple(parts),
        epochs=config.epochs,
        warmup=len(parts) if given is None else given,
    )


def learning_rate(config: TrainConfig, plan: Plan, *, step: int, epoch: int) -> float:
    """Return the learning rate of an optimiser step before the factors of parameter groups.

    Args:
        config: with the rule.
        plan: of the run.
        step: optimiser steps taken before.
        epoch: that the step belongs to, from 0.
    """
    optimiser = config.optimiser
    if optimiser.rule == "epoch":
        return schedules.epoch_rule(
            epoch, lr=optimiser.lr, constant=optimiser.constant_epochs, decay=optimiser.decay
        )
    return schedules.step_rule(
        step,
        lr=optimiser.lr,
        min_lr=optimiser.min_lr,
        warmup=plan.warmup,
        total=plan.total,
        start=optimiser.warmup_start,
    )


@dataclass(kw_only=True)
class TrainReport:
    """What a call of `train` did."""

    folder: Path
    steps: int  # optimiser steps of the whole run so far
    total: int  # that it has
    pairs: int  # seen by all processes in the whole run so far
    seconds: float  # of this call's training, without validations and storing
    pairs_per_second: float  # of this call, all processes
    data_wait: float  # share of the seconds spent waiting for batches
    memory: int  # bytes: peak of the GPU, or of the process
    skipped: int  # optimiser steps without effect
    figures: dict[str, float] = field(default_factory=dict)  # of the last validation of this call
    best: tuple[tuple[str, float], ...] = ()  # checkpoints, best first
    interrupted: int | None = None  # signal that ended it early

    @property
    def finished(self) -> bool:
        """All steps are taken."""
        return self.steps >= self.total and self.interrupted is None

    def summary(self) -> str:
        """Return one line."""
        state = "stopped" if self.interrupted is not None else "done"
        best = f", best {self.best[0][0]}" if self.best else ""
        skipped = f", {self.skipped} steps skipped" if self.skipped else ""
        return (
            f"{state} at step {self.steps} of {self.total}: {self.pairs} pairs, "
            f"{self.pairs_per_second:.2f} pairs/s, {self.data_wait:.0%} waiting for data, "
            f"{self.memory / 2**30:.2f} GiB at most{skipped}{best}; {self.folder}"
        )


def train(
    config: TrainConfig,
    folder: Path,
    *,
    build: Callable[[TrainConfig], TrainingModel] | None = None,
    data: Callable[[TrainConfig], PairData] | None = None,
    progress: bool = False,
) -> TrainReport:
    """Train a model, or go on with the training that the folder holds.

    Args:
        config: the run; stored as ``config.yaml``.
        folder: of checkpoints, numbers and pictures. A ``checkpoints/last.ckpt`` in it is gone on
            from: the result is that of a run which was never interrupted, on a processor bit for
            bit.
        build: makes the model, with random weights; None: from the settings.
        data: opens the sources; None: from the settings.
        progress: show a bar.

    Returns:
        What was done, also if a signal ended it early: then ``interrupted`` names it, and the state
        is stored.

    Raises:
        InputError: a setting makes no run, or a source cannot be opened.
        LockedError: another training works in the folder.
        OutputError: the folder holds another run, or cannot be written.
        NotFiniteError: too many steps in a row were not finite.
        PeerError: another process of the run has ended.
    """
    config.check()
    if build is None:
        model_options(config.model, config.model_options)
    fabric = make_fabric(config)
    fabric.launch()
    if fabric.global_rank:
        logging.getLogger("gim_hloc").setLevel(logging.ERROR)
    config.check_world(fabric.world_size)
    last = Path(folder) / checkpoints.FOLDER / checkpoints.LAST
    with (
        lost_peers_are_named(last) if fabric.world_size > 1 else contextlib.nullcontext(),
        FolderLock(Path(folder)) if fabric.is_global_zero else contextlib.nullcontext(),
    ):
        run = _Run(config, Path(folder), fabric, build=build, data=data, progress=progress)
        # Processors too have kernels that add in the order in which threads come (index_put_).
        same = config.runtime.deterministic or fabric.device.type == "cpu"
        with Signals() as signals, _deterministic() if same else contextlib.nullcontext():
            run.signals = signals
            try:
                return run.run()
            finally:
                run.close()


# ---------------------------------------------------------------------------------------------- run


class _Run:
    """One process of a run."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        fabric: Fabric,
        *,
        build: Callable[[TrainConfig], TrainingModel] | None,
        data: Callable[[TrainConfig], PairData] | None,
        progress: bool,
    ) -> None:
        self.config = config
        self.folder = folder
        self.fabric = fabric
        self.device: torch.device = fabric.device
        self.cuda = self.device.type == "cuda"
        self.main = fabric.is_global_zero
        self.signals = Signals()
        self.together = Together(fabric)
        self.progress = Progress()
        self.figures: dict[str, float] = {}
        self.logs: logs.Logs | None = None
        self.clock = logs.Clock()
        self.bar: Any = None
        self.rate = 0.0  # of the last step
        self.saved = False  # last.ckpt is of the last step
        self._examples: list[PairBatch] = []

        self.last = folder / checkpoints.FOLDER / checkpoints.LAST
        if self.main:
            write_config(config, folder, begun=self.last.exists())
            checkpoints.clean(folder / checkpoints.FOLDER)
        fabric.barrier()
        self.best = Best(folder / checkpoints.FOLDER, config.validation.keep)
        state = checkpoints.load(self.last) if self.last.exists() else None
        resume = (
            checkpoints.check_resume(state, path=self.last, world=fabric.world_size)
            if state is not None
            else None
        )
        self._configure()
        self.data = data(config) if data else open_sources(config, failures=folder / UNUSABLE)
        if self.main and not len(self.data.valid_keys):
            logger.warning("No validation source: only last.ckpt is kept, none is called best.")
        self.loader = EpochLoader(
            self.data,
            batch_size=config.data.batch_size,
            seed=config.seed,
            rank=fabric.global_rank,
            world=fabric.world_size,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
            pin=self.cuda,
        )
        self.plan = make_plan(config, batches=self.loader.batches, world=fabric.world_size)
        seed_everything(config.seed)
        model = (build or build_from)(config)
        self._weights(model, state)
        self.model = self._place(model)
        self.optimiser = make_optimiser(config, self.model, fused=self.cuda)
        self.stepper = Step(
            self.model, self.optimiser, clip=config.optimiser.clip_norm, device=self.device
        )
        if config.runtime.compile:
            self.model.compile()
        self.module = fabric.setup_module(self.model, move_to_device=False)
        # Each process has its own stream of random numbers from here on.
        seed_everything(config.seed + fabric.global_rank)
        if resume is not None:
            self._resume(resume)
            self.figures = dict((state or {}).get("figures", {}))
        self._progress_wanted = progress and self.main

    def _configure(self) -> None:
        runtime = self.config.runtime
        if self.cuda:
            torch.backends.cudnn.benchmark = not runtime.deterministic
            torch.backends.cuda.matmul.allow_tf32 = runtime.tf32
            torch.backends.cudnn.allow_tf32 = runtime.tf32

    def _weights(self, model: TrainingModel, state: Mapping[str, Any] | None) -> None:
        trained = None
        if state is not None:
            trained = state["state_dict"]
        elif self.config.weights is not None:
            trained = checkpoints.load_weights(self.config.weights)
        if trained is None:
            model.initialise(initial_file(self.config))
        else:
            model.load_checkpoint(trained)

    def _place(self, model: TrainingModel) -> TrainingModel:
        if self.fabric.world_size > 1 and synchronises(self.config, self.device.type):
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = model.to(self.device)
        if self.cuda and self.config.runtime.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.train()
        return model

    def _resume(self, state: Mapping[str, Any]) -> None:
        self.progress = Progress(**state["progress"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.stepper.restore(self.progress)
        checkpoints.set_rng_state(state["rng"][self.fabric.global_rank])
        if self.main:
            self.best.restore(state["best"])
        done = self.progress
        logger.info(
            "Going on from step %d of %d (epoch %d).", done.step, self.plan.total, done.epoch + 1
        )

    # ------------------------------------------------------------------------------------- the loop

    def run(self) -> TrainReport:
        """Train to the end or to a signal."""
        if self.main:
            self.logs = logs.Logs(
                self.folder, step=self.progress.step, tensorboard=self.config.log.tensorboard
            )
        self._open_bar()
        before = self.config.validation.before
        if before is None:
            before = self.config.weights is not None
        if before and self.progress.step == 0:
            self._validate(rank_it=False)
        stopped = 0
        while self.progress.epoch < self.plan.epochs and not stopped:
            stopped = self._epoch()
        if not stopped and self.main and not self.best.entries:
            self._publish(self._checkpoint())  # nothing says that earlier ones are better
        return self._report(stopped or None)

    def _epoch(self) -> int:
        """Go on with an epoch to its end; returns the signal that stops the run, or 0."""
        plan, progress = self.plan, self.progress
        batches = self._batches() if progress.window < plan.steps_per_epoch else iter(())
        means = logs.Means()
        while True:
            # Here and not after the step: a run that was stopped between the two makes up for it.
            due = self._validations_due()
            end = progress.window == plan.steps_per_epoch
            if due > progress.validations:
                if not self.saved:  # validating takes long: a kill meanwhile must cost no steps
                    self._save()
                self._validate()
                progress.validations = due
                if not end:
                    self._save()
            if end:
                break
            stopped = self._window(batches, means)
            if stopped is None:  # asked in the middle of it: it will be done again
                self._save()
                return self.signals.received or 0
            self._after_step(means)
            if stopped:
                self._save()
                return stopped
            every = self.config.log.save_every
            if every and progress.step % every == 0 and progress.window < plan.steps_per_epoch:
                self._save()
        progress.epoch, progress.window = progress.epoch + 1, 0
        self._save()
        return 0

    def _batches(self) -> Iterator[PairBatch]:
        start = self.progress.window * self.plan.accumulation
        return self.loader.epoch(self.progress.epoch, start=start)

    def _window(self, batches: Iterator[PairBatch], means: logs.Means) -> int | None:
        """Take one optimiser step.

        Returns:
            0; or the signal on which all processes stop after it; or None if the only process was
            asked to stop within it, and nothing of the step is left.
        """
        progress, plan = self.progress, self.plan
        count = plan.windows[progress.window]
        first = progress.window * plan.accumulation
        pairs = self.loader.pairs(first, count)
        alone = plan.world == 1
        self.saved = False
        self.stepper.statistics.keep()
        rng = checkpoints.rng_state() if alone and count > 1 else None
        self.together.ask(self.signals.received or 0)
        for number in range(count):
            if alone and rng is not None and number and self.signals.received is not None:
                self.optimiser.zero_grad(set_to_none=True)
                self.stepper.statistics.restore()
                checkpoints.set_rng_state(rng)
                self.together.answer()
                return None
            since = time.perf_counter()
            batch = next(batches)
            self.clock.wait(time.perf_counter() - since)
            self._backward(batch, len(batch) / pairs, means, sync=number == count - 1)
        rate = learning_rate(self.config, plan, step=progress.step, epoch=progress.epoch)
        self.stepper.apply(rate)
        self.rate = rate
        progress.window += 1
        progress.step += 1
        progress.pairs += pairs * plan.world
        self.clock.pairs += pairs * plan.world
        agreed = self.together.answer()
        return (self.signals.received or 0) if alone else agreed

    def _backward(self, batch: PairBatch, share: float, means: logs.Means, *, sync: bool) -> None:
        batch = self._to_device(batch)
        with self.fabric.no_backward_sync(self.module, enabled=not sync):
            with self._autocast():
                losses = self.module(batch)
            self.fabric.backward(scale_loss(losses["loss"], share))
        means.add(losses)

    def _to_device(self, batch: PairBatch) -> PairBatch:
        batch = batch.to(self.device)
        if not (self.cuda and self.config.runtime.channels_last):
            return batch
        layout = torch.channels_last
        return dataclasses.replace(
            batch,
            image0=batch.image0.contiguous(memory_format=layout),
            image1=batch.image1.contiguous(memory_format=layout),
        )

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.runtime.precision == "32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _after_step(self, means: logs.Means) -> None:
        """Log and draw, each when it is due."""
        progress, log = self.progress, self.config.log
        if self.bar is not None:
            self.bar.update(1)
        end = progress.window == self.plan.steps_per_epoch
        if progress.step % log.every == 0 or progress.step == 1 or end:
            self._log(means)
        elif not self.cuda:  # where reading costs nothing, not only when something is logged
            self._require_finite(self.stepper.read(progress))
        if log.pictures_every and progress.step % log.pictures_every == 0:
            self._draw()

    def _validations_due(self) -> int:
        per_epoch = self.config.validation.per_epoch
        if not per_epoch:
            return 0
        done = schedules.validations_due(
            self.progress.window, steps=self.plan.steps_per_epoch, per_epoch=per_epoch
        )
        return self.progress.epoch * per_epoch + done

    # ------------------------------------------------------------------------------ numbers, state

    def _log(self, means: logs.Means) -> None:
        row = self.stepper.read(self.progress)
        values = logs.merge_means(self.together.gather(means.take()))
        speed, wait = self.clock.lap()
        memory = logs.peak_memory(self.device) / 2**30
        if self.logs is not None:
            numbers = {f"train/{name}": value for name, value in values.items()}
            numbers |= {
                "train/lr": self.rate,
                "train/gradient_norm": float(self.stepper.norm),
                "train/epoch": self.progress.epoch
                + self.progress.window / self.plan.steps_per_epoch,
                "train/skipped_steps": self.progress.skipped,
                "speed/pairs_per_second": speed,
                "speed/data_wait": wait,
                "speed/memory_gib": memory,
            }
            self.logs.scalars(self.progress.step, numbers)
        if self.bar is not None:
            self.bar.set_postfix_str(
                f"loss {values.get('loss', float('nan')):.4g}, lr {self.rate:.2e}, "
                f"{speed:.2f} pairs/s, wait {wait:.0%}, {memory:.1f} GiB"
            )
        self._require_finite(row)

    def _require_finite(self, row: int) -> None:
        if row >= self.config.optimiser.max_bad_steps:
            raise NotFiniteError(
                f"Loss or gradients were not finite for {row} optimiser steps in a row, up to step "
                f"{self.progress.step}: the weights have not changed since. Lower --optimiser.lr, "
                "take --runtime.precision 32, or look for damaged pairs in the sources. "
                f"The last stored state is {self.last}."
            )

    def _save(self) -> None:
        self.clock.lap()
        self.stepper.read(self.progress)
        rng = self.together.gather(checkpoints.rng_state())
        if self.main:
            content = self._checkpoint()
            content["resume"] = checkpoints.resume_state(
                self.progress,
                optimiser=self.optimiser,
                rng=rng,
                best=self.best,
                world=self.plan.world,
            )
            checkpoints.save(self.last, content)
            self.best.tidy()
        self.saved = True
        self.fabric.barrier()
        self.clock.pause()

    def _checkpoint(self) -> dict[str, Any]:
        state = self.model.checkpoint()
        content: dict[str, Any] = {
            "state_dict": {k: v.detach().cpu().contiguous() for k, v in state.items()},
            "train_step": self.progress.step,
            "valid_step": self.progress.validations,
            "EPOCH": self.progress.epoch,
            "model": self.model.name,
            "config": dump(self.config),
            "figures": dict(self.figures),
            weights.NOTES: dict(self.model.notes),
        }
        return content

    def _publish(self, content: Mapping[str, Any]) -> None:
        """Store weights under the name that their matcher looks for."""
        name = checkpoints.published_name(self.model.name)
        if name is not None:
            checkpoints.save(self.folder / checkpoints.WEIGHTS / name, content)

    # ---------------------------------------------------------------------------------- validation

    def _validate(self, *, rank_it: bool = True) -> None:
        count = len(self.data.valid_keys)
        if not count:
            return
        config = self.config
        self.clock.lap()
        indices = validation.batch_indices(
            count,
            config.data.valid_batch_size,
            rank=self.fabric.global_rank,
            world=self.plan.world,
        )
        loader = validation_loader(
            self.data,
            indices,
            seed=config.seed,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
            pin=self.cuda,
        )
        protocol = validation.make_protocol(
            config.validation.threshold,
            config.validation.confidence,
            config.validation.max_iterations,
        )
        with checkpoints.unchanged_rng(config.seed), self._autocast():
            mine = validation.validate_batches(
                self.model,
                zip(indices, self._shown(loader, len(indices)), strict=True),
                protocol=protocol,
                device=self.device,
                seed=config.seed,
                threads=max(1, min(8, logs.processors() - 1)),
            )
        self.figures = validation.summarise(validation.gather(self.together.gather(mine)))
        name, value = validation.monitored(self.figures)
        if self.logs is not None:
            self.logs.scalars(
                self.progress.step, {f"valid/{k}": v for k, v in self.figures.items()}
            )
            logger.info(
                "Step %d: %s",
                self.progress.step,
                ", ".join(f"{k} {v:.4g}" for k, v in self.figures.items()),
            )
            if rank_it and name:
                content = self._checkpoint()
                path = self.best.offer(self.progress.epoch, value, content)
                if path is not None and path.name == self.best.entries[0][0]:
                    self._publish(content)
        self.fabric.barrier()
        self.clock.pause()

    def _shown(self, loader: Iterator[PairBatch], count: int) -> Iterator[PairBatch]:
        if not self._progress_wanted:
            return loader
        from tqdm import tqdm

        return iter(tqdm(loader, total=count, desc="validating", unit="batch", leave=False))

    def _draw(self) -> None:
        """Draw matches of a few validation pairs, the same ones every time."""
        if self.logs is None or not len(self.data.valid_keys):
            return
        self.clock.lap()
        if not self._examples:
            wanted = min(self.config.log.pictures, len(self.data.valid_keys))
            places = np.linspace(0, len(self.data.valid_keys) - 1, wanted).round().astype(int)
            self._examples = [
                collate([self.data.valid[self.data.valid_keys[i]]]) for i in dict.fromkeys(places)
            ]
        with checkpoints.unchanged_rng(self.config.seed), self._autocast():
            for number, batch in enumerate(self._examples):
                ((points0, points1, scores),) = self.model.match(
                    batch.to(self.device), seed=self.config.seed
                )
                match = (points0.float().cpu(), points1.float().cpu(), scores.float().cpu())
                picture = logs.draw_matches(
                    batch, 0, match, validation.match_errors(batch, 0, match)
                )
                self.logs.picture(self.progress.step, f"pair{number}", picture)
        self.clock.pause()

    # ------------------------------------------------------------------------------------- the rest

    def _open_bar(self) -> None:
        if self._progress_wanted:
            from tqdm import tqdm

            self.bar = tqdm(
                total=self.plan.total, initial=self.progress.step, desc="training", unit="step"
            )

    def _report(self, stopped: int | None) -> TrainReport:
        self.clock.lap()
        total = self.clock.total
        return TrainReport(
            folder=self.folder,
            steps=self.progress.step,
            total=self.plan.total,
            pairs=self.progress.pairs,
            seconds=total,
            pairs_per_second=self.clock.pairs / total if total > 0 else 0.0,
            data_wait=self.clock.waited / total if total > 0 else 0.0,
            memory=logs.peak_memory(self.device),
            skipped=self.progress.skipped,
            figures=dict(self.figures),
            best=tuple(self.best.entries),
            interrupted=stopped,
        )

    def close(self) -> None:
        """Close the bar and the log."""
        if self.bar is not None:
            self.bar.close()
        if self.logs is not None:
            self.logs.close()


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    # cuBLAS needs this to be deterministic, before its first use.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings: Any = torch.utils.deterministic
    was = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # it finds mistakes, and takes time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)
        settings.fill_uninitialized_memory = filled


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def initial_file(config: TrainConfig, *, download: bool = True) -> Path | None:
    """Return the file that a training starts from: a path as it stands, a known name looked up.

    Args:
        config: with ``initial``.
        download: whether a known file that no folder has may be fetched.

    Raises:
        InputError: there is no such file, and none is known by that name.
        WeightsError: a known file cannot be had.
    """
    path = config.initial
    if path is None or path.is_file():
        return path
    if weights.find(str(path)) is None:
        raise InputError(
            f"There is no file {path} (--initial), and gim-weights list knows none of that name."
        )
    return weights.locate(str(path), download=download)


def build_from(config: TrainConfig) -> TrainingModel:
    """Return the model that the settings name."""
    return build_model(config.model, **config.model_options)


def describe(config: TrainConfig, *, data: Callable[[TrainConfig], PairData] | None = None) -> str:
    """Open the sources, look at a few pairs and tell what a run would do, without a model.

    Args:
        config: its settings.
        data: as for `train`.

    Raises:
        InputError: as `train`.
    """
    config.check()
    kind, devices, nodes = processes(config)
    world = devices * nodes
    config.check_world(world)
    model_options(config.model, config.model_options)
    if config.weights is not None and not config.weights.is_file():
        raise InputError(f"There is no file {config.weights} (--weights).")
    if config.weights is None:
        initial_file(config, download=False)
    opened = (data or open_sources)(config)
    pairs = len(opened.keys(0, 0, world))
    batches = -(-pairs // config.data.batch_size)
    plan = make_plan(config, batches=batches, world=world)
    rates = [learning_rate(config, plan, step=s, epoch=min(s // plan.steps_per_epoch,
             plan.epochs - 1)) for s in (0, plan.warmup, plan.total - 1)]  # fmt: skip
    effective = plan.accumulation * config.data.batch_size * world
    return (
        f"{world} process(es) on {kind}; {len(opened.train)} pairs to draw from, {pairs * world} "
        f"an epoch, {len(opened.valid_keys)} for validation\n"
        f"{plan.accumulation} micro-batch(es) of {config.data.batch_size} a process make an "
        f"optimiser step of {effective} pairs; {plan.steps_per_epoch} steps an epoch, "
        f"{plan.total} in all, {plan.warmup if config.optimiser.rule == 'step' else 0} of warm-up\n"
        f"learning rate {rates[0]:.3g} at first, {rates[1]:.3g} at step {plan.warmup}, "
        f"{rates[2]:.3g} at the last"
    )
