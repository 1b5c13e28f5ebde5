"""``gim-train --preset NAME --out RUN --data SOURCES``: from labels and depth to weights."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from gim_hloc.cli import common
from gim_hloc.errors import GimError, InputError
from gim_hloc.options import build, to_mapping
from gim_hloc.training.config import (
    CONFIG_FILE,
    TrainConfig,
    dump,
    read_config,
    read_sources,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Arguments(TrainConfig):
    """Train a matcher, or go on with a training that was stopped.

    Settings come from --preset, then --config, then --data, then the other flags; the outcome is
    stored as RUN/config.yaml. The same command, or --out RUN alone, goes on with a run at the last
    stored state. gim-train presets lists the presets. On several GPUs or machines:
    torchrun --nproc_per_node=8 --nnodes=5 ... -m gim_hloc.cli.train --preset ... (or --devices 8 on
    one machine).
    """

    out: Path
    """Folder of the run: checkpoints, numbers, pictures."""
    preset: str | None = None
    """Named settings to start from."""
    sources: Annotated[Path | None, tyro.conf.arg(name="data", metavar="FILE")] = None
    """YAML file with lists of sources: train and valid."""
    options: Annotated[tuple[str, ...], tyro.conf.arg(name="model-options")] = ()
    """NAME=VALUE of the model's options."""
    devices: str | None = None
    """Processes on each machine, the same as --runtime.devices."""
    nodes: int | None = None
    """Machines, the same as --runtime.nodes."""
    precision: str | None = None
    """32 or bf16, the same as --runtime.precision."""
    strategy: str | None = None
    """auto or ddp, the same as --runtime.strategy."""
    dry_run: bool = False
    """Print the settings, look at the sources, tell the number of steps, and train nothing."""
    terminal: Annotated[common.Terminal, tyro.conf.OmitArgPrefixes] = field(
        default_factory=common.Terminal
    )


_SHORT = ("devices", "nodes", "precision", "strategy")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    given = list(sys.argv[1:] if argv is None else argv)
    common.answer_at_once(given, "gim-train")
    common.configure_logging()
    if given == ["presets"]:
        return common.run(_presets)
    try:
        base = _base(given)
    except GimError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    arguments: Any = common.parse(
        _Arguments,
        prog="gim-train",
        args=given,
        default=base,
        config=(tyro.conf.AvoidSubcommands,),
    )
    common.configure_logging(arguments.terminal.verbose, arguments.terminal.quiet)
    return common.run(lambda: _run(arguments))


def _presets() -> int:
    from gim_hloc.training import presets

    sys.stdout.write(presets.table() + "\n")
    return 0


def _base(given: Sequence[str]) -> Any:
    """The arguments before flags of single settings: what the files and the preset say."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--preset", "--config", "--data", "--out"):
        parser.add_argument(flag, nargs="?")
    try:
        files, _ = parser.parse_known_args(list(given))
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None
    config = TrainConfig()
    stored = Path(files.out) / CONFIG_FILE if files.out else None
    if stored is not None and stored.exists() and not (files.preset or files.config or files.data):
        config = read_config(stored)
    if files.preset:
        from gim_hloc.training import presets

        config = presets.preset(files.preset)
    if files.config:
        config = read_config(Path(files.config), config)
    if files.data:
        config = read_sources(Path(files.data), config)
    missing: Any = tyro.MISSING
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)}
    return _Arguments(**values, out=Path(files.out) if files.out else missing)


def _config(arguments: _Arguments) -> TrainConfig:
    values = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(TrainConfig)}
    mapping = to_mapping(TrainConfig(**values))
    for name in _SHORT:
        if getattr(arguments, name) is not None:
            mapping["runtime"][name] = getattr(arguments, name)
    for option in arguments.options:
        name, equals, value = option.partition("=")
        if not equals:
            raise InputError(f"--model-options {option!r} is no NAME=VALUE.")
        import yaml

        try:
            mapping["model_options"][name.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"--model-options {option!r}: the value is no YAML.") from None
    # Through the same door as a file, so that the same values are refused.
    return build(TrainConfig, mapping, where="the command line")


def _run(arguments: _Arguments) -> int:
    from gim_hloc.training.trainer import describe, train

    config = _config(arguments)
    config.check()
    if arguments.dry_run:
        sys.stdout.write(dump(config))
        sys.stdout.write(describe(config) + "\n")
        return 0
    report = train(config, arguments.out, progress=arguments.terminal.bars)
    logger.info("%s", report.summary())
    if arguments.terminal.json:
        sys.stdout.write(json.dumps(dataclasses.asdict(report), default=str) + "\n")
    if report.interrupted is not None:
        logger.info("The same command goes on from here.")
        return 128 + report.interrupted
    return 0


if __name__ == "__main__":
    sys.exit(main())
