"""A tuned ConvexRule as C code: cvxpygen's solver, and around it a function that checks the status of every solve."""

import contextlib
import ctypes
import io
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from convexlearn.checks import FOLDER, checked, count, instance, number
from convexlearn.errors import CompileError, OptionError, ShapeError, SolverError, suggest
from convexlearn.extras import require
from convexlearn.inputs import as_tensor
from convexlearn.rules.base import as_tuple
from convexlearn.rules.convex import ConvexRule

SOLVERS: dict[str, tuple[str, str]] = {
    "OSQP": (
        'strcmp(CPG_Info.status, "solved") == 0',
        "cpg_set_solver_eps_abs({tolerance}); cpg_set_solver_eps_rel({tolerance}); "
        "cpg_set_solver_max_iter({iterations});",
    ),
    "ECOS": (  # aims further; where rounding stops it, 10 says that the best iterate is within the tolerance
        "CPG_Info.status == 0 || CPG_Info.status == 10",
        "cpg_set_solver_abstol({aim}); cpg_set_solver_feastol({aim}); cpg_set_solver_reltol({aim}); "
        "cpg_set_solver_abstol_inacc({tolerance}); cpg_set_solver_feastol_inacc({tolerance}); "
        "cpg_set_solver_reltol_inacc({tolerance}); cpg_set_solver_maxit({iterations});",
    ),
}
"""By cvxpygen's name: when a solve has succeeded, and the settings. Only what was seen to work stands here."""

MAX_ITERATIONS = {"OSQP": 100_000, "ECOS": 100}

HEADER = """/* {rule}: {text}. Made by convexlearn and cvxpygen. */
#ifndef CONTROLLER_H
#define CONTROLLER_H
#define CONTROLLER_INPUTS {inputs}
#define CONTROLLER_OUTPUTS {outputs}
/* The decision u[CONTROLLER_OUTPUTS] for the context x[CONTROLLER_INPUTS]: arrays one after the other, row by row.
   Returns 0, or 1 where the solver reports no solution, 2 where its solution is not finite; u then stays as it is. */
int controller_decide(const double *x, double *u);
/* The same for count contexts one after the other, each with its own status. */
void controller_decide_all(const double *x, double *u, int *status, int count);
#endif
"""

SOURCE = """#include <math.h>
#include <string.h>
#include "cpg_solve.h"
#include "controller.h"

{tables}
int controller_decide(const double *x, double *u) {{
  static int ready = 0;
  double found[CONTROLLER_OUTPUTS];
  int k;
  if (!ready) {{
    cpg_set_solver_default_settings();
    {settings}
    ready = 1;
  }}
{updates}
  cpg_solve();
  if (!({solved})) return 1;
{results}
  for (k = 0; k < CONTROLLER_OUTPUTS; k++) if (!isfinite(found[k])) return 2;
  for (k = 0; k < CONTROLLER_OUTPUTS; k++) u[k] = found[k];
  return 0;
}}

void controller_decide_all(const double *x, double *u, int *status, int count) {{
  int k;
  for (k = 0; k < count; k++)
    status[k] = controller_decide(x + (long)k * CONTROLLER_INPUTS, u + (long)k * CONTROLLER_OUTPUTS);
}}
"""

BUILD = """cmake_minimum_required(VERSION 3.5)
project(controller C)
add_subdirectory(c)
add_library(controller SHARED controller.c ${cpg_src} ${cpg_head})
target_include_directories(controller PRIVATE ${cpg_include})
if(NOT WIN32)
  target_link_libraries(controller m)
endif()
"""


@dataclass(frozen=True)
class Comparison:
    """A compiled controller against its rule on the same contexts.

    error: largest difference of a decision over solved samples, relative to max(1, |decision|); failed: samples without
    a solution in C; seconds per decision, one sample at a time, in C and of the rule.
    """

    error: float
    samples: int
    failed: tuple[int, ...]
    seconds: float
    rule_seconds: float

    def __str__(self) -> str:
        lost = f", {len(self.failed)} without a solution" if self.failed else ""
        times = f"{1e6 * self.seconds:.3g} us per decision in C, {1e6 * self.rule_seconds:.3g} us of the rule"
        return f"largest difference {self.error:.2g} ({self.samples} samples{lost}); {times}"


class Controller:
    """A compiled rule: contexts `(B, ...)` -> decisions `(B, ...)`, float64; NaN rows where the solver found none."""

    def __init__(self, library: Path, rule: ConvexRule, inputs: list[tuple[int, ...]], outputs: list[tuple[int, ...]]):
        self.library, self.inputs, self.outputs = library, inputs, outputs
        self._rule = rule
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            copy = shutil.copy(library, folder)  # of a path that it knows, the loader gives the library it has loaded
            self._decide = ctypes.CDLL(copy).controller_decide_all

    def solve(self, *x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Decisions, and the status of each sample `(B,)`: 0 solved, 1 not solved, 2 not finite."""
        fed, names = as_tuple(x if self._rule.features is None else self._fed(x)), self._rule.context_names
        if len(fed) != len(names):
            raise ShapeError(f"the controller has {len(names)} contexts ({', '.join(names)}), got {len(fed)}")
        values = [as_tensor(name, v, "context").detach().double().cpu().numpy() for name, v in zip(names, fed)]
        for name, value, shape in zip(names, values, self.inputs):
            if len(value.shape) != 1 + len(shape) or len(value) != len(values[0]):
                raise ShapeError(f"context '{name}' must have shape ({len(values[0])}, {shape}), got {value.shape}")
            if value.shape[1:] != shape:
                raise ShapeError(f"context '{name}' must have shape (B, {shape}), got {value.shape}")
        batch = len(values[0])
        flat = np.ascontiguousarray(np.concatenate([v.reshape(batch, -1) for v in values], 1))
        sizes = [int(np.prod(shape)) for shape in self.outputs]
        found, status = np.full((batch, sum(sizes)), np.nan), np.zeros(batch, np.intc)
        pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (flat, found, status))
        self._decide(*pointers, ctypes.c_int(batch))
        parts = np.split(found, np.cumsum(sizes)[:-1], axis=1)
        decisions = tuple(torch.from_numpy(p.reshape(batch, *s).copy()) for p, s in zip(parts, self.outputs))
        return decisions, torch.from_numpy(status)

    def _fed(self, x: tuple[Tensor, ...]) -> Any:
        with torch.no_grad():
            return self._rule.features(*x)  # pyright: ignore[reportOptionalCall]

    def __call__(self, *x: Tensor) -> Any:
        """Decisions for contexts x, as of the rule; a SolverError names samples without a solution."""
        decisions, status = self.solve(*x)
        failed = torch.nonzero(status).flatten().tolist()
        if failed:
            raise SolverError(f"the compiled controller found no solution for {len(failed)} samples: {failed[:10]}")
        return decisions[0] if self._rule._single else decisions

    def compare(self, *x: Tensor) -> Comparison:
        """The controller against the rule on contexts x `(B, ...)`, sample by sample."""
        samples = [tuple(part[k : k + 1].double() for part in x) for k in range(len(x[0]))]
        with torch.no_grad():
            self._rule(*samples[0])
            begin = time.perf_counter()
            expected = [as_tuple(self._rule(*sample)) for sample in samples]
            rule_seconds = (time.perf_counter() - begin) / len(samples)
        self.solve(*samples[0])
        begin = time.perf_counter()
        found, status = self.solve(*(part.double() for part in x))
        seconds = (time.perf_counter() - begin) / len(samples)
        sound, error = status == 0, 0.0
        for part, wanted in zip(found, (torch.cat(parts) for parts in zip(*expected))):
            gap = (part - wanted).abs() / wanted.abs().clamp(min=1)
            error = max(error, float(gap[sound].max()) if bool(sound.any()) and gap.numel() else 0.0)
        failed = tuple(torch.nonzero(~sound).flatten().tolist())
        return Comparison(error, len(samples), failed, seconds, rule_seconds)


@checked(
    rule=instance(ConvexRule, "a ConvexRule; see torch.export for others"),
    folder=FOLDER,
    solver=instance(str, "the name of a solver"),
    tolerance=number(above=0, below=1),
    max_iterations=count(),
)
def export_c(
    rule: ConvexRule,
    folder: str | Path,
    *,
    solver: str | None = None,
    tolerance: float = 1e-8,
    max_iterations: int | None = None,
) -> Controller:
    """Write C code that decides like a tuned rule, with `controller.h`, compile it, and return the compiled controller.

    Tuned values become constants; the context is the input, after `features`, which stay outside. solver: OSQP, the
    default for QPs, or ECOS for second-order cones too, whose code is under the GPL. tolerance: on residuals (OSQP), on
    residuals and duality gap (ECOS, which goes on to 1e-4 of it where rounding allows); a solve that misses it has
    failed. max_iterations: 100,000 of OSQP, 100 of ECOS by default. The C function `controller_decide` checks the
    solver's status and the solution of every call, which cvxpygen's own `cpg_solve` leaves to the caller. Use `compare`
    on contexts as they will occur before you trust it. Needs `convexlearn[deploy]`, a C compiler and cmake. Source:
    Schaller and others, Embedded code generation with CVXPY (2022).
    """
    cpg = _generator()
    problem, outputs = _declared(rule)
    if solver is None and not problem.is_qp():
        raise OptionError(
            "export_c: the problem is no QP; solver='ECOS' takes second-order cones (its code is under GPL)"
        )
    solver = "OSQP" if solver is None else solver.upper()
    if solver not in SOLVERS:
        raise OptionError(f"export_c: solver '{solver}'; {suggest(solver, SOLVERS)}")
    iterations = MAX_ITERATIONS[solver] if max_iterations is None else max_iterations
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    try:
        # cvxpygen empties the folder that it is given
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as fresh:
            cpg.generate_code(problem, code_dir=str(Path(fresh) / "code"), solver=solver, wrapper=False)
            shutil.copytree(Path(fresh) / "code", folder, dirs_exist_ok=True)
    except Exception as error:  # whatever cvxpygen cannot canonicalize
        raise CompileError(f"cvxpygen cannot generate {solver} code for this problem: {error}") from error
    inputs = [p.shape for p in _inputs(problem, rule)]
    options = {"tolerance": tolerance, "aim": 1e-4 * tolerance, "iterations": iterations}
    _write(folder, rule, SOLVERS[solver], inputs, outputs, options)
    return Controller(_compile(folder), rule, inputs, outputs)


def _clear(folder: Path) -> None:
    """Remove the code of an earlier export, and nothing else; OptionError where other files are in the way."""
    for part in (folder / "c", folder / "build"):
        if part.exists() and not (folder / "controller.h").exists():
            raise OptionError(f"export_c: {part} exists and no exported controller is beside it; choose another folder")
        shutil.rmtree(part, ignore_errors=True)


def _declared(rule: ConvexRule) -> tuple[cp.Problem, list[tuple[int, ...]]]:
    """The problem with tuned values as constants, contexts `context_k` and decisions `decision_k`; their shapes."""
    declaration = rule.layer._declaration.copy()
    leaves: dict[int, Any] = {}
    for parameter in declaration.parameters:
        name = parameter.name()
        if name in rule.context_names:
            plain = not any(parameter.attributes[k] for k in ("diag", "symmetric", "PSD", "NSD", "sparsity"))
            if not plain or parameter.ndim > 2:
                raise CompileError(f"export_c: context '{name}' must be a plain array of at most two dimensions")
            leaf = cp.Parameter(parameter.shape, name=f"context_{rule.context_names.index(name)}")
            leaf._value = np.zeros(parameter.shape)  # pyright: ignore[reportAttributeAccessIssue]
            signs = {k: parameter.attributes[k] for k in ("nonneg", "nonpos", "pos", "neg")}
            leaf.attributes.update(signs)
            leaves[id(parameter)] = leaf
        else:
            leaves[id(parameter)] = cp.Constant(rule.value(name).detach().double().cpu().numpy())
    for k, variable in enumerate(declaration.problem.variables()):
        variable._name = f"variable_{k}"
    objective = declaration.problem.objective.tree_copy(id_objects=leaves)
    constraints = [c.tree_copy(id_objects=leaves) for c in declaration.problem.constraints]
    shapes = []
    for k, output in enumerate(declaration.outputs):
        decision = cp.Variable(output.shape, name=f"decision_{k}")
        constraints.append(decision == output.tree_copy(id_objects=leaves))
        shapes.append(tuple(output.shape))
    return cp.Problem(objective, constraints), shapes


def _inputs(problem: cp.Problem, rule: ConvexRule) -> list[Any]:
    named = {p.name(): p for p in problem.parameters()}
    return [named[f"context_{k}"] for k in range(len(rule.context_names))]


def _write(
    folder: Path,
    rule: ConvexRule,
    solver: tuple[str, str],
    inputs: Sequence[tuple[int, ...]],
    outputs: Sequence[tuple[int, ...]],
    options: dict[str, float],
) -> None:
    tables, updates, results = [], [], []
    for kind, shapes, lines in (("context", inputs, updates), ("decision", outputs, results)):
        start = 0
        for k, shape in enumerate(shapes):
            size, name = int(np.prod(shape)), f"{kind}_{k}"
            if shape == ():
                update, result = f"cpg_update_{name}(x[{start}]);", f"found[{start}] = CPG_Result.prim->{name};"
                lines.append("  " + (update if kind == "context" else result))
            else:
                rows = np.arange(size).reshape(shape).flatten(order="F")  # of each entry in C's order, column by column
                tables.append(f"static const int {name}_rows[{size}] = {{{', '.join(map(str, rows))}}};")
                place, loop = f"{start} + {name}_rows[k]", f"  for (k = 0; k < {size}; k++) "
                update = f"cpg_update_{name}(k, x[{place}]);"
                entry = f"CPG_Result.prim->{name}" + ("[k]" if size > 1 else "")
                lines.append(loop + (update if kind == "context" else f"found[{place}] = {entry};"))
            start += size
    solved, settings = solver
    text = {"tables": "\n".join(tables), "updates": "\n".join(updates), "results": "\n".join(results)}
    source = SOURCE.format(solved=solved, settings=settings.format(**options), **text)
    counts = {"inputs": sum(int(np.prod(s)) for s in inputs), "outputs": sum(int(np.prod(s)) for s in outputs)}
    described = ", ".join(f"{n} {s}" for n, s in zip(rule.context_names, inputs)) + " -> "
    header = HEADER.format(rule=type(rule).__name__, text=described + ", ".join(map(str, outputs)), **counts)
    for name, content in (("controller.h", header), ("controller.c", source), ("CMakeLists.txt", BUILD)):
        (folder / name).write_text(content)


def _compile(folder: Path) -> Path:
    if shutil.which("cmake") is None:
        raise OptionError("export_c needs cmake and a C compiler on the PATH; the C code itself is written")
    build = folder / "build"
    shutil.rmtree(build, ignore_errors=True)
    for command in (
        ["cmake", "-S", str(folder), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"],
        ["cmake", "--build", str(build), "--target", "controller"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CompileError(f"{' '.join(command)} failed: {(done.stderr or done.stdout)[-2000:]}")
    return next(path for path in build.glob("*controller*") if path.suffix in (".so", ".dylib", ".dll"))


def _generator() -> Any:
    return require("cvxpygen.cpg", "deploy", "export_c")
