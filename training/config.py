"""The settings of a training run: dataclasses, read from YAML and written back as YAML.

A key that no setting has is refused with the nearest one that exists, a value of the wrong kind
with its place in the file. What is written can be read: ``from_mapping(to_mapping(c)) == c``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import yaml

from gim_hloc.errors import InputError, OutputError
from gim_hloc.files import write_atomic
from gim_hloc.option_values import convert
from gim_hloc.training import schedules

_T = TypeVar("_T")

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pairs, how many of them, and in which order."""

    train: tuple[dict[str, Any], ...] = ()
    """Sources to learn from: mappings with a type, from the file of --data."""
    valid: tuple[dict[str, Any], ...] = ()
    """Sources to validate on, from the same file."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Settings that all sources of a type get unless they say otherwise: {type: {name: value}}."""
    box: tuple[int, int] = (640, 640)
    """Width and height in pixels of the images that the network sees in training."""
    valid_box: tuple[int, int] | None = None
    """The same in validation; None: as in training."""
    maxlen: tuple[int, ...] = ()
    """Pairs an epoch of each source, or one number for all; must be divisible by the processes.
    Empty: as many as the largest source has."""
    resample: bool = True
    """Draw the pairs anew every epoch; else the first epoch's come again."""
    hold: bool = False
    """Hold samples in memory once they are made; every epoch then shows the first one's, augmented
    as they were. For small sets on a processor; with workers, each of them holds what it made."""
    batch_size: int = 1
    """Pairs of one process at a time; accumulation does the rest."""
    valid_batch_size: int = 2
    """Pairs at a time in validation."""
    valid_pairs: int | None = 1000
    """Pairs of each validation source, drawn once; None: all."""
    workers: int = 8
    """Processes that read and augment, for each training process; 0: none."""
    prefetch: int = 2
    """Batches that each of them holds ready."""


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """Optimiser and learning rate."""

    name: Literal["adamw", "adam"] = "adamw"
    """adam is without weight decay in its gradients unless weight_decay says so."""
    weight_decay: float = 0.01
    """Per unit of learning rate."""
    lr: float = 1e-4
    """Learning rate of the new layers; encoders get the model's factor of it."""
    min_lr: float = 1e-8
    """Learning rate at the end of the step rule."""
    rule: Literal["step", "epoch"] = "step"
    """step: warm-up, then linear to min_lr. epoch: constant, then exponential."""
    warmup_steps: int | None = None
    """Optimiser steps of the step rule's warm-up; None: one epoch."""
    warmup_start: float = 0.1
    """Fraction of lr that the warm-up begins with."""
    constant_epochs: int = 30
    """Epochs before the epoch rule starts to decay."""
    decay: float = schedules.EPOCH_DECAY
    """Factor an epoch of the epoch rule."""
    canonical_batch: int | None = None
    """Pairs that one optimiser step should see over all processes; None: no accumulation."""
    clip_norm: float = 0.5
    """Longest gradient, over all parameters together; 0: any."""
    max_bad_steps: int = 20
    """Optimiser steps in a row with a loss or gradients that are not finite before giving up."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """How a model is judged while it trains."""

    per_epoch: int = 1
    """Validations an epoch, evenly spread, the last one at its end; 0: none."""
    before: bool | None = None
    """Validate before the first step; None: if the run starts from --weights."""
    threshold: float = 0.5
    """RANSAC's threshold for the essential matrix in pixels, divided by the mean focal length."""
    confidence: float = 0.999999
    """RANSAC stops when a better pose is less likely than 1 minus this."""
    max_iterations: int = 1000
    """RANSAC's samples at most."""
    keep: int = 5
    """Best checkpoints to keep."""


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Machines and numbers formats; nothing that changes what is learnt, rounding aside."""

    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device."""
    devices: str = "auto"
    """Processes on each machine: a number, or auto for every GPU (torchrun decides by itself)."""
    nodes: int = 1
    """Machines (torchrun decides by itself)."""
    strategy: Literal["auto", "ddp"] = "auto"
    """auto: distributed data parallel where there is more than one process."""
    precision: Literal["32", "bf16"] = "32"
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


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is told and stored, and how often."""

    every: int = 30
    """Optimiser steps between two lines of the log; reading the loss makes the GPU wait."""
    save_every: int = 500
    """Optimiser steps between two states to go on from (last.ckpt); 0: only at validations."""
    pictures_every: int = 1000
    """Optimiser steps between two pictures of matches; 0: none."""
    pictures: int = 4
    """Validation pairs to draw."""
    tensorboard: bool = True
    """Write TensorBoard files beside metrics.csv where TensorBoard is installed."""


@dataclass(frozen=True, kw_only=True)
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
    epochs: int = 10
    """Passes over maxlen pairs of every source."""
    seed: int = 3407
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
        rules: list[tuple[str, Any, bool, str]] = [
            ("model", self.model, bool(self.model), "given (or use --preset)"),
            ("epochs", self.epochs, self.epochs > 0, "at least 1"),
            ("seed", self.seed, 0 <= self.seed < 2**31, "between 0 and 2**31"),
            ("data.box", data.box, min(data.box) >= 8, "at least 8 pixels a side"),
            ("data.batch_size", data.batch_size, data.batch_size > 0, "at least 1"),
            ("data.valid_batch_size", data.valid_batch_size, data.valid_batch_size > 0,
             "at least 1"),
            ("data.workers", data.workers, data.workers >= 0, "0 or more"),
            ("data.prefetch", data.prefetch, data.prefetch > 0, "at least 1"),
            ("data.maxlen", data.maxlen, all(n > 0 for n in data.maxlen), "positive"),
            ("data.defaults", data.defaults,
             all(isinstance(v, Mapping) for v in data.defaults.values()),
             "settings by type of source"),
            ("data.valid_pairs", data.valid_pairs, data.valid_pairs is None or data.valid_pairs > 0,
             "at least 1, or null for all"),
            ("optimiser.lr", optimiser.lr, 0 < optimiser.lr < math.inf, "positive"),
            ("optimiser.weight_decay", optimiser.weight_decay,
             0 <= optimiser.weight_decay < math.inf, "0 or more"),
            ("optimiser.warmup_start", optimiser.warmup_start, 0 <= optimiser.warmup_start <= 1,
             "between 0 and 1"),
            ("optimiser.constant_epochs", optimiser.constant_epochs,
             optimiser.constant_epochs >= 0, "0 or more"),
            ("optimiser.decay", optimiser.decay, 0 < optimiser.decay <= 1,
             "above 0 and at most 1"),
            ("optimiser.min_lr", optimiser.min_lr, 0 <= optimiser.min_lr <= optimiser.lr,
             "between 0 and lr"),
            ("optimiser.warmup_steps", optimiser.warmup_steps,
             optimiser.warmup_steps is None or optimiser.warmup_steps >= 0, "0 or more"),
            ("optimiser.canonical_batch", optimiser.canonical_batch,
             optimiser.canonical_batch is None or optimiser.canonical_batch > 0, "positive"),
            ("optimiser.clip_norm", optimiser.clip_norm, optimiser.clip_norm >= 0, "0 or more"),
            ("optimiser.max_bad_steps", optimiser.max_bad_steps, optimiser.max_bad_steps > 0,
             "at least 1"),
            ("validation.per_epoch", self.validation.per_epoch, self.validation.per_epoch >= 0,
             "0 or more"),
            ("validation.threshold", self.validation.threshold,
             0 < self.validation.threshold < math.inf, "positive"),
            ("validation.confidence", self.validation.confidence,
             0 < self.validation.confidence < 1, "between 0 and 1"),
            ("validation.max_iterations", self.validation.max_iterations,
             self.validation.max_iterations > 0, "at least 1"),
            ("validation.keep", self.validation.keep, self.validation.keep > 0, "at least 1"),
            ("log.every", self.log.every, self.log.every > 0, "at least 1"),
            ("log.save_every", self.log.save_every, self.log.save_every >= 0, "0 or more"),
            ("log.pictures_every", self.log.pictures_every, self.log.pictures_every >= 0,
             "0 or more"),
            ("log.pictures", self.log.pictures, self.log.pictures >= 0, "0 or more"),
            ("runtime.nodes", self.runtime.nodes, self.runtime.nodes > 0, "at least 1"),
            ("runtime.devices", self.runtime.devices,
             self.runtime.devices == "auto"
             or (self.runtime.devices.isdigit() and int(self.runtime.devices) > 0),
             "a number or auto"),
        ]  # fmt: skip
        for name, value, good, must in rules:
            if not good:
                raise InputError(f"{name} is {value!r}; it must be {must}.")
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


def to_mapping(config: Any) -> dict[str, Any]:
    """Return a configuration as dictionaries, lists, numbers and strings."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return value


def from_mapping(
    kind: type[_T], values: Any, *, base: _T | None = None, where: str, prefix: str = ""
) -> _T:
    """Return a configuration from nested dictionaries.

    Args:
        kind: the dataclass.
        values: some of its fields; sections may name some of theirs.
        base: what the others are taken from; None: the defaults.
        where: file or flag that the values come from, for messages.
        prefix: of the keys, for messages.

    Raises:
        InputError: a key that does not exist, or a value of the wrong kind.
    """
    if not isinstance(values, Mapping):
        place = prefix.rstrip(".") or "the file"
        raise InputError(f"{where}: {place} must hold settings (name: value), not {values!r}.")
    hints = get_type_hints(kind)
    current = kind() if base is None else base
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise InputError(f"{where}: {_unknown(str(key), prefix, hints)}")
        name, hint = f"{prefix}{key}", hints[key]
        if dataclasses.is_dataclass(hint):
            changes[key] = from_mapping(
                hint,  # type: ignore[arg-type]
                {} if value is None else value,
                base=getattr(current, key),
                where=where,
                prefix=f"{name}.",
            )
        else:
            changes[key] = convert(value, hint, f"{where}: {name}")
    return dataclasses.replace(current, **changes)  # type: ignore[type-var]


def _unknown(key: str, prefix: str, hints: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
    near = f"{prefix}{close[0]}" if close else ""
    if not near:  # right name, wrong section?
        every = {full.rpartition(".")[2]: full for full in _all_keys(TrainConfig)}
        close = difflib.get_close_matches(key, every, n=1, cutoff=0.7)
        near = every[close[0]] if close else ""
    hint = f" Did you mean {near!r}?" if near else f" Settings here: {', '.join(hints)}."
    return f"there is no setting {prefix + key!r}.{hint}"


def _all_keys(kind: Any, prefix: str = "") -> Iterator[str]:
    for key, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from _all_keys(hint, f"{prefix}{key}.")
        else:
            yield prefix + key


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        InputError: the file is missing or no YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"There is no file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML: {error}") from None


def read_config(path: Path, base: TrainConfig | None = None) -> TrainConfig:
    """Return a configuration from a file that names some settings.

    Args:
        path: YAML.
        base: where the others come from.

    Raises:
        InputError: as `read_yaml` and `from_mapping`.
    """
    return from_mapping(TrainConfig, read_yaml(path) or {}, base=base, where=str(path))


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
    data = from_mapping(DataConfig, values, base=base.data, where=str(path), prefix="data.")
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
