"""The one pool of workers: items of a task, done here, by a process a device, or by Ray's actors.

Results come back to the caller, which alone writes them: a worker that dies loses what it had in
hand, and other workers do that again. Batch systems take shards of the items instead.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import signal
import sys
import textwrap
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from multiprocessing import resource_tracker
from typing import Any, Generic, Protocol, TypeVar

from gim_hloc.errors import GimError, InputError, OutputError, some
from gim_hloc.options import Where as Where

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")
_Result_co = TypeVar("_Result_co", covariant=True)

_CONTEXT: Any = multiprocessing.get_context("spawn")
_AHEAD = 2  # chunks that a worker has at a time: one in work, one waiting
_DEATHS = 2  # of workers in a row, after which a chunk is not given to another one


class Task(Protocol[Item, _Result_co]):
    """Work on items of one kind. Must be picklable: it is sent once to each worker."""

    def open(self, device: str) -> Callable[[Sequence[Item]], Iterable[tuple[Item, _Result_co]]]:
        """Load what a worker needs; returns what yields each item of a chunk with its result."""


def usable_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))  # type: ignore[attr-defined,unused-ignore]
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def shard(items: Sequence[Item], index: int, count: int) -> list[Item]:
    """Part ``index``, from 0, of ``count``; neighbours, which share images, stay together."""
    return list(items[len(items) * index // count : len(items) * (index + 1) // count])


def parse_shard(text: str) -> tuple[int, int]:
    """Read ``i/N``, the i-th of N parts, from 0.

    Raises:
        InputError: it is none.
    """
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        index, count = 0, 0
    if not 0 <= index < count:
        raise InputError(f"--shard is {text!r}; give i/N with i from 0 to N - 1, such as 0/4.")
    return index, count


def run(
    task: Task[Item, Result],
    items: Iterable[Item],
    where: Where,
    done: Callable[[Item, Result], None],
    *,
    chunk: int = 1,
) -> None:
    """Do a task; ``done`` is called in this thread, in finishing order.

    Args:
        task: the work.
        items: picklable and comparable; taken as workers become free, not before.
        where: who does it.
        done: called with each item and its result, whose arrays may be read-only.
        chunk: items that a worker is given at a time.

    Raises:
        InputError: Ray is not installed or has not room for so many workers.
        OutputError: a chunk of items killed two workers, one after the other.
        GimError: a worker raised it, or another error, which it names.
    """
    iterator = iter(items)
    chunks = iter(lambda: list(islice(iterator, chunk)), [])
    if where.engine == "ray":
        _spread(_actors(task, where), _wait_for_ray, map(_Chunk, chunks), done)
    elif where.devices:
        _spread(_processes(task, where.devices), _wait_for_processes, map(_Chunk, chunks), done)
    else:
        work = task.open(where.device)
        for part in chunks:
            for item, result in work(part):
                done(item, result)


# --------------------------------------------------------------------------------------- the caller


class _Chunk(Generic[Item]):
    """Items that one worker does."""

    def __init__(self, items: Iterable[Item]) -> None:
        self.items = list(items)  # that are not done
        self.deaths = 0  # since the last of them was done


class _DeathError(Exception):
    """A worker ended without a word."""


class _Worker(Protocol):
    """A worker as its caller sees it; starts with its first chunk, and again after its death."""

    device: str
    chunks: deque[_Chunk[Any]]  # first the one in work

    def give(self, chunk: _Chunk[Any]) -> None: ...

    def receive(self) -> Any:
        """Next message of `_Body.do`; raises _DeathError."""

    def stop(self) -> None:
        """End it at once."""


def _spread(
    workers: Sequence[_Worker],
    wait: Callable[[Any], list[Any]],
    fresh: Iterator[_Chunk[Any]],
    done: Callable[[Any, Any], None],
) -> None:
    """Keep workers busy and take what they send."""
    left: deque[_Chunk[Any]] = deque()  # by workers that died
    try:
        while True:
            _give(workers, left, fresh)
            busy = [worker for worker in workers if worker.chunks]
            if not busy:
                return
            for worker in wait(busy):
                try:
                    kind, *content = worker.receive()
                except _DeathError as death:
                    worker.stop()
                    left.extend(_left(worker, str(death)))
                    continue
                items = worker.chunks[0].items
                if kind == "result":
                    worker.chunks[0].deaths = 0
                    done(items.pop(items.index(content[0])), content[1])
                elif kind == "log":
                    logging.getLogger(content[0].name).handle(content[0])
                elif kind == "error":
                    logger.debug("A worker on %s stopped:\n%s", worker.device, content[1])
                    raise content[0]
                else:
                    worker.chunks.popleft()
    finally:
        for worker in workers:
            worker.stop()


def _give(
    workers: Sequence[_Worker], left: deque[_Chunk[Any]], fresh: Iterator[_Chunk[Any]]
) -> None:
    for depth in range(_AHEAD):
        for worker in workers:
            if len(worker.chunks) <= depth:
                chunk = left.popleft() if left else next(fresh, None)
                if chunk is None:
                    return
                worker.give(chunk)


def _left(worker: _Worker, death: str) -> list[_Chunk[Any]]:
    """What a dead worker had to do, for another one."""
    chunks = [chunk for chunk in worker.chunks if chunk.items]
    first = worker.chunks[0]
    worker.chunks.clear()
    first.deaths += 1
    if first.items and first.deaths == _DEATHS:
        raise OutputError(
            f"{_DEATHS} workers died on {some([str(item) for item in first.items])}, the last on "
            f"{worker.device} ({death}). What is finished is kept."
        )
    logger.warning("A worker on %s died (%s); others do its work.", worker.device, death)
    return chunks


# --------------------------------------------------------------------------------------- the worker


class _Body:
    """What runs in a worker."""

    def __init__(self, task: Task[Any, Any], device: str, threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # not every task needs torch, which is slow
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
        warnings.filterwarnings("ignore")
        self._task, self._device = task, device
        self._work: Callable[[Sequence[Any]], Iterable[tuple[Any, Any]]] | None = None
        self._records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        package = logging.getLogger("gim_hloc")
        package.handlers = [logging.handlers.QueueHandler(self._records)]  # type: ignore[arg-type]
        package.setLevel(logging.INFO)
        package.propagate = False

    def do(self, items: list[Any]) -> Iterator[Any]:
        """Yield results and log records as they come, and at last an error or the end."""
        end: Any = ("end",)
        try:
            if self._work is None:
                self._work = self._task.open(self._device)
            for item, result in self._work(items):
                yield from self._told()
                yield "result", item, result
        except GimError as error:
            end = ("error", error, traceback.format_exc())
        except Exception as error:
            text = f"A worker on {self._device} stopped: {type(error).__name__}: {error}"
            end = ("error", GimError(text), traceback.format_exc())
        yield from self._told()
        yield end

    def _told(self) -> Iterator[Any]:
        with contextlib.suppress(queue.Empty):
            while True:
                yield "log", self._records.get_nowait()


# ------------------------------------------------------------------------------- processes and Ray


_PUT_INTO_A_FILE = (
    "What a function, a notebook or python -c defines cannot be seen by other processes: put it "
    "into a file."
)


def _processes(task: Task[Any, Any], devices: Sequence[str]) -> list[_Process]:
    threads = _threads(len(devices))
    try:
        packed = pickle.dumps(task)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(f"The work cannot be given away ({error}). {_PUT_INTO_A_FILE}") from error
    return [_Process(packed, device, threads) for device in devices]


def _threads(workers: int) -> int:
    """Of each worker, such that all together use the cores that this process may use."""
    import torch

    return max(1, min(torch.get_num_threads(), usable_cores()) // workers)


class _Process:
    """Not forked: CUDA and the threads of PyTorch do not survive that.

    Nor forked from a server: Ctrl-C then hung now and then, where workers had just started.
    """

    def __init__(self, task: bytes, device: str, threads: int) -> None:
        self.device = device
        self.chunks: deque[_Chunk[Any]] = deque()
        self._start = (task, device, threads)
        self._process: Any = None
        self._answered = False
        self.connection: multiprocessing.connection.Connection

    def give(self, chunk: _Chunk[Any]) -> None:
        if self._process is None:
            self.connection, theirs = _CONTEXT.Pipe()
            self._process = _CONTEXT.Process(target=_serve, args=(theirs, *self._start))
            # Ctrl-C reaches all processes of a terminal: the caller alone acts on it.
            resource_tracker.ensure_running()  # which would lift the mask
            before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            try:
                self._process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()  # so that the death of the worker ends the connection
        self.chunks.append(chunk)
        with contextlib.suppress(OSError):  # it is dead, as the next `receive` tells
            self.connection.send(chunk.items)

    def receive(self) -> Any:
        try:
            message = self.connection.recv()
            self._answered = True
            return message
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            if code == 1 and not self._answered:
                raise InputError(
                    f"A worker on {self.device} failed to start; what it said stands above. It "
                    "imports the script that starts it, which must therefore be a file, and start "
                    'workers below if __name__ == "__main__":'
                ) from None
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            more = ", perhaps out of memory" if name == "SIGKILL" else ""
            raise _DeathError(name + more) from None

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self.connection.close()
            self._process = None


def _wait_for_processes(workers: Sequence[_Process]) -> list[_Process]:
    ready = multiprocessing.connection.wait([worker.connection for worker in workers])
    return [worker for worker in workers if worker.connection in ready]


def _serve(
    connection: multiprocessing.connection.Connection,
    packed: bytes,
    device: str,
    threads: int,
) -> None:
    """Body of a process."""
    try:
        task = pickle.loads(packed)
    except Exception as error:
        message = InputError(f"A worker on {device} cannot begin ({error}). {_PUT_INTO_A_FILE}")
        connection.send(("error", message, traceback.format_exc()))
        return
    chunks: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()

    def listen() -> None:  # beside the work, so that the caller never waits to be heard
        try:
            while True:
                chunks.put(connection.recv())
        except (EOFError, OSError):  # the caller was killed
            os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    body = _Body(task, device, threads)
    with contextlib.suppress(BrokenPipeError):
        while True:
            for message in body.do(chunks.get()):
                connection.send(message)


def _actors(task: Task[Any, Any], where: Where) -> list[_Actor]:
    try:
        import ray
    except ImportError:
        raise InputError('The engine ray needs Ray: pip install "gim-hloc[ray]"') from None
    if not ray.is_initialized():  # it ends with this process
        place: dict[str, Any] = (
            {"address": "auto"}
            if os.environ.get("RAY_ADDRESS")
            else {"address": "local", "num_cpus": where.workers, "include_dashboard": False}
        )
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **place)
        except Exception as error:  # of many classes: no cluster, no token, no room on the disk
            text = textwrap.shorten(str(error), 280)
            raise InputError(f"Ray does not start, or does not answer ({text}).") from None
    has = ray.cluster_resources()
    gpus = int(
        where.device.startswith("cuda") or (where.device == "auto" and has.get("GPU", 0) > 0)
    )
    for name, each in (("CPU", 1), ("GPU", gpus)):
        if each * where.workers > has.get(name, 0):
            raise InputError(
                f"{where.workers} workers want a {name} each, Ray has {has.get(name, 0):g}: give "
                "--workers that number at most, or another --device."
            )
    # Ray shows a worker the GPU that it was given and no other.
    device = "cuda" if gpus else where.device
    body = ray.remote(_Body).options(num_cpus=1, num_gpus=gpus)
    start = (ray.put(task), device, _threads(where.workers))
    return [_Actor(body, start, device) for _ in range(where.workers)]


class _Actor:
    """An actor of Ray. A dead one is not restarted by Ray but here, as processes are."""

    def __init__(self, body: Any, start: tuple[Any, ...], device: str) -> None:
        self.device = device
        self.chunks: deque[_Chunk[Any]] = deque()
        self.replies: deque[Any] = deque()  # generators of messages, one a chunk
        self._body, self._start = body, start
        self._actor: Any = None

    def give(self, chunk: _Chunk[Any]) -> None:
        if self._actor is None:
            self._actor = self._body.remote(*self._start)
        self.chunks.append(chunk)
        self.replies.append(self._actor.do.remote(chunk.items))

    def receive(self) -> Any:
        import ray

        try:
            message = ray.get(next(self.replies[0]))
        except ray.exceptions.RayError as error:
            text = str(error).strip().splitlines()[-1]  # after names and traceback
            raise _DeathError(textwrap.shorten(text, 280)) from None
        if message[0] == "end":
            self.replies.popleft()
        return message

    def stop(self) -> None:
        import ray

        if self._actor is not None:
            ray.kill(self._actor)
            self.replies.clear()
            self._actor = None


def _wait_for_ray(workers: Sequence[_Actor]) -> list[_Actor]:
    import ray

    ready, _ = ray.wait([worker.replies[0] for worker in workers])
    return [worker for worker in workers if worker.replies[0] in ready]
