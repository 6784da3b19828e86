"""Slots of iterations: their kinds, and what may fill them."""

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convexlearn.checks import shown
from convexlearn.errors import OptionError
from convexlearn.inputs import as_tensor


@dataclass(frozen=True)
class Slot:
    """A named place in an iteration.

    kind: "positive" (a number), "number" (of either sign), "threshold" (nonnegative, one per weight of the terms),
    "matrix" (a matrix, or a module from image to image), "prox" (a module or function v -> s, (v, t) -> s or, for a
    denoiser, (v, sigma) -> s, or a name in PROXIMABLE or SHRINKAGES), or "module" (any other module). objective: True
    for what belongs to the objective (theta^o), False for hyperparameters (theta^h).
    """

    name: str
    kind: str
    objective: bool = False


SIGMA = Slot("sigma", "positive")
"""Noise level that a denoiser in the prox slot is told (alpha_k of Eq. 26); a row `(K,)` is a schedule."""


def slot_number(slot: Slot, value: Any) -> Tensor:
    """The value of a slot that holds numbers, as a tensor; an unsound one is an OptionError."""
    if slot.kind in ("prox", "module"):
        raise OptionError(f"slot '{slot.name}' takes a module, a function or a name, got {type(value).__name__}")
    if slot.kind != "matrix" or not np.iscomplexobj(value):
        value = as_tensor(slot.name, value, "slot")
    tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
    tensor = tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.to(torch.float64)
    if not bool(torch.isfinite(tensor).all()):
        raise OptionError(f"slot '{slot.name}' must be finite, got {shown(tensor)}")
    if slot.kind == "matrix" and tensor.ndim not in (2, 3):
        raise OptionError(f"slot '{slot.name}' takes a matrix, got shape {tuple(tensor.shape)}")
    if slot.kind in ("positive", "number") and slot.name != "sigma" and tensor.numel() != 1:
        raise OptionError(f"slot '{slot.name}' takes a number, got shape {tuple(tensor.shape)}")
    low = 0.0 if slot.kind == "threshold" else torch.finfo(torch.float64).tiny
    if slot.name == "sigma" and (tensor.ndim > 1 or not tensor.numel()):
        raise OptionError(f"slot 'sigma' takes a number or a schedule (K,), got shape {tuple(tensor.shape)}")
    if slot.kind in ("positive", "threshold") and bool((tensor < low).any()):
        raise OptionError(f"slot '{slot.name}' must be positive, got {tensor.min().item():g}")
    return tensor


def cast_value(value: Any, like: Tensor) -> Any:
    """A slot's tensor in the dtype and on the device of `like`; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.to(device=like.device, dtype=like.dtype if value.is_complex() else like.real.dtype)


def check_prox(name: str, value: Any) -> None:
    """OptionError for what can't be called as v -> s or (v, t) -> s; builtins without a signature pass."""
    target = value.forward if isinstance(value, nn.Module) else value
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    few = len(needed) <= 2 and not any(p.kind is p.KEYWORD_ONLY for p in needed)
    if isinstance(value, type) or not places or not few:
        raise OptionError(
            f"slot '{name}' takes a module or function v -> s, (v, t) -> s or (v, sigma) -> s, got {shown(value)}; "
            "wrap one that needs more, as in lambda v: project_box(v, lower=0.0, upper=1.0)"
        )


def second_argument(function: Any) -> str | None:
    """Name of the second argument of a module or function; None where it takes one only."""
    target = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in kinds]
    return names[1] if len(names) > 1 else None


def noise_level(t: Any) -> Tensor:
    """Standard deviation sqrt(t) of the noise that prox_{t g} removes: t `()` -> `()`, `(B, 1)` -> `(B,)`."""
    t = as_tensor("t", t, "threshold")
    if t.numel() != 1 and (t.ndim != 2 or t.shape[1] != 1):
        raise OptionError("terms with a weight for each entry tell a denoiser no noise level; give slot 'sigma'")
    return t.reshape(-1).sqrt() if t.numel() != 1 else t.reshape(()).sqrt()
