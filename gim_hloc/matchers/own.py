"""Matchers of others: a class in a file, in a module or in an installed package.

Their code answers for itself: what it raises is an error that names its file, and its hash is among
the settings that decide what is reused, so that an edited matcher never meets its old features.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from gim_hloc.engine import is_of_the_device
from gim_hloc.errors import GimError, InputError
from gim_hloc.types import Encoding, Matcher, MatcherInfo, Matches, SparseEncoding

EXAMPLE = "examples/own_matcher.py"


def find_class(reference: str, folder: str, what: str) -> Any:
    """The class of a matcher that a reference names; as ``find``, and an error for what is none."""
    module, found = _find(reference, folder, what)
    if not _is_matcher(found):
        there = [name for name, value in vars(module).items() if _is_matcher(value)]
        raise InputError(
            f"{what}: {reference.rpartition(':')[2]} in {_place(module)} is no matcher, which is "
            f"a class derived from gim_hloc.matchers.MatcherBase with an info ({EXAMPLE})."
            + (f" There is {', '.join(there)}." if there else "")
        )
    return found


def find(reference: str, folder: str, what: str) -> Any:
    """What ``module:name`` or ``folder/file.py:name`` means.

    Args:
        reference: as above. Modules are those that Python finds, and then those in ``folder``.
        folder: that relative paths start at.
        what: is looked for, for messages.

    Raises:
        InputError: there is no such thing, or its module cannot be imported.
    """
    module, found = _find(reference, folder, what)
    if found is None:
        raise InputError(f"{what}: there is no {reference.rpartition(':')[2]} in {_place(module)}.")
    return found


def _find(reference: str, folder: str, what: str) -> tuple[ModuleType, Any]:
    """The module, and what is meant in it, None if nothing."""
    module_name, _, attribute = reference.rpartition(":")
    file = None
    if module_name.endswith(".py"):
        file = Path(folder, module_name).expanduser()
        if not file.is_file():
            raise InputError(f"{what}: there is no file {file}.")
        folder, module_name = str(file.parent.resolve()), file.stem
    if folder and folder not in sys.path:
        sys.path.append(folder)  # last: nothing in it may stand in for an installed module
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        name = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if name is not None and f"{module_name}.".startswith(f"{name}."):
            raise InputError(
                f"{what}: there is no module {name!r}, neither installed nor in {folder}."
            ) from None
        raise InputError(f"{what} cannot be imported: {describe_error(error)}.") from error
    source = _place(module)
    if file is not None and not (Path(source).is_file() and file.samefile(source)):
        raise InputError(f"{what}: {file} has the name of the module {source}; rename it.")
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    return module, found


def _place(module: ModuleType) -> str:
    """File of a module; built-in ones, folders and notebooks have none."""
    return getattr(module, "__file__", None) or module.__name__


def _is_matcher(value: Any) -> bool:
    return inspect.isclass(value) and isinstance(getattr(value, "info", None), MatcherInfo)


def describe_error(error: BaseException) -> str:
    """An error of another's code in one line, with the last place in it that raised it."""
    ours = (str(Path(__file__).parents[1]), "<frozen")
    frames = traceback.extract_tb(error.__traceback__)
    frames = [f for f in frames if not f.filename.startswith(ours)]  # type: ignore[assignment]
    near = [f for f in frames if "-packages" not in f.filename] or frames  # before those they call
    place = f"{near[-1].filename}:{near[-1].lineno}: " if near else ""
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{error.filename}:{error.lineno}: "
    words = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
    return f"{place}{words}"


def make(factory: Callable[..., Matcher], name: str, **options: Any) -> Matcher:
    """Make another's matcher: its errors name its file, its settings have the hash of its code.

    Raises:
        GimError: the factory raised it, or another error, which it names.
    """
    matcher: Matcher = _guarded(factory, name, "when it was made")(**options)
    code = _joined([*_code_of(type(matcher)), *_code_of_factory(factory)])
    for method in {"encode", "match", "match_batch", "warp_batch"} & set(dir(matcher)):
        checked = _checked(getattr(matcher, method), name, method)
        setattr(matcher, method, _guarded(checked, name, f"in {method}"))
    for method in {"encode_settings", "match_settings"} & set(dir(matcher)):
        settings = _with_code(getattr(matcher, method), code)
        setattr(matcher, method, _guarded(settings, name, f"in {method}"))
    return matcher


def _guarded(method: Callable[..., Any], name: str, where: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        try:
            return method(*args, **options)
        except GimError:
            raise
        except Exception as error:
            if is_of_the_device(error):
                raise
            raise GimError(
                f"The matcher {name} stopped {where}: {describe_error(error)}."
            ) from error

    return call


def _checked(method: Callable[..., Any], name: str, kind: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        found = method(*args, **options)
        wrong = fault(kind, found, args)
        if wrong is not None:
            raise GimError(
                f"The matcher {name} is of no use: {wrong}. What else it must keep: python -m "
                "gim_hloc.matchers.check."
            )
        return found

    return call


def fault(method: str, found: Any, args: tuple[Any, ...]) -> str | None:
    """What is wrong with what a method returned, so that nobody can go on with it."""
    if method == "match_batch":
        (pairs,) = args
        if not isinstance(found, list) or len(found) != len(pairs):
            return "match_batch must return a list of Matches, one a pair"
        each = (fault("match", one, pair) for one, pair in zip(found, pairs, strict=True))
        return next((wrong for wrong in each if wrong is not None), None)
    if method == "encode":
        if not isinstance(found, Encoding):
            return f"encode must return an Encoding, not {found!r:.60}"
        if isinstance(found, SparseEncoding):
            shapes = {"keypoints": (len(found), 2), "scores": (len(found),)}
            return _fault_of_tensors(found, "the encoding's", shapes)
    if method == "match":
        if not isinstance(found, Matches):
            return f"match must return Matches, not {found!r:.60}"
        count = len(found.keypoints0) if isinstance(found.keypoints0, torch.Tensor) else -1
        shapes = {"keypoints0": (count, 2), "keypoints1": (count, 2), "scores": (count,)}
        if found.indices is not None:
            shapes["indices"] = (count, 2)
        wrong = _fault_of_tensors(found, "the matches'", shapes)
        if wrong is None and found.indices is not None and count:
            ends = torch.tensor([len(encoding) for encoding in args])
            rows = found.indices.cpu()
            if not bool(((rows >= 0) & (rows < ends)).all()):
                return "indices must be rows of the keypoints"
        return wrong
    return None


def _fault_of_tensors(found: Any, whose: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    for name, shape in shapes.items():
        value = getattr(found, name)
        if not isinstance(value, torch.Tensor):
            return f"{whose} {name} must be a tensor, not {type(value).__name__}"
        if value.shape != shape:
            wanted = ", ".join(str(n) for n in shape)
            return f"{whose} {name} must be ({wanted}), not {tuple(value.shape)}"
        if not bool(value.isfinite().all()):
            return f"{whose} {name} must be numbers, not NaN or infinite"
    return None


def _with_code(settings: Callable[[], dict[str, Any]], code: str) -> Callable[[], dict[str, Any]]:
    return lambda: {**settings(), "code": code}


def _joined(parts: list[str]) -> str:
    """One part as it is, several as the hash of all."""
    parts = list(dict.fromkeys(parts))
    return parts[0] if len(parts) == 1 else hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _code_of(kind: type) -> list[str]:
    """What stands for the code of a class and of those that it derives from.

    Of each the ``version`` that it declares itself, which covers what it derives from, or the hash
    of its file. Ours and Python's own do not count.

    Raises:
        InputError: a class has neither.
    """
    if vars(kind).get("version") is not None:
        return [str(vars(kind)["version"])]
    bases = [base for base in kind.__bases__ if not _is_library(base)]
    return [_hash_of_source(kind), *(part for base in bases for part in _code_of(base))]


def _code_of_factory(factory: Any) -> list[str]:
    """What stands for the code of what makes a matcher: a class, or a function in another file."""
    while isinstance(factory, functools.partial):
        factory = factory.func
    owner = getattr(factory, "__self__", factory)
    if inspect.isfunction(owner):
        return [] if _is_library(owner) else [_hash_of_source(owner)]
    return _code_of(owner if inspect.isclass(owner) else type(owner))


def _is_library(value: Any) -> bool:
    package = value.__module__.partition(".")[0]
    return package == "gim_hloc" or package in sys.stdlib_module_names


@functools.cache  # what is in use is what was there when it was first asked for
def _hash_of_source(value: Any) -> str:
    """Of the file of a class or a function, or of its text where that is a notebook's cell.

    Raises:
        InputError: neither is to be had.
    """
    try:
        file = inspect.getsourcefile(value)
        if file is not None and Path(file).is_file():
            return hashlib.sha256(Path(file).read_bytes()).hexdigest()
        return hashlib.sha256(inspect.getsource(value).encode()).hexdigest()
    except (OSError, TypeError):
        raise InputError(
            f"The source of {value.__qualname__} is not to be had, so that it is not known when it "
            'changes: put it into a file, or give a class a version = "1", and another one with '
            "each change."
        ) from None
