"""Checkpoints of a tuning run: written atomically, read as plain data, refused for another run."""

import contextlib
import itertools
import os
import pickle
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from convexlearn.errors import OptionError

FORMAT = 1

_folder: ContextVar[Iterator[Path] | None] = ContextVar("convexlearn_checkpoints", default=None)


@contextlib.contextmanager
def folder(path: Path) -> Iterator[None]:
    """Within it the k-th call of `tune` that names no checkpoint takes the file `tune-k.pt` of this folder."""
    token = _folder.set(path / f"tune-{k}.pt" for k in itertools.count(1))
    try:
        yield
    finally:
        _folder.reset(token)


def chosen(path: str | Path | None) -> Path | None:
    """The caller's file, else the next one of the folder, if there is one."""
    files = _folder.get()
    return Path(path) if path is not None else None if files is None else next(files)


def save(path: Path, content: dict[str, Any], configuration: dict[str, str]) -> None:
    """Write `content` to `path`: a file of the same folder is written first and then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save({"format": FORMAT, "configuration": configuration, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise


def load(path: Path, configuration: dict[str, str]) -> dict[str, Any] | None:
    """What `save` wrote; None when there is no file; OptionError when it belongs to another run."""
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        known = content["configuration"] if content["format"] == FORMAT else None
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        raise OptionError(f"{path} is no checkpoint of tune; delete it or choose another path") from error
    if known is None:
        raise OptionError(f"{path} has checkpoint format {content['format']}, expected {FORMAT}; delete it")
    differences = [
        f"{key} was {known.get(key, 'absent')}, is {configuration.get(key, 'absent')}"
        for key in sorted({*known, *configuration})
        if known.get(key) != configuration.get(key)
    ]
    if differences:
        raise OptionError(
            f"checkpoint {path} belongs to another run: {'; '.join(differences)}; "
            "choose another path, delete it, or call tune as before"
        )
    return content
