"""The contract of iterations: start, layer, decision; slots by name (section "Iterative solvers" of the paper)."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from convexlearn.checks import SIZES, shown
from convexlearn.convolution import Convolution
from convexlearn.errors import CompileError, NonFiniteError, OptionError, ShapeError, listed, suggest
from convexlearn.failures import collector
from convexlearn.iterations.slots import Slot, cast_value, check_prox, noise_level, second_argument, slot_number
from convexlearn.prox import PROXIMABLE
from convexlearn.shrinkage import SHRINKAGES
from convexlearn.split_instance import Instance
from convexlearn.splitting import Split

Layer = Callable[[Any], Any]
"""One step with all its numbers in: state -> state."""


class Iteration(ABC):
    """One algorithm on one split problem; immutable, `free` and `replace` return changed copies.

    A slot without a value takes the one derived from the problem. State is a named tuple of tensors, batch first.
    Functions act on an Instance, the problem's numbers for one batch, from `bind(x)`.

    A new iteration defines `slots`, `start`, `layer`, `decision`, `core`, `resume`, `initial` and, for what is
    guaranteed when run to convergence, `limits`.
    """

    slots: ClassVar[tuple[Slot, ...]]

    def __init__(self, split: Split, **values: Any) -> None:
        if not isinstance(split, Split):
            raise OptionError(
                f"{type(self).__name__}: split must be what cl.split(problem, context, decision) returns, got "
                f"{shown(split)}"
            )
        self.split = split
        self.values: dict[str, Any] = {}
        self.freed: frozenset[str] = frozenset()
        self.check_split()
        self._fill(values)

    def check_split(self) -> None:  # noqa: B027
        """Raise CompileError where the algorithm does not apply to the split."""

    @abstractmethod
    def start(self, instance: Instance) -> Any:
        """State before the first step."""

    @abstractmethod
    def layer(self, instance: Instance, slots: Mapping[str, Any] | None = None) -> Layer:
        """The step state -> state at slot values `slots`, which go before the iteration's own ones."""

    @abstractmethod
    def decision(self, state: Any) -> Tensor:
        """The present solution z `(B, n)`, stacked variables."""

    @abstractmethod
    def core(self, state: Any) -> Tensor:
        """What the next step depends on, as one tensor `(B, N)`, auxiliary sequences such as momentum left out."""

    @abstractmethod
    def resume(self, core: Tensor, instance: Instance) -> Any:
        """The state with this core, auxiliary sequences at their start."""

    @abstractmethod
    def initial(self, name: str, k: int = 0) -> Tensor:
        """Value of a numeric slot at step k, as given or as derived from the problem at its declared values."""

    def limits(self, instance: Instance) -> dict[str, Any]:
        """Upper bounds of slots below which convergence is guaranteed."""
        return {}

    def check_convergent(self, learned: Collection[str]) -> None:  # noqa: B027
        """Raise OptionError where convergence is not guaranteed with the slots in `learned` trained within `limits`."""

    def free(self, *names: str) -> "Iteration":
        """Matrices as free tensors that a rule trains, at first those of the problem; returns a copy."""
        for name in names:
            if self.slot(name).kind != "matrix":
                free = [s.name for s in self.slots if s.kind == "matrix"]
                raise OptionError(f"free: slot '{name}' is no matrix (those are {free}); learn it with untie or learn")
        return self.replaced({name: self.initial(name) for name in names}, freed=names)

    def convolve(self, *names: str, **options: Any) -> "Iteration":
        """`free` with convolutions in place of matrices, for images; `options` as in `convolution`."""
        return self.replaced({name: self.convolution(name, **options) for name in names}, freed=names)

    def convolution(
        self,
        name: str,
        *,
        image: tuple[int, int] | None = None,
        size: int | None = None,
        boundary: str = "zero",
        exact: bool = True,
    ) -> Convolution:
        """The convolution that a matrix slot is at the problem's declared values.

        image `(h, w)`: of the decision, where its variable is a vector of pixels row by row. size: of the kernel, by
        default as small as the problem's own. A matrix that is no convolution with this boundary is an OptionError
        unless exact=False (see Convolution.from_matrix).
        """
        if image is not None and (not SIZES.fits(image) or len(image) != 2):
            raise OptionError(f"convolve: image must be (h, w), got {shown(image)}")
        if len(self.split.variables) != 1:
            raise OptionError(f"convolve: the decision is more than one image: {self.split}")
        W = self.free(name).values[name]
        shape = self.split.variables[0].shape if image is None else image
        taken = self.nominal(name).y_shape if name == "W1" else shape
        if image is None:
            return Convolution.from_matrix(W, taken, shape, size=size, boundary=boundary, exact=exact)
        factor = max(1, round(math.sqrt(math.prod(image) / math.prod(taken))))
        small = (image[0] // factor, image[1] // factor)
        found = Convolution.from_matrix(W, small, image, size=size, boundary=boundary, exact=exact)
        found.image = small
        return found

    def replace(self, **values: Any) -> "Iteration":
        """A copy with other slot values: numbers, tensors, modules (`replace(prox=denoiser)`)."""
        return self.replaced(values)

    def replaced(self, values: Mapping[str, Any], freed: Sequence[str] = ()) -> "Iteration":
        """`replace`, with `freed` naming those that a rule trains."""
        twin = copy.copy(self)
        twin.values = dict(self.values)
        twin.freed = self.freed | set(freed)
        twin._fill(values)
        return twin

    def slot(self, name: str) -> Slot:
        """The slot of that name; an unknown one is an OptionError."""
        known = {s.name: s for s in self.slots}
        if name not in known:
            raise OptionError(f"{type(self).__name__} has no slot '{name}'; {suggest(name, known)}")
        return known[name]

    def bind(self, *x: Tensor, values: Mapping[str, Tensor] | None = None) -> Instance:
        """The problem's numbers for contexts x `(B, ...)`, at the declared parameter values or those in `values`."""
        return self.split.bind(*x, values=values)

    def step(self, state: Any, instance: Instance, slots: Mapping[str, Any] | None = None) -> Any:
        """One step from `state`; to run many, keep the `layer`."""
        layer, first = self.layer(instance, slots), self.start(instance)
        if type(state) is not type(first) or any(getattr(a, "shape", 0) != b.shape for a, b in zip(state, first)):
            raise OptionError(
                f"{type(self).__name__}: state must be one of this iteration and batch, got {shown(state)}"
            )
        return layer(state)

    def given(self, slots: Mapping[str, Any] | None, instance: Instance) -> dict[str, Any]:
        """Slot values: those in `slots`, else the iteration's own, tensors in the dtype of the instance."""
        if not isinstance(instance, Instance):
            raise OptionError(f"{type(self).__name__}: instance must be what bind(x) returns, got {shown(instance)}")
        for name in slots or ():
            if name not in self.values:
                self.slot(name)
        merged = {**self.values, **self.scheduled(-1), **(slots or {})}
        return {name: cast_value(value, instance.like) for name, value in merged.items()}

    def scheduled(self, k: int) -> dict[str, Tensor]:
        """Values at step k of the slots that hold a schedule: its last one from there on, and for k = -1."""
        held = {n: v for n, v in self.values.items() if n == "sigma" and isinstance(v, Tensor) and v.ndim}
        return {name: row[min(k, len(row) - 1)] for name, row in held.items()}

    @property
    def schedule_length(self) -> int:
        """Number of steps after which no slot changes any more, at least 1."""
        sigma = self.values.get("sigma")
        return len(sigma) if isinstance(sigma, Tensor) and sigma.ndim else 1

    def apply_prox(self, prox: Any, z: Tensor, t: Any, sigma: Any = None) -> Tensor:
        """A prox slot at z `(B, n)`: called with the variables in their natural shape, and t or sigma if it takes one.

        A function whose second argument is named sigma is a denoiser: it gets sqrt(t) where the slot sigma is empty,
        since prox_{t g} is the most probable s given s + noise of variance t under the density exp(-g). Raises
        ShapeError or NonFiniteError for what it returns, the latter naming the samples.
        """
        second = second_argument(prox)
        if sigma is not None and second is None:
            raise OptionError("slot 'sigma' has a value, but the module in slot 'prox' takes none: forward(v, sigma)")
        level = sigma if sigma is not None else noise_level(t) if second == "sigma" else self._fit(t)
        return self._checked(lambda v: prox(v) if second is None else prox(v, level), z)

    def _fit(self, t: Any) -> Any:
        """A threshold of each sample `(B, 1)` in as many dimensions as the variable, where it is the only one."""
        if len(self.split.variables) != 1 or not isinstance(t, Tensor) or t.ndim != 2 or t.shape[1] != 1:
            return t
        return t.reshape(len(t), *[1] * len(self.split.variables[0].shape))

    def _checked(self, call: Callable[[Any], Any], z: Tensor) -> Tensor:
        """call on the variables of z; a sample for which it returns no numbers fails, and it alone."""
        s = self.stack(call(self.unstack(z)))
        if s.shape != z.shape:
            raise ShapeError(f"slot 'prox' returned {len(s)} samples for {len(z)}")
        if torch.compiler.is_compiling() or bool(torch.isfinite(s.detach().sum())):
            return s
        failed = ~torch.isfinite(s.detach()).all(1) & torch.isfinite(z.detach()).all(1)
        if not bool(failed.any()):
            return s
        text = "the module in slot 'prox' returned NaN or infinite values"
        failures, which = collector(), failed.nonzero().flatten()
        if failures is None:
            shown = listed(which.tolist())
            raise NonFiniteError(f"{text} for samples {shown} of {len(z)}; check its weights and its range of inputs")
        failures.add(failed)
        failures.name([text if bad else "" for bad in failed.tolist()])
        kept = (~failed).nonzero().flatten()
        return z.detach().index_copy(0, kept, self.stack(call(self.unstack(z[kept])))) if len(kept) else z.detach()

    def unstack(self, z: Tensor) -> Any:
        """Variables `(B, *shape)` of z `(B, n)`; a tuple where there are several."""
        parts, start = [], 0
        for v in self.split.variables:
            size = int(torch.Size(v.shape).numel())
            parts.append(z[:, start : start + size].reshape(len(z), *v.shape))
            start += size
        return parts[0] if len(parts) == 1 else tuple(parts)

    def stack(self, parts: Any) -> Tensor:
        """z `(B, n)` of variables `(B, *shape)`, the inverse of `unstack`."""
        parts = parts if isinstance(parts, tuple | list) else (parts,)
        wrong = next((part for part in parts if not isinstance(part, Tensor)), None)
        if len(parts) != len(self.split.variables) or not all(isinstance(part, Tensor) for part in parts):
            names = ", ".join(v.name for v in self.split.variables)
            got = f"{len(parts)} parts" if wrong is None and parts[:1] != (None,) else shown(wrong)
            raise ShapeError(
                f"a module in a slot, such as prox or W1, must return one tensor for each of {names}, got {got}"
            )
        for v, part in zip(self.split.variables, parts):
            if tuple(part.shape[1:]) != v.shape:
                raise ShapeError(
                    f"variable '{v.name}' has shape {v.shape}, but a slot returned {tuple(part.shape[1:])}"
                )
        return torch.cat([part.reshape(len(part), math.prod(part.shape[1:])) for part in parts], 1)

    def threshold_sizes(self) -> list[int]:
        """Number of weights of each term, 0 for an indicator."""
        return [0 if not t.scaled else 1 if t.weight is None else t.weight.map.rows for t in self.split.terms]

    def split_threshold(self, t: Tensor, fallback: list[Any]) -> list[Any]:
        """The threshold slot, one number or all weights in a row, cut into one per term; indicators keep theirs."""
        sizes, parts, start = self.threshold_sizes(), list(fallback), 0
        if sum(sizes) == 1 or t.ndim == 0:
            if t.numel() != 1:
                raise OptionError(f"slot 'threshold' takes one number here, got shape {tuple(t.shape)}")
            return [t.reshape(()) if n else f for n, f in zip(sizes, fallback)]
        if t.shape[-1] != sum(sizes):
            raise OptionError(f"slot 'threshold' takes {sum(sizes)} weights in a row here, got shape {tuple(t.shape)}")
        for k, n in enumerate(sizes):
            if n:
                part = t[..., start : start + n]
                parts[k], start = part.reshape(()) if n == 1 else part, start + n
        return parts

    def initial_threshold(self, step: Tensor) -> Tensor:
        """step times all weights in a row, or a single number where there is one weight."""
        nominal = self.nominal("threshold")
        weights = [t.weight.reshape(-1) for t in nominal.terms if t.scaled]
        if not weights:
            raise OptionError(f"the split has no weighted term, so there is no threshold: {self.split}")
        row = step * torch.cat(weights)
        return row.reshape(()) if row.numel() == 1 else row

    def initial_sigma(self, step: Tensor, k: int) -> Tensor:
        """The schedule's value at step k, the value given, or the root of the threshold of the first weighted term."""
        if "sigma" in self.values:
            return self.scheduled(k)["sigma"] if self.scheduled(k) else self.values["sigma"]
        if "prox" not in self.values:
            raise OptionError("slot 'sigma' is the noise level of a denoiser; give one, as in replace(prox=denoiser)")
        weights = [t.weight for t in self.nominal("threshold").terms if t.scaled]
        return noise_level(step * weights[0] if weights else step).reshape(())

    def nominal(self, name: str) -> Instance:
        """The instance from which the start value of slot `name` derives."""
        fed = {p for t in self.split.terms if t.weight is not None for p in t.weight.map.parameters}
        if self.split.varies_with_context() or (name == "threshold" and fed & set(self.split.context)):
            raise OptionError(
                f"slot '{name}' has no start value, since the problem's matrix or weight is context; "
                f"give one, as in iteration.replace({name}=...)"
            )
        return self.split.nominal()

    def apply_matrix(self, W: Any, v: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """A matrix slot at v `(B, m)`: a tensor, or a module fed with the natural shape (of z where None)."""
        if isinstance(W, Tensor):
            wanted = (self.split.size, v.shape[1])
            if W.shape[-2:] != wanted:
                raise ShapeError(f"slot W1 or W2 must be a matrix {wanted} here, got {tuple(W.shape)}")
            return v @ W.mT.to(v.dtype)
        natural = self.unstack(v) if shape is None else v.reshape(len(v), *shape)
        return self.stack(W(natural))

    def _fill(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            slot = self.slot(name)
            if isinstance(value, str):
                table = {**{key: entry.prox for key, entry in PROXIMABLE.items()}, **SHRINKAGES}
                if slot.kind != "prox" or value not in table:
                    raise OptionError(f"slot '{name}': no proximal map '{value}'; {suggest(value, table)}")
                value = table[value]
            elif not callable(value):
                value = slot_number(slot, value)
            elif slot.kind in ("positive", "threshold", "number"):
                raise OptionError(f"slot '{name}' takes a number, got {type(value).__name__}")
            if slot.kind == "prox":
                check_prox(name, value)
            self.values[name] = value
        if "sigma" in self.values and "prox" not in self.values:
            raise OptionError(
                "slot 'sigma' is the noise level of a denoiser; give one too, as in replace(prox=denoiser)"
            )

    def __deepcopy__(self, memo: dict) -> "Iteration":
        return self

    def __repr__(self) -> str:
        given = "".join(f", {name}" for name in self.values)
        return f"{type(self).__name__}({self.split}{given})"


def require_smooth(split: Split, name: str) -> None:
    """Raise CompileError where there is no smooth quadratic."""
    if not split.quadratics:
        raise CompileError(f"{name} needs a sum of squares in the objective, but the split is: {split}; use ADMM")
