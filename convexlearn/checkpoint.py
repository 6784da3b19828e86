"""Checkpoints of a tuning run: written atomically, read as plain data, refused for another run."""

import contextlib
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch

from convexlearn.errors import OptionError

FORMAT = 1


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
