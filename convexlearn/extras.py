"""Packages that an extra of convexlearn brings, imported when they are needed."""

import importlib
from types import ModuleType

NAMES = {"skimage": "scikit-image", "pywt": "PyWavelets", "sklearn": "scikit-learn"}
"""What pip calls a package whose module has another name."""


def require(module: str, extra: str, purpose: str = "this problem") -> ModuleType:
    """Import an optional package; where it is missing, a ModuleNotFoundError says which extra brings it.

    >>> require("nosuchmodule", "plot", "a picture")
    Traceback (most recent call last):
    ModuleNotFoundError: a picture needs nosuchmodule; install it with: pip install 'convexlearn[plot]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        raise ModuleNotFoundError(
            f"{purpose} needs {NAMES.get(package, package).replace('_', '-')}; "
            f"install it with: pip install 'convexlearn[{extra}]'",
            name=error.name,
        ) from error
