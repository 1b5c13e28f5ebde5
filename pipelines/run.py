"""The folder of a run: who works in it, which files runs made there, and which steps are done.

A step is done when its key (a digest of all that it depends on) is the one it was done for and its
files are as it left them. It makes them in a hidden folder; they take their places once all are
there, and only then do those of an earlier run go. ``run.yaml`` lists every file that runs made:
nothing else is ever replaced or removed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from tqdm import tqdm

from gim_hloc import __version__, images
from gim_hloc.clock import timed
from gim_hloc.errors import GimError, InputError, OutputError, some
from gim_hloc.files import write_atomic
from gim_hloc.images import ImageRecord, ImageSet
from gim_hloc.lock import FolderLock
from gim_hloc.options import RunOptions, StepOptions, TuningOptions
from gim_hloc.workers import parse_shard, shard

logger = logging.getLogger(__name__)

STATE = "run.yaml"
HIDDEN = ".run"  # folder of what no user needs: copies, staged files, parts of array jobs
SNAPSHOTS = f"{HIDDEN}/snapshots"  # the mapper writes there if the folder exists: gim-view makes it
_RENAMED = {"readings.h5": "raw_matches.h5"}  # files of 0.1
_GONE = ("turns.json",)  # of 0.1; now in run.yaml
MODEL_FILES = [f"{part}.bin" for part in ("cameras", "images", "points3D", "rigs", "frames")]
_EXPORTS_01 = {
    "txt": [f"{part}.txt" for part in ("cameras", "images", "points3D", "rigs", "frames")],
    "nvm": ["model.nvm"],
    "bundler": ["bundle.out", "list.txt"],
    "nerfstudio": ["transforms.json", "sparse_pc.ply"],
    "3dgs": ["3dgs/**/*"],
}
_INDEX = f"{HIDDEN}/images.json"
# Of run.yaml; the rest is what the last run was told.
_OWN = ("gim_hloc", "command", "timings", "steps", "pending", "files", "checksum", "stages")
_HOW_IT_RUNS = {
    field.name for kind in (RunOptions, TuningOptions, StepOptions) for field in fields(kind)
}
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Of what UTF-8 cannot hold (paths need not be text), YAML gets an escaped form."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_str(text.encode("utf-8", "backslashreplace").decode()),
)


class _Log(logging.FileHandler):
    """A log that says nothing of itself: work goes on where a disk is full."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Step:
    """A part of a run.

    Attributes:
        name: in ``--from``, ``--stop-after``, timings and the log.
        run: does what is not done yet; returns the steps of another pass, to go through before the
            next step, where what it found asks for one.
    """

    name: str
    run: Callable[[], Sequence[Step] | None]


@dataclass(frozen=True)
class Part:
    """The part of a step that one job of an array does; ``index`` is from 0."""

    step: str
    index: int
    count: int

    @property
    def name(self) -> str:
        """Of its lock, its log and its caches."""
        return f"{self.step}-{self.index}-of-{self.count}"


def part_of(step: str | None, of: str | None) -> Part | None:
    """What --step and --shard ask for; ``InputError`` for one without the other."""
    if step is None and of is None:
        return None
    if step is None:
        raise InputError("--shard needs --step: the step that the array of jobs is for.")
    return Part(step, *(parse_shard(of) if of is not None else (0, 1)))


@dataclass
class Made:
    """What a step makes.

    Attributes:
        path: an empty folder that stands for the folder of the run.
        facts: JSON-able; kept with the step and given back when it is reused.
        whole: False where something was left out that another attempt may bring; the step then
            counts as not done.
    """

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)
    whole: bool = True


class RunFolder:
    """OUTPUT of a command; a context manager that holds it for one run.

    Args:
        path: made if missing.
        command: that works here; an output of another command is refused.
        makes: patterns (``*``, ``**``) of the names of the files that steps will make.
        writes: names of files that are written in place.
        overwrite: forget what was done. Files stay until others take their places.
        part: of an array job, which shares the folder with the other parts and
            writes no state.

    Raises:
        OutputError: it cannot be used, is another command's, or files are in the way.
        LockedError: on entering; another run works there.
    """

    def __init__(
        self,
        path: Path,
        command: str,
        *,
        makes: Sequence[str] = (),
        writes: Sequence[str] = (),
        overwrite: bool = False,
        part: Part | None = None,
    ) -> None:
        self.path, self.command, self.part = path, command, part
        self.makes, self.writes, self.overwrite = makes, ["log.txt", *writes], overwrite
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file; give a folder for the output.")
        self.about: Mapping[str, Any] = {}  # settings, for run.yaml; replaced, never changed
        self._written: tuple[Mapping[str, Any], str] = ({}, "")  # and what stands there
        self.timings: dict[str, float] = {}  # of this run, and of earlier ones that it goes on with
        self.earlier: dict[str, float] = {}  # of them, of the latter
        self.notes: list[str] = []
        self._exit = contextlib.ExitStack()
        self._read()
        self.claim(*self.makes, *self.writes)

    def _read(self, *, tell: bool = True) -> None:
        state = read_state(self.path, tell=tell)
        if state is None:
            if os.path.lexists(self.path / STATE):
                raise OutputError(
                    f"{self.path / STATE} is damaged or none of gim-hloc's, so it does not say "
                    "what runs made here. Choose another output folder, or move that away with "
                    "all that is to be kept."
                )
            state = {}
        theirs = state.get("command", self.command)
        if theirs != self.command:
            raise OutputError(
                f"{self.path} is the output of gim-{theirs}: choose another output folder for gim-"
                f"{self.command}."
            )
        self._last = state
        self.steps: dict[str, dict[str, Any]] = state.get("steps", {})
        self.files: dict[str, Any] = state.get("files", {})  # name -> [bytes, CRC] or None
        self.pending: dict[str, Any] | None = state.get("pending")
        if not self.about:
            self.about = {name: value for name, value in state.items() if name not in _OWN}

    def __enter__(self) -> RunFolder:
        self._exit.enter_context(FolderLock(self.path, self.part.name if self.part else "run"))
        with contextlib.ExitStack() as undo:
            undo.push(self._exit)
            self._read(tell=False)  # another run may have ended meanwhile
            if self.part is None:
                self._begin()
            self._exit.enter_context(self._log())
            undo.pop_all()
        return self

    def _begin(self) -> None:
        """Finish what a killed run was about to, and claim what this one writes."""
        for old, new in _RENAMED.items():
            self.rename(old, new)
        self._place()
        self.claim(*self.makes)
        self.own(*self.writes)
        if self.overwrite:
            for entry in self.steps.values():
                entry["key"] = None
        elif _decisive(self._last) == _decisive(yaml.load(_yaml(self.about), Loader=_LOADER)):
            self.earlier = dict(self._last.get("timings") or {})
            for name, seconds in self.earlier.items():
                self.timings[name] = self.timings.get(name, 0.0) + seconds
        self.remove(_GONE)
        self.save()

    def __exit__(self, *_: object) -> None:
        self.overwrite = False  # forgotten once
        self._exit.close()

    # ------------------------------------------------------------------------------------- files

    def claim(self, *patterns: str) -> None:
        """Refuse, before the work, files in the way that no run made.

        Args:
            patterns: names that the run will write, relative, with ``*`` and ``**``.

        Raises:
            OutputError: names what is in the way.
        """
        found = {
            str(PurePosixPath(path.relative_to(self.path)))
            for pattern in patterns
            for path in self.path.glob(pattern)
            if path.is_symlink() or not path.is_dir() or not pattern.endswith("*")
        }
        parents = {str(p) for pattern in patterns for p in PurePosixPath(pattern).parents}
        found |= {
            str(PurePosixPath(path.relative_to(self.path)))
            for parent in parents - {"."}
            for path in self.path.glob(parent)
            if not path.is_dir()
        }
        self._refuse(sorted(found - self.files.keys() - self._moved()))

    def _moved(self) -> set[str]:
        """Pending files that have left the staging folder: those in their places are ours."""
        if self.pending is None:
            return set()
        staged = self.path / HIDDEN / f"{self.pending['step']}.new"
        return {name for name in self.pending["files"] if not os.path.lexists(staged / name)}

    def own(self, *names: str) -> None:
        """Claim files that are written in place by their own means."""
        self.claim(*names)
        self.files.update((name, self.files.get(name)) for name in names)

    def _refuse(self, foreign: Sequence[str]) -> None:
        if foreign:
            raise OutputError(
                f"{self.path} holds {some(foreign)}, which no run made and which would be "
                "replaced: choose another output folder, or move that away."
            )

    def remove(self, names: Iterable[str]) -> None:
        """Remove files that runs made, and the folders that this leaves empty."""
        for name in names:
            if self.files.pop(name, False) is False:
                continue
            target = self.path / name
            with contextlib.suppress(FileNotFoundError):
                target.unlink()
            for folder in target.parents:
                if folder == self.path or self.path not in folder.parents:
                    break
                with contextlib.suppress(OSError):  # not empty, or gone
                    folder.rmdir()

    def parts(self) -> list[Path]:
        """Folders of what parts of array jobs left."""
        return sorted(p for p in (self.path / HIDDEN).glob("*-of-*") if p.is_dir())

    def share(self, items: Sequence[Any]) -> list[Any]:
        """The items that this process is to do: all, or those of its part of an array job."""
        part = self.part
        return list(items) if part is None else shard(items, part.index, part.count)

    def cache_file(self, name: str) -> Path:
        """Cache of a file; parts of array jobs have their own, which no other machine writes."""
        name = f"{Path(name).stem}.cache"
        return self.path / name if self.part is None else self.hidden(f"{self.part.name}/{name}")

    def rename(self, old: str, new: str) -> None:
        """Give a file that runs of earlier versions made its name of today."""
        if self.files.pop(old, False) is False or not (self.path / old).is_file():
            return
        if not (self.path / new).exists():
            os.replace(self.path / old, self.path / new)
            self.files[new] = None

    def hidden(self, name: str) -> Path:
        """A path below the hidden folder, whose parent is there."""
        path = self.path / HIDDEN / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    # ------------------------------------------------------------------------------------- steps

    def facts(self, step: str, key: str) -> dict[str, Any] | None:
        """What a step kept, if it is done for ``key`` and its files are whole; else None."""
        entry = self.steps.get(step)
        if entry is None or entry.get("key") != key:
            return None
        for name in entry["files"]:
            size, crc = self.files.get(name) or (None, None)
            path = self.path / name  # a link that leads nowhere is as good as gone
            if (
                size is None
                or not path.exists()
                or _fingerprint(path, crc is not None) != [size, crc]
            ):
                logger.warning(
                    "%s is missing or changed since it was made; it is made again.", path
                )
                return None
        facts: dict[str, Any] = entry["facts"]
        return facts

    @contextlib.contextmanager
    def making(self, step: str, key: str, *, large: bool = False) -> Iterator[Made]:
        """Make the files of a step aside; at the end they take their places.

        Args:
            step: of which the files of an earlier run are replaced or removed.
            key: what it is done for.
            large: files are later known by their sizes alone.

        Raises:
            OutputError: a file that no run made stands where one of them belongs.
        """
        made = Made(self.hidden(f"{step}.new"))
        shutil.rmtree(made.path, ignore_errors=True)
        made.path.mkdir()
        try:
            yield made
        except OSError as error:
            shutil.rmtree(made.path, ignore_errors=True)
            where = made.path if error.filename is None else os.fsdecode(error.filename)
            raise OutputError(
                f"{where} cannot be used: {error.strerror or error}. What was finished is kept: "
                "repeat the command."
            ) from None
        except BaseException:
            shutil.rmtree(made.path, ignore_errors=True)
            raise
        paths = (p for p in sorted(made.path.rglob("*")) if p.is_symlink() or not p.is_dir())
        files = {
            str(PurePosixPath(p.relative_to(made.path))): _fingerprint(p, not large) for p in paths
        }
        self.pending = {
            "step": step,
            "key": key if made.whole else None,
            "files": files,
            "facts": json.loads(json.dumps(made.facts, default=lambda number: number.item())),
        }
        made.facts = self.pending["facts"]
        self._place()

    def _place(self) -> None:
        """Move files that are pending to their places."""
        if self.pending is None:
            return
        step, files = self.pending["step"], self.pending["files"]
        self._refuse(
            [
                name
                for name in files.keys() - self.files.keys() - self._moved()
                if os.path.lexists(self.path / name)
            ]
        )
        self.save()  # before files are moved: a kill in between is made good by the next run
        staged = self.path / HIDDEN / f"{step}.new"
        self._move(staged, files)
        self.files.update(files)
        before = self.steps.get(step, {}).get("files", [])
        self.steps[step] = {
            "key": self.pending["key"],
            "files": list(files),
            "facts": self.pending["facts"],
        }
        used = {name for entry in self.steps.values() for name in entry["files"]}
        self.remove(name for name in before if name not in used)
        self.pending = None
        self.save()
        shutil.rmtree(staged, ignore_errors=True)

    def _move(self, staged: Path, names: Iterable[str]) -> None:
        try:
            for folder in (p for p in staged.rglob("*") if p.is_dir() and not p.is_symlink()):
                (self.path / folder.relative_to(staged)).mkdir(parents=True, exist_ok=True)
            for name in names:
                if os.path.lexists(staged / name):
                    os.replace(staged / name, self.path / name)
        except OSError as error:
            raise OutputError(
                f"{os.fsdecode(error.filename2 or error.filename)} cannot be put in its place: "
                f"{error.strerror}. It is kept in {staged}: repeat the command."
            ) from None

    def drop(self, *steps: str) -> None:
        """Forget steps and remove their files."""
        for step in steps:
            if self.pending is not None and self.pending["step"] == step:  # it found no place
                self.pending = None
                shutil.rmtree(self.path / HIDDEN / f"{step}.new", ignore_errors=True)
            entry = self.steps.pop(step, None)
            used = {name for other in self.steps.values() for name in other["files"]}
            self.remove([name for name in (entry or {}).get("files", []) if name not in used])

    def go(
        self, steps: Sequence[Step], *, again: str | None = None, until: str | None = None
    ) -> None:
        """Go through steps; what is known after each is on disk when it ends.

        Args:
            steps: in order.
            again: this step and those after it are done again.
            until: the last step to be done.
        """
        names = [step.name for step in steps]
        for asked in (again, until):
            if asked is not None and asked not in names:
                raise InputError(
                    f"There is no step {asked!r} in this run; there are {', '.join(names)}."
                )
        redone = names[names.index(again) :] if again else []
        for name in redone:
            self.timings[name] = self.timings.get(name, 0.0) - self.earlier.pop(name, 0.0)
        for name, entry in self.steps.items():
            if name.split()[0] in redone:  # "export ply" is of export
                entry["key"] = None
        ahead = deque(steps)
        while ahead:
            step = ahead.popleft()
            with timed(self.timings, step.name):
                more = list(step.run() or ())
            self.save()
            ahead.extendleft(reversed(more))
            if step.name == until and until not in (s.name for s in ahead):
                return

    def save(self) -> None:
        """Write run.yaml and its copy."""
        if self.part is not None:
            return
        if self._written[0] is not self.about:  # the longest part, and always the same
            about = {"gim_hloc": __version__, "command": self.command, **self.about}
            self._written = self.about, _yaml(about)
        timings = {name: round(seconds, 3) for name, seconds in self.timings.items()}
        state = {
            "steps": self.steps,
            "pending": self.pending,
            "files": {STATE: None, **self.files},
        }
        text = _yaml(state)
        text = (
            f"{self._written[1]}{_yaml({'timings': timings})}{text}"
            f"checksum: {zlib.crc32(text.encode())}\n"
        )
        try:
            write_atomic(self.path / STATE, text)
            write_atomic(self.hidden(STATE), text)
        except OSError as error:
            raise OutputError(
                f"Cannot write {self.path / STATE}: {error.strerror or error}. What was finished "
                "is kept; make room and repeat the command."
            ) from None

    # ------------------------------------------------------------------------ what is said of it

    def note(self, sentence: str) -> None:
        """Say something to the user now and in the report."""
        logger.warning("%s", sentence)
        self.notes.append(sentence)

    @contextlib.contextmanager
    def _log(self) -> Iterator[None]:
        """Write everything, single pairs included, to log.txt, or to the log of the part."""
        path = self.path / "log.txt" if self.part is None else self.hidden(f"{self.part.name}.log")
        mode = "w" if self.overwrite else "a"
        handler = _Log(path, mode, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        package = logging.getLogger("gim_hloc")
        level = package.level
        package.addHandler(handler)
        package.setLevel(logging.DEBUG)
        logger.debug("run started: process %d, %s", os.getpid(), " ".join(sys.argv))
        try:
            yield
        except GimError as error:
            logger.debug("run stopped: %s", error)
            raise
        finally:
            package.removeHandler(handler)
            package.setLevel(level)
            handler.close()


def scanned(output: Path) -> dict[str, ImageRecord]:
    """Images by name as an earlier run in the folder found them."""
    path = output / _INDEX
    try:
        stored = json.loads(path.read_bytes())
        listed = stored["images"]
        return images.from_json(listed) if stored["checksum"] == _crc(listed) else {}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise OutputError(f"Cannot read {path}: {error.strerror or error}.") from None
    except (ValueError, KeyError, TypeError, RecursionError):  # damaged: looked at anew
        return {}


def keep_scan(folder: RunFolder, image_set: ImageSet) -> None:
    """Keep what was found of the images, so that the next run need not decode them."""
    listed = images.to_json(image_set)
    stored = {"checksum": _crc(listed), "images": listed}
    write_atomic(folder.hidden(Path(_INDEX).name), json.dumps(stored))


def _crc(value: Any) -> int:
    return zlib.crc32(json.dumps(value).encode())


def refuse_other_images(image_set: ImageSet, output: Path, *, overwrite: bool) -> None:
    """Refuse a folder that was made of other images altogether."""
    before = {record.sha256 for record in scanned(output).values()}
    if before and not overwrite and before.isdisjoint(record.sha256 for record in image_set):
        raise OutputError(
            f"{output} was made of other images: none of those in {image_set.root}. Choose another "
            "output folder, or --overwrite to replace what it holds."
        )


def progress_bar(total: int | None, title: str, unit: str, *, done: int = 0, show: bool) -> Any:
    """A bar on the terminal."""
    return tqdm(
        total=total,
        initial=done,
        desc=f"{title:<8}",
        unit=f" {unit}",
        disable=not show,
        dynamic_ncols=True,
        leave=True,
    )


def _fingerprint(path: Path, checksum: bool) -> list[int | None]:
    """Bytes and CRC of a file; of a link, those of its target's name."""
    try:
        if path.is_symlink():
            name = os.fsencode(os.readlink(path))
            return [len(name), zlib.crc32(name)]
        if not checksum:
            return [path.stat().st_size, None]
        crc = size = 0
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                if size == 0 and block.startswith(b"SQLite format 3"):
                    # Without what every program that opens it writes: counters, and its version.
                    block = block[:24] + block[28:92] + block[100:]
                crc, size = zlib.crc32(block, crc), size + len(block)
        return [size, crc]
    except FileNotFoundError:
        return [None, None]
    except OSError as error:
        raise OutputError(f"Cannot read {path}: {error.strerror or error}.") from None


# ------------------------------------------------------------------------------------------- state


def _decisive(about: Mapping[str, Any]) -> dict[str, Any]:
    """What says in run.yaml that two runs are parts of one: not who works, nor how far."""
    inputs = ("images", "queries", "map", "matcher", "weights")
    options = {k: v for k, v in about.get("options", {}).items() if k not in _HOW_IT_RUNS}
    return {**{name: about.get(name) for name in inputs}, "options": options}


def read_state(folder: Path, *, tell: bool = True) -> dict[str, Any] | None:
    """What runs before left in run.yaml, or in its copy where that is damaged; else None.

    Raises:
        OutputError: it is there and cannot be read.
    """
    path, copy = folder / STATE, folder / HIDDEN / STATE
    state = _parsed(path)
    if state is None and (state := _parsed(copy)) is not None and tell:
        logger.warning("%s is damaged; its copy %s is used.", path, copy)
    return state


def _parsed(path: Path) -> dict[str, Any] | None:
    """The state in a file, or None where it is missing, damaged or none of ours."""
    try:
        data = path.read_bytes()
        state = yaml.load(data, Loader=_LOADER)
    except FileNotFoundError:
        return None
    except OSError as error:  # it may be whole
        raise OutputError(f"Cannot read {path}: {error.strerror or error}.") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    if not isinstance(state, dict) or "gim_hloc" not in state:
        return None
    if not isinstance(state.setdefault("options", {}), dict):
        return None
    if isinstance(state.get("stages"), dict) and not (path.parent / HIDDEN / STATE).exists():
        return {**state, **_of_01(path.parent, state["options"])}  # of 0.1
    begin, end = data.find(b"\nsteps:") + 1, data.rfind(b"checksum: ")
    whole = state.get("checksum") == zlib.crc32(data[begin:end])
    return state if whole and _harmless(state) else None


def _harmless(state: Mapping[str, Any]) -> bool:
    """Whether a state, which somebody may have made up, names nothing outside its folder."""
    steps, pending, files = (state.get(name) for name in ("steps", "pending", "files"))
    if not isinstance(steps, dict) or not isinstance(files, dict):
        return False
    names = [*files]
    for step, entry in [*steps.items(), *([] if pending is None else [(None, pending)])]:
        kind = list if step is not None else dict
        if not (
            isinstance(entry, dict)
            and "key" in entry
            and isinstance(entry.get("files"), kind)
            and isinstance(entry.get("facts"), dict)
        ):
            return False
        names += [*entry["files"], entry.get("step") if step is None else step]
    return all(isinstance(n, str) and not {"..", "/"} & {*PurePosixPath(n).parts} for n in names)


def _yaml(value: Mapping[str, Any]) -> str:
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def _of_01(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a run of version 0.1, which did not list its files.

    What it computed is taken over by other means; its models and what was made of them are not
    finished for any key, so that they go when there is a new model.
    """

    def there(*patterns: str) -> list[str]:
        return [str(p.relative_to(folder)) for name in patterns for p in folder.glob(name)]

    asked = options.get("export")
    kinds = [kind for kind in asked if isinstance(kind, str)] if isinstance(asked, list) else []
    made = {
        "pairs": there("pairs.txt"),
        "verify": there("database.db"),
        "refine": there(*(f"sparse/[0-9]*/{part}" for part in MODEL_FILES)),
        "export 0.1": there(
            "export/[0-9]*/points.ply",
            *(f"export/[0-9]*/{n}" for k in kinds for n in _EXPORTS_01.get(k, ())),
        ),
    }
    files = there(
        *("log.txt", "features.h5", "matches.h5", "anchors.h5", "readings.h5"),
        *("report.html", "report.json", *_GONE),
    )
    return {
        "command": "reconstruct",
        "steps": {step: {"key": None, "files": own, "facts": {}} for step, own in made.items()},
        "files": dict.fromkeys([STATE, *files, *(name for own in made.values() for name in own)]),
    }


__all__ = [
    "HIDDEN",
    "MODEL_FILES",
    "STATE",
    "Made",
    "Part",
    "RunFolder",
    "Step",
    "keep_scan",
    "part_of",
    "progress_bar",
    "read_state",
    "refuse_other_images",
    "scanned",
]
