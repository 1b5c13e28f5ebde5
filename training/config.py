"""The settings of a training run: dataclasses, read from YAML and written back as YAML.

A key that no setting has is refused with the nearest one that exists, a value of the wrong kind
with its place in the file. What is written can be read: ``build(TrainConfig, to_mapping(c)) == c``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field

from gim_hloc.errors import InputError, OutputError
from gim_hloc.files import write_atomic
from gim_hloc.options import (
    Count,
    CountOrNone,
    NotNegative,
    Positive,
    Share,
    build,
    options,
    read_yaml,
    to_mapping,
)
from gim_hloc.training import schedules

CONFIG_FILE = "config.yaml"

Side = Annotated[int, Field(ge=8)]  # pixels


def _devices(value: str) -> str:
    if value != "auto" and not (value.isdigit() and int(value) > 0):
        raise ValueError(f"runtime.devices is {value!r}; it must be a number or auto.")
    return value


@options(section="data")
class DataConfig:
    """Which pairs, how many of them, and in which order."""

    train: tuple[dict[str, Any], ...] = ()
    """Sources to learn from: mappings with a type, from the file of --data."""
    valid: tuple[dict[str, Any], ...] = ()
    """Sources to validate on, from the same file."""
    defaults: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings that all sources of a type get unless they say otherwise: {type: {name: value}}."""
    box: tuple[Side, Side] = (640, 640)
    """Width and height in pixels of the images that the network sees in training."""
    valid_box: tuple[Side, Side] | None = None
    """The same in validation; None: as in training."""
    maxlen: tuple[Count, ...] = ()
    """Pairs an epoch of each source, or one number for all; must be divisible by the processes.
    Empty: as many as the largest source has."""
    resample: bool = True
    """Draw the pairs anew every epoch; else the first epoch's come again."""
    hold: bool = False
    """Hold samples in memory once they are made; every epoch then shows the first one's, augmented
    as they were. For small sets on a processor; with workers, each of them holds what it made."""
    batch_size: Count = 1
    """Pairs of one process at a time; accumulation does the rest."""
    valid_batch_size: Count = 2
    """Pairs at a time in validation."""
    valid_pairs: Count | None = 1000
    """Pairs of each validation source, drawn once; None: all."""
    workers: CountOrNone = 8
    """Processes that read and augment, for each training process; 0: none."""
    prefetch: Count = 2
    """Batches that each of them holds ready."""


@options(section="optimiser")
class OptimiserConfig:
    """Optimiser and learning rate."""

    name: Literal["adamw", "adam"] = "adamw"
    """adam is without weight decay in its gradients unless weight_decay says so."""
    weight_decay: NotNegative = 0.01
    """Per unit of learning rate."""
    lr: Positive = 1e-4
    """Learning rate of the new layers; encoders get the model's factor of it."""
    min_lr: NotNegative = 1e-8
    """Learning rate at the end of the step rule."""
    rule: Literal["step", "epoch"] = "step"
    """step: warm-up, then linear to min_lr. epoch: constant, then exponential."""
    warmup_steps: CountOrNone | None = None
    """Optimiser steps of the step rule's warm-up; None: one epoch."""
    warmup_start: Share = 0.1
    """Fraction of lr that the warm-up begins with."""
    constant_epochs: CountOrNone = 30
    """Epochs before the epoch rule starts to decay."""
    decay: Annotated[float, Field(gt=0, le=1)] = schedules.EPOCH_DECAY
    """Factor an epoch of the epoch rule."""
    canonical_batch: Count | None = None
    """Pairs that one optimiser step should see over all processes; None: no accumulation."""
    clip_norm: NotNegative = 0.5
    """Longest gradient, over all parameters together; 0: any."""
    max_bad_steps: Count = 20
    """Optimiser steps in a row with a loss or gradients that are not finite before giving up."""


@options(section="validation")
class ValidationConfig:
    """How a model is judged while it trains."""

    per_epoch: CountOrNone = 1
    """Validations an epoch, evenly spread, the last one at its end; 0: none."""
    before: bool | None = None
    """Validate before the first step; None: if the run starts from --weights."""
    threshold: Positive = 0.5
    """RANSAC's threshold for the essential matrix in pixels, divided by the mean focal length."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.999999
    """RANSAC stops when a better pose is less likely than 1 minus this."""
    max_iterations: Count = 1000
    """RANSAC's samples at most."""
    keep: Count = 5
    """Best checkpoints to keep."""


@options(section="runtime")
class RuntimeConfig:
    """Machines and numbers formats; nothing that changes what is learnt, rounding aside."""

    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device."""
    devices: Annotated[str, AfterValidator(_devices)] = "auto"
    """Processes on each machine: a number, or auto for every GPU (torchrun decides by itself)."""
    nodes: Count = 1
    """Machines (torchrun decides by itself)."""
    strategy: Literal["auto", "ddp"] = "auto"
    """auto: distributed data parallel where there is more than one process."""
    precision: Annotated[Literal["32", "bf16"], BeforeValidator(str)] = "32"
    """bf16: mixed precision, weights stay float32."""
    tf32: bool = False
    """Let matrix products and convolutions of float32 run on TensorFloat-32 units."""
    compile: bool = False
    """torch.compile the model; minutes at the start."""
    channels_last: bool = True
    """Lay images and convolution weights out as GPUs like them; on CUDA only."""
    sync_batchnorm: bool = True
    """Normalise over the batches of all processes; on CUDA only, and with more than one."""
    deterministic: bool = False
    """Only deterministic kernels on GPUs too: slower, and the same numbers every time."""


@options(section="log")
class LogConfig:
    """What is told and stored, and how often."""

    every: Count = 30
    """Optimiser steps between two lines of the log; reading the loss makes the GPU wait."""
    save_every: CountOrNone = 500
    """Optimiser steps between two states to go on from (last.ckpt); 0: only at validations."""
    pictures_every: CountOrNone = 1000
    """Optimiser steps between two pictures of matches; 0: none."""
    pictures: CountOrNone = 4
    """Validation pairs to draw."""
    tensorboard: bool = True
    """Write TensorBoard files beside metrics.csv where TensorBoard is installed."""


@options
class TrainConfig:
    """Everything about a run but its folder."""

    model: str = ""
    """Matcher to train; gim-train presets lists them."""
    model_options: dict[str, Any] = field(default_factory=dict)
    """Options of the model, as in the file: {name: value}."""
    initial: Path | None = None
    """What the training starts from by the recipe (an ImageNet encoder, LightGlue, ...): a file, or
    a name of gim-weights list."""
    weights: Path | None = None
    """Trained weights of this model, or a checkpoint of an earlier run, to go on learning from."""
    epochs: Count = 10
    """Passes over maxlen pairs of every source."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 3407
    """Of the first epoch's sampling, the weights and everything else that is drawn."""
    data: DataConfig = field(default_factory=DataConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def check(self) -> None:
        """Refuse values that make no run.

        Raises:
            InputError: names the setting and what it must be.
        """
        data, optimiser = self.data, self.optimiser
        if not self.model:
            raise InputError("model is ''; it must be given (or use --preset).")
        if optimiser.min_lr > optimiser.lr:
            raise InputError(
                f"optimiser.min_lr is {optimiser.min_lr!r}; it must be at most optimiser.lr, "
                f"{optimiser.lr!r}."
            )
        if len(data.maxlen) > 1 and len(data.maxlen) != len(data.train):
            raise InputError(
                f"data.maxlen has {len(data.maxlen)} numbers for {len(data.train)} training "
                "source(s); give one for all, or one for each."
            )

    def check_world(self, world: int) -> None:
        """Refuse numbers of pairs that do not split evenly over the processes.

        Args:
            world: processes.

        Raises:
            InputError: names the nearest numbers that do.
        """
        for count in self.data.maxlen:
            if count % world:
                near = " or ".join(map(str, schedules.nearest_multiples(count, world)))
                raise InputError(
                    f"data.maxlen {count} is not divisible by {world} processes; take {near}."
                )


# --------------------------------------------------------------------------------- to and from YAML


def read_config(path: Path, base: TrainConfig | None = None) -> TrainConfig:
    """Return a configuration from a file that names some settings.

    Args:
        path: YAML.
        base: where the others come from.

    Raises:
        InputError: as `read_yaml` and `build`.
    """
    return build(TrainConfig, read_yaml(path) or {}, base=base, where=str(path))


def read_sources(path: Path, base: TrainConfig) -> TrainConfig:
    """Return a configuration with the sources of a file: ``train: [...]`` and ``valid: [...]``.

    Paths in it are as written: absolute, or from the folder where the command runs.

    Args:
        path: YAML.
        base: everything else.

    Raises:
        InputError: as `read_yaml`; no ``train`` list; a source that is no mapping with a type.
    """
    values = read_yaml(path)
    if not isinstance(values, Mapping) or not values.get("train"):
        raise InputError(f"{path} must hold a list 'train' of sources, and may hold one 'valid'.")
    for key, sources in values.items():
        if key not in ("train", "valid"):
            raise InputError(f"{path}: there is no list {key!r}; lists: 'train', 'valid'.")
        for source in sources if isinstance(sources, list) else [sources]:
            if not isinstance(source, Mapping) or "type" not in source:
                raise InputError(
                    f"{path}: an entry of {key!r} is {source!r}; it must be a mapping with a type."
                )
    data = build(DataConfig, values, base=base.data, where=str(path), prefix="data.")
    return dataclasses.replace(base, data=data)


def dump(config: TrainConfig) -> str:
    """Return a configuration as YAML."""
    return yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True, width=100)


# Settings that may change when a run goes on: they change nothing that is learnt, rounding aside.
_FREE = ("log.", "data.workers", "data.prefetch", "runtime.")
_FIXED = ("runtime.precision", "runtime.sync_batchnorm")


def differences(before: TrainConfig, now: TrainConfig) -> list[str]:
    """Return the settings that must not change when a run goes on and did: ``name: old -> new``."""
    old, new = dict(_flat(to_mapping(before))), dict(_flat(to_mapping(now)))
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in dict.fromkeys((*old, *new))
        if old.get(key) != new.get(key) and (key in _FIXED or not key.startswith(_FREE))
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def write_config(config: TrainConfig, folder: Path, *, begun: bool = True) -> Path:
    """Store a run's configuration in its folder.

    Args:
        config: the settings.
        folder: of the run.
        begun: there is a state to go on from. Without one, as after a first try that ended with a
            message about a source, nothing was learnt with the settings that stand there.

    Raises:
        OutputError: the folder holds a run with other settings, or cannot be written.
    """
    path = folder / CONFIG_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if begun and path.exists():
            changed = differences(read_config(path), config)
            if changed:
                raise OutputError(
                    f"{folder} holds a run with other settings ({'; '.join(changed)}). Go on with "
                    "its own (--out alone is enough), or choose another folder and start from its "
                    "weights (--weights FOLDER/checkpoints/last.ckpt)."
                )
        write_atomic(path, dump(config))
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error}") from None
    return path
