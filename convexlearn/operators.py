"""Two operators of PyTorch's dispatcher, solve and adjoint, that compiled, exported and transformed layers call.

They carry no autograd; `layer_transforms` differentiates them. A program travels as its structure (an
integer tensor), settings as text, so that a graph saved in one process runs in another after
`import convexlearn`. Checks of values and statuses happen here, where the values are known.
"""

import json
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from convexlearn.failures import collector
from convexlearn.layer_arguments import check_finite, judge
from convexlearn.program.compiler import Compiled
from convexlearn.program.data_map import DataMap
from convexlearn.program.program import ProgramData, Solution, Status
from convexlearn.program.structure import Layout, decode, digest_of, encode
from convexlearn.solvers import SOLVERS
from convexlearn.solvers.base import Options, Solver

LOADED = 64  # decoded structures kept that no layer of this process holds


@dataclass(frozen=True)
class Settings:
    """How one call is made; it travels as text.

    on_failure: as in ConvexLayer. quiet: statuses are returned, never raised. limited: the caller set an
    iteration or time limit, so that an unfinished iterate counts.
    """

    options: Options
    on_failure: str = "raise"
    quiet: bool = False
    limited: bool = False

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str, solver: Solver) -> "Settings":
        """From JSON, with the solver's own options."""
        values = json.loads(text)
        return cls(**{**values, "options": solver.options(**values["options"])})


@dataclass(eq=False)
class Recipe:
    """A compiled problem and its solver as the operators use them.

    states: solutions whose x is still alive, saved for a backward pass, by the address of x. There the
    adjoint finds the solver's factors; where there is none it solves again.
    """

    compiled: Compiled
    solver: Solver
    maps: dict[tuple[bool, ...], DataMap] = field(default_factory=dict)
    states: dict[int, tuple[StorageWeakRef, str, Solution]] = field(default_factory=dict)

    def data(self, params: Sequence[Tensor]) -> ProgramData:
        """The data for raw float64 values (1 or B, k) of the parameters."""
        features, batch = self.compiled.features, batch_of(params)
        kinds = tuple(batch != 1 and len(params[f.index]) == batch for f in features)
        if kinds not in self.maps:
            widths = tuple(params[f.index].shape[1] for f in features)
            self.maps[kinds] = DataMap(self.compiled, widths, kinds)
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for f, kind in zip(features, kinds):
            parts[kind].append(params[f.index].log() if f.log else params[f.index])
        device = params[0].device if params else torch.device("cpu")
        parts[False].append(torch.ones(1, 1, dtype=torch.float64, device=device))
        parts[True].append(torch.zeros(batch, 0, dtype=torch.float64, device=device))
        return self.maps[kinds](torch.cat(parts[False], 1), torch.cat(parts[True], 1), batch)

    def check(self, params: Sequence[Tensor]) -> None:
        """Raise DomainError for values that are not finite or outside their domain."""
        specs = self.compiled.parameters
        values = [p.reshape((*([len(p)] if len(p) != 1 else []), *s.shape)) for p, s in zip(params, specs)]
        check_finite(specs, tuple(values))
        for spec, value in zip(specs, values):
            if spec.domain.checked:
                spec.domain.check(spec.name, value)

    def keep(self, x: Tensor, settings: str, solution: Solution) -> None:
        """Remember a solution for the adjoint as long as x, which was handed out for it, lives."""
        for address, (reference, *_) in list(self.states.items()):
            if reference.expired():
                self.states.pop(address, None)
        if x.numel():
            self.states[x.data_ptr()] = StorageWeakRef(x.untyped_storage()), settings, solution

    def recall(self, x: Tensor, params: Sequence[Tensor], settings: str) -> Solution:
        """The solution that x was handed out for, or the same computed once more."""
        data = self.data(params)
        reference, text, solution = self.states.get(x.data_ptr(), (None, "", None))
        if reference is not None and solution is not None and not reference.expired() and text == settings:
            same = all(torch.equal(a, b) for a, b in zip(data.fields(), solution.data.fields()))
            if same:
                return solution
        return self.solver.solve(self.compiled.program, data, Settings.read(settings, self.solver).options)


_held: "weakref.WeakValueDictionary[bytes, Recipe]" = weakref.WeakValueDictionary()
_loaded: "OrderedDict[bytes, Recipe]" = OrderedDict()


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a layer keeps to call the operators: structure (int64), its layout, and its recipe in this process."""

    structure: Tensor
    layout: Layout
    recipe: Recipe

    @classmethod
    def of(cls, compiled: Compiled, solver: Solver) -> "Prepared":
        """Encode a compiled problem, and let the operators of this process use it as it is."""
        structure = encode(compiled, solver.name)
        recipe = _held.setdefault(structure.digest, Recipe(compiled, solver))
        return cls(structure.tensor, structure.layout, recipe)

    def __deepcopy__(self, memo: dict) -> "Prepared":
        return self

    def __reduce__(self) -> tuple:
        return Prepared.of, (self.recipe.compiled, self.recipe.solver)


def recipe_of(structure: Tensor) -> Recipe:
    """The recipe of a structure: that of a living layer, or decoded."""
    digest = digest_of(structure)
    found = _held.get(digest) or _loaded.get(digest)
    if found is None:
        compiled, solver = decode(structure)
        found = _loaded[digest] = Recipe(compiled, SOLVERS[solver]())
        if len(_loaded) > LOADED:
            _loaded.popitem(last=False)
    return found


def batch_of(params: Sequence[Tensor]) -> Any:
    """B of parameters (1 or B, k)."""
    for p in params:
        if p.shape[0] != 1:
            return p.shape[0]
    return 1


def usable_samples(solution: Solution, limited: bool) -> Tensor:
    """(B,) True where there is a solution, or an iterate that the caller's limit stopped."""
    stopped = (solution.status == Status.FAILED) & torch.isfinite(solution.x).all(1)
    return solution.ok | stopped if limited else solution.ok


@torch.library.custom_op("convexlearn::solve", mutates_args=())
def solve(
    structure: Tensor, params: list[Tensor], n: int, m: int, settings: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x (B, n), z (B, m), status, iterations, residual, usable, collected (B,) for raw parameters (1 or B, k), float64.

    Rows of samples that are not usable are zero; collected is True while a simulator collects failures, which
    then wants finite outputs for them. Raises DomainError for values, SolverError for statuses.
    """
    recipe = recipe_of(structure)
    chosen = Settings.read(settings, recipe.solver)
    recipe.check(params)
    solution = recipe.solver.solve(recipe.compiled.program, recipe.data(params), chosen.options)
    usable = usable_samples(solution, chosen.limited)
    collecting = collector() if chosen.on_failure == "raise" else None
    if collecting is not None:
        collecting.add(~usable)
    if not chosen.quiet:
        judge(solution, (len(usable),) if len(usable) != 1 else (), chosen.limited, chosen.on_failure)
    x, z = (torch.where(usable[:, None], v, 0.0) for v in (solution.x, solution.z))
    recipe.keep(x, settings, solution)
    status, iterations = (v.to(torch.int64).clone() for v in (solution.status, solution.iterations))
    collected = torch.full_like(usable, collecting is not None)
    return x, z, status, iterations, solution.residual.clone(), usable.clone(), collected


@solve.register_fake
def _(structure: Tensor, params: list[Tensor], n: int, m: int, settings: str) -> tuple[Tensor, ...]:
    batch = batch_of(params)
    device = params[0].device if params else structure.device
    make = lambda *shape, dtype=torch.float64: torch.empty(*shape, dtype=dtype, device=device)  # noqa: E731
    status, iterations = (make(batch, dtype=torch.int64) for _ in range(2))
    usable, collected = (make(batch, dtype=torch.bool) for _ in range(2))
    return make(batch, n), make(batch, m), status, iterations, make(batch), usable, collected


@torch.library.custom_op("convexlearn::adjoint", mutates_args=())
def adjoint(
    structure: Tensor, params: list[Tensor], x: Tensor, rx: Tensor, rz: Tensor, settings: str
) -> tuple[Tensor, Tensor]:
    """(wx, wz) = S (rx, rz) for k right-hand sides rx (B, k, n), rz (B, k, m).

    S is the symmetric map of the differentiated optimality conditions at the solution x (B, n): data that
    changes by dP, dq, dA, db moves (x, z) by S (-dq - dP x - dA'z, db - dA x). Zero for unusable samples.
    """
    recipe = recipe_of(structure)
    solution = recipe.recall(x, params, settings)
    usable = usable_samples(solution, Settings.read(settings, recipe.solver).limited)
    status = torch.where(usable, solution.status.clamp(max=Status.INACCURATE), Status.FAILED)
    data = solution.data
    # q and b by sample: their gradients are the adjoint variables
    split = ProgramData(data.P, data.q.expand(len(x), -1), data.A, data.b.expand(len(x), -1), batch=data.batch)
    solution = solution.replaced(split, status)
    wx, wz = (r.new_zeros(r.shape) for r in (rx, rz))
    for k in range(rx.shape[1]):
        right = (torch.where(usable[:, None], r[:, k], 0.0).contiguous() for r in (rx, rz))
        found = recipe.solver.adjoint(solution, *right)
        wx[:, k], wz[:, k] = -found.q, found.b
    return wx, wz


@adjoint.register_fake
def _(
    structure: Tensor, params: list[Tensor], x: Tensor, rx: Tensor, rz: Tensor, settings: str
) -> tuple[Tensor, Tensor]:
    wx, wz = (r.new_empty(r.shape) for r in (rx, rz))
    return wx, wz
