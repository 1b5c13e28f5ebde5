"""The processes of a run: where they run, what they agree on, and when they are asked to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gim_hloc.errors import GimError, InputError
from gim_hloc.training.config import TrainConfig

if TYPE_CHECKING:
    from lightning.fabric import Fabric

STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
"""Signals after which a run stores its state and ends; SIGUSR1 is what Slurm can send early."""


_CONNECTION = ("gloo/transport", "Connection closed by peer", "Connection reset", "Broken pipe")


class PeerError(GimError):
    """Another process of the run is gone."""

    exit_code = 6


@contextlib.contextmanager
def lost_peers_are_named(last: Path) -> Iterator[None]:
    """Turn the failure of a collective operation into one message.

    Whichever operation comes first after another process died finds it out, most often the mean of
    gradients, and what gloo and NCCL raise then is a plain RuntimeError of their sockets.

    Args:
        last: state that the run goes on from.

    Raises:
        PeerError: a connection to another process ended.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, torch.distributed.DistError) and not any(
            word in text for word in _CONNECTION
        ):
            raise
        state = f"the state in {last}" if last.exists() else "the start: no state was stored yet"
        raise PeerError(
            "Another process of this run has ended, on this machine or another one; what it wrote "
            "last says why. The same command on all machines goes on from "
            f"{state}. ({text.splitlines()[0]})"
        ) from None


def _under_torchrun() -> bool:
    return {"LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= os.environ.keys()


def processes(config: TrainConfig) -> tuple[str, int, int]:
    """Return kind of device, processes on each machine, and machines that a run has here."""
    runtime = config.runtime
    kind: str = runtime.accelerator
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("runtime.accelerator is 'cuda', but PyTorch finds no CUDA device here.")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise InputError("runtime.accelerator is 'mps', but PyTorch finds no such device here.")
    if _under_torchrun():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return kind, local, int(os.environ["WORLD_SIZE"]) // local
    if runtime.devices != "auto":
        return kind, int(runtime.devices), runtime.nodes
    return kind, torch.cuda.device_count() if kind == "cuda" else 1, runtime.nodes


def make_fabric(config: TrainConfig) -> Fabric:
    """Return Fabric for the machines that a run has.

    Numbers formats are not Fabric's business here: its mixed precision would round the float64
    matrices of a batch.
    """
    try:
        from lightning.fabric import Fabric
        from lightning.fabric.strategies import DDPStrategy
    except ImportError:
        raise InputError("Training needs Lightning: pip install gim-hloc[train]") from None
    kind, devices, nodes = processes(config)
    strategy: Any = "auto"
    if devices * nodes > 1 or config.runtime.strategy == "ddp":
        # With synchronised statistics all processes have the same; else those of process 0 are
        # taken over by the others before every synchronised step, which is the default.
        synchronised: dict[str, Any] = (
            {"broadcast_buffers": False} if synchronises(config, kind) else {}
        )
        strategy = DDPStrategy(
            find_unused_parameters=False, gradient_as_bucket_view=True, **synchronised
        )
    return Fabric(accelerator=kind, devices=devices, num_nodes=nodes, strategy=strategy)


def synchronises(config: TrainConfig, kind: str) -> bool:
    """Tell whether batch normalisations average over all processes."""
    return config.runtime.sync_batchnorm and kind == "cuda"


class Signals:
    """Notes a request to stop; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for name in STOP_SIGNALS:
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Together:
    """Small things that all processes must agree on, over the processors: no GPU waits for it."""

    def __init__(self, fabric: Fabric) -> None:
        self.world = fabric.world_size
        self._group: Any = None
        self._pending: tuple[Any, torch.Tensor] | None = None
        if self.world > 1:
            self._group = torch.distributed.new_group(backend="gloo")

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values

    def ask(self, value: int) -> None:
        """Begin to find the largest of all processes' numbers, while the step runs."""
        flag = torch.tensor([value])
        work = None
        if self.world > 1:
            work = torch.distributed.all_reduce(
                flag, op=torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
            )
        self._pending = (work, flag)

    def answer(self) -> int:
        """Return what `ask` found; 0 if nothing was asked."""
        if self._pending is None:
            return 0
        work, flag = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        return int(flag)
